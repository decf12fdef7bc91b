"""Private SGD: no example counts for more than the clip norm, the noise is as large as promised,
and epsilon is the published one."""

import builtins
import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide
from scipy import stats
from test_train import KEY, LOSS, NET, PARAMS, blobs

import fnn
from experiments import privacy_audit
from fnn.rules import PrivateState, private_sgd
from fnn.training import poisson_batches, shuffled_batches

TINY = fnn.mlp((2, 2))  # 6 parameters
TINY_PARAMS = jax.jit(TINY.init)(jax.random.key(3))
SIZES = [(60_000, 256), (1437, 180), (1000, 1), (50, 49), (64, 64), (1, 1), (7, 3), (100_000, 3)]


def flat(tree):
    return np.concatenate([leaf.ravel() for leaf in wide(tree)])


def gradient(rule, params, key, *batch):
    """The rule's gradient alone, of the key's noise."""
    return rule.value_and_grad(params, rule.init(key, params), *batch)[1]


def clipped_by_definition(params, x, t, max_norm):
    """Every example's gradient by `jax.grad`, in float64, then clipped: `[batch, parameters]`."""
    each = jax.vmap(
        jax.grad(lambda p, x, t: LOSS.value(NET.apply(p, x[None]), t[None])[0]), (None, 0, 0)
    )(params, x, t)
    g = np.concatenate([leaf.reshape(len(x), -1) for leaf in wide(each)], 1)
    return g * np.minimum(1, max_norm / np.linalg.norm(g, axis=1, keepdims=True))


PRIVATE_SGD = sys.modules["fnn.rules.private_sgd"]  # the name in `fnn.rules` is the function's


