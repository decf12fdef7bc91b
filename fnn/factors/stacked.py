"""Factors of a parameter that `repeat` stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.base import Factor, SquaredNorm, factor, sum_layers
from fnn.types import Array


@factor
class Stacked(Factor):
    """A factor per layer of a `repeat`: every array has a leading axis of layers."""

    factor: Factor
    one_by_one = False

    def total(self) -> Array:
        return jax.vmap(lambda f: f.total())(self.factor)

    def scaled(self, weights: Array) -> Stacked:
        """As of any factor; `weights` may be `[*layers, batch]` too."""
        axes = 0, None if weights.ndim == 1 else 0
        return Stacked(jax.vmap(lambda f, w: f.scaled(w), in_axes=axes)(self.factor, weights))

    def materialise(self) -> Array:
        return jnp.moveaxis(jax.vmap(lambda f: f.materialise())(self.factor), 0, 1)

    def merged(self) -> Stacked:
        layers_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), self.factor)
        return Stacked(jax.vmap(lambda f: f.merged())(layers_first))

    def squared_norm(self) -> Array:
        return lax.map(lambda f: f.squared_norm(), self.factor).sum(0)

    def fast_squared_norm(self) -> SquaredNorm:
        return sum_layers(jax.vmap(lambda f: f.fast_squared_norm())(self.factor))

    @property
    def sums_exactly(self) -> bool:
        return self.factor.sums_exactly

    @property
    def layers(self) -> tuple[int, ...]:
        return jax.tree.leaves(self.factor)[0].shape[0], *self.factor.layers

    def squares(self, fast: bool) -> SquaredNorm:
        return lax.map(lambda f: f.squares(fast), self.factor)

    def inner(self, other: Any) -> Array:
        return jax.vmap(lambda f, g: f.inner(g))(self.factor, other.factor).sum(0)

    def exact_total(self, weights: Array) -> Array:
        """As of any factor; `weights` may be `[*layers, batch]` too."""
        each = weights
        if weights.ndim == 1:
            each = jnp.broadcast_to(weights, (self.layers[0], *weights.shape))
        return lax.map(lambda pair: pair[0].exact_total(pair[1]), (self.factor, each))

    def moments(self, shares: Array) -> tuple[Array, Array]:
        return lax.map(lambda f: f.moments(shares), self.factor)

    def raw_moments(self, shares: Array) -> tuple[Array, Array] | None:
        return jax.vmap(lambda f: f.raw_moments(shares))(self.factor)

    def variance(self, shares: Array) -> Array:
        return lax.map(lambda f: f.variance(shares), self.factor)
