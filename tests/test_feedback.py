"""Feedback alignment, direct feedback alignment and forward-forward: formulas written in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, error, wide

import fnn
from fnn import losses, rules
from fnn.nets.blocks import blocks
from fnn.nets.layers import Dense
from fnn.rules.forward_forward import wrong_labels

LABELS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(3)
TANH = fnn.activations.tanh
NET = fnn.mlp((6, 5, 5, 5, 3), "tanh")
INNER = fnn.serial(fnn.dense(5, 5), TANH)
REPEAT = fnn.serial(fnn.dense(6, 5), TANH, fnn.repeat(INNER, 2), fnn.dense(5, 3))
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 1.0, 3.0])
SHARES = WEIGHTS / WEIGHTS.sum()
every_net = pytest.mark.parametrize("net", [NET, REPEAT], ids=["mlp", "repeat"])


def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(7, 6))), jnp.asarray(rng.integers(0, 3, 7), jnp.int32)


def layers_of(seed, sizes=(6, 5, 5, 5, 3)):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(sizes)
    return [(rng.normal(size=(m, n)) / np.sqrt(m), 0.1 * rng.normal(size=n)) for m, n in pairs]


def params_of(net, layers):
    """The params of a net from `(w, b)` for each block."""
    dense = [Dense(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    chain = blocks(net)
    rest = [((),) * (len(block.layers) - 1) for block in chain.layers]
    return chain.join([(d, *r) for d, r in zip(dense, rest, strict=True)])


def run(rule, params, state, x, t, weights=None):
    return jax.jit(rule.value_and_grad)(params, state, x, t, weights)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def forward(layers, x):
    """`[h_0, ..., h_L]` of a tanh net."""
    hs = [np.asarray(x)]
    for i, (w, b) in enumerate(layers):
        z = hs[-1] @ w + b
        hs.append(np.tanh(z) if i < len(layers) - 1 else z)
    return hs


def backward(layers, x, t, carry):
    """The gradients of every layer; `carry(layer, dz of the next)` is the error at its output."""
    hs = forward(layers, x)
    dz = (softmax(hs[-1]) - np.eye(3)[t]) * SHARES[:, None]
    grads = []
    for i in reversed(range(len(layers))):
        if i < len(layers) - 1:
            dz = carry(i, dz) * (1 - hs[i + 1] ** 2)
        grads.insert(0, (hs[i].T @ dz, dz.sum(0)))
    return grads


# Feedback alignment


@every_net
def test_feedback_alignment_is_its_formula_and_with_the_weights_backprop(x64, net):
    layers, others, (x, t) = layers_of(1), layers_of(2), batch()
    rule = rules.feedback_alignment(net, LABELS)
    params, matrices = params_of(net, layers), params_of(net, others)
    value, grads, state = run(rule, params, matrices, x, t, WEIGHTS)
    expected = backward(layers, x, t, lambda i, dz: dz @ others[i + 1][0].T)
    assert error(wide(grads), wide(params_of(net, expected))) < 1e-12
    assert error(wide(state), wide(matrices)) == 0
    true_value, true = fnn.value_and_grad(net, LABELS)(params, x, t, WEIGHTS)
    assert error(wide(run(rule, params, params, x, t, WEIGHTS)[1]), wide(true)) < 1e-12
    assert abs(float(value - true_value)) < 1e-12


def test_feedback_is_drawn_as_the_net_draws_its_start_and_in_its_dtypes():
    rule, params = rules.feedback_alignment(NET, LABELS), cast(NET.init(KEY), jnp.bfloat16)
    matrices = rule.init(KEY, params)
    assert error(wide(matrices), wide(params)) == 0
    assert matrices[0][0].w.dtype == jnp.bfloat16
    assert error(wide(rule.init(jax.random.key(4), params)), wide(params)) > 1


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "redrawn"])
def test_sign_symmetric_feedback_has_the_signs_of_the_weights_and_sizes_of_its_own(x64, magnitude):
    params, kind = params_of(NET, layers_of(2)), rules.sign_symmetric(magnitude)
    x, _ = batch()
    first, after = kind.step(NET, kind.init(NET, KEY, params), params, x)
    again, _ = kind.step(NET, after, params, x)
    drawn = cast(NET.init(KEY), jnp.float64)
    for i in range(3):
        w, b, c, start = (np.asarray(tree[i][0].w) for tree in (params, first, again, drawn))
        np.testing.assert_array_equal(np.sign(b), np.sign(w))
        assert (b == c).all() == (magnitude != "redrawn")
        if magnitude == "uniform":
            np.testing.assert_allclose(np.abs(b), np.sqrt((start**2).mean()), rtol=1e-12)
        if magnitude == "fixed":
            np.testing.assert_array_equal(np.abs(b), np.abs(start))
        if magnitude == "redrawn":
            assert len(np.unique(np.abs(b))) == b.size


def test_kolen_pollack_takes_the_steps_of_the_weights_and_the_difference_decays_at_the_rate(x64):
    """Against Kolen and Pollack's own two updates, with a decay in the optimiser."""
    (x, t), decay, rate = batch(), 0.05, 0.3
    rule = rules.feedback_alignment(NET, LABELS, feedback=rules.kolen_pollack(decay))
    params = params_of(NET, layers_of(3))
    state = rule.init(KEY, params)
    step = jax.jit(rule.value_and_grad)
    start = [np.copy(d) for d in wide(state)]
    b = wide(rule.matrices(params, state, x))
    for _ in range(20):
        _, grads, state = step(params, state, x, t)
        params = jax.tree.map(lambda p, g: (1 - decay) * p - rate * g, params, grads)
        b = [(1 - decay) * old - rate * g for old, g in zip(b, wide(grads), strict=True)]
    assert error(wide(rule.matrices(params, state, x)), b) < 1e-10
    assert error(wide(state), [(1 - decay) ** 20 * d for d in start]) < 1e-10


