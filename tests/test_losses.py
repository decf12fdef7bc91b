"""Every loss against optax: values, gradients, shapes, extremes, dtypes, accuracy and settings."""

import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cast, error, targets_for, wide

import fnn
from fnn import losses
from fnn.nets.losses import LOSSES

LABELS = losses.softmax_cross_entropy_with_integer_labels
# these reduce the last axis themselves
ROWS = (LABELS, losses.softmax_cross_entropy, losses.kl_divergence)
ON_LOGITS = (losses.sigmoid_binary_cross_entropy, losses.softmax_cross_entropy, LABELS)
FLOATING = tuple(loss for loss in LOSSES if loss is not LABELS)
# batch, positions, one example, one output
SHAPES = ((7, 4), (3, 5, 4), (2, 3, 2, 3), (1, 3), (4, 1), (1, 1))
DTYPES = ("bfloat16", "float16", "float32", "float64")


def reference(loss, outputs, targets):
    """Optax's value, `[batch]`: what it leaves per element summed."""
    if loss.name == "binary_cross_entropy":  # lecture 004, eq 5
        values = -(targets * jnp.log(outputs) + (1 - targets) * jnp.log(1 - outputs))
    else:
        values = getattr(optax.losses, loss.name)(outputs, targets)
    return values.sum(tuple(range(1, values.ndim)))


def theirs(loss, outputs, targets):
    """Optax's value and the gradient of each example's own."""
    return reference(loss, outputs, targets), jax.grad(lambda y: reference(loss, y, targets).sum())(
        outputs
    )


def ours(loss, outputs, targets):
    return loss.value(outputs, targets), loss.grad(outputs, targets)


def outputs_for(loss, shape, rng):
    """Outputs that the loss takes, away from its kinks."""
    outputs = rng.normal(size=shape)
    if loss.name == "binary_cross_entropy":
        outputs = 1 / (1 + np.exp(-outputs))
    if loss.name == "kl_divergence":
        outputs = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    return jnp.asarray(outputs)


def batches(loss, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [(outputs_for(loss, shape, rng), targets_for(loss, shape, rng)) for shape in shapes]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_value_and_gradient_are_optaxs(x64, loss):
    @jax.jit
    def both(data):
        return [
            (ours(loss, *batch), theirs(loss, *batch), ours(loss, *cast(batch, jnp.float32)))
            for batch in data
        ]

    data = batches(loss, SHAPES if loss in ROWS else (*SHAPES, (5,)))
    for (y, _), (manual, automatic, short) in zip(data, both(data), strict=True):
        assert manual[0].shape == y.shape[:1]
        assert manual[1].shape == y.shape
        for mine, optaxs, narrow in zip(manual, automatic, short, strict=True):
            np.testing.assert_allclose(mine, optaxs, rtol=1e-12, atol=1e-12, err_msg=f"{y.shape}")
            assert np.linalg.norm(wide(narrow)[0] - optaxs) <= 1e-6 * max(1, np.linalg.norm(optaxs))


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy, losses.kl_divergence], ids=repr)
def test_targets_may_be_zero_or_not_sum_to_one(x64, loss):
    targets = jnp.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.2, 0.1, 0.4], [0.0, 0.0, 0.0]])
    y = outputs_for(loss, targets.shape, np.random.default_rng(1))
    manual, automatic = jax.jit(lambda *batch: (ours(loss, *batch), theirs(loss, *batch)))(
        y, targets
    )
    assert error(wide(manual[0]), wide(automatic[0])) <= 1e-12
    assert error(wide(manual[1]), wide(automatic[1])) <= 1e-12


def test_one_hot_rows_and_labels_are_the_same_loss(x64):
    y, labels = batches(LABELS)[1]
    one_hot = jax.nn.one_hot(labels, y.shape[-1], dtype=y.dtype)
    assert (
        error(wide(ours(LABELS, y, labels)), wide(ours(losses.softmax_cross_entropy, y, one_hot)))
        <= 1e-12
    )


