"""Convolution, pooling and `flatten`, and the factor of a kernel: against JAX's own derivatives."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cast, largest_array
from jax import lax

import fnn
from fnn import conv, conv_transpose, flatten, max_pool, mean_pool, per_example, rules
from fnn.factors import Conv, Window, keep
from fnn.nets.activations import relu, tanh

IMAGES = ("NHWC", "HWIO", "NHWC")
CONVS = {  # a layer, and the shape of an image for it
    "same": (conv(2, 3, (3, 3)), (4, 5, 2)),
    "uneven window, stride": (conv(2, 3, (3, 2), strides=2, bias_init=None), (5, 4, 2)),
    "groups, dilation, stride": (
        conv(2, 4, (2, 3), strides=(2, 1), dilation=(1, 2), groups=2, padding="VALID"),
        (6, 7, 2),
    ),
    "depthwise": (conv(3, 6, (2, 2), groups=3), (3, 3, 3)),
    "one axis, pairs": (conv(2, 2, (3,), strides=2, padding=((1, 2),)), (6, 2)),
    "stride over window": (conv(1, 2, (2, 2), strides=3, padding="VALID"), (6, 7, 1)),
    "padding over window": (conv(1, 2, (2, 2), padding=((3, 0), (0, 4))), (2, 2, 1)),
    "one pixel": (conv(2, 3, (3, 3)), (1, 1, 2)),
    "window of one": (conv(3, 2, (1, 1)), (3, 3, 3)),
    "few positions": (conv(8, 9, (2, 2), padding="VALID"), (3, 2, 8)),  # through Gram matrices
    "transposed": (conv_transpose(2, 3, (3, 2), strides=(2, 1), output_size=(5, 4)), (3, 4, 2)),
    "transposed, groups, dilation": (
        conv_transpose(4, 2, (3, 2), dilation=(1, 2), strides=2, groups=2, padding="VALID"),
        (2, 3, 4),
    ),
    "transposed, pairs": (conv_transpose(2, 1, (3,), strides=2, padding=((4, 1),)), (4, 2)),
}
POOLS = {
    "max": (max_pool((2, 2)), (5, 6, 2)),
    "max, overlap": (max_pool((3, 2), (2, 1), "SAME"), (4, 5, 2)),
    "max, pairs": (max_pool((3, 2), 2, ((2, 1), (0, 1))), (4, 5, 1)),
    "max, one axis": (max_pool((2,), 3), (8, 2)),
    "mean": (mean_pool((2, 2)), (5, 6, 2)),
    "mean, overlap": (mean_pool((3, 2), (2, 1), "SAME"), (4, 5, 2)),
    "mean, one axis": (mean_pool((3,), 1, ((1, 2),)), (4, 2)),
    "flatten": (flatten(), (2, 3, 2)),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def params_of(layer, seed=0):
    """Random numbers for every parameter, biases too."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    found = [normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return structure.unflatten(found)


def answers(f, other, weights, shares):
    """All that a factor answers."""
    fast = f.fast_squared_norm()
    return {
        "total": f.total(),
        "scaled": f.scaled(weights).total(),
        "materialise": f.materialise(),
        "squared_norm": f.squared_norm(),
        "fast": fast.value,
        "parts": fast.parts,
        "inner": f.inner(other),
        "exact_total": f.exact_total(weights),
        "moments": f.moments(shares),
        "project": fnn.factors.base.project(f, other.total()),
    }


def written_out(g, other, weights, shares, parts):
    """The same from the gradients of the examples `[batch, ...]`."""
    rows = g.reshape(len(g), -1)
    mean = jnp.tensordot(shares, g, 1)
    gaps = (g - jnp.broadcast_to(mean, g.shape)) ** 2
    weighted = jnp.tensordot(weights, g, 1)
    return {
        "total": g.sum(0),
        "scaled": weighted,
        "materialise": g,
        "squared_norm": (rows**2).sum(1),
        "fast": (rows**2).sum(1),
        "parts": parts,
        "inner": rows @ other.reshape(len(g), -1).T,
        "exact_total": weighted,
        "moments": (mean, jnp.tensordot(shares, gaps, 1)),
        "project": rows @ other.sum(0).ravel(),
    }


def assert_close(found, truth):
    assert jax.tree.structure(found) == jax.tree.structure(truth)
    for (path, ours), true in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(truth), strict=True
    ):
        np.testing.assert_allclose(
            ours, true, rtol=1e-12, atol=1e-12, err_msg=str(path), strict=True
        )


