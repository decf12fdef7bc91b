"""Reservoirs: the ridge readout, echo states, extreme learning, and the experiment with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide
from jax import lax
from jax.nn.initializers import lecun_normal
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
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


def equations_of(x, t, weights=None, batch=None):
    """The normal equations, batch by batch."""
    equations = NormalEquations.start(x.shape[1], t.shape[1])
    for i in range(0, len(x), batch or len(x)):
        part = slice(i, i + (batch or len(x)))
        equations = equations.add(x[part], t[part], None if weights is None else weights[part])
    return equations


def solve_equations(x, t, penalty, *, intercept=True, weights=None):
    return equations_of(x, t, weights).solve(penalty, intercept=intercept)


SOLVERS = {"ridge": ridge, "equations": solve_equations}
by_both = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)

# The readout


@by_both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "penalty"), [(40, 0.0), (40, 0.3), (4, 0.3), (40, 1e4)])
def test_a_readout_is_that_of_scikit_learn(x64, solve, n, penalty, intercept, weighted):
    x, t, weights = regression(n)
    weights = weights if weighted else None
    theirs = Ridge(alpha=penalty, fit_intercept=intercept, solver="cholesky").fit(x, t, weights)
    ours = solve(x, t, penalty, intercept=intercept, weights=weights)
    np.testing.assert_allclose(ours.w, theirs.coef_.T, rtol=1e-10, atol=1e-10)
    if intercept:
        np.testing.assert_allclose(ours.b, theirs.intercept_, rtol=1e-10, atol=1e-10)
    else:
        assert ours.b is None


@by_both
def test_a_readout_of_one_example_is_its_target(x64, solve):
    readout = solve(np.array([[2.0]]), np.array([[5.0, 6.0]]), 1.0)
    np.testing.assert_array_equal(readout.w, np.zeros((1, 2)))
    np.testing.assert_array_equal(readout.b, [5.0, 6.0])


@by_both
def test_rows_of_weight_0_do_not_count_whatever_they_hold(x64, solve):
    x, t, weights = regression()
    few = solve(x[:30], t[:30], 0.1, weights=weights[:30])
    x[30:], t[30:], weights[30:] = 1e3, np.nan, 0
    assert error(wide(solve(x, t, 0.1, weights=weights)), wide(few)) < 1e-12


@pytest.mark.parametrize("intercept", [True, False])
def test_equations_of_batches_in_any_order_are_those_of_all_examples(x64, intercept):
    x, t, weights = regression(44)
    once = ridge(x, t, 0.1, intercept=intercept, weights=weights)
    parts = [equations_of(x[i::4], t[i::4], weights[i::4], batch=5) for i in range(4)]
    batches = tuple(a.reshape(4, 11, *a.shape[1:]) for a in (x, t, weights))
    scanned, _ = lax.scan(lambda e, b: (e.add(*b), None), NormalEquations.start(6, 2), batches)
    merged = parts[3].merge(parts[0]).merge(parts[2].merge(parts[1]))
    nothing = merged.add(x[:3], t[:3], np.zeros(3))
    for equations in (scanned, merged, nothing):
        assert error(wide(equations.solve(0.1, intercept=intercept)), wide(once)) < 1e-12
    covariance = np.cov(x.T, t.T, aweights=weights, bias=True)[:6]
    np.testing.assert_allclose(scanned.products / scanned.weight, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("radius", [0.8, 1.25])
def test_a_small_penalty_on_echo_states_gives_the_least_squares_error_in_float32(radius):
    """The condition number, 1e5, is too large to be squared in float32."""
    x = mackey_glass.mackey_glass(2000)
    u = ((x - x.mean()) / x.std()).astype(np.float32)[:, None]
    net = echo_state(1, 100, spectral_radius=radius, leak=0.3)
    states = net.states(net.init(KEY), u[:-1], warm_up=100)
    s, t = (np.asarray(a, np.float64) for a in (states, u[101:]))
    s, t = s - s.mean(0), t - t.mean(0)
    rows = np.vstack([s, 1e-5**0.5 * np.eye(100)]), np.vstack([t, np.zeros((100, 1))])
    w, *_ = np.linalg.lstsq(*rows, rcond=None)
    readout = ridge(states, u[101:], 1e-5)
    left = np.asarray(states @ readout.w + readout.b[None], np.float64) - u[101:]
    expected = np.sqrt(((s @ w - t) ** 2).mean())
    assert np.sqrt((left**2).mean()) == pytest.approx(expected, rel=1e-2)
    assert np.linalg.norm(readout.w) == pytest.approx(np.linalg.norm(w), rel=1e-2)


@by_both
def test_features_far_from_zero_keep_their_digits_in_float32(solve):
    rng = np.random.default_rng(0)
    x = (1e3 + 1e-2 * rng.normal(size=(2000, 3))).astype(np.float32)
    t = (x.astype(np.float64) - 1e3) @ [[100.0], [-50.0], [20.0]] + 0.1 * rng.normal(size=(2000, 1))
    t = t.astype(np.float32)
    expected = Ridge(alpha=1e-4).fit(x.astype(np.float64), t.astype(np.float64)).coef_.T
    assert error(wide(solve(x, t, 1e-4).w), [expected]) < 2e-3
    assert error(wide(equations_of(x, t, batch=100).solve(1e-4).w), [expected]) < 2e-3


@by_both
def test_a_readout_may_be_mapped_over_penalties(x64, solve):
    x, t, _ = regression()
    penalties = jnp.array([0.01, 1.0, 100.0])
    mapped = jax.vmap(lambda penalty: solve(x, t, penalty))(penalties)
    for i, penalty in enumerate(penalties):
        assert error([leaf[i] for leaf in wide(mapped)], wide(solve(x, t, penalty))) < 1e-12


@by_both
@pytest.mark.parametrize(("n", "penalty"), [(20, 0.0), (20, 0.3), (4, 0.3)])
def test_a_readout_has_derivatives_also_for_dependent_targets(x64, solve, n, penalty):
    x = jnp.asarray(regression(n)[0])
    t = jnp.eye(3)[np.arange(n) % 3]
    check_grads(lambda x, t: solve(x, t, penalty), (x, t), order=1)


@by_both
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_readout_runs_within_shard_map(solve, penalty):
    x, t, _ = regression()
    x, t = x.astype(np.float32), t.astype(np.float32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    f = jax.shard_map(lambda x, t: solve(x, t, penalty).w, mesh=mesh, in_specs=rows, out_specs=rows)
    assert error(wide(jax.jit(f)(x, t)), wide(solve(x, t, penalty).w)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_readouts_and_states_keep_the_dtype(dtype):
    def everything(reservoir, x, t, weights):
        net = echo_state(6, 5)
        states = net.states(reservoir, x)
        forecast = net.forecast(reservoir, ridge(states[:-1], x[1:], 0.1), states[-1], 2)
        equations = NormalEquations.start(6, 2, dtype).add(x, t, weights)
        kept = ridge(x, t, 0.1, weights=weights), states, forecast
        return kept, (equations, equations.solve(0.1), diagnose(states)[1:])

    reservoir = cast(echo_state(6, 5).init(KEY), dtype)
    data = (jnp.asarray(a, dtype) for a in regression())
    kept, wider = jax.eval_shape(everything, reservoir, *data)
    for leaves, expected in ((kept, dtype), (wider, jnp.float32)):
        for leaf in jax.tree.leaves(leaves):
            assert leaf.dtype == expected
            assert not leaf.weak_type


RNG = np.random.default_rng(4)
FULL = RNG.normal(size=(10, 6))
SINGULAR = {
    "few": (np.tile(FULL[:3], (4, 1))[:10], 0.0),
    "dependent": (np.column_stack([FULL[:, :5], FULL[:, 0] + 2 * FULL[:, 1]]), 0.0),
    "dependent with other scales": (FULL[:, [0, 1, 2, 3, 4, 0]] * np.geomspace(1e-3, 1e3, 6), 0.0),
    "adds up to 1": (np.column_stack([FULL[:, :5], 1 - FULL[:, :5].sum(1)]), 0.0),
    **{
        f"constant {c}": (np.column_stack([FULL[:, :5], np.full(10, c)]), 0)
        for c in (0, 1, 0.1, 1e3)
    },
    "small penalty": (np.tile(FULL[:3], (4, 1))[:10], 1e-30),
}


@by_both
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("case", SINGULAR)
def test_without_a_unique_solution_there_is_an_error_and_under_jit_nan(solve, case, x64):
    x, penalty = SINGULAR[case]
    with jax.enable_x64(x64):
        x, t = jnp.asarray(x, float), jnp.asarray(FULL @ FULL.T[:, :1], float)
        with pytest.raises(ValueError, match=r"not unique in float.* Pass a larger `penalty`"):
            solve(x, t, penalty)
        assert np.isnan(jax.jit(lambda x: solve(x, t, penalty))(x).w).all()


@by_both
@pytest.mark.parametrize("n", [10, 1000])
def test_constant_features_are_found_in_batches_and_whatever_the_rounding(solve, n):
    for seed, constant in enumerate((1.0, 0.1, 1 / 3, 7.7, -1e3, 1e6)):
        x, t, _ = regression(n, seed=seed)
        x, t = np.column_stack([x, np.full(n, constant)]).astype(np.float32), t.astype(np.float32)
        with pytest.raises(ValueError, match="a constant feature"):
            solve(x, t, 0.0)
        with pytest.raises(ValueError, match="a constant feature"):
            equations_of(x, t, batch=3).solve(0.0)
        if abs(constant) <= 1e3:
            assert np.abs(solve(x, t, 0.1).w[-1]).max() < 1e-2


@by_both
@pytest.mark.parametrize("part", range(3))
def test_what_is_not_finite_is_an_error(solve, part):
    batch = [FULL, FULL[:, :2], np.ones(10)]
    batch[part] = np.where(batch[part] == batch[part].flat[3], np.nan, batch[part])
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        solve(*batch[:2], 1.0, weights=batch[2])


# Echo states


def loop(reservoir, inputs, initial=None):
    """The formula, unit by unit, in NumPy."""
    w, w_in, b, leak = (np.asarray(leaf) for leaf in reservoir)
    s, found = np.zeros(len(b)) if initial is None else initial, []
    for u in inputs:
        z = [sum(s * w[:, j]) + sum(u * w_in[:, j]) + b[j] for j in range(len(b))]
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
    expected, states = loop(reservoir, u), net.states(reservoir, u)
    np.testing.assert_allclose(states, expected, atol=1e-12)
    np.testing.assert_array_equal(net.states(reservoir, u, warm_up=9), states[9:])
    np.testing.assert_allclose(net.states(reservoir, u[10:], states[9]), expected[10:], atol=1e-12)
    started = net.states(reservoir, u, initial)
    np.testing.assert_allclose(started, loop(reservoir, u, initial), atol=1e-12)


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
    forecast = net.forecast(reservoir, readout, states[-1], 6)
    np.testing.assert_allclose(forecast, expected, atol=1e-12)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize(
    ("units", "density", "heard"), [(50, 0.1, 5), (50, 1.0, 50), (7, 0.01, 1), (1, 0.5, 1)]
)
def test_a_reservoir_has_its_radius_and_every_unit_as_many_inputs(units, density, heard, x64):
    settings = {"input_scaling": 0.5, "bias_scaling": 0.1, "leak": 0.25, "spectral_radius": 0.7}
    with jax.enable_x64(x64):
        reservoir = echo_state(3, units, density=density, **settings).init(KEY)
    assert float(reservoir.leak) == 0.25
    radius = np.abs(np.linalg.eigvals(wide(reservoir.w)[0])).max()
    assert radius == pytest.approx(0.7, rel=1e-12 if x64 else 1e-5)
    assert (np.count_nonzero(reservoir.w, axis=0) == heard).all()
    for leaf, bound in ((reservoir.w_in, 0.5), (reservoir.b, 0.1)):
        assert 0 < np.abs(np.asarray(leaf)).max() <= bound


def test_reservoirs_are_drawn_from_their_keys_also_under_jit_and_vmap():
    net, keys = echo_state(2, 9), jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(net.init))(keys)
    for i, key in enumerate(keys):
        assert error([leaf[i] for leaf in wide(mapped)], wide(net.init(key))) < 1e-6
    assert error(wide(net.init(keys[0])), wide(net.init(keys[1]))) > 0.1


def test_a_radius_below_one_forgets_the_first_state_and_one_above_does_not(x64):
    still = np.zeros((400, 1))
    for radius, forgets in ((0.9, True), (1.5, False)):
        net = echo_state(1, 30, spectral_radius=radius, bias_scaling=0.0)
        reservoir = net.init(KEY)
        one, other = (net.states(reservoir, still, jnp.full(30, value))[-1] for value in (0.0, 0.1))
        assert bool(np.abs(one - other).max() < 1e-10) == forgets
        assert np.abs(one).max() == 0


def test_networks_of_equal_settings_are_equal_and_share_their_functions():
    slow, fast = echo_state(3, 7, leak=0.2), echo_state(3, 7)
    assert echo_state(3, 7) == fast != slow
    assert hash(echo_state(3, 7)) == hash(fast)
    assert slow.states is fast.states
    assert slow.forecast is fast.forecast


def test_rank_effective_rank_and_saturation_of_states_that_are_known(x64):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(20, 5))
    q, _ = np.linalg.qr(q - q.mean(0))  # orthogonal columns of mean 0
    turned = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    found = diagnose(jnp.asarray((q * [2.0, 1, 1, 0, 0]) @ turned + 7))
    assert (found.rank, found.saturation) == (3, 1)
    expected = np.exp(0.5 * np.log(2) + 2 * 0.25 * np.log(4))
    np.testing.assert_allclose(found.effective_rank, expected, rtol=1e-10)
    np.testing.assert_allclose(diagnose(jnp.asarray(q)).effective_rank, 5, rtol=1e-10)
    assert diagnose(jnp.array([[0.96, -0.96, 0.0], [0.1, 0.2, -1.0]])).saturation == 0.5


@pytest.mark.parametrize("constant", [0.0, 0.5, 0.1])
def test_constant_states_have_rank_0(constant):
    found = diagnose(jnp.full((7, 3), constant))
    assert (found.rank, found.effective_rank) == (0, 0)


# Bad input

X, T = jnp.ones((5, 3)), jnp.ones((5, 2))
NET = echo_state(3, 4)
RESERVOIR = NET.init(KEY)
STACKED = Reservoir(*(leaf[None] for leaf in RESERVOIR))
HALF = cast(RESERVOIR, jnp.bfloat16)
BAD = {
    "`penalty` must be a finite number, at least 0, got -1.0": lambda: ridge(X, T, -1.0),
    "`penalty` must be a finite number, at least 0, got 'much'": lambda: ridge(X, T, "much"),
    r"`penalty` must be .*, got \[1.0, 1.0\]": lambda: ridge(X, T, jnp.ones(2)),
    r"`features` must have axes .* got shape \(3,\)": lambda: ridge(X[0], T, 1.0),
    r"`targets` must have .* Pass `targets\[:, None\]`": lambda: ridge(X, T[:, 0], 1.0),
    r"`features` must have .* not empty, got shape \(0, 3\)": lambda: ridge(X[:0], T[:0], 1.0),
    r"`targets` must have axes `5 outputs`.* got shape \(4, 2\)": lambda: ridge(X, T[:4], 1.0),
    "`targets` must hold floating-point numbers": lambda: ridge(X, T.astype(int), 1.0),
    "`targets` is bfloat16 but": lambda: ridge(X, T.astype(jnp.bfloat16), 1.0),
    r"`weights` has shape \(4,\), expected \(5,\)": lambda: ridge(X, T, 1.0, weights=jnp.ones(4)),
    "or a weight is below 0": lambda: ridge(X, T, 1.0, weights=-jnp.ones(5)),
    "`features` must have axes `examples 2`": lambda: NormalEquations.start(2, 2).add(X, T),
    "`units` must be a whole number above 0, got 0": lambda: echo_state(1, 0),
    "`inputs` must be a whole number above 0, got 1.5": lambda: echo_state(1.5, 3),
    "`spectral_radius` must be .* at least 0, got -0.1": lambda: echo_state(
        1, 3, spectral_radius=-0.1
    ),
    "`leak` must be a finite number above 0, got 0.0": lambda: echo_state(1, 3, leak=0.0),
    "`leak` and `density` must be at most 1, .*leak=1.1": lambda: echo_state(1, 3, leak=1.1),
    "`leak` and `density` must be at most 1, .*density=2": lambda: echo_state(1, 3, density=2),
    "`input_scaling` must be .*, got inf": lambda: echo_state(1, 3, input_scaling=np.inf),
    "`key` must be a key": lambda: NET.init(0),
    "`warm_up` must be .* at least 0, got -1": lambda: NET.states(RESERVOIR, X, warm_up=-1),
    r"`inputs` must have axes `time 3`.* got shape \(5, 2\)": lambda: NET.states(RESERVOIR, T),
    r"`inputs` must have .* Several series": lambda: NET.states(RESERVOIR, X[None]),
    "or reservoirs.* `jax.vmap`": lambda: NET.states(STACKED, X),
    "`inputs` is float32 but `w` is bfloat16": lambda: NET.states(HALF, X),
    "`readout.w` must have axes `4 3`": lambda: NET.forecast(
        RESERVOIR, Dense(T, None), X[:4, 0], 2
    ),
    r"`states` must have axes `time units`": lambda: diagnose(jnp.ones(4)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_an_error_that_names_it(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message]()


# Extreme learning

LABELS = losses.softmax_cross_entropy_with_integer_labels
TANH = fnn.activations.tanh
SERIAL = fnn.serial(fnn.dense(5, 4), TANH, fnn.dense(4, 4), TANH, fnn.dense(4, 3))
MLP = fnn.mlp((5, 4, 4, 3), "tanh")


def batches(loss, sizes=(7, 6)):
    """Batches of five inputs, targets that the loss takes, and weights."""
    rng = np.random.default_rng(0)
    for n in sizes:
        labels, numbers = rng.integers(0, 3, n), rng.uniform(0, 1, (n, 3))
        targets = {
            "labels": labels,
            "one_hot": np.eye(3)[labels],
            "bits": numbers.round(),
            "numbers": numbers,
        }[loss.targets]
        yield jnp.asarray(rng.normal(size=(n, 5))), jnp.asarray(targets), rng.uniform(0.5, 2, n)


def random_params(net, seed=0):
    """Float64 parameters with biases."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(net.init, KEY)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)