def test_hinge_loss_has_gradient_zero_at_its_kink():
    y, t = jnp.array([[1.0, -1.0, 0.5, 2.0]]), jnp.array([[1.0, -1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(losses.hinge_loss.value(y, t), [0.5])
    np.testing.assert_array_equal(losses.hinge_loss.grad(y, t), [[0, 0, -1, 0]])


@pytest.mark.parametrize("loss", FLOATING, ids=repr)
def test_whole_number_and_bool_targets_are_floats_exactly(x64, loss):
    rng = np.random.default_rng(2)
    y = outputs_for(loss, (6, 3), rng)
    on = rng.integers(0, 2, (6, 3)) if loss not in ROWS else np.eye(3)[rng.integers(0, 3, 6)]
    kinds = [jnp.asarray(on, kind) for kind in (jnp.int32, jnp.uint8, jnp.bool)]
    found, truth = jax.jit(
        lambda y, kinds: (
            [ours(loss, y, t) for t in kinds],
            ours(loss, y, kinds[0].astype(y.dtype)),
        )
    )(y, kinds)
    for one in found:
        for got, true in zip(one, truth, strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_array_equal(got, true)


def test_labels_of_every_whole_number_dtype_are_the_same_labels(x64):
    y, labels = batches(LABELS)[0]
    kinds = [labels.astype(kind) for kind in (jnp.int8, jnp.uint8, jnp.int32, jnp.int64)]
    found = jax.jit(lambda y, kinds: [(*ours(LABELS, y, t), LABELS.correct(y, t)) for t in kinds])(
        y, kinds
    )
    for one in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, one, found[0])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_dtype_is_kept_and_nothing_is_weakly_typed(x64, loss):
    y, t = batches(loss)[1]
    found = jax.jit(
        lambda y, t: {dtype: ours(loss, y.astype(dtype), cast(t, dtype)) for dtype in DTYPES}
    )(y, t)
    for dtype, parts in found.items():
        for got, true in zip(parts, found["float64"], strict=True):
            assert got.dtype == dtype
            assert not got.weak_type
            assert error(wide(got), wide(true)) <= 5e-2


@pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.name != "binary_cross_entropy"], ids=repr
)
def test_outputs_of_ten_thousand_have_the_right_finite_value_and_gradient(x64, loss):
    rows = np.array(
        [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, -1e4, -1e4]]
    )
    t = targets_for(loss, rows.shape, np.random.default_rng(3))
    shorts = ("bfloat16", "float32")

    @jax.jit
    def check(y, t):
        batch = {dtype: (y.astype(dtype), cast(t, dtype)) for dtype in shorts}
        return {
            dtype: (ours(loss, *batch[dtype]), theirs(loss, *cast(batch[dtype], jnp.float64)))
            for dtype in shorts
        }

    for dtype, (manual, truth) in check(jnp.asarray(rows), t).items():
        for got, true in zip(manual, truth, strict=True):
            tolerance = {"bfloat16": 2e-2, "float32": 1e-5}[dtype]
            np.testing.assert_allclose(
                wide(got)[0], true, rtol=tolerance, atol=tolerance, err_msg=dtype
            )


@pytest.mark.parametrize("loss", ON_LOGITS, ids=repr)
def test_rows_of_equal_logits_have_the_loss_of_not_knowing(x64, loss):
    if loss.name == "sigmoid_binary_cross_entropy":
        levels, t, value, grad = (
            (0.0,),
            jnp.array([[1.0, 0.0, 0.5]]),
            3 * np.log(2),
            np.array([[-0.5, 0.5, 0.0]]),
        )
    else:
        levels, value, grad = (0.0, 1e4, -1e4), np.log(3), np.array([[1 / 3, 1 / 3 - 1, 1 / 3]])
        t = jnp.array([1]) if loss is LABELS else jnp.array([[0.0, 1.0, 0.0]])
    found = jax.jit(
        lambda t: {
            dtype: [ours(loss, jnp.full((1, 3), level, dtype), cast(t, dtype)) for level in levels]
            for dtype in DTYPES
        }
    )(t)
    for dtype in DTYPES:
        for v, g in found[dtype]:
            tolerance = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-6, "float64": 1e-12}[
                dtype
            ]
            np.testing.assert_allclose(wide(v)[0], [value], rtol=tolerance)
            np.testing.assert_allclose(wide(g)[0], grad, atol=tolerance)


def test_binary_cross_entropy_of_certain_answers_is_zero_where_right_and_infinite_where_wrong():
    certain = jnp.array([[0.0], [1.0]])
    value, grad = ours(losses.binary_cross_entropy, certain, certain)
    np.testing.assert_array_equal(value, [0, 0])
    np.testing.assert_array_equal(grad, [[1], [-1]])
    value, grad = ours(losses.binary_cross_entropy, certain, 1 - certain)
    np.testing.assert_array_equal(value, [np.inf, np.inf])
    np.testing.assert_array_equal(grad, [[-np.inf], [np.inf]])


