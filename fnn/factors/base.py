"""What a factor is, what a backward pass does with it, and the factor that is written out.

Arrays have a batch axis first and features last; the axes between are positions, over which an
example sums.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from fnn.types import Array

T = TypeVar("T")


class SquaredNorm(NamedTuple):
    """Squared norms, and what tells how precise they are.

    A sum of terms is exact to rounding where they do not cancel: where their size is near the sum.
    """

    value: Array  # [batch]
    size: Array | None = None  # [batch]: of the terms of `value`; None where none can cancel
    parts: Array | None = None  # [batch]: squared norms of what an example adds up; None if one


class Factor:
    """What one batch contributes to the gradient of one parameter: a pytree of arrays.

    A new factor is a class with `total`, `scaled`, `materialise` and `merged`. It inherits the
    other answers, or gives cheaper ones.

    Attributes:
        one_by_one: whether `exact_total` and `variance` go through the examples one at a time.
        sums_exactly: whether `scaled(weights).total()` is `exact_total(weights)`.
        layers: the axes of layers that `repeat` puts in front.
    """

    one_by_one: Any = True
    sums_exactly: Any = False
    layers: Any = ()

    def total(self) -> Array:
        """The sum over the batch, in the parameter's own shape: the ordinary gradient."""
        raise NotImplementedError

    def scaled(self, weights: Array) -> Any:
        """The factor with example i times `weights[i]`; weight 0 gives 0 in what is scaled."""
        raise NotImplementedError

    def materialise(self) -> Array:
        """`[batch, *parameter shape]`: the gradient of every example, at batch x parameters."""
        raise NotImplementedError

    def merged(self) -> Factor:
        """The factor of a parameter used several times, from arrays `[uses, batch, ...]`."""
        raise NotImplementedError

    def squared_norm(self) -> Array:
        """`[batch]`, float32 at least: the squared norm of the gradient of every example."""
        return square_rows(self.materialise())

    def fast_squared_norm(self) -> SquaredNorm:
        """The squared norms by a cheaper sum, whose terms may cancel."""
        return SquaredNorm(self.squared_norm())

    def squares(self, fast: bool) -> SquaredNorm:
        """The squared norms layer by layer, `[*layers, batch]`."""
        return self.fast_squared_norm() if fast else SquaredNorm(self.squared_norm())

    def inner(self, other: Any) -> Array:
        """`[batch, batch of other]`: inner products of the gradients in two factors."""
        a, b = (f.materialise() for f in (self, other))
        return row_products(a, b)

    def exact_total(self, weights: Array) -> Array:
        """The total by weights `[batch]`; the gradient of an example is formed, then scaled.

        So its norm is the weight times `squared_norm`, whatever cancels in it; weight 0 counts
        nothing, even for NaN.
        """
        return exact_totals([self], [weights])[0]

    def moments(self, shares: Array) -> tuple[Array, Array]:
        """Mean and centred variance, in the parameter's shape; share 0 counts nothing.

        Args:
            shares: `[batch]`, what each example counts for; their sum is 1.
        """
        return self.exact_total(shares), self.variance(shares)

    def raw_moments(self, shares: Array) -> tuple[Array, Array] | None:
        """E[g] and E[g^2] by cheap products; None where `moments` costs no more."""
        return None

    def variance(self, shares: Array) -> Array:
        """The centred variance alone."""
        if self.one_by_one:
            return variances([self], shares)[0]
        return self.moments(shares)[1]

    def example(self, i: Array) -> Any:
        """The factor of example i alone."""
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i), self)

    def difference(self, other: Any) -> Array:
        """The total less that of another factor, without cancellation where both are near."""
        return self.total() - other.total()

    def wide(self) -> Any:
        """The factor in float32 at least."""
        return jax.tree.map(widen, self)


