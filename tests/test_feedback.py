"""Feedback alignment, direct feedback alignment and forward-forward.

Against their formulas written out in NumPy.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, wide

import fnn
from fnn import losses, rules
from fnn.nets.blocks import blocks
from fnn.rules.forward_forward import wrong_labels

LABELS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(3)
INNER = fnn.serial(fnn.dense(5, 5), fnn.activations.tanh)
CHAIN = [
    fnn.dense(6, 5),
    fnn.activations.tanh,
    *(fnn.dense(5, 5), fnn.activations.tanh) * 2,
    fnn.dense(5, 3),
]
NETS = {
    "mlp": fnn.mlp((6, 5, 5, 5, 3), "tanh"),
    "flat serial": fnn.serial(*CHAIN),
    "repeat": fnn.serial(
        fnn.dense(6, 5), fnn.activations.tanh, fnn.repeat(INNER, 2), fnn.dense(5, 3)
    ),
}
RULES = {
    **{
        f"fa {name}": (lambda net, name=name: rules.feedback_alignment(net, LABELS, feedback=name))
        for name in rules.FEEDBACKS
    },
    **{
        f"dfa {s}": (lambda net, s=s: rules.direct_feedback_alignment(net, LABELS, signal=s))
        for s in ("error", "sign", "targets")
    },
    "forward_forward": lambda net: rules.forward_forward(net, LABELS),
}


def batch(rows=7, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows, 6)), dtype), jnp.asarray(
        rng.integers(0, 3, rows), jnp.int32
    )


def weights_of(rng, sizes=(6, 5, 5, 5, 3)):
    return [
        (rng.normal(size=(m, n)) / np.sqrt(m), 0.1 * rng.normal(size=n))
        for m, n in itertools.pairwise(sizes)
    ]


def tree(net, layers):
    """The params of a net from a list of `(w, b)`, one for each block."""
    dense = [fnn.nets.layers.Dense(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    chain = blocks(net)
    return chain.join(
        [
            (d, *((),) * (len(block.layers) - 1))
            for d, block in zip(dense, chain.layers, strict=True)
        ]
    )


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


def backward(layers, matrices, x, t, signals=None):
    """The gradients of every layer, the error carried by matrices.

    Or every layer's own error given in `signals`.
    """
    hs, m = forward(layers, x), len(t)
    dz = (softmax(hs[-1]) - np.eye(3)[t]) / m
    grads = []
    for i in reversed(range(len(layers))):
        if i < len(layers) - 1:
            da = dz @ matrices[i + 1].T if signals is None else signals[i]
            dz = da * (1 - hs[i + 1] ** 2)
        grads.insert(0, (hs[i].T @ dz, dz.sum(0)))
    return grads


# Feedback alignment


@pytest.mark.parametrize("name", NETS)
def test_feedback_alignment_is_its_formula_and_with_the_weights_backprop(x64, name):
    net, rng, (x, t) = NETS[name], np.random.default_rng(1), batch()
    layers, others = weights_of(rng), weights_of(rng)
    rule = rules.feedback_alignment(net, LABELS)
    params, matrices = tree(net, layers), tree(net, others)
    value, grads, state = run(rule, params, matrices, x, t)
    assert (
        error(wide(grads), wide(tree(net, backward(layers, [w for w, _ in others], x, t)))) < 1e-12
    )
    true_value, true = fnn.value_and_grad(net, LABELS)(params, x, t)
    assert error(wide(run(rule, params, params, x, t)[1]), wide(true)) < 1e-12
    assert abs(float(value - true_value)) < 1e-12
    assert error(wide(state), wide(matrices)) == 0


@pytest.mark.parametrize("magnitude", ["uniform", "fixed", "redrawn"])
def test_sign_symmetric_feedback_has_the_signs_of_the_weights_and_sizes_of_its_own(x64, magnitude):
    net = NETS["mlp"]
    params = tree(net, weights_of(np.random.default_rng(2)))
    kind = rules.sign_symmetric(magnitude)
    state = kind.init(net, KEY, params)
    x, _ = batch()
    first, after = kind.step(net, state, params, x)
    again, _ = kind.step(net, after, params, x)
    for w, b, c in zip(*(jax.tree.leaves(tree) for tree in (params, first, again)), strict=True):
        if w.ndim > 1:
            np.testing.assert_array_equal(np.sign(b), np.sign(w))
            assert (len(np.unique(np.abs(b))) == 1) == (magnitude == "uniform")
            assert bool((b == c).all()) == (magnitude != "redrawn")
    drawn = jax.tree.map(lambda p: p.astype(jnp.float64), net.init(KEY))
    if magnitude == "uniform":
        assert float(jnp.abs(first[0][0].w[0, 0])) == pytest.approx(
            float(jnp.sqrt((drawn[0][0].w ** 2).mean())), rel=1e-12
        )
    if magnitude == "fixed":
        np.testing.assert_array_equal(jnp.abs(first[0][0].w), jnp.abs(drawn[0][0].w))


def test_kolen_pollack_takes_the_steps_of_the_weights_and_the_difference_decays_at_the_rate(x64):
    """Against Kolen and Pollack's own two updates, with a decay in the optimiser."""
    net, (x, t), decay, rate = NETS["mlp"], batch(), 0.05, 0.3
    rule = rules.feedback_alignment(net, LABELS, feedback=rules.kolen_pollack(decay))
    params = tree(net, weights_of(np.random.default_rng(3)))
    state = rule.init(KEY, params)
    w, b = wide(params), wide(rule.matrices(params, state, x))
    start = [v - u for u, v in zip(w, b, strict=True)]
    step = jax.jit(rule.value_and_grad)
    for _ in range(20):
        _, grads, state = step(params, state, x, t)
        moved = [rate * g for g in wide(grads)]
        params = jax.tree.map(lambda p, g: (1 - decay) * p - rate * g, params, grads)
        w, b = ([(1 - decay) * a - m for a, m in zip(side, moved, strict=True)] for side in (w, b))
    assert error(wide(params), w) < 1e-12
    assert error(wide(rule.matrices(params, state, x)), b) < 1e-10
    assert (
        error([v - u for u, v in zip(w, b, strict=True)], [(1 - decay) ** 20 * d for d in start])
        < 1e-10
    )