@pytest.mark.parametrize(("accountant", "expected"), [("rdp", 2.594), ("pld", 2.380)])
def test_epsilon_is_the_published_one_where_no_batch_is_cut_off(monkeypatch, accountant, expected):
    monkeypatch.setattr(PRIVATE_SGD, "CUT_OFF", 0.0)
    rule = private_sgd(NET, LOSS, noise_multiplier=1.1)
    found = rule.epsilon(60 * (60_000 // 256), 256 / 60_000, 1e-5, accountant)
    assert found == pytest.approx(expected, abs=1e-3)


def test_epsilon_charges_delta_with_the_probability_of_a_cut_off_batch(monkeypatch):
    """A batch is cut off with probability p in n steps: delta grows by n p (1 + e^epsilon)."""
    rule, steps, rate = private_sgd(NET, LOSS, noise_multiplier=1.1), 60 * 234, 256 / 60_000
    found = rule.epsilon(steps, rate, 1e-5)
    charge = steps * PRIVATE_SGD.CUT_OFF * (1 + math.exp(found))
    monkeypatch.setattr(PRIVATE_SGD, "CUT_OFF", 0.0)
    assert 0 < charge < 1e-5
    assert found == pytest.approx(rule.epsilon(steps, rate, 1e-5 - charge), abs=1e-5)
    assert found > rule.epsilon(steps, rate, 1e-5)


def test_epsilon_is_infinite_where_delta_does_not_cover_the_charge():
    rule = private_sgd(NET, LOSS, noise_multiplier=1.1)
    assert rule.epsilon(1000, 0.01, 1e-10) == math.inf
    assert rule.epsilon(1000, 1.0, 1e-10) < math.inf  # a whole batch is never cut off


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_noise_for_is_the_least_multiplier_that_reaches_epsilon(accountant):
    terms = {"steps": 200, "sampling_rate": 0.05, "delta": 1e-5, "accountant": accountant}
    noise = fnn.rules.noise_for(2.0, **terms)
    assert private_sgd(NET, LOSS, 1.0, noise).epsilon(**terms) <= 2.0
    assert private_sgd(NET, LOSS, 1.0, noise - 2e-3).epsilon(**terms) > 2.0


def test_epsilon_of_a_schedule_composes_its_steps():
    terms = {"sampling_rate": 0.05, "delta": 1e-5, "accountant": "rdp"}
    rule = private_sgd(NET, LOSS, 1.0, lambda step: jnp.where(step < 50, 2.0, 1.0))
    lower, upper = (private_sgd(NET, LOSS, 1.0, noise) for noise in (2.0, 1.0))
    assert rule.epsilon(50, **terms) == pytest.approx(lower.epsilon(50, **terms))
    assert lower.epsilon(100, **terms) < rule.epsilon(100, **terms) < upper.epsilon(100, **terms)
    assert rule.epsilon(100, **terms) > upper.epsilon(50, **terms)
    none_at_last = private_sgd(NET, LOSS, 1.0, lambda step: jnp.where(step < 50, 2.0, 0.0))
    assert none_at_last.epsilon(51, **terms) == math.inf


def test_schedules_are_of_the_step(x64):
    """Step by step, the rule with schedules is the rule with that step's numbers."""
    x, t = blobs(6)
    x, params = jnp.asarray(x, jnp.float64), cast(PARAMS, jnp.float64)
    rule = private_sgd(
        NET, LOSS, lambda s: 0.5 / (s.astype(float) + 1), lambda s: 1.0 + s.astype(float)
    )
    step, state = jax.jit(rule.value_and_grad), rule.init(KEY, params)
    for i in range(3):
        same = private_sgd(NET, LOSS, 0.5 / (i + 1), 1.0 + i)
        expected = same.value_and_grad(params, state, x, t)[1]
        _, found, state = step(params, state, x, t)
        assert error([flat(found)], [flat(expected)]) <= 1e-12
        assert state.step == i + 1


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_per_layer_clips_every_layer_so_that_the_whole_stays_in_bounds(x64, microbatch_size):
    x, t = blobs(8)
    x, params = jnp.asarray(x, jnp.float64), cast(PARAMS, jnp.float64)
    each = clipped_by_definition(params, x, t, math.inf)
    ends = np.cumsum([sum(leaf.size for leaf in jax.tree.leaves(layer)) for layer in params])
    layers = np.split(each, ends[:-1], axis=1)
    assert len(layers) == 2
    bound = 0.3 / math.sqrt(2)
    expected = [
        (g * np.minimum(1, bound / np.linalg.norm(g, axis=1, keepdims=True))).sum(0) / 8
        for g in layers
    ]
    rule = private_sgd(NET, LOSS, 0.3, 0.0, per_layer=True, microbatch_size=microbatch_size)
    found = flat(jax.jit(gradient, static_argnums=0)(rule, params, KEY, x, t))
    assert error([found], [np.concatenate(expected)]) <= 1e-12
    one = private_sgd(NET, LOSS, 0.3, 0.0, per_layer=True, batch_size=1)
    alone = jax.jit(gradient, static_argnums=0)
    for i in range(len(x)):
        share = flat(alone(one, params, KEY, x[i : i + 1], t[i : i + 1]))
        assert np.linalg.norm(share) <= 0.3 * (1 + 1e-12)


def test_epsilon_falls_with_noise_and_grows_with_steps_and_rate():
    def epsilon(noise, steps, rate):
        return private_sgd(NET, LOSS, noise_multiplier=noise).epsilon(steps, rate, 1e-5, "rdp")

    assert epsilon(2.0, 100, 0.1) < epsilon(1.0, 100, 0.1)
    assert epsilon(2.0, 100, 0.1) < epsilon(2.0, 200, 0.1) < epsilon(2.0, 200, 1.0)
    for accountant in ("pld", "rdp"):
        assert (
            private_sgd(NET, LOSS, noise_multiplier=0).epsilon(1, 0.1, 1e-5, accountant) == math.inf
        )


def test_epsilon_of_one_whole_batch_is_that_of_the_gaussian_mechanism():
    # Balle, Wang (2018), arXiv:1805.06530, theorem 8: delta = Phi(1/(2s) - e s) - exp(e)
    # Phi(-1/(2s) - e s)
    s = 1.5
    e = private_sgd(NET, LOSS, noise_multiplier=s).epsilon(1, 1.0, 1e-5)
    delta = stats.norm.cdf(1 / (2 * s) - e * s) - math.exp(e) * stats.norm.cdf(-1 / (2 * s) - e * s)
    assert delta == pytest.approx(1e-5, rel=1e-2)
    assert delta <= 1e-5


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("max_norm", [0.3, 1e30])
def test_without_noise_it_is_the_sum_of_clipped_gradients_over_the_batch_size(
    x64, max_norm, microbatch_size
):
    x, t = blobs(8)
    x, params = jnp.asarray(x, jnp.float64), cast(PARAMS, jnp.float64)
    each = clipped_by_definition(params, x, t, max_norm)
    for batch_size in (None, 5):
        rule = private_sgd(
            NET, LOSS, max_norm, 0.0, batch_size=batch_size, microbatch_size=microbatch_size
        )
        found = flat(jax.jit(gradient, static_argnums=0)(rule, params, KEY, x, t))
        assert error([found], [each.sum(0) / (batch_size or 8)]) <= 1e-12
    if max_norm == 1e30:
        rule = private_sgd(NET, LOSS, max_norm, 0.0, microbatch_size=microbatch_size)
        found = flat(jax.jit(gradient, static_argnums=0)(rule, params, KEY, x, t))
        whole = flat(jax.jit(fnn.value_and_grad(NET, LOSS))(params, x, t)[1])
        assert error([found], [whole]) <= 1e-12


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_noise_has_the_promised_size_in_every_coordinate(batch_size):
    draws, x, t = 20_000, jnp.ones((10, 2)), jnp.zeros(10, jnp.int32)
    noisy, still = (
        private_sgd(TINY, LOSS, 0.5, noise, batch_size=batch_size) for noise in (3.0, 0.0)
    )
    rest = gradient(still, TINY_PARAMS, KEY, x, t)
    keys = jax.random.split(jax.random.key(11), draws)
    every = jax.jit(jax.vmap(lambda key: gradient(noisy, TINY_PARAMS, key, x, t)))(keys)
    noise = np.concatenate(
        [(a - b[None]).reshape(draws, -1) for a, b in zip(wide(every), wide(rest), strict=True)], 1
    )
    # [draws, parameters]: standard normal, and independent
    z = noise / (3.0 * 0.5 / (batch_size or 10))
    assert z.shape[1] == 6
    limit = stats.norm.isf(1e-6)  # for 6 + 6 + 15 statistics: by chance about once in 20,000 seeds
    assert (np.abs(z.mean(0)) * draws**0.5 < limit).all()
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], draws)
    assert ((low < (z**2).sum(0)) & ((z**2).sum(0) < high)).all()
    correlations = np.corrcoef(z.T)[np.triu_indices(6, 1)]
    assert (np.abs(correlations) * draws**0.5 < limit).all()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-6