@dataclass_transform(frozen_default=True)
def factor(cls: type[T]) -> type[T]:
    """A decorator that makes a frozen dataclass a pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def is_factor(value: Any) -> bool:
    """True for a factor: `jax.tree.map(f, factors, is_leaf=is_factor)`."""
    return isinstance(value, Factor)


@factor
class PerExample(Factor):
    """The gradient of every example, written out: of a bias, or of a scale.

    >>> PerExample(jnp.array([[3.0, 4.0], [6.0, 8.0]])).squared_norm()
    Array([ 25., 100.], dtype=float32)
    """

    gradient: Array  # [batch, *parameter shape]
    one_by_one = False
    sums_exactly = True

    def total(self) -> Array:
        return self.gradient.sum(0)

    def scaled(self, weights: Array) -> PerExample:
        return PerExample(scale_rows(self.gradient, weights))

    def materialise(self) -> Array:
        return self.gradient

    def merged(self) -> PerExample:
        return PerExample(self.gradient.sum(0))

    def exact_total(self, weights: Array) -> Array:
        return self.scaled(weights).total()

    def moments(self, shares: Array) -> tuple[Array, Array]:
        return centred_moments(self.gradient, shares)


@dataclass(frozen=True)
class Reducer:
    """What a backward pass does with every factor.

    Attributes:
        name: for tables.
        reduce: `(factor) -> result`.
        stack: `(result [layers, ...]) -> result`: joins the results of the layers of a `repeat`.
    """

    name: str
    reduce: Callable[[Any], Any]
    stack: Callable[[Any], Any] = lambda result: result

    def __call__(self, factor: Any) -> Any:
        """The result for one factor; a TypeError for anything else."""
        if not is_factor(factor):
            raise TypeError(
                f"`reduce` takes a factor, got {type(factor).__name__}. In a `backward`, wrap the "
                "gradient of every example: `reduce(fnn.factors.PerExample(g))`."
            )
        return self.reduce(factor)

    def tree(self, factors: Any) -> Any:
        """The results for a tree of factors."""
        return jax.tree.map(self.reduce, factors, is_leaf=is_factor)


def sum_layers(result: Any) -> Any:
    """Sums every array of a result over its first axis."""
    return jax.tree.map(lambda a: a.sum(0), result)


total = Reducer("total", lambda f: f.total())
"""The ordinary gradient."""

materialise = Reducer("materialise", lambda f: f.materialise(), lambda g: jnp.moveaxis(g, 0, 1))
"""The gradient of every example, `[batch, ...]`."""

squared_norm = Reducer("squared_norm", lambda f: f.squared_norm(), sum_layers)
"""The squared norm of every example's gradient, `[batch]`."""

fast_squared_norm = Reducer("fast_squared_norm", lambda f: f.fast_squared_norm(), sum_layers)
"""A `SquaredNorm`."""

keep = Reducer("keep", lambda f: f)
"""The factors themselves."""

REDUCERS = (total, materialise, squared_norm)
"""What the tests run over."""


def per_row(row: Array, like: Array) -> Array:
    """`[batch]` as `[batch, ...]`."""
    return jnp.broadcast_to(row.reshape(-1, *(1,) * (like.ndim - 1)), like.shape)


@jax.jit
def scale_rows(a: Float[Array, "batch *rest"], weights: Array) -> Float[Array, "batch *rest"]:
    """Row i times `weights[i]`, computed in float32 at least; weight 0 gives 0 even for NaN.

    The result has the dtype of `a`, but float16 becomes float32: a small weight leaves its range.
    """
    wide = widen(a)
    w = per_row(weights.astype(wide.dtype), wide)
    scaled = jnp.where(w != 0, wide * w, 0)
    return scaled if a.dtype == jnp.float16 else scaled.astype(a.dtype)


def mask_rows(a: Float[Array, "batch *rest"], present: Array) -> Float[Array, "batch *rest"]:
    """0 for every example that is not present."""
    return jnp.where(per_row(present, a), a, jnp.zeros_like(a))


