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
import numpy as np
from jax import lax
from jax.nn.initializers import he_normal, normal, ones, zeros

from fnn import _validate
from fnn.factors import Outer, PerExample, Scatter, sum_positions, total
from fnn.types import Array, Key, Layer, at_least_float32

Initializer = Callable[..., Array]  # (key, shape, dtype=...) -> array, as in jax.nn.initializers


class Dense(NamedTuple):
    """Parameters of `dense`, or their gradients."""

    w: Any  # [in, out]
    b: Any  # [out]; None without a bias


class Norm(NamedTuple):
    """Parameters of `layer_norm`, or their gradients."""

    scale: Any  # [features]
    bias: Any  # [features]; None for rms_norm


class Embedding(NamedTuple):
    """Parameters of `embedding`, or their gradients."""

    w: Any  # [size, features]


def dense(
    in_features: int,
    out_features: int,
    *,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer:
    """Fully-connected layer, `z = x @ w + b`.

    Args:
        in_features: width of `x`, at least 1.
        out_features: number of units, at least 1.
        kernel_init: `(key, (in, out)) -> w`; any of `jax.nn.initializers`.
        bias_init: `(key, (out,)) -> b`; None for a layer without a bias.

    Returns:
        A layer from `[..., in]` to `[..., out]` with `params = Dense(w=[in, out], b=[out])`.

    Raises:
        TypeError, ValueError: a size is not a whole number above 0; at the call, `x` or `params` do
            not fit.

    Source: lecture 004, eqs 21 and 25-27 (columns there, rows here).

    >>> layer = dense(3, 2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 3))).shape
    (5, 2)
    """
    _validate.positive("in_features", in_features, whole=True)
    _validate.positive("out_features", out_features, whole=True)
    name, shape = f"dense({in_features}, {out_features})", (in_features, out_features)
    bias_shape = None if bias_init is None else (out_features,)
    _validate.is_function("kernel_init", kernel_init, "(key, shape) -> array")
    if bias_init is not None:
        _validate.is_function("bias_init", bias_init, "(key, shape) -> array, or None")

    def init(key: Key) -> Dense:
        _validate.is_key("key", key)
        w_key, b_key = jax.random.split(key)
        b = None if bias_init is None else _drawn("bias_init", bias_init, b_key, shape[1:])
        return Dense(w=_drawn("kernel_init", kernel_init, w_key, shape), b=b)

    def forward(params: Dense, x: Array) -> tuple[Array, Array]:
        _check_dense(name, shape, bias_shape, params, x)
        x = jnp.asarray(x)
        z = x @ params.w
        return z if params.b is None else z + _as_rows(params.b, z), x

    def backward(params: Dense, x: Array, dz: Array, reduce: Any = total) -> tuple[Dense, Array]:
        # dw = x^T dz, db = sum over the batch of dz, dx = dz w^T
        b = None if params.b is None else reduce(PerExample(sum_positions(dz)))
        return Dense(w=reduce(Outer(x, dz)), b=b), dz @ params.w.T

    return Layer(name, init, forward, backward)


def layer_norm(features: int, *, epsilon: float = 1e-6) -> Layer:
    """Layer normalisation.

    `y = (x - mean) / sqrt(variance + epsilon) * scale + bias` over the last axis.

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


def rms_norm(features: int, *, epsilon: float = 1e-6) -> Layer:
    """Root-mean-square normalisation.

    `y = x / sqrt(mean(x^2) + epsilon) * scale` over the last axis.

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


def embedding(size: int, features: int, *, init: Initializer = normal(1.0)) -> Layer:
    """A table of vectors, looked up by whole numbers: `y = w[x]`.

    A first layer, since whole numbers have no gradient.

    Args:
        size: rows of the table, at least 1; `x` must be in 0 ... size - 1 (a row of NaN where it is
            not).
        features: width of a row, at least 1.
        init: `(key, (size, features)) -> w`.

    Returns:
        A layer from whole numbers `[...]` to `[..., features]` with `params = Embedding(w=[size,
        features])`. Its `dx` has dtype `float0`, as JAX's gradients with respect to whole numbers.

    >>> layer = embedding(27, 4)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([[1, 2, 3]])).shape
    (1, 3, 4)
    """
    _validate.positive("size", size, whole=True)
    _validate.positive("features", features, whole=True)
    _validate.is_function("init", init, "(key, shape) -> array")
    name, shape = f"embedding({size}, {features})", (size, features)

    def draw(key: Key) -> Embedding:
        _validate.is_key("key", key)
        return Embedding(w=_drawn("init", init, key, shape))

    def forward(params: Embedding, x: Array) -> tuple[Array, Array]:
        _validate.is_array("x", x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(
                f"{name}: `x` must hold whole numbers, got {x.dtype}. Convert it: `x.astype(jnp.int32)`."
            )
        _check_params(name, Embedding, params, (shape,))
        index = jnp.asarray(x).astype(jnp.int32)
        # else JAX would count it from the end
        index = jnp.where(index < 0, jnp.full_like(index, size), index)
        return jnp.take(params.w, index, axis=0, mode="fill"), index

    def backward(
        params: Embedding, x: Array, dy: Array, reduce: Any = total
    ) -> tuple[Embedding, Any]:
        index = jnp.atleast_1d(x)
        return Embedding(
            w=reduce(Scatter(index, dy.reshape(*index.shape, features), size))
        ), np.zeros(x.shape, jax.dtypes.float0)

    return Layer(name, draw, forward, backward)


def _norm(kind: str, features: int, epsilon: float, *, centre: bool) -> Layer:
    """`layer_norm`, and without the centring (and the bias that goes with it) `rms_norm`."""
    _validate.positive("features", features, whole=True)
    _validate.positive("epsilon", epsilon)
    name, shape = f"{kind}({features})", (features,)

    def init(key: Key) -> Norm:
        _validate.is_key("key", key)
        return Norm(scale=ones(key, shape), bias=zeros(key, shape) if centre else None)

    def forward(params: Norm, x: Array) -> tuple[Array, tuple[Array, Array]]:
        _validate.is_float("x", x)
        _check_params(name, Norm, params, (shape, shape if centre else None))
        _check_width(name, features, x)
        _validate.same_dtype("x", x, "scale", params.scale)
        wide = at_least_float32(jnp.asarray(x))
        if centre:
            wide = wide - wide.mean(-1, keepdims=True)
        r = lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
        n = (wide * r).astype(params.scale.dtype)
        y = n * _as_rows(params.scale, n)
        return (y + _as_rows(params.bias, y) if centre else y), (n, r)

    def backward(
        params: Norm, residuals: tuple[Array, Array], dy: Array, reduce: Any = total
    ) -> tuple[Norm, Array]:
        # n = r (x - mean x), r = (variance + eps)^-1/2. With dn = dy * scale: dx = r (dn - mean(dn)
        # - n mean(dn n))
        n, r = residuals
        dn = (dy * _as_rows(params.scale, dy)).astype(r.dtype)
        wide = n.astype(r.dtype)
        dx = dn - wide * (dn * wide).mean(-1, keepdims=True)
        if centre:
            dx = dx - dn.mean(-1, keepdims=True)
        bias = reduce(PerExample(sum_positions(dy))) if centre else None
        return Norm(scale=reduce(PerExample(sum_positions(dy * n))), bias=bias), (r * dx).astype(
            dy.dtype
        )

    return Layer(name, init, forward, backward)


def _as_rows(v: Array, like: Array) -> Array:
    """`[features]` as `[..., features]`, in so many words: rank promotion may be "raise"."""
    return jnp.broadcast_to(v, like.shape)


def _check_width(name: str, features: int, x: Any) -> None:
    if x.ndim < 1 or x.shape[-1] != features:
        raise ValueError(
            f"{name}: `x` has shape {tuple(x.shape)}, expected [..., {features}]. "
            "Samples as columns? Pass `x.T`. Images? Flatten them to rows."
        )


def _check_params(name: str, kind: type, params: Any, shapes: tuple[Any, ...]) -> None:
    if not isinstance(params, kind):
        raise ValueError(
            f"{name}: `params` must be {kind.__name__}, got {type(params).__name__}. Params of another net?"
        )
    for field, leaf, shape in zip(kind._fields, params, shapes, strict=True):  # type: ignore[attr-defined]
        if leaf is not None:
            _validate.is_float(field, leaf)
        if (None if leaf is None else leaf.shape) != shape:
            came = "is None" if leaf is None else f"has shape {leaf.shape}"
            expected = f"None: this layer has no `{field}`" if shape is None else f"shape {shape}"
            raise ValueError(
                f"{name}: `{field}` {came}, expected {expected}. Params of another net?"
            )
        if leaf is not None:
            _validate.same_dtype(field, leaf, kind._fields[0], params[0])  # type: ignore[attr-defined]


def _check_dense(
    name: str, shape: tuple[int, int], bias_shape: tuple[int] | None, params: Any, x: Any
) -> None:
    _validate.is_float("x", x)
    if isinstance(params, Dense) and getattr(params.w, "shape", shape) == shape[::-1] != shape:
        raise ValueError(
            f"{name}: `w` has shape {params.w.shape}, expected [in, out] = {shape}. Stored [out, in]? Pass `w.T`."
        )
    _check_params(name, Dense, params, (shape, bias_shape))
    _check_width(name, shape[0], x)
    _validate.same_dtype("x", x, "w", params.w)


def _drawn(name: str, initializer: Initializer, key: Key, shape: tuple[int, ...]) -> Array:
    """What the initialiser gives, of the right shape."""
    leaf = initializer(key, shape)
    if getattr(leaf, "shape", None) != shape:
        came = f"shape {leaf.shape}" if hasattr(leaf, "shape") else f"{leaf!r:.80}"
        mend = (
            " A factory, such as `he_normal`? Call it first: `he_normal()`."
            if callable(leaf)
            else ""
        )
        raise ValueError(f"`{name}` must return an array of shape {shape}, got {came}.{mend}")
    return leaf
