"""One answer per example: gradients, norms, inner products; nothing is summed over the batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.factors import Reducer, is_factor, keep, materialise, norm, quick_square
from fnn.factors.rows import by_blocks, joined_norms, mended, safe_norm, sum_of_squares
from fnn.types import Array, ArrayLike, Params

Source = Callable[..., tuple[Array, Any]]


def gradients(source: Source) -> Callable[..., Params]:
    """Every example's gradient, from the factors of one backward pass.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> tree` like `params` with leaves `[batch, ...]`. Their mean
        over the batch is the gradient of the mean loss.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = gradients(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))[-1].w.shape
    (5, 3, 2)
    """
    reduced = asked(source, materialise)

    def per_example_gradients(params: Params, *batch: ArrayLike) -> Params:
        return reduced(params, *batch)[1]

    return per_example_gradients


def norms(source: Source) -> Callable[..., Array]:
    """The Euclidean norm of every example's gradient, over all parameters.

    No per-example gradient is formed.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> [batch]`, float32 at least; right wherever the norm itself
        is a number of its dtype (the squares of a float32 gradient of 1e25 are not); but a float32
        norm below 1e-17 may be given as 0 beside others above 1e-10. NaN or Inf for an example
        whose gradient is not finite.

    Source: Goodfellow (2015), arXiv:1510.01799: |a dz^T|^2 = |a|^2 |dz|^2.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = norms(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5,)
    """
    quickly, exactly = asked(source, quick_square), asked(source, norm)

    def per_example_norms(params: Params, *batch: ArrayLike) -> Array:
        def again(batch: tuple[ArrayLike, ...]) -> Array:
            return joined_norms(jnp.stack(jax.tree.leaves(exactly(params, *batch)[1])))

        square, lost = sum_pairs(quickly(params, *batch)[1])
        # where these do not hold, another pass, a few examples at a time, so that nothing is kept
        # for it
        few = min(32, max(2, square.shape[0] // 64))
        return lax.cond(
            is_quick(square, lost), lambda: jnp.sqrt(square), lambda: by_blocks(again, batch, few)
        )

    return per_example_norms


class TopExamples(NamedTuple):
    """The examples with the largest gradients, the largest first."""

    norms: Array  # [k]
    examples: Array  # [k] row numbers


def top_examples(source: Source, k: int) -> Callable[..., TopExamples]:
    """The `k` examples whose gradients are largest.

    Wrong labels, outliers, what training has yet to learn.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        k: how many, at least 1 and at most the batch.

    Returns:
        A function `(params, *batch) -> TopExamples`. A gradient that is not finite counts as
        infinitely large.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = top_examples(fnn.source(net, fnn.losses.l2_loss), 1)
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)).at[3].set(9.0)).examples
    Array([3], dtype=int32)
    """
    _validate.positive("k", k, whole=True)
    all_norms = norms(source)

    def largest(params: Params, *batch: ArrayLike) -> TopExamples:
        n = all_norms(params, *batch)
        if k > n.shape[0]:
            raise ValueError(
                f"`k` is {k} but the batch has only {n.shape[0]} examples. Pass at most {n.shape[0]}."
            )
        _, examples = lax.top_k(jnp.where(jnp.isfinite(n), n, jnp.full_like(n, jnp.inf)), k)
        return TopExamples(n[examples], examples)

    return largest


def inner_products(source: Source) -> Callable[..., Array]:
    """Inner products between the gradients of two batches, `G[i, j] = <g_i, g'_j>`, without forming
    a gradient.

    A negative one is a conflict: a step down one example's gradient raises the other's loss. With
        `lr` the step size at
    each of several checkpoints, `sum(lr * inner_products(source)(params, train, test) for params in
    checkpoints)` are the TracIn scores: how much training on i has lowered the loss of j.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, batch_a, batch_b) -> [examples of a, examples of b]`, float32 at least;
        a batch is a tuple such as `(x, targets)`.

    Raises:
        TypeError: a batch is no tuple.

    Source: Pruthi, Liu, Kale, Sundararajan (2020), arXiv:2002.08484 (TracIn).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = inner_products(fnn.source(net, fnn.losses.l2_loss))
    >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
    >>> f(net.init(jax.random.key(0)), batch, (jnp.ones((4, 3)), jnp.ones((4, 2)))).shape
    (5, 4)
    """
    factors_of = asked(source)

    def products(
        params: Params, batch_a: tuple[ArrayLike, ...], batch_b: tuple[ArrayLike, ...]
    ) -> Array:
        for name, batch in (("batch_a", batch_a), ("batch_b", batch_b)):
            if not isinstance(batch, tuple):
                raise TypeError(
                    f"`{name}` must be a tuple such as (x, targets), got {type(batch).__name__}."
                )
        return _inner(factors_of(params, *batch_a)[1], factors_of(params, *batch_b)[1])

    return products


def gram(source: Source) -> Callable[..., Array]:
    """The Gram matrix of the gradients, `G[i, j] = <g_i, g_j>`.

    The empirical neural tangent kernel of the loss.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> [batch, batch]`, float32 at least; symmetric, positive
        semi-definite to rounding. Its diagonal are the squared norms; `G / (n[:, None] * n[None,
        :])` with `n = sqrt(diagonal)` are the cosines.

    Source: Jacot, Gabriel, Hongler (2018), arXiv:1806.07572 (the kernel of the outputs; here that
    of the loss).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = gram(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5, 5)
    """
    factors_of = asked(source)

    def products(params: Params, *batch: ArrayLike) -> Array:
        factors = factors_of(params, *batch)[1]
        return _inner(factors, factors)

    return products


def by_vmap(
    value_and_grad: Callable[..., tuple[Array, Params]],
) -> Callable[..., tuple[Array, Params]]:
    """Every example's loss and gradient, by `jax.vmap` of a function for one batch over batches of
    one.

    Args:
        value_and_grad: `(params, *batch) -> (value, grads)`, manual or automatic.

    Returns:
        A function `(params, *batch) -> (values [batch], tree)` with leaves `[batch, ...]`. The same
        numbers as `gradients`, at batch x parameters of memory.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = by_vmap(fnn.value_and_grad(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))[1][-1].w.shape
    (5, 3, 2)
    """

    _validate.is_function(
        "value_and_grad",
        value_and_grad,
        "(params, *batch) -> (value, grads), such as `fnn.value_and_grad(net, loss)`",
    )

    def for_each_example(params: Params, *batch: ArrayLike) -> tuple[Array, Params]:
        return jax.vmap(
            lambda *example: value_and_grad(params, *jax.tree.map(lambda leaf: leaf[None], example))
        )(*batch)

    return for_each_example


def norms_of(tree: Params) -> Array:
    """The norm of every example's gradient from leaves `[batch, ...]`, `[batch]`, float32 at least.

    >>> norms_of((jnp.array([[3.0, 4.0], [0.0, 0.0]]),))
    Array([5., 0.], dtype=float32)
    """
    return joined_norms(
        jnp.stack(leaves_of(jax.tree.map(lambda leaf: safe_norm(sum_of_squares, leaf), tree)))
    )


def is_source(source: Any) -> None:
    """Raises a TypeError unless `source` can be called."""
    _validate.is_function(
        "source", source, "(params, *batch) -> (values, factors), such as `fnn.source(net, loss)`"
    )


def asked(source: Source, reducer: Reducer = keep) -> Callable[..., tuple[Array, Any]]:
    """`(params, *batch) -> (values, tree of results)`.

    Reduced within the backward pass where the source takes `reduce`.
    """
    is_source(source)
    within = _takes_reduce(source)

    def answer(params: Params, *batch: ArrayLike) -> tuple[Array, Any]:
        values, found = source(params, *batch, reduce=reducer) if within else source(params, *batch)
        if jnp.ndim(values) != 1:
            raise ValueError(
                f"`source` must return values [batch], one per example; got shape {jnp.shape(values)}."
            )
        if not values.shape[0]:
            raise ValueError(
                "`source` was given an empty batch: a statistic of no example is undefined."
            )
        return values, found if within else reducer.tree(found)

    return answer


def _takes_reduce(source: Any) -> bool:
    """Whether `source` itself has the keyword.

    What it wraps does not count, and a jitted function takes no reducer.
    """
    innermost = source
    while isinstance(innermost, functools.partial):
        innermost = innermost.func
    if isinstance(innermost, jax.stages.Wrapped):
        return False
    return "reduce" in inspect.signature(source, follow_wrapped=False).parameters


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a tree of factors or of results; a ValueError where there is none."""
    leaves = jax.tree.leaves(tree, is_leaf=is_factor)
    if not leaves:
        raise ValueError(
            "`params` hold no parameter, so that there is no gradient to take a statistic of."
        )
    return leaves


