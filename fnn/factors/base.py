"""What a factor is, what a backward pass does with it, and the factor that is written out.

Arrays have a batch axis first and features last; the axes between are positions, over which an
example sums.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Shaped

from fnn.types import Array

T = TypeVar("T")


class SquaredNorm(NamedTuple):
    """Squared norms, and what tells how precise they are.

    A sum of terms is exact to rounding where they do not cancel: where their size is near the sum.
    """

    value: Array  # [batch]
    size: Array | None = None  # [batch]: of the terms of `value`; None where none can cancel
    parts: Array | None = None  # [batch]: squared norms of what an example adds up; None if one


class Factor(ABC):
    """What one batch contributes to the gradient of one parameter: a pytree of arrays.

    A new factor is a class with `total`, `scaled`, `materialise` and `merged`. It inherits the
    other answers, or gives cheaper ones.

    Attributes:
        single: whether an example is one product, in which nothing cancels.
        sums_exactly: whether `scaled(weights).total()` is `exact_total(weights)`.
        one_by_one: whether its norms form the gradient of one example after the other. Nothing
            tells what cancels in them, so its weighted sums do the same.
        layers: the axes of layers that `repeat` puts in front.
    """

    single: Any = False
    sums_exactly: Any = False
    one_by_one: Any = False
    layers: Any = ()

    @abstractmethod
    def total(self) -> Array:
        """The sum over the batch, in the parameter's own shape: the ordinary gradient."""

    @abstractmethod
    def scaled(self, weights: Array) -> Any:
        """The factor with example i times `weights[i]`; weight 0 gives 0 in what is scaled."""

    @abstractmethod
    def materialise(self) -> Array:
        """`[batch, *parameter shape]`: the gradient of every example, at batch x parameters."""

    @abstractmethod
    def merged(self) -> Factor:
        """The factor of a parameter used several times, from arrays `[uses, batch, ...]`."""

    def squared_norm(self) -> Array:
        """`[batch]`, float32 at least: the squared norm of the gradient of every example."""
        return square_rows(self.materialise())

    def fast_squared_norm(self) -> SquaredNorm:
        """The squared norms by a cheaper sum, whose terms may cancel."""
        return SquaredNorm(self.squared_norm())

    def squares(self, fast: bool) -> SquaredNorm:
        """The squared norms layer by layer, `[*layers, batch]`."""
        if fast:
            return self.fast_squared_norm()
        return SquaredNorm(self.squared_norm())

    def inner(self, other: Any) -> Array:
        """`[batch, batch of other]`: inner products of the gradients in two factors."""
        return row_products(self.materialise(), other.materialise())

    def exact_total(self, weights: Array) -> Array:
        """The total by weights `[batch]`; the gradient of an example is formed, then scaled.

        So its norm is the weight times `squared_norm`, whatever cancels in it; weight 0 counts
        nothing, even for NaN.
        """
        return scale_rows(widen(self.materialise()), weights).sum(0)

    def moments(self, shares: Array) -> tuple[Array, Array]:
        """Mean and centred variance, in the parameter's shape; share 0 counts nothing.

        Args:
            shares: `[batch]`, what each example counts for; their sum is 1.
        """
        return centred_moments(self.materialise(), shares)

    def raw_moments(self, shares: Array) -> tuple[Array, Array] | None:
        """E[g] and E[g^2] by cheap products; None where `moments` costs no more."""
        return None

    def wide(self) -> Any:
        """The factor in float32 at least."""
        return jax.tree.map(widen, self)

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        """Arrays `[batch, ...]`, and the gradient of an example from its own rows of them."""

        def gradient(rows):
            batch_of_one = jax.tree.map(lambda a: a[None], rows)
            return batch_of_one.total()

        return self, gradient


