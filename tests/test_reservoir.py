"""Reservoirs: the ridge readout is scikit-learn's, states are those of a plain loop, and only the
last block of a net is set."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide
from jax import lax
from jax.nn.initializers import lecun_normal
from sklearn.linear_model import Ridge

import fnn
from experiments import mackey_glass
from experiments._data import load
from fnn import losses
from fnn.nets.layers import Dense
from fnn.reservoir import NormalEquations, Reservoir, diagnose, echo_state, ridge
from fnn.rules.extreme_learning import extreme_learning

KEY = jax.random.key(7)


def regression(n=40, f=6, o=2, seed=0):
    """Features with different scales and means, and targets that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, f)) * np.geomspace(0.1, 10, f) + rng.normal(size=f)
    return x, x @ rng.normal(size=(f, o)) + rng.normal(size=(n, o)) + 3, rng.uniform(0.1, 2, n)


# The readout


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "penalty"), [(40, 0.0), (40, 0.3), (4, 0.3), (40, 1e4)])
def test_ridge_is_that_of_scikit_learn(x64, n, penalty, intercept, weighted):
    x, t, weights = regression(n)
    theirs = Ridge(alpha=penalty, fit_intercept=intercept, solver="cholesky").fit(
        x, t, weights if weighted else None
    )
    ours = ridge(x, t, penalty, intercept=intercept, weights=weights if weighted else None)
    np.testing.assert_allclose(ours.w, theirs.coef_.T, rtol=1e-10, atol=1e-10)
    if intercept:
        np.testing.assert_allclose(ours.b, theirs.intercept_, rtol=1e-10, atol=1e-10)
    else:
        assert ours.b is None


def test_a_readout_of_one_example_is_its_target(x64):
    readout = ridge(np.array([[2.0]]), np.array([[5.0, 6.0]]), 1.0)
    np.testing.assert_array_equal(readout.w, np.zeros((1, 2)))
    np.testing.assert_array_equal(readout.b, [5.0, 6.0])


@pytest.mark.parametrize("intercept", [True, False])
def test_all_batches_together_are_the_readout_at_once(x64, intercept):
    x, t, weights = regression(43)
    once = ridge(x, t, 0.1, intercept=intercept, weights=weights)
    rows = np.append(np.random.default_rng(1).permutation(43), 0).reshape(4, 11)
    present = (np.arange(44) < 43).astype(float).reshape(4, 11)
    # what fills up does not count, whatever it holds
    xs = np.where(present[..., None] > 0, x[rows], 1e3)
    ts = np.where(present[..., None] > 0, t[rows], np.nan)

    def body(equations, batch):
        return equations.add(*batch), None

    scanned, _ = lax.scan(body, NormalEquations.start(6, 2), (xs, ts, weights[rows] * present))
    in_another_order = NormalEquations.start(6, 2)
    for i in (3, 1):
        in_another_order = in_another_order.add(xs[i], ts[i], weights[rows[i]] * present[i])
    others = (
        NormalEquations.start(6, 2)
        .add(xs[0], ts[0], weights[rows[0]])
        .add(xs[2], ts[2], weights[rows[2]])
    )
    for equations in (
        scanned,
        in_another_order.merge(others),
        others.merge(in_another_order),
        scanned.add(xs[0], ts[0], np.zeros(11)),
    ):
        solution = equations.solve(0.1, intercept=intercept)
        assert error(wide(solution), wide(once)) < 1e-12
        np.testing.assert_allclose(equations.weight, weights.sum(), rtol=1e-14)
    np.testing.assert_allclose(scanned.mean, np.average(x, axis=0, weights=weights), rtol=1e-12)
    np.testing.assert_allclose(
        scanned.moments / scanned.weight,
        np.cov(x.T, aweights=weights, bias=True),
        rtol=1e-10,
        atol=1e-12,
    )


def test_features_far_from_zero_keep_their_digits_in_float32():
    rng = np.random.default_rng(0)
    x = (1e3 + 1e-2 * rng.normal(size=(2000, 3))).astype(np.float32)
    t = (
        (x.astype(np.float64) - 1e3) @ [[100.0], [-50.0], [20.0]] + 0.1 * rng.normal(size=(2000, 1))
    ).astype(np.float32)
    expected = Ridge(alpha=1e-4).fit(x.astype(np.float64), t.astype(np.float64)).coef_.T
    equations = NormalEquations.start(3, 1)
    for i in range(0, 2000, 100):
        equations = equations.add(x[i : i + 100], t[i : i + 100])
    for w in (ridge(x, t, 1e-4).w, equations.solve(1e-4).w):
        assert error(wide(w), [expected]) < 2e-3
    raw = x.T @ x - 2000 * np.outer(x.mean(0), x.mean(0))  # sums of raw squares keep nothing
    assert error([raw.astype(np.float64)], wide(equations.moments)) > 1


