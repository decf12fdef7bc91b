"""Factors whose gradient is that of another factor behind a linear map that all examples share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp

from fnn.factors.base import Factor, OneByOne, SquaredNorm, factor, inner
from fnn.types import Array


@dataclass(frozen=True)
class Layout:
    """How the axes of a gradient lie in its parameter: a function of the gradient.

    Attributes:
        axes: of the gradient, some of them split.
        order: of these axes in the parameter.
        shape: of the parameter.
    """

    axes: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, g: Array) -> Array:
        """The gradient as it lies in the parameter."""
        return g.reshape(self.axes).transpose(self.order).reshape(self.shape)


@factor
class View(Factor):
    """A factor whose numbers lie in the parameter in another order, shape or dtype."""

    of: Any
    layout: Callable[[Array], Array] = field(metadata={"static": True})  # may put zeros between
    dtype: Any = field(metadata={"static": True})  # of the parameter

    @property
    def single(self) -> bool:
        return self.of.single

    @property
    def sums_exactly(self) -> bool:
        return self.of.sums_exactly

    @property
    def one_by_one(self) -> bool:
        return self.of.one_by_one

    def total(self) -> Array:
        return self.layout(self.of.total()).astype(self.dtype)

    def scaled(self, weights) -> View:
        return replace(self, of=self.of.scaled(weights))

    def materialise(self) -> Array:
        gradients = self.of.materialise()
        return jax.vmap(self.layout)(gradients).astype(self.dtype)

    def merged(self) -> View:
        return replace(self, of=self.of.merged())

    def squared_norm(self) -> Array:
        return self.of.squared_norm()

    def fast_squared_norm(self) -> SquaredNorm:
        return self.of.fast_squared_norm()

    def inner(self, other) -> Array:
        if self.layout == other.layout:
            return inner(self.of, other.of)
        return OneByOne.inner(cast(Any, self), other)

    def exact_total(self, weights) -> Array:
        return self.layout(self.of.exact_total(weights))

    def moments(self, shares) -> tuple[Array, Array]:
        mean, variance = self.of.moments(shares)
        return self.layout(mean), self.layout(variance)

    def raw_moments(self, shares) -> tuple[Array, Array] | None:
        found = self.of.raw_moments(shares)
        if found is None:
            return None
        mean, square = found
        return self.layout(mean), self.layout(square)

    def wide(self) -> View:
        narrow = self.dtype.itemsize < 4
        return replace(
            self, of=self.of.wide(), dtype=jnp.dtype("float32") if narrow else self.dtype
        )

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        rows, gradient = self.of.examples()
        return rows, lambda own: self.layout(gradient(own)).astype(self.dtype)


@factor
class Mapped(OneByOne):
    """A factor behind a linear map: of a masked weight, or of a direction in weight norm.

    Sums of gradients go through the map once. Norms form the gradient of one example at a time.
    """

    of: Any
    operands: dict[int, tuple[Array, ...]]  # of the map; no batch axis
    map: Callable = field(metadata={"static": True})  # (gradient, operands) -> gradient
    one_by_one = True

    def total(self) -> Array:
        return self._through(self.of.total())

    def scaled(self, weights) -> Mapped:
        return replace(self, of=self.of.scaled(weights))

    def merged(self) -> Mapped:
        operands = jax.tree.map(lambda a: a[0], self.operands)  # alike in all uses
        return replace(self, of=self.of.merged(), operands=operands)

    def wide(self) -> Mapped:
        return replace(self, of=self.of.wide())

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        rows, gradient = self.of.examples()
        return rows, lambda own: self._through(gradient(own))

    def _through(self, g):
        return self.map(g, self.operands)
