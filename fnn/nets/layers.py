"""Layers with parameters.

Every layer takes `x` as `[..., features]` and stores weights as `[in, out]`, so `z = x @ w + b`.
(The lectures write W A + b with samples as columns; `w` is their W transposed.) `backward` builds
one factor per parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import he_normal, normal, ones, zeros
from jaxtyping import Float

from fnn import _validate
from fnn.factors import Outer, PerExample, Scatter, total, widen
from fnn.types import Array, ArrayLike, Key, Layer, by_recipe, storable

Initializer = Callable[..., Array]  # (key, shape) -> array, as in jax.nn.initializers


@storable
class Dense(NamedTuple):
    """Parameters of `dense`, or their gradients."""

    w: Any  # [in, out]
    b: Any  # [out]; None without a bias


@storable
class Norm(NamedTuple):
    """Parameters of `layer_norm` and `rms_norm`, or their gradients."""

    scale: Any  # [features]
    bias: Any  # [features]; None for rms_norm


@storable
class Embedding(NamedTuple):
    """Parameters of `embedding`, or their gradients."""

    w: Any  # [size, features]


@by_recipe
def dense(
    in_features: int,
    out_features: int,
    *,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer[Dense]:
    """Fully-connected layer, `z = x @ w + b`.

    Args:
        in_features: width of `x`, at least 1.
        out_features: number of units, at least 1.
        kernel_init: `(key, (in, out)) -> w`; any of `jax.nn.initializers`.
        bias_init: `(key, (out,)) -> b`; None for a layer without a bias.

    Returns:
        A layer from `[..., in]` to `[..., out]` with `params = Dense(w=[in, out], b=[out])`.

    Raises:
        TypeError, ValueError: a size is no whole number above 0; at the call, `x` or `params` do
            not fit.

    Source: lecture 004, eqs 21 and 25-27 (columns there, rows here).

    >>> layer = dense(3, 2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 3))).shape
    (5, 2)
    """
    _validate.positive("in_features", in_features, whole=True)
    _validate.positive("out_features", out_features, whole=True)
    name = f"dense({in_features}, {out_features})"
    shapes = Dense((in_features, out_features), (out_features,))
    _validate.is_function("kernel_init", kernel_init, "(key, shape) -> array")
    if bias_init is None:
        shapes = Dense(shapes.w, None)
    else:
        _validate.is_function("bias_init", bias_init, "(key, shape) -> array, or None")

    def init(key):
        _validate.is_key("key", key)
        w_key, b_key = jax.random.split(key)
        b = draw_param("bias_init", bias_init, b_key, shapes.b)
        return Dense(draw_param("kernel_init", kernel_init, w_key, shapes.w), b)

    def forward(params, x):
        x = _check(name, shapes, params, x, in_features)
        z = x @ params.w
        if params.b is not None:
            z = z + as_rows(params.b, z)
        return z, x

    def backward(params, x, dz, reduce=total):
        # dw = x^T dz, db = sum over the batch of dz, dx = dz w^T
        bias = PerExample(sum_positions(dz))
        weight = Outer(_with_batch(x), _with_batch(dz))
        b = None if params.b is None else reduce(bias)
        return Dense(reduce(weight), b), dz @ params.w.T

    return Layer(name, init, forward, backward)


@by_recipe
def layer_norm(features: int, *, epsilon: float = 1e-6) -> Layer[Norm]:
    """Layer normalisation over the last axis.

        y = (x - mean) / sqrt(variance + epsilon) * scale + bias

    Args:
        features: width of `x`, at least 1.
        epsilon: added to the variance; keeps a row of equal numbers finite.

    Returns:
        A layer on `[..., features]` with `params = Norm(scale=[features], bias=[features])`.

    Source: Ba, Kiros, Hinton (2016), arXiv:1607.06450.

    >>> layer = layer_norm(2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([[1.0, 3.0]])).round(3)
    Array([[-1.,  1.]], dtype=float32)
    """
    return _norm("layer_norm", features, epsilon, centre=True)


@by_recipe
def rms_norm(features: int, *, epsilon: float = 1e-6) -> Layer[Norm]:
    """Root-mean-square normalisation over the last axis.

        y = x / sqrt(mean(x^2) + epsilon) * scale

    Args:
        features: width of `x`, at least 1.
        epsilon: added to the mean square; keeps a row of zeros finite.

    Returns:
        A layer on `[..., features]` with `params = Norm(scale=[features], bias=None)`.

    Source: Zhang, Sennrich (2019), arXiv:1910.07467.

    >>> layer = rms_norm(2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([[3.0, 3.0]])).round(3)
    Array([[1., 1.]], dtype=float32)
    """
    return _norm("rms_norm", features, epsilon, centre=False)


@by_recipe
def embedding(
    size: int,
    features: int,
    *,
    init: Initializer = normal(1.0),
) -> Layer[Embedding]:
    """A table of vectors, looked up by whole numbers: `y = w[x]`.

    It comes first in a net, since whole numbers have no gradient.

    Args:
        size: rows of the table, at least 1. `x` is in 0 ... size - 1; other numbers give a row of
            NaN, in the outputs and in the gradient.
        features: width of a row, at least 1.
        init: `(key, (size, features)) -> w`.

    Returns:
        A layer from whole numbers `[...]` to `[..., features]` with
        `params = Embedding(w=[size, features])`. Its `dx` is None.

    >>> layer = embedding(27, 4)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([[1, 2, 3]])).shape
    (1, 3, 4)
    """
    _validate.positive("size", size, whole=True)
    _validate.positive("features", features, whole=True)
    _validate.is_function("init", init, "(key, shape) -> array")
    name = f"embedding({size}, {features})"
    shapes = Embedding((size, features))

    def draw(key):
        _validate.is_key("key", key)
        return Embedding(draw_param("init", init, key, shapes.w))

    def forward(params, x):
        _validate.is_array("x", x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            mend = "Convert it: `x.astype(jnp.int32)`."
            raise TypeError(f"{name}: `x` must hold whole numbers, got {x.dtype}. {mend}")
        _validate.fits("x", x)
        check_params(name, shapes, params)
        index = _valid_index(jnp.asarray(x), size)
        rows = jnp.take(params.w, index, axis=0, mode="clip")
        valid = index >= 0
        return jnp.where(valid[..., None], rows, jnp.nan), index

    def backward(params, index, dy, reduce=total):
        index = jnp.atleast_1d(index)
        dy = dy.reshape(*index.shape, features)
        valid = index >= 0
        dy = jnp.where(valid[..., None], dy, jnp.nan)  # the NaN goes to the first row
        w = reduce(Scatter(jnp.maximum(index, 0), dy, size))
        return Embedding(w), None

    return Layer(name, draw, forward, backward)


def _norm(kind, features, epsilon, *, centre):
    """`layer_norm`, and without the centring (and the bias that goes with it) `rms_norm`."""
    _validate.positive("features", features, whole=True)
    _validate.positive("epsilon", epsilon)
    name = f"{kind}({features})"
    shapes = Norm((features,), (features,) if centre else None)

    def init(key):
        _validate.is_key("key", key)
        scale = ones(key, shapes.scale)
        bias = zeros(key, shapes.bias) if centre else None
        return Norm(scale, bias)

    def forward(params, x):
        x = _check(name, shapes, params, x, features)
        wide = widen(x)
        if centre:
            wide = wide - wide.mean(-1, keepdims=True)
        square = (wide * wide).mean(-1, keepdims=True)
        r = lax.rsqrt(square + epsilon)
        n = (wide * r).astype(params.scale.dtype)
        y = n * as_rows(params.scale, n)
        if centre:
            y = y + as_rows(params.bias, y)
        return y, (n, r)

    def backward(params, residuals, dy, reduce=total):
        # n = r (x - mean x), r = (variance + eps)^-1/2. With dn = dy * scale:
        # dx = r (dn - mean(dn) - n mean(dn n))
        n, r = residuals
        dn = (dy * as_rows(params.scale, dy)).astype(r.dtype)
        wide = n.astype(r.dtype)
        dx = dn - wide * (dn * wide).mean(-1, keepdims=True)
        if centre:
            dx = dx - dn.mean(-1, keepdims=True)
        bias = reduce(PerExample(sum_positions(dy))) if centre else None
        scale = reduce(PerExample(sum_positions(dy * n)))
        return Norm(scale, bias), (r * dx).astype(dy.dtype)

    return Layer(name, init, forward, backward)


def _valid_index(x, size):
    """Whole numbers as int32, -1 for what is not in 0 ... size - 1."""
    if x.dtype.itemsize < 4:  # int8 does not hold a size of 300
        x = x.astype(jnp.int32)
    valid = (x >= 0) & (x < size)
    return jnp.where(valid, x, -1).astype(jnp.int32)


def _with_batch(v):
    """`[features]` as a batch of one."""
    return v[None] if v.ndim == 1 else v


def sum_positions(dy: Float[Array, "*axes features"]) -> Float[Array, "batch features"]:
    """`[batch, ..., features]` to `[batch, features]`, and `[features]` to `[1, features]`."""
    if dy.ndim <= 2:
        return _with_batch(dy)
    return dy.sum(range(1, dy.ndim - 1))


def as_rows(
    v: Float[ArrayLike, " features"], like: Float[Array, "*axes features"]
) -> Float[Array, "*axes features"]:
    """`[features]` as `[..., features]`: rank promotion may be "raise"."""
    return jnp.broadcast_to(v, like.shape)


def _check(name, shapes, params, x, features):
    """`x` as an array; raises unless it and the params fit a layer of floating-point numbers."""
    if isinstance(x, jax.Array) and x.shape[-1:] == (features,) and _fit(shapes, params, x.dtype):
        return x
    _validate.is_float("x", x)
    x = jnp.asarray(x)
    check_params(name, shapes, params)
    if x.shape[-1:] != (features,):
        raise ValueError(
            f"{name}: `x` has shape {x.shape}, expected [..., {features}]. "
            "Samples as columns? Pass `x.T`. Images? Flatten them to rows."
        )
    _validate.same_dtype("x", x, params._fields[0], params[0])
    return x


def _fit(shapes, params, dtype):
    """Whether `params` is a NamedTuple of JAX's arrays of these shapes, all of this float dtype."""
    if type(params) is not type(shapes) or not jnp.issubdtype(dtype, jnp.floating):
        return False
    for leaf, shape in zip(params, shapes, strict=True):
        if leaf is None and shape is None:
            continue
        if not isinstance(leaf, jax.Array) or leaf.shape != shape or leaf.dtype != dtype:
            return False
    return True