def some_weights(batch):
    weights = normal(batch, seed=7)
    return weights, jax.nn.softmax(weights)


def squares_of_products(gradient, dz):
    """The squared norm of what each number of space in `dz` alone gives, summed."""
    features = dz.shape[-1]
    positions = dz.reshape(-1, features)
    one_hot = jnp.eye(len(positions))
    parts = jax.vmap(lambda row: gradient((row[:, None] * positions).reshape(dz.shape)))(one_hot)
    return (parts**2).sum()


@pytest.mark.parametrize("name", CONVS)
def test_gradients_and_their_statistics_are_those_of_jax_grad(x64, name):
    layer, shape = CONVS[name]

    @jax.jit
    def both(params, x, other_x):
        def of(x):
            y, residuals = layer.forward(params, x)
            return residuals, jnp.cos(y) + 2

        def example(x, dy):
            pull = jax.vjp(layer.apply, params, x[None])[1]
            return pull(dy[None])

        def parts(x, dy):
            pull = jax.vjp(lambda w: layer.apply(params._replace(w=w), x[None]), params.w)[1]
            return squares_of_products(lambda dy: pull(dy[None])[0], dy)

        residuals, dy = of(x)
        other_residuals, other_dy = of(other_x)
        ours, dx = layer.backward(params, residuals, dy, keep)
        others, _ = layer.backward(params, other_residuals, other_dy, keep)
        theirs, their_dx = jax.vmap(example)(x, dy)
        their_others, _ = jax.vmap(example)(other_x, other_dy)
        weights = some_weights(len(x))
        found = answers(ours.w, others.w, *weights)
        truth = written_out(theirs.w, their_others.w, *weights, jax.vmap(parts)(x, dy))
        b = None if ours.b is None else ours.b.materialise()
        return (found, b, dx), (truth, theirs.b, their_dx[:, 0])

    assert_close(*both(params_of(layer), normal(3, *shape), normal(3, *shape, seed=1)))


@pytest.mark.parametrize("name", ["same", "groups, dilation, stride", "one axis, pairs"])
def test_forward_is_the_convolution_of_jax(x64, name):
    layer, shape = CONVS[name]
    settings = {
        "same": {"window_strides": (1, 1), "padding": "SAME"},
        "groups, dilation, stride": {
            "window_strides": (2, 1),
            "padding": "VALID",
            "rhs_dilation": (1, 2),
            "feature_group_count": 2,
        },
        "one axis, pairs": {"window_strides": (2,), "padding": ((1, 2),)},
    }[name]
    numbers = IMAGES if len(shape) == 3 else ("NWC", "WIO", "NWC")
    params, x = params_of(layer), normal(3, *shape)
    z = lax.conv_general_dilated(x, params.w, dimension_numbers=numbers, **settings)
    assert_close(layer.apply(params, x), z + jnp.broadcast_to(params.b, z.shape))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_transposed_convolution_is_that_of_jax(x64, stride, padding):
    layer = conv_transpose(2, 3, (3,), strides=stride, padding=padding, bias_init=None)
    params, x = params_of(layer), normal(2, 5, 2)
    numbers = "NWC", "WIO", "NWC"
    truth = lax.conv_transpose(x, params.w, (stride,), padding, dimension_numbers=numbers)
    assert_close(layer.apply(params, x), truth)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))])
def test_a_transposed_convolution_is_the_transpose_of_one(x64, padding):
    """`<conv(x), y> = <x, conv_transpose(y)>` where the kernel of one is that of the other, turned.

    Also where strides leave the last rows of an image out.
    """
    settings = {"strides": (2, 3), "dilation": (2, 1), "padding": padding, "bias_init": None}
    down = conv(2, 3, (3, 2), **settings)
    up = conv_transpose(3, 2, (3, 2), output_size=(8, 9), **settings)
    params, x = params_of(down), normal(2, 8, 9, 2)
    y = down.apply(params, x)
    back = up.apply(params._replace(w=jnp.flip(params.w, (0, 1)).swapaxes(2, 3)), y)
    np.testing.assert_allclose((back * x).sum(), (y * y).sum(), rtol=1e-12)


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_has_the_gradient_of_jax_grad(x64, name):
    """Whole numbers, so that there are ties; several windows may share a number."""
    layer, shape = POOLS[name]
    x = jnp.round(2 * normal(3, *shape))

    @jax.jit
    def both(x):
        y, residuals = layer.forward((), x)
        truth, pull = jax.vjp(lambda x: reference(name, x), x)
        dy = jnp.cos(y) + 2
        return (y, layer.backward((), residuals, dy)[1]), (truth, *pull(dy))

    assert_close(*both(x))


