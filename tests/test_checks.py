"""The checks pass on right derivatives, and fail on wrong ones, naming the place.

A check that cannot fail checks nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast

import fnn
from fnn import activations, losses
from fnn.factors import Outer, PerExample, total
from fnn.nets.layers import Dense
from fnn.verify import TOLERANCES

KEY = jax.random.key(0)
DENSE = fnn.dense(4, 4)  # square, so that a missing transpose is no error of shape
X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
T = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)


def params_of(net, dtype=np.float32):
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(dtype), jax.eval_shape(net.init, KEY)
    )


def broken_dense(backward):
    return dataclasses.replace(DENSE, backward=backward)


def no_transpose(params, x, dz, reduce=total):
    return DENSE.backward(params, x, dz, reduce)[0], dz @ params.w


def no_bias(params, x, dz, reduce=total):
    return Dense(reduce(Outer(x, dz)), reduce(PerExample(0 * dz))), dz @ params.w.T


def twice(params, x, dz, reduce=total):
    return Dense(reduce(Outer(2 * x, dz)), reduce(PerExample(dz))), dz @ params.w.T


def swapped(params, x, dz, reduce=total):
    return Dense(reduce(Outer(dz, x)), reduce(PerExample(dz))), dz @ params.w.T


def zero_weight(params, x, dz, reduce=total):
    return Dense(reduce(Outer(0 * x, dz)), reduce(PerExample(dz))), dz @ params.w.T


def not_a_number(params, x, dz, reduce=total):
    return Dense(reduce(Outer(x * jnp.nan, dz)), reduce(PerExample(dz))), dz @ params.w.T


NO_MASK = dataclasses.replace(
    activations.relu, backward=lambda params, residuals, dy, reduce=total: ((), dy)
)
BROKEN = {  # the net, and the leaves of the gradient that come out wrong
    "relu without its mask": (
        fnn.serial(fnn.dense(4, 4), NO_MASK, fnn.dense(4, 4)),
        {"[0].w", "[0].b"},
    ),
    "missing transpose": (
        fnn.serial(fnn.dense(4, 4), broken_dense(no_transpose)),
        {"[0].w", "[0].b"},
    ),
    "dropped bias": (fnn.serial(broken_dense(no_bias), fnn.dense(4, 4)), {"[0].b"}),
    "factor 2": (fnn.serial(fnn.dense(4, 4), broken_dense(twice)), {"[1].w"}),
    "outer product the other way": (fnn.serial(broken_dense(swapped), fnn.dense(4, 4)), {"[0].w"}),
    "zeroed leaf": (
        fnn.serial(fnn.dense(4, 4), broken_dense(zero_weight), fnn.dense(4, 4)),
        {"[1].w"},
    ),
    "NaN": (fnn.serial(broken_dense(not_a_number), fnn.dense(4, 4)), {"[0].w"}),
    "inside repeat": (fnn.serial(fnn.dense(4, 4), fnn.repeat(broken_dense(twice), 2)), {"[1].w"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backward_fails_at_its_leaf(name):
    net, wrong = BROKEN[name]
    report = fnn.compare_gradients(net, losses.l2_loss, params_of(net), X, T)
    assert not report.passed
    assert {
        leaf.path for leaf in report.leaves if not leaf.relative_error <= report.tolerance
    } == wrong
    assert "DIFFER" in str(report)
    if name == "factor 2":
        leaf = next(leaf for leaf in report.leaves if leaf.path == "[1].w")
        np.testing.assert_allclose([leaf.relative_error, leaf.cosine], [1, 1], rtol=1e-6)
        assert not leaf.exact


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (fnn.mlp((4, 5, 4), "gelu"), losses.l2_loss),
        (
            fnn.serial(
                fnn.dense(4, 4),
                fnn.repeat(fnn.residual(fnn.serial(fnn.dense(4, 4), activations.relu)), 3),
            ),
            losses.log_cosh,
        ),
    ],
    ids=["mlp", "repeat"],
)
def test_a_right_backward_passes_and_its_report_is_a_table_of_every_leaf(net, loss):
    params = params_of(net)
    report = fnn.compare_gradients(net, loss, params, X, T)
    assert report.passed, report
    assert report.tolerance == TOLERANCES["float32"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert [leaf.path for leaf in report.leaves] == paths
    assert [leaf.shape for leaf in report.leaves] == [
        leaf.shape for leaf in jax.tree.leaves(params)
    ]
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == [
        "leaf",
        *paths,
        "all",
        "compiled",
        "manual",
        "automatic",
        "manual",
    ]
    assert "agree" in lines[-1]
    assert report.manual.flops > 0
    assert report.automatic.bytes_accessed > 0
    assert report.value_difference <= 1e-6
    assert report.cosine == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_tolerance_is_that_of_the_dtype(dtype):
    net = fnn.mlp((4, 5, 4), "tanh")
    with jax.enable_x64(dtype == "float64"):
        good, bad = (
            fnn.compare_gradients(n, losses.l2_loss, *cast((params_of(n), X, T), jnp.dtype(dtype)))
            for n in (net, fnn.serial(fnn.dense(4, 4), broken_dense(twice)))
        )
    assert good.passed, good
    assert not bad.passed
    assert good.tolerance == TOLERANCES[dtype]


def slightly_off(error):
    return broken_dense(
        lambda p, x, dz, reduce=total: (
            Dense(reduce(Outer(x * (1 + error), dz)), reduce(PerExample(dz))),
            dz @ p.w.T,
        )
    )


def test_the_tolerance_can_be_set():
    net = fnn.serial(slightly_off(1e-3))
    params = params_of(net)
    assert not fnn.compare_gradients(net, losses.l2_loss, params, X, T).passed
    report = fnn.compare_gradients(net, losses.l2_loss, params, X, T, tolerance=2e-3)
    assert report.passed
    assert report.tolerance == 2e-3
    assert not fnn.compare_gradients(net, losses.l2_loss, params, X, T, tolerance=5e-4).passed


def test_the_weights_are_those_of_the_loss():
    net = fnn.mlp((4, 3, 4), "tanh")
    params, weights = params_of(net), np.array([1, 0, 2, 0.5, 0, 3], np.float32)
    weighted = fnn.compare_gradients(net, losses.l2_loss, params, X, T, weights=weights)
    assert weighted.passed, weighted
    bad = X.copy()
    bad[[1, 4]] = 5  # of weight 0
    one = broken_dense(
        lambda p, x, dz, reduce=total: DENSE.backward(p, jnp.where(x == 5, -x, x), dz, reduce)
    )
    one = fnn.serial(one)
    assert not fnn.compare_gradients(one, losses.l2_loss, params_of(one), bad, T).passed
    assert fnn.compare_gradients(
        one, losses.l2_loss, params_of(one), bad, T, weights=weights
    ).passed


def test_where_both_gradients_cancel_float64_decides():
    """Softmax that has nearly learnt its labels.

    P - t is rounding in both, and the manual one must be no worse than `jax.grad`.
    """
    net, labels = fnn.serial(fnn.dense(4, 4)), np.arange(6) % 4
    x = np.eye(4, dtype=np.float32)[labels] + 0.01 * X
    params = (Dense(w=np.float32(14) * np.eye(4, dtype=np.float32), b=np.zeros(4, np.float32)),)
    loss = losses.softmax_cross_entropy_with_integer_labels
    # no float32 result is that close
    report = fnn.compare_gradients(net, loss, params, x, labels, tolerance=1e-12)
    asked = [leaf for leaf in report.leaves if leaf.relative_error > report.tolerance]
    assert asked
    assert all(leaf.against_float64 is not None for leaf in asked)
    for leaf in asked:
        manual, automatic = leaf.against_float64
        assert 0 < automatic < 0.1
        assert manual <= 2 * automatic
    assert report.passed
    assert "against float64" in str(report)
    wrong = fnn.serial(slightly_off(0.5))
    assert not fnn.compare_gradients(wrong, loss, params, x, labels).passed


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in ("inside repeat", "NaN")])
def test_check_layer_fails_for_a_broken_layer(name):
    report = fnn.check_layer(BROKEN[name][0], X, key=KEY, params=params_of(BROKEN[name][0]))
    assert not report.passed
    assert [check.passed for check in report.checks] == [False] * 3, report
    assert str(report).count("FAILED") == 3


def test_check_layer_fails_for_nan():
    net, _ = BROKEN["NaN"]
    assert not fnn.check_layer(net, X, key=KEY).passed


def test_check_layer_fails_for_a_wrong_dx_alone():
    assert not fnn.check_layer(broken_dense(no_transpose), X, key=KEY).passed
    assert fnn.check_layer(DENSE, X, key=KEY).passed


@pytest.mark.parametrize(
    "broken",
    [
        dataclasses.replace(losses.l2_loss, grad=lambda y, t: 2 * (y - t)),
        dataclasses.replace(losses.l2_loss, grad=lambda y, t: t - y),
        dataclasses.replace(losses.l2_loss, grad=lambda y, t: (y - t) / len(y)),
        dataclasses.replace(losses.l2_loss, grad=lambda y, t: (y - t) * jnp.nan),
        dataclasses.replace(losses.softmax_cross_entropy, grad=lambda z, t: jax.nn.sigmoid(z) - t),
    ],
    ids=["twice", "sign", "mean", "NaN", "sigmoid for softmax"],
)
def test_check_loss_fails_for_a_broken_loss(broken):
    report = fnn.check_loss(broken, X, np.abs(T) / np.abs(T).sum(1, keepdims=True), key=KEY)
    assert not report.passed
    assert [check.passed for check in report.checks] == [False] * 3


@pytest.mark.parametrize(
    "loss",
    [losses.l2_loss, losses.softmax_cross_entropy, losses.sigmoid_binary_cross_entropy],
    ids=repr,
)
def test_check_loss_passes_for_a_right_one(loss):
    targets = np.abs(T) / np.abs(T).sum(1, keepdims=True)
    report = fnn.check_loss(loss, X, targets, key=KEY)
    assert report.passed, report
    assert str(report).startswith(loss.name)
    assert str(report).count("passed") == 3
