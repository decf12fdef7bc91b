"""Target propagation, PEPITA and Hebbian learning.

Each against its formula written out in NumPy, its identities and its edge cases.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide

import fnn
from fnn import losses
from fnn.nets.activations import elementwise
from fnn.nets.layers import Dense
from fnn.rules.hebbian import hebbian
from fnn.rules.pepita import pepita
from fnn.rules.target_propagation import target_propagation

LOSS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(3)
NET = fnn.mlp((4, 6, 5, 3), "tanh")
RULES = {
    "target_propagation": target_propagation,
    "linear target_propagation": functools.partial(
        target_propagation, noise_std=0.0, inverse_rate=0.3
    ),
    "tanh target_propagation": functools.partial(
        target_propagation, inverse_activation="tanh", target_rate=0.5
    ),
    "pepita": functools.partial(pepita, projection_scale=1.0),
    "hebbian none": functools.partial(hebbian, competition="none"),
    "hebbian subspace": hebbian,
    "hebbian sanger": functools.partial(hebbian, competition="sanger"),
}
every_rule = pytest.mark.parametrize("name", RULES)
one_of_each = pytest.mark.parametrize("name", ["target_propagation", "pepita", "hebbian sanger"])


def batch(n=7, features=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(n, features))), jnp.asarray(
        rng.integers(0, 3, n), jnp.int32
    )


def drawn(net, seed=1):
    """Params with biases that are not 0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0))
    return jax.tree.map(
        lambda s: jnp.asarray(
            rng.normal(size=s.shape) / np.sqrt(s.shape[-2] if len(s.shape) > 1 else 9)
        ),
        shapes,
    )


def state_of(rule, params, seed=5):
    """A state of the shapes and dtypes that `init` gives, drawn without compiling it."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(rule.init, KEY, params)

    def leaf(s):
        return (
            jax.random.key(seed)
            if _is_key(s)
            else jnp.asarray(rng.normal(size=s.shape) / np.sqrt(s.shape[0]), s.dtype)
        )

    return jax.tree.map(leaf, shapes)


def first_step(rule, params, x, t, weights=None, state=None):
    """`(value, grads, state)` and the state before."""
    state = state_of(rule, params) if state is None else state
    return jax.jit(rule.value_and_grad)(params, state, x, t, weights), state


def true_step(net, loss, *args):
    """Backprop's `(value, grads)`."""
    return _true_step(net, loss)(*args)


@functools.cache
def _true_step(net, loss):
    return jax.jit(fnn.value_and_grad(net, loss))


def off(ours, reference):
    """`error` of the numbers of two trees.

    Infinite where their keys are not the same, for keys are no numbers to be near.
    """
    trees = [jax.tree.leaves(tree) for tree in (ours, reference)]
    keys, numbers = (
        [[leaf for leaf in leaves if _is_key(leaf) == kind] for leaves in trees]
        for kind in (True, False)
    )
    same = all(
        (jax.random.key_data(a) == jax.random.key_data(b)).all() for a, b in zip(*keys, strict=True)
    )
    return error(*map(wide, numbers)) if same else float("inf")


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# The formulas, in loops over examples and layers, for `NET`: weights Ws, biases bs, shares of the
# examples s (they add up to 1).


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


def target_formula(Ws, bs, xs, ts, s, state, target_rate, inverse_rate, noise_std, activation):
    g, slope = {
        "identity": (lambda z: z, np.ones_like),
        "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    }[activation]
    dWs, dbs = [np.zeros_like(w) for w in Ws], [np.zeros_like(b) for b in bs]
    ((v, c), _) = state.params[0]
    key, noise_key = jax.random.split(state.key)
    noise = np.asarray(jax.random.normal(noise_key, (len(xs), 6)))
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
    "target_propagation": functools.partial(
        target_formula, target_rate=0.1, inverse_rate=0.1, noise_std=0.1, activation="identity"
    ),
    "linear target_propagation": functools.partial(
        target_formula, target_rate=0.1, inverse_rate=0.3, noise_std=0.0, activation="identity"
    ),
    "tanh target_propagation": functools.partial(
        target_formula, target_rate=0.5, inverse_rate=0.1, noise_std=0.1, activation="tanh"
    ),
    "pepita": pepita_formula,
    "hebbian none": functools.partial(hebbian_formula, competition="none"),
    "hebbian subspace": functools.partial(hebbian_formula, competition="subspace"),
    "hebbian sanger": functools.partial(hebbian_formula, competition="sanger"),
}


