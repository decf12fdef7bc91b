"""A gradient as factors: what each example contributes to one parameter, kept apart until someone asks.

For a weight, an example's gradient is an outer product `a dz^T` (lecture 001: dE/dV = dE/dp (x) x). `Outer(a, dz)` keeps
the two vectors, so that sums, norms and products of per-example gradients cost no more than the sum alone. A layer's
`backward` builds each factor once and hands it to a `Reducer`.

Arrays are `[batch, ..., features]`: axes between the first and the last are positions, which an example sums over. An
array without a batch axis, `[features]`, is a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

from fnn._types import Array, at_least_float32

_T = TypeVar("_T")


class Factor:
    """What one batch contributes to the gradient of one parameter. Subclasses answer these four, or those they can.

    A factor is a pytree of arrays. A new one is a class here; a new question is a method here and a `Reducer` below.
    """

    def total(self) -> Array:
        """The sum over the batch, in the parameter's own shape: the ordinary gradient."""
        raise NotImplementedError

    def materialise(self) -> Array:
        """`[batch, *parameter shape]`: every example's own gradient. Costs batch x parameters of memory."""
        raise NotImplementedError

    def squared_norm(self) -> Array:
        """`[batch]`, at least float32: the squared Euclidean norm of every example's gradient."""
        return _sum_of_squares(self.materialise())

    def second_moment(self) -> Array:
        """The sum over the batch of the elementwise squares of the per-example gradients, in the parameter's shape, float32 at least."""
        return (at_least_float32(self.materialise()) ** 2).sum(0)


