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
        if self.single:
            return self.a[:, :, None] * self.dz[:, None, :]
        return jnp.einsum("bti,bto->bio", *self.positions())

    def merged(self) -> Outer:
        return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), self)

    @property
    def single(self) -> bool:
        return self.a.ndim == 2

    def squared_norm(self) -> Array:
        if self.single:
            square = square_rows(self.a)
            return square * square_rows(self.dz)
        a, dz = self.wide().positions()

        def block(part):  # [columns, batch]
            gradients = _written_out(part, dz)
            return (gradients**2).sum(2).T

        squares = by_columns(block, a, _columns(a, dz))
        return squares.sum(0)

    def fast_squared_norm(self) -> SquaredNorm:
        if self.single:
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
        if self.single:
            return row_products(self.a, other.a) * row_products(self.dz, other.dz)
        a, dz = self.wide().positions()
        b, db = other.wide().positions()
        inputs = a.shape[2]
        outputs = dz.shape[2]
        if a.shape[1] * b.shape[1] * (inputs + outputs) > inputs * outputs:
            return super().inner(other)
        near = jnp.einsum("xti,ysi->xyts", a, b, precision="highest")
        far = jnp.einsum("xto,yso->xyts", dz, db, precision="highest")
        return (near * far).sum((2, 3))

    def exact_total(self, weights) -> Array:
        if self.single:
            return _total(self.a, self.dz, weights)
        a, dz = self.wide().positions()

        def block(part):
            gradients = _written_out(part, dz)
            return scale_rows(gradients, weights).sum(0)

        return by_columns(block, a, _columns(a, dz))

    def moments(self, shares) -> tuple[Array, Array]:
        if self.single:
            return _moments(self.a, self.dz, shares)
        a, dz = self.positions()

        def block(part):
            gradients = _written_out(part, dz)
            return centred_moments(gradients, shares)

        return by_columns(block, a, _columns(a, dz))

    def raw_moments(self, shares) -> tuple[Array, Array] | None:
        if not self.single:
            return None
        return _raw_moments(self.a, self.dz, shares)

    def positions(self) -> tuple[Array, Array]:
        """Both arrays as `[batch, positions, features]`."""
        if self.single:
            return self.a[:, None], self.dz[:, None]
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


def _total(a, dz, weights):
    """The total of products, one at a time: it needs no memory but the sum."""

    def add(total, example):
        a, dz, weight = example
        scaled = weight * a.astype(weight.dtype)
        gradient = jnp.outer(scaled, dz.astype(weight.dtype))
        return total + jnp.where(weight != 0, gradient, 0), None

    total, _ = lax.scan(add, _zeros(a, dz, weights), (a, dz, weights))
    return total


def _moments(a, dz, shares):
    """Mean and variance of products, from the difference of each to one that counts.

    The differences are small where the variance is, so that nothing cancels.
    """
    first = jnp.argmax(shares)
    b = jnp.where(shares[first] != 0, a[first], 0)
    e = jnp.where(shares[first] != 0, dz[first], 0)

    def add(sums, example):
        a, dz, share = example
        difference = jnp.outer(a - b, dz) + jnp.outer(b, dz - e)
        difference = jnp.where(share != 0, difference, 0)
        mean, square = sums
        return (mean + share * difference, square + share * difference**2), None

    start = _zeros(a, dz, shares)
    (mean, square), _ = lax.scan(add, (start, start), (a, dz, shares))
    return mean + jnp.outer(b, e), jnp.maximum(square - mean**2, 0)


def _zeros(a, dz, weights):
    """Zeros `[in, out]` to begin a loop with.

    They are no constant: XLA lets loops share a constant, and copies it. They depend on all arrays,
    so that in `shard_map` they vary over the same axes of the mesh.
    """
    either = (a[0, 0] > 0) ^ (dz[0, 0] > 0) ^ (weights[0] > 0)
    zero = jnp.where(either, 0.0, -0.0)
    return jnp.full((a.shape[1], dz.shape[1]), zero.astype(weights.dtype))


def _gram(a):
    """Inner products of the positions of every example, `[batch, T, T]`."""
    return jnp.einsum("bti,bsi->bts", a, a, precision="highest")
