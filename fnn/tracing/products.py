"""The rules of products, where gradients begin, and of the linear operations that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.factors.conv import Window
from fnn.tracing.jaxprs import Equation, apply_equation
from fnn.tracing.terms import Chain, Constant, Patches, Product, Shared, Term
from fnn.tracing.walk import (
    RULES,
    TERMS,
    VALUE,
    Rule,
    Scope,
    add_terms,
    fresh_product,
)
from fnn.types import Array

SAME = ("copy", "copy_p", "sharding_constraint")
UNARY = (
    *("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("reduce_sum", "slice", "rev", "cumsum"),
)


@dataclass(frozen=True, eq=False)
class Linear:
    """An operation that is linear in one operand.

    Attributes:
        name: of the operation.
        params: its parameters.
        shape: of the result.
        dtype: of the result.
        apply: `(that operand, *others) -> result`.
    """

    name: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Any
    apply: Callable[..., Array]

    def __call__(self, gradient: Array, *others: Array) -> Array:
        """The result."""
        return self.apply(gradient, *others)

    @property
    def relocates(self) -> bool:
        """Whether the result has the same numbers, with zeros between them."""
        if self.name == "pad":
            return all(min(edges) >= 0 for edges in self.params["padding_config"])
        return self.name in ("transpose", "reshape", "squeeze", "expand_dims", "rev")


def linear_equation(eqn: Equation, position: int) -> Linear:
    """An equation as an operation on the operand at `position`."""
    taken = eqn.invars[position].aval.dtype
    made = eqn.outvars[0].aval

    def apply(gradient, *others):
        operands = list(others)
        operands.insert(position, gradient.astype(taken))
        return apply_equation(eqn, *operands)[0]

    params = {**eqn.params, "position": position}
    return Linear(eqn.primitive.name, params, made.shape, made.dtype, apply)


def pass_term(f: Linear, term: Term, others: Sequence[Array], *, shared: bool) -> Term:
    """A term behind an operation.

    Args:
        f: linear in the term.
        term: any.
        others: the other operands.
        shared: whether all examples have them in common.
    """
    written = isinstance(term, Product) and term.is_array
    if shared and (not written or f.name == "pad"):
        moved = term.move(f.name, f.params, f.shape, others)
        if moved is not None:
            return moved.cast(f.dtype)
    if shared and isinstance(term, Constant):
        array = Shared(f(term.array.array, *others))
        return Constant(term.weight, array, dtype=f.dtype)
    if shared and not written:
        return Chain.begin(term).then(f, others, f.dtype)
    why = term.why if isinstance(term, Product) and written else f.name
    return fresh_product(f(term.gradient(), *others), why)


def linear_rule(find: Callable[[Equation, Scope], int | None]) -> Rule:
    """The rule of an operation that is linear in the operand at `find(equation, scope)`."""

    def asks(eqn, kinds, scope):
        position = find(eqn, scope)
        if position is None:
            return None
        kinds = [VALUE] * len(eqn.invars)
        kinds[position] = TERMS
        return kinds

    def apply(eqn, kinds, scope, operands):
        position = cast(int, find(eqn, scope))
        others = operands[:position] + operands[position + 1 :]
        atoms = eqn.invars[:position] + eqn.invars[position + 1 :]
        shared = not any(map(scope.is_mapped, atoms))
        f = linear_equation(eqn, position)
        return [[pass_term(f, term, others, shared=shared) for term in operands[position]]]

    return Rule(asks, apply)


def simple_rule(change: Callable[[Any, Equation], Any]) -> Rule:
    """The rule of an operation on one operand that any term can do."""

    def asks(eqn, kinds, scope):
        return [TERMS] if jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating) else None

    def apply(eqn, kinds, scope, operands):
        return [[change(term, eqn) for term in operands[0]]]

    return Rule(asks, apply)


def _negate(term, eqn):
    if isinstance(term, Chain):  # so that its first term stays the same, and chains of it add up
        return pass_term(linear_equation(eqn, 0), term, (), shared=True)
    return term.scaled(jnp.negative)


def _first(eqn, scope):
    return 0 if len(eqn.invars) == 1 and eqn.invars[0].aval.shape else None


def _first_by_shared(eqn, scope):
    return None if any(map(scope.is_mapped, eqn.invars[1:])) else 0


def _asks_select(eqn, kinds, scope):
    which, *cases = eqn.invars
    return None if scope.is_mapped(which) else [VALUE, *[TERMS] * len(cases)]


def _select(eqn, kinds, scope, operands):
    """A mask: every case keeps its numbers where it is chosen."""
    which, *cases = operands
    made = eqn.outvars[0].aval
    found = []
    for i, terms in enumerate(cases):

        def keep(gradient, which, i=i):
            choices = [jnp.zeros_like(gradient)] * len(cases)
            choices[i] = gradient
            return lax.select_n(which, *choices)

        f = Linear("select_n", {}, made.shape, made.dtype, keep)
        found = add_terms(found, [pass_term(f, t, [which], shared=True) for t in terms])
    return [found]


# mul, div ---------------------------------------------------------------------------------------


def _find_factor(eqn, scope):
    """The operand that is multiplied by one number, or by what all examples share."""
    places = (0, 1) if eqn.primitive.name == "mul" else (0,)
    if not eqn.outvars[0].aval.shape:
        return None
    for by in (scope.is_number, lambda atom: not scope.is_mapped(atom)):
        for i in places:
            if by(eqn.invars[1 - i]):
                return i
    return None


_LINEAR_FACTOR = linear_rule(_find_factor)


def _apply_factor(eqn, kinds, scope, operands):
    position = cast(int, _find_factor(eqn, scope))
    other = 1 - position
    if not scope.is_number(eqn.invars[other]):
        operands[other] = _before_broadcast(eqn.invars[other], operands[other], scope)
        return _LINEAR_FACTOR.apply(eqn, kinds, scope, operands)
    own = not scope.is_mapped(eqn.invars[other])
    f = linear_equation(eqn, position)
    number = jnp.ravel(operands[other])[0]
    multiply = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide

    def scale(array):
        return multiply(array, number.astype(array.dtype))

    found = []
    for term in operands[position]:
        if own and isinstance(term, Chain):
            found.append(pass_term(f, term, [operands[other]], shared=True))
        else:
            found.append(term.scaled(scale))
    return [found]


def _before_broadcast(atom, value, scope):
    """An array with axes of length 1 where it is one broadcast."""
    eqn = scope.made_by(atom, "broadcast_in_dim")
    if eqn is None or len(eqn.invars) != 1:
        return value
    kept = eqn.params["broadcast_dimensions"]
    cut = tuple(slice(None) if k in kept else slice(0, 1) for k in range(value.ndim))
    return value[cut]


# sums and parts ---------------------------------------------------------------------------------


def _asks_sum(eqn, kinds, scope):
    shapes = {atom.aval.shape for atom in eqn.invars}
    return [TERMS, TERMS] if len(shapes) == 1 else None


def _apply_sum(eqn, kinds, scope, operands):
    return [add_terms(*operands)]


def _asks_parts(eqn, kinds, scope):
    return None if VALUE in kinds else [TERMS] * len(eqn.invars)


def _concatenate(eqn, kinds, scope, operands):
    """The sum of the parts, each with zeros in the place of the others."""
    axis = eqn.params["dimension"]
    made = eqn.outvars[0].aval
    found = []
    start = 0
    for atom, terms in zip(eqn.invars, operands, strict=True):
        end = start + atom.aval.shape[axis]
        config = [(0, 0, 0)] * made.ndim
        config[axis] = (start, made.shape[axis] - end, 0)
        start = end
        f = _pad_by(config, made)
        found = add_terms(found, [pass_term(f, term, (), shared=True) for term in terms])
    return [found]


def _pad_by(config, made):
    def pad(gradient):
        return lax.pad(gradient, jnp.zeros((), gradient.dtype), config)

    return Linear("pad", {"padding_config": config}, made.shape, made.dtype, pad)


def _asks_pad(eqn, kinds, scope):
    return [TERMS, None] if scope.is_zero(eqn.invars[1]) else None


def _pad(eqn, kinds, scope, operands):
    f = _pad_by(eqn.params["padding_config"], eqn.outvars[0].aval)
    return [[pass_term(f, term, (), shared=True) for term in operands[0]]]


def _split(eqn, kinds, scope, operands):
    axis = eqn.params["axis"]
    found = []
    start = 0
    for made in (v.aval for v in eqn.outvars):
        starts = [0] * made.ndim
        limits = list(eqn.invars[0].aval.shape)
        starts[axis] = start
        limits[axis] = start = start + made.shape[axis]
        params = {"start_indices": starts, "limit_indices": limits, "strides": None}

        def cut(gradient, params=params):
            return lax.slice(gradient, **params)

        f = Linear("slice", params, made.shape, made.dtype, cut)
        found.append([pass_term(f, term, (), shared=True) for term in operands[0]])
    return found


# where gradients begin --------------------------------------------------------------------------


def _is_linear_dot(eqn, scope):
    """Whether a product is a linear map of one operand, and no outer product."""
    contract, batch = (dims[0] for dims in eqn.params["dimension_numbers"])
    return bool(contract or batch) and not all(map(scope.is_mapped, eqn.invars))


def _asks_dot(eqn, kinds, scope):
    if _is_linear_dot(eqn, scope):
        return _LINEAR_DOT.asks(eqn, kinds, scope)
    outer = eqn.outvars[0].aval.ndim > 1
    return [VALUE, VALUE] if outer else None


def _apply_dot(eqn, kinds, scope, operands):
    if _is_linear_dot(eqn, scope):
        return _LINEAR_DOT.apply(eqn, kinds, scope, operands)
    (contract, also), (batch, rows) = eqn.params["dimension_numbers"]
    left, right = (v.aval.ndim for v in eqn.invars)
    labels = list(range(left))
    others = list(range(left, left + right))
    for i, k in zip((*contract, *batch), (*also, *rows), strict=True):
        others[k] = labels[i]
    own = [labels[i] for i in range(left) if i not in (*contract, *batch)]
    their = [others[k] for k in range(right) if k not in (*also, *rows)]
    flat = [*(labels[i] for i in batch), *own, *their]
    made = eqn.outvars[0].aval
    out = tuple((label,) if n > 1 else () for label, n in zip(flat, made.shape, strict=True))
    arrays = tuple(operand.astype(made.dtype) for operand in operands)
    return [[Product(arrays, (tuple(labels), tuple(others)), out, dtype=made.dtype)]]


def _find_mapped(eqn, scope):
    mapped = [i for i, atom in enumerate(eqn.invars) if scope.is_mapped(atom)]
    return mapped[0] if len(mapped) == 1 else None


_LINEAR_DOT = linear_rule(_find_mapped)


def _asks_conv(eqn, kinds, scope):
    both = all(map(scope.is_mapped, eqn.invars))
    return [VALUE, VALUE] if both and eqn.params["feature_group_count"] == 1 else None


def _apply_conv(eqn, kinds, scope, operands):
    params = eqn.params
    left, right, made = map(tuple, params["dimension_numbers"])
    window = Window(
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        (left, right, made),
        params["batch_group_count"],
    )
    x, dz = operands
    order = tuple(range(len(made)))
    return [[Patches(x, dz, window, order, dtype=eqn.outvars[0].aval.dtype)]]


# rows of a table --------------------------------------------------------------------------------


def _asks_rows(eqn, kinds, scope):
    if not scope.is_zero(eqn.invars[0]) or _row_axis(eqn) is None:
        return None
    return [None, VALUE, TERMS]


def _row_axis(eqn):
    """The axis along which a scatter adds whole rows; None if it does something else."""
    numbers = eqn.params["dimension_numbers"]
    table, _, update = (v.aval.shape for v in eqn.invars)
    window = [update[k] for k in numbers.update_window_dims]
    for k in sorted(numbers.inserted_window_dims):
        window.insert(k, 1)
    cut = [k for k, (part, whole) in enumerate(zip(window, table, strict=False)) if part != whole]
    moved = tuple(numbers.scatter_dims_to_operand_dims)
    if numbers.operand_batching_dims or len(cut) != 1 or cut[0] not in moved:
        return None
    return cut[0] if window[cut[0]] == 1 else None


def _apply_rows(eqn, kinds, scope, operands):
    axis = cast(int, _row_axis(eqn))
    numbers = eqn.params["dimension_numbers"]
    made = eqn.outvars[0].aval
    size = made.shape[axis]
    _, index, terms = operands
    index = index[..., numbers.scatter_dims_to_operand_dims.index(axis)]
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, size - 1)
    found = []
    for term in terms:
        if index.ndim or not _may_have_row(term):
            term = fresh_product(term.gradient())
        lead = [k for k in range(len(term.out)) if k not in numbers.update_window_dims]
        labels = tuple(term.labels[0][k] for k in lead)
        rest = [group for k, group in enumerate(term.out) if k not in lead]
        if axis in numbers.inserted_window_dims:
            rest.insert(axis, ())
        row = replace(term, out=tuple(rest)).at_row(axis, size, index, labels=labels)
        found.append(row)
    return [found]


def _may_have_row(term):
    return isinstance(term, Product) and term.row is None


def _asks_update(eqn, kinds, scope):
    whole, part = (v.aval.shape for v in eqn.invars[:2])
    cut = [k for k, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]
    if not scope.is_zero(eqn.invars[0]) or len(cut) != 1 or part[cut[0]] != 1:
        return None
    return [None, TERMS, *[VALUE] * len(whole)]


def _apply_update(eqn, kinds, scope, operands):
    _, terms, *starts = operands
    whole, part = (v.aval.shape for v in eqn.invars[:2])
    axis = next(k for k, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m)
    index = jnp.clip(starts[axis], 0, whole[axis] - 1)
    place = starts[axis]
    place = int(place) if isinstance(place, (int, np.integer, np.ndarray)) else None
    found = []
    for term in terms:
        if not _may_have_row(term):
            term = fresh_product(term.gradient())
        found.append(term.at_row(axis, whole[axis], jnp.asarray(index), place))
    return [found]


RULES.update(dict.fromkeys(UNARY, linear_rule(_first)))
RULES.update(dict.fromkeys(SAME, simple_rule(lambda term, eqn: term)))
RULES["neg"] = simple_rule(_negate)
RULES["convert_element_type"] = simple_rule(lambda term, eqn: term.cast(eqn.params["new_dtype"]))
RULES.update(dict.fromkeys(("gather", "dynamic_slice"), linear_rule(_first_by_shared)))
RULES["select_n"] = Rule(_asks_select, _select)
RULES["pad"] = Rule(_asks_pad, _pad)
RULES["mul"] = RULES["div"] = Rule(_LINEAR_FACTOR.asks, _apply_factor)
RULES["add_any"] = RULES["add"] = Rule(_asks_sum, _apply_sum)
RULES["concatenate"] = Rule(_asks_parts, _concatenate)
RULES["split"] = Rule(_asks_parts, _split)
RULES["dot_general"] = Rule(_asks_dot, _apply_dot)
RULES["conv_general_dilated"] = Rule(_asks_conv, _apply_conv)
RULES["scatter-add"] = Rule(_asks_rows, _apply_rows)
RULES["dynamic_update_slice"] = Rule(_asks_update, _apply_update)
