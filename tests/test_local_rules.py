"""Target propagation, PEPITA and Hebbian learning against formulas; what holds for every rule."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fnn
from fnn import losses, rules
from fnn.nets.activations import elementwise
from fnn.nets.blocks import blocks
from fnn.nets.layers import Dense
from fnn.rules import hebbian, pepita, target_propagation
from fnn.rules._blockwise import targets_like
from fnn.rules._noise import normal_like

LOSS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(3)
NET = fnn.mlp((4, 6, 5, 3), "tanh")


def batch(n=7, features=4):
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(n, features)), rng.integers(0, 3, n)
    return jnp.asarray(x), jnp.asarray(t, jnp.int32)


def drawn(net, seed=1):
    """Params with biases that are not 0."""
    rng = np.random.default_rng(seed)

    def leaf(s):
        return jnp.asarray(rng.normal(size=s.shape) / np.sqrt(s.shape[-2] if s.ndim > 1 else 9))

    return jax.tree.map(leaf, jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0)))


def first_step(rule, params, x, t, weights=None, state=None):
    """`(value, grads, state)` and the state before."""
    state = jax.jit(rule.init)(KEY, params) if state is None else state
    return jax.jit(rule.value_and_grad)(params, state, x, t, weights), state


def true_step(net, loss, *args):
    """Backprop's `(value, grads)`."""
    return jax.jit(fnn.value_and_grad(net, loss))(*args)


def numbers(tree):
    """The leaves in float64, keys as their data."""

    def leaf(a):
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(a) if is_key else a

    return wide(jax.tree.map(leaf, tree))


# The formulas, in loops over examples and layers, for `NET`: weights Ws, biases bs, shares of the
# examples s (they add up to 1). Each returns the gradients and the next state.


def forward_of(Ws, bs, x):
    zs, hs = [], [x]
    for i, (w, b) in enumerate(zip(Ws, bs, strict=True)):
        zs.append(hs[-1] @ w + b)
        hs.append(np.tanh(zs[-1]) if i < len(Ws) - 1 else zs[-1])
    return hs


def error_of(outputs, label):
    p = np.exp(outputs - outputs.max())
    return p / p.sum() - np.eye(len(p))[label]


def pepita_formula(Ws, bs, xs, ts, s, state):
    dWs, dbs = [np.zeros_like(w) for w in Ws], [np.zeros_like(b) for b in bs]
    for x, t, share in zip(xs, ts, s, strict=True):
        hs = forward_of(Ws, bs, x)
        e = error_of(hs[-1], t)
        modulated = forward_of(Ws, bs, x + e @ np.asarray(state))
        for i in range(len(Ws)):
            dz = e if i == len(Ws) - 1 else hs[i + 1] - modulated[i + 1]
            dWs[i] += share * np.outer(modulated[i], dz)
            dbs[i] += share * dz
    return dWs, dbs, state


def hebbian_formula(Ws, bs, xs, ts, s, state, competition):
    dWs, dbs = [np.zeros_like(w) for w in Ws], [np.zeros_like(b) for b in bs]
    for x, t, share in zip(xs, ts, s, strict=True):
        hs = forward_of(Ws, bs, x)
        for layer, w in enumerate(Ws[:-1]):
            h, y = hs[layer], hs[layer + 1]
            for i in range(w.shape[0]):
                for j in range(w.shape[1]):
                    known = {"none": [j], "subspace": range(w.shape[1]), "sanger": range(j + 1)}[
                        competition
                    ]
                    dWs[layer][i, j] -= share * y[j] * (h[i] - sum(w[i, k] * y[k] for k in known))
        e = error_of(hs[-1], t)
        dWs[-1] += share * np.outer(hs[-2], e)
        dbs[-1] += share * e
    return dWs, dbs, state


