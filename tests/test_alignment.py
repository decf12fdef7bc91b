"""Angles between a rule and the true gradient, and what `fit` records on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast

import fnn
from fnn import alignment, losses, rules

LABELS = losses.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key(0)
NET = fnn.mlp((6, 5, 4, 3), "tanh")
RULE = rules.feedback_alignment(NET, LABELS)
DFA = rules.direct_feedback_alignment(NET, LABELS)


def data(rows=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(rows, 6)), dtype), jnp.asarray(
        rng.integers(0, 3, rows), jnp.int32
    )


def angle(a, b):
    """In degrees; by the arctangent, which no rounding takes out of its domain (an arccosine of 1 +
    1 ulp is NaN)."""
    a, b = (np.asarray(v, np.float64).ravel() / np.linalg.norm(v) for v in (a, b))
    return np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def test_update_alignment_is_that_of_the_vectors_layer_by_layer(x64):
    params, (x, t) = cast(NET.init(KEY), jnp.float64), data(dtype=jnp.float64)
    state = RULE.init(jax.random.key(1), params)
    found = alignment.update_alignment(RULE, NET)(params, state, x, t)
    ours, true = (
        RULE.value_and_grad(params, state, x, t)[1],
        fnn.value_and_grad(NET, LABELS)(params, x, t)[1],
    )
    flat = [
        [np.concatenate([np.ravel(a) for a in jax.tree.leaves(layer)]) for layer in tree]
        for tree in (ours, true)
    ]
    np.testing.assert_allclose(
        found.angle[:2], [angle(a, b) for a, b in zip(*flat, strict=True)][:2], rtol=1e-9
    )
    # the last layer's gradient is the true one
    assert float(found.cosine[2]) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(
        found.ratio,
        [np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*flat, strict=True)],
        rtol=1e-12,
    )
    assert float(found.angle_of_all) == pytest.approx(
        angle(*(np.concatenate(side) for side in flat)), rel=1e-9
    )
    assert found.ratio_of_all.dtype == jnp.float64


@pytest.mark.parametrize("predict", ["softmax", "goodness"])
def test_forward_forward_is_measured_by_the_gradient_of_what_it_predicts(x64, predict):
    rule = rules.forward_forward(NET, LABELS, predict=predict)
    params, (x, t) = cast(NET.init(KEY), jnp.float64), data(dtype=jnp.float64)
    weights = jnp.arange(8.0)
    true = jax.grad(
        lambda p: (LABELS.value(rule.predict(p, x), t) * weights).sum() / weights.sum()
    )(params)
    ours = rule.value_and_grad(params, KEY, x, t, weights)[1]
    found = alignment.update_alignment(rule, NET)(params, KEY, x, t, weights)
    flat = [
        [np.concatenate([np.ravel(a) for a in jax.tree.leaves(layer)]) for layer in tree]
        for tree in (ours, true)
    ]
    expected = [angle(a, b) for a, b in list(zip(*flat, strict=True))[:2]]
    np.testing.assert_allclose(found.angle[:2], expected, rtol=1e-9)
    if predict == "softmax":
        # its last block learns by the true gradient
        assert float(found.cosine[2]) == pytest.approx(1, abs=1e-12)


def test_delta_angles_of_a_net_that_begins_with_an_embedding():
    net = fnn.serial(fnn.embedding(5, 4), fnn.dense(4, 4), fnn.activations.tanh, fnn.dense(4, 3))
    rule = rules.feedback_alignment(net, LABELS)
    params, x, t = net.init(KEY), jnp.array([0, 1, 2, 4]), jnp.array([0, 1, 2, 0])
    found = alignment.delta_angles(rule, net)(params, rule.init(jax.random.key(1), params), x, t)
    assert found.shape == (3,)
    assert bool((found[:2] > 5).all())
    assert float(found[2]) < 0.1
    assert bool((alignment.delta_angles(rule, net)(params, params, x, t) < 0.1).all())


def test_an_angle_with_zeros_is_nan():
    zeros = jax.tree.map(jnp.zeros_like, NET.init(KEY))
    assert bool(jnp.isnan(alignment.compare(NET, zeros, NET.init(KEY)).angle).all())


def test_weight_angles_are_those_of_weights_and_feedback(x64):
    params = cast(NET.init(KEY), jnp.float64)
    state = RULE.init(jax.random.key(1), params)
    found = alignment.weight_angles(RULE, NET)(params, state, *data())
    pairs = [
        (params[0][0].w, state[0][0].w),
        (params[1][0].w, state[1][0].w),
        (params[2].w, state[2].w),
    ]
    np.testing.assert_allclose(found, [angle(a, b) for a, b in pairs], rtol=1e-9)


@pytest.mark.parametrize("rule", [RULE, DFA], ids=str)
def test_delta_angles_are_means_over_the_examples(x64, rule):
    params, (x, t) = cast(NET.init(KEY), jnp.float64), data(dtype=jnp.float64)
    state = rule.init(jax.random.key(1), params)
    weights = jnp.array([1.0, 2, 0, 1, 1, 1, 1, 0])
    found = alignment.delta_angles(rule, NET)(params, state, x, t, weights)
    hs = [np.asarray(x)]
    for block in params[:-1]:
        hs.append(np.tanh(hs[-1] @ np.asarray(block[0].w) + np.asarray(block[0].b)))
    z = hs[-1] @ np.asarray(params[-1].w) + np.asarray(params[-1].b)
    e = np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[t]
    true2 = e @ np.asarray(params[2].w).T * (1 - hs[2] ** 2)
    true1 = true2 @ np.asarray(params[1][0].w).T * (1 - hs[1] ** 2)
    if rule is DFA:
        ours1, ours2 = (e @ np.asarray(b) * (1 - h**2) for b, h in zip(state, hs[1:], strict=True))
    else:
        ours2 = e @ np.asarray(state[2].w).T * (1 - hs[2] ** 2)
        ours1 = ours2 @ np.asarray(state[1][0].w).T * (1 - hs[1] ** 2)
    expected = [
        np.average([angle(a, b) for a, b in zip(*pair, strict=True)], weights=weights)
        for pair in ((ours1, true1), (ours2, true2))
    ]
    np.testing.assert_allclose(found[:2], expected, rtol=1e-9)
    assert float(found[2]) < 1e-5


def test_goodness_gap_and_accuracy(x64):
    rule = rules.forward_forward(NET, LABELS, threshold=0.3)
    params, (x, t) = cast(NET.init(KEY), jnp.float64), data(dtype=jnp.float64)
    right, wrong, thresholds = rule.goodness(params, KEY, x, t)
    np.testing.assert_allclose(thresholds, [1.5, 1.2])
    # the right label over the first three features
    sums, h = [], np.concatenate([np.eye(3)[t], x[:, 3:]], axis=1)
    for block in params[:2]:
        h = np.tanh(h @ np.asarray(block[0].w) + np.asarray(block[0].b))
        sums.append((h**2).sum(1))
        h = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-8)
    np.testing.assert_allclose(right, sums, rtol=1e-6)
    assert not np.allclose(wrong, sums, rtol=1e-2)
    found = alignment.goodness(rule)(params, KEY, x, t)
    np.testing.assert_allclose(found.gap, (right - wrong).mean(1), rtol=1e-12)
    sides = [
        np.mean([*(r > th), *(w < th)])
        for r, w, th in zip(np.asarray(right), np.asarray(wrong), thresholds, strict=True)
    ]
    np.testing.assert_allclose(found.accuracy, sides)


# What `fit` records


def record(params, state, x, targets, weights):
    return {"bias": params[-1].b, "rows": x.shape[0] + 0 * targets.sum()}


def train(data, **settings):
    return fnn.fit(
        RULE, optax.sgd(0.1), NET.init(KEY), data, epochs=2, batch_size=4, key=KEY, **settings
    )


def test_fit_records_before_every_so_manyeth_step_of_an_epoch_and_trains_the_same():
    plain_params, plain = train(data(12))
    params, history = train(data(12), record=record, record_every=2)
    assert plain.records == ()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, plain_params))
    assert history.records["bias"].shape == (4, 3)  # steps 0 and 2 of two epochs
    assert bool((history.records["bias"][0] == 0).all())
    _, each = train(data(12), record=record)
    np.testing.assert_array_equal(
        each.records["bias"][::2][jnp.array([0, 1])], history.records["bias"][:2]
    )
    np.testing.assert_array_equal(
        each.records["bias"][jnp.array([3, 5])], history.records["bias"][2:]
    )


def test_batches_of_an_iterable_are_recorded_alike():
    x, t = data(12)
    batches = [(x[i : i + 4], t[i : i + 4]) for i in (0, 4, 8)]
    _, history = train(batches, record=record, record_every=2)
    assert history.records["bias"].shape == (4, 3)
    assert bool((history.records["bias"][0] == 0).all())
    assert not bool((history.records["bias"][1] == 0).all())


def test_an_alignment_is_recorded_inside_the_epoch():
    _, history = train(data(12), record=alignment.update_alignment(RULE, NET), record_every=3)
    assert history.records.angle.shape == (2, 3)
    assert bool((history.records.angle[:, 2] < 0.1).all())


BAD = [
    (lambda: train(data(12), record=3), TypeError, "`record` must be a function"),
    (
        lambda: train(data(12), record=record, record_every=0),
        ValueError,
        "`record_every` must be a whole number above 0, got 0",
    ),
    (
        lambda: alignment.update_alignment("backprop", NET),
        TypeError,
        "`rule` must be a Rule, got 'backprop'",
    ),
    (lambda: alignment.update_alignment(RULE, 3), TypeError, "`net` must be a Layer, got 3"),
    (
        lambda: alignment.weight_angles(rules.backprop(NET, LABELS), NET),
        TypeError,
        "`rule` must be a LocalRule, got backprop",
    ),
    (
        lambda: alignment.weight_angles(DFA, NET),
        TypeError,
        "must carry the error back through matrices like the weights",
    ),
    (
        lambda: alignment.delta_angles(rules.backprop(NET, LABELS), NET),
        TypeError,
        "`rule` must be a LocalRule",
    ),
    (lambda: alignment.goodness(RULE), TypeError, "`rule` must be a ForwardForward"),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD]
)
def test_bad_input_is_a_clear_error(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