def test_weight_mirror_takes_the_answers_to_noise(x64):
    net, decay, noise = NETS["mlp"], 0.2, 0.5
    layers, others = weights_of(np.random.default_rng(4)), weights_of(np.random.default_rng(5))
    params, matrices, (x, _) = tree(net, layers), tree(net, others), batch()
    kind = rules.weight_mirror(decay, noise)
    found, (kept, _) = kind.step(net, (matrices, KEY), params, x)
    keys = jax.random.split(jax.random.split(KEY)[1], 4)
    for i in range(1, 4):
        a = noise * np.asarray(jax.random.normal(keys[i], (7, 5)))
        expected = (1 - decay) * others[i][0] + decay / noise**2 * a.T @ (
            a @ layers[i][0] + layers[i][1]
        ) / 7
        block = found[i][0] if i < 3 else found[i]
        assert error([np.asarray(block.w)], [expected]) < 1e-12
    np.testing.assert_array_equal(found[0][0].w, matrices[0][0].w)
    assert error(wide(kept), wide(found)) == 0


@pytest.mark.parametrize(
    "between",
    [(), (fnn.layer_norm(5),), (fnn.rms_norm(5), fnn.activations.tanh)],
    ids=["relu", "layer", "rms"],
)
def test_weight_mirror_comes_to_the_weights_whatever_follows_them(between):
    net = fnn.serial(
        fnn.dense(6, 5),
        fnn.activations.relu,
        fnn.dense(5, 5),
        *between,
        fnn.activations.relu,
        fnn.dense(5, 3),
    )
    params = net.init(KEY)
    kind = rules.weight_mirror(0.01)
    state, x = kind.init(net, jax.random.key(9), params), jnp.ones((32, 6))
    angles = fnn.alignment.weight_angles(rules.feedback_alignment(net, LABELS, feedback=kind), net)
    before = angles(params, state, x, None)
    after = jax.lax.scan(
        lambda s, _: (kind.step(net, s, params, x)[1], None), state, None, length=800
    )[0]
    assert bool((before[1:] > 40).all())
    assert bool((angles(params, after, x, None)[1:] < 10).all())
    sizes = [
        float(jnp.linalg.norm(leaf))
        for leaf in jax.tree.leaves((after[0], params))
        if leaf.ndim == 2
    ]
    np.testing.assert_allclose(sizes[1:3], sizes[4:6], rtol=0.1)