def target_formula(
    Ws, bs, xs, ts, s, state, target_rate, inverse_rate, noise_std, inverse_activation
):
    g, slope = {
        "identity": (lambda z: z, np.ones_like),
        "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    }[inverse_activation]
    dWs, dbs = [np.zeros_like(w) for w in Ws], [np.zeros_like(b) for b in bs]
    ((v, c), _) = state.params[0]
    key, noise_key = jax.random.split(state.key)
    noise = np.asarray(normal_like(noise_key, jnp.zeros((len(xs), 6))))
    v, c = np.asarray(v), np.asarray(c)
    dv, dc, size = np.zeros_like(v), np.zeros_like(c), 0.0
    for x, t, share, eps in zip(xs, ts, s, noise, strict=True):
        hs = forward_of(Ws, bs, x)
        e = error_of(hs[-1], t)
        target_2 = hs[2] - target_rate * Ws[2] @ e
        target_1 = hs[1] - g(hs[2] @ v + c) + g(target_2 @ v + c)
        for i, wanted in enumerate((target_1, target_2)):
            dz = (hs[i + 1] - wanted) * (1 - hs[i + 1] ** 2) / target_rate
            dWs[i] += share * np.outer(hs[i], dz)
            dbs[i] += share * dz
        dWs[2] += share * np.outer(hs[2], e)
        dbs[2] += share * e
        noisy = hs[1] + noise_std * eps
        known = np.tanh(noisy @ Ws[1] + bs[1])
        du = 2 * (g(known @ v + c) - noisy) * slope(known @ v + c)
        dv += share * np.outer(known, du)
        dc += share * du
        size += share * (1 + known @ known)
    step = inverse_rate / size
    return dWs, dbs, (key, (Dense(v - step * dv, c - step * dc),))


FORMULAS = {
    "target_propagation": (
        target_propagation,
        target_formula,
        {
            "target_rate": 0.1,
            "inverse_rate": 0.1,
            "noise_std": 0.1,
            "inverse_activation": "identity",
        },
    ),
    "tanh target_propagation": (
        target_propagation,
        target_formula,
        {"target_rate": 0.5, "inverse_rate": 0.3, "noise_std": 0.0, "inverse_activation": "tanh"},
    ),
    "pepita": (pepita, pepita_formula, {}),
    "hebbian none": (hebbian, hebbian_formula, {"competition": "none"}),
    "hebbian subspace": (hebbian, hebbian_formula, {"competition": "subspace"}),
    "hebbian sanger": (hebbian, hebbian_formula, {"competition": "sanger"}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_is_the_formula_written_out(x64, name):
    rule, formula, settings = FORMULAS[name]
    params, (x, t) = drawn(NET), batch()
    weights = np.array([1.0, 0, 2, 0.5, 0, 3, 1])
    (value, grads, after), before = first_step(rule(NET, LOSS, **settings), params, x, t, weights)
    denses = [params[0][0], params[1][0], params[2]]
    Ws, bs = [np.asarray(d.w) for d in denses], [np.asarray(d.b) for d in denses]
    s = weights / weights.sum()
    dWs, dbs, expected = formula(Ws, bs, np.asarray(x), np.asarray(t), s, before, **settings)
    assert error(wide(grads), [a for pair in zip(dWs, dbs, strict=True) for a in pair]) <= 1e-10
    assert not jax.tree.leaves(before) or error(numbers(after), numbers(expected)) <= 1e-10
    assert abs(float(value) - np.average(LOSS.value(NET.apply(params, x), t), weights=s)) <= 1e-12


@pytest.mark.parametrize("rule", [pepita, hebbian])
def test_no_derivative_of_a_hidden_activation_enters(x64, rule):
    broken = elementwise("broken", jnp.tanh, lambda x, y: jnp.full_like(x, jnp.nan))
    params, data = drawn(NET), batch()
    (_, grads, _), _ = first_step(rule(fnn.mlp((4, 6, 5, 3), broken), LOSS), params, *data)
    (_, expected, _), _ = first_step(rule(NET, LOSS), params, *data)
    assert error(wide(grads), wide(expected)) == 0


@pytest.mark.parametrize("rule", [pepita, hebbian])
def test_what_follows_a_hidden_dense_layer_stays_and_what_follows_the_last_learns(x64, rule):
    tail = fnn.serial(fnn.dense(5, 3), fnn.layer_norm(3))
    net = fnn.serial(fnn.dense(4, 5), fnn.layer_norm(5), fnn.activations.tanh, tail)
    params, (x, t) = drawn(net), batch()
    state = () if rule is hebbian else jnp.zeros((3, 4))  # PEPITA's second pass is then the first
    (_, grads, _), _ = first_step(rule(net, LOSS), params, x, t, state=state)
    _, expected = true_step(net, LOSS, params, x, t)
    assert error(wide(grads[-1]), wide(expected[-1])) <= 1e-12
    still = (grads[0].b if rule is hebbian else grads[0], grads[1])
    assert not any(leaf.any() for leaf in wide(still))


# Target propagation


def test_with_one_hidden_layer_target_propagation_is_backprop(x64):
    net, (x, t) = fnn.mlp((4, 6, 3), "tanh"), batch()
    params, weights = drawn(net), jnp.arange(7.0)
    (value, grads, state), _ = first_step(
        target_propagation(net, LOSS, target_rate=0.3), params, x, t, weights
    )
    assert error(wide((value, grads)), wide(true_step(net, LOSS, params, x, t, weights))) <= 1e-12
    assert state.params == ()


@pytest.mark.parametrize("target_rate", [1e-3, 10.0])
def test_the_target_rate_is_immaterial_for_linear_inverses(x64, target_rate):
    params, data = drawn(NET), batch()
    (_, grads, _), _ = first_step(
        target_propagation(NET, LOSS, target_rate=target_rate), params, *data
    )
    (_, expected, _), _ = first_step(target_propagation(NET, LOSS, target_rate=1.0), params, *data)
    assert error(wide(grads), wide(expected)) <= 1e-10
    _, true = true_step(NET, LOSS, params, *data)
    # the last hidden block's gradient is backprop's
    assert error(wide(grads[1:]), wide(true[1:])) <= 1e-12
    assert error(wide(grads[0]), wide(true[0])) > 0.1  # the first one's is not


def test_inverses_that_are_the_transposes_of_a_linear_net_make_it_backprop(x64):
    net, (x, t) = fnn.mlp((4, 6, 5, 4, 3), "identity"), batch()
    params, rule = drawn(net), target_propagation(net, LOSS)
    state = jax.jit(rule.init)(KEY, params)
    transposed = tuple(
        (Dense(p.w.T, g.b), ()) for (p, _), (g, _) in zip(params[1:-1], state.params, strict=True)
    )
    value, grads, _ = jax.jit(rule.value_and_grad)(params, state._replace(params=transposed), x, t)
    assert error(wide((value, grads)), wide(true_step(net, LOSS, params, x, t))) <= 1e-12


@pytest.mark.parametrize(
    ("activation", "size"), [("identity", 1.0), ("identity", 1e3), ("tanh", 1.0)]
)
def test_inverses_learn_at_any_size_of_activity(x64, activation, size):
    net, (x, t) = fnn.mlp((4, 6, 5, 3), activation), batch()
    params = jax.tree.map(lambda p: p * size, drawn(net))
    rule = target_propagation(
        net, LOSS, inverse_rate=0.9, noise_std=0.0, inverse_activation=activation
    )

    def lost(state):
        h1 = net.layers[0].apply(params[0], x)
        (v, c), _ = state.params[0]
        again = net.layers[1].apply(params[1], h1) @ v + c[None]
        return (
            jnp.square((again if activation == "identity" else jnp.tanh(again)) - h1).sum()
            / jnp.square(h1).sum()
        )

    def turn(state, _):
        return rule.value_and_grad(params, state, x, t)[2], lost(state)

    _, history = jax.jit(lambda state: jax.lax.scan(turn, state, length=60))(
        jax.jit(rule.init)(KEY, params)
    )
    assert history[-1] < 0.1 * history[0]
    if activation == "identity":
        assert (history[1:] <= history[:-1]).all()  # no step is too long


def test_inverses_begin_orthogonal_and_a_rate_of_0_leaves_them(x64):
    params, rule = drawn(NET), target_propagation(NET, LOSS, inverse_rate=0)
    (_, _, after), before = first_step(
        rule, params, *batch(), state=jax.jit(rule.init)(KEY, params)
    )
    (g, _) = before.params[0]
    assert g.w.shape == (5, 6)
    np.testing.assert_allclose(g.w @ g.w.T, np.eye(5), atol=1e-12)
    assert error(wide(after.params), wide(before.params)) == 0
    # other noise at the next step
    assert (jax.random.key_data(after.key) != jax.random.key_data(before.key)).any()


def test_target_propagation_takes_blocks_that_are_not_dense_and_positions(x64):
    block = fnn.residual(fnn.serial(fnn.dense(5, 4), fnn.activations.tanh, fnn.dense(4, 5)))
    net = fnn.serial(fnn.embedding(7, 5), fnn.layer_norm(5), block, fnn.dense(5, 3))
    x, t = jnp.arange(12).reshape(4, 3) % 7, jnp.ones((4, 3, 3))
    params = drawn(net)
    (value, grads, state), _ = first_step(target_propagation(net, losses.l2_loss), params, x, t)
    expected = true_step(net, losses.l2_loss, params, x, t)
    assert error(wide((value, grads[2:])), wide((expected[0], expected[1][2:]))) <= 1e-12
    assert np.isfinite(np.concatenate([leaf.ravel() for leaf in wide((grads, state.params))])).all()


# PEPITA


def test_a_small_projection_gives_the_derivative_along_the_projected_error(x64):
    params, (x, t) = drawn(NET), batch()
    f, size = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4))), 1e-6
    _, grads, _ = pepita(NET, LOSS).value_and_grad(params, size * f, x, t)
    e = LOSS.grad(NET.apply(params, x), t)
    for i in range(2):
        below = fnn.serial(*NET.layers[: i + 1])
        _, tangent = jax.jvp(
            lambda x, below=below, i=i: below.apply(params[: i + 1], x), (x,), (e @ f,)
        )
        assert error(wide(grads[i][0].b / size), wide(-tangent.mean(0))) < 1e-5


