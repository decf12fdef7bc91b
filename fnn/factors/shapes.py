"""Shapes that factors are brought into: a batch axis, at most one axis of positions, the features."""

from __future__ import annotations

import jax.numpy as jnp

from fnn.types import Array


def sum_positions(g: Array) -> Array:
    """`[batch, ..., features]` summed over its positions to `[batch, features]`.

    `[features]` becomes `[1, features]`.
    """
    g = batched(g)
    return g.sum(1) if g.ndim == 3 else g


def batched(a: Array) -> Array:
    """`[features]` to `[1, features]`.

    `[batch, t1, t2, ..., features]` to `[batch, positions, features]`.
    """
    if a.ndim <= 2:
        return a.reshape(-1, a.shape[-1])
    return a.reshape(a.shape[0], -1, a.shape[-1])


def rows_of(a: Array) -> Array:
    """`[batch * positions, features]`."""
    return a if a.ndim == 2 else a.reshape(-1, a.shape[-1])


def uses_as_positions(a: Array, features: int) -> Array:
    """`[uses, batch, ..., *features]` to `[batch, uses, ..., *features]`.

    Without a batch axis to a batch of one.
    """
    return a[None] if a.ndim == 1 + features else jnp.moveaxis(a, 0, 1)
