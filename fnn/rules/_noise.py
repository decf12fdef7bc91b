"""Random directions like a tree of arrays, and sums over many of them in the memory of a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree

from fnn.types import Array, Key, widen


def keep_key(key: Key, params: Any) -> Key:
    """The `init` of a rule whose state is a key."""
    return key


def normal_like(key: Key, tree: PyTree) -> PyTree:
    """Numbers of N(0, 1) like a tree of arrays, drawn as one vector: one draw compiles fastest."""
    flat, unravel = ravel_pytree(jax.tree.map(widen, tree))
    noise = jax.random.normal(key, flat.shape, flat.dtype)
    return optax.tree.cast_like(unravel(noise), tree)


def normal_rows(key: Key, arrays: list[Array]) -> list[Array]:
    """Numbers of N(0, 1) like some arrays `[batch, ...]`.

    Row i has the key `fold_in(key, i)`, so that its numbers do not depend on the batch size.
    """

    def row(i, rows):
        return normal_like(jax.random.fold_in(key, i), rows)

    return jax.vmap(row)(jnp.arange(arrays[0].shape[0]), arrays)


def scale(number: Float[Array, ""], tree: PyTree) -> PyTree:
    """The tree times a number, in the dtypes of the tree."""
    return jax.tree.map(lambda leaf: number.astype(leaf.dtype) * leaf, tree)


def weighted_sum(
    f: Callable[..., PyTree], shares: Float[Array, " rows"], xs: PyTree, size: int = 1
) -> PyTree:
    """`sum_k shares[k] f(xs[k])`, some rows at a time.

    Args:
        f: `(row of xs) -> tree of arrays`.
        shares: `[rows]`, in the dtype that the sum accumulates in.
        xs: a tree of arrays `[rows, ...]`.
        size: the most rows at a time; its greatest common divisor with `rows` is taken.

    Returns:
        A tree like the results of `f`, in the memory of `size` of them.

    >>> weighted_sum(lambda x: x * x, jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]))
    Array(11., dtype=float32)
    """
    if size > 1:  # else the batch may be symbolic
        size = math.gcd(size, len(shares))

    def in_chunks(a):
        return a.reshape(-1, size, *a.shape[1:])

    def part(share, x):
        terms = jax.vmap(f)(x)
        terms = optax.tree.cast(terms, share.dtype)
        return jax.tree.map(lambda a: jnp.tensordot(share, a, 1, precision="highest"), terms)

    def add(total, chunk):
        return optax.tree.add(total, part(*chunk)), None

    # in `shard_map` these zeros vary over the same axes of a mesh as what is added
    zeros = optax.tree.zeros_like(jax.eval_shape(part, shares, xs))
    chunks = jax.tree.map(in_chunks, (shares, xs))
    total, _ = lax.scan(add, zeros, chunks)
    return optax.tree.cast_like(total, jax.eval_shape(jax.vmap(f), xs))


def mean_of_draws(draw: Callable[[Key], PyTree], key: Key, draws: int) -> PyTree:
    """The mean of `draw(key_k)` over the keys `jax.random.split(key, draws)`."""
    keys = jax.random.split(key, draws)
    shares = jnp.full(draws, 1 / draws)
    return weighted_sum(draw, shares, keys)