def test_a_step_of_the_weight_mirror_moves_the_feedback_to_an_unbiased_estimate_of_the_weights(x64):
    """An entry of the estimate has a variance below (|w_j|^2 + w_ij^2 + b_j^2 / noise^2) / rows."""
    residual = fnn.residual(fnn.dense(5, 5))
    after = (fnn.layer_norm(5), TANH)
    net = fnn.serial(fnn.dense(6, 5), TANH, fnn.dense(5, 5), *after, residual, fnn.dense(5, 3))
    params, rows = cast(net.init(KEY), jnp.float64), 40_000
    params = jax.tree.map(lambda p: p + 0.1, params)
    kind = rules.weight_mirror(0.25, noise=0.5)
    matrices, key = kind.init(net, KEY, params)
    found, (kept, new_key) = kind.step(net, (matrices, key), params, jnp.ones((rows, 6)))
    assert error(wide(kept), wide(found)) == 0
    assert jax.random.key_data(new_key).tolist() != jax.random.key_data(key).tolist()
    for i in (2, 6):
        w, b, old, new = params[i].w, params[i].b, matrices[i].w, found[i].w
        estimate = (new - 0.75 * old) / 0.25
        variance = ((w**2).sum(0)[None] + w**2 + (b**2 / 0.25)[None]) / rows
        assert (np.abs(estimate - w) < 5 * np.sqrt(variance)).all()
        assert np.abs(estimate - w).max() < 0.1 < np.abs(old - w).max()
    still = [tree[:2] + tree[3:6] for tree in (found, matrices)]  # all but the dense layers behind
    assert error(wide(still[0]), wide(still[1])) == 0


# Direct feedback alignment