def test_the_noise_differs_between_steps_and_is_the_same_for_the_same_key():
    x, t = blobs(6)
    rule = private_sgd(NET, LOSS)
    step = jax.jit(rule.value_and_grad)
    _, first, state = step(PARAMS, rule.init(KEY, PARAMS), x, t)
    _, again, _ = step(PARAMS, rule.init(KEY, PARAMS), x, t)
    _, second, after = step(PARAMS, state, x, t)
    np.testing.assert_array_equal(flat(first), flat(again))
    assert (flat(first) != flat(second)).all()
    keys = [tuple(jax.random.key_data(k).tolist()) for k in (KEY, state.key, after.key)]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_neighbouring_batches_differ_by_at_most_the_clip_norm(x64, dtype):
    """Examples large and small, alone and beside others, one put in or taken out by its weight."""
    x, t = blobs(23)
    x = jnp.asarray(x * np.logspace(-4, 6, len(x))[:, None], dtype)
    rule, params = private_sgd(NET, LOSS, 0.7, 0.0, batch_size=1), cast(PARAMS, dtype)
    total = jax.jit(lambda w: gradient(rule, params, KEY, x, t, w))
    rng, greatest = np.random.default_rng(0), 0.0
    for i in range(len(x)):
        for w in (np.zeros(len(x)), (rng.random(len(x)) < 0.5).astype(float)):
            w[i] = 0
            without = flat(total(jnp.asarray(w, dtype)))
            w[i] = rng.uniform(0.1, 9)  # any weight above 0 counts as 1
            greatest = max(
                greatest, float(np.linalg.norm(flat(total(jnp.asarray(w, dtype))) - without))
            )
    rounding = 32 * float(jnp.finfo(dtype).eps)  # relative; sums are of some 10 vectors of norm 0.7
    assert 0.7 * (1 - rounding) <= greatest <= 0.7 * (1 + rounding)


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_counts_nothing(bad, microbatch_size):
    x, t = blobs(7)
    step = jax.jit(
        private_sgd(NET, LOSS, batch_size=7, microbatch_size=microbatch_size).value_and_grad
    )
    x[2] = bad
    present = np.ones(7, np.float32)
    state = PrivateState(KEY, jnp.int32(0))
    value, found, _ = step(PARAMS, state, x, t, present)
    present = np.asarray([1, 1, 0, 1, 1, 1, 1], np.float32)
    expected_value, expected, _ = step(PARAMS, state, x, t, present)
    assert np.isfinite([*flat(found), value]).all()
    assert value == expected_value
    np.testing.assert_array_equal(flat(found), flat(expected))


