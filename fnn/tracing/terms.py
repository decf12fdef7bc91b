"""Terms: what one example contributes to the gradient of one parameter, before there is a batch.

A gradient is a list of terms, whose sum it is. A term keeps the operands of the product that makes
it, and takes part in the linear operations that follow. Where it cannot, `None` is the answer.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax

from fnn.factors.conv import Conv, Window
from fnn.types import Array

Label = int
Shape = tuple[int, ...]
T = TypeVar("T")


def static(**options: Any) -> Any:
    """A field that is no array."""
    return field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(field, static))
def pytree(cls: type[T]) -> type[T]:
    """A decorator that makes a frozen dataclass a pytree."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@pytree
class Shared:
    """An array that all examples have in common; `vmap` leaves it without a batch axis."""

    array: Array


@dataclass(frozen=True)
class Term(ABC):
    """What a term does; the defaults say that it cannot."""

    dtype: Any = field(kw_only=True, metadata={"static": True})

    @abstractmethod
    def gradient(self) -> Array:
        """The gradient of the example, written out."""

    @abstractmethod
    def scaled(self, scale: Callable[[Array], Array]) -> Any:
        """The term times a number; `scale` multiplies an array by it."""

    def cast(self, dtype: Any) -> Any:
        """The same numbers in another dtype."""
        return replace(self, dtype=dtype)

    def move(self, name: str, params: dict, shape: Shape, others: Sequence) -> Any:
        """The term behind a linear operation, or None."""
        return None


