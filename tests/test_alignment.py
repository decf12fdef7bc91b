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
    x, t = rng.normal(size=(rows, 6)), rng.integers(0, 3, rows)
    return jnp.asarray(x, dtype), jnp.asarray(t, jnp.int32)


def wide_params():
    return cast(NET.init(KEY), jnp.float64)


def angle(a, b):
    """In degrees, of two arrays in float64, by the arctangent."""
    a, b = (np.ravel(v).astype(np.float64) / np.linalg.norm(v) for v in (a, b))
    return np.degrees(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def vectors(tree):
    """One vector for every layer."""
    return [np.concatenate([np.ravel(a) for a in jax.tree.leaves(layer)]) for layer in tree]


# Two trees


def test_cosine_angle_and_ratio_are_those_of_the_vectors(x64):
    ours, true = (cast(NET.init(jax.random.key(i)), jnp.float64) for i in (1, 2))
    found = alignment.compare(NET, ours, true)
    ours, true = (vectors(tree) for tree in (ours, true))
    pairs = list(zip(ours, true, strict=True))
    expected = [
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs],
        [angle(a, b) for a, b in pairs],
        [np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs],
    ]
    for measured, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(measured, values, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.1, 90.0, 179.9, 179.999, 180.0])
def test_angles_keep_their_digits_near_0_and_180_in_float32(degrees):
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(12, 2)))
    radians = np.radians(degrees)
    a, b = q[:, 0], np.cos(radians) * q[:, 0] + np.sin(radians) * q[:, 1]
    net = fnn.dense(3, 4, bias_init=None)
    trees = [net.init(KEY)._replace(w=jnp.asarray(v, jnp.float32).reshape(3, 4)) for v in (a, b)]
    found = alignment.compare(net, *trees)
    assert float(found.angle[0]) == pytest.approx(degrees, abs=2e-5)


def test_equal_and_opposite_trees_have_angles_of_exactly_0_and_180():
    for seed in range(20):
        params = NET.init(jax.random.key(seed))
        opposite = jax.tree.map(lambda p: -3 * p, params)
        np.testing.assert_array_equal(alignment.compare(NET, params, params).angle, [0, 0, 0])
        np.testing.assert_allclose(alignment.compare(NET, params, opposite).angle, 180, rtol=1e-6)


def test_an_angle_with_zeros_is_nan():
    zeros = jax.tree.map(jnp.zeros_like, NET.init(KEY))
    assert bool(jnp.isnan(alignment.compare(NET, zeros, NET.init(KEY)).angle).all())


# Records


def test_update_alignment_compares_the_rule_with_the_true_gradient(x64):
    params, (x, t), weights = wide_params(), data(dtype=jnp.float64), jnp.arange(8.0)
    state = RULE.init(jax.random.key(1), params)
    found = alignment.update_alignment(RULE, NET)(params, state, x, t, weights)
    ours = RULE.value_and_grad(params, state, x, t, weights)[1]
    true = fnn.value_and_grad(NET, LABELS)(params, x, t, weights)[1]
    expected = alignment.compare(NET, ours, true)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)
    assert float(found.angle[2]) < 1e-10  # the last layer learns by the true gradient
    assert bool((found.angle[:2] > 5).all())


def test_update_alignment_ignores_rows_of_weight_0_whatever_they_hold(x64):
    params, (x, t) = wide_params(), data(dtype=jnp.float64)
    state = RULE.init(jax.random.key(1), params)
    record = jax.jit(alignment.update_alignment(RULE, NET))
    few = record(params, state, x[:6], t[:6])
    padded = record(params, state, x.at[6:].set(jnp.nan), t, (jnp.arange(8) < 6).astype(float))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), padded, few)


@pytest.mark.parametrize("predict", ["softmax", "goodness"])
def test_forward_forward_is_measured_by_the_gradient_of_what_it_predicts(x64, predict):
    rule = rules.forward_forward(NET, LABELS, predict=predict)
    params, (x, t), weights = wide_params(), data(dtype=jnp.float64), jnp.arange(8.0)

    def mean(params):
        return (LABELS.value(rule.predict(params, x), t) * weights).sum() / weights.sum()

    @jax.jit
    def all_of(params):
        ours = rule.value_and_grad(params, KEY, x, t, weights)[1]
        found = alignment.update_alignment(rule, NET)(params, KEY, x, t, weights)
        return ours, jax.grad(mean)(params), found

    ours, true, found = all_of(params)
    pairs = zip(vectors(ours)[:2], vectors(true)[:2], strict=True)
    np.testing.assert_allclose(found.angle[:2], [angle(a, b) for a, b in pairs], rtol=1e-9)
    if predict == "softmax":
        assert float(found.angle[2]) < 1e-6  # its last block learns by the true gradient


def test_weight_angles_are_those_of_weights_and_feedback(x64):
    params = wide_params()
    state = RULE.init(jax.random.key(1), params)
    found = alignment.weight_angles(RULE, NET)(params, state, *data())
    matrices = [(p[0].w, b[0].w) for p, b in zip(params[:2], state[:2], strict=True)]
    expected = [angle(a, b) for a, b in [*matrices, (params[2].w, state[2].w)]]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("rule", [RULE, DFA], ids=str)
def test_delta_angles_are_means_over_the_examples(x64, rule):
    params, (x, t) = wide_params(), data(dtype=jnp.float64)
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
    for i, (ours, true) in enumerate([(ours1, true1), (ours2, true2)]):
        angles = [angle(a, b) for a, b in zip(ours, true, strict=True)]
        np.testing.assert_allclose(found[i], np.average(angles, weights=weights), rtol=1e-9)
    assert float(found[2]) < 1e-5


