"""Random directions like a tree of arrays, and sums over many of them in the memory of a few."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree
from optax import tree

from fnn.factors import widen
from fnn.types import Array, Key


def keep_key(key: Key, params: PyTree[Float[Array, " ..."]]) -> Key:
    """The `init` of a rule whose state is a key."""
    return key


def normal_like(key: Key, like: PyTree[Float[Array, " ..."]]) -> PyTree[Float[Array, " ..."]]:
    """Numbers of N(0, 1) like a tree of arrays, drawn as one vector: one draw compiles fastest."""
    flat, unravel = ravel_pytree(jax.tree.map(widen, like))
    noise = jax.random.normal(key, flat.shape, flat.dtype)
    return tree.cast_like(unravel(noise), like)


def normal_rows(key: Key, arrays: list[Float[Array, "batch ..."]]):
    """Numbers of N(0, 1) like some arrays `[batch, ...]`.

    Row i has the key `fold_in(key, i)`, so that its numbers do not depend on the batch size.
    """

    def row(i, like):
        return normal_like(jax.random.fold_in(key, i), like)

    return jax.vmap(row)(jnp.arange(arrays[0].shape[0]), arrays)


def scale(number: Float[Array, ""], terms):
    """A tree times a number, in the dtypes of the tree."""
    return jax.tree.map(lambda leaf: number.astype(leaf.dtype) * leaf, terms)


def weighted_sum(f, shares: Float[Array, " rows"], xs, size=1):
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

    terms = jax.vmap(f)

    def part(chunk):
        share, x = chunk
        add_up = partial(jnp.tensordot, share, axes=1, precision="highest")
        return jax.tree.map(add_up, tree.cast(terms(x), share.dtype))

    def step(total, chunk):
        return tree.add(total, part(chunk)), None

    rows = shares, xs
    # in `shard_map` these zeros vary over the same axes of a mesh as what is added
    zeros = tree.zeros_like(jax.eval_shape(part, rows))
    chunks = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), rows)
    total, _ = lax.scan(step, zeros, chunks)
    return tree.cast_like(total, jax.eval_shape(terms, xs))


def mean_of_draws(
    draw: Callable[[Key], PyTree[Float[Array, " ..."]]], key: Key, draws: int
) -> PyTree[Float[Array, " ..."]]:
    """The mean of `draw(key_k)` over the keys `jax.random.split(key, draws)`."""
    return weighted_sum(draw, jnp.full(draws, 1 / draws), jax.random.split(key, draws))