def hidden(params, x):
    """The activities of the last hidden layer of an MLP, in NumPy."""
    h = np.asarray(x)
    for dense, _ in params[:-1]:
        h = np.tanh(h @ np.asarray(dense.w) + np.asarray(dense.b))
    return h


CODES = {
    LABELS: lambda t: np.eye(3)[np.asarray(t)],
    losses.softmax_cross_entropy: np.asarray,
    losses.l2_loss: np.asarray,
    losses.sigmoid_binary_cross_entropy: lambda t: 2 * np.asarray(t) - 1,
}


@pytest.mark.parametrize("loss", CODES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 4, 4, 3), (5, 1, 3)], ids=len)
def test_the_last_block_is_the_ridge_regression_of_all_examples_so_far(x64, loss, sizes):
    net = fnn.mlp(sizes, "tanh")
    rule, params = extreme_learning(net, loss, penalty=0.3), random_params(net)
    state, seen, step = rule.init(KEY, params), [], jax.jit(rule.value_and_grad)
    for x, t, weights in batches(loss, (7, 7, 7)):
        value, grads, state = step(params, state, x, t, weights)
        expected = np.average(loss.value(net.apply(params, x), t), weights=weights)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        seen.append((hidden(params, x), CODES[loss](t), weights))
        h, codes, counts = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        theirs = Ridge(alpha=0.3, solver="cholesky").fit(h, codes, counts)
        params = optax.apply_updates(params, jax.tree.map(lambda g: -g, grads))
        np.testing.assert_allclose(params[-1].w, theirs.coef_.T, atol=1e-10)
        np.testing.assert_allclose(params[-1].b, theirs.intercept_, atol=1e-10)
        assert all((leaf == 0).all() for leaf in wide(grads[:-1]))
        assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_positions_are_examples_and_a_last_layer_without_bias_has_no_intercept(x64):
    rng = np.random.default_rng(0)
    net = fnn.serial(fnn.dense(5, 4), TANH, fnn.dense(4, 3, bias_init=None))
    rule, params = extreme_learning(net, losses.l2_loss, penalty=0.5), random_params(net)
    x, t, weights = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 2, 5), (6, 2, 3), (6,)))
    _, grads, _ = rule.value_and_grad(params, rule.init(KEY, params), x, t, abs(weights))
    h = hidden(((params[0], ()), ()), x.reshape(12, 5))
    theirs = Ridge(alpha=0.5, fit_intercept=False)
    theirs.fit(h, t.reshape(12, 3), np.repeat(abs(weights), 2))
    np.testing.assert_allclose(params[-1].w - grads[-1].w, theirs.coef_.T, atol=1e-10)
    assert grads[-1].b is None


