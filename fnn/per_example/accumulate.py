"""A batch that does not fit, microbatch by microbatch: the same result to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.per_example.clipping import Gradient, Reduction
from fnn.per_example.moments import Moments
from fnn.types import Array, Params, at_least_float32


def accumulate(
    fn: Callable[..., Any],
    microbatch_size: int,
    *,
    reduction: Literal["mean", "sum", "examples"] | None = None,
) -> Callable[..., Any]:
    """The same function, but a batch is gone through `microbatch_size` examples at a time under one
    `lax.scan`.

    Args:
        fn: `(params, *batch, weights=None) -> result`. A result that states its reduction (of
            `clipped_gradient`, `weighted_gradient`, `moments`) needs nothing more.
        microbatch_size: examples at a time, at least 1; the last time there may be fewer.
        reduction: what any other result is, all of it: `"mean"` over the batch by the weights
            (`fnn.value_and_grad`), `"sum"`, or `"examples"`: arrays `[batch, ...]` (`gradients`,
            `norms`).

    Returns:
        A function like `fn` with the same result, to rounding, at the memory of one microbatch. It
        passes `weights` on only where they are given.

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

    def accumulated(params: Params, *batch: Any, weights: Any = None) -> Any:
        data = (batch, weights)
        for leaf in jax.tree.leaves(data):
            _validate.is_array("batch", leaf)
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(data)}
        if len(lengths) != 1 or not min(lengths):
            raise ValueError(
                f"The arrays of a batch must have one length of at least 1, got {sorted(lengths)} rows."
            )
        whole, rest = divmod(min(lengths), microbatch_size)

        def part(start: Any, size: int) -> tuple[Any, _State]:
            cut, w = jax.tree.map(
                lambda a: lax.dynamic_slice_in_dim(jnp.asarray(a), start, size), data
            )
            result = fn(params, *cut, **({} if w is None else {"weights": w}))
            return _apart(
                result,
                jnp.full((), size, jnp.float32) if w is None else _as_float(w).sum(),
                reduction,
            )

        def turn(state: _State, i: Array) -> tuple[_State, Any]:
            each, new = part(i * microbatch_size, microbatch_size)
            return _merged(state, new), each

        shapes = jax.eval_shape(lambda: part(0, min(microbatch_size, min(lengths)))[1])
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state, each = lax.scan(turn, state, jnp.arange(whole)) if whole else (state, None)
        each = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), each)
        if rest:
            last, new = part(whole * microbatch_size, rest)
            state = _merged(state, new)
            each = (
                last
                if each is None
                else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), each, last)
            )
        return _whole(
            jax.eval_shape(fn, params, *batch, **({} if weights is None else {"weights": weights})),
            each,
            state,
            reduction,
        )

    return accumulated


class _State(NamedTuple):
    """What microbatches come to; `()` for what a result has not."""

    weight: Array  # the sum of the weights
    total: Any = ()  # what adds up: sums, and means times the sum of their weights
    mean: Any = ()
    variance: Any = ()


def _apart(result: Any, weight: Array, reduction: str | None) -> tuple[Any, _State]:
    """A result as what it holds for every example, and what it holds for all of them together."""
    stated = getattr(result, "reduction", None)
    if isinstance(result, Moments):
        return (result.reduction.weights, result.reduction.non_finite), _State(
            result.reduction.weights.sum(), mean=result.mean, variance=result.variance
        )
    if isinstance(result, Gradient):
        each = (result.reduction.weights, result.reduction.non_finite, result.values, result.norms)
        weight = result.reduction.weights.sum()
        return each, _State(weight, _times(result.gradient, weight, result.reduction.kind))
    if stated is not None:
        raise ValueError(
            f"`fn` returns {type(result).__name__}, which microbatches cannot be joined to. Accumulate what it is made of."
        )
    if reduction is None:
        raise ValueError(
            f"`fn` returns {type(result).__name__}, which does not state its reduction: pass `reduction`, "
            '"mean" (as `fnn.value_and_grad`), "sum", or "examples" (arrays [batch, ...], as `norms`).'
        )
    if reduction == "examples":
        return result, _State(weight)
    return (), _State(weight, _times(result, weight, reduction))


def _merged(a: _State, b: _State) -> _State:
    """Two states as one.

    Source: Chan, Golub, LeVeque (1983), doi:10.2307/2683386 (pairwise variance).
    """
    weight = a.weight + b.weight
    whole = _divisor(weight)

    def mean(m: Array, n: Array) -> Array:
        return m + (n - m) * (b.weight.astype(m.dtype) / whole.astype(m.dtype))

    def variance(v: Array, w: Array, m: Array, n: Array) -> Array:
        return mean(v, w) + (n - m) ** 2 * ((a.weight / whole) * (b.weight / whole)).astype(v.dtype)

    means = jax.tree.map(mean, a.mean, b.mean)
    return _State(
        weight,
        jax.tree.map(jnp.add, a.total, b.total),
        means,
        jax.tree.map(variance, a.variance, b.variance, a.mean, b.mean),
    )


def _whole(like: Any, each: Any, state: _State, reduction: str | None) -> Any:
    """The result for all microbatches, in the dtypes that one for the whole batch has."""
    if isinstance(like, Moments):
        return Moments(state.mean, state.variance, Reduction("mean", *each))
    if isinstance(like, Gradient):
        kind = like.reduction.kind
        return Gradient(
            each[2],
            _over(state.total, state.weight, kind, like.gradient),
            each[3],
            Reduction(kind, *each[:2]),
        )
    return each if reduction == "examples" else _over(state.total, state.weight, reduction, like)


def _times(tree: Any, weight: Array, kind: str) -> Any:
    """A tree of sums from means or sums, in float32 at least."""
    wide = jax.tree.map(
        lambda a: at_least_float32(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )
    return (
        wide
        if kind == "sum"
        else jax.tree.map(lambda a: a * _divisor(weight).astype(a.dtype), wide)
    )


def _over(tree: Any, weight: Array, kind: str | None, like: Any) -> Any:
    """A tree of means or sums, in the dtypes of `like`, from sums."""
    means = (
        tree
        if kind == "sum"
        else jax.tree.map(lambda a: a / _divisor(weight).astype(a.dtype), tree)
    )
    return jax.tree.map(lambda a, b: a.astype(b.dtype), means, like)


def _as_float(weights: Array) -> Array:
    return (
        at_least_float32(weights)
        if jnp.issubdtype(weights.dtype, jnp.floating)
        else weights.astype(jnp.float32)
    )


def _divisor(weight: Array) -> Array:
    return jnp.where(weight != 0, weight, jnp.ones_like(weight))