def reference(name, x):
    """A pool by `lax.reduce_window`."""
    window, strides, padding = {
        "max": ((2, 2), (2, 2), "VALID"),
        "max, overlap": ((3, 2), (2, 1), "SAME"),
        "max, pairs": ((3, 2), (2, 2), ((2, 1), (0, 1))),
        "max, one axis": ((2,), (3,), "VALID"),
        "mean": ((2, 2), (2, 2), "VALID"),
        "mean, overlap": ((3, 2), (2, 1), "SAME"),
        "mean, one axis": ((3,), (1,), ((1, 2),)),
        "flatten": ((), (), ()),
    }[name]
    if name == "flatten":
        return x.reshape(len(x), -1)
    if not isinstance(padding, str):
        padding = ((0, 0), *padding, (0, 0))
    start, join = (-np.inf, lax.max) if "max" in name else (0.0, lax.add)
    y = lax.reduce_window(x, start, join, (1, *window, 1), (1, *strides, 1), padding)
    return y if "max" in name else y / math.prod(window)


CHECKED = "groups, dilation, stride", "transposed", "max, overlap", "mean", "flatten"


@pytest.mark.parametrize("name", CHECKED)
def test_check_layer_passes(x64, name):
    layer, shape = (CONVS | POOLS)[name]
    report = fnn.check_layer(layer, normal(2, *shape), key=jax.random.key(0))
    assert report.passed, report


def test_a_window_with_nan_gives_nan():
    x = jnp.ones((1, 4, 1)).at[0, 1].set(jnp.nan)
    y, residuals = max_pool((2,)).forward((), x)
    _, dx = max_pool((2,)).backward((), residuals, jnp.ones_like(y))
    np.testing.assert_array_equal(y.ravel(), [np.nan, 1])
    np.testing.assert_array_equal(dx.ravel(), [1, 0, 1, 0])