@dataclass_transform(frozen_default=True)
def _factor(cls: type[_T]) -> type[_T]:
    """Makes a frozen dataclass that is a pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def is_factor(value: Any) -> bool:
    """True for a factor: `jax.tree.map(f, factors, is_leaf=is_factor)`."""
    return isinstance(value, Factor)


@_factor
class Outer(Factor):
    """Per example the outer product of `a` and `dz`, summed over positions: the gradient of a dense weight.

    Source: lecture 001 (vector form): dE/dV = dE/dp (x) x; 004 eq 26: dW = dz a^T.

    >>> import jax.numpy as jnp
    >>> Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]])).total()
    Array([[3.],
           [6.]], dtype=float32)
    """

    a: Array  # [batch, ..., in]
    dz: Array  # [batch, ..., out]

    def total(self) -> Array:  # [in, out]
        a, dz = _rows(self.a), _rows(self.dz)
        if dz.shape[1] <= 16 and dz.shape[0] >= 128 and jax.default_backend() == "cpu":
            # XLA's CPU product a.T @ dz is slow for few columns; 1024 x 512 x 10 measured 5 times slower than this order,
            # which the barrier keeps XLA from folding back.
            return lax.optimization_barrier(dz.T @ a).T
        return a.T @ dz

    def materialise(self) -> Array:  # [batch, in, out]
        a, dz = _batched(self.a), _batched(self.dz)
        if a.ndim == 2:
            return a[:, :, None] * dz[:, None, :]
        return jnp.einsum("bti,bto->bio", a, dz)

    def squared_norm(self) -> Array:
        a, dz = _batched(self.a), _batched(self.dz)
        if a.ndim == 2:  # |a dz^T|^2 = |a|^2 |dz|^2
            return _sum_of_squares(a) * _sum_of_squares(dz)
        positions = a.shape[1]
        if 2 * positions**2 <= a.shape[2] * dz.shape[2]:  # <A A^T, G G^T>, never [in, out]
            a, dz = at_least_float32(a), at_least_float32(dz)
            return (jnp.einsum("bti,bsi->bts", a, a) * jnp.einsum("bto,bso->bts", dz, dz)).sum((1, 2))
        return _sum_of_squares(self.materialise())

    def second_moment(self) -> Array:  # [in, out]
        if _batched(self.a).ndim == 2:
            return Outer(at_least_float32(self.a) ** 2, at_least_float32(self.dz) ** 2).total()
        return super().second_moment()


@_factor
class PerExample(Factor):
    """Already every example's gradient: of a bias, or of a scale.

    >>> import jax.numpy as jnp
    >>> PerExample(jnp.array([[3.0, 4.0], [6.0, 8.0]])).squared_norm()
    Array([ 25., 100.], dtype=float32)
    """

    gradient: Array  # [batch, *parameter shape]

    def total(self) -> Array:
        return self.gradient.sum(0)

    def materialise(self) -> Array:
        return self.gradient


@_factor
class Scatter(Factor):
    """Per example and position one row `dy` added at `index`: the gradient of an embedding table.

    >>> import jax.numpy as jnp
    >>> Scatter(jnp.array([[2, 0]]), jnp.array([[[1.0], [5.0]]]), 3).total()
    Array([[5.],
           [0.],
           [1.]], dtype=float32)
    """

    index: Array  # [batch, ...] of whole numbers
    dy: Array  # [batch, ..., features]
    size: int = field(metadata={"static": True})  # rows of the table

    def total(self) -> Array:  # [size, features]
        dy = _rows(self.dy)
        return jnp.zeros((self.size, dy.shape[-1]), dy.dtype).at[self.index.reshape(-1)].add(dy)

    def materialise(self) -> Array:  # [batch, size, features]
        dy = self.dy.reshape(*self.index.shape[:1], -1, self.dy.shape[-1])
        index = self.index.reshape(*self.index.shape[:1], -1)
        return jax.vmap(lambda i, g: Scatter(i, g, self.size).total())(index, dy)

    def squared_norm(self) -> Array:
        if self.index.ndim == 1:  # one row an example: no two can meet
            return _sum_of_squares(self.dy)
        return _sum_of_squares(self.materialise())


@_factor
class Stacked(Factor):
    """A factor per layer of a `repeat`: every array has a leading axis of layers. Ask it through a `Reducer`."""

    factor: Factor


@dataclass(frozen=True)
class Reducer:
    """What `backward` does with every factor that it builds, and how the results of `repeat`'s layers come together.

    Attributes:
        name: for tables.
        reduce: `(factor) -> result`.
        stack: `(results stacked on a leading axis of layers) -> result for the stacked parameter`.
    """

    name: str
    reduce: Callable[[Any], Any]
    stack: Callable[[Any], Any] = lambda result: result

    def __call__(self, factor: Any) -> Any:
        """The result for one factor, however deeply `repeat` has stacked it."""
        if isinstance(factor, Stacked):
            return self.stack(jax.vmap(self)(factor.factor))
        return self.reduce(factor)

    def tree(self, factors: Any) -> Any:
        """The results for a whole tree of factors."""
        return jax.tree.map(self, factors, is_leaf=is_factor)


total = Reducer("total", lambda f: f.total())
materialise = Reducer("materialise", lambda f: f.materialise(), lambda r: jnp.moveaxis(r, 0, 1))
squared_norm = Reducer("squared_norm", lambda f: f.squared_norm(), lambda r: r.sum(0))
second_moment = Reducer("second_moment", lambda f: f.second_moment())


keep = Reducer("keep", lambda f: f, Stacked)
"""Keeps the factors themselves: `Stacked` under `repeat`."""

REDUCERS = (total, materialise, squared_norm, second_moment)


def sum_positions(g: Array) -> Array:
    """`[batch, ..., features]` summed over its positions to `[batch, features]`; `[features]` becomes `[1, features]`."""
    g = _batched(g)
    return g.sum(1) if g.ndim == 3 else g


def _rows(a: Array) -> Array:
    """`[batch * positions, features]`."""
    return a if a.ndim == 2 else a.reshape(-1, a.shape[-1])


def _batched(a: Array) -> Array:
    """`[features]` to `[1, features]`; `[batch, t1, t2, ..., features]` to `[batch, positions, features]`."""
    if a.ndim <= 2:
        return a.reshape(-1, a.shape[-1])
    return a.reshape(a.shape[0], -1, a.shape[-1])


def _sum_of_squares(a: Array) -> Array:
    """`[batch, ...]` to `[batch]`, accumulated in float32 at least."""
    a = at_least_float32(a)
    return (a * a).sum(tuple(range(1, a.ndim)))