def test_the_projection_is_uniform_within_its_limit_and_stays():
    net = fnn.mlp((600, 5, 40))
    rule = pepita(net, losses.l2_loss, projection_scale=0.5)
    f = np.asarray(rule.init(KEY, jax.eval_shape(net.init, KEY)))
    assert f.shape == (40, 600)
    assert 0.045 < np.abs(f).max() <= 0.05  # 0.5 sqrt(6 / 600)
    assert abs(f.std() / (0.05 / np.sqrt(3)) - 1) < 0.02
    assert (
        f != np.asarray(rule.init(jax.random.key(4), jax.eval_shape(net.init, KEY)))
    ).mean() > 0.9


# Hebbian


def spread(n=400):
    """Centred data whose covariance is exactly diag(9, 4, 2, 1, 0.5) in a turned basis.

    `(x, basis)`, columns by variance.
    """
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    x = rng.normal(size=(n, 5))
    u, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return jnp.asarray(np.sqrt(n) * u @ vt * np.sqrt([9, 4, 2, 1, 0.5]) @ q.T), q


def converged(competition, units):
    """The hidden weights after many steps on all data."""
    net = fnn.mlp((5, units, 2), "identity", bias_init=None)
    x, q = spread()
    rule, t = hebbian(net, losses.l2_loss, competition=competition), jnp.zeros((len(x), 2))

    def step(params, _):
        grads = rule.value_and_grad(params, (), x, t)[1]
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), None

    start = jax.tree.map(lambda p: 0.3 * p, drawn(net))
    return np.asarray(jax.jit(lambda p: jax.lax.scan(step, p, length=4000)[0])(start)[0][0].w), q