CASES = {  # of `lax.conv_general_dilated` for one example: x, kernel, axes, settings
    "two uses": ((2, 4, 4, 3), (2, 2, 3, 2), IMAGES, {"padding": "VALID"}),
    "gaps in x": (
        (1, 3, 3, 2),
        (2, 3, 2, 2),
        IMAGES,
        {"padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 3)},
    ),
    "padding that cuts": ((1, 6, 6, 1), (2, 2, 1, 2), IMAGES, {"padding": ((-1, 0), (0, -2))}),
    "three axes, channels first": (
        (1, 2, 3, 4, 3),
        (3, 2, 2, 2, 2),
        ("NCDHW", "OIDHW", "NCDHW"),
        {"padding": "VALID", "window_strides": (1, 2, 1)},
    ),
}


def kernel_window(conv_of, w, x, dy):
    """The window of the equation by which JAX has the gradient of a kernel."""
    jaxpr = jax.make_jaxpr(lambda w, x, dy: jax.vjp(lambda w: conv_of(w, x), w)[1](dy))(w, x, dy)
    p = jaxpr.eqns[-1].params
    return Window(
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        tuple(p["dimension_numbers"]),
        p["batch_group_count"],
    )


@pytest.mark.parametrize("name", CASES)
def test_the_factor_takes_whatever_equation_jax_has_for_a_kernel(x64, name):
    x_shape, w_shape, axes, settings = CASES[name]
    settings = {"window_strides": (1,) * (len(x_shape) - 2)} | settings
    w, x, other = normal(*w_shape), normal(3, *x_shape), normal(3, *x_shape, seed=1)

    def conv_of(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=axes, **settings)

    shape = jax.eval_shape(conv_of, w, x[0]).shape
    dz = normal(3, *shape, seed=2)
    window = kernel_window(conv_of, w, x[0], dz[0])

    @jax.jit
    def both(x, other, dz):
        def example(x, dz):
            return jax.vjp(lambda w: conv_of(w, x), w)[1](dz)[0]

        f, g = Conv(x, dz, window), Conv(other, dz[::-1], window)
        theirs, others = jax.vmap(example)(x, dz), jax.vmap(example)(other, dz[::-1])
        weights = some_weights(len(x))
        found = answers(f, g, *weights)
        truth = written_out(theirs, others, *weights, found["parts"])
        uses = jax.tree.map(lambda *arrays: jnp.stack(arrays), f, g)
        return (found, uses.merged().materialise()), (truth, theirs + others)

    assert_close(*both(x, other, dz))


def test_factors_of_kernels_in_another_order_have_inner_products(x64):
    x, dz = normal(3, 1, 4, 4, 2), normal(3, 1, 3, 3, 2, seed=1)
    images = (3, 0, 1, 2)
    orders = (images, images, (2, 3, 0, 1)), (images, images, (3, 2, 1, 0))
    pads = ((0, 0), (0, 0))
    ones = (1, 1)
    f, g = (Conv(x, dz, Window(ones, pads, ones, ones, order, 1)) for order in orders)
    assert f.shape == g.shape
    rows, others = (h.materialise().reshape(3, -1) for h in (f, g))
    assert_close(f.inner(g), rows @ others.T)


BLOCK = fnn.residual(fnn.serial(conv(2, 2, (3, 3)), tanh))
NET = fnn.serial(
    conv(1, 2, (2, 2), strides=2),
    relu,
    fnn.repeat(BLOCK, 2),
    fnn.iterate(BLOCK, 2),
    max_pool((2, 2), 1),
    flatten(),
    fnn.dense(4, 3),
)
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels
LABELS = jnp.array([0, 2, 1, 1])


def test_every_statistic_of_a_net_is_that_of_its_gradients(x64):
    source = fnn.source(NET, LOSS)

    @jax.jit
    def both(params, x):
        gradients = jax.vmap(
            lambda x, t: jax.grad(lambda p: LOSS.value(NET.apply(p, x[None]), t[None])[0])(params)
        )(x, LABELS)
        rows = jnp.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(gradients)], 1)
        norms = jnp.sqrt((rows**2).sum(1))
        scale = jnp.minimum(1, 0.5 / norms)
        clipped = jax.tree.map(lambda g: jnp.tensordot(scale, g, 1) / len(g), gradients)
        found = {
            "gradients": per_example.gradients(source)(params, x, LABELS),
            "norms": per_example.norms(source)(params, x, LABELS),
            "clipped": per_example.clipped_gradient(source, 0.5)(params, x, LABELS).gradient,
            "products": per_example.inner_products(source)(params, (x, LABELS), (x, LABELS)),
            "mean": fnn.value_and_grad(NET, LOSS)(params, x, LABELS)[1],
        }
        truth = {
            "gradients": gradients,
            "norms": norms,
            "clipped": clipped,
            "products": rows @ rows.T,
            "mean": jax.tree.map(lambda g: g.mean(0), gradients),
        }
        return found, truth

    assert_close(*both(params_of(NET), normal(4, 4, 6, 1)))


def kernel_factor(batch, size, window, inputs, outputs, dtype=float):
    """Of a convolution of square images without padding."""
    x = normal(batch, 1, size, size, inputs)
    dz = normal(batch, 1, size - window + 1, size - window + 1, outputs, seed=1)
    images = (3, 0, 1, 2)
    pads = ((0, 0), (0, 0))
    ones = (1, 1)
    numbers = images, images, (2, 3, 0, 1)
    return cast(Conv(x, dz, Window(ones, pads, ones, ones, numbers, 1)), dtype)


@pytest.mark.parametrize(
    ("size", "window", "inputs", "outputs"),
    [(8, 3, 16, 32), (4, 3, 40, 40), (4, 1, 64, 64)],
    ids=["offsets", "gram", "window of one"],
)
def test_norms_and_totals_form_neither_gradients_nor_patches(size, window, inputs, outputs):
    factor = kernel_factor(64, size, window, inputs, outputs)
    kernel = window**2 * inputs * outputs
    limit = 2 * max(factor.x.size, factor.dz.size, kernel)
    assert limit < 64 * kernel
    share = jnp.full(64, 1 / 64)
    for ask in (
        lambda f: f.total(),
        lambda f: f.squared_norm(),
        lambda f: f.fast_squared_norm(),
        lambda f: f.exact_total(share),
        lambda f: f.moments(share),
    ):
        assert largest_array(ask, factor) <= limit


