"""The factor of a table of vectors: rows added at an index."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp

from fnn.factors.base import (
    Factor,
    SquaredNorm,
    by_columns,
    factor,
    scale_rows,
    square_rows,
    widen,
)
from fnn.types import Array


@factor
class Scatter(Factor):
    """Per example and position one row `dy` added at `index`: of an embedding table.

    Rows of equal index are added before they are squared, so that nothing cancels.

    >>> Scatter(jnp.array([[2, 0]]), jnp.array([[[1.0], [5.0]]]), 3).total()
    Array([[5.],
           [0.],
           [1.]], dtype=float32)
    """

    index: Array  # [batch, ...] of whole numbers in 0 ... size - 1; others count nothing
    dy: Array  # [batch, ..., features]
    size: int = field(metadata={"static": True})  # rows of the table
    one_by_one = False

    def total(self) -> Array:  # [size, features]
        return self._added(self.dy)

    def scaled(self, weights: Array) -> Scatter:
        return Scatter(self.index, scale_rows(self.dy, weights), self.size)

    def materialise(self) -> Array:  # [batch, size, features]
        return jax.vmap(lambda i, g: Scatter(i, g, self.size).total())(self.index, self.dy)

    def merged(self) -> Scatter:
        index, dy = jnp.moveaxis(self.index, 0, 1), jnp.moveaxis(self.dy, 0, 1)
        return Scatter(index, dy, self.size)

    def squared_norm(self) -> Array:
        def block(dy):  # [columns, batch]
            rows, part = Scatter(self.index, dy, self.size)._rows()
            return jnp.einsum("btc,bt->cb", rows * rows, part)

        return by_columns(block, self.dy, 16, like=self.index).sum(0)

    def inner(self, other: Any) -> Array:
        index, j = (f.index.reshape(f.index.shape[0], -1) for f in (self, other))
        if index.shape[1] * j.shape[1] > self.size:
            return super().inner(other)
        meet = index[:, None, :, None] == j[None, :, None, :]
        dy, db = (widen(f.dy).reshape(*i.shape, -1) for f, i in ((self, index), (other, j)))
        return jnp.where(meet, jnp.einsum("xtf,ysf->xyts", dy, db), 0).sum((2, 3))

    def fast_squared_norm(self) -> SquaredNorm:
        several = self._indices().shape[1] > 1
        return SquaredNorm(self.squared_norm(), parts=square_rows(self.dy) if several else None)

    def exact_total(self, weights: Array) -> Array:
        rows, part = self._rows()
        return self._added(scale_rows(rows * part[..., None], weights))

    def moments(self, shares: Array) -> tuple[Array, Array]:
        """As of any factor; an example is 0 in the rows that it does not have."""
        mean = self.scaled(shares).total()
        rows, part = self._rows()
        part = scale_rows(part, shares)[..., None]  # adds up to the share of an example in a row
        gap = rows - mean.at[self._indices()].get(mode="clip")
        gap = jnp.where(part != 0, gap, 0)
        without = 1 - self._added(part)  # the share of the examples that do not have a row
        rest = self._added(part * gap) - without * mean
        variance = self._added(part * gap**2) + without * mean**2 - rest**2
        counts = (shares.sum() != 0).astype(mean.dtype)
        return mean + counts * rest, counts * jnp.maximum(variance, 0)

    def _indices(self) -> Array:  # [batch, positions]
        return self.index.reshape(self.index.shape[0], -1)

    def _rows(self) -> tuple[Array, Array]:
        """What an example adds to the row of each position, and 1 / positions of that row.

        Returns:
            `[batch, positions, features]` and `[batch, positions]`.
        """
        index = self._indices()
        dy = widen(self.dy).reshape(*index.shape, -1)
        if index.shape[1] == 1:
            return dy, jnp.ones_like(dy[..., 0])
        equal = (index[:, :, None] == index[:, None, :]).astype(dy.dtype)
        return jnp.einsum("bts,bsf->btf", equal, dy, precision="highest"), 1 / equal.sum(2)

    def _added(self, rows: Array) -> Array:
        """Rows `[batch, ..., n]` added at their index, `[size, n]`."""
        rows = rows.reshape(-1, rows.shape[-1])
        empty = jnp.zeros((self.size, rows.shape[-1]), rows.dtype)
        return empty.at[self.index.reshape(-1)].add(rows, mode="drop")