# Direct feedback alignment


@pytest.mark.parametrize("signal", ["error", "sign", "targets"])
@pytest.mark.parametrize("name", NETS)
def test_direct_feedback_alignment_is_its_formula(x64, name, signal):
    net, rng, (x, t) = NETS[name], np.random.default_rng(6), batch()
    layers = weights_of(rng)
    rule = rules.direct_feedback_alignment(net, LABELS, signal=signal)
    state = tuple(jnp.asarray(rng.normal(size=(3, 5))) for _ in range(3))
    e = softmax(forward(layers, x)[-1]) - np.eye(3)[t]
    told = {"error": e, "sign": np.sign(e), "targets": -np.eye(3)[t]}[signal] / len(t)
    expected = backward(layers, None, x, t, [told @ np.asarray(b) for b in state])
    assert (
        error(wide(run(rule, tree(net, layers), state, x, t)[1]), wide(tree(net, expected))) < 1e-12
    )


def test_direct_feedback_alignment_of_one_hidden_layer_with_its_weights_is_backprop(x64):
    net, (x, t) = fnn.mlp((6, 5, 3), "tanh"), batch()
    params = cast(net.init(KEY), jnp.float64)
    rule = rules.direct_feedback_alignment(net, LABELS)
    grads = run(rule, params, (params[-1].w.T,), x, t)[1]
    assert error(wide(grads), wide(fnn.value_and_grad(net, LABELS)(params, x, t)[1])) < 1e-12


def test_targets_may_be_real(x64):
    net, (x, _) = fnn.mlp((6, 5, 3), "tanh"), batch()
    rule = rules.direct_feedback_alignment(net, losses.l2_loss, signal="targets")
    params, targets = cast(net.init(KEY), jnp.float64), jnp.ones((7, 3))
    state = (jnp.ones((3, 5)),)
    h = np.tanh(np.asarray(x) @ np.asarray(params[0][0].w))
    expected = np.asarray(x).T @ (-3 / 7 * (1 - h**2))
    assert error([np.asarray(run(rule, params, state, x, targets)[1][0][0].w)], [expected]) < 1e-12


# Forward-forward