@pytest.mark.parametrize("signal", ["error", "sign", "targets"])
@every_net
def test_direct_feedback_alignment_is_its_formula(x64, net, signal):
    layers, (x, t) = layers_of(6), batch()
    rule = rules.direct_feedback_alignment(net, LABELS, signal=signal)
    state = rule.init(KEY, params_of(net, layers))
    e = softmax(forward(layers, x)[-1]) - np.eye(3)[t]
    sent = {"error": e, "sign": np.sign(e), "targets": -np.eye(3)[t]}[signal] * SHARES[:, None]
    expected = backward(layers, x, t, lambda i, dz: sent @ np.asarray(state[i]))
    grads = run(rule, params_of(net, layers), state, x, t, WEIGHTS)[1]
    assert error(wide(grads), wide(params_of(net, expected))) < 1e-12


def test_every_hidden_block_has_feedback_of_its_own_with_the_initialisers_spread():
    net = fnn.mlp((2, 400, 400, 50))
    rule = rules.direct_feedback_alignment(net, LABELS)
    matrices = np.stack(rule.init(KEY, jax.eval_shape(net.init, KEY)))  # [2, 50, 400]
    np.testing.assert_allclose(matrices.std((1, 2)), np.sqrt(1 / 50), rtol=0.03)
    assert abs(np.corrcoef(matrices.reshape(2, -1))[0, 1]) < 0.03
    ones = rules.direct_feedback_alignment(net, LABELS, feedback_init=jax.nn.initializers.ones)
    assert (np.stack(ones.init(KEY, jax.eval_shape(net.init, KEY))) == 1).all()


def test_direct_feedback_alignment_of_one_hidden_layer_with_its_weights_is_backprop(x64):
    net, (x, t) = fnn.mlp((6, 5, 3), "tanh"), batch()
    params = cast(net.init(KEY), jnp.float64)
    rule = rules.direct_feedback_alignment(net, LABELS)
    grads = run(rule, params, (params[-1].w.T,), x, t)[1]
    assert error(wide(grads), wide(fnn.value_and_grad(net, LABELS)(params, x, t)[1])) < 1e-12


def test_targets_that_are_sent_may_be_real(x64):
    net, (x, _) = fnn.mlp((6, 5, 3), "tanh"), batch()
    rule = rules.direct_feedback_alignment(net, losses.l2_loss, signal="targets")
    params = cast(net.init(KEY), jnp.float64)
    h = np.tanh(np.asarray(x) @ np.asarray(params[0][0].w))
    expected = np.asarray(x).T @ (-3 / 7 * (1 - h**2))
    grads = run(rule, params, (jnp.ones((3, 5)),), x, jnp.ones((7, 3)))[1]
    assert error([np.asarray(grads[0][0].w)], [expected]) < 1e-12


# Forward-forward


def ff_passes(layers, x, labels, amplitude):
    """`(inputs, outputs)` of every hidden layer with a label written over the first features."""
    h = np.concatenate([amplitude * labels, np.asarray(x)[:, 3:]], 1)
    passes = []
    for i, (w, b) in enumerate(layers[:-1]):
        a = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-8) if i else h
        h = np.tanh(a @ w + b)
        passes.append((a, h))
    return passes


