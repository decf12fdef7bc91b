"""Sums over the features of each example, and over examples, that neither overflow nor keep more
than they must."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn.types import Array, at_least_float32


def sum_of_squares(a: Array) -> Array:
    """`[batch, ...]` to `[batch]`, accumulated in float32 at least."""
    a = at_least_float32(a)
    return (a * a).sum(tuple(range(1, a.ndim)))


def safe_norm(square: Callable[..., Array], *arrays: Array) -> Array:
    """`sqrt(square(*arrays))`, also where the square leaves the range of the dtype.

    Every array is first divided by its row's size.

    Args:
        square: `(*arrays) -> [batch]`, quadratic in each array of floating-point numbers: `square(s
            a) = s^2 square(a)`.
        *arrays: `[batch, ...]`; whole numbers are handed on as they are.

    Returns:
        `[batch]`, float32 at least. A row with NaN or Inf gives NaN or Inf.

    Source: Blue (1978), doi:10.1145/355769.355771 (scaled sums of squares).

    >>> safe_norm(sum_of_squares, jnp.array([[3e25, 4e25], [0.0, 0.0]])) / 1e25
    Array([5., 0.], dtype=float32)
    """

    def norm_of(arrays: tuple[Array, ...]) -> Array:
        sizes, unit = [], []
        for a in arrays:
            if jnp.issubdtype(a.dtype, jnp.floating):
                a = at_least_float32(a)
                sizes.append(_scale(jnp.abs(a).max(tuple(range(1, a.ndim)))))
                a = a * per_row(1 / sizes[-1], a)
            unit.append(a)
        return jnp.sqrt(jnp.maximum(square(*unit), 0)) * math.prod(sizes[1:], start=sizes[0])

    return by_blocks(norm_of, arrays, 32)  # what is divided is a copy


def quick_square(a: Array) -> tuple[Array, Array]:
    """The sum of squares of every row as it comes, and how much of it underflow may have cost.

    `[batch]`, `[batch]`.
    """
    square = sum_of_squares(a)
    return square, jnp.full_like(square, a[0].size * float(jnp.finfo(square.dtype).tiny))


def mended(good: Array, value: Any, mend: Callable[[Any], Any]) -> Any:
    """`value`, or `mend(value)` where it is not `good`; costs next to nothing where it is.

    A loop of at most one turn and not a `lax.cond`: XLA's CPU runs what stands inside a branch on
    its own, without overlap, and copies what a branch passes through. The price is that
    reverse-mode differentiation stops here.
    """
    return lax.while_loop(lambda c: ~c[0], lambda c: (jnp.array(True), mend(c[1])), (good, value))[
        1
    ]


def unless_cancelled(
    square: Array, size: Array, otherwise: Callable[..., Array], *arrays: Array
) -> Array:
    """Squared norms `[batch]` that are sums of terms of that size, or `otherwise(*arrays)` where
    some cancel."""
    return _mended_by(otherwise, ~_cancelled(square, size).any(), square, *arrays)


def lost_to_cancelling(square: Array, size: Array, lost: Array) -> Array:
    """What such squared norms have lost: so much, or everything where the terms cancel."""
    return jnp.where(_cancelled(square, size), jnp.full_like(lost, jnp.inf), lost)


def _cancelled(square: Array, size: Array) -> Array:
    """Whether the sum of terms of that size has lost all but three digits, or is not a number."""
    return ~(square >= float(jnp.finfo(square.dtype).eps) * 1e3 * size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mended_by(otherwise: Callable[..., Array], good: Array, value: Array, *arrays: Array) -> Array:
    """`mended`, but where it is differentiated both are computed, so that reverse mode does not
    stop here."""
    return mended(good, value, lambda _: otherwise(*arrays))


@_mended_by.defjvp
def _mended_by_jvp(
    otherwise: Callable[..., Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    good, *rest = primals
    return jax.jvp(
        lambda value, *arrays: jnp.where(good, value, otherwise(*arrays)), tuple(rest), tangents[1:]
    )


def joined_norms(norms: Array) -> Array:
    """The norm of the whole from the norms of its parts, `[parts, batch]` to `[batch]`, without
    overflow.

    >>> joined_norms(jnp.array([[3e30], [4e30]])) / 1e30
    Array([5.], dtype=float32)
    """
    scale = _scale(norms.max(0))
    return scale * jnp.sqrt(((norms / jnp.broadcast_to(scale[None], norms.shape)) ** 2).sum(0))


def per_row(row: Array, like: Array) -> Array:
    """`[batch]` spread over `[batch, ...]`, in so many words: rank promotion may be "raise"."""
    return jnp.broadcast_to(row.reshape(-1, *(1,) * (like.ndim - 1)), like.shape)


def times_row(a: Array, weights: Array, present: Array | None = None) -> Array:
    """`[batch, ...]` times `[batch]`, in the dtype of `a`.

    0 where an example is not present, whatever it holds.
    """
    wide = at_least_float32(a)  # a weight of 1e-7 is hardly a number of float16
    product = (wide * per_row(weights.astype(wide.dtype), wide)).astype(a.dtype)
    return (
        product if present is None else jnp.where(per_row(present, a), product, jnp.zeros_like(a))
    )


def by_blocks(f: Callable[[Any], Array], arrays: Any, size: int) -> Array:
    """`f(arrays)` where `f` answers row by row, at most `size` rows at a time.

    Memory for one block.

    Args:
        f: `(tree of [rows, ...]) -> [rows, ...]`.
        arrays: a tree of arrays `[batch, ...]`.
        size: how many rows at a time. The last block may begin inside the one before, so that there
            is one program for all.

    >>> by_blocks(lambda a: a * a, jnp.arange(5), 2)
    Array([ 0,  1,  4,  9, 16], dtype=int32)
    """
    batch = jax.tree.leaves(arrays)[0].shape[0]
    if batch <= size:
        return f(arrays)

    def block(i: Any, done: Array) -> Array:
        start = jnp.minimum(i * size, batch - size)
        found = f(jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), arrays))
        return lax.dynamic_update_slice_in_dim(done, found, start, 0)

    one = jax.eval_shape(f, jax.tree.map(lambda a: a[:size], arrays))
    return lax.fori_loop(0, -(-batch // size), block, jnp.zeros((batch, *one.shape[1:]), one.dtype))


def centred(a: Array, share: Array) -> tuple[Array, Array]:
    """The mean of the rows by their shares (which add up to 1), and the rows less it.

    `[features]`, `[batch, features]`.

    The mean of what is left is taken off once more, so that its rounding does not show.
    """
    mean = share @ a
    rest = a - jnp.broadcast_to(mean, a.shape)
    left = share @ rest
    return mean + left, rest - jnp.broadcast_to(left, a.shape)


def _scale(size: Array) -> Array:
    """What rows are divided by: a size of theirs, or 1 where that is 0 or not finite.

    Not so large that XLA flushes its inverse to 0.
    """
    tiny = float(jnp.finfo(size.dtype).tiny)
    return jnp.where(
        (size > 0) & jnp.isfinite(size), jnp.clip(size, tiny, 1 / tiny), jnp.ones_like(size)
    )