@pytree
class Product(Term):
    """A product of one or two arrays, summed over the labels that are not in `out`.

    As `einsum` has it: every axis of an operand has a label. An axis of the gradient is a group of
    labels, empty for an axis of length 1.

    Attributes:
        operands: one array is a gradient that is written out, or the rows of a table.
        labels: of the axes of every operand.
        out: of the axes of the gradient.
        row: the label of the axis where `index` says in which row of `size` the product lies.
        index: whole numbers; None where there is no such axis.
        index_labels: of the axes of `index`.
        size: of the axis of rows.
        place: the row, where it is the same whole number for all examples.
        why: the operation that wrote the gradient out, where that takes memory.
    """

    operands: tuple[Array, ...]
    labels: tuple[tuple[Label, ...], ...] = static()
    out: tuple[tuple[Label, ...], ...] = static()
    row: Label | None = static(default=None)
    index: Array | None = None
    index_labels: tuple[Label, ...] = static(default=())
    size: int = static(default=0)
    place: int | None = static(default=None)
    why: str = static(default="")

    @property
    def is_array(self) -> bool:
        """Whether the gradient is written out."""
        return len(self.operands) == 1 and self.row is None

    @property
    def sizes(self) -> dict[Label, int]:
        """The length of the axis of every label."""
        found = {}
        for array, labels in zip(self.operands, self.labels, strict=True):
            found.update(zip(labels, array.shape, strict=True))
        if self.row is not None:
            found[self.row] = self.size
        return found

    def fresh(self) -> Label:
        """A label that is not in use."""
        labels = [label for own in (*self.labels, *self.out, self.index_labels) for label in own]
        return 1 + max(labels, default=-1)

    def holders(self, label: Label) -> list[int]:
        """Which operands have an axis of this label."""
        return [i for i, labels in enumerate(self.labels) if label in labels]

    def scaled(self, scale: Callable[[Array], Array]) -> Product:
        last = scale(self.operands[-1])
        return replace(self, operands=(*self.operands[:-1], last))

    def change(self, label: Label, f: Callable[[Array, int], Array]) -> Product:
        """The product with `f(operand, axis)` for every operand that has the label."""
        operands = list(self.operands)
        for i in self.holders(label):
            operands[i] = f(operands[i], self.labels[i].index(label))
        return replace(self, operands=tuple(operands))

    def move(self, name: str, params: dict, shape: Shape, others: Sequence) -> Product | None:
        moves = {
            "transpose": lambda: self._transpose(params["permutation"]),
            "reduce_sum": lambda: self._sum(params["axes"]),
            "slice": lambda: self._slice(params),
            "pad": lambda: self._pad(params["padding_config"]),
            "mul": lambda: self._times(shape, *others),
            "div": lambda: self._times(shape, *[1 / other for other in others]),
            "dot_general": lambda: self._dot(params, *others),
        }
        if name in moves:
            return moves[name]()
        if name in ("reshape", "squeeze", "expand_dims"):
            return self._reshape(shape)
        if name == "broadcast_in_dim" and math.prod(shape) == math.prod(self.shape):
            return self._reshape(shape)
        return None

    @property
    def shape(self) -> Shape:
        """That of the gradient."""
        sizes = self.sizes
        return tuple(math.prod(sizes[label] for label in group) for group in self.out)

    def gradient(self) -> Array:
        arrays = list(self.operands)
        labels = list(self.labels)
        if self.row is not None:
            arrays.append(jax.nn.one_hot(self.index, self.size, dtype=arrays[0].dtype))
            labels.append((*self.index_labels, self.row))
        flat = [label for group in self.out for label in group]
        pairs = [item for pair in zip(arrays, map(list, labels), strict=True) for item in pair]
        return jnp.einsum(*pairs, flat).reshape(self.shape).astype(self.dtype)

    def _transpose(self, permutation):
        return replace(self, out=tuple(self.out[i] for i in permutation))

    def _sum(self, axes):
        """Summed over axes of the gradient."""
        gone = [label for i in axes for label in self.out[i]]
        if self.row in gone:
            return None
        out = tuple(group for i, group in enumerate(self.out) if i not in axes)
        return replace(self, out=out)

    def _reshape(self, shape):
        """In another shape: labels go into other groups; one that lies in two is split."""
        term = self
        left = [label for group in self.out for label in group]
        out = []
        for size in shape:
            group = []
            found = 1
            while found < size:
                if not left:
                    return None
                label = left.pop(0)
                length = term.sizes[label]
                want = size // found
                if length > want:
                    rest = term.fresh()
                    term = term._split(label, want, rest)
                    if term is None or size % found:
                        return None
                    left.insert(0, rest)
                    length = want
                group.append(label)
                found *= length
            if found != size:
                return None
            out.append(tuple(group))
        return None if left else replace(term, out=tuple(out))

    def _split(self, label, first, rest):
        """An axis as two: `label` of length `first`, then `rest`."""
        if label == self.row or self.sizes[label] % first:
            return None

        def split(array, axis):
            return array.reshape(*array.shape[:axis], first, -1, *array.shape[axis + 1 :])

        labels = []
        for own in self.labels:
            k = own.index(label) + 1 if label in own else len(own)
            more = (rest,) if label in own else ()
            labels.append((*own[:k], *more, *own[k:]))
        return replace(self.change(label, split), labels=tuple(labels))

    def _slice(self, params):
        term = self
        strides = params["strides"] or (1,) * len(self.out)
        sizes = self.sizes
        cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        for group, cut in zip(self.out, cuts, strict=True):
            whole = math.prod(sizes[label] for label in group)
            if cut == (0, whole, 1):
                continue
            if len(group) != 1 or group[0] == self.row:
                return None
            term = term.change(group[0], lambda a, k, cut=cut: lax.slice_in_dim(a, *cut, axis=k))
        return term

    def _pad(self, config):
        term = self
        for i, (low, high, inner) in enumerate(config):
            if (low, high, inner) == (0, 0, 0):
                continue
            if len(self.out[i]) > 1 or min(low, high) < 0 or term is None:
                return None
            if self.out[i] == ():
                term = term.at_row(i, low + high + 1, jnp.asarray(low), place=int(low))
                continue
            edges = (low, high, inner)
            term = term.change(self.out[i][0], lambda a, k, edges=edges: _pad_axis(a, k, edges))
        return term

    def at_row(
        self, axis: int, size: int, index: Array, place: int | None = None, labels: Any = ()
    ) -> Product | None:
        """The product in one row of an axis; in one for each position, where the index has labels.

        Args:
            axis: of the gradient; of length 1, or that of the positions.
            size: how many rows.
            index: which row.
            place: the row as a Python number, if it is known.
            labels: of the axes of the index.
        """
        if self.row is not None:
            return None
        row = self.fresh()
        out = (*self.out[:axis], (row,), *self.out[axis + 1 :])
        given = {"index": index, "index_labels": labels, "size": size, "place": place}
        return replace(self, out=out, row=row, **given)

    def _times(self, shape, other):
        """Times an array that all examples share, if its axes are those of one operand."""
        if shape != self.shape:
            return None
        labels = []
        for group, size in zip(self.out, other.shape, strict=True):
            labels += group if size > 1 else ()
        sizes = self.sizes
        other = other.reshape([sizes[label] for label in labels])
        return self._with_operand(labels, other, labels, labels)

    def _dot(self, params, other):
        (left, right), (batch, _) = params["dimension_numbers"]
        if batch:
            return None
        first = params["position"] == 0
        mine, theirs = (left, right) if first else (right, left)
        return self._contract(other, mine, theirs, first)

    def _contract(self, other, mine, theirs, first):
        """A product with an array that all examples share, if it takes axes of one operand.

        Args:
            other: the array.
            mine: the axes of the gradient to sum over.
            theirs: those of the array.
            first: whether the gradient is the first operand.
        """
        gone = [label for axis in mine for label in self.out[axis]]
        kept = [k for k in range(other.ndim) if k not in theirs]
        lengths = [other.shape[k] for k in kept]
        sizes = self.sizes
        other = other.transpose([*theirs, *kept])
        other = other.reshape([*(sizes[label] for label in gone), *lengths])
        new = [self.fresh() + k for k in range(len(kept))]
        term = self._with_operand(gone, other, [*gone, *new], new) if gone else None
        if term is None:
            return None
        stay = [group for axis, group in enumerate(self.out) if axis not in mine]
        added = [(label,) if size > 1 else () for label, size in zip(new, lengths, strict=True)]
        return replace(term, out=(*stay, *added) if first else (*added, *stay))

    def _with_operand(self, needs, other, labels, new):
        """`other` multiplied into the operand that alone has the labels it needs; None if none has.

        These labels give way to `new` ones.
        """
        holders = [self.holders(label) for label in needs]
        own = [i for i, of in enumerate(self.labels) if set(needs) <= set(of)]
        alone = new == labels or all(len(h) == 1 for h in holders)
        if not own or not alone or self.row in needs:
            return None
        i = own[0]
        array = self.operands[i]
        stay = [label for label in self.labels[i] if label not in needs or label in new]
        made = [*stay, *(label for label in new if label not in stay)]
        other = other.astype(array.dtype)
        array = jnp.einsum(array, list(self.labels[i]), other, list(labels), made)
        operands = (*self.operands[:i], array, *self.operands[i + 1 :])
        names = (*self.labels[:i], tuple(made), *self.labels[i + 1 :])
        return replace(self, operands=operands, labels=names)

    def over_uses(self) -> Product:
        """The sum over an axis of uses that a loop has put in front of every array."""
        use = self.fresh()
        labels = tuple((use, *own) for own in self.labels)
        index_labels = (use, *self.index_labels) if self.index is not None else ()
        return replace(self, labels=labels, index_labels=index_labels, place=None)