@every_net
def test_forward_forward_is_its_formula_and_the_gradient_of_the_goodness_loss(x64, net):
    layers, (x, t) = layers_of(7), batch()
    rule = rules.forward_forward(net, LABELS, threshold=0.5, amplitude=2.0)
    value, grads, _ = run(rule, params_of(net, layers), KEY, x, t, WEIGHTS)
    labels, wrong = np.asarray(t), np.asarray(wrong_labels(jax.random.split(KEY)[1], t, 3))
    right_and_wrong = [ff_passes(layers, x, np.eye(3)[k], 2.0) for k in (labels, wrong)]
    expected = []
    for i, layer in enumerate(layers[:-1]):

        def goodness_loss(p, i=i):
            good, bad = (
                (jnp.tanh(passes[i][0] @ p[0] + p[1][None]) ** 2).sum(1) - 0.5 * 5
                for passes in right_and_wrong
            )
            return ((jax.nn.softplus(-good) + jax.nn.softplus(bad)) * SHARES).sum()

        expected.append(jax.grad(goodness_loss)(jax.tree.map(jnp.asarray, layer)))
    h = ff_passes(layers, x, np.full((7, 3), 1 / 3), 2.0)[-1][1]
    h = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-8)
    z = h @ layers[-1][0] + layers[-1][1]
    dz = (softmax(z) - np.eye(3)[labels]) * SHARES[:, None]
    expected.append((h.T @ dz, dz.sum(0)))
    assert error(wide(grads), wide(params_of(net, expected))) < 1e-12
    values = -np.log(softmax(z)[np.arange(7), labels])
    assert abs(float(value) - (values * SHARES).sum()) < 1e-12
    assert error(wide(rule.predict(params_of(net, layers), x)), [z]) < 1e-12


def test_prediction_by_goodness_sums_it_over_all_but_the_first_hidden_layer(x64):
    layers, (x, _) = layers_of(8), batch()
    rule = rules.forward_forward(NET, LABELS, predict="goodness")
    found = rule.predict(params_of(NET, layers), x)
    for label in range(3):
        passes = ff_passes(layers, x, np.tile(np.eye(3)[label], (7, 1)), 1.0)
        goodness = [(h**2).sum(1) for _, h in passes]
        np.testing.assert_allclose(found[:, label], sum(goodness[1:]), rtol=1e-12)
    alone = fnn.mlp((6, 5, 3), "tanh")
    found = rules.forward_forward(alone, LABELS, predict="goodness").predict(
        params_of(alone, layers_of(8, (6, 5, 3))), x
    )
    assert found.shape == (7, 3)
    assert found.min() > 0


def test_goodness_is_that_of_right_and_wrong_labels_and_its_record_weighs_examples(x64):
    layers, (x, t) = layers_of(9), batch()
    rule = rules.forward_forward(NET, LABELS, threshold=0.4)
    found = rule.goodness(params_of(NET, layers), KEY, x, t)
    wrong = wrong_labels(jax.random.split(KEY)[1], t, 3)
    for goodness, labels in zip(found[:2], (t, wrong), strict=True):
        passes = ff_passes(layers, x, np.eye(3)[np.asarray(labels)], 1.0)
        np.testing.assert_allclose(goodness, [(h**2).sum(1) for _, h in passes], rtol=1e-12)
    np.testing.assert_allclose(found[2], 0.4 * 5)
    record = fnn.alignment.goodness(rule)(params_of(NET, layers), KEY, x, t, jnp.asarray(WEIGHTS))
    positive, negative = (np.asarray(goodness) for goodness in found[:2])
    np.testing.assert_allclose(record.gap, (positive - negative) @ SHARES, rtol=1e-12)
    correct = ((positive > 2) * 1.0 + (negative < 2) * 1.0) / 2
    np.testing.assert_allclose(record.accuracy, correct @ SHARES, rtol=1e-6)


def test_a_wrong_label_is_never_the_right_one_and_every_other_one_comes_as_often():
    labels = jnp.arange(4000, dtype=jnp.int32) % 4
    wrong = wrong_labels(KEY, labels, 4)
    shift = np.bincount(np.asarray((wrong - labels) % 4), minlength=4)
    assert shift[0] == 0
    assert (np.abs(shift[1:] - 4000 / 3) < 5 * np.sqrt(4000 * 2 / 9)).all()


def test_one_hot_targets_and_labels_are_the_same_to_forward_forward(x64):
    (x, t), params = batch(), params_of(NET, layers_of(1))
    one_hot = rules.forward_forward(NET, losses.softmax_cross_entropy)
    ours = run(one_hot, params, KEY, x, jnp.eye(3)[t])
    theirs = run(rules.forward_forward(NET, LABELS), params, KEY, x, t)
    assert error(wide(ours[:2]), wide(theirs[:2])) < 1e-12