def test_huber_loss_takes_a_delta(x64):
    y, t = 3 * batches(losses.huber_loss)[0][0], batches(losses.huber_loss)[0][1]
    y = y.at[0, :2].set(t[0, :2] + jnp.array([0.5, -2.0]))  # just where the two pieces meet

    @jax.jit
    def both(y, t):
        def optaxs(y, delta):
            return optax.losses.huber_loss(y, t, delta=delta).sum(1)

        return [
            (
                ours(losses.huber_loss(delta=d), y, t),
                (optaxs(y, d), jax.grad(lambda y, d=d: optaxs(y, d).sum())(y)),
            )
            for d in (0.5, 1.0, 2.0)
        ]

    found = both(y, t)
    for manual, automatic in found:
        assert error(wide(manual), wide(automatic)) <= 1e-12
    assert not np.allclose(found[0][0][0], found[1][0][0])
    assert losses.huber_loss(delta=2.0).name == "huber_loss"


CORRECT = {
    "hinge_loss": ([[2.0], [-0.1], [0.3]], [[1.0], [1.0], [-1.0]], [True, False, False]),
    "sigmoid_binary_cross_entropy": (
        [[2.0, -1.0], [2.0, 1.0], [0.0, 0.0]],
        [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
        [True, False, True],
    ),
    "binary_cross_entropy": (
        [[0.7, 0.2], [0.7, 0.8], [0.4, 0.4]],
        [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]],
        [True, False, True],
    ),
    "softmax_cross_entropy": (
        [[1.0, 3.0], [1.0, 3.0], [2.0, -1.0]],
        [[0.1, 0.9], [1.0, 0.0], [0.6, 0.4]],
        [True, False, True],
    ),
    "softmax_cross_entropy_with_integer_labels": (
        [[1.0, 3.0], [1.0, 3.0], [2.0, -1.0]],
        [1, 0, 0],
        [True, False, True],
    ),
    "kl_divergence": (
        [[-2.0, -0.1], [-2.0, -0.1], [-0.3, -1.0]],
        [[0.1, 0.9], [1.0, 0.0], [0.6, 0.4]],
        [True, False, True],
    ),
}


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_an_answer_is_correct_where_all_its_outputs_are(loss):
    if loss.correct is None:
        assert loss.name in ("l2_loss", "squared_error", "huber_loss", "log_cosh")  # regression
        return
    y, t, expected = (jnp.asarray(a) for a in CORRECT[loss.name])
    np.testing.assert_array_equal(loss.correct(y, t), expected)
    # [batch, 2, ...]
    positions = loss.correct(jnp.stack([y, y[::-1]], 1), jnp.stack([t, t[::-1]], 1))
    np.testing.assert_array_equal(positions, expected & expected[::-1])


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_is_called_by_its_own_name(loss):
    assert losses.get(loss.name) is losses.get(loss) is loss is getattr(losses, loss.name)
    assert sum(other.name == loss.name for other in LOSSES) == 1


def value_and_gradients(loss):
    """Manual and automatic gradient of a small net under a loss."""
    net = fnn.mlp((3, 4, 2), "tanh")
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 3)))

    @jax.jit
    def both(x):
        params, t = net.init(jax.random.key(0)), x[:, :2]
        return fnn.value_and_grad(net, loss)(params, x, t), jax.value_and_grad(
            fnn.mean_loss(net, loss)
        )(params, x, t)

    return both(x)


def power(y, t, p):
    return jnp.abs(y - t) ** p


def power_gradient(y, t, p):
    return p * jnp.sign(y - t) * jnp.abs(y - t) ** (p - 1)