def test_a_weight_of_zero_leaves_an_example_out_whatever_it_holds(x64):
    factor = kernel_factor(3, 3, 2, 2, 2)
    g = factor.materialise()
    broken = Conv(factor.x.at[1].set(jnp.nan), factor.dz, factor.window)
    hidden = Conv(factor.x, factor.dz.at[1].set(jnp.nan), factor.window)
    weights = jnp.array([0.5, 0.0, 0.5])
    mean = (g[0] + g[2]) / 2
    variance = ((g[0] - mean) ** 2 + (g[2] - mean) ** 2) / 2
    assert_close(hidden.scaled(weights).total(), mean)
    for f in (broken, hidden):
        assert_close(f.exact_total(weights), mean)
        assert_close(f.moments(weights), (mean, variance))


def test_factors_keep_their_dtype_and_squares_are_wide(x64):
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        factor = kernel_factor(2, 3, 2, 2, 2, dtype)
        least = "float64" if dtype == "float64" else "float32"
        ones = jnp.ones(2, least)
        found = jax.eval_shape(lambda f, ones=ones: answers(f, f, ones, ones), factor)
        for name in ("total", "materialise"):
            assert found[name].dtype == dtype, name
        for name in ("squared_norm", "fast", "parts", "inner", "exact_total", "project"):
            assert found[name].dtype == least, name