@pytest.mark.parametrize("name", NETS)
def test_forward_forward_is_its_formula_and_the_gradient_of_the_goodness_loss(x64, name):
    net, (x, t) = NETS[name], batch()
    layers = weights_of(np.random.default_rng(7))
    params = tree(net, layers)
    rule = rules.forward_forward(net, LABELS, threshold=0.5, amplitude=2.0)
    value, grads, _ = run(rule, params, KEY, x, t)
    labels = np.asarray(t)
    wrong = np.asarray(wrong_labels(jax.random.split(KEY)[1], t, 3))
    assert (wrong != labels).all()
    sets = [
        np.concatenate([label, np.asarray(x)[:, 3:]], 1)
        for label in (2 * np.eye(3)[labels], 2 * np.eye(3)[wrong], np.full((7, 3), 2 / 3))
    ]
    expected = []
    for i, (w, b) in enumerate(layers[:-1]):
        inputs = [h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-8) if i else h for h in sets]
        sets = [np.tanh(a @ w + b) for a in inputs]

        def goodness_loss(p, inputs=inputs[:2]):
            good, bad = ((jnp.tanh(a @ p[0] + p[1][None]) ** 2).sum(1) - 0.5 * 5 for a in inputs)
            return (jax.nn.softplus(-good) + jax.nn.softplus(bad)).mean()

        by_jax = jax.grad(goodness_loss)((jnp.asarray(w), jnp.asarray(b)))
        over = [(h**2).sum(1, keepdims=True) - 0.5 * 5 for h in sets[:2]]
        slopes = [-1 / (1 + np.exp(over[0])), 1 / (1 + np.exp(-over[1]))]
        dzs = [2 * h * s / 7 * (1 - h**2) for h, s in zip(sets, slopes, strict=False)]
        expected.append(
            (
                sum(a.T @ dz for a, dz in zip(inputs, dzs, strict=False)),
                sum(dz.sum(0) for dz in dzs),
            )
        )
        assert error(wide(by_jax), list(expected[-1])) < 1e-12
    h = sets[2] / np.sqrt((sets[2] ** 2).mean(1, keepdims=True) + 1e-8)
    z = h @ layers[-1][0] + layers[-1][1]
    dz = (softmax(z) - np.eye(3)[labels]) / 7
    expected.append((h.T @ dz, dz.sum(0)))
    assert error(wide(grads), wide(tree(net, expected))) < 1e-12
    assert abs(float(value) + np.log(softmax(z)[np.arange(7), labels]).mean()) < 1e-12
    assert error(wide(rule.predict(params, x)), [z]) < 1e-12


def test_prediction_by_goodness_sums_it_over_all_but_the_first_hidden_layer(x64):
    net, (x, _) = NETS["mlp"], batch()
    layers = weights_of(np.random.default_rng(8))
    found = rules.forward_forward(net, LABELS, predict="goodness").predict(tree(net, layers), x)
    for label in range(3):
        h = np.concatenate([np.tile(np.eye(3)[label], (7, 1)), np.asarray(x)[:, 3:]], 1)
        goodness = []
        for i, (w, b) in enumerate(layers[:-1]):
            h = np.tanh((h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-8) if i else h) @ w + b)
            goodness.append((h**2).sum(1))
        np.testing.assert_allclose(found[:, label], sum(goodness[1:]), rtol=1e-12)


def test_a_wrong_label_is_never_the_right_one_and_every_other_one_comes_as_often():
    labels = jnp.arange(4000, dtype=jnp.int32) % 4
    wrong = wrong_labels(KEY, labels, 4)
    shift = np.bincount(np.asarray((wrong - labels) % 4), minlength=4)
    assert shift[0] == 0
    assert (np.abs(shift[1:] - 4000 / 3) < 5 * np.sqrt(4000 * 2 / 9)).all()


def test_one_hot_targets_and_labels_are_the_same_to_forward_forward(x64):
    net, (x, t) = NETS["mlp"], batch()
    params = cast(net.init(KEY), jnp.float64)
    one_hot = rules.forward_forward(net, losses.softmax_cross_entropy)
    ours = run(one_hot, params, KEY, x, jnp.eye(3)[t])
    theirs = run(rules.forward_forward(net, LABELS), params, KEY, x, t)
    assert error(wide(ours[:2]), wide(theirs[:2])) < 1e-12


# All of them


@pytest.mark.parametrize("name", RULES)
def test_padding_does_not_count_and_equal_weights_are_none(x64, name):
    rule, (x, t) = RULES[name](NETS["mlp"]), batch()
    params = cast(NETS["mlp"].init(KEY), jnp.float64)
    state = rule.init(KEY, params)
    step = jax.jit(rule.value_and_grad)
    padding = jnp.array([1.0, 1, 1, 1, 1, 0, 0])
    found = [step(params, state, x.at[5:].set(content), t, padding) for content in (0.0, 1e3)]
    assert error(wide(found[0][:2]), wide(found[1][:2])) < 1e-12
    assert (
        error(
            wide(step(params, state, x, t)[:2]),
            wide(step(params, state, x, t, jnp.full(7, 2.0))[:2]),
        )
        < 1e-12
    )


