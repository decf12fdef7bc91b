"""Factors of a parameter that `repeat` stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.base import (
    Factor,
    SquaredNorm,
    factor,
    fast_squared_norm,
    materialise,
    squared_norm,
    sum_layers,
    total,
)
from fnn.types import Array


@factor
class Stacked(Factor):
    """A factor per layer of a `repeat`: every array has a leading axis of layers."""

    factor: Factor

    def total(self) -> Array:
        return jax.vmap(total)(self.factor)

    def scaled(self, weights) -> Stacked:
        """As of any factor; `weights` may be `[*layers, batch]` too."""
        if weights.ndim == 1:
            return Stacked(jax.vmap(lambda f: f.scaled(weights))(self.factor))
        return Stacked(jax.vmap(lambda f, w: f.scaled(w))(self.factor, weights))

    def materialise(self) -> Array:
        gradients = jax.vmap(materialise)(self.factor)
        return jnp.moveaxis(gradients, 0, 1)

    def merged(self) -> Stacked:
        layers_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), self.factor)
        return Stacked(jax.vmap(lambda f: f.merged())(layers_first))

    def squared_norm(self) -> Array:
        squares = lax.map(squared_norm, self.factor)
        return squares.sum(0)

    def fast_squared_norm(self) -> SquaredNorm:
        squares = jax.vmap(fast_squared_norm)(self.factor)
        return sum_layers(squares)

    @property
    def sums_exactly(self) -> bool:
        return self.factor.sums_exactly

    @property
    def one_by_one(self) -> bool:
        return self.factor.one_by_one

    @property
    def layers(self) -> tuple[int, ...]:
        first = jax.tree.leaves(self.factor)[0]
        return first.shape[0], *self.factor.layers

    def squares(self, fast) -> SquaredNorm:
        return lax.map(lambda f: f.squares(fast), self.factor)

    def inner(self, other) -> Array:
        products = jax.vmap(lambda f, g: f.inner(g))(self.factor, other.factor)
        return products.sum(0)

    def exact_total(self, weights) -> Array:
        """As of any factor; `weights` may be `[*layers, batch]` too."""
        if weights.ndim == 1:
            return lax.map(lambda f: f.exact_total(weights), self.factor)

        def of_layer(pair):
            f, own = pair
            return f.exact_total(own)

        return lax.map(of_layer, (self.factor, weights))

    def moments(self, shares) -> tuple[Array, Array]:
        return lax.map(lambda f: f.moments(shares), self.factor)

    def raw_moments(self, shares) -> tuple[Array, Array] | None:
        return jax.vmap(lambda f: f.raw_moments(shares))(self.factor)

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        rows, _ = self.factor.examples()  # [layers, batch, ...]

        def gradient(own):
            def of_layer(factor, own):
                return factor.examples()[1](own)

            return jax.vmap(of_layer)(self.factor, own)

        return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), rows), gradient