def check_params(name: str, shapes: Any, params: Any) -> None:
    """Raises unless `params` is a NamedTuple of arrays of these shapes and of one dtype."""
    if not isinstance(params, type(shapes)):
        kind = type(shapes).__name__
        came = type(params).__name__
        raise ValueError(f"{name}: `params` must be {kind}, got {came}. Params of another net?")
    for field, leaf, shape in zip(shapes._fields, params, shapes, strict=True):
        if leaf is not None:
            _validate.is_float(field, leaf)
            _validate.same_dtype(field, leaf, shapes._fields[0], params[0])
        if getattr(leaf, "shape", None) != shape:
            _explain_shape(name, field, leaf, shape)


def _explain_shape(name, field, leaf, shape):
    """Raises the error of a parameter that is not of this shape."""
    came = "is None" if leaf is None else f"has shape {leaf.shape}"
    expected = f"shape {shape}"
    mend = "Params of another net?"
    if shape is None:
        expected = f"None: this layer has no `{field}`"
    elif leaf is not None and leaf.shape == (*shape[:-3:-1], *shape[:-2]):  # PyTorch's order
        expected, mend = _explain_order(field, shape)
    raise ValueError(f"{name}: `{field}` {came}, expected {expected}. {mend}")


def _explain_order(field, shape):
    """The order of axes of a weight, and how to come to it from PyTorch's."""
    if len(shape) == 2:
        return f"[in, out] = {shape}", f"Stored [out, in]? Pass `{field}.T`."
    order = *range(2, len(shape)), 1, 0
    mend = f"Stored [out, in, ...]? Pass `{field}.transpose{order}`."
    return f"[*window, in, out] = {shape}", mend


def draw_param(
    name: str, initializer: Initializer | None, key: Key, shape: tuple[int, ...] | None
) -> Any:
    """What the initialiser gives, of the right shape; None without a shape."""
    if initializer is None or shape is None:
        return None
    leaf = initializer(key, shape)
    if getattr(leaf, "shape", None) == shape:
        return leaf
    came = f"{leaf!r:.80}"
    if hasattr(leaf, "shape"):
        came = f"shape {leaf.shape}"
    mend = ""
    if callable(leaf):
        mend = " A factory, such as `he_normal`? Call it: `he_normal()`."
    raise ValueError(f"`{name}` must return an array of shape {shape}, got {came}.{mend}")