class OneByOne(Factor):
    """A factor that forms the gradient of one example after the other: memory for one."""

    def materialise(self) -> Array:
        rows, gradient = self.examples()
        return jax.vmap(gradient)(rows)

    def squared_norm(self) -> Array:
        rows, gradient = self.examples()

        def square(rows):
            g = widen(gradient(rows))
            return (g * g).sum()

        return lax.map(square, rows)

    def inner(self, other) -> Array:
        rows, gradient = self.examples()
        return lax.map(lambda rows: project(other, gradient(rows)), rows)

    def exact_total(self, weights) -> Array:
        rows, gradient = self.examples()

        def add(total, example):
            rows, weight = example
            scaled = weight * widen(gradient(rows)).astype(weight.dtype)
            return total + jnp.where(weight != 0, scaled, 0), None

        start = jnp.zeros(self.shape, weights.dtype)
        return scan(add, start, (rows, weights))[0]

    def moments(self, shares) -> tuple[Array, Array]:
        rows, gradient = self.examples()
        mean = self.exact_total(shares)

        def add(sums, example):
            rows, share = example
            gap = widen(gradient(rows)).astype(share.dtype) - mean
            gap = jnp.where(share != 0, gap, 0)
            rest, square = sums
            return (rest + share * gap, square + share * gap**2), None

        start = jnp.zeros_like(mean)
        (rest, square), _ = scan(add, (start, start), (rows, shares))
        return mean + rest, jnp.maximum(square - rest**2, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return jax.eval_shape(lambda f: f.total(), self).shape


def inner(f: Factor, g: Factor) -> Float[Array, "a b"]:
    """The inner products of the gradients in two factors, of any kinds."""
    if type(f) is type(g):
        return f.inner(g)
    return OneByOne.inner(cast(Any, f), g)


def project(factor: Factor, g: Float[Array, "..."]) -> Float[Array, " batch"]:
    """The inner product of the gradient of every example with `g`.

    It is the derivative of <total, g> with respect to the weights of the examples: for any kind of
    factor at about the price of its total.
    """
    wide = factor.wide()
    g = widen(g)

    def along(weights):
        return jnp.vdot(wide.scaled(weights).total(), g, precision="highest")

    rows, _ = factor.examples()
    batch = jax.tree.leaves(rows)[0].shape[0]
    return jax.grad(along)(jnp.ones(batch, g.dtype))


@dataclass_transform(frozen_default=True)
def factor(cls: type[T]) -> type[T]:
    """A decorator that makes a frozen dataclass a pytree."""
    frozen = dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(frozen)


def is_factor(value: Factor | Any) -> bool:
    """True for a factor: `jax.tree.map(f, factors, is_leaf=is_factor)`."""
    return isinstance(value, Factor)


@factor
class PerExample(Factor):
    """The gradient of every example, written out: of a bias, or of a scale.

    >>> PerExample(jnp.array([[3.0, 4.0], [6.0, 8.0]])).squared_norm()
    Array([ 25., 100.], dtype=float32)
    """

    gradient: Array  # [batch, *parameter shape]
    # the operation that writes it out, where that takes more memory than the factors would
    why: str = field(default="", metadata={"static": True})
    sums_exactly = True

    def total(self) -> Array:
        return self.gradient.sum(0)

    def scaled(self, weights) -> PerExample:
        return replace(self, gradient=scale_rows(self.gradient, weights))

    def materialise(self) -> Array:
        return self.gradient

    def merged(self) -> PerExample:
        return replace(self, gradient=self.gradient.sum(0))


@dataclass(frozen=True)
class Reducer:
    """What a backward pass does with every factor.

    Attributes:
        name: for tables.
        reduce: `(factor) -> result`.
        stack: `(result [layers, ...]) -> result`: joins the results of the layers of a `repeat`.
    """

    name: str
    reduce: Callable
    stack: Callable = lambda result: result

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

fast_squared_norm = Reducer(
    "fast_squared_norm", jax.jit(lambda f: f.fast_squared_norm()), sum_layers
)
"""A `SquaredNorm`; one program for all factors of a shape."""

keep = Reducer("keep", lambda f: f)
"""The factors themselves."""

REDUCERS = (total, materialise, squared_norm)
"""What the tests run over."""


def per_row(row: Shaped[Array, " batch"], like: Array) -> Array:
    """`[batch]` as `[batch, ...]`."""
    return lax.broadcast_in_dim(row, like.shape, (0,))


@jax.jit
def scale_rows(a: Float[Array, "batch *rest"], weights: Array) -> Float[Array, "batch *rest"]:
    """Row i times `weights[i]`, computed in float32 at least; weight 0 gives 0 even for NaN.

    The result has the dtype of `a`, but float16 becomes float32: a small weight leaves its range.
    """
    wide = widen(a)
    weights = weights.astype(wide.dtype)
    w = per_row(weights, wide)
    scaled = jnp.where(w != 0, wide * w, 0)
    if a.dtype == jnp.float16:
        return scaled
    return scaled.astype(a.dtype)


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
) -> tuple[Array, Array]:
    """Mean and variance of the rows; share 0 counts nothing, even for NaN."""
    mean = scale_rows(g, shares).sum(0)
    gap = g - jnp.broadcast_to(mean, g.shape)
    rest = scale_rows(gap, shares).sum(0)  # what rounding has left
    squares = scale_rows(gap * gap, shares).sum(0)
    variance = jnp.maximum(squares - rest * rest, 0)
    return mean + rest, variance


