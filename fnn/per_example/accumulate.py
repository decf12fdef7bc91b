"""A batch that does not fit, microbatch by microbatch: the same result to rounding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from fnn import _validate
from fnn.factors.base import scan, widen
from fnn.per_example.clipping import Gradient, Reduction
from fnn.per_example.moments import Moments
from fnn.types import Array

Merge = Literal["mean", "sum", "examples"]


class _State(NamedTuple):
    """What the microbatches so far amount to; None for what a result does not have."""

    weight: Float[Array, ""]  # the sum of the weights
    total: Any = None  # sums; of means too, since the first weights may sum to 0
    mean: Any = None
    variance: Any = None


def accumulate(fn: Callable, microbatch_size: int, *, reduction: Merge | None = None) -> Callable:
    """The same function, that goes through a batch `microbatch_size` examples at a time.

    Args:
        fn: `(params, *batch, weights=None) -> result`. A result that states its reduction (of
            `clipped_gradient`, `weighted_gradient`, `moments`) needs nothing more.
        microbatch_size: examples at a time, at least 1.
        reduction: what any other result is, all of it: `"mean"` over the batch by the weights
            (`fnn.value_and_grad`), `"sum"`, or `"examples"`: arrays `[batch, ...]` (`gradients`,
            `norms`).

    Returns:
        A function like `fn` with the same result, to rounding, at the memory of one microbatch,
        under one `lax.scan`. The last microbatch is filled up with examples of weight 0.

    Raises:
        TypeError, ValueError: the reduction is not known; the arrays of a batch differ in length.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = accumulate(fnn.value_and_grad(net, fnn.losses.l2_loss), 2, reduction="mean")
    >>> value, grads = f(net.init(jax.random.key(0)), jnp.zeros((5, 3)), jnp.ones((5, 2)))
    >>> value
    Array(1., dtype=float32)
    """
    _validate.is_function("fn", fn, "(params, *batch, weights=None) -> result")
    _validate.positive("microbatch_size", microbatch_size, whole=True)
    if reduction is not None:
        _validate.one_of("reduction", reduction, ("mean", "sum", "examples"))

    def accumulated(params, *batch, weights=None):
        rows = _rows((batch, weights))
        missing = -rows % microbatch_size
        filled = weights
        if weights is None and missing and reduction != "examples":
            _check_takes_weights(fn, rows, microbatch_size)
            filled = jnp.ones(rows)

        def part(chunk):
            some, w = chunk
            if w is None:
                result = fn(params, *some)
                weight = jnp.float32(microbatch_size)
            else:
                result = fn(params, *some, weights=w)
                weight = widen(w).sum()
            return result, *_apart(result, weight, reduction)

        def turn(state, chunk):
            _, each, new = part(chunk)
            return _merge(state, new), each

        more = _chunks(filled, missing, microbatch_size, zero=True)
        chunks = _chunks(batch, missing, microbatch_size), more
        one = jax.tree.map(lambda a: a[0], chunks)
        like, _, shapes = jax.eval_shape(part, one)
        start = jax.tree.map(jnp.zeros_like, shapes)
        state, each = scan(turn, start, chunks)
        each = jax.tree.map(lambda a: lax.collapse(a, 0, 2)[:rows], each)
        return _whole(like, each, state, reduction, weights)

    return accumulated


def _rows(batch):
    """How many examples a batch has."""
    lengths = set()
    for leaf in jax.tree.leaves(batch):
        _validate.is_array("batch", leaf)
        lengths.add(leaf.shape[0] if leaf.ndim else 0)
    if len(lengths) != 1 or 0 in lengths:
        came = sorted(lengths)
        raise ValueError(
            f"The arrays of a batch must have one length of at least 1, got {came} rows."
        )
    return lengths.pop()


def _check_takes_weights(fn, rows, size):
    parameters = inspect.signature(fn).parameters.values()
    if not any(p.name == "weights" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{rows} rows do not divide into microbatches of {size}, and `fn` takes no `weights` "
            "that could fill up the last. Pass a `microbatch_size` that divides them."
        )


def _chunks(tree, missing, size, zero=False):
    """`[batch, ...]` as `[microbatches, size, ...]`, filled up with copies of a row or with 0."""

    def chunk(a):
        a = jnp.asarray(a)
        row = a[:1]
        if zero:
            row = jnp.zeros_like(row)
        more = jnp.broadcast_to(row, (missing, *a.shape[1:]))
        whole = jnp.concatenate([a, more])
        return whole.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(chunk, tree)


def _apart(result, weight, reduction):
    """A result as what it holds for every example, and what it holds for all of them."""
    if isinstance(result, Moments):
        counted = result.reduction
        state = _State(counted.weights.sum(), mean=result.mean, variance=result.variance)
        return counted.weights, state
    if isinstance(result, Gradient):
        counted = result.reduction
        each = (counted.weights, result.values, result.norms)
        return each, _state(counted.weights.sum(), result.gradient, counted.kind)
    name = type(result).__name__
    if hasattr(result, "reduction"):
        raise ValueError(
            f"`fn` returns {name}, which does not add up. Accumulate what it is made of."
        )
    if reduction is None:
        raise ValueError(
            f"`fn` returns {name}, which does not state its reduction: pass `reduction`, "
            '"mean" (as `fnn.value_and_grad`), "sum", or "examples" (arrays [batch, ...]).'
        )
    if reduction == "examples":
        return result, _State(weight)
    return (), _state(weight, result, reduction)


def _state(weight, tree, kind):
    total = jax.tree.map(widen, tree)
    if kind == "mean":
        total = _times(total, _divisor(weight))
    return _State(weight, total)


def _divisor(weight):
    """What a mean divides by: the sum of the weights; 1 where that is 0."""
    return jnp.where(weight != 0, weight, 1)


def _times(tree, number):
    return jax.tree.map(lambda a: a * number.astype(a.dtype), tree)


def _merge(a, b):
    """Two states as one. Source: Chan, Golub, LeVeque (1983), doi:10.2307/2683386."""
    weight = a.weight + b.weight
    share = b.weight / _divisor(weight)

    def mean(m, n):
        step = (n - m) * share.astype(m.dtype)
        return m + step

    def variance(v, w, m, n):
        between = (share * (1 - share)).astype(v.dtype)
        return mean(v, w) + (n - m) ** 2 * between

    total = jax.tree.map(jnp.add, a.total, b.total)
    centre = jax.tree.map(mean, a.mean, b.mean)
    spread = None
    if a.variance is not None:
        spread = jax.tree.map(variance, a.variance, b.variance, a.mean, b.mean)
    return _State(weight, total, centre, spread)


def _whole(like, each, state, reduction, given):
    """The result for all microbatches, in the dtypes of `like`, that of one."""
    if isinstance(like, Moments):
        return Moments(state.mean, state.variance, _counted("mean", each, given))
    if isinstance(like, Gradient):
        weights, values, norms = each
        kind = like.reduction.kind
        gradient = _result(like.gradient, state, kind)
        return Gradient(values, gradient, norms, _counted(kind, weights, given))
    if reduction == "examples":
        return each
    return _result(like, state, reduction)


def _counted(kind, weights, given):
    if given is not None:
        given = jnp.asarray(given).astype(weights.dtype)
    return Reduction(kind, weights, given)


def _result(like, state, kind):
    """The sum, or the mean, in the dtypes of `like`."""
    result = state.total
    if kind == "mean":
        result = _times(result, 1 / _divisor(state.weight))
    return jax.tree.map(lambda a, wide: wide.astype(a.dtype), like, result)
