"""The factor of a parameter from its terms.

All is of one example: a factor here is that of a batch without its first axis, which `vmap` adds.
What all examples have in common is in a `Shared`, which `finish` takes off.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.factors import (
    Conv,
    Factor,
    Layout,
    Mapped,
    Outer,
    PerExample,
    Same,
    Scatter,
    Stacked,
    Sum,
    View,
    Zero,
)
from fnn.factors.base import sum_leaves
from fnn.tracing.terms import Chain, Constant, Layers, Patches, Product, Shared, Term

Shape = tuple[int, ...]


class _Part(NamedTuple):
    """A factor, and how it lies in the parameter; None where it lies as it is."""

    factor: Any
    layout: Any = None
    dtype: Any = None  # of the factor


def assemble(terms: Sequence[Term], shape: Shape, dtype: Any) -> Factor:
    """The factor of one parameter.

    Args:
        terms: whose sum its gradient is.
        shape: of the parameter.
        dtype: of the parameter.
    """
    if 0 in shape:
        terms = []
    layers, terms = _take_layers(terms)
    stacks, terms = _take_places(terms, shape)
    found = []
    if layers:
        each = jax.vmap(lambda *own: assemble(own, shape[1:], dtype))(*layers)
        found.append(Stacked(each))
    if stacks:
        factors = {i: assemble(own, shape[1:], dtype) for i, own in stacks.items()}
        zeros = jax.tree.map(jnp.zeros_like, next(iter(factors.values())))
        rows = [factors.get(i, zeros) for i in range(shape[0])]
        found.append(Stacked(jax.tree.map(lambda *a: jnp.stack(a), *rows)))
    groups = defaultdict(list)
    for term in terms:
        part = _PARTS[type(term)](term, shape, dtype)
        groups[_key(part)].append(part)
    for parts in groups.values():
        found += _lay(_merge(parts), shape, dtype)
    if not found:
        return Zero(jnp.zeros(()), shape, dtype)
    if len(found) == 1:
        return found[0]
    return Sum(tuple(sorted(found, key=_name)))


def _name(factor):
    """By which the parts of a sum are sorted."""
    inner = factor.of if isinstance(factor, View) else factor
    return type(inner).__name__


def _take_layers(terms):
    """What every layer of a scan adds, and the other terms."""
    layers = [term.each for term in terms if isinstance(term, Layers)]
    return layers, [term for term in terms if not isinstance(term, Layers)]


def _take_places(terms, shape):
    """The terms of every row of a parameter whose rows are layers, and the other terms.

    They are layers where at least two have products of their own, all alike.
    """
    places = defaultdict(list)
    rest = []
    for term in terms:
        alone = isinstance(term, Product) and term.place is not None
        if alone and term.out[0] == (term.row,):
            inner = replace(term, out=term.out[1:], row=None, index=None, place=None)
            places[term.place].append(inner)
        else:
            rest.append(term)
    kinds = {str(jax.tree.map(jnp.shape, own)) for own in places.values()}
    if len(kinds) == 1 and (len(places) > 1 or shape[0] == 1):
        return places, rest
    return {}, terms


def _key(part):
    """Equal for parts that `_merge` makes one."""
    factor = part.factor
    if isinstance(factor, PerExample):
        return PerExample
    if isinstance(factor, (Same, Mapped)):
        return id(factor)
    widths = [a.shape[-1:] for a in jax.tree.leaves(factor)]
    if isinstance(factor, Conv):
        widths = [a.shape for a in jax.tree.leaves(factor)]
    return str((jax.tree.structure(factor), part.layout, part.dtype, widths))


def _merge(parts):
    """Factors of one kind as one: uses are to a factor what positions are."""
    first = parts[0]
    if len(parts) == 1:
        return first
    factors = [part.factor for part in parts]
    if isinstance(first.factor, PerExample):
        gradients = [part.factor.gradient.astype(first.dtype) for part in parts]
        why = next((f.why for f in factors if f.why), "")
        return first._replace(factor=PerExample(sum_leaves(gradients), why))
    if isinstance(first.factor, Conv):
        uses = jax.tree.map(lambda *a: jnp.stack(a)[:, None], *factors)
        return first._replace(factor=jax.tree.map(lambda a: a[0], uses.merged()))
    if isinstance(first.factor, Stacked):
        each = jax.vmap(lambda *own: _join(own))(*(f.factor for f in factors))
        return first._replace(factor=Stacked(each))
    return first._replace(factor=_join(factors))


def _join(factors):
    """Products, or rows of a table, with all their positions."""
    index = isinstance(factors[0], Scatter)

    def positions(a):
        whole = jnp.issubdtype(a.dtype, jnp.integer) and index
        return a.reshape(-1) if whole else a.reshape(-1, a.shape[-1])

    def join(*arrays):
        return jnp.concatenate(list(map(positions, arrays)))

    return jax.tree.map(join, *factors)


def _lay(part, shape, dtype):
    """The factor as it lies in the parameter."""
    if part.layout is None and part.dtype in (None, dtype):
        return [part.factor]
    layout = part.layout or Layout(shape, tuple(range(len(shape))), shape)
    return [View(part.factor, layout, dtype)]


def _product_part(term, shape, dtype):
    if term.is_array:
        why = term.why if sum(n > 1 for n in shape) > 1 else ""  # a vector takes little memory
        return _Part(PerExample(term.gradient().astype(dtype), why), None, dtype)
    if len(term.operands) == 1:
        return _rows_part(term, shape, dtype)
    if term.row is not None:
        term = _spread(term)
    term = _sum_alone(term)
    flat = _flat(term)
    stack = [label for label in flat if len(term.holders(label)) == 2]
    ends = [label for label in flat if label not in stack]
    first = term.holders(ends[0])[0] if ends else 0
    outer, inner = _outer(term, stack, ends, first)
    layout = _layout([*stack, *inner], flat, term.sizes, shape)
    made = outer.dz.dtype
    if stack:
        return _Part(Stacked(outer), layout, made)
    widths = outer.a.shape[-1], outer.dz.shape[-1]
    natural = layout.order == tuple(range(len(flat))) and shape == widths
    return _Part(outer, None if natural else layout, made)


def _outer(term, stack, ends, first):
    """The two operands as an `Outer`, layers first, and the labels of its gradient.

    Args:
        term: a product of two arrays.
        stack: the labels that both have, and the gradient.
        ends: the other labels of the gradient.
        first: which operand comes first.
    """
    sizes = term.sizes
    both = [label for label in term.labels[first] if len(term.holders(label)) == 2]
    positions = [label for label in both if label not in stack]
    groups = [group for group in (stack, positions) if group]
    arrays = []
    labels = []
    for i in (first, 1 - first):
        own = [label for label in ends if label in term.labels[i]]
        arrays.append(_arrange(term.operands[i], term.labels[i], [*groups, own], sizes))
        labels += own
    return Outer(*arrays), labels


def _rows_part(term, shape, dtype):
    term = _sum_alone(term)
    sizes = term.sizes
    flat = _flat(term)
    if set(flat) & set(term.index_labels):  # rows that a loop stacks
        return _Part(PerExample(term.gradient().astype(dtype), "scatter-add"), None, dtype)
    features = [label for label in flat if label != term.row]
    groups = [list(term.index_labels), features]
    dy = _arrange(term.operands[0], term.labels[0], groups, sizes)
    rows = Scatter(term.index.reshape(-1).astype(jnp.int32), dy, term.size)
    layout = _layout([term.row, *features], flat, sizes, shape)
    natural = flat[0] == term.row and shape == (term.size, dy.shape[-1])
    return _Part(rows, None if natural else layout, dy.dtype)


def _flat(term):
    """The labels of the gradient in the order of its axes."""
    return [label for group in term.out for label in group]


def _arrange(array, labels, groups, sizes):
    """An array with an axis for every group of labels."""
    order = [labels.index(label) for group in groups for label in group]
    shape = [math.prod(sizes[label] for label in group) for group in groups]
    return array.transpose(order).reshape(shape)


def _layout(natural, flat, sizes, shape):
    order = tuple(natural.index(label) for label in flat)
    return Layout(tuple(sizes[label] for label in natural), order, shape)


def _sum_alone(term):
    """The product with its arrays summed over the axes that only one of them has."""
    arrays = []
    labels = []
    kept = {*_flat(term), *term.index_labels}
    for array, own in zip(term.operands, term.labels, strict=True):
        gone = [k for k in own if k not in kept and len(term.holders(k)) == 1]
        arrays.append(array.sum([own.index(k) for k in gone]) if gone else array)
        labels.append(tuple(k for k in own if k not in gone))
    return replace(term, operands=tuple(arrays), labels=tuple(labels))


def _spread(term):
    """A product in one row of many, as one whose first array has that axis, with zeros."""
    a, d = term.operands
    one, two = term.labels
    which = jax.nn.one_hot(term.index, term.size, dtype=a.dtype)
    spread = (*term.index_labels, term.row)
    more = tuple(label for label in spread if label not in one)
    a = jnp.einsum(which, list(spread), a, list(one), [*more, *one])
    return replace(term, operands=(a, d), labels=((*more, *one), two), row=None, index=None)


def _conv_part(term, shape, dtype):
    axes = [0] * len(shape)
    for i, k in enumerate(term.order):
        axes[k] = shape[i]
    natural = term.order == tuple(range(len(shape)))
    layout = None if natural else Layout(tuple(axes), term.order, shape)
    return _Part(term.factor(), layout, term.dz.dtype)


def _constant_part(term, shape, dtype):
    return _Part(Same(term.weight, term.array), None, term.array.array.dtype)


def _chain_part(term, shape, dtype):
    inner = jax.eval_shape(term.of.gradient)
    of = assemble([term.of], inner.shape, inner.dtype)
    if term.map.relocates:
        return _Part(of, functools.partial(term.map, operands={}), inner.dtype)
    return _Part(Mapped(of, term.operands, term.map), None, term.dtype)


def finish(value: Any, depth: int = 0) -> Any:
    """Factors of a batch as `vmap` returns them: the batch behind the layers, no `Shared` left."""
    if isinstance(value, Shared):
        return value.array
    if isinstance(value, jax.Array):
        return jnp.moveaxis(value, 0, depth)
    children, structure = jax.tree.flatten(value, is_leaf=lambda v: v is not value)
    inner = depth + isinstance(value, Stacked)
    return structure.unflatten([finish(child, inner) for child in children])


_PARTS = {
    Product: _product_part,
    Patches: _conv_part,
    Constant: _constant_part,
    Chain: _chain_part,
}
