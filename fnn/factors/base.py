"""What a factor is, the factor that is already written out, and factors stacked by `repeat`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.rows import (
    centred,
    joined_norms,
    per_row,
    quick_square,
    safe_norm,
    sum_of_squares,
    times_row,
)
from fnn.types import Array, at_least_float32

_T = TypeVar("_T")


class Method(NamedTuple):
    """A way to an answer, and what it is predicted to cost."""

    name: str
    flops: float
    bytes: float  # read and written


class Factor:
    """What one batch contributes to the gradient of one parameter.

    Subclasses answer these questions, or those they can better.

    A factor is a pytree of arrays with a leading batch axis. A new one is a class here; a new
    question is a method here.
    """

    def total(self) -> Array:
        """The sum over the batch, in the parameter's own shape: the ordinary gradient."""
        raise NotImplementedError

    def scaled(self, weights: Array, present: Array | None = None) -> Any:
        """The factor whose examples are multiplied by weights `[batch]`.

        Its `total` is the weighted total.

        Where `present` (`[batch]` of bool) is False an example becomes 0 even if it is not finite,
        but for what `masked_total` has to see to.
        """
        raise NotImplementedError

    def masked_total(self, present: Array, into: Array) -> Array:
        """The `total` of a factor scaled with `present`, whatever the examples that are not present
        hold (0 x NaN is NaN).

        `into` is an array of the result's shape whose place it may take.
        """
        return self.total()

    def materialise(self) -> Array:
        """`[batch, *parameter shape]`: every example's own gradient.

        Costs batch x parameters of memory.
        """
        raise NotImplementedError

    def merged(self) -> Factor:
        """The factor of a parameter that is used several times, from arrays `[uses, batch, ...]`.

        An example sums over its uses.
        """
        raise NotImplementedError

    def norm(self) -> Array:
        """`[batch]`, at least float32: the Euclidean norm of every example's gradient.

        Neither overflows nor underflows on the way.
        """
        return safe_norm(sum_of_squares, self.materialise())

    def quick_square(self) -> tuple[Array, Array]:
        """The squared norms `[batch]` unless they overflow, and a bound `[batch]` on what underflow
        has cost them; cheaper than `norm`."""
        square = self.norm() ** 2
        return square, jnp.full_like(square, jnp.finfo(square.dtype).tiny)

    def inner(self, other: Any) -> Array:
        """`[batch, batch of other]`, at least float32.

        The inner products of the gradients in two factors of one parameter.
        """
        a, b = (at_least_float32(f.materialise()) for f in (self, other))
        return a.reshape(len(a), -1) @ b.reshape(len(b), -1).T

    def moments(self, share: Array) -> tuple[Array, Array]:
        """Mean and variance over the examples by their shares `[batch]` (which add up to 1), in the
        parameter's shape, float32 at least.

        The variance is that of the centred gradients, E[(g - E[g])^2], and never negative. A block
        of examples at a time.
        """
        batch, *shape = jax.eval_shape(lambda f: f.materialise(), self).shape
        mean = self.scaled(share).total()
        size = max(1, min(batch, 2**20 // max(1, mean.size)))

        def add(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            start = jnp.minimum(i * size, batch - size)
            rest = self.rows(start, size).materialise() - jnp.broadcast_to(mean, (size, *shape))
            s = lax.dynamic_slice_in_dim(share, start, size)
            # the last block may begin inside the one before
            s = jnp.where(start + jnp.arange(size) >= i * size, s, jnp.zeros_like(s))
            return sums[0] + jnp.tensordot(s, rest, 1), sums[1] + jnp.tensordot(s, rest * rest, 1)

        left, square = lax.fori_loop(
            0, -(-batch // size), add, (jnp.zeros_like(mean), jnp.zeros_like(mean))
        )
        return mean + left, jnp.maximum(square - left * left, 0)

    def second_moment(self) -> Array:
        """The sum over the batch of the elementwise squares of the per-example gradients, in the
        parameter's shape, float32 at least."""
        return (at_least_float32(self.materialise()) ** 2).sum(0)

    def methods(self) -> dict[str, Method]:
        """How each question is answered, and at what predicted cost; a function of shapes alone."""
        out = jax.eval_shape(lambda f: f.materialise(), self)
        flops, size = float(out.size), float(out.size * out.dtype.itemsize)
        return {
            "total": Method("sum", flops, size),
            "norm": Method("sum of squares", 2 * flops, size),
            "gram": Method("product", 2 * flops * out.shape[0], size),
            "moments": Method("centred squares", 6 * flops, 3 * size),
        }

    def rows(self, start: Any, size: int) -> Any:
        """The factor of `size` examples from `start` on."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), self)

    def masked(self, present: Array) -> Any:
        """The factor with zeros for the examples that are not `present` (`[batch]` of bool),
        whatever they held."""
        return jax.tree.map(lambda a: jnp.where(per_row(present, a), a, jnp.zeros_like(a)), self)

    def wide(self) -> Any:
        """The factor in float32 at least."""
        return jax.tree.map(
            lambda a: at_least_float32(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, self
        )


@dataclass_transform(frozen_default=True)
def factor(cls: type[_T]) -> type[_T]:
    """Makes a frozen dataclass that is a pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def is_factor(value: Any) -> bool:
    """True for a factor: `jax.tree.map(f, factors, is_leaf=is_factor)`."""
    return isinstance(value, Factor)


@factor
class PerExample(Factor):
    """Already every example's gradient: of a bias, or of a scale.

    >>> import jax.numpy as jnp
    >>> PerExample(jnp.array([[3.0, 4.0], [6.0, 8.0]])).norm()
    Array([ 5., 10.], dtype=float32)
    """

    gradient: Array  # [batch, *parameter shape]

    def total(self) -> Array:
        return self.gradient.sum(0)

    def scaled(self, weights: Array, present: Array | None = None) -> PerExample:
        return PerExample(times_row(self.gradient, weights, present))

    def materialise(self) -> Array:
        return self.gradient

    def merged(self) -> PerExample:
        return PerExample(self.gradient.sum(0))

    def quick_square(self) -> tuple[Array, Array]:
        return quick_square(self.gradient)

    def moments(self, share: Array) -> tuple[Array, Array]:
        g = self.gradient
        mean, rest = centred(g.reshape(len(g), -1), share)
        return mean.reshape(g.shape[1:]), (share @ (rest * rest)).reshape(g.shape[1:])


@factor
class Stacked(Factor):
    """A factor per layer of a `repeat`.

    Every array has a leading axis of layers, and the parameter too.
    """

    factor: Factor

    def total(self) -> Array:
        return self._each(lambda f: f.total())

    def scaled(self, weights: Array, present: Array | None = None) -> Stacked:
        """As of any factor; `weights` may be `[layers, batch]` too."""
        each = jax.vmap(
            lambda f, w: f.scaled(w, present), in_axes=(0, None if weights.ndim == 1 else 0)
        )
        return Stacked(each(self.factor, weights))

    def masked_total(self, present: Array, into: Array) -> Array:
        return jax.vmap(lambda f, i: f.masked_total(present, i))(self.factor, into)

    def materialise(self) -> Array:
        return jnp.moveaxis(self._each(lambda f: f.materialise()), 0, 1)

    def merged(self) -> Stacked:
        layers_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), self.factor)
        return Stacked(jax.vmap(lambda f: f.merged())(layers_first))

    def norm(self) -> Array:
        return joined_norms(self._each(lambda f: f.norm()))

    def quick_square(self) -> tuple[Array, Array]:
        square, lost = self._each(lambda f: f.quick_square())
        return square.sum(0), lost.sum(0)

    def inner(self, other: Any) -> Array:
        return jax.vmap(lambda f, g: f.inner(g))(self.factor, other.factor).sum(0)

    def moments(self, share: Array) -> tuple[Array, Array]:
        return self._each(lambda f: f.moments(share))

    def second_moment(self) -> Array:
        return self._each(lambda f: f.second_moment())

    def methods(self) -> dict[str, Method]:
        layers = jax.tree.leaves(self.factor)[0].shape[0]
        one = jax.eval_shape(lambda f: jax.tree.map(lambda a: a[0], f), self.factor)
        return {
            name: Method(m.name, layers * m.flops, layers * m.bytes)
            for name, m in one.methods().items()
        }

    def rows(self, start: Any, size: int) -> Stacked:
        return Stacked(self._each(lambda f: f.rows(start, size)))

    def masked(self, present: Array) -> Stacked:
        return Stacked(self._each(lambda f: f.masked(present)))

    def _each(self, question: Callable[[Any], Any]) -> Any:
        return jax.vmap(question)(self.factor)