@every_rule
def test_a_step_is_the_formula_written_out(x64, name):
    params, (x, t) = drawn(NET), batch()
    weights = np.array([1.0, 0, 2, 0.5, 0, 3, 1])
    (value, grads, after), before = first_step(RULES[name](NET, LOSS), params, x, t, weights)
    denses = [params[0][0], params[1][0], params[2]]
    Ws, bs = [np.asarray(d.w) for d in denses], [np.asarray(d.b) for d in denses]
    s = weights / weights.sum()
    dWs, dbs, expected = FORMULAS[name](Ws, bs, np.asarray(x), np.asarray(t), s, before)
    assert error(wide(grads), [a for pair in zip(dWs, dbs, strict=True) for a in pair]) <= 1e-10
    assert not jax.tree.leaves(before) or off(after, expected) <= 1e-10
    assert abs(float(value) - np.average(LOSS.value(NET.apply(params, x), t), weights=s)) <= 1e-12


@one_of_each
def test_mlp_serial_and_repeat_are_one_net(x64, name):
    tanh = fnn.activations.tanh
    net = fnn.mlp((4, 5, 5, 5, 3), "tanh")
    flat = fnn.serial(
        *(layer for n in (4, 5, 5) for layer in (fnn.dense(n, 5), tanh)), fnn.dense(5, 3)
    )
    stacked = fnn.serial(
        fnn.dense(4, 5), tanh, fnn.repeat(fnn.serial(fnn.dense(5, 5), tanh), 2), fnn.dense(5, 3)
    )
    (d1, _), (d2, _), (d3, _), d4 = params = drawn(net)
    rolled = d1, (), (jax.tree.map(lambda *a: jnp.stack(a), d2, d3), ()), d4
    (value, grads, state), _ = first_step(RULES[name](net, LOSS), params, *batch())
    for other, p in ((flat, (d1, (), d2, (), d3, (), d4)), (stacked, rolled)):
        (v, g, s), _ = first_step(RULES[name](other, LOSS), p, *batch())
        assert jax.tree.structure(g) == jax.tree.structure(p)
        if other is stacked:
            both = g[2][0]
            g = (g[0], *(jax.tree.map(lambda a, i=i: a[i], both) for i in range(2)), g[3])
        assert error(wide((v, g)), wide((value, grads))) <= 1e-12
        assert not jax.tree.leaves(s) or off(s, state) <= 1e-12


@one_of_each
def test_padding_does_not_count_and_equal_weights_are_none(x64, name):
    params, (x, t) = drawn(NET), batch()
    made = RULES[name](NET, LOSS)
    state, step = state_of(made, params), jax.jit(made.value_and_grad)
    present = jnp.array([1.0, 1, 1, 1, 1, 0, 0])
    value, grads, after = step(params, state, x, t, present)
    for content in (0.0, 1e3):
        again = step(params, state, x.at[5:].set(content), t.at[5:].set(0), present)
        assert off(again, (value, grads, after)) <= 1e-12
    short = step(params, state, x[:5], t[:5], None)
    # the state's noise is another for as many rows
    assert error(wide(short[:2]), wide((value, grads))) <= 1e-12
    expected = step(params, state, x, t, None)
    assert off(step(params, state, x, t, jnp.full(7, 3.0)), expected) <= 1e-12
    value, grads, after = step(params, state, x, t, jnp.zeros(7))
    assert value == 0
    assert not any(leaf.any() for leaf in wide(grads))
    if jax.tree.leaves(state):
        weights_of = lambda s: s.params if "target" in name else s  # noqa: E731
        assert error(wide(weights_of(after)), wide(weights_of(state))) == 0


