"""Four ways to differentiate, side by side: symbolic, numeric, forward-mode and reverse-mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree, Shaped

from fnn.graph.gates import FORMULAS, Gate
from fnn.graph.sweep import Graph, Node
from fnn.graph.trace import trace
from fnn.types import Array

LARGEST = 2000  # operations in a formula: sympy takes seconds for more
SYMBOLIC = (*FORMULAS, "integer_pow", "pow", "abs", "max", "min")
WAYS = ("symbolic", "numeric", "forward", "reverse")
STEPS = np.array([10.0**-k for k in range(1, 14)])


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
    symbolic: Float[np.ndarray, " n"] | None
    formulas: list[str] | None
    numeric: Float[np.ndarray, " n"]
    forward: Float[np.ndarray, " n"]
    reverse: Float[np.ndarray, " n"]
    steps: Float[np.ndarray, " s"]
    errors: Float[np.ndarray, " s"]

    def __str__(self) -> str:
        """A table of the four ways."""
        ways = [way for way in WAYS if getattr(self, way) is not None]
        width = max(map(len, self.names))
        titles = [f"{way:>16}" for way in ways]
        lines = [" " * width + "".join(titles)]
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
    reverse, _ = ravel_pytree(graph.gradients())
    reverse = np.asarray(reverse)
    units = jnp.eye(point.size, dtype=point.dtype)
    forward = [float(graph.jvp(*unravel(unit))) for unit in units]
    jitted = jax.jit(lambda x: f(*unravel(x)))
    numeric = [_central(jitted, point, step) for step in STEPS.tolist()]
    differences = np.abs(numeric - reverse)
    errors = differences.max(1)
    errors[np.isnan(errors)] = np.inf  # steps that are lost to rounding
    formulas, symbolic = _differentiate_symbols(graph)
    return Derivatives(
        names,
        float(graph.value),
        symbolic,
        formulas,
        np.array(numeric[np.argmin(errors)]),
        np.array(forward),
        reverse,
        STEPS,
        errors,
    )


def _central(
    f: Callable[..., Array],
    point: Array,
    step: float,
) -> list[float]:
    """`(f(x + h) - f(x - h)) / 2h` by each number, h in units of |x|, or of 1 where x is 0."""
    found = []
    for i, x in enumerate(point):
        h = step * (abs(float(x)) or 1.0)
        up = point.at[i].add(h)
        down = point.at[i].add(-h)
        rise = float(f(up) - f(down))
        run = float(up[i] - down[i])
        found.append(rise / run if run else np.nan)
    return found


def _differentiate_symbols(graph: Graph) -> tuple[Any, Any]:
    """Formulas and values by sympy; None where it is missing or a node has no expression."""
    try:
        import sympy  # here, since it is large and nothing else needs it
    except ModuleNotFoundError:
        return None, None
    expressions: dict[Node, Any] = {}
    for node in graph.nodes:
        if node in graph.inputs:
            expression = sympy.Symbol(node.name, real=True)
        elif node.gate is not None and node.primitive in SYMBOLIC:
            expression = _write_expression(node.gate, node.inputs, expressions)
        else:
            return None, None
        if node.value.ndim > 0 or sympy.count_ops(expression) > LARGEST:
            return None, None
        expressions[node] = expression
    result = expressions[graph.outputs[0]]
    formulas = [sympy.diff(result, expressions[node]) for node in graph.inputs]
    point = {expressions[node]: float(node.value) for node in graph.inputs}
    values = [_evaluate_formula(formula, point) for formula in formulas]
    return [str(formula) for formula in formulas], np.array(values)


def _write_expression(
    gate: Gate,
    inputs: Sequence[Node],
    expressions: dict[Node, Any],
) -> Any:
    """A gate in sympy's terms, from those of its inputs."""
    import sympy

    known: dict[str, Any] = {
        "max": sympy.Max,
        "min": sympy.Min,
        "abs": sympy.Abs,
    }
    for name, source in zip("ab", inputs, strict=False):
        if source.primitive == "constant":
            decimal = str(np.asarray(source.value))  # the shortest, so that 0.1 is 1/10
            known[name] = sympy.Rational(decimal)
        else:
            known[name] = expressions[source]
    return sympy.parse_expr(gate.formula.format("a", "b"), local_dict=known)


def _evaluate_formula(formula: Any, point: Any) -> float:
    """A formula at a point; NaN where sympy gives no number."""
    try:
        return float(formula.evalf(30, subs=point))
    except (TypeError, ZeroDivisionError):
        return np.nan
