"""Reads a jaxpr backwards from gradients: which values it needs, and which it has as terms.

`plan` goes from the results back and says how every variable is wanted: as a value, or as terms
alone. `evaluate` then computes the values, and collects the terms. What an operation wants of its
operands, and what it makes of their terms, is a `Rule` in the table `RULES`. An operation without
one ends the walk: its result is a value, a gradient that is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from fnn.factors.base import sum_leaves
from fnn.tracing.jaxprs import CALLS, Atom, Equation, apply_equation, inner_jaxprs, open_jaxpr
from fnn.tracing.terms import Chain, Constant, Product, Shared
from fnn.types import Array

VALUE = "value"
TERMS = "terms"
MOST_TERMS = 32  # of one gradient; a product that is rescaled again and again has more
Kind = str | None  # VALUE, TERMS, or None for what nobody wants

# results whose numbers are those of the operands, or products of two of them
SHAPED = (
    *("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "transpose"),
    *("mul", "neg", "slice", "unstack", "gather", "rev", "select_n", "add_any", "dot_general"),
)
PRODUCTS = ("dot_general", "conv_general_dilated")


class Scope:
    """A jaxpr, and what is known of its variables.

    Attributes:
        jaxpr: what is read.
        mapped: the variables that differ from example to example.
        maker: the equation that makes a variable.
        sources: of how many numbers that differ between examples a variable is made, where that
            may be fewer than it has.
    """

    def __init__(self, jaxpr: Jaxpr, flags: Sequence[bool], sources: Sequence[int] = ()):
        """Reads a jaxpr.

        Args:
            jaxpr: any.
            flags: which of its inputs differ between examples.
            sources: of how many such numbers each input is made; their sizes, if left out.
        """
        self.jaxpr = jaxpr
        self.mapped = {v for v, differs in zip(jaxpr.invars, flags, strict=True) if differs}
        self.maker: dict[Atom, Equation] = {}
        self.sources: dict[Any, int] = dict(zip(jaxpr.invars, sources, strict=False))
        for eqn in jaxpr.eqns:
            self.maker.update(dict.fromkeys(eqn.outvars, eqn))
            differ = find_mapped(eqn, list(map(self.is_mapped, eqn.invars)))
            self.mapped.update(v for v, yes in zip(eqn.outvars, differ, strict=True) if yes)
            self._count_sources(eqn)

    def is_mapped(self, atom: Atom) -> bool:
        """Whether it differs from example to example."""
        return not isinstance(atom, Literal) and atom in self.mapped

    def made_by(self, atom: Atom, *names: str) -> Equation | None:
        """The equation that makes a variable, if it is one of these operations."""
        if isinstance(atom, Literal):
            return None
        eqn = self.maker.get(atom)
        return eqn if eqn is not None and eqn.primitive.name in names else None

    def is_zero(self, atom: Atom) -> bool:
        """Whether it is a constant 0."""
        if isinstance(atom, Literal):
            return bool(np.all(atom.val == 0))
        eqn = self.made_by(atom, "broadcast_in_dim")
        return eqn is not None and self.is_zero(eqn.invars[0])

    def is_number(self, atom: Atom) -> bool:
        """Whether all its entries are one number."""
        if not atom.aval.shape:
            return True
        eqn = self.made_by(atom, "broadcast_in_dim")
        return eqn is not None and self.is_number(eqn.invars[0])

    def reason(self, atom: Atom) -> str:
        """The operation that writes a gradient out, if that is larger than what it is made of."""
        eqn = None if isinstance(atom, Literal) else self.maker.get(atom)
        if eqn is None or sum(n > 1 for n in eqn.outvars[0].aval.shape) < 2:
            return ""
        name = eqn.primitive.name
        if name in PRODUCTS and not all(map(self.is_mapped, eqn.invars)):
            return ""  # an error that a weight carries back, say
        larger = eqn.outvars[0].aval.size > sum(map(self.count_sources, eqn.invars))
        return name if larger or inner_jaxprs(eqn) else ""

    def count_sources(self, atom: Atom) -> Any:
        """How many numbers that differ between examples it is made of."""
        if not self.is_mapped(atom):
            return 0
        aval: Any = atom.aval
        return self.sources.get(atom, aval.size)

    def _count_sources(self, eqn):
        name = eqn.primitive.name
        product = name in PRODUCTS and not all(map(self.is_mapped, eqn.invars))
        for v in eqn.outvars:
            if name in SHAPED and not product:
                self.sources[v] = min(v.aval.size, sum(map(self.count_sources, eqn.invars)))


def find_mapped(eqn: Equation, flags: list[bool]) -> list[bool]:
    """Which results differ from example to example, by which operands do."""
    name = eqn.primitive.name
    if name in CALLS:
        inner = Scope(open_jaxpr(eqn.params[CALLS[name]])[0], flags)
        return list(map(inner.is_mapped, inner.jaxpr.outvars))
    if name == "scan":
        inner = open_loop(eqn, flags)
        return list(map(inner.is_mapped, inner.jaxpr.outvars))
    return [any(flags)] * len(eqn.outvars)


def open_loop(eqn: Equation, flags: list[bool]) -> Scope:
    """The body of a scan; a carry that differs in any round counts as one that does in all."""
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    first = eqn.params["num_consts"]
    flags = list(flags)
    while True:
        inner = Scope(jaxpr, flags)
        before = list(flags)
        for i in range(eqn.params["num_carry"]):
            flags[first + i] |= inner.is_mapped(jaxpr.outvars[i])
        if flags == before:
            return inner


class Rule(NamedTuple):
    """What one operation does with terms.

    Attributes:
        asks: `(equation, kinds wanted of the results, scope) -> kinds wanted of the operands`; None
            where the results have to be values.
        apply: `(equation, kinds, scope, operands) -> results`. An operand or a result is an array,
            a list of terms, or None, by its kind.
    """

    asks: Callable[[Equation, Sequence[Kind], Scope], Sequence[Kind] | None]
    apply: Callable[[Equation, Sequence[Kind], Scope, list[Any]], list[Any]]


RULES: dict[str, Rule] = {}
"""By the name of the operation; `products` and `control` fill it."""


class Plan(NamedTuple):
    """How the variables of a jaxpr are wanted."""

    need: dict[Atom, Kind]  # of every variable
    asked: list[Sequence[Kind] | None]  # of the operands of every equation; None: all are values


def plan(scope: Scope, kinds: Sequence[Kind]) -> Plan:
    """How every variable is wanted, where the results of the jaxpr are wanted as `kinds`."""
    need: dict[Atom, Kind] = {}
    asked = []

    def want(atom, kind):
        if kind is None or isinstance(atom, Literal):
            return
        if need.get(atom) != VALUE:
            need[atom] = kind

    for atom, kind in zip(scope.jaxpr.outvars, kinds, strict=True):
        want(atom, kind)
    for eqn in reversed(scope.jaxpr.eqns):
        wanted = [need.get(v) for v in eqn.outvars]
        operands = _ask(eqn, wanted, scope)
        asked.append(operands)
        if operands is None:
            need.update({v: VALUE for v in eqn.outvars if v in need})
            operands = [VALUE if any(wanted) else None] * len(eqn.invars)
        for atom, kind in zip(eqn.invars, operands, strict=True):
            want(atom, kind)
    asked.reverse()
    return Plan(need, asked)


def _ask(eqn, kinds, scope):
    """What an equation wants of its operands; None if all of it is values, or nobody wants it."""
    rule = RULES.get(eqn.primitive.name)
    differs = any(map(scope.is_mapped, eqn.invars))
    if rule is None or TERMS not in kinds or not differs:
        return None
    return rule.asks(eqn, kinds, scope)


def evaluate(scope: Scope, kinds: Sequence[Kind], consts: Sequence, args: Sequence) -> list[Any]:
    """The results of a jaxpr: arrays, lists of terms, or None, by their kinds.

    Args:
        scope: the jaxpr.
        kinds: wanted of its results.
        consts: arrays.
        args: arrays, lists of terms, or None for what nobody wants.
    """
    need, all_asked = plan(scope, kinds)
    inputs = [*scope.jaxpr.constvars, *scope.jaxpr.invars]
    found = dict(zip(inputs, [*consts, *args], strict=True))

    def read(atom, kind):
        if kind is None:
            return None
        value = atom.val if isinstance(atom, Literal) else found[atom]
        if kind == VALUE:
            return value
        if scope.is_zero(atom):
            return []
        if isinstance(value, list):
            return value
        value = jnp.asarray(value)
        if scope.is_mapped(atom):
            return [fresh_product(value, scope.reason(atom))]
        return [Constant(jnp.ones((), value.dtype), Shared(value), dtype=value.dtype)]

    for eqn, asked in zip(scope.jaxpr.eqns, all_asked, strict=True):
        wanted = [need.get(v) for v in eqn.outvars]
        if not any(wanted):
            continue
        kinds_in = [VALUE] * len(eqn.invars) if asked is None else asked
        operands = [read(v, kind) for v, kind in zip(eqn.invars, kinds_in, strict=True)]
        if asked is None:
            results = apply_equation(eqn, *operands)
        else:
            results = RULES[eqn.primitive.name].apply(eqn, wanted, scope, operands)
        found.update(zip(eqn.outvars, results, strict=True))
    return [read(v, kind) for v, kind in zip(scope.jaxpr.outvars, kinds, strict=True)]


def fresh_product(value: Array, why: str = "") -> Product:
    """A gradient that is an array."""
    labels = tuple(range(value.ndim))
    out = tuple((k,) if n > 1 else () for k, n in zip(labels, value.shape, strict=True))
    return Product((value,), (labels,), out, dtype=value.dtype, why=why)


def add_terms(terms: list[Any], more: list[Any]) -> list[Any]:
    """Two lists of terms as one; products that have an array in common become one."""
    found = list(terms)
    for term in more:
        for i, other in enumerate(found):
            both = _together(other, term)
            if both is not None:
                found[i] = both
                break
        else:
            found.append(term)
    if len(found) > MOST_TERMS:
        return [fresh_product(sum_leaves([term.gradient() for term in found]), "add_any")]
    return found


def _together(term, other):
    """Two terms as one, where they have something in common; else None."""
    if isinstance(term, Chain) or isinstance(other, Chain):
        one = Chain.begin(term)
        two = Chain.begin(other)
        return one.plus(two) if one.of is two.of else None
    if not (isinstance(term, Product) and isinstance(other, Product)):
        return None
    if term.is_array and other.is_array:
        return fresh_product(term.gradient() + other.gradient(), term.why or other.why)
    return _add_products(term, other)


def _add_products(term, other):
    """Two products with one array in common as one; None if they have none."""
    forms = [replace(product, operands=(), index=None) for product in (term, other)]
    rows = term.row is not None or other.row is not None
    if rows or forms[0] != forms[1]:
        return None
    (a, d), (b, e) = term.operands, other.operands
    if a is b and d.shape == e.shape:
        return replace(term, operands=(a, d + e))
    if d is e and a.shape == b.shape:
        return replace(term, operands=(a + b, d))
    return None
