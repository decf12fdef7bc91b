"""The factor of a table of vectors: rows added at an index."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp

from fnn.factors.base import Factor, Method, factor
from fnn.factors.rows import (
    lost_to_cancelling,
    quick_square,
    safe_norm,
    sum_of_squares,
    times_row,
    unless_cancelled,
)
from fnn.factors.shapes import rows_of, uses_as_positions
from fnn.types import Array, at_least_float32


@factor
class Scatter(Factor):
    """Per example and position one row `dy` added at `index`: the gradient of an embedding table.

    >>> import jax.numpy as jnp
    >>> Scatter(jnp.array([[2, 0]]), jnp.array([[[1.0], [5.0]]]), 3).total()
    Array([[5.],
           [0.],
           [1.]], dtype=float32)
    """

    index: Array  # [batch, ...] of whole numbers in 0 ... size - 1
    dy: Array  # [batch, ..., features]
    size: int = field(metadata={"static": True})  # rows of the table

    def total(self) -> Array:  # [size, features]
        dy = rows_of(self.dy)
        return jnp.zeros((self.size, dy.shape[-1]), dy.dtype).at[self.index.reshape(-1)].add(dy)

    def scaled(self, weights: Array, present: Array | None = None) -> Scatter:
        return Scatter(self.index, times_row(self.dy, weights, present), self.size)

    def materialise(self) -> Array:  # [batch, size, features]
        index, dy = self._positions()
        return jax.vmap(lambda i, g: Scatter(i, g, self.size).total())(index, dy)

    def merged(self) -> Scatter:
        return Scatter(uses_as_positions(self.index, 0), uses_as_positions(self.dy, 1), self.size)

    def norm(self) -> Array:
        index, dy = self._positions()
        if index.shape[1] == 1:  # one row an example: no two can meet
            return safe_norm(sum_of_squares, dy)
        if self._through_gram():  # the positions that meet in a row
            return safe_norm(
                lambda i, g: unless_cancelled(*self._gram_square(i, g), self._square, i, g),
                index,
                dy,
            )
        return safe_norm(self._square, index, dy)

    def quick_square(self) -> tuple[Array, Array]:
        index, dy = self._positions()
        dy = at_least_float32(dy)
        square, lost = quick_square(dy)
        if index.shape[1] == 1:
            return square, lost
        lost = index.shape[1] * lost
        if not self._through_gram():
            return self._square(index, dy), lost
        square, size = self._gram_square(index, dy)
        return square, lost_to_cancelling(square, size, lost)

    def inner(self, other: Any) -> Array:
        if not self._through_gram(other):
            return super().inner(other)
        (index, dy), (j, db) = self._positions(), other._positions()
        meet = (index[:, None, :, None] == j[None, :, None, :]).astype(at_least_float32(dy).dtype)
        return (jnp.einsum("xtf,ysf->xyts", at_least_float32(dy), at_least_float32(db)) * meet).sum(
            (2, 3)
        )

    def methods(self) -> dict[str, Method]:
        _, dy = jax.eval_shape(lambda f: f._positions(), self)
        batch, t, features = dy.shape
        item, found = dy.dtype.itemsize, super().methods()
        found["total"] = Method("scatter", dy.size, item * (2 * dy.size + self.size * features))
        if t == 1:
            found["norm"] = Method("|dy|", 2 * dy.size, item * dy.size)
        elif self._through_gram():
            found["norm"] = Method(
                "Gram of equal rows", 2 * t * dy.size, item * (dy.size + 3 * batch * t * t)
            )
        else:
            found["norm"] = Method("materialised", found["norm"].flops, found["norm"].bytes)
        if self._through_gram():
            found["gram"] = Method(
                "Gram of equal rows",
                2 * batch * t * dy.size,
                item * (dy.size + 3 * batch**2 * t * t),
            )
        found["moments"] = Method(
            "materialised, in blocks", found["moments"].flops, found["moments"].bytes
        )
        return found

    def _square(self, index: Array, dy: Array) -> Array:
        return sum_of_squares(Scatter(index, dy, self.size).materialise())

    def _gram_square(self, index: Array, dy: Array) -> tuple[Array, Array]:
        square = (jnp.einsum("btf,bsf->bts", dy, dy) * _equal(index, dy.dtype)).sum((1, 2))
        return square, sum_of_squares(dy)

    def _positions(self) -> tuple[Array, Array]:  # [batch, positions], [batch, positions, features]
        return self.index.reshape(self.index.shape[0], -1), self.dy.reshape(
            self.index.shape[0], -1, self.dy.shape[-1]
        )

    def _through_gram(self, other: Any = None) -> bool:
        other = self if other is None else other
        return math.prod(self.index.shape[1:]) * math.prod(other.index.shape[1:]) <= self.size


def _equal(index: Array, dtype: Any) -> Array:
    """`[batch, positions, positions]`: 1 where two positions have the same row."""
    return (index[:, :, None] == index[:, None, :]).astype(dtype)
