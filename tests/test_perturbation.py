"""Forward gradients, node and weight perturbation: formulas in NumPy, moments, the experiment."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import error, wide

import fnn
from experiments import forward_gradient_variance
from fnn import losses
from fnn.nets.layers import Dense
from fnn.rules import forward_gradient, node_perturbation, weight_perturbation
from fnn.rules._noise import mean_of_draws, normal_like, normal_rows, weighted_sum

KEY = jax.random.key(3)
LABELS, SQUARE = losses.softmax_cross_entropy_with_integer_labels, losses.l2_loss
NET = fnn.mlp((3, 4, 5, 2), "tanh")
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 1.5])
SHARES = WEIGHTS / WEIGHTS.sum()


def problem(sizes=(3, 4, 5, 2), batch=5):
    """Layers `(w, b)` of an mlp, inputs and real targets, in float64."""
    rng = np.random.default_rng(0)
    pairs = itertools.pairwise(sizes)
    layers = [(rng.normal(size=(m, n)) / np.sqrt(m), 0.3 * rng.normal(size=n)) for m, n in pairs]
    return layers, rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))


def params_of(layers):
    """The params of `fnn.mlp`."""
    dense = [Dense(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    return (*((p, ()) for p in dense[:-1]), dense[-1])


def np_losses(layers, x, t, noise=()):
    """Half the squared error of a tanh mlp and `[h_0, ...]`, with noise on the first outputs."""
    hs = [x]
    for i, (w, b) in enumerate(layers):
        z = hs[-1] @ w + b
        h = np.tanh(z) if i < len(layers) - 1 else z
        hs.append(h + noise[i] if i < len(noise) else h)
    return 0.5 * ((hs[-1] - t) ** 2).sum(1), hs


def np_errors(layers, x, t):
    """dE_i/dh_l for every block."""
    _, hs = np_losses(layers, x, t)
    dhs = [hs[-1] - t]
    dz = dhs[0]
    for (w, _), h in zip(layers[:0:-1], hs[-2:0:-1], strict=True):
        dhs.insert(0, dz @ w.T)
        dz = dhs[0] * (1 - h**2)
    return dhs


def np_gradients(layers, x, t, dhs, shares):
    """The gradients where the outputs of the blocks have the errors `dhs`, a loop over examples."""
    _, hs = np_losses(layers, x, t)
    grads = [(np.zeros_like(w), np.zeros_like(b)) for w, b in layers]
    for i, share in enumerate(shares):
        for k, (dw, db) in enumerate(grads):
            slope = 1 - hs[k + 1][i] ** 2 if k < len(layers) - 1 else 1.0
            dz = share * dhs[k][i] * slope
            dw += np.outer(hs[k][i], dz)
            db += dz
    return params_of(grads)


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(wide(a), wide(b), strict=True))


def run(rule, net, params, x, t, weights=None):
    """A step, whose next state must be the other half of the key."""
    made = rule(net, SQUARE)
    value, grads, state = jax.jit(made.value_and_grad)(
        params, KEY, jnp.asarray(x), jnp.asarray(t), weights
    )
    expected = jax.random.key_data(jax.random.split(KEY)[0])
    assert (jax.random.key_data(state) == expected).all()
    return float(value), grads


STEP_KEY = jax.random.split(KEY)[1]


def test_forward_gradients_are_their_formulas(x64):
    layers, x, t = problem()
    params, dhs = params_of(layers), np_errors(layers, x, t)
    true, keys = np_gradients(layers, x, t, dhs, SHARES), jax.random.split(STEP_KEY, 3)
    directions = [normal_like(key, params) for key in keys]
    scaled = [jax.tree.map(lambda a, s=inner(true, v): s * a / 3, v) for v in directions]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *scaled)
    rule = functools.partial(forward_gradient, tangents=3)
    value, grads = run(rule, NET, params, x, t, WEIGHTS)
    assert error(wide(grads), wide(expected)) < 1e-12
    assert abs(value - (SHARES * np_losses(layers, x, t)[0]).sum()) < 1e-14

    estimates = [np.zeros((5, 4)), np.zeros((5, 5)), dhs[2]]
    for key in keys:
        noise = [np.asarray(u) for u in normal_rows(key, [jnp.zeros((5, n)) for n in (4, 5)])]
        slopes = sum((dh * u).sum(1) for dh, u in zip(dhs, noise, strict=False))
        for j, u in enumerate(noise):
            estimates[j] += slopes[:, None] * u / 3
    rule = functools.partial(forward_gradient, tangents=3, perturb="activations")
    _, grads = run(rule, NET, params, x, t, WEIGHTS)
    assert error(wide(grads), wide(np_gradients(layers, x, t, estimates, SHARES))) < 1e-12


@pytest.mark.parametrize(("antithetic", "outputs"), [(False, False), (True, True)])
def test_node_perturbation_is_its_formula(x64, antithetic, outputs):
    layers, x, t = problem()
    values, hs = np_losses(layers, x, t)
    rule = functools.partial(
        node_perturbation, std=0.3, antithetic=antithetic, perturb_outputs=outputs
    )
    value, grads = run(rule, NET, params_of(layers), x, t, WEIGHTS)
    widths = (4, 5, 2) if outputs else (4, 5)
    (key,) = jax.random.split(STEP_KEY, 1)
    noise = [np.asarray(u) for u in normal_rows(key, [jnp.zeros((5, n)) for n in widths])]
    up, down = (np_losses(layers, x, t, [sign * 0.3 * u for u in noise])[0] for sign in (1, -1))
    change = (up - down) / 0.6 if antithetic else (up - values) / 0.3
    estimates = [change[:, None] * u for u in noise] + ([] if outputs else [hs[-1] - t])
    assert error(wide(grads), wide(np_gradients(layers, x, t, estimates, SHARES))) < 1e-12
    assert abs(value - (SHARES * values).sum()) < 1e-14


@pytest.mark.parametrize(("antithetic", "size"), [(False, 1), (True, 8), (True, 100)])
def test_weight_perturbation_is_its_formula(x64, antithetic, size):
    layers, x, t = problem(batch=20)
    weights, (values, _) = np.arange(20) % 3 / 2, np_losses(layers, x, t)
    shares, params = weights / weights.sum(), params_of(layers)
    rule = functools.partial(
        weight_perturbation, std=0.3, antithetic=antithetic, microbatch_size=size
    )
    value, grads = run(rule, NET, params, x, t, weights)
    expected = jax.tree.map(jnp.zeros_like, params)
    for i in range(20):
        noise = normal_like(jax.random.fold_in(STEP_KEY, i), params)
        moved = [jax.tree.map(lambda p, v, s=s: p + s * v, params, noise) for s in (0.3, -0.3)]
        up, down = (float(SQUARE.value(NET.apply(p, x), t)[i]) for p in moved)
        change = (up - down) / 0.6 if antithetic else (up - values[i]) / 0.3
        expected = jax.tree.map(lambda e, v, c=shares[i] * change: e + c * v, expected, noise)
    assert error(wide(grads), wide(expected)) < 1e-12
    assert abs(value - (shares * values).sum()) < 1e-14


def test_a_flat_activation_does_not_stop_weight_perturbation(x64):
    layers, x, t = problem((2, 3, 1), batch=4)
    rule = functools.partial(weight_perturbation, std=0.5)
    assert wide(run(rule, fnn.mlp((2, 3, 1), "step"), params_of(layers), x, t)[1])[0].any()


def test_the_estimates_have_the_mean_and_the_second_moment_of_their_theory(x64):
    """E|g|^2 = (P + 2)|G|^2 along P weights, and so for the N units of a net with one hidden block
    along activations.

    One draw of |g|^2 / |G|^2 is r^2 (r^2 + n^2), r^2 ~ chi^2_1, n^2 ~ chi^2_m, m = P - 1, of
    variance 96 + 30 m + 2 m^2. The bounds are 5 standard errors, which are a small part of 1, so
    that P + 1 or P + 3 would fail.
    """
    net, draws = fnn.mlp((1, 2, 1), "tanh"), 2**16
    layers, x, t = problem((1, 2, 1), batch=1)
    params, dhs = params_of(layers), np_errors(layers, x, t)
    true = np_gradients(layers, x, t, dhs, [1.0])
    rule = forward_gradient(net, SQUARE)
    local = forward_gradient(net, SQUARE, perturb="activations")

    def sample(key):
        grads = rule.value_and_grad(params, key, x, t)[1]
        return jax.flatten_util.ravel_pytree(grads)[0], local.signals(params, key, x, t)[0][0]

    g, d = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(11), draws))
    flat = np.concatenate([leaf.ravel() for leaf in wide(true)])
    for found, expected, m in ((g, flat, 6), (d, dhs[0][0], 1)):
        size = (expected**2).sum()
        bound = 5 * np.sqrt((96 + 30 * m + 2 * m**2) / draws)
        assert abs((found**2).sum(1).mean() / size - (m + 3)) < bound < 0.5  # P + 2, P = m + 1
        of_mean = 5 * np.sqrt((size + expected**2) / draws)  # Var g_j = |G|^2 + G_j^2
        assert (np.abs(found.mean(0) - expected) < of_mean).all()
        assert (of_mean < 0.5 * np.abs(expected).max()).all()


# Noise and sums


def test_noise_is_standard_normal_and_independent():
    tree = (jnp.zeros((3, 4)), {"a": jnp.zeros(5, jnp.bfloat16)})
    keys = jax.random.split(KEY, 4000)
    a, b = jax.tree.leaves(jax.vmap(lambda key: normal_like(key, tree))(keys))
    assert b.dtype == jnp.bfloat16
    rows = np.concatenate(normal_rows(KEY, [jnp.zeros((4000, 4)), jnp.zeros((4000, 2))]), 1)
    drawn = np.concatenate([np.asarray(a).reshape(4000, 12), np.asarray(b, float)], 1)
    for draws in (drawn, rows, np.concatenate([rows[1:], rows[:-1]], 1)):
        assert np.abs(draws.mean(0)).max() < 5 / np.sqrt(4000)
        assert np.abs(np.cov(draws.T) - np.eye(draws.shape[1])).max() < 5 * np.sqrt(2 / 4000)


def test_the_noise_of_a_row_does_not_depend_on_the_batch_size():
    many, few = (normal_rows(KEY, [jnp.zeros((n, 4)), jnp.zeros((n, 2))]) for n in (50, 3))
    assert error([leaf[:3] for leaf in wide(many)], wide(few)) == 0


@pytest.mark.parametrize("size", [1, 4, 5, 12, 100])
def test_a_weighted_sum_is_the_sum_whatever_the_chunk(size):
    xs, shares = jnp.arange(24.0).reshape(12, 2), jnp.linspace(-1, 1, 12)
    found = weighted_sum(lambda x: (x, (x * x).sum()), shares, xs, size)
    np.testing.assert_allclose(found[0], shares @ xs, rtol=1e-6)
    np.testing.assert_allclose(found[1], shares @ (xs**2).sum(1), rtol=1e-5)


def test_means_of_narrow_numbers_accumulate_in_float32():
    found = mean_of_draws(lambda key: jnp.full(2, 1.0, jnp.bfloat16), KEY, 1000)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), 1.0)


def largest(jaxpr):
    """The most numbers in one array of a program, those of inner programs included."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                program = getattr(part, "jaxpr", part)
                sizes += [largest(program)] if hasattr(program, "eqns") else []
    return max(sizes, default=0)