def _pad_axis(array, axis, edges):
    config = [(0, 0, 0)] * array.ndim
    config[axis] = edges
    return lax.pad(array, jnp.zeros((), array.dtype), config)


@pytree
class Patches(Term):
    """The gradient of a convolution's kernel: what `Conv` keeps, of one example.

    Attributes:
        order: where the axes of the gradient come from.
        uses: how many axes of uses the arrays have in front.
    """

    x: Array
    dz: Array
    window: Window = static()
    order: tuple[int, ...] = static()
    uses: int = static(default=0)

    def scaled(self, scale: Callable[[Array], Array]) -> Patches:
        return replace(self, dz=scale(self.dz))

    def move(self, name: str, params: dict, shape: Shape, others: Sequence) -> Patches | None:
        if name != "transpose":
            return None
        return replace(self, order=tuple(self.order[i] for i in params["permutation"]))

    def over_uses(self) -> Patches:
        """As of a product."""
        return replace(self, uses=self.uses + 1)

    def factor(self) -> Conv:
        """That of one example, without a batch axis; all uses are one."""
        conv = Conv(self.x, self.dz, self.window)
        for _ in range(self.uses):
            with_batch = jax.tree.map(lambda a: jnp.expand_dims(a, self.uses), conv)
            conv = jax.tree.map(lambda a: jnp.squeeze(a, 0), with_batch.merged())
        return conv

    def gradient(self) -> Array:
        conv = jax.tree.map(lambda a: a[None], self.factor())
        return conv.total().transpose(self.order).astype(self.dtype)