@every_rule
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [("float64", True), ("float32", True), ("float32", False), ("bfloat16", False)],
)
def test_dtypes_are_kept(name, dtype, x64):
    with jax.enable_x64(x64):
        params, (x, t) = drawn(NET), batch()
        params, x = cast((params, x), dtype)
        made = RULES[name](NET, LOSS)
        state = jax.eval_shape(made.init, KEY, params)
        value, grads, after = jax.eval_shape(
            made.value_and_grad, params, state, x, t, jnp.ones(7, jnp.float32)
        )
    for leaf in jax.tree.leaves((value, grads, after, state)):
        assert _is_key(leaf) or (leaf.dtype == dtype and not leaf.weak_type)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(
        lambda a: (a.shape, a.dtype), state
    )


@one_of_each
def test_float32_is_near_float64(name):
    with jax.enable_x64(True):
        params, (x, t) = drawn(NET), batch()
        made = RULES[name](NET, LOSS)
        state = state_of(made, params)
        exact = jax.jit(made.value_and_grad)(params, state, x, t)
    state = (
        state._replace(params=cast(state.params, "float32"))
        if name == "target_propagation"
        else cast(state, "float32")
    )
    short = jax.jit(made.value_and_grad)(cast(params, "float32"), state, x.astype(jnp.float32), t)
    assert error(wide(short[:2]), wide(exact[:2])) < 1e-5


def clusters(n, features):
    rng = np.random.default_rng(0)
    t = rng.integers(0, 3, n).astype(np.int32)
    return (rng.normal(size=(n, features)) / 4 + np.eye(3, features)[t]).astype(np.float32), t


@pytest.mark.parametrize("rule", [target_propagation, pepita, hebbian])
def test_fit_lowers_the_loss(rule):
    data, net = (
        clusters(23, 4),
        fnn.mlp((4, 6, 5, 3), "tanh", kernel_init=jax.nn.initializers.orthogonal()),
    )
    made, params = rule(net, LOSS), jax.jit(net.init)(KEY)
    trained, history = fnn.fit(made, optax.sgd(0.2), params, data, epochs=20, batch_size=4, key=KEY)
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert fnn.evaluate(made, trained, data)["accuracy"] >= 0.8


@pytest.mark.parametrize("rule", [target_propagation, pepita])
def test_many_nets_at_once_are_the_nets_one_by_one(x64, rule):
    net, (x, t) = fnn.mlp((4, 6, 5, 3), "tanh"), batch()
    made, keys = rule(net, LOSS), jax.random.split(KEY, 2)
    params = [drawn(net, seed) for seed in (1, 2)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    states = jax.jit(jax.vmap(made.init))(keys, together)
    many = jax.jit(jax.vmap(made.value_and_grad, in_axes=(0, 0, None, None)))(
        together, states, x, t
    )
    step = jax.jit(made.value_and_grad)
    for i in range(2):
        one = step(params[i], jax.tree.map(lambda a, i=i: a[i], states), x, t)
        assert off(jax.tree.map(lambda a, i=i: a[i], many), one) <= 1e-12


@one_of_each
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1, 1, 2)])
def test_one_unit_and_one_example(x64, name, sizes):
    net = fnn.mlp(sizes, "tanh", bias_init=None)
    x, t = jnp.ones((1, sizes[0])), jnp.full((1, sizes[-1]), 2.0)
    params = drawn(net)
    (value, grads, _), _ = first_step(RULES[name](net, losses.l2_loss), params, x, t)
    outputs, h = net.apply(params, x), fnn.serial(*net.layers[:-1]).apply(params[:-1], x)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert abs(float(value - losses.l2_loss.value(outputs, t)[0])) <= 1e-12
    if name != "pepita":  # whose last layer sees the second pass
        assert error(wide(grads[-1].w), wide(h.T @ (outputs - t))) <= 1e-12


