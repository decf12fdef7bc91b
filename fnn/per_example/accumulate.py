"""A batch that does not fit, microbatch by microbatch: the same result to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _check
from fnn._types import Array, Params, at_least_float32
from fnn.per_example.moments import Moments
from fnn.per_example.reduced import Gradient, Reduction


def accumulate(
    fn: Callable[..., Any], microbatch_size: int, *, reduction: Literal["mean", "sum", "examples"] | None = None
) -> Callable[..., Any]:
    """The same function, but a batch is gone through `microbatch_size` examples at a time under one `lax.scan`.

    Args:
        fn: `(params, *batch, weights=None) -> result`. A result that states its reduction (of `clipped_gradient`,
            `weighted_gradient`, `moments`) needs nothing more.
        microbatch_size: examples at a time, at least 1; the last time there may be fewer.
        reduction: what any other result is, all of it: `"mean"` over the batch by the weights (`fnn.value_and_grad`), `"sum"`,
            or `"examples"`: arrays `[batch, ...]` (`gradients`, `norms`).

    Returns:
        A function like `fn` with the same result, to rounding, at the memory of one microbatch. It passes `weights` on only
        where they are given.

    Raises:
        TypeError, ValueError: the reduction is not known; the arrays of a batch differ in length.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = accumulate(fnn.value_and_grad(net, fnn.losses.l2_loss), 2, reduction="mean")
    >>> value, grads = f(net.init(jax.random.key(0)), jnp.zeros((5, 3)), jnp.ones((5, 2)))
    >>> value
    Array(1., dtype=float32)
    """
    _check.is_function("fn", fn, "(params, *batch, weights=None) -> result")
    _check.positive("microbatch_size", microbatch_size, whole=True)
    if reduction is not None:
        _check.one_of("reduction", reduction, ("mean", "sum", "examples"))

    def accumulated(params: Params, *batch: Any, weights: Any = None) -> Any:
        data = (batch, weights)
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(data)}
        if len(lengths) != 1 or not min(lengths):
            raise ValueError(f"The arrays of a batch must have one length of at least 1, got {sorted(lengths)} rows.")
        whole, rest = divmod(min(lengths), microbatch_size)

        def part(start: Any, size: int) -> tuple[Any, _State]:
            cut, w = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(jnp.asarray(a), start, size), data)
            result = fn(params, *cut, **({} if w is None else {"weights": w}))
            return _apart(result, jnp.full((), size, jnp.float32) if w is None else w.sum(), reduction)

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
            each = last if each is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), each, last)
        return _whole(jax.eval_shape(fn, params, *batch, **({} if weights is None else {"weights": weights})), each, state, reduction)

    return accumulated


class _State(NamedTuple):
    """What microbatches come to; `()` for what a result has not."""

    weight: Array  # the sum of the weights
    total: Any = ()
    mean: Any = ()
    variance: Any = ()


def _apart(result: Any, weight: Array, reduction: str | None) -> tuple[Any, _State]:
    """A result as what it holds for every example, and what it holds for all of them together."""
    if isinstance(result, (Gradient, Moments)):
        stated = result.reduction
        weight, each = stated.weights.sum(), (stated.weights, stated.non_finite)
        if isinstance(result, Moments):
            return each, _State(weight, mean=_wide(result.mean), variance=result.variance)
        kept = {"total" if stated.kind == "sum" else "mean": _wide(result.gradient)}
        return (*each, result.values, result.norms), _State(weight, **kept)
    if reduction is None:
        raise ValueError(
            f"`fn` returns {type(result).__name__}, which does not state its reduction: pass `reduction`, "
            '"mean" (as `fnn.value_and_grad`), "sum", or "examples" (arrays [batch, ...], as `norms`).'
        )
    weight = at_least_float32(weight)
    return (
        (result, _State(weight))
        if reduction == "examples"
        else ((), _State(weight, **{{"sum": "total"}.get(reduction, reduction): _wide(result)}))
    )


def _merged(a: _State, b: _State) -> _State:
    """Two states as one. Source: Chan, Golub, LeVeque (1983), doi:10.2307/2683386 (pairwise variance)."""
    weight = a.weight + b.weight
    whole = jnp.where(weight != 0, weight, jnp.ones_like(weight))

    def mean(m: Array, n: Array) -> Array:
        return m + (n - m) * (b.weight.astype(m.dtype) / whole.astype(m.dtype))

    def variance(v: Array, w: Array, m: Array, n: Array) -> Array:
        shares = (a.weight.astype(v.dtype) / whole.astype(v.dtype)) * (b.weight.astype(v.dtype) / whole.astype(v.dtype))
        return mean(v, w) + ((n - m) ** 2).astype(v.dtype) * shares

    return _State(
        weight,
        jax.tree.map(jnp.add, a.total, b.total),
        jax.tree.map(mean, a.mean, b.mean),
        jax.tree.map(variance, a.variance, b.variance, a.mean, b.mean) if a.variance != () else (),
    )


def _whole(like: Any, each: Any, state: _State, reduction: str | None) -> Any:
    """The result for all microbatches, in the dtypes that one for the whole batch has."""
    if not isinstance(like, (Gradient, Moments)):
        return each if reduction == "examples" else _as(state.total if reduction == "sum" else state.mean, like)
    counted = Reduction(like.reduction.kind, each[0], each[1])
    if isinstance(like, Moments):
        return Moments(_as(state.mean, like.mean), _as(state.variance, like.variance), counted)
    gradient = state.total if like.reduction.kind == "sum" else state.mean
    return Gradient(each[2], _as(gradient, like.gradient), each[3], counted)


def _wide(tree: Any) -> Any:
    return jax.tree.map(at_least_float32, tree)


def _as(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)