def test_no_array_is_as_large_as_tangents_or_examples_or_members_times_parameters():
    net = fnn.mlp((8, 32, 32, 1))
    params = jax.eval_shape(net.init, KEY)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for rule, expected in (
        (forward_gradient(net, SQUARE, tangents=64), size),
        # two hidden blocks of 32 units, 64 examples
        (forward_gradient(net, SQUARE, tangents=64, perturb="activations"), 64 * 64),
        (weight_perturbation(net, SQUARE, microbatch_size=4), 4 * size),
        (fnn.rules.evolution_strategies(net, SQUARE, population=64, chunk=8), 8 * size),
    ):
        x, t = jnp.ones((64, 8)), jnp.ones((64, 1))
        program = jax.make_jaxpr(rule.value_and_grad)(params, KEY, x, t)
        assert largest(program.jaxpr) <= 2 * expected  # noise is drawn as pairs of words


# Bad input


fg, node, weight = forward_gradient, node_perturbation, weight_perturbation
ONE_BLOCK = fnn.mlp((3, 2))
BAD = {
    "`tangents` must be a whole number above 0, got 0": lambda: fg(NET, SQUARE, tangents=0),
    "Unknown perturb 'activities'. Did you mean": lambda: fg(NET, SQUARE, perturb="activities"),
    "must be a chain .* with weights": lambda: fg(ONE_BLOCK, SQUARE, perturb="activations"),
    "node_perturbation must be a chain": lambda: node(ONE_BLOCK, SQUARE),
    "`std` must be a finite number above 0, got 0.0": lambda: node(NET, SQUARE, std=0.0),
    "`std` must be a finite number above 0, got nan": lambda: weight(NET, SQUARE, std=np.nan),
    "`microbatch_size` must be a whole": lambda: weight(NET, SQUARE, microbatch_size=0),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_settings_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


# The experiment


def test_cosines_are_those_of_the_theory():
    """Along weights the mean over draws, so that sqrt(K / (K + P - 1)), the root of the mean
    square, would fail at K = 1."""
    draws, counts, net = 600, np.array([1, 2, 16]), fnn.mlp((8, 6, 3))
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(16, 8)), rng.integers(0, 3, 16)
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.int32)
    params = jax.jit(net.init)(KEY)
    p = sum(leaf.size for leaf in jax.tree.leaves(params))

    def measure(rule, name):
        cosines = functools.partial(forward_gradient_variance.cosines, net, rule, most=16)
        found = jax.jit(cosines)(params, batch, jax.random.split(KEY, draws))
        theory = forward_gradient_variance.expected(net, LABELS, params, batch, name, counts)
        return np.asarray(found)[:, counts - 1], theory

    found, theory = measure(forward_gradient(net, LABELS), "weights")
    standard_error = found[..., 0].std(0) / np.sqrt(draws)
    assert (np.abs(found[..., 0].mean(0) - theory[0]) < 4 * standard_error).all()
    assert abs(np.sqrt(1 / p) - theory[0, 0]) > 4 * standard_error[0]
    k = counts
    beta = 2 * k * (p - 1) / ((k + p - 1) ** 2 * (k + p + 1))  # variance of the squared cosine
    off = np.abs((found[..., 0] ** 2).mean(0) - k / (k + p - 1))
    assert (off < 4 * np.sqrt(beta / draws)).all()
    rule = forward_gradient(net, LABELS, perturb="activations")
    found, theory = measure(rule, "activations")
    np.testing.assert_allclose(found[:, -1].mean(0), theory[:, -1], rtol=0.03)