def test_a_batch_without_examples_is_noise_alone():
    x, t = blobs(4)
    rule = private_sgd(NET, LOSS)
    state = rule.init(KEY, PARAMS)
    value, found, _ = rule.value_and_grad(PARAMS, state, x, t, np.zeros(4, np.float32))
    assert value == 0
    # 1 / 4 in 57 coordinates: by chance about once in 50
    assert 0.8 < flat(found).std() / 0.25 < 1.2


@pytest.mark.parametrize(("examples", "batch_size"), SIZES)
def test_poisson_batches_are_of_one_size_that_is_next_to_never_too_small(examples, batch_size):
    shapes = set()
    for seed in range(3):
        rows, present = poisson_batches(seed, examples, batch_size)
        shapes.add(rows.shape)
        assert present.shape == rows.shape
        assert (rows.dtype, present.dtype) == (np.int32, np.float32)
    ((steps, size),) = shapes
    assert steps == math.ceil(examples / batch_size)
    assert size <= examples
    assert stats.binom.sf(size, examples, batch_size / examples) < 1e-12


def test_poisson_batches_take_every_example_with_the_same_probability_and_none_twice():
    examples, batch_size, seeds = 40, 12, 2000
    q, taken, counts = batch_size / examples, np.zeros((examples, examples)), []
    for seed in range(seeds):
        for rows, present in zip(*poisson_batches(seed, examples, batch_size), strict=True):
            chosen = rows[present > 0]
            assert len(set(chosen.tolist())) == len(chosen)
            assert (np.diff(present) <= 0).all()
            assert (rows[present == 0] == 0).all()
            # on the diagonal how often an example came, off it how often a pair did
            taken[np.ix_(chosen, chosen)] += 1
            counts.append(len(chosen))
    n, limit = len(counts), stats.norm.isf(1e-7)
    for found, p in ((np.diag(taken), q), (taken[np.triu_indices(examples, 1)], q * q)):
        assert (np.abs(found - n * p) < limit * math.sqrt(n * p * (1 - p))).all()
    variance = examples * q * (1 - q)
    assert abs(np.mean(counts) - batch_size) < limit * math.sqrt(variance / n)
    assert abs(np.var(counts) - variance) < limit * variance * math.sqrt(2 / n)
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], examples, q)
    assert low <= min(counts) < batch_size < max(counts) <= high


def test_poisson_batches_leave_a_surplus_out(monkeypatch):
    size = poisson_batches(0, 1000, 10)[0].shape[1]

    class TooMany(np.random.Generator):
        def binomial(self, n, p, steps):
            return np.full(steps, n)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: TooMany(np.random.PCG64(seed)))
    rows, present = poisson_batches(0, 1000, 10)
    assert rows.shape == (100, size)
    assert present.all()
    assert all(len(set(row)) == size for row in rows.tolist())


def test_fit_with_poisson_batches_trains_and_draws_anew_every_epoch():
    data = blobs(60)
    drawn = []

    def sampler(seed, examples, batch_size):
        drawn.append(poisson_batches(seed, examples, batch_size)[0])
        return poisson_batches(seed, examples, batch_size)

    rule = private_sgd(NET, LOSS, noise_multiplier=0.5, batch_size=20)
    runs = [
        fnn.fit(
            rule,
            optax.adam(0.05),
            PARAMS,
            data,
            epochs=30,
            batch_size=20,
            key=KEY,
            validation=data,
            sampler=s,
        )
        for s in (sampler, poisson_batches)
    ]
    params, history = runs[0]
    assert history.step_loss.shape == (90,)
    assert history.validation["accuracy"][-1] > 0.85
    np.testing.assert_array_equal(flat(params), flat(runs[1][0]))
    assert len({rows.tobytes() for rows in drawn}) == len(drawn) >= 30


