"""The factor of a table of vectors: rows added at an index."""

from __future__ import annotations

from dataclasses import field

import jax
import jax.numpy as jnp
from jax import lax

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

BLOCK = 16  # features at a time


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

    def total(self) -> Array:  # [size, features]
        return self._added(self.dy)

    def scaled(self, weights) -> Scatter:
        return Scatter(self.index, scale_rows(self.dy, weights), self.size)

    def materialise(self) -> Array:  # [batch, size, features]
        return jax.vmap(lambda f: f.total())(self)

    def merged(self) -> Scatter:
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), self)

    def squared_norm(self) -> Array:
        def block(dy):  # [columns, batch]
            some = Scatter(self.index, dy, self.size)
            rows, first = some._rows()
            return jnp.einsum("btc,bt->cb", rows * rows, first, precision="highest")

        squares = by_columns(block, self.dy, BLOCK, like=self.index)
        return squares.sum(0)

    def inner(self, other) -> Array:
        i = self._indices()
        j = other._indices()
        if i.shape[1] * j.shape[1] > self.size:
            return super().inner(other)
        meet = (i[:, None, :, None] == j[None, :, None, :]) & self._inside()[:, None, :, None]
        dy = widen(self.dy).reshape(*i.shape, -1)
        db = widen(other.dy).reshape(*j.shape, -1)
        products = jnp.einsum("xtf,ysf->xyts", dy, db, precision="highest")
        return jnp.where(meet, products, 0).sum((2, 3))

    def fast_squared_norm(self) -> SquaredNorm:
        if self._indices().shape[1] == 1:
            return SquaredNorm(self.squared_norm())
        return SquaredNorm(self.squared_norm(), parts=square_rows(self.dy))

    def exact_total(self, weights) -> Array:
        rows, first = self._rows()
        gradients = rows * first[..., None]
        return self._added(scale_rows(gradients, weights))

    def moments(self, shares) -> tuple[Array, Array]:
        """As of any factor; an example is 0 in the rows that it does not have."""
        mean = self.scaled(shares).total()
        rows, first = self._rows()
        part = scale_rows(first, shares)[..., None]  # the share of an example, once in a row
        index = self._indices()
        gap = rows - mean.at[index].get(mode="clip")
        gap = jnp.where(part != 0, gap, 0)
        without = 1 - self._added(part)  # the share of the examples that do not have a row
        rest = self._added(part * gap) - without * mean
        variance = self._added(part * gap**2)
        variance = variance + without * mean**2 - rest**2
        variance = jnp.maximum(variance, 0)
        counts = (shares.sum() != 0).astype(mean.dtype)
        return mean + counts * rest, counts * variance

    def _indices(self):  # [batch, positions]
        return lax.collapse(self.index, 1)

    def _inside(self):
        """Where an index is a row of the table, `[batch, positions]`."""
        index = self._indices()
        return (index >= 0) & (index < jnp.asarray(self.size, index.dtype))

    def _rows(self):
        """What an example adds to the row of each position, and which positions to count.

        A row counts once, at its first position: 1 there, else 0.

        Returns:
            `[batch, positions, features]` and `[batch, positions]`.
        """
        index = self._indices()
        dy = widen(self.dy).reshape(*index.shape, -1)
        if index.shape[1] == 1:
            return dy, self._inside().astype(dy.dtype)
        equal = index[:, :, None] == index[:, None, :]
        equal = equal.astype(dy.dtype)

        def block(dy):  # of one width in every answer, so that all round alike
            return jnp.einsum("bts,bsf->fbt", equal, dy, precision="highest")

        rows = by_columns(block, dy, BLOCK, like=index)
        rows = jnp.moveaxis(rows, 0, 2)
        earlier = jnp.tril(equal, -1).sum(2)
        first = (earlier == 0) & self._inside()
        return rows, first.astype(dy.dtype)

    def _added(self, rows):
        """Rows `[batch, ..., n]` added at their index, `[size, n]`."""
        rows = rows.reshape(-1, rows.shape[-1])
        empty = jnp.zeros((self.size, rows.shape[-1]), rows.dtype)
        index = self.index.reshape(-1)
        return empty.at[index].add(rows, mode="drop", wrap_negative_indices=False)