def test_oja_finds_the_first_component_with_every_unit(x64):
    for units in (1, 3):
        w, q = converged("none", units)
        np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-10)
        np.testing.assert_allclose(np.abs(w.T @ q[:, 0]), 1, rtol=1e-10)


def test_sanger_finds_the_leading_components_in_order(x64):
    w, q = converged("sanger", 3)
    np.testing.assert_allclose(np.abs(w.T @ q[:, :3]), np.eye(3), atol=1e-8)


def test_subspace_finds_the_span_of_the_leading_components_and_not_each(x64):
    w, q = converged("subspace", 3)
    np.testing.assert_allclose(w.T @ w, np.eye(3), atol=1e-8)
    # cosines of the principal angles
    np.testing.assert_allclose(np.linalg.svd(w.T @ q[:, :3])[1], 1, rtol=1e-10)
    assert np.abs(w.T @ q[:, :3]).max(0).min() < 0.99


# Every rule

X, T = np.linspace(-1, 1, 12).reshape(3, 4) ** 2, np.cos(np.arange(9.0)).reshape(3, 3)
Y = np.array([0, 2, 1], np.int32)
ES, MIRROR = rules.evolution_strategies, rules.weight_mirror(np.float64(0.01), np.float64(1.0))
EVOLUTION = (ES, rules.snes, rules.genetic_algorithm)
NUMPY = {"std": np.float64(0.1)}  # settings out of `np.logspace` are NumPy numbers
SETTINGS = {
    rules.private_sgd: {"batch_size": 2},
    rules.forward_forward: {"threshold": np.float64(1.0), "amplitude": np.float64(1.0)},
    rules.forward_gradient: {"tangents": np.int64(2)},
    rules.pepita: {"projection_scale": np.float64(0.5)},
    rules.extreme_learning: {"penalty": np.float64(0.1)},
    rules.node_perturbation: NUMPY,
    rules.weight_perturbation: NUMPY,
    ES: {"population": 4, **NUMPY},
    rules.snes: {"population": 4, **NUMPY},
    rules.genetic_algorithm: {"parents": 2, "children": 4, **NUMPY},
    rules.target_propagation: {"inverse_rate": np.float64(0.1), "noise_std": np.float64(0.1)},
}
FEEDBACK = {
    "sign-symmetric": "sign_symmetric redrawn",
    "kolen-pollack": rules.kolen_pollack(np.float64(0.01)),
    "mirror": MIRROR,
}
VARIANTS = {
    **{rule.__name__: (rule, SETTINGS.get(rule, {})) for rule in rules.RULES},
    **{name: (rules.feedback_alignment, {"feedback": kind}) for name, kind in FEEDBACK.items()},
    "dfa sign": (rules.direct_feedback_alignment, {"signal": "sign"}),
    "dfa targets": (rules.direct_feedback_alignment, {"signal": "targets"}),
    "goodness": (rules.forward_forward, {"predict": "goodness"}),
    "activations": (rules.forward_gradient, {"perturb": "activations"}),
    "outputs": (rules.node_perturbation, {"perturb_outputs": True, "antithetic": True}),
    "raw": (ES, {"fitness": "raw", "population": 4}),
}
every_rule = pytest.mark.parametrize("name", VARIANTS)