@jax.jit
def square_rows(a: Float[Array, "batch *rest"]) -> Float[Array, " batch"]:
    """The sum of the squares of every row, in float32 at least."""
    rows = flat_rows(a)
    return (rows * rows).sum(1)


@jax.jit
def centred_moments(
    g: Float[Array, "batch *rest"], shares: Float[Array, " batch"]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Mean and variance of the rows; share 0 counts nothing, even for NaN."""
    mean = scale_rows(g, shares).sum(0)
    gap = g - jnp.broadcast_to(mean, g.shape)
    rest = scale_rows(gap, shares).sum(0)  # what rounding has left
    variance = scale_rows(gap * gap, shares).sum(0) - rest * rest
    return mean + rest, jnp.maximum(variance, 0)


def flat_rows(a: Float[Array, "batch *rest"]) -> Float[Array, "batch numbers"]:
    """`[batch, numbers]`, float32 at least."""
    return widen(a).reshape(a.shape[0], math.prod(a.shape[1:]))


def row_products(a: Float[Array, "a *rest"], b: Float[Array, "b *rest"]) -> Float[Array, "a b"]:
    """The inner products of all pairs of rows, in float32 at least."""
    return jnp.matmul(flat_rows(a), flat_rows(b).T, precision="highest")


def shares(weights: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """What every example counts for in a mean: `weights / sum(weights)`; 0 where the sum is 0."""
    whole = weights.sum()
    return weights / jnp.where(whole != 0, whole, 1)


def widen(a: Array) -> Array:
    """A floating-point array in float32 at least; whole numbers as they are."""
    narrow = jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < 32
    return a.astype(jnp.float32) if narrow else a


def squares_by_layer(
    factors: list[Any], layers: list[Any], *, fast: bool
) -> tuple[dict[Any, Array], dict[Any, Array]]:
    """The squared norms `[*layers, batch]` by layer, and the size of what an example adds up.

    The sizes are empty where every example is one product in every layer.

    Args:
        factors: of all parameters.
        layers: what tells the layer of each, where layers of a `repeat` count by themselves; `()`
            for what is summed over all.
        fast: by cheaper sums, whose terms may cancel.
    """
    values = defaultdict(list)
    sizes = defaultdict(list)
    several = False
    for f, layer in zip(factors, layers, strict=True):
        found = f.squares(fast)
        if not layer:
            found = jax.tree.map(over_layers, found)
        size = found.parts if found.size is None else found.size
        several = several or size is not None
        values[layer].append(found.value)
        sizes[layer].append(found.value if size is None else size)
    sums = {layer: sum_leaves(parts) for layer, parts in values.items()}
    if not several:
        return sums, {}
    return sums, {layer: sum_leaves(parts) for layer, parts in sizes.items()}


def over_layers(squares: Float[Array, "*layers batch"]) -> Float[Array, " batch"]:
    """Summed over the layers."""
    return squares.sum(tuple(range(squares.ndim - 1)))


def whole_squares(squares: dict[Any, Array]) -> Float[Array, " batch"]:
    """The squared norms of whole gradients, from those by layer."""
    return sum_leaves([over_layers(square) for square in squares.values()])


def sum_leaves(tree: Any) -> Array:
    """The sum of the leaves of a tree of arrays of one shape."""
    first, *others = jax.tree.leaves(tree)
    for other in others:
        first = first + other
    return first


def scaled_totals(factors: list[Any], weights: list[Array]) -> list[Array]:
    """The total of every factor by its own weights, float32 at least."""
    return [widen(f.scaled(w).total()) for f, w in zip(factors, weights, strict=True)]


def exact_totals(factors: list[Any], weights: Array | list[Array]) -> list[Array]:
    """`Factor.exact_total` of every factor, by weights for all or by its own."""

    @jax.jit
    def add(total, one, weight):
        return total + jnp.where(weight != 0, weight * one.total(), 0)

    plain = [f.one_by_one for f in factors]
    own = weights if isinstance(weights, list) else [weights] * len(factors)
    some = [f.wide() for f, is_plain in zip(factors, plain, strict=True) if is_plain]
    rows = [w for w, is_plain in zip(own, plain, strict=True) if is_plain]
    shapes = [jax.eval_shape(f.total) for f in some]
    starts = [zeros(shape, own[0]) for shape in shapes]
    totals = iter(fold_examples(add, starts, some, rows if isinstance(weights, list) else weights))
    triples = zip(factors, own, plain, strict=True)
    return [next(totals) if is_plain else f.exact_total(w) for f, w, is_plain in triples]


def variances(factors: list[Any], shares: Float[Array, " batch"]) -> list[Array]:
    """The centred variance for every factor; share 0 counts nothing.

    It is E[d^2] - E[d]^2 of the differences d to one example that counts: they are small where the
    variance is, so that nothing cancels.
    """
    plain = [f for f in factors if f.one_by_one]
    origins = [f.example(jnp.argmax(shares)) for f in plain]

    @jax.jit
    def add(sums, one, share, origin):
        d = jnp.where(share != 0, one.difference(origin), 0)
        return sums[0] + share * d, sums[1] + share * d * d

    starts = [(zeros(s, shares),) * 2 for s in (jax.eval_shape(f.total) for f in plain)]
    sums = fold_examples(add, starts, plain, shares, origins)
    found = iter(jnp.maximum(second - first * first, 0) for first, second in sums)
    return [next(found) if f.one_by_one else f.variance(shares) for f in factors]


def fold_examples(
    add: Callable[..., Any],
    starts: list[Any],
    factors: list[Any],
    rows: Array | list[Array],
    *likes: Any,
) -> list[Any]:
    """Goes through the examples one at a time; compiled, it needs no memory but the sums.

    Args:
        add: `(sums, factor of one example, its row, *likes of the factor) -> sums`.
        starts: the sums of every factor before the first example.
        factors: with arrays `[batch, ...]`.
        rows: `[batch]`, for all factors or for each.
        *likes: lists with a tree of arrays for every factor.
    """
    if not factors:
        return []

    def body(sums, example):
        ones, row = example
        own = row if isinstance(row, list) else [row] * len(ones)
        parts = zip(sums, jax.tree.map(lambda a: a[None], ones), own, *likes, strict=True)
        return [add(*part) for part in parts], None

    return lax.scan(body, starts, (factors, rows))[0]


def by_columns(
    f: Callable[[Array], Any],
    a: Float[Array, "batch *positions in"],
    columns: int,
    like: Array | None = None,
) -> Any:
    """`f(a)`, some columns of `a` at a time: memory for one block.

    Args:
        f: `(a [batch, ..., columns]) -> tree of arrays [columns, ...]`.
        a: any array.
        columns: of a block.
        like: an array whose first number the result holds until the blocks are in it; None: `a`.
    """
    width = a.shape[-1]
    if width <= columns:
        return f(a)

    def block(done, start):
        found = f(lax.dynamic_slice_in_dim(a, start, columns, axis=-1))
        put = lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda d, new: put(d, new, start, 0), done, found), None

    # XLA lets two loops that begin with zeros share these, and copies them
    begin = a if like is None else like
    number = begin[(0,) * begin.ndim]

    def begin_with(s):
        return jnp.full((width, *s.shape[1:]), number.astype(s.dtype))

    whole = jax.tree.map(begin_with, jax.eval_shape(f, a[..., :columns]))
    starts = np.minimum(np.arange(0, width, columns), width - columns)  # the last two may overlap
    return lax.scan(block, whole, jnp.asarray(starts))[0]


def zeros(shape: Any, like: Array) -> Array:
    """Zeros to begin a loop with; in `shard_map` they vary over the same axes of a mesh as `like`.

    Args:
        shape: a `jax.ShapeDtypeStruct`.
        like: any array.
    """
    return lax.full_like(like, 0, shape.dtype, shape.shape)