@pytest.mark.parametrize("name", RULES)
def test_dtypes_are_kept_and_edges_are_finite(name):
    net = fnn.mlp((6, 1, 3))
    rule = RULES[name](net)
    params = net.init(KEY)
    x, t = batch(1, jnp.float32)
    step = jax.jit(rule.value_and_grad)
    for p in (params, jax.tree.map(jnp.zeros_like, params)):
        value, grads, _ = step(p, rule.init(KEY, p), x, t)
        assert all(
            bool(jnp.isfinite(g).all()) and g.dtype == jnp.float32 and not g.weak_type
            for g in jax.tree.leaves((value, grads))
        )
        assert jax.tree.structure(grads) == jax.tree.structure(p)
    narrow = cast(params, jnp.bfloat16)
    _, grads, state = step(narrow, rule.init(KEY, narrow), x.astype(jnp.bfloat16), t)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype, rule.init(KEY, narrow), state)
    )


NUMPY_SETTINGS = {
    "kolen_pollack": lambda net: rules.feedback_alignment(
        net, LABELS, feedback=rules.kolen_pollack(np.float64(0.01))
    ),
    "weight_mirror": lambda net: rules.feedback_alignment(
        net, LABELS, feedback=rules.weight_mirror(np.float64(0.01), np.float64(1.0))
    ),
    "forward_forward": lambda net: rules.forward_forward(
        net, LABELS, threshold=np.float64(1.0), amplitude=np.float64(1.0)
    ),
    "forward_gradient": lambda net: rules.forward_gradient(net, LABELS, tangents=np.int64(2)),
}


@pytest.mark.parametrize("name", NUMPY_SETTINGS)
def test_settings_may_be_numpy_numbers_and_widen_nothing(x64, name):
    """They come out of `np.logspace`."""
    net = NETS["mlp"]
    rule, params = NUMPY_SETTINGS[name](net), cast(net.init(KEY), jnp.float32)
    state = rule.init(KEY, params)
    _, grads, after = jax.jit(rule.value_and_grad)(params, state, *batch(dtype=jnp.float32))
    dtypes = [jax.tree.map(lambda a: a.dtype, tree) for tree in (params, grads, state, after)]
    assert dtypes[0] == dtypes[1]
    assert dtypes[2] == dtypes[3]


@pytest.mark.parametrize("name", RULES)
def test_a_few_epochs_teach(name):
    rng = np.random.default_rng(0)
    t = np.arange(60) % 3
    x = (np.eye(3)[t] @ rng.normal(size=(3, 6)) * 2 + 0.5 * rng.normal(size=(60, 6))).astype(
        np.float32
    )
    x = np.pad(x, ((0, 0), (3, 0)))
    net = fnn.mlp((9, 12, 12, 3), "tanh")
    rule = RULES[name](net)
    params = jax.jit(net.init)(KEY)
    params, history = fnn.fit(
        rule, optax.adam(0.01), params, (x, t), epochs=40, batch_size=20, key=KEY, validation=(x, t)
    )
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert history.validation["accuracy"][-1] > 0.9


def other_sizes():
    """Feedback drawn for another net."""
    rule = rules.feedback_alignment(
        NETS["mlp"], LABELS, feedback=rules.random_feedback(fnn.mlp((6, 3)).init)
    )
    return rule.init(KEY, NETS["mlp"].init(KEY))