def flat_rows(a: Float[Array, "batch *rest"]) -> Float[Array, "batch numbers"]:
    """`[batch, numbers]`, float32 at least."""
    return lax.collapse(widen(a), 1)


def row_products(a: Float[Array, "a *rest"], b: Float[Array, "b *rest"]) -> Float[Array, "a b"]:
    """The inner products of all pairs of rows, in float32 at least."""
    columns = flat_rows(b).T
    return jnp.matmul(flat_rows(a), columns, precision="highest")


def shares(weights: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """What every example counts for in a mean: `weights / sum(weights)`; 0 where all are 0."""
    whole = weights.sum()
    return weights / jnp.where(whole != 0, whole, 1)


def widen(a: Shaped[Array, "..."]) -> Array:
    """A floating-point array in float32 at least; whole numbers as they are."""
    if a.dtype.itemsize < 4 and jnp.issubdtype(a.dtype, jnp.floating):
        return a.astype(jnp.float32)
    return a


def squares_by_layer(factors: list[Factor], layers: list, *, fast: bool) -> tuple[dict, dict]:
    """The squared norms `[*layers, batch]` by layer, and the size of what an example adds up.

    The sizes are empty where every example is one product in every layer.

    Args:
        factors: of all parameters.
        layers: what tells the layer of each, where layers of a `repeat` count by themselves; `()`
            for what is summed over all.
        fast: by cheaper sums, whose terms may cancel.
    """

    @jax.jit
    def squares(factor):  # one program for all factors of a shape
        return factor.squares(fast)

    values = defaultdict(list)
    sizes = defaultdict(list)
    several = False
    for f, layer in zip(factors, layers, strict=True):
        found = squares(f)
        if not layer:
            found = jax.tree.map(over_layers, found)
        values[layer].append(found.value)
        size = found.parts if found.size is None else found.size
        if size is None:
            size = found.value
        else:
            several = True
        sizes[layer].append(size)
    if not several:
        sizes = {}
    return _sums(values), _sums(sizes)


def _sums(parts):
    """The sum of every list of arrays in a dict."""
    return {layer: sum_leaves(arrays) for layer, arrays in parts.items()}


def over_layers(squares: Float[Array, "*layers batch"]) -> Float[Array, " batch"]:
    """Summed over the layers."""
    layers = range(squares.ndim - 1)
    return squares.sum(tuple(layers))


def whole_squares(squares: dict) -> Float[Array, " batch"]:
    """The squared norms of whole gradients, from those by layer."""
    return sum_leaves(list(map(over_layers, squares.values())))


@jax.custom_jvp
def root(squares: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root. Its derivative at 0 is 0, that of a squared norm."""
    # The root comes last. XLA repeats cheap operations in every kernel that uses their result, but
    # not a root: so the squares of all layers are added once.
    return jnp.sqrt(jnp.maximum(squares, 0))


@root.defjvp
def _(values, slopes):
    norms = root(*values)
    positive = norms > 0
    factor = 0.5 / jnp.where(positive, norms, 1)
    return norms, jnp.where(positive, factor, 0) * slopes[0]


def sum_leaves(tree: Any) -> Float[Array, "..."]:
    """The sum of the leaves of a tree of arrays of one shape."""
    return jax.tree.reduce(operator.add, tree)


def by_columns(
    f: Callable,
    a: Float[Array, "batch *positions in"],
    columns: int,
    like: Array | None = None,
) -> Any:
    """`f(a)`, some columns of `a` at a time: memory for one block.

    Args:
        f: `(a [batch, ..., columns]) -> tree of arrays [columns, ...]`.
        a: any array.
        columns: of a block, at most.
        like: an array whose first number the result holds until the blocks are in it; None: `a`.
    """
    width = a.shape[-1]
    if width <= columns:
        return f(a)
    blocks = math.ceil(width / columns)
    columns = math.ceil(width / blocks)  # 784 in blocks of 128: 7 of 112, not 6 and a rest

    def block(done, start):
        part = lax.dynamic_slice_in_dim(a, start, columns, axis=-1)

        def put(whole, new):
            return lax.dynamic_update_slice_in_dim(whole, new, start, 0)

        return jax.tree.map(put, done, f(part)), None

    # XLA lets two loops that begin with zeros share these, and copies them
    begin = a if like is None else like
    number = begin[(0,) * begin.ndim]

    def begin_with(shape):
        start = number.astype(shape.dtype)
        return jnp.full((width, *shape.shape[1:]), start)

    shapes = jax.eval_shape(f, a[..., :columns])
    empty = jax.tree.map(begin_with, shapes)
    starts = np.arange(0, width, columns)
    starts = np.minimum(starts, width - columns)  # the last two may overlap
    whole, _ = scan(block, empty, jnp.asarray(starts))
    return whole


def settle(safe: Array, fast: Any, exact: Callable, operands: Any) -> Any:
    """`fast` where `safe`, else `exact(operands)`, which runs only then.

    It is a loop that runs once or never: under `vmap`, a `cond` runs both branches. The derivative
    is that of `fast`.

    Args:
        safe: one bool.
        fast: a tree of arrays.
        exact: `(operands) -> tree like fast`.
        operands: a tree of arrays.
    """

    def unsettled(state):
        return ~state[0]

    def once(state):
        # the barrier keeps XLA from moving the work out of the loop
        held, safe = lax.optimization_barrier((operands, state[0]))
        return safe | True, exact(held)

    operands = lax.stop_gradient(operands)
    start = lax.stop_gradient((safe, fast))
    _, settled = lax.while_loop(unsettled, once, start)
    return jax.tree.map(_with_derivative_of, settled, fast)


@jax.custom_jvp
def _with_derivative_of(value, other):
    """`value`; its derivative is that of `other`."""
    del other
    return value


@_with_derivative_of.defjvp
def _(values, tangents):
    return _with_derivative_of(*values), tangents[1]


def all_of(conditions: list) -> Array:
    """Whether all conditions hold."""
    return jnp.stack(conditions).all()


def scan(body: Callable, start: Any, xs: Any, **options: Any) -> tuple[Any, Any]:
    """`lax.scan`; in `shard_map` the start varies over all axes of the mesh that its result does.

    Args:
        body: `(carry, x) -> (carry, y)`.
        start: the first carry.
        xs: arrays `[rounds, ...]`, or None.
        **options: of `lax.scan`.
    """

    def first(start, xs):
        x = jax.tree.map(lambda a: a[0], xs)
        return body(start, x)[0]

    def vary(value, shape):
        if shape.manual_axis_type is None:
            return value
        own = jax.typeof(value).manual_axis_type.varying
        more = shape.manual_axis_type.varying - own
        return lax.pcast(value, tuple(more), to="varying")

    shapes = jax.eval_shape(first, start, xs)
    return lax.scan(body, jax.tree.map(vary, start, shapes), xs, **options)