def test_the_default_sampler_shuffles():
    data = blobs(9)
    settings = {"epochs": 2, "batch_size": 4, "key": KEY}
    rule = fnn.rules.backprop(NET, LOSS)
    without, by_name = (
        fnn.fit(rule, optax.sgd(0.1), PARAMS, data, **settings, **s)[0]
        for s in ({}, {"sampler": shuffled_batches})
    )
    np.testing.assert_array_equal(flat(without), flat(by_name))


BAD = [
    ({"max_norm": 0.0}, ValueError, "`max_norm` must be a finite number above 0, got 0.0"),
    ({"max_norm": -1.0}, ValueError, "`max_norm` must be a finite number above 0, got -1.0"),
    ({"max_norm": math.nan}, ValueError, "`max_norm` must be a finite number above 0, got nan"),
    ({"max_norm": math.inf}, ValueError, "`max_norm` must be a finite number above 0, got inf"),
    ({"max_norm": "1"}, TypeError, "`max_norm` must be a finite number above 0, got '1'"),
    (
        {"noise_multiplier": -0.1},
        ValueError,
        "`noise_multiplier` must be a finite number, at least 0, got -0.1",
    ),
    (
        {"noise_multiplier": math.nan},
        ValueError,
        "`noise_multiplier` must be a finite number, at least 0, got nan",
    ),
    (
        {"noise_multiplier": math.inf},
        ValueError,
        "`noise_multiplier` must be a finite number, at least 0, got inf",
    ),
    (
        {"noise_multiplier": True},
        TypeError,
        "`noise_multiplier` must be a finite number, at least 0, got True",
    ),
    ({"batch_size": 0}, ValueError, "`batch_size` must be a whole number above 0, got 0"),
    ({"batch_size": 2.5}, TypeError, "`batch_size` must be a whole number above 0, got 2.5"),
    ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be a whole number above 0, got 0"),
    ({"net": "mlp"}, TypeError, "`net` must be a Layer"),
    ({"loss": "l2"}, TypeError, "`loss` must be a Loss"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[str(a) for a, _, _ in BAD])
def test_a_bad_argument_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        private_sgd(**{"net": NET, "loss": LOSS} | arguments)


BAD_EPSILON = [
    ({"steps": 0}, ValueError, "`steps` must be a whole number above 0, got 0"),
    ({"steps": 1.5}, TypeError, "`steps` must be a whole number above 0, got 1.5"),
    (
        {"sampling_rate": 0.0},
        ValueError,
        "`sampling_rate` must be a finite number above 0, got 0.0",
    ),
    (
        {"sampling_rate": 1.1},
        ValueError,
        "`sampling_rate` must be at most 1, got 1.1. It is batch_size / examples",
    ),
    (
        {"sampling_rate": math.nan},
        ValueError,
        "`sampling_rate` must be a finite number above 0, got nan",
    ),
    ({"delta": 0.0}, ValueError, "`delta` must be a finite number above 0, got 0.0"),
    ({"delta": 1.0}, ValueError, "`delta` must be below 1, got 1.0"),
    ({"accountant": "pdl"}, ValueError, "Unknown accountant 'pdl'. Did you mean 'pld'"),
]


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"), BAD_EPSILON, ids=[str(a) for a, _, _ in BAD_EPSILON]
)
def test_a_bad_argument_of_epsilon_is_named(arguments, kind, message, noise_multiplier):
    with pytest.raises(kind, match=message):
        private_sgd(NET, LOSS, 1.0, noise_multiplier).epsilon(
            **{"steps": 1, "sampling_rate": 0.1, "delta": 1e-5} | arguments
        )