def test_a_readout_may_be_mapped_over_penalties(x64):
    x, t, _ = regression()
    penalties = jnp.array([0.01, 1.0, 100.0])
    mapped = jax.vmap(lambda penalty: ridge(x, t, penalty))(penalties)
    for i, penalty in enumerate(penalties):
        assert error([leaf[i] for leaf in wide(mapped)], wide(ridge(x, t, penalty))) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_readouts_and_states_keep_the_dtype(dtype):
    def everything(reservoir, x, t, weights):
        net = echo_state(6, 5)
        states = net.states(reservoir, x)
        forecast = net.forecast(reservoir, ridge(states[:-1], x[1:], 0.1), states[-1], 2)
        equations = NormalEquations.start(6, 2, dtype).add(x, t, weights)
        return (ridge(x, t, 0.1, weights=weights), states, forecast), (
            equations,
            equations.solve(0.1),
            diagnose(states)[1:],
        )

    kept, wider = jax.eval_shape(
        everything,
        cast(echo_state(6, 5).init(KEY), dtype),
        *(jnp.asarray(a, dtype) for a in regression()),
    )
    for leaves, expected in ((kept, dtype), (wider, jnp.float32)):
        for leaf in jax.tree.leaves(leaves):
            assert leaf.dtype == expected
            assert not leaf.weak_type


