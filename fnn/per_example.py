"""Statistics of individual gradients.

A *source* is any function `(params, *batch) -> (values [batch], tree of factors)`; `fnn.factors(net, loss)` is one. What is
here knows sources and factors, never nets. `by_vmap` is the other way to the same numbers: `jax.vmap` of a gradient
function over examples, which costs batch x parameters of memory and serves as the check.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from fnn import _check
from fnn._types import Array, ArrayLike, Params, at_least_float32
from fnn.factors import materialise, squared_norm

Source = Callable[..., tuple[Array, Any]]


def gradients(source: Source) -> Callable[..., Params]:
    """Every example's gradient, from the factors of one backward pass.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> tree` like `params` with leaves `[batch, ...]`. Their mean over the batch is
        the gradient of the mean loss.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = gradients(fnn.factors(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))[-1].w.shape
    (5, 3, 2)
    """

    _check.is_function("source", source, "(params, *batch) -> (values, factors), such as `fnn.factors(net, loss)`")

    def per_example_gradients(params: Params, *batch: ArrayLike) -> Params:
        return materialise.tree(source(params, *batch)[1])

    return per_example_gradients


def norms(source: Source) -> Callable[..., Array]:
    """The Euclidean norm of every example's gradient, over all parameters. No per-example gradient is formed.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> [batch]`, float32 at least.

    Source: Goodfellow (2015), arXiv:1510.01799: |a dz^T|^2 = |a|^2 |dz|^2.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = norms(fnn.factors(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5,)
    """

    _check.is_function("source", source, "(params, *batch) -> (values, factors), such as `fnn.factors(net, loss)`")

    def per_example_norms(params: Params, *batch: ArrayLike) -> Array:
        return jnp.sqrt(_sum_leaves(squared_norm.tree(source(params, *batch)[1])))

    return per_example_norms


def by_vmap(value_and_grad: Callable[..., tuple[Array, Params]]) -> Callable[..., tuple[Array, Params]]:
    """Every example's loss and gradient, by `jax.vmap` of a function for one batch over batches of one.

    Args:
        value_and_grad: `(params, *batch) -> (value, grads)`, manual or automatic.

    Returns:
        A function `(params, *batch) -> (values [batch], tree)` with leaves `[batch, ...]`. The same numbers as
        `gradients`, at batch x parameters of memory.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = by_vmap(fnn.value_and_grad(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))[1][-1].w.shape
    (5, 3, 2)
    """

    _check.is_function("value_and_grad", value_and_grad, "(params, *batch) -> (value, grads), such as `fnn.value_and_grad(net, loss)`")

    def for_each_example(params: Params, *batch: ArrayLike) -> tuple[Array, Params]:
        return jax.vmap(lambda *example: value_and_grad(params, *(leaf[None] for leaf in example)))(*batch)

    return for_each_example


def norms_of(tree: Params) -> Array:
    """The norm of every example's gradient from leaves `[batch, ...]`, `[batch]`, float32 at least.

    >>> norms_of((jnp.array([[3.0, 4.0], [0.0, 0.0]]),))
    Array([5., 0.], dtype=float32)
    """

    def squares(leaf: Array) -> Array:
        wide = at_least_float32(leaf)
        return (wide * wide).sum(tuple(range(1, leaf.ndim)))

    return jnp.sqrt(_sum_leaves(jax.tree.map(squares, tree)))


def _sum_leaves(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError("`params` hold no parameter, so that there is no gradient to take a norm of.")
    return reduce(add, leaves)