def test_a_users_own_loss_of_elements_is_a_loss_like_any_other(x64):
    fourth = losses.loss("power", power, power_gradient, p=3)(p=4)
    assert fourth.name == "power"
    assert fourth.correct is None
    y, t = batches(losses.l2_loss)[1]
    np.testing.assert_allclose(fourth.value(y, t), ((y - t) ** 4).sum((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(fourth.grad(y, t), 4 * (y - t) ** 3, rtol=1e-12)
    manual, automatic = value_and_gradients(fourth)
    assert error(wide(manual), wide(automatic)) <= 1e-12


def test_a_bare_loss_needs_a_value_and_a_gradient_alone(x64):
    bare = fnn.Loss(
        "bare", lambda y, t: (power(y, t, 3)).sum(-1), functools.partial(power_gradient, p=3)
    )
    assert bare.check(jnp.ones((2, 1)), jnp.ones((2, 1))) is None
    manual, automatic = value_and_gradients(bare)
    assert error(wide(manual), wide(automatic)) <= 1e-12


def test_a_narrow_label_is_not_mistaken_for_a_wide_one():
    outputs = jax.nn.one_hot(jnp.array([257]), 300)
    assert not LABELS.correct(outputs, jnp.array([1], jnp.uint8))[0]


BY_OPTAX = losses.from_function(optax.softmax_cross_entropy_with_integer_labels, targets="labels")
INVALID = (
    ("int32", -1),
    ("int32", 3),
    ("int8", -1),
    ("uint8", 255),
    ("uint32", 2**31),
    ("int64", 2**32),
    ("uint64", 2**32),
)


@pytest.mark.parametrize("loss", [LABELS, BY_OPTAX], ids=["ours", "optax"])
@pytest.mark.parametrize(("dtype", "label"), INVALID)
def test_a_row_with_an_invalid_label_is_nan_and_no_other(x64, loss, dtype, label):
    y = jnp.asarray(np.random.default_rng(5).normal(size=(3, 2, 3)))
    labels = np.array([[0, 1], [2, label], [1, 0]], dtype)
    value, grad = jax.jit(lambda t: ours(loss, y, t))(labels)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    rows = np.zeros((3, 2), bool)
    rows[1, 1] = True
    np.testing.assert_array_equal(np.isnan(grad), np.repeat(rows[..., None], 3, axis=-1))
    np.testing.assert_array_equal(loss.correct(y, labels)[1], False)
    automatic = jax.grad(lambda y: loss.value(y, labels).sum())(y)
    assert np.isnan(automatic[1, 1]).all()
    with pytest.raises(ValueError, match=rf"labels in 0 ... 2 for 3 outputs, got {label} in row 1"):
        loss.check(y, labels)


@pytest.mark.parametrize("loss", FLOATING, ids=repr)
def test_where_the_value_of_a_row_is_nan_so_is_its_gradient(x64, loss):
    y, t = batches(loss, [(4, 3)])[0]
    for number in (np.nan, -1.0):
        wrong = t.at[1, 2].set(number)
        value, grad = jax.jit(lambda t: ours(loss, y, t))(wrong)
        assert np.isnan(number) <= np.isnan(value[1])
        np.testing.assert_array_equal(np.isnan(value), np.isnan(grad).any(1))
    if loss.name != "kl_divergence":  # its gradient does not depend on the outputs
        assert np.isnan(loss.grad(y.at[1, 2].set(np.nan), t)[1]).any()


def test_an_example_with_an_invalid_label_is_reported_and_left_out():
    net = fnn.mlp((3, 4, 3), "gelu")
    params, x, labels = net.init(jax.random.key(0)), jnp.ones((3, 3)), jnp.array([0, -1, 2])
    clipped = fnn.per_example.clipped_gradient(fnn.source(net, LABELS), 1.0)
    found = jax.jit(clipped)(params, x, labels)
    assert found.reduction.examples == 2
    value, grads = jax.jit(fnn.value_and_grad(net, LABELS))(params, x, labels)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves((value, grads)))


def test_labels_of_int8_may_have_300_classes():
    y = jnp.zeros((2, 300))
    np.testing.assert_allclose(LABELS.value(y, jnp.array([5, 127], jnp.int8)), np.log(300))


def test_a_class_that_is_ruled_out_by_an_infinite_logit_costs_nothing():
    y, labels = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([0])
    value, grad = ours(LABELS, y, labels)
    np.testing.assert_allclose(value, np.log1p(np.exp(1.0)), rtol=1e-6)
    np.testing.assert_allclose(grad, [[-np.e / (1 + np.e), 0, np.e / (1 + np.e)]], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_no_gradient_of_finite_outputs_is_nan_on_the_way(loss):
    outputs = jnp.array([[0.0, 1.0, 0.5], [0.3, 0.3, 0.4]])
    t = {
        "labels": jnp.array([1, 0]),
        "signs": jnp.array([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]]),
    }.get(loss.targets, jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    with jax.debug_nans(True):  # not jitted, so that every operation is looked at
        loss.grad(outputs, t)
        jax.grad(lambda y: loss.grad(y, t).sum())(outputs)


@pytest.mark.parametrize("number", [3_000_000_000, 2**24 + 1, 2**31 - 1, 2**63 - 1])
def test_whole_numbers_that_float32_does_not_hold_are_refused(number):
    outputs = jax.ShapeDtypeStruct((2, 1), jnp.float32)
    with pytest.raises(ValueError, match=f"holds exactly, got {number} in row 1"):
        losses.l2_loss.check(outputs, np.array([[2**24], [number]]))


def test_whole_numbers_that_float64_does_not_hold_are_refused(x64):
    outputs = jax.ShapeDtypeStruct((1, 1), jnp.float64)
    losses.l2_loss.check(outputs, np.array([[2**53]]))
    with pytest.raises(ValueError, match="holds exactly"):
        losses.l2_loss.check(outputs, np.array([[2**53 + 1]]))


CHECKED = (
    ("hinge_loss", [[1.0], [0.5]], "-1 or 1, got 0.5 in row 1"),
    ("sigmoid_binary_cross_entropy", [[1.0], [-1.0]], "in 0 ... 1, got -1.0 in row 1"),
    ("binary_cross_entropy", [[1.0], [2.0]], "in 0 ... 1, got 2.0 in row 1"),
    ("softmax_cross_entropy", [[1.0, 0.0], [0.5, 0.1]], "sum to 1, got 0.6 in row 1"),
    ("softmax_cross_entropy", [[1.0, 0.0], [0.0, 0.0]], "sum to 1, got 0 in row 1"),
    ("kl_divergence", [[1.0, 0.0], [1.5, -0.5]], "in 0 ... 1, got 1.5 in row 1"),
    ("l2_loss", [[1.0], [np.nan]], "has nan at row 1"),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "rows", "message"), CHECKED)
def test_invalid_values_of_targets_are_named_with_their_row(name, rows, message, dtype):
    t = jnp.asarray(rows, dtype)
    with pytest.raises(ValueError, match=re.escape(message) if dtype == "float32" else None):
        losses.get(name).check(jax.ShapeDtypeStruct(t.shape, dtype), t)


def test_the_names_for_completion_are_those_of_the_losses():
    assert typing.get_args(losses.Name) == tuple(loss.name for loss in LOSSES)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_is_exported_with_a_symbolic_batch(loss):
    y, t = map(jnp.asarray, batches(loss)[1])
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (y, t)]
    f = jax.jit(lambda y, t: (loss.value(y, t), loss.grad(y, t)))
    stored = jax.export.deserialize(jax.export.export(f)(*shapes).serialize())
    assert error(stored.call(y, t), f(y, t)) <= 1e-5


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_loss_from_optaxs_function_has_the_same_gradient(x64, loss):
    if loss.name == "binary_cross_entropy":
        return  # optax has none
    same = losses.from_function(getattr(optax.losses, loss.name), targets=loss.targets)
    assert same.name == loss.name
    assert (same.correct is None) == (loss.correct is None)
    y, t = batches(loss)[1]
    found, expected = jax.jit(lambda y, t: (ours(same, y, t), ours(loss, y, t)))(y, t)
    assert error(wide(found), wide(expected)) <= 1e-12


def test_a_loss_from_a_function_trains_and_has_one_program():
    def mine(outputs, targets):
        return jnp.abs(outputs - targets) ** 3

    assert losses.from_function(mine) == losses.from_function(mine)
    assert losses.from_function(mine, "cubic").name == "cubic"
    assert losses.from_function(functools.partial(mine)).name == "loss"
    with jax.enable_x64(True):
        manual, automatic = value_and_gradients(losses.from_function(mine))
        assert error(wide(manual), wide(automatic)) <= 1e-12
    with pytest.raises(TypeError, match="`value` must be a function"):
        losses.from_function("l2_loss")
    with pytest.raises(
        ValueError, match=r"Unknown kind of targets 'label'\. Did you mean 'labels'"
    ):
        losses.from_function(mine, targets="label")


def test_a_setting_of_numpy_promotes_nothing():
    y = jnp.ones((2, 1), jnp.bfloat16)
    assert losses.huber_loss(delta=np.float64(2)).value(y, y).dtype == jnp.bfloat16


@pytest.mark.parametrize("label", [2**32 + 1, -(2**40), 2**63 - 1])
def test_a_label_that_32_bits_do_not_hold_is_an_error(label):
    loss = losses.softmax_cross_entropy_with_integer_labels
    with pytest.raises(ValueError, match=f"`targets` holds {label}, which int32"):
        loss.value(jnp.ones((2, 3)), np.array([0, label]))
    net = fnn.embedding(3, 2)
    with pytest.raises(ValueError, match=f"`x` holds {label}, which int32"):
        net.apply(net.init(jax.random.key(0)), np.array([0, label]))