# three examples, each three times
FEW = np.tile(np.random.default_rng(3).normal(size=(3, 6)), (3, 1))
FULL = np.random.default_rng(4).normal(size=(9, 6))
SINGULAR = {
    "few": (FEW, 0.0, r"6 features have rank 2 in float64 .* Pass a `penalty` above 0"),
    "dependent": (
        np.column_stack([FULL[:, :5], FULL[:, 0] + 2 * FULL[:, 1]]),
        0.0,
        r"6 features have rank 5 in float64",
    ),
    "constant": (
        np.column_stack([FULL[:, :5], np.full(9, 0.1)]),
        0,
        r"6 features have rank 5 .*a constant feature",
    ),
    "lost": (FEW, 1e-30, r"`penalty` 1e-30 is lost in rounding: .* or use float64"),
    "nan": (
        np.where(FULL.max() == FULL, np.nan, FULL),
        0.0,
        r"features, targets or weights hold NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_without_a_unique_solution_there_is_an_error_and_under_jit_nan(x64, case):
    x, penalty, message = SINGULAR[case]
    t = np.arange(9.0)[:, None]
    with pytest.raises(ValueError, match=message):
        ridge(x, t, penalty)
    assert np.isnan(jax.vmap(lambda x: ridge(x, t, penalty))(x[None]).w).all()


def test_dependent_features_are_found_where_rounding_hides_them_from_cholesky(x64):
    x = np.random.default_rng(5).normal(size=(20, 9, 5))
    x = np.concatenate([x, x @ np.random.default_rng(6).normal(size=(20, 5, 1))], 2)
    centred = x - x.mean(1, keepdims=True)
    assert (
        0
        < np.isfinite(jnp.linalg.cholesky(centred.transpose(0, 2, 1) @ centred)).all((1, 2)).sum()
        < 20
    )
    assert np.isnan(jax.vmap(lambda x: ridge(x, np.arange(9.0)[:, None], 0.0))(x).w).all()


# Echo states


def loop(reservoir, inputs, initial=None):
    """The formula, unit by unit, in NumPy."""
    w, w_in, b, leak = (np.asarray(leaf) for leaf in reservoir)
    s, found = np.zeros(len(b)) if initial is None else initial, []
    for u in inputs:
        z = [
            sum(s[i] * w[i, j] for i in range(len(b)))
            + sum(u[k] * w_in[k, j] for k in range(len(u)))
            + b[j]
            for j in range(len(b))
        ]
        s = (1 - leak) * s + leak * np.tanh(z)
        found.append(s)
    return np.array(found)


@pytest.mark.parametrize(
    ("inputs", "units", "leak", "radius"), [(3, 7, 0.3, 1.4), (3, 7, 1.0, 0.9), (1, 1, 0.5, 0.0)]
)
def test_states_are_those_of_a_plain_loop(x64, inputs, units, leak, radius):
    rng = np.random.default_rng(units)
    u, initial = rng.normal(size=(25, inputs)), rng.uniform(-1, 1, units)
    net = echo_state(inputs, units, spectral_radius=radius, leak=leak, density=0.4)
    reservoir = net.init(KEY)
    expected = loop(reservoir, u)
    states = net.states(reservoir, u)
    np.testing.assert_allclose(states, expected, atol=1e-12)
    np.testing.assert_array_equal(net.states(reservoir, u, warm_up=9), states[9:])
    np.testing.assert_allclose(net.states(reservoir, u[10:], states[9]), expected[10:], atol=1e-12)
    np.testing.assert_allclose(
        net.states(reservoir, u, initial), loop(reservoir, u, initial), atol=1e-12
    )
    np.testing.assert_allclose(
        net.step(reservoir, states[4], jnp.asarray(u[5])), expected[5], atol=1e-12
    )


@pytest.mark.parametrize("intercept", [True, False])
def test_a_forecast_is_the_readout_fed_back(x64, intercept):
    net = echo_state(3, 7, leak=0.6, density=0.5)
    reservoir, u = net.init(KEY), np.random.default_rng(0).normal(size=(26, 3))
    states = net.states(reservoir, u[:-1], warm_up=5)
    readout = ridge(states, u[6:], 0.1, intercept=intercept)
    s, expected = np.asarray(states[-1]), []
    for _ in range(6):
        expected.append(s @ readout.w + (0 if readout.b is None else np.asarray(readout.b)))
        (s,) = loop(reservoir, expected[-1][None], s)
    np.testing.assert_allclose(
        net.forecast(reservoir, readout, states[-1], 6), expected, atol=1e-12
    )


@pytest.mark.parametrize(
    ("units", "density", "heard"), [(50, 0.1, 5), (50, 1.0, 50), (7, 0.01, 1), (1, 0.5, 1)]
)
def test_a_reservoir_has_its_radius_and_every_unit_hears_as_many(units, density, heard):
    net = echo_state(
        3,
        units,
        spectral_radius=0.7,
        density=density,
        input_scaling=0.5,
        bias_scaling=0.1,
        leak=0.25,
    )
    reservoir = net.init(KEY)
    assert np.abs(np.linalg.eigvals(wide(reservoir.w)[0])).max() == pytest.approx(0.7, rel=1e-6)
    assert (np.count_nonzero(reservoir.w, axis=0) == heard).all()
    for leaf, bound in ((reservoir.w_in, 0.5), (reservoir.b, 0.1)):
        assert 0 < np.abs(leaf).max() <= bound
    assert reservoir.leak == 0.25
    again, other = net.init(KEY), net.init(jax.random.key(8))
    assert error(wide(again), wide(reservoir)) == 0
    assert error(wide(other), wide(reservoir)) > 0.1
    with jax.enable_x64(True):
        assert np.abs(np.linalg.eigvals(net.init(KEY).w)).max() == pytest.approx(0.7, rel=1e-12)


def test_a_radius_below_one_forgets_the_first_state_and_one_above_does_not(x64):
    still = np.zeros((400, 1))
    for radius, forgets in ((0.9, True), (1.5, False)):
        net = echo_state(1, 30, spectral_radius=radius, bias_scaling=0.0)
        reservoir = net.init(KEY)
        one, other = (net.states(reservoir, still, jnp.full(30, value))[-1] for value in (0.0, 0.1))
        assert bool(np.abs(one - other).max() < 1e-10) == forgets
        assert np.abs(one).max() == 0


def test_several_reservoirs_run_at_once_by_the_same_functions(x64):
    slow, fast = echo_state(3, 7, leak=0.2), echo_state(3, 7)
    assert slow.states is fast.states
    assert slow.forecast is fast.forecast
    each = [net.init(key) for net, key in zip((slow, fast), jax.random.split(KEY), strict=True)]
    u = np.random.default_rng(0).normal(size=(25, 3))
    together = jax.vmap(slow.states, (0, None))(jax.tree.map(lambda *a: jnp.stack(a), *each), u)
    np.testing.assert_allclose(
        together, [slow.states(reservoir, u) for reservoir in each], atol=1e-12
    )


def test_rank_effective_rank_and_saturation_of_states_that_are_known(x64):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(20, 5)) - rng.normal(size=(20, 5)).mean(0))
    q = q - q.mean(0)
    q, _ = np.linalg.qr(q)  # orthogonal columns of mean 0
    sizes = np.array([2.0, 1.0, 1.0, 0, 0])
    found = diagnose(jnp.asarray((q * sizes) @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + 7))
    assert found.rank == 3
    np.testing.assert_allclose(
        found.effective_rank, np.exp(0.5 * np.log(2) + 2 * 0.25 * np.log(4)), rtol=1e-10
    )
    assert found.saturation == 1
    assert diagnose(jnp.array([[0.96, -0.96, 0.0], [0.1, 0.2, -1.0]])).saturation == 0.5
    constant = diagnose(jnp.full((4, 3), 0.5))
    assert (constant.rank, constant.effective_rank, constant.saturation) == (0, 0, 0)
    equal = diagnose(jnp.asarray(q))
    np.testing.assert_allclose(equal.effective_rank, 5, rtol=1e-10)


