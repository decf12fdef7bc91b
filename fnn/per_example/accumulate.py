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
from fnn.factors.base import widen, zeros
from fnn.per_example.clipping import Gradient, Reduction
from fnn.per_example.moments import Moments
from fnn.types import Array

Merge = Literal["mean", "sum", "examples"]


class _State(NamedTuple):
    """What the microbatches so far amount to; None for what a result does not have."""

    weight: Float[Array, ""]  # the sum of the weights
    total: Any = None
    mean: Any = None
    variance: Any = None


def accumulate(
    fn: Callable[..., Any], microbatch_size: int, *, reduction: Merge | None = None
) -> Callable[..., Any]:
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
        if weights is None and missing and reduction != "examples":
            _check_takes_weights(fn, rows, microbatch_size)
            weights = jnp.ones(rows)

        def part(chunk):
            some, w = chunk
            result = fn(params, *some, **({} if w is None else {"weights": w}))
            weight = jnp.full((), microbatch_size, jnp.float32) if w is None else widen(w).sum()
            return result, *_apart(result, weight, reduction)

        def turn(state, chunk):
            _, each, new = part(chunk)
            return _merge(state, new), each

        chunks = (
            _chunks(batch, missing, microbatch_size),
            _chunks(weights, missing, microbatch_size, 0),
        )
        like, _, shapes = jax.eval_shape(part, jax.tree.map(lambda a: a[0], chunks))
        first = jax.tree.leaves(chunks)[0]
        state, each = lax.scan(turn, jax.tree.map(lambda s: zeros(s, first), shapes), chunks)
        each = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:rows], each)
        return _whole(like, each, state, reduction)

    return accumulated


def _rows(batch: Any) -> int:
    """How many examples a batch has."""
    for leaf in jax.tree.leaves(batch):
        _validate.is_array("batch", leaf)
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or not min(lengths):
        came = sorted(lengths)
        raise ValueError(
            f"The arrays of a batch must have one length of at least 1, got {came} rows."
        )
    return lengths.pop()


def _check_takes_weights(fn: Callable[..., Any], rows: int, size: int) -> None:
    parameters = inspect.signature(fn).parameters.values()
    if not any(p.name == "weights" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{rows} rows do not divide into microbatches of {size}, and `fn` takes no `weights` "
            "that could fill up the last. Pass a `microbatch_size` that divides them."
        )


def _chunks(tree: Any, missing: int, size: int, fill: float | None = None) -> Any:
    """`[batch, ...]` as `[microbatches, size, ...]`, filled up with copies of a row or a number."""

    def chunk(a):
        a = jnp.asarray(a)
        more = jnp.broadcast_to(
            a[:1] if fill is None else jnp.zeros_like(a[:1]), (missing, *a.shape[1:])
        )
        return jnp.concatenate([a, more]).reshape(-1, size, *a.shape[1:])

    return jax.tree.map(chunk, tree)


def _apart(result: Any, weight: Array, reduction: str | None) -> tuple[Any, _State]:
    """A result as what it holds for every example, and what it holds for all of them."""
    if isinstance(result, Moments):
        each = result.reduction.weights, result.reduction.non_finite
        state = _State(each[0].sum(), mean=result.mean, variance=result.variance)
        return each, state
    if isinstance(result, Gradient):
        kind, weights = result.reduction.kind, result.reduction.weights
        each = weights, result.reduction.non_finite, result.values, result.norms
        return each, _state(weights.sum(), result.gradient, kind)
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


def _state(weight: Array, tree: Any, kind: str) -> _State:
    wide = jax.tree.map(widen, tree)
    return _State(weight, mean=wide) if kind == "mean" else _State(weight, total=wide)


def _merge(a: _State, b: _State) -> _State:
    """Two states as one. Source: Chan, Golub, LeVeque (1983), doi:10.2307/2683386."""
    weight = a.weight + b.weight
    share = b.weight / jnp.where(weight != 0, weight, 1)

    def mean(m, n):
        return m + (n - m) * share.astype(m.dtype)

    def variance(v, w, m, n):
        return mean(v, w) + (n - m) ** 2 * (share * (1 - share)).astype(v.dtype)

    merged = _State(
        weight, jax.tree.map(jnp.add, a.total, b.total), jax.tree.map(mean, a.mean, b.mean)
    )
    if a.variance is None:
        return merged
    spread = jax.tree.map(variance, a.variance, b.variance, a.mean, b.mean)
    return merged._replace(variance=spread)


def _whole(like: Any, each: Any, state: _State, reduction: str | None) -> Any:
    """The result for all microbatches, in the dtypes of `like`, that of one."""
    if isinstance(like, Moments):
        return Moments(state.mean, state.variance, Reduction("mean", *each))
    if isinstance(like, Gradient):
        weights, non_finite, values, norms = each
        counted = Reduction(like.reduction.kind, weights, non_finite)
        return Gradient(values, _in_dtypes(like.gradient, state), norms, counted)
    return each if reduction == "examples" else _in_dtypes(like, state)


def _in_dtypes(like: Any, state: _State) -> Any:
    result = state.total if state.mean is None else state.mean
    return jax.tree.map(lambda a, s: a.astype(s.dtype), result, like)