# Bad input


def ff_call(net, shape):
    rule, params = rules.forward_forward(net, LABELS), net.init(KEY)
    return rule.value_and_grad(params, KEY, jnp.ones(shape), jnp.zeros(shape[0], jnp.int32))


def dfa_call():
    """Blocks whose positions are summed away before the outputs."""
    pool = fnn.Layer(
        "pool",
        lambda key: (),
        lambda p, x: (x.mean(1), x.shape[1]),
        lambda p, n, dy, reduce=None: ((), dy),
    )
    net = fnn.serial(fnn.dense(6, 5), fnn.activations.relu, fnn.serial(fnn.dense(5, 3), pool))
    params = net.init(KEY)
    rule = rules.direct_feedback_alignment(net, LABELS)
    x, t = jnp.ones((4, 3, 6)), jnp.zeros(4, jnp.int32)
    return rule.value_and_grad(params, rule.init(KEY, params), x, t)


fa, dfa, ff = rules.feedback_alignment, rules.direct_feedback_alignment, rules.forward_forward
BAD = {
    "Unknown feedback 'random'. Known: fixed, sign": lambda: fa(NET, LABELS, feedback="random"),
    "Unknown feedback 3": lambda: fa(NET, LABELS, feedback=3),
    "Known: uniform, fixed, redrawn": lambda: rules.sign_symmetric("big"),
    "`decay` must be a finite number above 0": lambda: rules.kolen_pollack(0.0),
    "`noise` must be a finite number above 0": lambda: rules.weight_mirror(0.1, -1.0),
    r"at least two .* got dense\(3, 2\), which is one": lambda: dfa(fnn.dense(3, 2), LABELS),
    "one block: .* does not see inside": lambda: dfa(fnn.residual(NET), LABELS),
    "Known: error, sign, targets": lambda: dfa(NET, LABELS, signal="noise"),
    "hidden block 0 puts out .4, 3, 5., but its error is .4, 5.": dfa_call,
    "relu, which is one block": lambda: ff(fnn.activations.relu, LABELS),
    "written into the input; l2_loss takes numbers": lambda: ff(NET, losses.l2_loss),
    "takes bits": lambda: ff(NET, losses.sigmoid_binary_cross_entropy),
    "takes signs. Take `softmax_cross_entropy`": lambda: ff(NET, losses.hinge_loss),
    "`threshold` must be a finite number above 0": lambda: ff(NET, LABELS, threshold=0.0),
    "Known: softmax, goodness": lambda: ff(NET, LABELS, predict="votes"),
    "shape .5, 2., expected .* at least 3": lambda: ff_call(fnn.mlp((2, 4, 3)), (5, 2)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_loss_of_ones_own_says_that_its_targets_are_labels():
    own = fnn.Loss("own", LABELS.value, LABELS.grad, targets="labels")
    assert ff(NET, own).name == "forward_forward"


NEED_A_DERIVATIVE = (
    rules.backprop,
    rules.autodiff,
    rules.per_example_sgd,
    rules.private_sgd,
    rules.feedback_alignment,
    rules.direct_feedback_alignment,
    rules.forward_forward,
    rules.target_propagation,
    rules.forward_gradient,
    rules.node_perturbation,
)


@pytest.mark.parametrize("rule", NEED_A_DERIVATIVE, ids=lambda r: r.__name__)
def test_a_step_activation_is_warned_of_by_rules_that_need_a_derivative(rule):
    inner = fnn.repeat(fnn.serial(fnn.dense(3, 3), fnn.activations.step), 2)
    net = fnn.serial(inner, fnn.dense(3, 2))
    message = f"{rule.__name__}: the derivative of `step` is 0 everywhere"
    with pytest.warns(UserWarning, match=message) as found:
        rule(net, LABELS)
    assert found[0].filename == __file__  # the line of the user