# Bad input


X, T = jnp.ones((5, 3)), jnp.ones((5, 2))
NET = echo_state(3, 4)
RESERVOIR = NET.init(KEY)
BAD = [
    (
        lambda: ridge(X, T, -1.0),
        ValueError,
        r"`penalty` must be a finite number, at least 0, got -1.0",
    ),
    (
        lambda: ridge(X, T, "much"),
        TypeError,
        r"`penalty` must be a finite number, at least 0, got 'much'",
    ),
    (
        lambda: ridge(X, T, jnp.ones(2)),
        ValueError,
        r"`penalty` must be one number, got shape \(2,\). Several\? `jax.vmap`",
    ),
    (
        lambda: ridge(X[0], T, 1.0),
        ValueError,
        r"`features` must be \[rows, columns\].*got shape \(3,\)",
    ),
    (lambda: ridge(X, T[:, 0], 1.0), ValueError, r"`targets` must be .* Pass `targets\[:, None\]`"),
    (
        lambda: ridge(X[:0], T[:0], 1.0),
        ValueError,
        r"`features` must be .* at least one row, got shape \(0, 3\)",
    ),
    (lambda: ridge(X, T[:4], 1.0), ValueError, r"`features` has 5 rows but `targets` has 4"),
    (
        lambda: ridge(X, T.astype(int), 1.0),
        TypeError,
        r"`targets` must hold floating-point numbers",
    ),
    (
        lambda: ridge(X, T.astype(jnp.bfloat16), 1.0),
        TypeError,
        r"`targets` is bfloat16 but `features` is float32",
    ),
    (
        lambda: ridge(X, T, 1.0, weights=jnp.ones(4)),
        ValueError,
        r"`weights` has shape \(4,\), expected \(5,\)",
    ),
    (lambda: ridge(X, T, 1.0, weights=-jnp.ones(5)), ValueError, r"or a weight is below 0"),
    (
        lambda: NormalEquations.start(0, 1),
        ValueError,
        r"`features` must be a whole number above 0, got 0",
    ),
    (
        lambda: NormalEquations.start(2, 2).add(X, T),
        ValueError,
        r"equations are for 2 features and 2 outputs, .* 3 features and 2 outputs",
    ),
    (lambda: echo_state(1, 0), ValueError, r"`units` must be a whole number above 0, got 0"),
    (lambda: echo_state(1.5, 3), TypeError, r"`inputs` must be a whole number above 0, got 1.5"),
    (
        lambda: echo_state(1, 3, spectral_radius=-0.1),
        ValueError,
        r"`spectral_radius` must be a finite number, at least 0, got -0.1",
    ),
    (
        lambda: echo_state(1, 3, leak=0.0),
        ValueError,
        r"`leak` must be a finite number above 0, got 0.0",
    ),
    (
        lambda: echo_state(1, 3, leak=1.1),
        ValueError,
        r"`leak` must be above 0 and at most 1, got 1.1",
    ),
    (
        lambda: echo_state(1, 3, density=2.0),
        ValueError,
        r"`density` must be above 0 and at most 1, got 2.0",
    ),
    (
        lambda: echo_state(1, 3, density=0),
        ValueError,
        r"`density` must be a finite number above 0, got 0",
    ),
    (
        lambda: echo_state(1, 3, input_scaling=np.inf),
        ValueError,
        r"`input_scaling` must be a finite number, at least 0, got inf",
    ),
    (lambda: NET.init(0), TypeError, r"`key` must be a key"),
    (
        lambda: jax.jit(NET.init)(KEY),
        TypeError,
        r"finds eigenvalues on the host and cannot be traced.*outside of `jax.jit`",
    ),
    (
        lambda: NET.states(RESERVOIR, X, warm_up=5),
        ValueError,
        r"`warm_up` must be a whole number in 0 ... 4 for 5 inputs, got 5",
    ),
    (lambda: NET.states(RESERVOIR, X, warm_up=-1), ValueError, r"`warm_up` must be .* got -1"),
    (
        lambda: NET.states(RESERVOIR, T),
        ValueError,
        r"`inputs` must be \[rows, 3\].* got shape \(5, 2\)",
    ),
    (
        lambda: NET.states(RESERVOIR, X[None]),
        ValueError,
        r"`inputs` must be .* Several series\? `jax.vmap`",
    ),
    (
        lambda: NET.states(tuple(RESERVOIR), X),
        TypeError,
        r"`reservoir` must be a Reservoir, got tuple. Draw one",
    ),
    (
        lambda: NET.states(Reservoir(*(leaf[None] for leaf in RESERVOIR)), X),
        ValueError,
        r"Several reservoirs\? `jax.vmap`",
    ),
    (
        lambda: NET.states(RESERVOIR, X, jnp.ones(3)),
        ValueError,
        r"`initial` must be one state, \(4,\), got shape \(3,\)",
    ),
    (
        lambda: NET.states(cast(RESERVOIR, jnp.bfloat16), X),
        TypeError,
        r"`inputs` is float32 but `w` is bfloat16",
    ),
    (
        lambda: NET.forecast(RESERVOIR, Dense(T[:4], None), jnp.ones(4), 2),
        ValueError,
        r"w of shape \(4, 3\).*\(4, 2\)",
    ),
    (
        lambda: NET.forecast(RESERVOIR, (T, None), jnp.ones(4), 2),
        ValueError,
        r"`readout` must be a Dense .* got tuple",
    ),
    (
        lambda: NET.forecast(RESERVOIR, Dense(X[:4], None), jnp.ones(4), 0),
        ValueError,
        r"`steps` must be a whole number above 0, got 0",
    ),
    (
        lambda: diagnose(jnp.ones((1, 4))),
        ValueError,
        r"`states` has one row: its rank is undefined",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_an_error_that_names_it(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# The rule

LABELS = losses.softmax_cross_entropy_with_integer_labels
TANH = fnn.activations.tanh
SERIAL = fnn.serial(fnn.dense(5, 4), TANH, fnn.dense(4, 4), TANH, fnn.dense(4, 3))
REPEAT = fnn.serial(
    fnn.dense(5, 4), TANH, fnn.repeat(fnn.serial(fnn.dense(4, 4), TANH), 1), fnn.dense(4, 3)
)
MLP = fnn.mlp((5, 4, 4, 3), "tanh")


def batches(loss, sizes=(7, 6), outputs=3, seed=0):
    """Batches of five inputs, and targets that the loss takes."""
    rng = np.random.default_rng(seed)
    found = []
    for n in sizes:
        t = rng.integers(0, outputs, n)
        rows = {LABELS: t, losses.softmax_cross_entropy: np.eye(outputs)[t]}.get(
            loss, rng.uniform(0, 1, (n, outputs)).round(loss is not losses.l2_loss)
        )
        found.append(
            (jnp.asarray(rng.normal(size=(n, 5))), jnp.asarray(rows), rng.uniform(0.5, 2, n))
        )
    return found


def random_params(net, seed=0):
    """Float64 parameters with biases."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(net.init, KEY)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        (LABELS, (5, 4, 4, 3)),
        (losses.softmax_cross_entropy, (5, 4, 3)),
        (losses.l2_loss, (5, 1, 3)),
        (losses.sigmoid_binary_cross_entropy, (5, 4, 3)),
    ],
    ids=str,
)
def test_the_last_block_is_the_ridge_regression_of_all_examples_so_far(x64, loss, sizes):
    net = fnn.mlp(sizes, "tanh")
    rule, params = extreme_learning(net, loss, penalty=0.3), random_params(net)
    state, features, targets, counts = rule.init(KEY, params), [], [], []
    step = jax.jit(rule.value_and_grad)
    for x, t, weights in batches(loss, (7, 7, 7)):
        value, grads, state = step(params, state, x, t, weights)
        h = np.asarray(x)
        for dense, _ in params[:-1]:
            h = np.tanh(h @ np.asarray(dense.w) + np.asarray(dense.b))
        outputs = jnp.asarray(h @ np.asarray(params[-1].w) + np.asarray(params[-1].b))
        np.testing.assert_allclose(
            value, np.average(loss.value(outputs, t), weights=weights), rtol=1e-12
        )
        code = (
            np.eye(3)[np.asarray(t)]
            if loss is LABELS
            else 2 * np.asarray(t) - 1
            if loss is losses.sigmoid_binary_cross_entropy
            else t
        )
        features, targets, counts = [*features, h], [*targets, code], [*counts, weights]
        a = (
            np.column_stack([np.concatenate(features), np.ones(sum(map(len, features)))])
            * np.sqrt(np.concatenate(counts))[:, None]
        )
        y = np.concatenate(targets) * np.sqrt(np.concatenate(counts))[:, None]
        penalties = 0.3 * np.diag([1.0] * sizes[-2] + [0.0])
        expected = np.linalg.inv(a.T @ a + penalties) @ a.T @ y
        params = optax.apply_updates(params, jax.tree.map(lambda g: -g, grads))
        np.testing.assert_allclose(np.vstack([params[-1].w, params[-1].b]), expected, atol=1e-10)
        assert all((leaf == 0).all() for leaf in wide(grads[:-1]))
        assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_mlp_serial_and_repeat_are_one_net(x64):
    x, t, weights = batches(LABELS)[0]
    (first, _), (second, _), last = params = random_params(MLP)
    stacked = jax.tree.map(lambda leaf: leaf[None], (second, ()))
    all_params = {
        MLP: params,
        SERIAL: (first, (), second, (), last),
        REPEAT: (first, (), stacked, last),
    }
    found = []
    for net, p in all_params.items():
        rule = extreme_learning(net, LABELS)
        value, grads, state = rule.value_and_grad(p, rule.init(KEY, p), x, t, weights)
        assert jax.tree.structure(grads) == jax.tree.structure(p)
        found.append(wide((value, grads, state)))
    assert error(found[0], found[1]) < 1e-12
    assert error(found[0], found[2]) < 1e-12


def test_padding_is_ignored_whatever_it_holds_and_equal_weights_are_none(x64):
    (x, t, _), _ = batches(LABELS)
    rule, params = extreme_learning(MLP, LABELS), random_params(MLP)
    step = jax.jit(rule.value_and_grad)
    few = rule.value_and_grad(params, rule.init(KEY, params), x[:4], t[:4])
    weights = jnp.array([1.0, 1, 1, 1, 0, 0, 0])
    for content in (0.0, 1e3):
        padded = step(params, rule.init(KEY, params), x.at[4:].set(content), t, weights)
        assert error(wide(padded), wide(few)) < 1e-12
    equal = step(params, rule.init(KEY, params), x, t, jnp.ones(7))
    assert (
        error(wide(equal), wide(rule.value_and_grad(params, rule.init(KEY, params), x, t))) < 1e-12
    )
    nothing = step(params, few[2], x, t, jnp.zeros(7))
    assert error(wide(nothing[1:]), wide(few[1:])) < 1e-12
    never = step(params, rule.init(KEY, params), x, t, jnp.zeros(7))
    assert all((leaf == 0).all() for leaf in wide(never))


def test_positions_are_examples_and_a_last_layer_without_bias_has_no_intercept(x64):
    rng = np.random.default_rng(0)
    net = fnn.serial(fnn.dense(5, 4), TANH, fnn.dense(4, 3, bias_init=None))
    rule, params = extreme_learning(net, losses.l2_loss, penalty=0.5), random_params(net)
    x, t, weights = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 2, 5), (6, 2, 3), (6,)))
    _, grads, _ = rule.value_and_grad(params, rule.init(KEY, params), x, t, abs(weights))
    h = np.tanh(np.asarray(x.reshape(12, 5)) @ np.asarray(params[0].w) + np.asarray(params[0].b))
    expected = (
        Ridge(alpha=0.5, fit_intercept=False)
        .fit(h, t.reshape(12, 3), np.repeat(abs(weights), 2))
        .coef_.T
    )
    np.testing.assert_allclose(params[-1].w - grads[-1].w, expected, atol=1e-10)
    assert grads[-1].b is None


def test_fit_sets_the_last_block_and_a_second_epoch_halves_the_penalty(x64):
    x, t, _ = (
        jnp.concatenate(parts) for parts in zip(*batches(losses.l2_loss, (20, 20)), strict=True)
    )
    params, settings = random_params(SERIAL), {"batch_size": 16, "key": KEY}
    found = []
    for epochs in (1, 2):
        rule = extreme_learning(SERIAL, losses.l2_loss, penalty=float(epochs))
        trained, _ = fnn.fit(rule, optax.sgd(1.0), params, (x, t), epochs=epochs, **settings)
        assert error(wide(trained[:-1]), wide(params[:-1])) == 0
        found.append(trained[-1])
    expected = ridge(fnn.serial(*SERIAL.layers[:-1]).apply(params[:-1], x), t, 1.0)
    assert error(wide(found[0]), wide(expected)) < 1e-12
    assert error(wide(found[1]), wide(expected)) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_rule_keeps_the_dtype_and_gathers_in_float32_at_least(dtype):
    (x, t, weights), _ = batches(LABELS)
    rule = extreme_learning(SERIAL, LABELS)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, dtype), jax.eval_shape(SERIAL.init, KEY))
    state = rule.init(KEY, params)
    value, grads, after = jax.eval_shape(
        rule.value_and_grad, params, state, x.astype(dtype), t, weights.astype(np.float32)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((value, grads))} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state, after))} == {jnp.dtype(jnp.float32)}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((value, grads, state, after)))


def test_the_rule_may_be_mapped_over_nets(x64):
    x, t, weights = batches(LABELS)[0]
    rule, nets = extreme_learning(MLP, LABELS), [random_params(MLP, seed) for seed in range(2)]
    start = rule.init(KEY, nets[0])
    together = jax.jit(jax.vmap(lambda p: rule.value_and_grad(p, start, x, t, weights)))(
        jax.tree.map(lambda *a: jnp.stack(a), *nets)
    )
    for i, params in enumerate(nets):
        alone = rule.value_and_grad(params, start, x, t, weights)
        assert error([leaf[i] for leaf in wide(together)], wide(alone)) < 1e-12


def test_two_random_layers_of_128_units_read_digits():
    net = fnn.mlp((64, 128, 128, 10), "tanh", kernel_init=lecun_normal())
    rule = extreme_learning(net, LABELS)
    step, init, apply = jax.jit(rule.value_and_grad), jax.jit(net.init), jax.jit(net.apply)
    for seed in range(3):
        data, params = load("digits", seed=seed), init(jax.random.key(seed))
        state = rule.init(KEY, params)
        for rows in np.arange(1437).reshape(3, 479):
            _, grads, state = step(params, state, data.x_train[rows], data.t_train[rows])
            params = jax.tree.map(jnp.subtract, params, grads)
        assert (apply(params, data.x_test).argmax(-1) == data.t_test).mean() >= 0.95


ENDS_IN_RELU = fnn.serial(fnn.dense(5, 4), TANH, fnn.dense(4, 3), fnn.activations.relu)
ENDS_IN_TABLE = fnn.serial(fnn.dense(5, 4), fnn.embedding(4, 3))
BAD_RULES = [
    (
        lambda: extreme_learning(fnn.mlp((5, 3)), LABELS),
        ValueError,
        r"`net` of extreme_learning must be a chain of at least two layers",
    ),
    (
        lambda: extreme_learning(ENDS_IN_RELU, LABELS),
        ValueError,
        r"last block .* must be one dense layer, got dense\(4, 3\), relu",
    ),
    (
        lambda: extreme_learning(ENDS_IN_TABLE, LABELS),
        ValueError,
        r"must be one dense layer, got embedding",
    ),
    (
        lambda: extreme_learning(MLP, LABELS, penalty=0.0),
        ValueError,
        r"`penalty` must be a finite number above 0, got 0.0",
    ),
    (
        lambda: extreme_learning(MLP, LABELS, penalty="1"),
        TypeError,
        r"`penalty` must be a finite number above 0, got '1'",
    ),
    (lambda: extreme_learning(MLP, "l2_loss"), TypeError, r"`loss` must be a Loss"),
    (lambda: extreme_learning("net", LABELS), TypeError, r"`net` must be a Layer"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD_RULES, ids=range(len(BAD_RULES)))
def test_a_net_that_cannot_be_set_is_an_error(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# The experiment


def test_the_series_is_integrated_to_fourth_order_and_obeys_its_equation():
    exact, coarse, fine = (
        mackey_glass.mackey_glass(200, steps=steps, skip=0) for steps in (40, 5, 10)
    )
    assert 10 < np.abs(coarse - exact).max() / np.abs(fine - exact).max() < 25  # 2^4 = 16
    assert np.abs(fine - exact).max() < 1e-8
    x = mackey_glass.mackey_glass(500, skip=500)
    # at times 18, 19, ...; error of order h^4 with h = 1
    slope = (x[16:-4] - 8 * x[17:-3] + 8 * x[19:-1] - x[20:]) / 12
    expected = 0.2 * x[1:-19] / (1 + x[1:-19] ** 10) - 0.1 * x[18:-2]
    assert np.abs(slope - expected).max() < 2e-3
    assert x.std() == pytest.approx(0.226, abs=0.02)


@pytest.fixture(scope="module")
def tiny():
    return mackey_glass.run(mackey_glass.TINY)


def test_settings_are_not_chosen_on_the_test_part(tiny, monkeypatch):
    x = mackey_glass.mackey_glass(700)
    x[550:] = 2 - x[550:]  # another test part
    monkeypatch.setattr(mackey_glass, "mackey_glass", lambda length: x[:length])
    other = mackey_glass.run(mackey_glass.TINY)
    assert tiny.settings == other.settings
    assert len(tiny.settings) == 4
    assert tiny.settings[0].error == min(setting.error for setting in tiny.settings)
    assert (other.reservoir.one_step > tiny.reservoir.one_step).all()


def test_errors_are_those_of_the_forecasts_in_the_units_of_x(tiny):
    x = mackey_glass.mackey_glass(700)
    np.testing.assert_allclose(tiny.truth[0], x[551 : 551 + 84])
    np.testing.assert_allclose(tiny.truth[-1], x[700 - 84 :])
    np.testing.assert_allclose(tiny.persistence.forecast[0, 0], np.full(84, x[550]))
    np.testing.assert_allclose(
        tiny.persistence.one_step[0], np.sqrt(np.mean(np.diff(x[550:]) ** 2))
    )
    for model in (tiny.reservoir, tiny.linear, tiny.persistence):
        np.testing.assert_allclose(
            model.error, np.sqrt(((model.forecast - tiny.truth) ** 2).mean(1))
        )
    assert tiny.reservoir.error.shape == (2, 84)
    assert (tiny.reservoir.one_step < 0.25 * tiny.persistence.one_step).all()
    assert (tiny.linear.one_step < 0.25 * tiny.persistence.one_step).all()


def test_a_hundred_units_err_by_less_than_5e_3_one_step_ahead_and_run_free(x64):
    x = mackey_glass.mackey_glass(4000)
    u, deviation = jnp.asarray(x - x[:3000].mean())[:, None] / x[:3000].std(), x[:3000].std()
    net = echo_state(1, 100, spectral_radius=0.8, leak=0.2, input_scaling=0.2)
    for key in jax.random.split(KEY):
        reservoir = net.init(key)
        states = net.states(reservoir, u[:-1])
        readout = ridge(states[200:2999], u[201:3000], 1e-10)
        left = (
            np.asarray(states[2999:]) @ np.asarray(readout.w)
            + np.asarray(readout.b)
            - np.asarray(u[3000:])
        )
        assert np.sqrt((left**2).mean()) * deviation < 5e-3
        forecast = net.forecast(reservoir, readout, states[2999], 84)
        assert np.abs(forecast - u[3000:3084]).max() * deviation < 0.1


BAD_FLAGS = [
    ({"units": 0}, r"`units` must be a whole number above 0, got 0"),
    ({"leaks": ()}, r"`leaks` is empty"),
    ({"leaks": (0.5, 1.5)}, r"`leaks` must be at most 1, got 1.5"),
    ({"penalties": (0.0,)}, r"`penalties\[0\]` must be a finite number above 0, got 0.0"),
    ({"horizon": 83}, r"`horizon` must be at least 84, got 83"),
    ({"test": 85}, r"`test` must be at least 86 with these settings, got 85"),
    ({"warm_up": 400}, r"`train` must be at least 402 with these settings, got 400"),
    ({"seed": -1}, r"`seed` must be in 0 \.\.\. 2\*\*32 - 1, got -1"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[str(f) for f, _ in BAD_FLAGS])
def test_a_bad_flag_is_an_error_that_names_it(flags, message):
    with pytest.raises(ValueError, match=message):
        mackey_glass.run(dataclasses.replace(mackey_glass.TINY, **flags))