def test_norms_of_large_short_gradients_do_not_overflow():
    factor = kernel_factor(1, 5, 1, 1, 1, jnp.float16)
    large = Conv(jnp.full_like(factor.x, 30), jnp.full_like(factor.dz, 20), factor.window)
    assert_close(large.squared_norm(), jnp.array([15000.0**2], jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_agree_with_jax_grad_in_every_dtype(dtype):
    with jax.enable_x64(True):
        params, x = params_of(NET), normal(4, 4, 6, 1)
    params, x = cast((params, x), dtype)
    report = fnn.compare_gradients(NET, LOSS, params, x, LABELS)
    assert report.passed, report


def test_programs_of_nets_with_convolutions_run_under_vmap_and_for_any_batch(x64):
    norms = jax.jit(per_example.norms(fnn.source(NET, LOSS)))
    params, x = params_of(NET), normal(2, 4, 4, 6, 1)
    apart = jnp.stack([norms(params, part, LABELS) for part in x])
    assert_close(jax.jit(jax.vmap(norms, (None, 0, None)))(params, x, LABELS), apart)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = (
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params),
        jax.ShapeDtypeStruct((batch, 4, 6, 1), x.dtype),
        jax.ShapeDtypeStruct((batch,), LABELS.dtype),
    )
    program = jax.export.export(norms)(*shapes)
    assert_close(program.call(params, x[0], LABELS), apart[0])


def test_norms_of_a_convolution_have_derivatives(x64):
    layer = conv(1, 2, (2, 3), strides=2, dilation=2)
    square = fnn.Loss("square", lambda y, t: (y**2).sum((1, 2, 3)), lambda y, t: 2 * y)
    x, none = normal(2, 4, 5, 1), jnp.zeros(2)

    def by_hand(params):
        return per_example.norms(fnn.source(layer, square))(params, x, none).sum()

    def by_jax(params):
        def norm(x):
            g = jax.grad(lambda p: square.value(layer.apply(p, x[None]), none)[0])(params)
            return jnp.sqrt((g.w**2).sum() + (g.b**2).sum())

        return jax.vmap(norm)(x).sum()

    params = params_of(layer)
    assert_close(*(jax.jit(jax.grad(f))(params) for f in (by_hand, by_jax)))


KEY = jax.random.key(0)
IMAGE = jnp.ones((5, 6, 7, 3))
LAYER = conv(3, 4, (3, 2))
ERRORS = {
    "channels": (
        lambda: LAYER.apply(LAYER.init(KEY), IMAGE[..., :2]),
        r"conv\(3, 4, \(3, 2\)\): `x` has shape \(5, 6, 7, 2\), expected "
        r"\[batch, height, width, 3\]",
    ),
    "channels first": (
        lambda: LAYER.apply(LAYER.init(KEY), IMAGE.transpose(0, 3, 1, 2)),
        r"Channels first\? Pass `jnp.moveaxis\(x, 1, -1\)`",
    ),
    "no batch": (lambda: LAYER.apply(LAYER.init(KEY), IMAGE[0]), r"One image\? Pass `x\[None\]`"),
    "no channels": (
        lambda: conv(1, 2, (2, 2)).apply(conv(1, 2, (2, 2)).init(KEY), IMAGE[..., 0]),
        r"Without an axis of channels\? Pass `x\[..., None\]`",
    ),
    "rows": (
        lambda: LAYER.apply(LAYER.init(KEY), jnp.ones((5, 126))),
        r"Flat rows\? Reshape them",
    ),
    "one axis": (
        lambda: conv(3, 2, (2,)).apply(conv(3, 2, (2,)).init(KEY), IMAGE),
        r"expected \[batch, length, 3\]",
    ),
    "whole numbers": (
        lambda: LAYER.apply(LAYER.init(KEY), IMAGE.astype(int)),
        "floating-point numbers, got int32",
    ),
    "mixture of dtypes": (
        lambda: LAYER.apply(LAYER.init(KEY), IMAGE.astype(jnp.bfloat16)),
        "`x` is bfloat16 but `w` is float32",
    ),
    "small image": (
        lambda: max_pool((9, 2)).apply((), IMAGE),
        r"the window spans 9 along axis 1, which has 6 with its padding.*SAME",
    ),
    "params of a dense layer": (
        lambda: LAYER.apply(fnn.dense(3, 4).init(KEY), IMAGE),
        "`params` must be Kernel, got Dense",
    ),
    "kernel of PyTorch": (
        lambda: LAYER.apply(LAYER.init(KEY)._replace(w=jnp.ones((4, 3, 3, 2))), IMAGE),
        r"expected \[\*window, in, out\] = \(3, 2, 3, 4\).*Pass `w.transpose\(2, 3, 1, 0\)`",
    ),
    "params of a pool": (
        lambda: mean_pool((2, 2)).apply(jnp.ones(3), IMAGE),
        r"mean_pool\(\(2, 2\)\) has no parameters",
    ),
    "flatten one": (lambda: flatten().apply((), jnp.ones(3)), r"flatten: `x` has shape \(3,\)"),
    "number for a window": (
        lambda: conv(1, 1, 3),
        "`kernel_size` must be a tuple with a number for each",
    ),
    "three axes": (lambda: max_pool((2, 2, 2)), "`window` must be a tuple"),
    "strides of another length": (lambda: conv(1, 1, (3, 3), strides=(1,)), "`strides` must be"),
    "stride of zero": (lambda: max_pool((2, 2), (1, 0)), r"`strides\[1\]` must be a whole number"),
    "padding unknown": (lambda: conv(1, 1, (3,), padding="full"), "Unknown padding 'full'"),
    "padding of another length": (
        lambda: conv(1, 1, (3, 3), padding=((1, 1),)),
        "a tuple of 2 pairs",
    ),
    "padding below zero": (lambda: conv(1, 1, (3,), padding=((-1, 1),)), "at least 0"),
    "padding of triples": (lambda: conv(1, 1, (3,), padding=((1, 1, 1),)), "a tuple of 1 pairs"),
    "padding of a whole window": (
        lambda: max_pool((2,), padding=((2, 0),)),
        "`padding` must be smaller than `window`",
    ),
    "list for a window": (lambda: max_pool([2, 2]), "`window` must be a tuple"),
    "padding of lists": (lambda: conv(1, 1, (3,), padding=([1, 1],)), "a tuple of 1 pairs"),
    "groups": (lambda: conv(4, 6, (3,), groups=4), "are not both multiples of it"),
    "channels of zero": (lambda: conv(0, 6, (3,)), "`in_channels` must be a whole number"),
    "output of another size": (
        lambda: conv_transpose(1, 1, (3,), strides=2, output_size=9).apply(
            conv_transpose(1, 1, (3,)).init(KEY), jnp.ones((2, 4, 1))
        ),
        r"images of size \(9,\) give a convolution .* outputs of size \(5,\)",
    ),
    "no output": (
        lambda: conv_transpose(1, 1, (3,), padding=((2, 2),)).apply(
            conv_transpose(1, 1, (3,)).init(KEY), jnp.ones((2, 1, 1))
        ),
        r"images of size \(-1,\).*less padding",
    ),
    "output size of another length": (
        lambda: conv_transpose(1, 1, (3,), output_size=(4, 4)),
        "`output_size` must be one whole number",
    ),
    "initialiser": (
        lambda: conv(1, 2, (3,), kernel_init=lambda key, shape: jnp.ones(3)).init(KEY),
        r"`kernel_init` must return an array of shape \(3, 1, 2\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_invalid_argument_is_named(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_layers_of_equal_arguments_are_equal():
    assert conv(1, 2, (3, 3)) == conv(1, 2, (3, 3))
    assert conv(1, 2, (3, 3)) != conv(1, 2, (3, 3), strides=2)
    assert max_pool((2, 2)) == max_pool((2, 2))
    assert flatten() == flatten()


HIDDEN = (conv(1, 3, (3, 3), strides=2), tanh, conv(3, 2, (3, 2)), tanh, max_pool((2, 2)))
DEEP = fnn.serial(*HIDDEN, flatten(), fnn.dense(8, 4), tanh, fnn.dense(4, 3))
SHAPE = (8, 7, 1)  # of an image for `DEEP`


def classes(batch):
    """Images of three patterns with noise."""
    labels = jnp.arange(batch) % 3
    return normal(3, *SHAPE)[labels] + 0.3 * normal(batch, *SHAPE, seed=1), labels


def test_a_kernel_begins_a_block():
    chain = fnn.nets.blocks.blocks(DEEP)
    assert [len(block.layers) for block in chain.layers] == [2, 4, 2, 1]


RULES = {
    "backprop": rules.backprop,
    "feedback_alignment": rules.feedback_alignment,
    "weight_mirror": partial(rules.feedback_alignment, feedback="weight_mirror"),
    "direct_feedback_alignment": partial(rules.direct_feedback_alignment, input_shape=SHAPE),
    "target_propagation": rules.target_propagation,
    "forward_gradient": rules.forward_gradient,
    "node_perturbation": rules.node_perturbation,
    "extreme_learning": rules.extreme_learning,
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_learns_images(x64, name):
    rule = RULES[name](DEEP, LOSS)
    rate = 1.0 if name == "extreme_learning" else 0.2
    params, (x, labels) = cast(DEEP.init(KEY), float), classes(30)
    step = jax.jit(rule.value_and_grad)
    state = rule.init(KEY, params)
    first, _, _ = step(params, state, x, labels)
    for _ in range(30):
        value, grads, state = step(params, state, x, labels)
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
    assert value < 0.7 * first


def test_feedback_alignment_with_the_weights_is_backprop(x64):
    params, batch = params_of(DEEP), classes(4)
    rule = rules.feedback_alignment(DEEP, LOSS)

    @jax.jit
    def both(params, x, labels):
        _, grads, _ = rule.value_and_grad(params, params, x, labels)
        angles = fnn.alignment.delta_angles(rule, DEEP)(params, params, x, labels)
        return grads, fnn.value_and_grad(DEEP, LOSS)(params, x, labels)[1], angles

    grads, truth, angles = both(params, *batch)
    assert_close(grads, truth)
    np.testing.assert_allclose(angles, 0, atol=1e-4)


def test_direct_feedback_alignment_through_the_weights_of_the_last_layer_is_backprop(x64):
    """Of one hidden block, an image: its weights as B, in the shape of the image."""
    image = (3, 4, 2)
    net = fnn.serial(conv(1, 2, (2, 2), padding="VALID"), tanh, flat_dense(image, 3))
    params, (x, labels) = params_of(net), (normal(5, 4, 5, 1), jnp.arange(5) % 3)
    rule = rules.direct_feedback_alignment(net, LOSS, input_shape=(4, 5, 1))
    (b,) = rule.init(KEY, params)
    assert b.shape == (3, *image)
    state = (params[-1][1].w.T.reshape(3, *image),)
    _, grads, _ = jax.jit(rule.value_and_grad)(params, state, x, labels)
    assert_close(grads, jax.jit(fnn.value_and_grad(net, LOSS))(params, x, labels)[1])


def flat_dense(shape, outputs):
    """A dense layer on all numbers of an image, as one block."""
    inner = fnn.serial(flatten(), fnn.dense(math.prod(shape), outputs))
    return replace(inner, name="flat", split=None, join=None)


def test_a_mirror_of_noise_is_the_kernel(x64):
    """Also where the window meets padding, and where strides and groups leave numbers out."""
    layer = conv(4, 4, (3, 2), strides=2, groups=2)
    net = fnn.serial(conv(1, 4, (1, 1)), layer)
    params = cast(net.init(KEY), float)
    kind = rules.weight_mirror(0.5, noise=0.5)
    matrices, key = kind.init(net, KEY, params)
    step = jax.jit(partial(kind.step, net))
    found, _ = step((matrices, key), params, jnp.ones((20_000, 3, 4, 1)))
    estimate = 2 * found[1].w - matrices[1].w
    assert np.abs(estimate - params[1].w).max() < 0.05 < np.abs(matrices[1].w - params[1].w).max()
    assert_close(found[0], matrices[0])


def target_step(net, params, state=None):
    """`(value, grads, state)` of target propagation, and the `(value, grads)` of backprop."""
    rule, (x, labels) = rules.target_propagation(net, LOSS), classes(4)
    state = rule.init(KEY, params) if state is None else state
    truth = jax.jit(fnn.value_and_grad(net, LOSS))(params, x, labels)
    return jax.jit(rule.value_and_grad)(params, state, x, labels), truth


def test_with_one_hidden_block_target_propagation_is_backprop(x64):
    net = fnn.serial(conv(1, 2, (2, 2)), tanh, mean_pool((2, 2)), flatten(), fnn.dense(24, 3))
    (value, grads, _), truth = target_step(net, params_of(net))
    assert_close((value, grads), truth)


def turned(kernel):
    """The kernel of the transposed convolution, without a bias."""
    w = jnp.flip(kernel.w, (0, 1)).swapaxes(2, 3)
    return kernel._replace(w=w, b=jnp.zeros(w.shape[-1]))


def test_inverses_that_are_the_transposes_of_a_linear_net_make_it_backprop(x64):
    """Of blocks that pool and flatten too, and with a transposed convolution in the net."""
    net = fnn.serial(
        conv(1, 2, (2, 2)),
        conv(2, 3, (3, 2), strides=2),
        conv_transpose(3, 2, (2, 3), strides=2, output_size=(8, 7)),
        max_pool((3, 2), 2),
        mean_pool((2, 2)),
        flatten(),
        fnn.dense(2, 4),
        fnn.dense(4, 3),
    )
    params = params_of(net)
    state = rules.target_propagation(net, LOSS).init(KEY, params)
    dense = params[6]._replace(w=params[6].w.T, b=jnp.zeros(2))
    inverses = turned(params[1]), turned(params[2]), dense
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(
        jnp.shape, tuple((inverse, ()) for inverse in inverses)
    )
    state = state._replace(params=tuple((inverse, ()) for inverse in inverses))
    (value, grads, _), truth = target_step(net, params, state)
    assert_close((value, grads), truth)


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_inverses_of_convolutions_learn_at_any_size_of_activity(x64, size):
    """The images are almost constant, so that all numbers of a window push the same way."""
    net = fnn.serial(
        conv(1, 4, (2, 2)),
        conv(4, 4, (3, 3), strides=2, groups=2),
        mean_pool((2, 2)),
        flatten(),
        fnn.dense(16, 3),
    )
    params = jax.tree.map(lambda p: size * p, params_of(net))
    x, labels = 1 + 0.1 * normal(6, 8, 8, 1), jnp.arange(6) % 3
    rule = rules.target_propagation(net, LOSS, inverse_rate=0.9, noise_std=0.0)
    start = rule.init(KEY, params)
    inverse = conv_transpose(4, 4, (3, 3), strides=2, groups=2, output_size=(8, 8))

    def lost(state):
        h = net.layers[0].apply(params[0], x)
        y = net.layers[1].apply(params[1], h)
        pooled = mean_pool((2, 2)).apply((), y)
        placed = jnp.repeat(jnp.repeat(pooled, 2, 1), 2, 2) / 4
        return jnp.square(inverse.apply(state.params[0][0], placed) - h).sum() / jnp.square(h).sum()

    def turn(state, _):
        return rule.value_and_grad(params, state, x, labels)[2], lost(state)

    _, history = jax.jit(lambda state: lax.scan(turn, state, length=60))(start)
    assert (history[1:] <= history[:-1]).all()  # no step is too long
    assert history[-1] < 0.2 * history[0]


REFUSED = {
    "`input_shape` of direct_feedback_alignment must be the shape of one example": (
        lambda: rules.direct_feedback_alignment(DEEP, LOSS)
    ),
    "a tuple, got 28": lambda: rules.direct_feedback_alignment(DEEP, LOSS, input_shape=28),
    "`input_shape.1.` must be a whole": (
        lambda: rules.direct_feedback_alignment(DEEP, LOSS, input_shape=(28, 0))
    ),
    r"target_propagation: a hidden block is residual\(.*\), with a convolution inside": (
        lambda: rules.target_propagation(
            fnn.serial(conv(1, 2, (2, 2)), BLOCK, conv(2, 3, (1, 1))), LOSS
        )
    ),
    "pepita: hidden block 0 must begin with a dense layer": lambda: rules.pepita(DEEP, LOSS),
    "hebbian: hidden block 0 must begin with a dense layer": lambda: rules.hebbian(DEEP, LOSS),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_rule_names_what_it_cannot_train(message):
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()
