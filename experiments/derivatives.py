"""How do the four ways to differentiate compare, and what does the step size do to a numeric derivative?

    python -m experiments derivatives

Symbolic (sympy), numeric (central differences), forward-mode and reverse-mode automatic differentiation of the lectures' functions, side by
side in float64 (lectures 000, 003). Expect the three exact ways to agree to rounding. The numeric one is never exact: its error falls with
the square of the step (truncation) until rounding takes over; float64 is best at a step of about 1e-6, float32 at about 1e-3.
A central difference of x^2 has no
truncation error at all. Takes about 5 seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._run import figure, folder, print_table, save_metrics
from experiments.computation_graph import neuron, polynomial, product_plus_sine
from fnn import _check, graph
from fnn.graph import Derivatives


@dataclass(frozen=True)
class Config:
    """Where to differentiate."""

    x: float = 3.0
    """Where x^2 is differentiated (lecture 000: 3, which gives 6)."""
    out: Path | None = None
    """Run folder; runs/derivatives if not given."""


TINY = Config(x=1.0)


class Result(NamedTuple):
    """The derivatives of every function by four ways where the lectures take them; and beside it, in float64 and in float32."""

    ways: dict[str, Derivatives]
    beside: dict[str, dict[str, Derivatives]]


def run(config: Config) -> Result:
    """Differentiates x^2 and the lectures' functions in float64; for the step size beside whole numbers, where nothing is exact."""
    _check.finite("x", np.asarray(config.x))
    functions = {
        "x^2": (lambda x: x**2, (config.x,)),
        "x1 x2 + sin x1": (product_plus_sine, (2.0, 5.0)),
        "x1^2 (x2 x3 - 2 x1^2)": (polynomial, (1.0, 2.0, 3.0)),
        "sigmoid neuron": (neuron, (2.0, -3.0, -3.0, -1.0, -2.0)),
    }
    with jax.enable_x64(True):
        ways = {name: _derivatives(f, point, "float64", 0.0) for name, (f, point) in functions.items()}
        beside = {
            dtype: {name: _derivatives(f, point, dtype, 0.1) for name, (f, point) in functions.items() if name != "x^2"}
            for dtype in ("float64", "float32")
        }
    return Result(ways, beside)


def _derivatives(f: Callable[..., Any], point: tuple[float, ...], dtype: str, shift: float) -> Derivatives:
    return graph.derivatives(f, *(jnp.asarray(a + shift * (i + 1), dtype) for i, a in enumerate(point)))


def main(config: Config) -> None:
    result = run(config)
    for name, d in result.ways.items():
        symbolic = d.symbolic if d.symbolic is not None else [float("nan")] * len(d.names)
        rows = [
            (n, f"{symbolic[i]:.9g}", f"{d.numeric[i]:.9g}", f"{d.forward[i]:.9g}", f"{d.reverse[i]:.9g}") for i, n in enumerate(d.names)
        ]
        print_table(f"{name} = {d.value:.9g}", ("by", "symbolic", "numeric", "forward", "reverse"), rows)
        for n, formula in zip(d.names, d.formulas or [], strict=False):
            print(f"∂/∂{n} = {formula}")
    path = folder("derivatives", config.out)
    draw(path / "derivatives.png", result)
    save_metrics(path, config, result)
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result) -> None:
    """Error of central differences against the step, in both precisions."""
    best = {dtype: np.median([d.steps[int(np.argmin(d.errors))] for d in ways.values()]) for dtype, ways in result.beside.items()}
    apart = max(float(np.abs(d.forward - d.reverse).max()) for d in result.ways.values())
    title = (
        f"A numeric derivative is best at steps of about {best['float64']:.0e} in float64 and {best['float32']:.0e} in float32; "
        f"forward and reverse mode take no step and {f'differ by {apart:.0e}' if apart else 'are equal'}"
    )
    with figure(path, title, columns=2, size=(9.5, 4.2)) as (_, axes):
        for panel, (dtype, ways) in zip(axes, result.beside.items(), strict=True):
            for (name, d), marker in zip(ways.items(), "os^", strict=True):
                some = np.isfinite(d.errors)
                panel.loglog(d.steps[some], d.errors[some], marker=marker, markersize=4, label=name)
            panel.set(xlabel="relative step size", ylabel="error of the central difference", title=dtype, ylim=(1e-12, 10))
            panel.invert_xaxis()
        axes[0].legend(fontsize=9)
