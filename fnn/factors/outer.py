"""The factor of a weight: outer products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from fnn.factors.base import (
    Factor,
    SquaredNorm,
    by_columns,
    centred_moments,
    factor,
    mask_rows,
    per_row,
    row_products,
    scale_rows,
    square_rows,
)
from fnn.types import Array


@factor
class Outer(Factor):
    """Per example the outer product of `a` and `dz`, summed over positions: of a dense weight.

    Without positions |a dz^T| = |a| |dz| and <a dz^T, a' dz'^T> = <a, a'> <dz, dz'>. With T
    positions the squared norm is <A A^T, G G^T> from two T x T matrices.

    Source: lecture 001 (vector form): dE/dV = dE/dp (x) x; 004 eq 26: dW = dz a^T. Goodfellow
    (2015), arXiv:1510.01799; Li, Tramer, Liang, Hashimoto (2022), arXiv:2110.05679.

    >>> Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])).total()
    Array([[3.],
           [6.]], dtype=float32)
    """

    a: Array  # [batch, ..., in]
    dz: Array  # [batch, ..., out]

    def total(self) -> Array:  # [in, out]
        a = lax.collapse(self.a, 0, -1)
        dz = lax.collapse(self.dz, 0, -1)
        return product(a, dz)

    def scaled(self, weights) -> Outer:
        dz = scale_rows(self.dz, weights)
        a = self.a.astype(dz.dtype)
        return Outer(a, dz)

    def materialise(self) -> Array:  # [batch, in, out]
        a, dz = self.positions()
        if a.ndim == 2:
            return a[:, :, None] * dz[:, None, :]
        return jnp.einsum("bti,bto->bio", a, dz)

    def merged(self) -> Outer:
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), self)

    @property
    def one_by_one(self) -> bool:
        return self.a.ndim == 2

    def squared_norm(self) -> Array:
        if self.one_by_one:
            square = square_rows(self.a)
            return square * square_rows(self.dz)
        a, dz = self.wide().positions()

        def block(part):  # [columns, batch]
            gradients = _written_out(part, dz)
            return (gradients**2).sum(2).T

        squares = by_columns(block, a, _columns(a, dz))
        return squares.sum(0)

    def fast_squared_norm(self) -> SquaredNorm:
        if self.one_by_one:
            return SquaredNorm(self.squared_norm())
        a, dz = self.wide().positions()
        parts = (a * a).sum(2) * (dz * dz).sum(2)
        parts = parts.sum(1)
        positions, inputs = a.shape[1:]
        outputs = dz.shape[2]
        if positions * (inputs + outputs) > 1.2 * inputs * outputs:
            return SquaredNorm(self.squared_norm(), parts=parts)
        # terms [batch, T, T], whose cost is even with that of [in, out] at a factor of 0.75 to 2.6
        # (CPU, batch 32, 64 x 64 to 256 x 256, 512 x 64, 32 x 512)
        terms = _gram(a) * _gram(dz)
        size = jnp.abs(terms).sum((1, 2))
        return SquaredNorm(terms.sum((1, 2)), size, parts)

    def inner(self, other) -> Array:
        a, dz = self.wide().positions()
        b, db = other.wide().positions()
        if a.ndim == 2:
            return row_products(a, b) * row_products(dz, db)
        inputs = a.shape[2]
        outputs = dz.shape[2]
        if a.shape[1] * b.shape[1] * (inputs + outputs) > inputs * outputs:
            return super().inner(other)
        near = jnp.einsum("xti,ysi->xyts", a, b, precision="highest")
        far = jnp.einsum("xto,yso->xyts", dz, db, precision="highest")
        return (near * far).sum((2, 3))

    def exact_total(self, weights) -> Array:
        if self.one_by_one:
            return super().exact_total(weights)
        a, dz = self.wide().positions()

        def block(part):
            gradients = _written_out(part, dz)
            return scale_rows(gradients, weights).sum(0)

        return by_columns(block, a, _columns(a, dz))

    def moments(self, shares) -> tuple[Array, Array]:
        if self.one_by_one:
            return super().moments(shares)
        a, dz = self.positions()

        def block(part):
            gradients = _written_out(part, dz)
            return centred_moments(gradients, shares)

        return by_columns(block, a, _columns(a, dz))

    def raw_moments(self, shares) -> tuple[Array, Array] | None:
        if not self.one_by_one:
            return None
        return _raw_moments(*self.positions(), shares)

    def difference(self, other) -> Array:
        # a dz^T - b db^T = (a - b) dz^T + b (dz - db)^T
        by_a = Outer(self.a - other.a, self.dz)
        by_dz = Outer(other.a, self.dz - other.dz)
        return by_a.total() + by_dz.total()

    def positions(self) -> tuple[Array, Array]:
        """Both arrays as `[batch, features]`, or `[batch, positions, features]`."""
        if self.one_by_one:
            return self.a, self.dz
        return lax.collapse(self.a, 1, -1), lax.collapse(self.dz, 1, -1)


def product(a: Float[Array, "rows in"], dz: Float[Array, "rows out"]) -> Float[Array, "in out"]:
    """`a^T dz`."""
    if dz.shape[1] <= 16 < a.shape[1] and jax.default_backend() == "cpu":
        # XLA's CPU product a.T @ dz is slow for few columns: 1024 x 512 x 10 takes 5 times as long
        # as this order, which a rounding to the same precision keeps XLA from undoing.
        precision = jnp.finfo(dz.dtype)
        transposed = lax.reduce_precision(dz.T @ a, precision.nexp, precision.nmant)
        return transposed.T
    return a.T @ dz


def _written_out(a, dz):
    """The gradients `[batch, columns, out]` of some columns of `a [batch, T, columns]`."""
    return jnp.einsum("btc,bto->bco", a, dz, precision="highest")


def _columns(a, dz):
    """So many columns that their gradients take half of the memory of `a` or `dz`."""
    positions, inputs = a.shape[1:]
    outputs = dz.shape[2]
    columns = positions * max(inputs, outputs) // (2 * outputs)
    return max(1, columns)


@jax.jit
def _raw_moments(a, dz, shares):
    """E[g] and E[g^2]; in blocks of columns, since a mask and a square of `a` are copies."""
    present = shares != 0
    dz = mask_rows(dz, present)
    weighted = dz * per_row(shares, dz)

    def block(part):
        part = mask_rows(part, present)
        mean = product(part, weighted)
        square = product(part * part, dz * weighted)
        return mean, square

    return by_columns(block, a, max(128, dz.shape[1]))


def _gram(a):
    """Inner products of the positions of every example, `[batch, T, T]`."""
    return jnp.einsum("bti,bsi->bts", a, a, precision="highest")