def build(name, loss=LOSS, net=NET):
    rule, settings = VARIANTS[name]
    return rule(net, loss, **settings)


def flat(leaves):
    return np.concatenate([leaf.ravel() for leaf in leaves])


def kind_of(leaf):
    return leaf.shape, leaf.dtype


WITH_LOSSES = [
    (name, loss)
    for name, (rule, _) in VARIANTS.items()
    for loss in (LOSS, losses.l2_loss)
    if loss is LOSS or rule is not rules.forward_forward
]


@functools.cache
def ready(name, loss=LOSS):
    """Params, state and compiled step of a rule for `NET`, which two tests ask."""
    made, params = build(name, loss), drawn(NET)
    return params, jax.jit(made.init)(KEY, params), jax.jit(made.value_and_grad)


@pytest.mark.parametrize(("name", "loss"), WITH_LOSSES, ids=str)
def test_a_row_of_weight_0_contributes_nothing_whatever_it_holds(x64, name, loss):
    """NaN or infinity in `x`, and a label out of range or a target of NaN."""
    (params, state, step), t = ready(name, loss), Y if loss is LOSS else T
    weights = np.array([1.0, 1.0, 0.0])
    harmless = step(params, state, X, t, weights)
    bad_x, bad_t = X.copy(), t.copy()
    bad_x[2] = [1e300, -np.inf, np.inf, np.nan]
    bad_t[2] = 7 if loss is LOSS else np.nan
    for x, targets in ((bad_x, t), (X, bad_t), (bad_x, bad_t)):
        found = step(params, state, x, targets, weights)
        assert error(numbers(found), numbers(harmless)) <= 1e-12
    assert np.isfinite(flat(numbers(harmless))).all()
    # "mirror" draws noise for as many rows as there are; one loss is enough for the weights
    if name != "mirror" and loss is LOSS:
        alone = step(params, state, X[:2], t[:2])
        assert error(wide(harmless[:2]), wide(alone[:2])) <= 1e-12


