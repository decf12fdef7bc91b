"""Sums and means of individual gradients, each example by a weight of its own.

Clipped, importance-weighted, without the broken.

One backward pass: its factors give the norms, the norms the weights, and every parameter one
weighted product. An example whose gradient is not finite is left out: its weight is 0, and its
factors are masked too, since 0 x NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fnn import _validate
from fnn.factors import Stacked, is_factor
from fnn.factors.rows import joined_norms, mended
from fnn.per_example.norms import Source, asked, is_source, whole_norms
from fnn.types import Array, ArrayLike, Params

Kind = Literal["mean", "sum"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reduction:
    """What a result is of: a sum or a mean, over which examples, by which weights.

    It prints as a sentence.
    """

    kind: Kind = field(metadata={"static": True})
    # [batch]: what every example counted for; 0 for padding, and where the gradient is not finite
    weights: Array
    # [batch] of bool: left out because the gradient is not finite, and not padding
    non_finite: Array

    @property
    def examples(self) -> Array:
        """How many examples counted."""
        return (self.weights != 0).sum(-1)

    def __str__(self) -> str:
        batch, counted, broken = (
            self.weights.shape[0],
            int(self.examples),
            int(self.non_finite.sum()),
        )
        text = f"{self.kind} over {counted} of {batch} examples, weights sum to {float(self.weights.sum()):g}"
        if broken:
            first = int(np.argmax(np.asarray(self.non_finite)))
            text += (
                f"; {broken} left out because the gradient is not finite, the first in row {first}"
            )
        return text


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gradient:
    """A weighted gradient. Unpacks as `values, gradient, norms`.

    Attributes:
        values: `[batch]`, every example's loss.
        gradient: a tree like `params`: `sum_i weights_i scale_i g_i`, over `sum_i weights_i` for a
            mean.
        norms: `[batch]`, of every example's whole gradient, before any clipping; not finite where
            the gradient is not.
        reduction: what it is of.
    """

    values: Array
    gradient: Params
    norms: Array
    reduction: Reduction

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.gradient, self.norms))


def clipped_gradient(
    source: Source,
    max_norm: float | None = None,
    *,
    per_layer: bool = False,
    scale: Callable[[Array], Array] | None = None,
    reduction: Kind = "mean",
) -> Callable[..., Gradient]:
    """The mean (or sum) of the gradients, each clipped: `g_i min(1, max_norm / |g_i|)`.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        max_norm: greatest norm of an example's gradient, above 0; infinite clips nothing. May be
            traced.
        per_layer: clip each layer's gradient by its own norm, each to `max_norm`. A layer is the
            arrays of one container, such as `Dense(w, b)` (bare arrays of one tuple are one layer);
            those that `repeat` stacks are layers of their own. The norm of the whole is then at
            most `max_norm * sqrt(layers)`.
        scale: in the place of `max_norm`, a function `norms -> factors`, elementwise, that every
            gradient (or layer's) is multiplied by: `lambda n: 1 / (n + 0.01)` normalises.
        reduction: `"mean"`, by the weights of the examples that count, or `"sum"`.

    Returns:
        A function `(params, *batch, weights=None) -> Gradient` (`values, gradient, norms`;
        `.reduction` says of what). `weights` is `[batch]`, by default 1; weight 0 is padding and
        counts nowhere. All of weight 0 gives a zero gradient.

    Raises:
        TypeError, ValueError: `max_norm` is not above 0, both or neither of `max_norm` and `scale`
            are given.

    Source: Abadi et al. (2016), arXiv:1607.00133; in one backward pass, Li et al. (2022),
    arXiv:2110.05679.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = clipped_gradient(fnn.source(net, fnn.losses.l2_loss), 1.0)
    >>> values, gradient, norms = f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> print(f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)), weights=jnp.array([1.0, 1, 1, 0, 0])).reduction)
    mean over 3 of 5 examples, weights sum to 3
    """
    is_source(source)
    if (max_norm is None) == (scale is None):
        raise TypeError(
            "Give one of `max_norm`, the greatest norm, and `scale`, a function norms -> factors."
        )
    if scale is None:
        check_max_norm("max_norm", max_norm)

    def by(norms: Array) -> Array:
        if scale is not None:
            return scale(norms)
        # a traced one is not looked at
        bound = jnp.maximum(jnp.asarray(max_norm).astype(norms.dtype), 0)
        over = norms > bound
        return jnp.where(
            over, bound / jnp.where(over, norms, jnp.ones_like(norms)), jnp.ones_like(norms)
        )

    return _weighted(source, by, per_layer, reduction)


def weighted_gradient(source: Source, *, reduction: Kind = "sum") -> Callable[..., Gradient]:
    """The sum (or mean) of the gradients by weights of any sign, an example that is not finite left
    out.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        reduction: `"sum"`, or `"mean"`, which divides by the sum of the weights.

    Returns:
        A function `(params, *batch, weights=None) -> Gradient` (`values, gradient, norms`).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = weighted_gradient(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((2, 3)), jnp.zeros((2, 2)), weights=jnp.array([1.0, -1.0])).gradient[-1].b
    Array([0., 0.], dtype=float32)
    """
    return _weighted(source, None, False, reduction)


def _weighted(
    source: Source, by: Callable[[Array], Array] | None, per_layer: bool, kind: Kind
) -> Callable[..., Gradient]:
    _validate.one_of("reduction", kind, ("mean", "sum"))
    factors_of = asked(source)

    def reduced(params: Params, *batch: ArrayLike, weights: ArrayLike | None = None) -> Gradient:
        values, factors = factors_of(params, *batch)
        norms = whole_norms(factors)
        counted = count(kind, norms, weights)
        share = counted.weights / total_weight(counted) if kind == "mean" else counted.weights
        finite = jnp.isfinite(norms)

        def of(n: Array) -> Array:
            share_of, spread = (
                jnp.broadcast_to(share, n.shape),
                jnp.broadcast_to(counted.weights != 0, n.shape),
            )
            return share_of if by is None else share_of * by(jnp.where(spread, n, jnp.ones_like(n)))

        if per_layer:
            scales = jax.tree.map(of, layer_norms(factors))
        else:
            whole = of(norms)
            scales = jax.tree.map(lambda _: whole, factors, is_leaf=is_factor)
        return Gradient(values, weighted_total(factors, scales, finite), norms, counted)

    return reduced


def weighted_total(factors: Any, weights: Any, finite: Array) -> Params:
    """The weighted total of every factor, from a tree of weights `[batch]`.

    What is not `finite` counts nothing.
    """
    # a share of a float16 gradient may be too small for float16
    short = jax.tree.map(
        lambda f: any(a.dtype == jnp.float16 for a in jax.tree.leaves(f)),
        factors,
        is_leaf=is_factor,
    )
    scaled = jax.tree.map(
        lambda f, w, s: (f.wide() if s else f).scaled(w, finite),
        factors,
        weights,
        short,
        is_leaf=is_factor,
    )
    plain = jax.tree.map(lambda f: f.total(), scaled, is_leaf=is_factor)

    def masked(plain: Params) -> Params:
        return jax.tree.map(
            lambda f, into: f.masked_total(finite, into), scaled, plain, is_leaf=is_factor
        )

    totals = mended(finite.all(), plain, masked)
    return jax.tree.map(lambda total, s: total.astype(jnp.float16) if s else total, totals, short)


def layer_norms(factors: Any) -> Any:
    """A tree like that of factors with norms `[*layers of repeat, batch]`.

    The arrays of one container have that of them all.
    """

    def apart(f: Any) -> Array:
        return jax.vmap(apart)(f.factor) if isinstance(f, Stacked) else f.norm()

    paths, tree = jax.tree_util.tree_flatten_with_path(
        jax.tree.map(apart, factors, is_leaf=is_factor)
    )
    layers: dict[Any, list[Array]] = {}
    for path, n in paths:
        layers.setdefault((path[:-1], n.shape), []).append(n)
    return jax.tree.unflatten(
        tree, [joined_norms(jnp.stack(layers[path[:-1], n.shape])) for path, n in paths]
    )


def count(kind: Kind, norms: Array, weights: ArrayLike | None) -> Reduction:
    """What every example counts for."""
    w = jnp.ones_like(norms)
    if weights is not None:
        _validate.is_array("weights", weights)
        if weights.shape != norms.shape:
            raise ValueError(
                f"`weights` has shape {tuple(weights.shape)}, expected {tuple(norms.shape)}: one per example."
            )
        w = jnp.asarray(weights).astype(norms.dtype)
    finite = jnp.isfinite(norms)
    return Reduction(kind, jnp.where(finite, w, jnp.zeros_like(w)), ~finite & (w != 0))


def total_weight(reduction: Reduction) -> Array:
    """The sum of the weights, or 1 where no example counts."""
    whole = reduction.weights.sum()
    return jnp.where(whole != 0, whole, jnp.ones_like(whole))


def check_max_norm(name: str, value: Any) -> None:
    """Raises unless `value` is a number above 0, infinity included.

    What is traced is not looked at.
    """
    if isinstance(value, Tracer):
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
        or np.shape(value) != ()
    ):
        raise TypeError(
            f"`{name}` must be a number above 0, got {value!r:.80} ({type(value).__name__})."
        )
    if not value > 0:
        raise ValueError(
            f"`{name}` must be above 0, got {value!r}. No clipping? Pass `float('inf')`."
        )
