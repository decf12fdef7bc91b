"""How do the four ways to differentiate compare, and what does the step size do to a numeric
derivative?

    python -m experiments derivatives

Symbolic (sympy), numeric (central differences), forward-mode and reverse-mode automatic
differentiation of the lectures' functions, side by side in float64 (lectures 000, 003). Expect the
three exact ways to agree to rounding. The numeric column has the best of 13 step sizes, as judged
by the reverse sweep, a judge that is missing where a numeric derivative is needed; at whole numbers
it can be exact. Beside them its error falls with the square of the step (truncation) until rounding
takes over: float64 is best at a step of about 1e-6, float32 at about 1e-3. A central difference of
x^2 has no truncation error: there a long step is no worse than a short one.

Then the chain rule: along a path x_i = a_i t^i through the same point the total derivative, the sum
of D_i f dx_i/dt, is what one sweep forward along dx/dt gives, and the derivative by t of the
composed function (lectures 002, 003). Takes about 5 seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._run import COLOURS, figure, folder, print_table, save_metrics
from experiments.computation_graph import neuron, polynomial, product_plus_sine
from fnn import graph
from fnn.graph import Derivatives


@dataclass(frozen=True)
class Config:
    """Where to differentiate."""

    x: float = 3.0
    """Where x^2 is differentiated (lecture 000: 3, which gives 6), and in the picture at x + 0.1;
    from -1e6 to 1e6."""
    out: Path | None = None
    """Run folder; runs/derivatives if not given."""


TINY = Config(x=1.0)
SQUARE = "x²"


class Total(NamedTuple):
    """The derivative of f(x_1(t), x_2(t), ...) at t = 1, by three ways."""

    partial: np.ndarray  # [n]: D_i f
    inner: np.ndarray  # [n]: dx_i/dt
    chain: float  # the sum of their products
    forward: float  # one sweep forward through f along `inner`
    composed: float  # the sweep backward through t -> f(x(t))


class Result(NamedTuple):
    """The derivatives of every function by four ways where the lectures take them.

    And beside it, in float64 and in float32.
    """

    ways: dict[str, Derivatives]
    beside: dict[str, dict[str, Derivatives]]
    totals: dict[str, Total]


def check(config: Config) -> None:
    """Raises a ValueError that names the first flag that is invalid."""
    if not abs(config.x) <= 1e6:
        raise ValueError(f"`x` must be a number from -1e6 to 1e6, got {config.x}.")


def run(config: Config) -> Result:
    """Differentiates x^2 and the lectures' functions in float64.

    For the step size beside whole numbers, where nothing is exact.
    """
    check(config)
    functions = {
        SQUARE: (lambda x: x**2, (config.x,)),
        "x₁x₂ + sin x₁": (product_plus_sine, (2.0, 5.0)),
        "x₁²(x₂x₃ − 2x₁²)": (polynomial, (1.0, 2.0, 3.0)),
        "a sigmoid neuron": (neuron, (2.0, -3.0, -3.0, -1.0, -2.0)),
    }
    with jax.enable_x64(True):
        ways = {
            name: _derivatives(f, point, "float64", 0.0) for name, (f, point) in functions.items()
        }
        totals = {name: total(f, point) for name, (f, point) in functions.items() if name != SQUARE}
        beside = {
            dtype: {
                name: _derivatives(f, point, dtype, 0.1) for name, (f, point) in functions.items()
            }
            for dtype in ("float64", "float32")
        }
    return Result(ways, beside, totals)


def _derivatives(
    f: Callable[..., Any], point: tuple[float, ...], dtype: str, shift: float
) -> Derivatives:
    return graph.derivatives(
        f, *(jnp.asarray(a + shift * (i + 1), dtype) for i, a in enumerate(point))
    )


def total(f: Callable[..., Any], point: tuple[float, ...]) -> Total:
    """The total derivative along x_i = a_i t^i at t = 1, where x is the point a."""
    at = graph.trace(f, *point)
    partial, inner = np.array(at.gradients()), np.array([i * a for i, a in enumerate(point, 1)])
    composed = graph.trace(lambda t: f(*(a * t**i for i, a in enumerate(point, 1))), 1.0)
    return Total(
        partial,
        inner,
        float(partial @ inner),
        float(at.jvp(*inner)),
        float(composed.gradients()[0]),
    )


def apart(ways: dict[str, Derivatives]) -> float:
    """The greatest difference between the exact ways; symbolic ones are there where sympy is."""
    exact = [
        [d.forward, d.reverse, d.reverse if d.symbolic is None else d.symbolic]
        for d in ways.values()
    ]
    return max(float(np.abs(way - ways[1]).max()) for ways in exact for way in ways)


def main(config: Config) -> None:
    check(config)
    path = folder("derivatives", config.out)
    result = run(config)
    for name, d in result.ways.items():
        symbolic = d.symbolic if d.symbolic is not None else [float("nan")] * len(d.names)
        rows = [
            (
                n,
                f"{symbolic[i]:.9g}",
                f"{d.forward[i]:.9g}",
                f"{d.reverse[i]:.9g}",
                f"{d.numeric[i]:.9g}",
            )
            for i, n in enumerate(d.names)
        ]
        step = d.steps[int(np.argmin(d.errors))]
        print_table(
            f"{name} = {d.value:.9g}",
            ("by", "symbolic", "forward", "reverse", f"numeric, best step {step:.0e}"),
            rows,
        )
        for n, formula in zip(d.names, d.formulas or [], strict=False):
            print(f"∂/∂{n} = {formula}")
    print(f"greatest difference between symbolic, forward and reverse: {apart(result.ways):.1e}")
    for name, t in result.totals.items():
        rows = [
            (n, f"{p:.6g}", f"{i:g}", f"{p * i:.6g}")
            for n, p, i in zip(result.ways[name].names, t.partial, t.inner, strict=True)
        ]
        print_table(
            f"Total derivative of {name} along x_i = a_i t^i",
            ("by", "D f", "dx/dt", "product"),
            rows,
        )
        print(
            f"sum {t.chain:.9g}; one sweep forward along dx/dt {t.forward:.9g}; of the composed "
            f"function {t.composed:.9g}"
        )
    draw(path / "derivatives.png", result, config)
    save_metrics(path, config, result)
    print(f"picture and metrics in {path}")


def sentence(result: Result) -> str:
    """What the picture shows.

    The best step is the median of the functions that have both kinds of error.
    """
    best = {
        dtype: np.median(
            [d.steps[int(np.argmin(d.errors))] for name, d in ways.items() if name != SQUARE]
        )
        for dtype, ways in result.beside.items()
    }
    difference = apart(result.ways)
    return (
        f"A numeric derivative is best at steps of about {best['float64']:.0e} in float64 and "
        f"{best['float32']:.0e} in float32; the symbolic, forward and reverse ones take no step "
        f"and {f'agree within {difference:.0e}' if difference else 'are equal'}"
    )


def draw(path: Path, result: Result, config: Config) -> None:
    """Error of central differences against the step, in both precisions.

    Errors of 0 have no place on the axis.
    """
    with figure(path, sentence(result), size=(8.5, 5)) as (_, axis):
        for dtype, line in (("float64", "-"), ("float32", "--")):
            for (name, d), colour, marker in zip(
                result.beside[dtype].items(), (COLOURS[3], *COLOURS), "Dos^", strict=False
            ):
                some = np.isfinite(d.errors) & (d.errors > 0)
                label = f"{name} at {config.x + 0.1:g}" if name == SQUARE else name
                style: Any = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
                axis.loglog(
                    d.steps[some], d.errors[some], **style, label=label if line == "-" else None
                )
        axis.set(
            xlabel="step size, relative to the input",
            ylabel="greatest absolute error of central differences",
        )
        axis.invert_xaxis()
        for dtype, line in (("float64", "-"), ("float32", "--")):
            axis.plot([], [], color="gray", linestyle=line, label=dtype)
        axis.legend(fontsize=9.5, loc="lower right")
