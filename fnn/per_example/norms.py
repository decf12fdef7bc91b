"""One answer per example: gradients and norms; nothing is summed over the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from fnn import _validate
from fnn.factors import Reducer, keep, materialise, square_rows, squared_norm
from fnn.factors.base import SquaredNorm, fast_squared_norm, root, settle, sum_leaves
from fnn.types import Array, ArrayLike, Params, Source, storable

CANCEL = 8.0  # terms of a sum of squares that cancel more than so often are added otherwise


def gradients(source: Source) -> Callable[..., Params]:
    """The gradient of every example, from one backward pass.

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
    check_is_source(source)

    def per_example_gradients(params, *batch):
        _, found = ask(source, materialise, params, *batch)
        return found

    return per_example_gradients


def norms(source: Source) -> Callable[..., Float[Array, " batch"]]:
    """The Euclidean norm of the gradient of every example, over all parameters.

    No gradient of an example is formed.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> [batch]`, float32 at least. Squares are summed in that
        dtype: a norm above 1e19 may be infinite in float32, one below 1e-22 may be 0. NaN or
        infinite for an example whose gradient is not finite.

    Source: Goodfellow (2015), arXiv:1510.01799: |a dz^T|^2 = |a|^2 |dz|^2.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = norms(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5,)
    """
    check_is_source(source)

    def per_example_norms(params, *batch):
        if reduces(source):
            _, squares = ask(source, fast_squared_norm, params, *batch)
            operands = params, *batch
        else:  # the factors are there already
            _, operands = ask(source, keep, params, *batch)
            squares = fast_squared_norm.tree(operands)

        def exact(operands):
            if not reduces(source):
                return sum_leaves(squared_norm.tree(operands))
            return sum_leaves(ask(source, squared_norm, *operands)[1])

        square, size = sum_squares(squares)
        if size is not None:
            safe = (size <= CANCEL * square).all()
            square = settle(safe, square, exact, operands)
        return root(square)

    return per_example_norms


@storable
class TopExamples(NamedTuple):
    """The examples with the largest gradients, the largest first."""

    norms: Float[Array, " k"]
    examples: Int[Array, " k"]  # row numbers


def top_examples(source: Source, k: int) -> Callable[..., TopExamples]:
    """The `k` examples whose gradients are largest.

    They are wrong labels, outliers, or what training has yet to learn.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        k: how many, at least 1 and at most the batch.

    Returns:
        A function `(params, *batch) -> TopExamples`. A gradient that is not finite comes
        first; its norm stays as it is.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = top_examples(fnn.source(net, fnn.losses.l2_loss), 1)
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)).at[3].set(9.0)).examples
    Array([3], dtype=int32)
    """
    _validate.positive("k", k, whole=True)
    all_norms = norms(source)

    def largest(params, *batch):
        n = all_norms(params, *batch)
        most = n.shape[0]
        if isinstance(most, int) and k > most:  # the batch of `jax.export` may be a symbol
            raise ValueError(f"`k` is {k} but the batch has {most} examples. Pass at most {most}.")
        sizes = jnp.where(jnp.isfinite(n), n, jnp.inf)
        _, examples = lax.top_k(sizes, k)
        return TopExamples(n[examples], examples)

    return largest


def by_vmap(value_and_grad: Callable[..., tuple[Array, Params]]) -> Callable:
    """The loss and gradient of every example, by `jax.vmap` over batches of one.

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
    form = "(params, *batch) -> (value, grads), such as `fnn.value_and_grad(net, loss)`"
    _validate.is_function("value_and_grad", value_and_grad, form)

    def for_every_example(params, *batch):
        def for_one(*example):
            rows = jax.tree.map(lambda leaf: leaf[None], example)
            return value_and_grad(params, *rows)

        return jax.vmap(for_one)(*batch)

    return for_every_example


def norms_of(tree: Params) -> Float[Array, " batch"]:
    """The norm of the gradient of every example from leaves `[batch, ...]`, float32 at least.

    >>> norms_of((jnp.array([[3.0, 4.0], [0.0, 0.0]]),))
    Array([5., 0.], dtype=float32)
    """
    squares = jax.tree.map(square_rows, tree)
    return root(sum_leaves(squares))


def check_is_source(source: Source | Any) -> None:
    """Raises a TypeError unless `source` can be called."""
    form = "(params, *batch) -> (values, factors), such as `fnn.source(net, loss)`"
    _validate.is_function("source", source, form)


def reduces(source: Source) -> bool:
    """Whether a source takes the keyword `reduce`; a jitted function takes no functions."""
    jitted = isinstance(source, jax.stages.Wrapped)
    return not jitted and "reduce" in inspect.signature(source).parameters


def ask(source: Source, reducer: Reducer, params: Params, *batch: ArrayLike) -> tuple[Array, Any]:
    """`(values, tree of results)`, reduced within the backward pass where the source can."""
    within = reduces(source)
    keywords = {"reduce": reducer} if within else {}
    values, found = cast(Any, source)(params, *batch, **keywords)
    if jnp.ndim(values) != 1:
        came = jnp.shape(values)
        raise ValueError(f"`source` must return values [batch], one per example; got shape {came}.")
    if values.shape[0] == 0:
        raise ValueError("`source` got an empty batch: a statistic of no example is undefined.")
    if not within:
        found = reducer.tree(found)
    if not jax.tree.leaves(found):
        raise ValueError("`params` hold no parameter: there is no gradient to take a statistic of.")
    return values, found


def sum_squares(
    tree: Any,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"] | None]:
    """The squared norms of whole gradients, and the sum of the sizes of their terms if some cancel.

    Args:
        tree: with a `SquaredNorm` for every parameter.
    """
    parts = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, SquaredNorm))
    square = sum_leaves([part.value for part in parts])
    if all(part.size is None for part in parts):
        return square, None
    sizes = [part.value if part.size is None else part.size for part in parts]
    return square, sum_leaves(sizes)