@pytest.mark.parametrize("name", ["target_propagation", "hebbian sanger"])
def test_the_last_block_is_trained_by_the_true_error(x64, name):
    params, (x, t) = drawn(NET), batch()
    (_, grads, _), _ = first_step(RULES[name](NET, LOSS), params, x, t)
    _, expected = true_step(NET, LOSS, params, x, t)
    assert error(wide(grads[-1]), wide(expected[-1])) <= 1e-12


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
    made = rule(net, LOSS)
    # PEPITA's second pass is then the first
    state = jax.tree.map(jnp.zeros_like, state_of(made, params))
    _, grads, _ = jax.jit(made.value_and_grad)(params, state, x, t)
    _, expected = true_step(net, LOSS, params, x, t)
    assert error(wide(grads[-1]), wide(expected[-1])) <= 1e-12
    assert not any(
        leaf.any() for leaf in wide((grads[0].b if rule is hebbian else grads[0], grads[1]))
    )


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
    state = state_of(rule, params)
    transposed = tuple(
        (Dense(p.w.T, g.b), ()) for (p, _), (g, _) in zip(params[1:-1], state.params, strict=True)
    )
    value, grads, _ = jax.jit(rule.value_and_grad)(params, state._replace(params=transposed), x, t)
    assert error(wide((value, grads)), wide(true_step(net, LOSS, params, x, t))) <= 1e-12


def test_an_exact_inverse_stays_and_sends_down_the_target_itself(x64):
    net, (x, t) = fnn.mlp((4, 5, 5, 3), "identity"), batch()
    params, rule = drawn(net), target_propagation(net, LOSS, noise_std=2.0, inverse_rate=0.9)
    w, b = params[1][0]
    inverse = np.linalg.inv(w)
    exact = Dense(jnp.asarray(inverse), jnp.asarray(-np.asarray(b) @ inverse))
    _, grads, after = jax.jit(rule.value_and_grad)(
        params, state_of(rule, params)._replace(params=((exact, ()),)), x, t
    )
    assert error(wide(after.params), wide(exact)) <= 1e-10
    h1, e = (
        np.asarray(net.layers[0].apply(params[0], x)),
        np.asarray(LOSS.grad(net.apply(params, x), t)),
    )
    # h_1 w + b of it is the second target, at target_rate 1
    target_1 = np.linalg.solve(w.T, (h1 @ w - e @ params[2].w.T).T).T
    assert error(wide(grads[0][0].b), wide((h1 - target_1).mean(0))) <= 1e-10


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

    _, history = jax.jit(lambda state: jax.lax.scan(turn, state, length=60))(state_of(rule, params))
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


def test_without_a_projection_pepita_trains_the_last_layer_alone(x64):
    params, (x, t) = drawn(NET), batch()
    _, grads, state = pepita(NET, LOSS).value_and_grad(params, jnp.zeros((3, 4)), x, t)
    assert not any(leaf.any() for leaf in wide((grads[:-1], state)))
    assert error(wide(grads[-1]), wide(true_step(NET, LOSS, params, x, t)[1][-1])) <= 1e-12


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


def test_pepita_turns_the_weights_against_the_projection(x64):
    (x, t), net = clusters(60, 8), fnn.mlp((8, 32, 3))
    rule, params = pepita(net, LOSS), drawn(net)
    f = 0.1 * state_of(rule, params)

    def cosine(params):
        through = params[0][0].w @ params[-1].w
        return float(jnp.vdot(f.T, through) / jnp.linalg.norm(f) / jnp.linalg.norm(through))

    def step(params, _):
        value, grads, _ = rule.value_and_grad(params, f, x.astype(float), t)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), value

    trained, values = jax.jit(lambda p: jax.lax.scan(step, p, length=300))(params)
    assert values[-1] < 0.2 * values[0]
    assert cosine(trained) < min(0, cosine(params)) - 0.1


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