BAD = [
    (other_sizes, ValueError, "`draw` must return a tree like the params"),
    (
        lambda: rules.feedback_alignment(NETS["mlp"], LABELS, feedback="random"),
        ValueError,
        "Unknown feedback 'random'. Known: fixed, sign",
    ),
    (
        lambda: rules.feedback_alignment(NETS["mlp"], LABELS, feedback=3),
        TypeError,
        "must be one of fixed, .* or a `Feedback`, got 3",
    ),
    (lambda: rules.sign_symmetric("big"), ValueError, "uniform"),
    (lambda: rules.kolen_pollack(0.0), ValueError, "`decay` must be a finite number above 0"),
    (lambda: rules.kolen_pollack(1.5), ValueError, "`decay` must be at most 1"),
    (lambda: rules.weight_mirror(0.1, -1.0), ValueError, "`noise` must be a finite number above 0"),
    (
        lambda: rules.direct_feedback_alignment(fnn.dense(3, 2), LABELS),
        ValueError,
        r"at least two .* got dense\(3, 2\), which is one",
    ),
    (
        lambda: rules.direct_feedback_alignment(fnn.residual(NETS["mlp"]), LABELS),
        ValueError,
        "which is one block: .* does not see inside",
    ),
    (
        lambda: rules.direct_feedback_alignment(NETS["mlp"], LABELS, signal="noise"),
        ValueError,
        "error",
    ),
    (
        lambda: rules.direct_feedback_alignment(NETS["mlp"], LABELS, feedback_init=3),
        TypeError,
        "`feedback_init` must be a function",
    ),
    (
        lambda: rules.forward_forward(fnn.activations.relu, LABELS),
        ValueError,
        "relu, which is one block",
    ),
    (
        lambda: rules.forward_forward(NETS["mlp"], losses.l2_loss),
        ValueError,
        "`loss` of forward_forward must be one for one class per",
    ),
    (
        lambda: rules.forward_forward(NETS["mlp"], losses.sigmoid_binary_cross_entropy),
        ValueError,
        "must be one for one class per example",
    ),
    (
        lambda: rules.forward_forward(NETS["mlp"], losses.hinge_loss),
        ValueError,
        "Take `softmax_cross_entropy`",
    ),
    (
        lambda: mirror(fnn.residual(INNER)),
        ValueError,
        r"block 1 must begin with a dense layer, .* got residual",
    ),
    (
        lambda: rules.forward_forward(NETS["mlp"], LABELS, threshold=0.0),
        ValueError,
        "`threshold` must be a finite number above 0",
    ),
    (lambda: rules.forward_forward(NETS["mlp"], LABELS, predict="votes"), ValueError, "softmax"),
    (
        lambda: ff_call(fnn.mlp((2, 4, 3)), (5, 2)),
        ValueError,
        r"`x` has shape \(5, 2\), expected \[batch, features\] with at least 3",
    ),
    (
        lambda: ff_call(fnn.mlp((2, 4, 1)), (5, 2)),
        ValueError,
        "`net` has one output; negative examples need a second class",
    ),
    (
        lambda: dfa_call(),
        ValueError,
        r"hidden block 0 puts out \(4, 3, 5\), but the error sent to it is \(4, 5\)",
    ),
]


def mirror(second):
    net = fnn.serial(fnn.dense(6, 5), second, fnn.dense(5, 3))
    return rules.feedback_alignment(net, LABELS, feedback="weight_mirror").init(KEY, net.init(KEY))


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
    return rule.value_and_grad(
        params, rule.init(KEY, params), jnp.ones((4, 3, 6)), jnp.zeros(4, jnp.int32)
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD]
)
def test_bad_input_is_a_clear_error(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


GRADIENT_RULES = (
    rules.backprop,
    rules.autodiff,
    rules.per_example_sgd,
    rules.private_sgd,
    rules.feedback_alignment,
    rules.direct_feedback_alignment,
    rules.forward_forward,
    rules.target_propagation,
)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=lambda r: r.__name__)
def test_a_step_activation_is_warned_of_by_rules_that_need_a_derivative(rule):
    net = fnn.serial(
        fnn.repeat(fnn.serial(fnn.dense(3, 3), fnn.activations.step), 2), fnn.dense(3, 2)
    )
    with pytest.warns(
        UserWarning,
        match=f"{rule.__name__}: the derivative of `step` is 0 everywhere, so that nothing before it will be learned",
    ):
        rule(net, LABELS)