@pytree
class Constant(Term):
    """An array that all examples share, times a number of each."""

    weight: Array  # one number
    array: Shared

    def scaled(self, scale: Callable[[Array], Array]) -> Constant:
        return replace(self, weight=scale(self.weight))

    def gradient(self) -> Array:
        array = self.array.array.astype(self.dtype)
        return self.weight.astype(self.dtype) * array


@pytree
class Layers(Term):
    """Terms of a scan over parameters: every array has a leading axis of layers."""

    each: Any

    def cast(self, dtype: Any) -> Layers:
        return Layers(self.each.cast(dtype), dtype=dtype)

    def scaled(self, scale: Callable[[Array], Array]) -> Layers:
        each = jax.vmap(lambda term: term.scaled(scale))(self.each)
        return replace(self, each=each)

    def over_uses(self) -> Layers:
        """As of a product; layers come first."""
        layers_first = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), self.each)
        return replace(self, each=layers_first.over_uses())

    def gradient(self) -> Array:
        return jax.vmap(lambda term: term.gradient())(self.each)


_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class Map:
    """A linear map as a graph: an operation on the results of others.

    Attributes:
        f: `(*results of parents, *operands) -> result`; None for the gradient itself.
        parents: what it is an operation on.
        number: larger than those of the parents.
    """

    f: Any
    parents: tuple[Map, ...]
    number: int = field(default_factory=lambda: next(_NUMBERS))

    def __call__(self, gradient: Array, operands: Mapping[int, Sequence]) -> Array:
        """The result; `operands` of every operation are by its number."""
        nodes: set[Map] = {self}
        left: list[Map] = [self]
        while left:
            more = set(left.pop().parents) - nodes
            nodes.update(more)
            left.extend(more)
        results = {}
        for node in sorted(nodes, key=lambda node: node.number):
            inputs = [results[parent] for parent in node.parents]
            more = operands.get(node.number, ())
            results[node] = node.f(*inputs, *more) if node.parents else gradient
        return results[self]

    @property
    def relocates(self) -> bool:
        """Whether the result has the same numbers as the gradient, with zeros between them."""
        if not self.parents:
            return True
        return getattr(self.f, "relocates", False) and self.parents[0].relocates


GRADIENT = Map(None, ())


@pytree
class Chain(Term):
    """A term behind linear operations that all examples share, for which it has no form."""

    of: Any
    operands: dict[int, tuple[Shared, ...]]  # by the number of the operation
    map: Map = static()

    def scaled(self, scale: Callable[[Array], Array]) -> Chain:
        return replace(self, of=self.of.scaled(scale))

    def gradient(self) -> Array:
        operands = {k: [shared.array for shared in v] for k, v in self.operands.items()}
        return self.map(self.of.gradient(), operands).astype(self.dtype)

    @staticmethod
    def begin(term: Term) -> Chain:
        """A term as a chain of no operation."""
        return term if isinstance(term, Chain) else Chain(term, {}, GRADIENT, dtype=term.dtype)

    def then(self, f: Callable, others: Sequence[Array], dtype: Any) -> Chain:
        """The chain and an operation more."""
        node = Map(f, (self.map,))
        operands = {**self.operands, node.number: tuple(map(Shared, others))}
        return Chain(self.of, operands, node, dtype=dtype)

    def plus(self, other: Chain) -> Chain:
        """The sum of two chains of one term."""
        node = Map(jnp.add, (self.map, other.map))
        return replace(self, operands={**self.operands, **other.operands}, map=node)
