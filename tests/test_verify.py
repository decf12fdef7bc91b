"""The checks pass on right derivatives, and fail on wrong ones, naming the place and the slip.

A check that cannot fail checks nothing.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, targets_for

import fnn
from fnn import activations, losses
from fnn.factors import Outer, PerExample, total
from fnn.nets.layers import Dense
from fnn.types import Layer
from fnn.verify import TOLERANCES

KEY = jax.random.key(0)
DENSE = fnn.dense(4, 4)  # square, so that a missing transpose is no error of shape
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
T = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
CUBE = fnn.elementwise("cube", lambda x: x**3, lambda x, y: 3 * x**2)
SCALES = (1e-4, 1.0, 1e4)
MEANS = ("jax.vjp", "adjoint identity")
NOTHING = "nothing was tested"


def params_of(net, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32),
        jax.eval_shape(net.init, KEY),
    )


def check(layer, x=X, params=None):
    return fnn.check_layer(layer, x, key=KEY, params=params_of(layer) if params is None else params)


def rows_of(report, against="jax.vjp"):
    """The hint for every array, held against one means."""
    return {leaf.path: leaf.hint for leaf in report.leaves if leaf.against == against}


def hints_of(report):
    return " ".join(leaf.hint for leaf in report.leaves)


# ---------------------------------------------------------------- right layers and losses

FLAT = {  # activations whose derivative is 0 at every one of a few inputs of that size
    1e4: {"sigmoid", "tanh", "relu6", "hard_tanh", "hard_sigmoid", "sparse_sigmoid", "softmax"}
}
NETS = {
    "dense": fnn.dense(4, 3),
    "dense without a bias": fnn.dense(4, 3, bias_init=None),
    "layer_norm": fnn.layer_norm(4),
    "rms_norm": fnn.rms_norm(4),
    "repeat": fnn.repeat(fnn.residual(fnn.serial(fnn.dense(4, 4), activations.soft_sign)), 3),
    "iterate": fnn.iterate(fnn.residual(fnn.serial(fnn.dense(4, 4), activations.silu)), 3),
    "cubes": fnn.serial(fnn.dense(4, 4), CUBE, fnn.dense(4, 4), CUBE),
    "norm inside": fnn.serial(fnn.dense(4, 6), fnn.layer_norm(6), activations.relu),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("activation", activations.ACTIVATIONS, ids=repr)
def test_every_activation_passes_where_its_derivative_is_not_0(activation, scale):
    report = check(activation, scale * X)
    if activation.name == "step" or (not report.passed and activation.name in FLAT.get(scale, ())):
        assert NOTHING in hints_of(report)
        return
    assert report.passed, report


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("loss", losses.LOSSES, ids=repr)
def test_every_loss_passes(loss, scale):
    outputs = scale * X.astype(np.float64)
    if loss.targets == "probabilities":
        outputs = 1 / (1 + np.exp(-np.clip(outputs, -5, 5)))
    if loss.name == "kl_divergence":
        outputs = np.asarray(jax.nn.log_softmax(outputs))
    with jax.enable_x64(True):
        targets = np.asarray(targets_for(loss, outputs.shape, np.random.default_rng(3)))
    report = fnn.check_loss(loss, outputs, targets, key=KEY)
    assert report.passed, report


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_passes(name, scale):
    report = check(NETS[name], scale * X)
    assert report.passed, report


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4])
def test_inputs_of_any_size_pass_with_the_params_of_init(scale):
    """Biases begin at 0, and say nothing about the size of a step."""
    report = fnn.check_layer(NETS["cubes"], scale * X, key=KEY)
    assert report.passed, report


@pytest.mark.parametrize("power", [1, 2, 4])
def test_inputs_of_mixed_sizes_pass(power):
    report = check(CUBE, X * 10.0 ** (power * np.arange(-2, 2, dtype=np.float32)))
    assert report.passed, report


def test_an_embedding_passes():
    report = check(fnn.embedding(7, 3), np.array([[1, 2], [2, 2], [0, 6]]))
    assert report.passed, report
    assert rows_of(report) == {"params.w": ""}


class Attention(NamedTuple):
    q: Any
    k: Any
    bias: Any  # of the keys: the softmax takes it out


def attention():
    def one(p, x):
        scores = (x @ p.q) @ (x @ p.k + jnp.broadcast_to(p.bias, (len(x), 4))).T
        return jax.nn.softmax(scores, axis=-1) @ x

    def forward(p, x):
        return jax.vmap(one, in_axes=(None, 0))(p, x), x

    def backward(p, x, dy, reduce=total):
        grads, dx = jax.vmap(lambda x, dy: jax.vjp(one, p, x)[1](dy))(x, dy)
        return jax.tree.map(lambda g: reduce(PerExample(g)), grads), dx

    return Layer("attention", lambda key: (), forward, backward)


def test_a_gradient_that_is_rounding_alone_passes():
    rng = np.random.default_rng(4)
    params = Attention(*(rng.normal(size=shape) for shape in ((4, 4), (4, 4), (4,))))
    report = fnn.check_layer(attention(), rng.normal(size=(5, 3, 4)), key=KEY, params=params)
    assert report.passed, report


def test_the_key_of_the_data_gives_other_directions():
    """A cotangent equal to `x` makes dw = x^T x symmetric, and its transpose right."""
    layer = with_backward(swapped)
    report = fnn.check_layer(layer, X, key=KEY, params=params_of(layer))
    assert "transpose" in rows_of(report)["params.w"]


# ---------------------------------------------------------------- wrong layers and losses


def with_backward(backward):
    return dataclasses.replace(DENSE, backward=backward)


def with_factors(w=lambda x, dz: Outer(x, dz), b=PerExample, dx=lambda dz, w: dz @ w.T):
    """The dense layer with other factors, or another `dx`."""

    def backward(params, x, dz, reduce=total):
        return Dense(reduce(w(x, dz)), reduce(b(dz))), dx(dz, params.w)

    return with_backward(backward)


def no_transpose(params, x, dz, reduce=total):
    return DENSE.backward(params, x, dz, reduce)[0], dz @ params.w


def twice(params, x, dz, reduce=total):
    return Dense(reduce(Outer(2 * x, dz)), reduce(PerExample(dz))), dz @ params.w.T


def swapped(params, x, dz, reduce=total):
    return Dense(reduce(Outer(dz, x)), reduce(PerExample(dz))), dz @ params.w.T


def not_a_number(params, x, dz, reduce=total):
    return Dense(reduce(Outer(x * jnp.nan, dz)), reduce(PerExample(dz))), dz @ params.w.T


def swapped_norm():
    layer = fnn.layer_norm(4)

    def backward(params, residuals, dy, reduce=total):
        grads, dx = layer.backward(params, residuals, dy, reduce)
        return grads._replace(scale=grads.bias, bias=grads.scale), dx

    return dataclasses.replace(layer, backward=backward)


BATCH = ("0.2 x the right one", "divided by the batch of 5?")
WRONG = {  # layer, the array, what the report says of it
    "no transpose in dx": (with_backward(no_transpose), "dx", ("a missing transpose or term",)),
    "outer product the other way": (with_backward(swapped), "params.w", ("the transpose of",)),
    "mean for a sum in b": (with_factors(b=lambda dz: PerExample(dz / 5)), "params.b", BATCH),
    "1/batch in w": (with_factors(w=lambda x, dz: Outer(x, dz / 5)), "params.w", BATCH),
    "1/batch in dx": (with_factors(dx=lambda dz, w: dz @ w.T / 5), "dx", BATCH),
    "factor 2": (with_backward(twice), "params.w", ("2 x the right one",)),
    "sign of b": (with_factors(b=lambda dz: PerExample(-dz)), "params.b", ("-1 x", "sign")),
    "sign of dx": (with_factors(dx=lambda dz, w: -dz @ w.T), "dx", ("-1 x the right one", "sign")),
    "constant in w": (with_factors(w=lambda x, dz: Outer(x, 3 * dz)), "params.w", ("constant",)),
    "narrow dtype in w": (
        with_factors(w=lambda x, dz: Outer(x, (1 + 1e-7) * dz)),
        "params.w",
        ("narrower dtype",),
    ),
    "narrow dtype in b": (
        with_factors(b=lambda dz: PerExample((1 + 1e-7) * dz)),
        "params.b",
        ("narrower dtype",),
    ),
    "b forgotten": (
        with_factors(b=lambda dz: PerExample(0 * dz)),
        "params.b",
        ("0 x the right one",),
    ),
    "NaN": (with_backward(not_a_number), "params.w", ("NaN",)),
    "scale and bias swapped": (swapped_norm(), "params.scale", ("two arrays swapped?",)),
    "wrong formula": (
        fnn.elementwise("tanh", jnp.tanh, lambda x, y: 1 - y),
        "dx",
        ("no multiple of the right one",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_array_is_named_with_the_likely_slip(name):
    layer, wrong, words = WRONG[name]
    report = check(layer)
    assert not report.passed
    hints = rows_of(report)
    for word in words:
        assert word in hints[wrong]
    others = {"params.bias"} if name == "scale and bias swapped" else set()
    assert {path for path, hint in hints.items() if hint} == {wrong} | others
    line = next(line for line in str(report).splitlines() if line.startswith(wrong))
    assert words[0] in line


def tied(params, residuals, dy, reduce=total):
    x, h = residuals
    dh = dy @ params
    uses = reduce(Outer(x, dh)), reduce(Outer(dy, h))
    return jax.tree.map(jnp.add, *uses), dh @ params.T


def tied_by_position(params, residuals, dy, reduce=total):
    x, h = residuals
    dh = dy @ params
    a = jnp.stack([x, dy], axis=1)
    dz = jnp.stack([dh, h], axis=1)
    return reduce(Outer(a, dz)), dh @ params.T


def tied_layer(backward):
    def forward(w, x):
        h = x @ w
        return h @ w.T, (x, h)

    return fnn.Layer("tied", lambda key: jax.random.normal(key, (3, 2)), forward, backward)


def test_what_reduce_returns_is_not_to_be_added():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    assert check(tied_layer(tied_by_position), x).passed
    report = check(tied_layer(tied), x)
    assert "what `reduce` returns changed afterwards?" in str(report)
    assert not report.passed


@pytest.mark.parametrize(
    "change", [lambda g: 0.5 * g, lambda g: g.T, lambda g: jnp.swapaxes(g, -1, -2)]
)
def test_what_reduce_returns_is_not_to_be_changed(change):
    def backward(w, x, dy, reduce=total):
        return change(reduce(Outer(x, dy))), dy @ w.T

    square = fnn.Layer("square", lambda key: jnp.ones((3, 3)), lambda w, x: (x @ w, x), backward)
    with pytest.raises(TypeError, match="must return what `reduce` returns, unchanged"):
        check(square, jnp.ones((5, 3)))


def ignore(w, x, dy, reduce=total):
    return x.T @ dy, dy @ w.T


def test_a_layer_within_iterate_is_told_of_reduce():
    layer = fnn.Layer("ignores", lambda key: jnp.ones((3, 3)), lambda w, x: (x @ w, x), ignore)
    with pytest.raises(TypeError, match="`reduce` takes a factor"):
        check(fnn.iterate(layer, 2), jnp.ones((5, 3)))


def test_a_bias_that_is_not_summed_over_positions():
    def backward(b, residuals, dy, reduce=total):
        return reduce(PerExample(dy)), dy

    def forward(b, x):
        return x + b[None, None], ()

    bias = fnn.Layer("bias", lambda key: jnp.ones(3), forward, backward)
    report = check(bias, jnp.ones((5, 4, 3)))
    assert "sum over the positions first" in str(report)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("against", MEANS)
@pytest.mark.parametrize(
    "name", [name for name in WRONG if name != "wrong formula" and "narrow" not in name]
)
def test_each_means_finds_a_wrong_layer(name, against, scale):
    assert any(rows_of(wrong_report(name, scale), against).values())


@functools.cache
def wrong_report(name, scale):
    return check(WRONG[name][0], scale * X)


@pytest.mark.parametrize("error", [1e-3, 1e-5])
@pytest.mark.parametrize("against", MEANS)
def test_each_means_finds_a_small_error(error, against):
    layer = fnn.elementwise("cube", lambda x: x**3, lambda x, y: (3 + error) * x**2)
    assert any(rows_of(check(layer), against).values())


def test_an_error_beyond_rounding_is_found_by_jax_vjp():
    report = check(fnn.elementwise("cube", lambda x: x**3, lambda x, y: (3 + 1e-10) * x**2))
    assert "1 x the right one" in rows_of(report)["dx"]


def test_a_wrong_derivative_of_the_forward_itself_is_found_by_differences_alone():
    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvp(lambda x, t: (square(*x), 3 * x[0] * t[0]))
    report = check(fnn.elementwise("square", square, lambda x, y: 3 * x))
    assert rows_of(report) == {"dx": ""}
    assert not report.passed
    assert any(rows_of(report, "adjoint identity").values())


@pytest.mark.parametrize(
    ("b", "shape"),
    [(lambda dz: dz.sum(1), "(5,)"), (lambda dz: dz, "(5, 4)"), (lambda dz: dz.sum(), "()")],
    ids=["other axis", "no sum", "both axes"],
)
def test_a_wrong_shape_is_named(b, shape):
    def backward(params, x, dz, reduce=total):
        return Dense(reduce(Outer(x, dz)), b(dz)), dz @ params.w.T

    hint = rows_of(check(with_backward(backward)))["params.b"]
    assert f"shape {shape}, expected (4,)" in hint
    assert "batch" in hint


def test_another_tree_than_the_params_is_an_error():
    def backward(params, x, dz, reduce=total):
        return tuple(DENSE.backward(params, x, dz, reduce)[0]), dz @ params.w.T

    with pytest.raises(ValueError, match=r"params\.w.*got.*params\[0\]"):
        check(with_backward(backward))


L2 = losses.l2_loss
WRONG_LOSSES = {
    "twice": (dataclasses.replace(L2, grad=lambda y, t: 2 * (y - t)), "2 x the right one"),
    "sign": (dataclasses.replace(L2, grad=lambda y, t: t - y), "sign"),
    "mean": (dataclasses.replace(L2, grad=lambda y, t: (y - t) / len(y)), "the batch of 5?"),
    "NaN": (dataclasses.replace(L2, grad=lambda y, t: (y - t) * jnp.nan), "NaN"),
    "sigmoid for softmax": (
        dataclasses.replace(losses.softmax_cross_entropy, grad=lambda z, t: jax.nn.sigmoid(z) - t),
        "no multiple",
    ),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_a_wrong_loss_fails_by_each_means_and_names_the_slip(name):
    loss, word = WRONG_LOSSES[name]
    report = fnn.check_loss(loss, X, np.abs(T) / np.abs(T).sum(1, keepdims=True), key=KEY)
    assert word in rows_of(report)["dx"]
    for against in MEANS:
        assert any(rows_of(report, against).values())


def test_a_loss_that_couples_its_examples_fails():
    loss = fnn.Loss(
        "centred",
        lambda y, t: ((y - y.mean(0)[None]) ** 2).sum(-1),
        lambda y, t: 2 * (y - y.mean(0)[None]),
    )
    report = fnn.check_loss(loss, X, T, key=KEY)
    assert "coupled" in rows_of(report, "examples alone")["dx"]


def test_the_gradient_of_a_loss_has_the_shape_of_the_outputs():
    loss = dataclasses.replace(L2, grad=lambda y, t: (y - t).sum(1))
    with pytest.raises(ValueError, match=r"l2_loss: `grad` must return.*\(5, 4\), got \(5,\)"):
        fnn.check_loss(loss, X, T, key=KEY)


# ---------------------------------------------------------------- nothing tested, kinks

WRONG_CUBE = fnn.elementwise("cube", lambda x: x**3, lambda x, y: 2 * x**2)


@pytest.mark.parametrize("layer", [CUBE, WRONG_CUBE], ids=["right", "wrong"])
@pytest.mark.parametrize("x", [0 * X, X[:0]], ids=["zeros", "no rows"])
def test_a_layer_does_not_pass_where_nothing_was_tested(layer, x):
    report = check(layer, x)
    assert not report.passed
    assert NOTHING in str(report)


def test_a_layer_does_not_pass_where_all_is_at_a_kink():
    wrong = fnn.elementwise("relu", jax.nn.relu, lambda x, y: 7.0)
    report = check(wrong, 0 * X)
    assert not report.passed
    assert NOTHING in str(report)


def test_a_wrong_layer_fails_at_the_smallest_inputs():
    assert not check(WRONG_CUBE, 1e-26 * X).passed


def test_a_loss_that_is_a_function_is_told_how_to_wrap_it():
    with pytest.raises(TypeError, match=r"A function\? Wrap it: `fnn\.Loss"):
        fnn.check_loss(lambda y, t: y, X, T, key=KEY)


def test_an_array_whose_gradient_is_0_was_not_tested():
    hints = rows_of(check(with_backward(twice), 0 * X))
    assert NOTHING in hints["params.w"]
    assert hints["params.b"] == hints["dx"] == ""


def test_a_layer_without_anything_to_differentiate_was_not_tested():
    layer = fnn.serial()
    report = fnn.check_layer(layer, np.array([[1, 2]]), key=KEY)
    assert not report.passed
    assert NOTHING in str(report)


def test_an_array_whose_gradient_should_be_0_is_wrong():
    report = check(with_factors(w=lambda x, dz: Outer(x + 1, dz)), 0 * X)
    assert "no multiple of the right one" in rows_of(report)["params.w"]


@pytest.mark.parametrize("wrong", [L2, WRONG_LOSSES["twice"][0]], ids=["right", "wrong"])
@pytest.mark.parametrize("rows", [5, 0])
def test_a_loss_does_not_pass_where_nothing_was_tested(wrong, rows):
    report = fnn.check_loss(wrong, X[:rows], X[:rows], key=KEY)
    assert not report.passed
    assert NOTHING in str(report)


KINKS = np.array([[0, 1, -1], [2, 0, -3]], np.float32)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_a_number_at_a_kink_is_not_counted(slope):
    derivative = lambda x, y: jnp.where(x == 0, slope, (x > 0).astype(x.dtype))  # noqa: E731
    report = check(fnn.elementwise("relu", jax.nn.relu, derivative), KINKS)
    assert report.passed, report
    assert report.kinks == 2
    assert "2 numbers are at a kink" in str(report)


def test_a_layer_at_kinks_alone_was_not_tested():
    report = check(activations.relu, 0 * X)
    assert not report.passed
    assert NOTHING in str(report)
    assert "at a kink" in str(report)


def test_a_wrong_derivative_beside_a_kink_is_found():
    report = check(fnn.elementwise("relu", jax.nn.relu, lambda x, y: x), KINKS)
    for against in MEANS:
        assert any(rows_of(report, against).values())


def test_kinks_inside_a_net_are_not_counted():
    """A unit whose bias is 0 is at its kink in a row of zeros."""
    net = fnn.mlp((4, 6, 3), "relu")
    x = np.concatenate([X, 0 * X[:1]])
    report = fnn.check_layer(net, x, key=KEY)
    assert report.passed, report
    assert report.kinks > 0


def test_no_kink_is_mentioned_where_there_is_none():
    assert "kink" not in str(check(activations.relu))


def test_the_margin_of_a_hinge_is_a_kink():
    report = fnn.check_loss(
        losses.hinge_loss, np.array([[1.0, 0.5]]), np.array([[1.0, -1.0]]), key=KEY
    )
    assert report.passed, report
    assert report.kinks == 1


# ---------------------------------------------------------------- factors


def plain(params, x, dz):
    return Dense(x.T @ dz, dz.sum(0)), dz @ params.w.T


def ignores(params, x, dz, reduce=total):
    return plain(params, x, dz)


def ignores_once(params, x, dz, reduce=total):
    return Dense(reduce(Outer(x, dz)), dz.sum(0)), dz @ params.w.T


def no_batch(params, x, dz, reduce=total):
    return Dense(reduce(Outer(x, dz)), reduce(PerExample(dz.sum(0)[None]))), dz @ params.w.T


def other_factor(params, x, dz, reduce=total):
    w = reduce(Outer(x, dz if reduce is total else 3 * dz))
    return Dense(w, reduce(PerExample(dz))), dz @ params.w.T


def mean_in_batch(params, x, dz, reduce=total):
    spread = jnp.broadcast_to(dz.mean(0), dz.shape)
    return Dense(reduce(Outer(x, dz)), reduce(PerExample(spread))), dz @ params.w.T


CONTRACT = {  # backward, where the report says it, what it says
    "ignores reduce": (ignores, "params.w", ("by `reduce`", "reduce(PerExample(dy))")),
    "ignores it once": (ignores_once, "params.b", ("by `reduce`",)),
    "no batch axis": (no_batch, "params.b", ("shape (1, 4), expected (4, 4)",)),
    "another factor": (other_factor, "params.w", ("3 x the right one",)),
    "spread over the batch": (mean_in_batch, "params.b", ("coupled",)),
}


def test_a_backward_without_reduce_is_an_error_that_names_it():
    with pytest.raises(TypeError, match=r"`backward\(.*reduce\)`: .*4 were given"):
        check(with_backward(plain))


@pytest.mark.parametrize("name", CONTRACT)
def test_a_backward_that_breaks_the_contract_of_reduce_fails(name):
    """Its gradient is right: only what is computed from factors would fail, and later."""
    backward, path, words = CONTRACT[name]
    report = check(with_backward(backward))
    assert not any(rows_of(report).values())
    assert not report.passed
    (hint,) = {leaf.hint for leaf in report.leaves if leaf.path == path and leaf.hint}
    for word in words:
        assert word in hint
    others = [leaf.path for leaf in report.leaves if leaf.hint and leaf.path != path]
    assert others == (["params.b"] if name == "ignores reduce" else [])


def test_a_layer_that_couples_its_examples_fails():
    def forward(params, x):
        return x - jnp.broadcast_to(x.mean(0), x.shape), ()

    def backward(params, residuals, dy, reduce=total):
        return (), dy - jnp.broadcast_to(dy.mean(0), dy.shape)

    report = check(Layer("centre", lambda key: (), forward, backward))
    assert not any(rows_of(report).values())
    assert "coupled" in rows_of(report, "examples alone")["dx"]


def test_whole_numbers_in_the_params_are_refused():
    params = Dense(np.ones((4, 4), np.float32), np.ones(4, np.int32))
    with pytest.raises(TypeError, match=r"`params\.b` must hold floating-point numbers, got int32"):
        check(DENSE, params=params)
    with pytest.raises(TypeError, match=r"`params\[0\]\.b` must hold floating-point numbers"):
        fnn.compare_gradients(fnn.serial(DENSE), L2, (params,), X, T)


# ---------------------------------------------------------------- compare_gradients

NO_MASK = dataclasses.replace(
    activations.relu, backward=lambda params, residuals, dy, reduce=total: ((), dy)
)
BROKEN = {  # the net, and the arrays of the gradient that come out wrong
    "relu without its mask": (fnn.serial(DENSE, NO_MASK, DENSE), {"params[0].w", "params[0].b"}),
    "missing transpose": (
        fnn.serial(DENSE, with_backward(no_transpose)),
        {"params[0].w", "params[0].b"},
    ),
    "b forgotten": (fnn.serial(WRONG["b forgotten"][0], DENSE), {"params[0].b"}),
    "factor 2": (fnn.serial(DENSE, with_backward(twice)), {"params[1].w"}),
    "outer product the other way": (fnn.serial(with_backward(swapped), DENSE), {"params[0].w"}),
    "NaN": (fnn.serial(with_backward(not_a_number), DENSE), {"params[0].w"}),
    "inside repeat": (fnn.serial(DENSE, fnn.repeat(with_backward(twice), 2)), {"params[1].w"}),
    "shape": (
        fnn.serial(
            DENSE,
            with_backward(lambda p, x, dz, reduce=total: (Dense(x.T @ dz, dz.sum(1)), dz @ p.w.T)),
        ),
        {"params[1].b"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_net_fails_at_its_array(name):
    net, wrong = BROKEN[name]
    report = fnn.compare_gradients(net, L2, params_of(net), X, T)
    assert not report.passed
    assert {leaf.path for leaf in report.leaves if leaf.hint} == wrong
    assert "FAILED" in str(report)


def test_a_report_of_a_net_names_the_slip():
    net, _ = BROKEN["factor 2"]
    report = fnn.compare_gradients(net, L2, params_of(net), X, T)
    (leaf,) = (leaf for leaf in report.leaves if leaf.hint)
    assert leaf.hint.startswith("2 x the right one")
    assert leaf.relative_error == pytest.approx(1, rel=1e-6)
    assert not leaf.exact


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (fnn.mlp((4, 5, 4), "gelu"), L2),
        (fnn.serial(DENSE, fnn.repeat(fnn.residual(fnn.mlp((4, 4, 4))), 3)), losses.log_cosh),
    ],
    ids=["mlp", "repeat"],
)
def test_a_right_net_passes_with_a_row_for_every_array(net, loss):
    params = params_of(net)
    report = fnn.compare_gradients(net, loss, params, X, T)
    assert report.passed, report
    assert report.tolerance == TOLERANCES["float32"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [f"params{jax.tree_util.keystr(path)}" for path, _ in leaves]
    assert [leaf.path for leaf in report.leaves] == paths
    assert [leaf.shape for leaf in report.leaves] == [leaf.shape for _, leaf in leaves]
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(paths)]] == paths
    assert lines[0] == "gradient by hand: passed"


def test_the_report_has_the_compiled_cost():
    net = fnn.mlp((4, 3, 4))
    report = fnn.compare_gradients(net, L2, params_of(net), X, T)
    assert report.manual.flops > 0
    assert report.automatic.bytes_accessed > 0
    assert "jax.grad: Cost(flops=" in str(report)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_tolerance_is_that_of_the_dtype(dtype):
    good, bad = fnn.mlp((4, 5, 4), "tanh"), fnn.serial(DENSE, with_backward(twice))
    with jax.enable_x64(dtype == "float64"):
        reports = [
            fnn.compare_gradients(net, L2, *cast((params_of(net), X, T), jnp.dtype(dtype)))
            for net in (good, bad)
        ]
    assert [report.passed for report in reports] == [True, False]
    assert reports[0].tolerance == TOLERANCES[dtype]


def test_float64_params_without_x64_have_the_tolerance_of_float32():
    net = fnn.mlp((4, 5, 4), "tanh")
    report = fnn.compare_gradients(net, L2, *cast((params_of(net), X, T), np.float64))
    assert report.passed, report
    assert report.tolerance == TOLERANCES["float32"]


def slightly_off(error):
    return fnn.serial(with_factors(w=lambda x, dz: Outer(x * (1 + error), dz)))


@pytest.mark.parametrize(("tolerance", "passes"), [(2e-3, True), (5e-4, False), (0.0, False)])
def test_the_tolerance_can_be_set(tolerance, passes):
    net = slightly_off(1e-3)
    report = fnn.compare_gradients(net, L2, params_of(net), X, T, tolerance=tolerance)
    assert report.passed == passes
    assert report.tolerance == tolerance


def test_the_weights_are_those_of_the_loss():
    def backward(params, x, dz, reduce=total):
        return DENSE.backward(params, jnp.where(x == 5, -x, x), dz, reduce)

    net, bad = fnn.serial(with_backward(backward)), X.copy()
    bad[[1, 4]] = 5  # of weight 0
    weights = np.array([1, 0, 2, 0.5, 0], np.float32)
    for w in (None, weights):
        report = fnn.compare_gradients(net, L2, params_of(net), bad, T, weights=w)
        assert report.passed == (w is not None)


def test_where_both_gradients_cancel_float64_decides():
    """Softmax that has nearly learnt its labels.

    P - t is rounding in both, and the one by hand must be no worse than `jax.grad`.
    """
    net, labels = fnn.serial(DENSE), np.arange(5) % 4
    x = np.eye(4, dtype=np.float32)[labels] + 0.01 * X
    params = (Dense(w=np.float32(14) * np.eye(4, dtype=np.float32), b=np.zeros(4, np.float32)),)
    loss = losses.softmax_cross_entropy_with_integer_labels
    # no float32 result is that close
    report = fnn.compare_gradients(net, loss, params, x, labels, tolerance=1e-12)
    asked = [leaf for leaf in report.leaves if leaf.relative_error > report.tolerance]
    assert asked
    for leaf in asked:
        manual, automatic = leaf.against_float64
        assert 0 < automatic < 0.1
        assert manual <= 2 * automatic
    assert report.passed
    assert "twice as far from the gradient in float64" in str(report).replace("\n", " ")
    assert not fnn.compare_gradients(slightly_off(0.5), loss, params, x, labels).passed


def test_nan_in_both_gradients_does_not_pass():
    net = fnn.mlp((4, 3, 4))
    report = fnn.compare_gradients(net, L2, params_of(net), X * np.nan, T)
    assert not report.passed
    assert "NaN" in hints_of(report)


def test_a_gradient_of_0_agrees_with_one_of_0():
    net = fnn.mlp((4, 3, 4), "relu")
    params = jax.tree.map(np.zeros_like, params_of(net))
    report = fnn.compare_gradients(net, L2, params, X, T)
    assert report.passed, report


def test_a_wrong_derivative_at_a_coordinate_that_is_0_is_found():
    def slope(x):
        return jnp.where(x == 0, 2.0, 1.0).astype(x.dtype)

    @jax.custom_jvp
    def same(x):
        return x

    same.defjvp(lambda x, t: (x[0], slope(x[0]) * t[0]))
    layer = fnn.elementwise("same", same, lambda x, y: slope(x))
    assert check(layer, X).passed
    x = X.copy()
    x[0, 0] = 0
    assert not check(layer, x).passed
