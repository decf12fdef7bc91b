"""Four ways to differentiate, side by side: symbolic, numeric, forward-mode and reverse-mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree, Shaped

from fnn.graph.gates import FORMULAS, evaluate
from fnn.graph.trace import trace
from fnn.types import Array

Vector = Float[np.ndarray, " _"]
LARGEST = 2000  # operations in a formula: sympy takes seconds for more
SYMBOLIC = ("input", *FORMULAS, "integer_pow", "pow", "abs", "max", "min")
WAYS = ("symbolic", "numeric", "forward", "reverse")
STEPS = 1 / 10.0 ** np.arange(1, 14)


@dataclass(frozen=True)
class Derivatives:
    """The derivative of a function by each of its numbers, in four ways; `print` shows a table.

    Attributes:
        names: `[n]` of the numbers that the arguments hold.
        value: of the function.
        symbolic: `[n]` by sympy; None if the function is not one of scalars or sympy is missing.
        formulas: `[n]` sympy's expressions, or None.
        numeric: `[n]` central differences at the best of the step sizes.
        forward: `[n]` by one sweep forward for each number.
        reverse: `[n]` by one sweep backward for all.
        steps: `[s]` relative step sizes.
        errors: `[s]` greatest difference between central differences and the sweep backward.
    """

    names: list[str]
    value: float
    symbolic: Vector | None
    formulas: list[str] | None
    numeric: Vector
    forward: Vector
    reverse: Vector
    steps: Vector
    errors: Vector

    def __str__(self) -> str:
        """A table of the four ways."""
        ways = [way for way in WAYS if getattr(self, way) is not None]
        width = max(map(len, self.names))
        lines = [" " * width + "".join(f"{way:>16}" for way in ways)]
        for i, name in enumerate(self.names):
            numbers = [f"{getattr(self, way)[i]:16.9g}" for way in ways]
            lines.append(name.ljust(width) + "".join(numbers))
        best = np.argmin(self.errors)
        lines.append(
            f"numeric: central differences, best at a step of {self.steps[best]:.0e} "
            f"(error {self.errors[best]:.1e})"
        )
        for name, formula in zip(self.names, self.formulas or (), strict=False):
            lines.append(f"∂{name} = {formula}")
        return "\n".join(lines)


def derivatives(f: Callable[..., Shaped[Array, ""]], *args: PyTree[Any]) -> Derivatives:
    """The derivatives of `f` at a point in four ways.

    Args:
        f: a function of floating-point numbers or arrays that returns one number.
        *args: the point.

    Returns:
        A `Derivatives`. Symbolic ones need sympy and a function of scalars alone.

    Raises:
        TypeError: as `trace` and `Graph.gradients`; or an argument holds whole numbers.

    Source: lectures 000, 003 (four ways to differentiate).

    >>> with jax.enable_x64(True):
    ...     d = derivatives(lambda x: x**2, 3.0)
    >>> float(d.reverse[0]), float(d.forward[0]), round(float(d.numeric[0]), 6), d.formulas
    (6.0, 6.0, 6.0, ['2*x'])
    """
    graph = trace(f, *args)
    names = []
    for node in graph.inputs:
        if not jnp.issubdtype(node.value.dtype, jnp.floating):
            raise TypeError(
                f"`{node.name}` holds {node.value.dtype}, expected floating-point numbers. "
                "Pass floats, such as 2.0, or close over it: `lambda x: f(x, 3)`."
            )
        for index in np.ndindex(node.value.shape):
            names.append(f"{node.name}{list(index)}".removesuffix("[]"))
    point, unravel = ravel_pytree(args)
    reverse = np.asarray(ravel_pytree(graph.gradients())[0])
    units = jnp.eye(point.size, dtype=point.dtype)
    forward = [float(graph.jvp(*unravel(unit))) for unit in units]
    values = jax.jit(partial(jax.lax.map, lambda x: f(*unravel(x))))
    numeric = [_central(values, np.asarray(point), step) for step in STEPS]
    errors = np.abs(numeric - reverse).max(1)
    errors[np.isnan(errors)] = np.inf  # steps that are lost to rounding
    best = numeric[np.argmin(errors)]
    formulas, symbolic = _differentiate_symbols(graph)
    value = float(graph.value)
    return Derivatives(
        names, value, symbolic, formulas, best, np.array(forward), reverse, STEPS, errors
    )


def _central(f, point, step):
    """`(f(x + h) - f(x - h)) / 2h` by each number, h in units of |x|, or of 1 where x is 0."""
    h = np.diag(step * (np.abs(point) + (point == 0))).astype(point.dtype)
    rise = np.asarray(f(point + h) - f(point - h), float)
    run = np.diag((point + h) - (point - h))
    return rise / np.where(run == 0, np.nan, run)


def _differentiate_symbols(graph):
    """Formulas and values by sympy; None where it is missing or a node has no expression."""
    try:
        import sympy  # here, since it is large and nothing else needs it
    except ModuleNotFoundError:
        return None, None
    if not all(node.primitive in SYMBOLIC and node.value.ndim == 0 for node in graph.nodes):
        return None, None
    functions = vars(sympy) | {"max": sympy.Max, "min": sympy.Min}
    symbols = [sympy.Symbol(node.name, real=True) for node in graph.inputs]
    known: dict[Any, Any] = dict(zip(graph.inputs, symbols, strict=True))
    for node in graph.nodes[len(symbols) :]:
        for source in node.inputs:
            if source.primitive == "constant":
                decimal = str(np.asarray(source.value))  # the shortest, so that 0.1 is 1/10
                known[source] = sympy.Rational(decimal)
        terms = [known[source] for source in node.inputs]
        known[node] = evaluate(node.gate.formula, terms, functions=functions)
        if sympy.count_ops(known[node]) > LARGEST:
            return None, None
    formulas = [sympy.diff(known[graph.outputs[0]], symbol) for symbol in symbols]
    point = {known[node]: float(node.value) for node in graph.inputs}
    values = np.array([_evaluate_formula(formula, point) for formula in formulas])
    return list(map(str, formulas)), values


def _evaluate_formula(formula, point):
    """A formula at a point; NaN where sympy gives no number."""
    try:
        return float(formula.evalf(30, subs=point))
    except (TypeError, ZeroDivisionError):
        return np.nan