def quick_squares(factors: Any) -> tuple[Array, Array]:
    """The squared norms `[batch]` of whole gradients as they come, and how much underflow may have
    cost them."""
    return sum_pairs(quick_square.tree(factors))


def sum_pairs(pairs: Any) -> tuple[Array, Array]:
    """The two sums over a tree of pairs."""
    leaves = leaves_of(pairs)
    square, lost = leaves[0], leaves[1]
    for i in range(2, len(leaves), 2):
        square, lost = square + leaves[i], lost + leaves[i + 1]
    return square, lost


def is_quick(square: Array, lost: Array) -> Array:
    """Whether all quick squares hold: none has overflowed.

    None has lost more than rounding does, of itself or of the largest.
    """
    eps = float(jnp.finfo(square.dtype).eps)
    largest = jnp.broadcast_to(square.max() * eps, square.shape)
    return ((square < jnp.inf) & (lost <= eps * jnp.maximum(square, largest))).all()


def exact_norms(factors: Any) -> Array:
    """The norms `[batch]` of whole gradients, by scaled sums."""
    return joined_norms(jnp.stack([f.norm() for f in leaves_of(factors)]))


def whole_norms(factors: Any) -> Array:
    """The norms `[batch]` of whole gradients, the quick way where it holds."""
    square, lost = quick_squares(factors)
    return mended(is_quick(square, lost), jnp.sqrt(square), lambda _: exact_norms(factors))


def _inner(factors: Any, others: Any) -> Array:
    products = [f.inner(g) for f, g in zip(leaves_of(factors), leaves_of(others), strict=True)]
    total = products[0]
    for p in products[1:]:
        total = total + p
    return total
