"""Sums and means of the gradients of examples, each by a weight: clipped, or by importance.

One backward pass: its factors give the norms, the norms the weights, and every parameter one
weighted product. An example whose gradient is not finite is left out, and reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float

from fnn import _validate
from fnn.factors import is_factor, keep, shares, widen
from fnn.factors.base import all_of, root, settle, squares_by_layer, whole_squares
from fnn.per_example.norms import CANCEL, ask, check_is_source
from fnn.types import Array, ArrayLike, Params, Source, storable

Kind = Literal["mean", "sum"]


@storable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reduction:
    """What a result is of: a sum or a mean, over which examples. It prints as a sentence.

    Attributes:
        kind: "mean" or "sum".
        weights: what every example counts for; 0 for padding, and where the gradient is not finite.
        given: the weights that were passed; None where all were 1.
    """

    kind: Kind = field(metadata={"static": True})
    weights: Float[Array, " batch"]
    given: Float[Array, " batch"] | None = None

    @property
    def non_finite(self) -> Bool[Array, " batch"]:
        """True for an example that is left out because its gradient is not finite."""
        left_out = self.weights == 0
        return left_out if self.given is None else left_out & (self.given != 0)

    @property
    def examples(self) -> Array:
        """How many examples count."""
        return (self.weights != 0).sum(-1)

    def __str__(self) -> str:
        """The reduction as a sentence."""
        batch = self.weights.shape[0]
        weight = float(self.weights.sum())
        text = f"{self.kind} over {self.examples} of {batch} examples, weights sum to {weight:g}"
        broken = int(self.non_finite.sum())
        if broken:
            first = self.non_finite.argmax()
            text += f"; {broken} left out because the gradient is not finite, "
            text += f"the first in row {first}"
        return text


@storable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gradient:
    """A weighted gradient. Unpacks as `values, gradient, norms`.

    Attributes:
        values: the loss of every example.
        gradient: a tree like `params`: `sum_i weights_i scale_i g_i`, over `sum_i weights_i` for a
            mean.
        norms: of the whole gradient of every example, before any clipping; not finite where the
            gradient is not.
        reduction: what it is of.
    """

    values: Float[Array, " batch"]
    gradient: Params
    norms: Float[Array, " batch"]
    reduction: Reduction

    def __iter__(self) -> Iterator[Any]:
        """`values, gradient, norms`."""
        return iter((self.values, self.gradient, self.norms))


def clipped_gradient(
    source: Source,
    max_norm: float | Float[Array, ""] | None = None,
    *,
    per_layer: bool = False,
    scale: Callable[[Array], Array] | None = None,
    reduction: Kind = "mean",
) -> Callable[..., Gradient]:
    """The mean (or sum) of the gradients, each clipped: `g_i min(1, max_norm / |g_i|)`.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        max_norm: greatest norm of the gradient of an example, above 0; infinite clips nothing. May
            be traced.
        per_layer: clip the gradient of each layer by its own norm, each to `max_norm`. A layer is
            the arrays of one container, such as `Dense(w, b)` (bare arrays of one tuple are one
            layer); those that `repeat` stacks are layers of their own. The norm of the whole is
            then at most `max_norm * sqrt(layers)`.
        scale: in the place of `max_norm`, an elementwise function `norms -> factors`: every
            gradient (or that of every layer) is multiplied by its factor.
            `lambda n: 1 / (n + 0.01)` normalises.
        reduction: `"mean"`, by the weights of the examples that count, or `"sum"`.

    Returns:
        A function `(params, *batch, weights=None) -> Gradient`. `weights` is `[batch]`, by default
        1; weight 0 is padding and counts for nothing. All of weight 0 gives a zero gradient.

    Raises:
        TypeError, ValueError: `max_norm` is not above 0; both or neither of `max_norm` and `scale`
            are given.

    Source: Abadi et al. (2016), arXiv:1607.00133; in one backward pass, Li et al. (2022),
    arXiv:2110.05679.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = clipped_gradient(fnn.source(net, fnn.losses.l2_loss), 1.0)
    >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
    >>> values, gradient, norms = f(net.init(jax.random.key(0)), *batch)
    >>> some = jnp.array([1.0, 1, 1, 0, 0])
    >>> print(f(net.init(jax.random.key(0)), *batch, weights=some).reduction)
    mean over 3 of 5 examples, weights sum to 3
    """
    if (max_norm is None) == (scale is None):
        raise TypeError(
            "Give one of `max_norm`, the greatest norm, and `scale`, a function norms -> factors."
        )
    if scale is None:
        check_max_norm("max_norm", max_norm)

    def limit(norms):
        bound = jnp.asarray(max_norm).astype(norms.dtype)
        return _limit(norms, bound)

    return _weighted(source, scale or limit, per_layer, reduction)


def weighted_gradient(source: Source, *, reduction: Kind = "sum") -> Callable[..., Gradient]:
    """The sum (or mean) of the gradients by weights of any sign.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        reduction: `"sum"`, or `"mean"`, which divides by the sum of the weights.

    Returns:
        A function `(params, *batch, weights=None) -> Gradient`.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = weighted_gradient(fnn.source(net, fnn.losses.l2_loss))
    >>> batch = jnp.ones((2, 3)), jnp.zeros((2, 2))
    >>> f(net.init(jax.random.key(0)), *batch, weights=jnp.array([1.0, -1.0])).gradient[-1].b
    Array([0., 0.], dtype=float32)
    """
    return _weighted(source, None, False, reduction)


def _weighted(source: Source, scale, per_layer, kind: Kind) -> Callable[..., Gradient]:
    check_is_source(source)
    _validate.one_of("reduction", kind, ("mean", "sum"))

    def reduced(params, *batch, weights=None):
        values, tree = ask(source, keep, params, *batch)
        factors, structure = jax.tree.flatten(tree, is_leaf=is_factor)
        layers = _layers(tree) if per_layer else [()] * len(factors)

        def exact_squares(factors):
            return list(squares_by_layer(factors, layers, fast=False)[0].values())

        squares, sizes = squares_by_layer(factors, layers, fast=True)
        safe = [(size <= CANCEL * squares[layer]).all() for layer, size in sizes.items()]
        if sizes:
            settled = settle(all_of(safe), list(squares.values()), exact_squares, factors)
            squares = dict(zip(squares, settled, strict=True))
        norms = root(whole_squares(squares))
        counted = count(kind, norms, weights)
        share = shares(counted.weights) if kind == "mean" else counted.weights
        scales = _scales(squares, layers, share, scale)
        safe.append(jnp.isfinite(norms.sum()))  # no norm is above 2e19, so that no sum overflows
        totals = _totals(factors, scales, counted.weights, all_of(safe))
        leaves = jax.tree.leaves(params)
        gradients = [t.astype(p.dtype) for t, p in zip(totals, leaves, strict=True)]
        return Gradient(values, structure.unflatten(gradients), norms, counted)

    return reduced


def _totals(factors, scales, weights, safe):
    """The total of every factor by its scales, float32 at least; by the exact way unless `safe`."""
    totals = []
    kept = []
    for f, own in zip(factors, scales, strict=True):
        scaled = f.scaled(own)
        total = f.exact_total(own) if f.one_by_one else scaled.total()
        totals.append(widen(total))
        # a single product may be scaled before, so that no second copy of it is kept
        kept.append(scaled if f.single else f)
    risky = [i for i, f in enumerate(factors) if not (f.sums_exactly or f.one_by_one)]
    operands = [kept[i] for i in risky], [scales[i] for i in risky], weights

    @jax.jit
    def exact_total(factor, scale, weights):
        present = (weights != 0).astype(weights.dtype)
        return factor.exact_total(present if factor.single else scale)

    def exactly(operands):
        factors, scales, weights = operands
        return [exact_total(f, s, weights) for f, s in zip(factors, scales, strict=True)]

    settled = settle(safe, [totals[i] for i in risky], exactly, operands)
    for i, total in zip(risky, settled, strict=True):
        totals[i] = total
    return totals


def _scales(squares, layers, share, scale):
    """What the examples are multiplied by, for every factor."""
    scales = {}
    for layer, square in squares.items():
        scales[layer] = _times(share, scale, square)
    return [scales[layer] for layer in layers]


@jax.jit
def _limit(norms, bound):
    """`min(1, bound / norm)`."""
    bound = jnp.maximum(bound, 0)  # a traced bound is not looked at
    over = norms > bound
    ratio = bound / jnp.where(over, norms, 1)
    return jnp.where(over, ratio, 1)


def _times(share, scale, squares):
    """What every example, or every layer of it, is multiplied by: `[*layers, batch]`."""
    share = jnp.broadcast_to(share, squares.shape)
    if scale is None:
        return share
    norms = jnp.where(share != 0, root(squares), 1)
    return share * scale(norms)


def layer_count(tree: Any) -> int:
    """How many layers `per_layer` clips, from a tree of factors or of their shapes."""
    layers = set(_layers(tree))
    return sum(math.prod(depth) for _, depth in layers)


def _layers(tree):
    """For every factor what tells its layer: the path of its container, and the axes of layers."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factor)
    return [(path[:-1], factor.layers) for path, factor in paths]


def count(kind: Kind, norms: Float[Array, " batch"], weights: ArrayLike | None) -> Reduction:
    """What every example counts for."""
    if weights is None:
        given = None
        counted = jnp.ones_like(norms)
    else:
        _validate.per_example("weights", weights, norms.shape[0])
        given = counted = jnp.asarray(weights).astype(norms.dtype)
    counted = jnp.where(jnp.isfinite(norms), counted, 0)
    return Reduction(kind, counted, given)


def check_max_norm(name: str, value: Any) -> None:
    """Raises unless `value` is a number above 0, infinity included; a traced one is not checked."""
    if isinstance(value, Tracer):
        return
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or np.shape(value) != ():
        came = f"{value!r:.80} ({type(value).__name__})"
        raise TypeError(f"`{name}` must be a number above 0, got {came}.")
    if not value > 0:
        mend = "No clipping? Pass `float('inf')`."
        raise ValueError(f"`{name}` must be above 0, got {value!r}. {mend}")