def test_labels_of_int8_may_have_300_classes():
    outputs = jnp.zeros((2, 300))
    for dtype in (jnp.int8, jnp.uint8, jnp.int32):
        found = targets_like(outputs, LOSS, jnp.array([5, 127], dtype))
        assert found.sum() == 2


@every_rule
def test_equal_weights_are_no_weights_and_without_weight_nothing_moves(x64, name):
    params, state, step = ready(name)
    size = 1.0 if name == "extreme_learning" else 0.3  # its penalty is against a sum
    equal, none, nothing = (
        step(params, state, X, Y, weights) for weights in (np.full(3, size), None, np.zeros(3))
    )
    assert error(numbers(equal[:2]), numbers(none[:2])) <= 1e-12
    assert float(nothing[0]) == 0
    if name not in ("genetic_algorithm", "private_sgd"):  # the first child, and noise
        assert not flat(wide(nothing[1])).any()


@every_rule
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_dtypes_are_kept_and_nothing_is_weak(x64, name, dtype):
    if name == "private_sgd" and dtype == "bfloat16":
        return  # it needs float32 at least
    made, (params, x) = build(name), cast((drawn(NET), jnp.asarray(X)), dtype)
    state = jax.eval_shape(made.init, KEY, params)
    weights = jnp.ones(3, jnp.float32)
    value, grads, after = jax.eval_shape(made.value_and_grad, params, state, x, Y, weights)
    assert jax.tree.map(kind_of, grads) == jax.tree.map(kind_of, params)
    assert jax.tree.map(kind_of, after) == jax.tree.map(kind_of, state)
    assert value.dtype == dtype or (VARIANTS[name][0] in EVOLUTION and value.dtype == "float32")
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((value, grads, after)))


