"""What all who read a jaxpr have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, primitives

Atom = Any  # a Var or Literal; JAX's types do not say that these have a shape
Equation = Any  # a JaxprEqn of them

CALLS = {
    primitives.jit_p.name: "jaxpr",
    primitives.closed_call_p.name: "call_jaxpr",
    primitives.remat_p.name: "jaxpr",
}
"""Operations that call a jaxpr once, and the parameter that holds it."""


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence]:
    """A jaxpr and its constants."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def all_equations(jaxpr: Any) -> Iterator[Equation]:
    """The equations of a jaxpr, and those of the jaxprs inside it."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from all_equations(inner)


def has_primitive(jaxpr: Any, name: str) -> bool:
    """Whether an equation of a jaxpr, or of one inside it, is of this primitive."""
    return any(eqn.primitive.name == name for eqn in all_equations(jaxpr))


def inner_jaxprs(eqn: Equation) -> list[Any]:
    """The jaxprs that an equation holds: of a call, a loop, or the like."""
    values = jax.tree.leaves(list(eqn.params.values()))
    return [value for value in values if isinstance(value, (ClosedJaxpr, Jaxpr))]


def apply_equation(eqn: Equation, *values: Any) -> list[Any]:
    """The results of an equation at some values."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **params)
    return results if eqn.primitive.multiple_results else [results]