BLOCK = fnn.serial(fnn.dense(4, 4), fnn.activations.tanh)
TABLE, LAST = fnn.embedding(5, 4), fnn.dense(4, 3)


@pytest.mark.parametrize(
    ("middle", "layers"),
    [(BLOCK, 3), (fnn.repeat(BLOCK, 2), 4), (fnn.residual(fnn.repeat(BLOCK, 2)), 3)],
    ids=["embedding", "repeat", "repeat inside a residual"],
)
def test_delta_angles_of_every_kind_of_block(middle, layers):
    net = fnn.serial(TABLE, middle, LAST)
    rule = rules.feedback_alignment(net, LABELS)
    params, x, t = net.init(KEY), jnp.array([0, 1]), jnp.array([2, 0])
    record = jax.jit(alignment.delta_angles(rule, net))
    state = rule.init(jax.random.key(1), params)
    found = record(params, state, x, t)
    assert found.shape == (layers,)
    assert bool((found[:-1] > 5).all())
    assert float(found[-1]) < 1e-3
    np.testing.assert_allclose(record(params, params, x, t), 0, atol=1e-3)
    one_by_one = [record(params, state, x[i : i + 1], t[i : i + 1]) for i in (0, 1)]
    np.testing.assert_allclose(found, sum(one_by_one) / 2, atol=1e-3)


def test_examples_with_a_delta_of_0_do_not_count():
    net = fnn.mlp((2, 3, 2), "relu")
    rule = rules.feedback_alignment(net, losses.l2_loss)
    params = net.init(KEY)
    params = (params[0], params[1]._replace(b=jnp.ones(2)))
    state = rule.init(jax.random.key(1), params)
    x, t = jnp.array([[1.0, 2.0], [0.0, 0.0], [-2.0, 1.0]]), jnp.zeros((3, 2))
    record = jax.jit(alignment.delta_angles(rule, net))
    live = record(params, state, x[jnp.array([0, 2])], t[:2])
    np.testing.assert_allclose(record(params, state, x, t), live, rtol=1e-3, atol=1e-3)
    assert bool(jnp.isnan(record(params, state, x[1:2], t[:1])[0]))


def test_goodness_is_the_sum_of_squared_activities(x64):
    rule = rules.forward_forward(NET, LABELS, threshold=0.3)
    params, (x, t) = wide_params(), data(dtype=jnp.float64)
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


@pytest.mark.parametrize("weights", [None, jnp.array([1.0, 2, 0, 1, 1, 3, 1, 0])])
def test_gap_and_accuracy_are_weighted_means(x64, weights):
    rule = rules.forward_forward(NET, LABELS, threshold=0.3)
    params, (x, t) = wide_params(), data(dtype=jnp.float64)
    right, wrong, thresholds = (np.asarray(a) for a in rule.goodness(params, KEY, x, t))
    found = alignment.goodness(rule)(params, KEY, x, t, weights)
    limits = thresholds[:, None]
    sides = ((right > limits).astype(float) + (wrong < limits)) / 2
    for values, expected in ((found.gap, right - wrong), (found.accuracy, sides)):
        np.testing.assert_allclose(values, np.average(expected, 1, weights), rtol=1e-6)


# What `fit` records


def record(params, state, x, targets, weights):
    return {"bias": params[-1].b, "rows": x.shape[0] + 0 * targets.sum()}


def train(data, **settings):
    settings = {"epochs": 2, "batch_size": 4, "key": KEY} | settings
    return fnn.fit(RULE, optax.sgd(0.1), NET.init(KEY), data, **settings)


def test_fit_records_before_every_so_manyeth_step_of_an_epoch_and_trains_the_same():
    plain_params, plain = train(data(12))
    params, history = train(data(12), record=record, record_every=2)
    assert plain.records == ()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, plain_params))
    assert history.records["bias"].shape == (4, 3)  # steps 0 and 2 of two epochs
    assert bool((history.records["bias"][0] == 0).all())
    _, every = train(data(12), record=record)
    steps = every.records["bias"][jnp.array([0, 2, 3, 5])]
    np.testing.assert_array_equal(steps, history.records["bias"])


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
    assert bool((history.records.angle[:, 2] < 1e-4).all())


PLAIN = rules.backprop(NET, LABELS)
BAD = {
    "`record` must be a function": (TypeError, lambda: train(data(12), record=3)),
    "`record_every` must be a whole number above 0, got 0": (
        ValueError,
        lambda: train(data(12), record=record, record_every=0),
    ),
    "`rule` must be one with `predict`, got 'backprop'": (
        TypeError,
        lambda: alignment.update_alignment("backprop", NET),
    ),
    "`net` must be a Layer, got 3": (TypeError, lambda: alignment.update_alignment(RULE, 3)),
    "`rule` must be one with `matrices`, got backprop": (
        TypeError,
        lambda: alignment.weight_angles(PLAIN, NET),
    ),
    "`rule` must be one with `matrices`, got direct_feedback_alignment": (
        TypeError,
        lambda: alignment.weight_angles(DFA, NET),
    ),
    "`rule` must be one with `signals`, got backprop": (
        TypeError,
        lambda: alignment.delta_angles(PLAIN, NET),
    ),
    "`rule` must be one with `goodness`": (TypeError, lambda: alignment.goodness(RULE)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_clear_error(message):
    kind, call = BAD[message]
    with pytest.raises(kind, match=message):
        call()