@every_rule
def test_a_rule_that_is_built_twice_is_equal_and_of_another_net_unequal(name):
    one, two = (build(name, net=fnn.mlp((4, 5, 3))) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != build(name, net=fnn.mlp((4, 6, 3)))
    assert repr(one) == one.name


def test_feedback_that_is_built_twice_is_equal():
    for kind in (rules.random_feedback, rules.sign_symmetric, rules.kolen_pollack):
        assert kind() == kind()
        assert kind() != kind(draw=NET.init)
    assert rules.weight_mirror(0.1) == rules.weight_mirror(0.1)
    assert rules.weight_mirror(0.1) != rules.weight_mirror(0.2)


NOISY = ("activations", "outputs")
BLOCKWISE = ("direct_feedback_alignment", "target_propagation", "pepita", "hebbian", *NOISY)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_mlp_and_serial_with_a_repeat_take_the_same_step(x64, name):
    tanh = fnn.activations.tanh
    net, inner = fnn.mlp((4, 5, 5, 5, 3), "tanh"), fnn.serial(fnn.dense(5, 5), tanh)
    stacked = fnn.serial(fnn.dense(4, 5), tanh, fnn.repeat(inner, 2), fnn.dense(5, 3))
    parts, found = blocks(net).split(drawn(net)), []
    for other in (net, stacked):
        params = blocks(other).join([tuple(part) for part in parts])
        (value, grads, state), _ = first_step(build(name, net=other), params, *batch())
        found.append(numbers((value, blocks(other).split(grads), state)))
    assert error(*found) <= 1e-12


LOCAL = (*BLOCKWISE[:2], *NOISY, "feedback_alignment", "kolen-pollack", "dfa sign", "dfa targets")


@pytest.mark.parametrize("name", LOCAL)
def test_the_signals_of_a_local_rule_give_its_gradients(x64, name):
    made, params, (x, t) = build(name), drawn(NET), batch()
    (_, grads, _), state = first_step(made, params, x, t)
    chain = blocks(NET)
    parts = chain.split(params)
    hs, residuals = chain.forward(parts, x)
    signals = made.signals(params, state, x, t)
    assert [dy.shape for dy in signals] == [h.shape for h in hs[1:]]
    expected = chain.backward(parts, residuals, [dy / len(x) for dy in signals])
    assert error(wide(grads), wide(expected)) <= 1e-12


@pytest.mark.parametrize("name", ["target_propagation", "activations", "genetic_algorithm"])
def test_many_nets_at_once_are_the_nets_one_by_one(x64, name):
    made, data, keys = build(name), batch(), jax.random.split(KEY, 2)
    params = [drawn(NET, seed) for seed in (1, 2)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    states = jax.jit(jax.vmap(made.init))(keys, together)
    step = jax.vmap(made.value_and_grad, in_axes=(0, 0, None, None))
    many = jax.jit(step)(together, states, *data)
    for i in range(2):
        state, expected = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (states, many))
        one, _ = first_step(made, params[i], *data, state=state)
        assert error(numbers(one), numbers(expected)) <= 1e-12


TAKE_A_TABLE = [
    name
    for name, (rule, _) in VARIANTS.items()
    if rule not in (pepita, hebbian, rules.forward_forward)
]


@pytest.mark.parametrize("name", TAKE_A_TABLE)
def test_nets_that_begin_with_an_embedding_take_a_step(name):
    net = fnn.serial(fnn.embedding(7, 4), fnn.dense(4, 3))
    made, params = build(name, net=net), net.init(KEY)
    state, x = jax.eval_shape(made.init, KEY, params), jnp.array([0, 1, 6])
    _, grads, _ = jax.eval_shape(made.value_and_grad, params, state, x, Y, jnp.ones(3))
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@every_rule
def test_a_step_exports_with_a_symbolic_batch_and_runs_inside_shard_map(name):
    made, params = build(name), cast(drawn(NET), "float32")
    state = made.init(KEY, params)
    (b,) = jax.export.symbolic_shape("b")
    shapes = [((b, 4), "float32"), ((b,), "int32"), ((b,), "float32")]
    batch = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    like = jax.eval_shape(lambda: (params, state))
    jax.export.export(jax.jit(made.value_and_grad))(*like, *batch)

    def mean_step(params, state, *batch):
        return jax.lax.pmean(made.value_and_grad(params, state, *batch)[:2], "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    specs = P(), P(), P("data"), P("data"), P("data")
    step = jax.shard_map(mean_step, mesh=mesh, in_specs=specs, out_specs=P())
    batch = jnp.ones((4, 4)), jnp.zeros(4, jnp.int32), jnp.ones(4)
    assert jax.eval_shape(step, params, state, *batch)[0].shape == ()


# Bad input

RESIDUAL = fnn.serial(fnn.dense(4, 4), fnn.residual(fnn.dense(4, 4)), fnn.dense(4, 3))
TABLE = fnn.serial(fnn.embedding(4, 5), fnn.dense(5, 3))
BAD = {
    "`projection_scale` must be .* above 0, got 0": lambda: pepita(NET, LOSS, projection_scale=0),
    "`target_rate` must be .* above 0": lambda: target_propagation(NET, LOSS, target_rate=-1),
    "`noise_std` must be .* at least 0": lambda: target_propagation(NET, LOSS, noise_std=-0.1),
    "`inverse_rate` must be": lambda: target_propagation(NET, LOSS, inverse_rate=np.nan),
    "Did you mean 'relu'": lambda: target_propagation(NET, LOSS, inverse_activation="rellu"),
    "'sangre'. Did you mean 'sanger'": lambda: hebbian(NET, LOSS, competition="sangre"),
    r"pepita must be a chain .* got dense\(4, 3\)": lambda: pepita(fnn.dense(4, 3), LOSS),
    "target_propagation must be a chain": lambda: target_propagation(fnn.dense(4, 3), LOSS),
    r"block 1 must begin with a dense layer, got residual\(": lambda: hebbian(RESIDUAL, LOSS),
    "hidden block 0 .* got embedding": lambda: pepita(TABLE, LOSS),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_settings_and_nets_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
