"""Four ways to differentiate, side by side: symbolic, numeric, forward-mode and reverse-mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.graph import text as board
from fnn.graph.gates import is_differentiable
from fnn.graph.sweep import Graph, trace
from fnn.types import Array

_SAME = (
    "convert_element_type",
    "copy",
    "reshape",
    "squeeze",
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "broadcast_in_dim",
    "transpose",
)
_NO_FORMULA = (
    "select_n",
    "stop_gradient",
    "dot_general",
    "concatenate",
    "slice",
    "rev",
    "sign",
    "floor",
    "ceil",
    "round",
)
LARGEST = 2000  # terms of a formula: sympy takes seconds for more
STEPS = tuple(10.0**-k for k in range(1, 14))


@dataclass(frozen=True)
class Derivatives:
    """The derivative of a function by each of its numbers, by four ways; `print` it.

    Attributes:
        names: `[n]` of the numbers that the arguments hold.
        value: of the function.
        symbolic: `[n]` by sympy, or None where the function is not one of scalars, or sympy is not
            installed.
        formulas: `[n]` sympy's expressions, or None.
        numeric: `[n]` central differences at the best of the step sizes.
        forward: `[n]` by one sweep forward for each number.
        reverse: `[n]` by one sweep backward for all.
        steps: `[s]` relative step sizes.
        errors: `[s]` greatest difference between central differences at that step and the sweep
            backward.
    """

    names: list[str]
    value: float
    symbolic: np.ndarray | None
    formulas: list[str] | None
    numeric: np.ndarray
    forward: np.ndarray
    reverse: np.ndarray
    steps: np.ndarray
    errors: np.ndarray

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "symbolic", "numeric", "forward", "reverse")]
        for i, name in enumerate(self.names):
            symbolic = "-" if self.symbolic is None else f"{self.symbolic[i]:.9g}"
            rows.append(
                (
                    name,
                    symbolic,
                    *(f"{way[i]:.9g}" for way in (self.numeric, self.forward, self.reverse)),
                )
            )
        widths = [max(len(row[c]) for row in rows) for c in range(5)]
        lines = [
            f"{row[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        best = int(np.argmin(self.errors))
        lines.append(
            f"numeric: central differences, best at a step of {self.steps[best]:.0e} (error {self.errors[best]:.1e})"
        )
        lines += [
            f"∂{name} = {formula}"
            for name, formula in zip(self.names, self.formulas or (), strict=False)
        ]
        return "\n".join(lines)


def derivatives(f: Callable[..., Any], *args: Any) -> Derivatives:
    """The derivatives of `f` at a point by four ways.

    Args:
        f: a function of numbers or arrays that returns one number.
        *args: the point.

    Returns:
        A `Derivatives`. Symbolic ones need sympy and a function of scalars alone.

    Raises:
        TypeError, ValueError: as `trace` and `Graph.gradients`.

    Source: lectures 000, 003 (four ways to differentiate).

    >>> with jax.enable_x64(True):
    ...     d = derivatives(lambda x: x**2, 3.0)
    >>> float(d.reverse[0]), float(d.forward[0]), round(float(d.numeric[0]), 6), d.formulas
    (6.0, 6.0, 6.0, ['2*x'])
    """
    graph = trace(f, *args)
    point, tree = jax.tree.flatten(args)
    point = [jnp.asarray(leaf) for leaf in point]
    if not _entries(point):
        raise TypeError(
            "`args` hold no floating-point number to differentiate by. Pass floats, such as 2.0."
        )
    once = jax.jit(f)
    reverse = _flat(graph.gradients())
    forward, numeric = [], []
    steps = np.array(STEPS)
    for i, j in _entries(point):
        unit = [jnp.zeros_like(leaf) for leaf in point]
        unit[i] = unit[i].at[j].set(1)
        forward.append(float(graph.jvp(*jax.tree.unflatten(tree, unit))))
        numeric.append([_central(once, point, tree, i, j, h) for h in steps])
    differences = np.array(numeric)  # [n, steps]
    # a step that is lost to rounding
    errors = np.nan_to_num(np.abs(differences - reverse[:, None]).max(0), nan=np.inf)
    formulas, symbolic = _symbolic(graph)
    names = [
        graph.nodes[graph.inputs[i]].name + (f"[{', '.join(map(str, j))}]" if j else "")
        for i, j in _entries(point)
    ]
    best = differences[:, int(np.argmin(errors))]
    return Derivatives(
        names,
        float(graph.value),
        symbolic,
        formulas,
        best,
        np.array(forward),
        reverse,
        steps,
        errors,
    )


def _entries(point: list[Array]) -> list[tuple[int, tuple[int, ...]]]:
    """Every number of the floating-point leaves: the leaf, and the place in it."""
    return [
        (i, j)
        for i, leaf in enumerate(point)
        if is_differentiable(leaf)
        for j in np.ndindex(leaf.shape)
    ]


def _flat(gradients: Any) -> np.ndarray:
    leaves = [np.asarray(g) for g in jax.tree.leaves(gradients)]
    return np.concatenate(
        [g.astype(np.float64).ravel() for g in leaves if g.dtype != jax.dtypes.float0]
    )


def _central(
    f: Callable[..., Any], point: list[Array], tree: Any, i: int, j: tuple[int, ...], h: float
) -> float:
    """`(f(x + h) - f(x - h)) / 2h`, with h in units of |x|, or of 1 where x is 0."""
    x = point[i][j]
    size = float(jnp.abs(x)) or 1.0
    ends = [point[i].at[j].set(x + jnp.asarray(s * h * size, x.dtype)) for s in (1, -1)]
    up, down = (f(*jax.tree.unflatten(tree, [*point[:i], end, *point[i + 1 :]])) for end in ends)
    apart = float(ends[0][j]) - float(ends[1][j])
    return (float(up) - float(down)) / apart if apart else float("nan")


def _symbolic(graph: Graph) -> tuple[list[str] | None, np.ndarray | None]:
    """Formulas and values by sympy: the gates' texts with symbols put in.

    None where the function is not one of scalars, or is large.
    """
    try:
        import sympy  # here, since it is large, and not needed elsewhere
    except ModuleNotFoundError:
        return None, None
    found: list[Any] = []
    # of the written-out formulas, in which a value that is used twice stands twice
    sizes: list[int] = []
    for i, node in enumerate(graph.nodes):
        sizes.append(1 + sum(sizes[j] for j in node.inputs) if node.depends else 1)
        found.append(_expression(sympy, node, [found[j] for j in node.inputs]))
        if (
            found[-1] is None and (node.primitive != "input" or is_differentiable(node.value))
        ) or sizes[i] > LARGEST:
            return None, None
    by = [i for i in graph.inputs if is_differentiable(graph.nodes[i].value)]
    at: Any = {found[i]: float(graph.nodes[i].value) for i in graph.inputs if found[i] is not None}
    formulas = [sympy.diff(found[graph.outputs[0]], found[i]) for i in by]
    return [str(d) for d in formulas], np.array([_number(d, at) for d in formulas])


def _expression(sympy: Any, node: Any, inputs: list[Any]) -> Any:
    """A node in sympy's terms, from those of its inputs; None where it has none."""
    if (
        isinstance(node.value, tuple)
        or jnp.issubdtype(node.value.dtype, jax.dtypes.extended)
        or node.value.ndim
    ):
        return None
    if node.primitive == "input":
        return sympy.Symbol(node.name, real=True)
    if not node.depends:
        return _rational(sympy, node.value)
    # whole numbers are no real function's
    if any(x is None for x in inputs) or not is_differentiable(node.value):
        return None
    if node.primitive in _SAME:
        return inputs[0]
    if node.gate is None or node.primitive in _NO_FORMULA:
        return None
    places = [f"a{k}" for k in range(len(inputs))]
    known: Any = dict(zip(places, inputs, strict=True))
    return sympy.parse_expr(
        node.gate.text.format(*places, **board.numbers(node.params)), local_dict=known
    )


def _rational(sympy: Any, value: Array) -> Any:
    """A number as the shortest fraction that is it in its dtype; None where it is not finite."""
    number = value.item()
    if not np.isfinite(number):
        return None
    short = sympy.nsimplify(number, rational=True)
    return (
        short if bool(jnp.asarray(float(short), value.dtype) == value) else sympy.Rational(number)
    )


def _number(formula: Any, at: Any) -> float:
    """A formula at a point; NaN where sympy gives no number."""
    try:
        return float(formula.evalf(30, subs=at))
    except (TypeError, ZeroDivisionError):
        return float("nan")