def test_the_variance_along_activations_is_that_of_the_theory():
    net, draws = fnn.mlp((4, 5, 6, 3)), 2**14
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(4, 4)), rng.integers(0, 3, 4)
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.int32)
    params = jax.jit(net.init)(KEY)
    step = forward_gradient(net, LABELS, perturb="activations").value_and_grad
    true = fnn.value_and_grad(net, LABELS)(params, *batch)[1]

    def squared_error(key):
        gaps = jax.tree.map(jnp.subtract, step(params, key, *batch)[1], true)
        return sum((gap**2).sum() for gap in jax.tree.leaves(gaps))

    squares = np.asarray(jax.jit(jax.vmap(squared_error))(jax.random.split(KEY, draws)), float)
    expected = forward_gradient_variance.activity_variance(net, LABELS, params, batch)
    standard_error = squares.std() / np.sqrt(draws)
    assert abs(squares.mean() - expected) < 4 * standard_error < 0.1 * expected


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"hidden": ()}, "`hidden` is empty"),
        ({"draws": 1}, "`draws` must be at least 2"),
        ({"tangents": 0}, "`tangents`"),
    ],
)
def test_invalid_flags_of_the_experiment_are_named(flag, message):
    """That it runs with its TINY config is tested in test_experiments.py."""
    with pytest.raises(ValueError, match=message):
        forward_gradient_variance.run(forward_gradient_variance.Config(**flag))