@pytest.mark.parametrize("competition", ["none", "subspace", "sanger"])
def test_components_are_a_fixed_point(x64, competition):
    x, q = spread()
    net = fnn.mlp((5, 2, 2), "identity")
    params = (
        (Dense(jnp.asarray(q[:, :2]), jnp.zeros(2)), ()),
        Dense(jnp.ones((2, 2)), jnp.zeros(2)),
    )
    _, grads, _ = hebbian(net, losses.l2_loss, competition=competition).value_and_grad(
        params, (), x, jnp.zeros((len(x), 2))
    )
    assert np.abs(grads[0][0].w).max() <= 1e-12
    assert not np.asarray(grads[0][0].b).any()


def test_hidden_layers_do_not_see_the_targets(x64):
    params, (x, t) = drawn(NET), batch()
    step = jax.jit(hebbian(NET, LOSS, competition="sanger").value_and_grad)
    one, other = (step(params, (), x, labels)[1] for labels in (t, 2 - t))
    assert error(wide(one[:-1]), wide(other[:-1])) == 0
    assert error(wide(one[-1]), wide(other[-1])) > 0.1


# Bad input


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: pepita(NET, LOSS, projection_scale=0),
            ValueError,
            "`projection_scale` must be a finite number above 0, got 0",
        ),
        (
            lambda: target_propagation(NET, LOSS, target_rate=-1),
            ValueError,
            "`target_rate` must be a finite number above 0, got -1",
        ),
        (
            lambda: target_propagation(NET, LOSS, noise_std=-0.1),
            ValueError,
            "`noise_std` must be a finite number, at least 0, got -0.1",
        ),
        (
            lambda: target_propagation(NET, LOSS, inverse_rate=np.nan),
            ValueError,
            "`inverse_rate` must be a finite number, at least 0",
        ),
        (
            lambda: target_propagation(NET, LOSS, inverse_rate="0.1"),
            TypeError,
            r"`inverse_rate` must be .*, got '0.1' \(str\)",
        ),
        (
            lambda: target_propagation(NET, LOSS, inverse_activation="rellu"),
            ValueError,
            "Did you mean 'relu'",
        ),
        (
            lambda: hebbian(NET, LOSS, competition="sangre"),
            ValueError,
            "Unknown competition 'sangre'. Did you mean 'sanger'",
        ),
        (lambda: hebbian(NET, "mse"), TypeError, "`loss` must be a Loss"),
        (lambda: pepita("net", LOSS), TypeError, "`net` must be a Layer"),
        (
            lambda: pepita(fnn.dense(4, 3), LOSS),
            ValueError,
            r"`net` of pepita must be a chain .* got dense\(4, 3\), which is one block",
        ),
        (
            lambda: target_propagation(fnn.dense(4, 3), LOSS),
            ValueError,
            "`net` of target_propagation must be a chain",
        ),
        (
            lambda: hebbian(
                fnn.serial(fnn.dense(4, 4), fnn.residual(fnn.dense(4, 4)), fnn.dense(4, 3)), LOSS
            ),
            ValueError,
            r"`net` of hebbian: hidden block 1 must begin with a dense layer, got residual\(dense\(4, 4\)\)",
        ),
        (
            lambda: pepita(fnn.serial(fnn.embedding(4, 5), fnn.dense(5, 3)), LOSS),
            ValueError,
            "hidden block 0 .* got embedding",
        ),
    ],
)
def test_settings_and_nets_that_cannot_be_meant(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (np.zeros((2, 4), np.int32), TypeError, "`x` must hold floating-point numbers, got int32"),
        (
            np.zeros((2, 3, 4), np.float32),
            ValueError,
            r"pepita: `x` has shape \(2, 3, 4\), expected \[batch, features\]",
        ),
        (np.zeros(4, np.float32), ValueError, r"`x` has shape \(4,\), .* Pass `x\[None\]`"),
        ([[0.0] * 4] * 2, TypeError, "`x` must be an array, got list"),
    ],
)
def test_inputs_that_pepita_cannot_add_an_error_to(x, kind, message):
    params, rule = jax.eval_shape(NET.init, KEY), pepita(NET, LOSS)
    with pytest.raises(kind, match=message):
        rule.value_and_grad(params, jnp.zeros((3, 4)), x, np.zeros(2, np.int32))
