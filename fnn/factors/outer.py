"""The factor of a weight: outer products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.base import Factor, Method, factor
from fnn.factors.rows import (
    centred,
    lost_to_cancelling,
    mended,
    per_row,
    quick_square,
    safe_norm,
    sum_of_squares,
    times_row,
    unless_cancelled,
)
from fnn.factors.shapes import batched, rows_of, uses_as_positions
from fnn.types import Array, at_least_float32


@factor
class Outer(Factor):
    """Per example the outer product of `a` and `dz`, summed over positions.

    The gradient of a dense weight.

    Without positions |a dz^T| = |a| |dz| and <a dz^T, a' dz'^T> = <a, a'> <dz, dz'>. With T of them
    the norm is <A A^T, G G^T> from two T x T matrices, or that of the materialised gradient,
    whichever costs less (by `explain`).

    Source: lecture 001 (vector form): dE/dV = dE/dp (x) x; 004 eq 26: dW = dz a^T. Goodfellow
    (2015), arXiv:1510.01799; Li, Tramer, Liang, Hashimoto (2022), arXiv:2110.05679 (ghost
    clipping).

    >>> import jax.numpy as jnp
    >>> Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])).total()
    Array([[3.],
           [6.]], dtype=float32)
    """

    a: Array  # [batch, ..., in]
    dz: Array  # [batch, ..., out]

    def total(self) -> Array:  # [in, out]
        return _product(rows_of(self.a), rows_of(self.dz))

    def scaled(self, weights: Array, present: Array | None = None) -> Outer:
        return Outer(batched(self.a), times_row(batched(self.dz), weights, present))

    def masked_total(self, present: Array, into: Array) -> Array:
        """As of any factor; by blocks of the columns of `a`, since a masked `a` is a copy."""
        a, dz = batched(self.a), rows_of(self.dz)
        inputs = a.shape[-1]
        columns = min(64, inputs)

        def block(i: Any, product: Array) -> Array:
            # the last block may begin inside the one before
            start = jnp.minimum(i * columns, inputs - columns)
            part = lax.dynamic_slice_in_dim(a, start, columns, axis=-1)
            part = jnp.where(per_row(present, part), part, jnp.zeros_like(part))
            return lax.dynamic_update_slice_in_dim(product, rows_of(part).T @ dz, start, axis=0)

        return lax.fori_loop(0, -(-inputs // columns), block, into)

    def materialise(self) -> Array:  # [batch, in, out]
        a, dz = batched(self.a), batched(self.dz)
        if a.ndim == 2:
            return a[:, :, None] * dz[:, None, :]
        return jnp.einsum("bti,bto->bio", a, dz)

    def rows(self, start: Any, size: int) -> Outer:
        return Outer(
            *(lax.dynamic_slice_in_dim(batched(v), start, size) for v in (self.a, self.dz))
        )

    def merged(self) -> Outer:
        return Outer(uses_as_positions(self.a, 1), uses_as_positions(self.dz, 1))

    def norm(self) -> Array:
        a, dz = batched(self.a), batched(self.dz)
        if a.ndim == 2:
            return safe_norm(sum_of_squares, a) * safe_norm(sum_of_squares, dz)
        if _through_gram(a.shape[1], a.shape[2], dz.shape[2]):
            return safe_norm(
                lambda *unit: unless_cancelled(*_gram_square(*unit), _written_out, *unit), a, dz
            )
        return safe_norm(_written_out, a, dz)

    def quick_square(self) -> tuple[Array, Array]:
        a, dz = at_least_float32(batched(self.a)), at_least_float32(batched(self.dz))
        (all_a, lost_a), (all_dz, lost_dz) = quick_square(a), quick_square(dz)
        bound = all_a * all_dz  # by Cauchy and Schwarz; without positions the square itself
        tiny = float(jnp.finfo(bound.dtype).tiny)
        lost = lost_a * (all_dz + lost_dz) + all_a * lost_dz + jnp.full_like(bound, tiny)
        if a.ndim == 2:
            return bound, lost
        t, inputs, outputs = *a.shape[1:], dz.shape[2]
        lost = lost + jnp.full_like(bound, tiny * (t * t + inputs * outputs))
        if not _through_gram(t, inputs, outputs):
            return _written_out(a, dz), lost
        square, size = _gram_square(a, dz)
        return square, lost_to_cancelling(square, size, lost)

    def inner(self, other: Any) -> Array:
        a, dz, b, db = (at_least_float32(batched(v)) for v in (self.a, self.dz, other.a, other.dz))
        if a.ndim == 2:
            return (a @ b.T) * (dz @ db.T)
        if _pairs_through_gram(a.shape[1], b.shape[1], a.shape[2], dz.shape[2]):
            return (jnp.einsum("xti,ysi->xyts", a, b) * jnp.einsum("xto,yso->xyts", dz, db)).sum(
                (2, 3)
            )
        return super().inner(other)

    def moments(self, share: Array) -> tuple[Array, Array]:
        """As of any factor.

        E[g^2] - E[g]^2 where that does not cancel; where it does, centred, and last with each
        gradient written out.
        """
        a, dz = batched(self.a), batched(self.dz)
        if a.ndim == 3:
            return super().moments(share)
        mean, square = (
            _product(a, dz * per_row(share, dz)),
            _product(a * a, dz * dz * per_row(share, dz)),
        )
        variance = square - mean * mean
        good = _holds(variance, square)

        def centred_then(_: Any) -> tuple[Array, Array]:
            other_mean, other, size = _centred_moments(a, dz, share)
            better = jnp.where(size < square, other, variance)
            held = (good | _holds(other, size)).all()
            return mended(
                held,
                (other_mean, jnp.maximum(better, 0)),
                lambda _: super(Outer, self).moments(share),
            )

        return mended(good.all(), (mean, jnp.maximum(variance, 0)), centred_then)

    def second_moment(self) -> Array:  # [in, out]
        if batched(self.a).ndim == 2:
            return Outer(at_least_float32(self.a) ** 2, at_least_float32(self.dz) ** 2).total()
        return super().second_moment()

    def methods(self) -> dict[str, Method]:
        a, dz = jax.eval_shape(lambda f: (batched(f.a), batched(f.dz)), self)
        batch, inputs, outputs, item = a.shape[0], a.shape[-1], dz.shape[-1], a.dtype.itemsize
        t, both, each = (
            a.shape[1] if a.ndim == 3 else 1,
            item * (a.size + dz.size),
            batch * inputs * outputs,
        )
        found = {"total": Method("a^T dz", 2 * t * each, both + item * inputs * outputs)}
        if a.ndim == 2:
            found["norm"] = Method("|a| |dz|", 2 * (a.size + dz.size), both)
            found["gram"] = Method(
                "(a a^T) * (dz dz^T)", 2 * batch * (a.size + dz.size), both + 3 * item * batch**2
            )
            found["moments"] = Method(
                "E[g^2] - E[g]^2, or centred", 4 * each, 5 * both + 4 * item * inputs * outputs
            )
            return found
        by_matrix = 2 * (t + 1) * each, both + 2 * item * each
        by_gram = 2 * t * (a.size + dz.size) + 2 * batch * t * t, both + 4 * item * batch * t * t
        found["norm"] = (
            Method("Gram, <A A^T, G G^T>", *by_gram)
            if _through_gram(t, inputs, outputs)
            else Method("materialised", *by_matrix)
        )
        if _pairs_through_gram(t, t, inputs, outputs):
            found["gram"] = Method(
                "Gram of positions", batch * by_gram[0], both + 4 * item * batch**2 * t * t
            )
        else:
            found["gram"] = Method(
                "materialised", 2 * t * each + 2 * batch * each, both + 2 * item * each
            )
        found["moments"] = Method(
            "materialised, in blocks", 2 * t * each + 6 * each, both + 4 * item * each
        )
        return found


def _product(a: Array, dz: Array) -> Array:
    """`a^T dz` of `[rows, in]` and `[rows, out]`."""
    if dz.shape[1] <= 16 < a.shape[1] and dz.shape[0] >= 128 and jax.default_backend() == "cpu":
        # XLA's CPU product a.T @ dz is slow for few columns; 1024 x 512 x 10 measured 5 times
        # slower than this order,
        # which the barrier keeps XLA from folding back. Not for few inputs: under `repeat`, XLA's
        # compiler (jaxlib 0.10.2)
        # aborts where a loop around a product of 2 x 2 or 3 x 3 takes over the order.
        return lax.optimization_barrier(dz.T @ a).T
    return a.T @ dz


def _centred_moments(a: Array, dz: Array, share: Array) -> tuple[Array, Array, Array]:
    """Mean and variance of `a dz^T` from centred factors, and the size of the terms that the
    variance is the sum of.

    With a = m + u, dz = n + v (m, n the means): E[a dz^T] = m n^T + C, C = E[u v^T], and a dz^T
    less that is m v^T + u n^T + (u v^T - C), whose mean square is
        m^2 E[v^2] + E[u^2] n^2 + E[u^2 v^2] - C^2 + 2 m n C + 2 m E[u v^2] + 2 n E[u^2 v]
    """
    (m, u), (n, v) = centred(a, share), centred(dz, share)
    uu, vv = u * u, v * v
    left, right = jnp.concatenate([u, uu], 1), jnp.concatenate([v, vv], 1)
    products = left.T @ (right * per_row(share, right))  # one product is faster than four
    (c, uvv), (uuv, uuvv) = (
        jnp.split(part, [v.shape[1]], 1) for part in jnp.split(products, [u.shape[1]])
    )
    m, n = jnp.broadcast_to(m[:, None], c.shape), jnp.broadcast_to(n[None, :], c.shape)
    vu, vn = (
        jnp.broadcast_to((share @ uu)[:, None], c.shape),
        jnp.broadcast_to((share @ vv)[None, :], c.shape),
    )
    terms = m * m * vn, vu * n * n, uuvv, -c * c, 2 * m * n * c, 2 * m * uvv, 2 * n * uuv
    return (
        m * n + c,
        sum(terms[1:], terms[0]),
        sum((jnp.abs(t) for t in terms[1:]), jnp.abs(terms[0])),
    )


def _holds(variance: Array, size: Array) -> Array:
    """Whether a variance that is a sum of terms of that size has five digits left.

    Never where it is not a number.
    """
    return variance >= float(jnp.finfo(variance.dtype).eps) * 1e5 * size


def _through_gram(positions: int, inputs: int, outputs: int) -> bool:
    """Whether a norm goes through two T x T matrices, of T (in + out) multiplications a position,
    and not through [in, out].

    Measured on 2 CPU cores at batch 32 for [in, out] from 64 x 64 to 256 x 256, 512 x 64 and 32 x
    512, the two are even where T (in + out) is 0.75 to 2.6 times in x out (and where 2 T^2 is 0.15
    to 1.3 times that, the rule that goes by memory).
    """
    return positions * (inputs + outputs) <= 1.2 * inputs * outputs


def _pairs_through_gram(positions: int, others: int, inputs: int, outputs: int) -> bool:
    """Whether the inner products of all pairs go through T x T' matrices, and not through [in,
    out]."""
    return positions * others * (inputs + outputs) <= inputs * outputs


def _gram_square(a: Array, dz: Array) -> tuple[Array, Array]:
    """<A A^T, G G^T> for `[batch, positions, features]`.

    The squared norm of every example, never [in, out]; and the size of its terms.
    """
    square = (jnp.einsum("bti,bsi->bts", a, a) * jnp.einsum("bto,bso->bts", dz, dz)).sum((1, 2))
    return square, ((a * a).sum(2) * (dz * dz).sum(2)).sum(1)


def _written_out(a: Array, dz: Array) -> Array:
    return sum_of_squares(Outer(a, dz).materialise())