def test_a_missing_accountant_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r'dp-accounting. Install it: pip install "fnn\[privacy\]"'
    ):
        private_sgd(NET, LOSS).epsilon(1, 0.1, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_too_narrow_for_the_bound_are_refused(dtype):
    x, t = blobs(4)
    with pytest.raises(
        TypeError, match=r"`params\[0\]\[0\].w` is b?float16: private_sgd needs float32 at least"
    ):
        private_sgd(NET, LOSS).value_and_grad(cast(PARAMS, dtype), KEY, jnp.asarray(x, dtype), t)


BAD_SAMPLERS = [
    ("poisson", TypeError, "`sampler` must be a function .* got 'poisson'"),
    (
        lambda seed, examples, size: (np.full((2, 3), examples), None),
        ValueError,
        r"rows in 0 \.\.\. 7, got 8 \.\.\. 8",
    ),
    (
        lambda seed, examples, size: (np.full((2, 3), -1), None),
        ValueError,
        r"rows in 0 \.\.\. 7, got -1 \.\.\. -1",
    ),
    (
        lambda seed, examples, size: (np.zeros(3, int), None),
        ValueError,
        r"rows \[steps, size\] .* got \(3,\) and None",
    ),
    (
        lambda seed, examples, size: (np.zeros((2, 3), int), np.ones(6)),
        ValueError,
        r"got \(2, 3\) and \(6,\)",
    ),
]


@pytest.mark.parametrize(("sampler", "kind", "message"), BAD_SAMPLERS)
def test_a_bad_sampler_is_named(sampler, kind, message):
    with pytest.raises(kind, match=message):
        fnn.fit(
            fnn.rules.backprop(NET, LOSS),
            optax.sgd(0.1),
            PARAMS,
            blobs(8),
            epochs=1,
            batch_size=4,
            key=KEY,
            sampler=sampler,
        )


def test_a_sampler_for_an_iterable_is_refused():
    with pytest.raises(ValueError, match="`sampler` draws from arrays, but `data` is an iterable"):
        fnn.fit(
            fnn.rules.backprop(NET, LOSS),
            optax.sgd(0.1),
            PARAMS,
            [blobs(4)],
            epochs=1,
            batch_size=4,
            key=KEY,
            sampler=poisson_batches,
        )


def test_poisson_batches_of_more_than_there_is_are_refused():
    with pytest.raises(ValueError, match="`batch_size` is 9 but there are only 8 examples"):
        poisson_batches(0, 8, 9)


def test_coupled_examples_are_found():
    def forward(params, x):
        mean = x.mean(0, keepdims=True)
        return x - mean, ()

    centre = fnn.Layer(
        "centre",
        lambda key: (),
        forward,
        lambda params, residuals, dy, reduce=None: ((), dy - dy.mean(0, keepdims=True)),
    )
    net = fnn.serial(fnn.dense(5, 4), centre, fnn.dense(4, 3))
    x, t = blobs(8)
    with pytest.raises(ValueError, match="couples the examples"):
        fnn.per_example.check_source(fnn.source(net, LOSS), jax.jit(net.init)(KEY), x, t)


def test_the_audit_finds_noise_that_is_too_small(monkeypatch, tmp_path):
    def broken(net, loss, max_norm, noise_multiplier, **settings):
        return private_sgd(net, loss, max_norm, 0.8 * noise_multiplier, **settings)

    monkeypatch.setattr(fnn.rules, "private_sgd", broken)
    with pytest.raises(
        ArithmeticError, match=r"audit failed: .*the noise's standard deviation is 0\.8"
    ):
        privacy_audit.main(dataclasses.replace(privacy_audit.TINY, out=tmp_path))


def test_the_audit_finds_a_share_that_is_too_large(monkeypatch, tmp_path):
    clipped_gradient = fnn.per_example.clipped_gradient
    monkeypatch.setattr(
        fnn.per_example,
        "clipped_gradient",
        lambda source, bound, **kind: clipped_gradient(source, 1.01 * bound, **kind),
    )
    with pytest.raises(ArithmeticError, match=r"the largest share in float32 is 1\.01"):
        privacy_audit.main(dataclasses.replace(privacy_audit.TINY, max_norm=0.5, out=tmp_path))


def test_it_prints_its_name():
    assert str(private_sgd(NET, LOSS)) == "private_sgd"