def test_fit_sets_the_last_block_and_a_second_epoch_halves_the_penalty(x64):
    parts = zip(*batches(losses.l2_loss, (20, 20)), strict=True)
    x, t, _ = (jnp.concatenate(part) for part in parts)
    params = random_params(SERIAL)
    expected = ridge(fnn.serial(*SERIAL.layers[:-1]).apply(params[:-1], x), t, 1.0)
    for epochs in (1, 2):
        rule = extreme_learning(SERIAL, losses.l2_loss, penalty=float(epochs))
        settings = {"epochs": epochs, "batch_size": 16, "key": KEY}
        trained, _ = fnn.fit(rule, optax.sgd(1.0), params, (x, t), **settings)
        assert error(wide(trained[:-1]), wide(params[:-1])) == 0
        assert error(wide(trained[-1]), wide(expected)) < 1e-12


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
BAD_RULES = {
    "must be a chain of at least two layers": (fnn.mlp((5, 3)), LABELS, 1.0),
    r"last block .* must be one dense layer, got dense\(4, 3\), relu": (ENDS_IN_RELU, LABELS, 1.0),
    "must be one dense layer, got embedding": (ENDS_IN_TABLE, LABELS, 1.0),
    "`penalty` must be a finite number above 0, got 0.0": (MLP, LABELS, 0.0),
    "`penalty` must be a finite number above 0, got '1'": (MLP, LABELS, "1"),
    "`loss` must be a Loss": (MLP, "l2_loss", 1.0),
    "`net` must be a Layer": ("net", LABELS, 1.0),
}


@pytest.mark.parametrize("message", BAD_RULES)
def test_a_bad_argument_of_extreme_learning_is_an_error(message):
    net, loss, penalty = BAD_RULES[message]
    with pytest.raises((TypeError, ValueError), match=message):
        extreme_learning(net, loss, penalty=penalty)


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
