"""What a backward pass does with the factors that it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn.factors.base import Stacked, is_factor
from fnn.factors.rows import joined_norms


@dataclass(frozen=True)
class Reducer:
    """What `backward` does with every factor that it builds, and how the results of `repeat`'s
    layers come together.

    Attributes:
        name: for tables.
        reduce: `(factor) -> result`.
        stack: `(array [layers, ...]) -> array`, applied to every array of the results stacked on a
            leading axis of layers.
        linear: the result for a sum of gradients is the sum of their results.
    """

    name: str
    reduce: Callable[[Any], Any]
    stack: Callable[[Any], Any] = lambda result: result
    linear: bool = False

    def __call__(self, factor: Any) -> Any:
        """The result for one factor."""
        return self.reduce(factor)

    def tree(self, factors: Any) -> Any:
        """The results for a whole tree of factors."""
        return jax.tree.map(self, factors, is_leaf=is_factor)


total = Reducer("total", lambda f: f.total(), linear=True)
materialise = Reducer(
    "materialise", lambda f: f.materialise(), lambda r: jnp.moveaxis(r, 0, 1), linear=True
)
norm = Reducer("norm", lambda f: f.norm(), joined_norms)
squared_norm = Reducer("squared_norm", lambda f: f.norm() ** 2, lambda r: r.sum(0))
quick_square = Reducer("quick_square", lambda f: f.quick_square(), lambda r: r.sum(0))
second_moment = Reducer("second_moment", lambda f: f.second_moment())
keep = Reducer("keep", lambda f: f, Stacked)
"""Keeps the factors themselves: `Stacked` under `repeat`."""

REDUCERS = (total, materialise, norm, squared_norm, second_moment)
