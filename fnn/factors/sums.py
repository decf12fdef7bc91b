"""Factors of a parameter that is used in several ways, by all examples alike, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fnn.factors.base import (
    Factor,
    OneByOne,
    SquaredNorm,
    factor,
    inner,
    project,
    scale_rows,
    sum_leaves,
    widen,
)
from fnn.factors.outer import Outer
from fnn.factors.scatter import Scatter
from fnn.factors.view import View
from fnn.types import Array


@factor
class Same(OneByOne):
    """One gradient for all examples, times a number of each: of weight decay in the loss."""

    weights: Array  # [batch]
    gradient: Array  # [*parameter shape]
    sums_exactly = True

    def total(self) -> Array:
        weight = self.weights.sum().astype(self.gradient.dtype)
        return jnp.where(weight != 0, weight * self.gradient, 0)

    def scaled(self, weights) -> Same:
        return replace(self, weights=scale_rows(self.weights, weights))

    def merged(self) -> Same:
        return Same(self.weights.sum(0), self.gradient[0])  # alike in all uses

    def squared_norm(self) -> Array:
        g = widen(self.gradient)
        weights = widen(self.weights)
        return weights**2 * (g * g).sum()

    def moments(self, shares) -> tuple[Array, Array]:
        g = widen(self.gradient)
        weights = widen(self.weights)
        present = jnp.where(shares != 0, weights, 0)
        mean = (shares * present).sum()
        gap = jnp.where(shares != 0, weights - mean, 0)
        variance = (shares * gap * gap).sum()
        return mean * g, variance * g * g

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        return self.weights, lambda own: own.astype(self.gradient.dtype) * self.gradient


@factor
class Zero(Factor):
    """No gradient: of a parameter that is not used, or that is no real number."""

    weights: Array  # [batch]
    shape: tuple[int, ...] = field(metadata={"static": True})  # of the parameter
    dtype: Any = field(metadata={"static": True})
    sums_exactly = True

    def total(self) -> Array:
        return jnp.zeros(self.shape, self.dtype)

    def scaled(self, weights) -> Zero:
        return self

    def merged(self) -> Zero:
        return replace(self, weights=self.weights[0])

    def materialise(self) -> Array:
        return jnp.zeros((*self.weights.shape, *self.shape), self.dtype)

    def squared_norm(self) -> Array:
        return jnp.zeros_like(widen(self.weights))

    def inner(self, other) -> Array:
        shape = self.weights.shape[0], other.weights.shape[0]
        return jnp.zeros(shape, widen(self.weights).dtype)

    def moments(self, shares) -> tuple[Array, Array]:
        zeros = jnp.zeros(self.shape, widen(self.weights).dtype)
        return zeros, zeros

    def exact_total(self, weights) -> Array:
        return self.total()

    def wide(self) -> Zero:
        return self

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        return self.weights, lambda own: self.total()


@factor
class Sum(OneByOne):
    """Several factors of one parameter: an embedding that is the output layer too, say."""

    parts: tuple[Any, ...]

    def total(self) -> Array:
        return sum_leaves([f.total() for f in self.parts])

    def scaled(self, weights) -> Sum:
        return Sum(tuple(f.scaled(weights) for f in self.parts))

    def merged(self) -> Sum:
        return Sum(tuple(f.merged() for f in self.parts))

    @property
    def one_by_one(self) -> bool:
        pairs = itertools.combinations(self.parts, 2)
        return not all(has_dots(f, g) for f, g in pairs)

    def fast_squared_norm(self) -> SquaredNorm:
        if self.one_by_one:
            return SquaredNorm(self.squared_norm())
        pairs = list(itertools.combinations(self.parts, 2))
        value, size, own = self._own()
        products = sum_leaves([2 * dots(f, g) for f, g in pairs])
        return SquaredNorm(value + products, size + jnp.abs(products), own)

    def inner(self, other) -> Array:
        if not isinstance(other, Sum):
            return OneByOne.inner(self, other)
        return sum_leaves([inner(f, g) for f in self.parts for g in other.parts])

    def wide(self) -> Sum:
        return Sum(tuple(f.wide() for f in self.parts))

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        rows, gradients = zip(*[f.examples() for f in self.parts], strict=True)

        def gradient(own):
            parts = zip(gradients, own, strict=True)
            return sum_leaves([part(rows) for part, rows in parts])

        return rows, gradient

    def _own(self):
        """The sums of the squared norms of the parts, of their sizes and parts."""
        found = [f.fast_squared_norm() for f in self.parts]
        value = sum_leaves([s.value for s in found])
        size = sum_leaves([s.value if s.size is None else s.size for s in found])
        parts = sum_leaves([s.value if s.parts is None else s.parts for s in found])
        return value, size, parts


def dots(f: Factor, g: Factor) -> Float[Array, " batch"]:
    """The inner product of the two gradients of every example, where `has_dots`."""
    if isinstance(f, View) and isinstance(g, View):
        return dots(f.of, g.of)
    if isinstance(f, Same):
        return f.weights * project(g, f.gradient)
    if isinstance(g, Same):
        return dots(g, f)
    if isinstance(f, Outer):
        f, g = g, f
    return jax.vmap(_dot)(f, g)


def has_dots(f: Factor, g: Factor) -> bool:
    """Whether `dots` needs no gradient of an example."""
    if isinstance(f, View) and isinstance(g, View) and f.layout == g.layout:
        return has_dots(f.of, g.of)
    if f.one_by_one or g.one_by_one:
        return False
    if isinstance(f, Same) or isinstance(g, Same):
        return True
    return {type(f), type(g)} == {Outer, Scatter}


def _dot(scatter, outer):
    """<sum_t e[index_t] dy_t^T, sum_s a_s dz_s^T> of one example."""
    index = scatter.index.reshape(-1)
    dy = widen(scatter.dy).reshape(index.shape[0], -1)
    a = widen(outer.a).reshape(-1, outer.a.shape[-1])
    dz = widen(outer.dz).reshape(a.shape[0], -1)
    near = jnp.take(a, index, axis=1, mode="fill", fill_value=0)  # [s, t]
    far = jnp.matmul(dz, dy.T, precision="highest")
    inside = (index >= 0) & (index < scatter.size)
    return jnp.where(inside[None], near * far, 0).sum()
