"""What happens at every gate of a computational graph, forward and backward?

    python -m experiments computation-graph

The worked examples of the lectures, traced from plain Python functions: each is printed gate by
gate, and drawn with the value and the gradient on every edge. Lecture 000: f
= x1 x2 + sin x1 at (2, 5); 003: y = x1^2 (x2 x3 - 2 x1^2) at (1, 2, 3); 002: 1 + e^(w0 + w1 x), the
logistic 1 / (1 + e^-(w0 + w1 x)), the neuron 1 / (1 + e^-(w0 x0 + w1 x1 + w2)), and the gates
together in 2 (x y + max(z, w)): mul swaps the multipliers, add distributes, max routes. Expect
gradients that equal those of jax.grad to rounding. The last graph, an SVG of its own as all are, is
the loss of a small net. Takes about 5 seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from experiments._run import check_positive, figure, folder, print_table, save_metrics
from fnn.graph import Graph, trace
from fnn.graph.draw import arrange, paint


@dataclass(frozen=True)
class Config:
    """Which graphs."""

    sizes: tuple[int, ...] = (3, 4, 2)
    """Of the small net: inputs, hidden units, outputs."""
    batch: int = 5
    """Examples in its batch."""
    seed: int = 0
    """Of its parameters and examples."""
    out: Path | None = None
    """Run folder; runs/computation-graph if not given."""


TINY = Config(sizes=(2, 1), batch=1)


def product_plus_sine(x1, x2):
    """Lecture 000."""
    return x1 * x2 + jnp.sin(x1)


def polynomial(x1, x2, x3):
    """Lecture 003."""
    z1 = x1**2
    z2 = x2 * x3
    z3 = 2 * z1
    z4 = z2 - z3
    return z1 * z4


def exponential(x, w0, w1):
    """Lecture 002, as printed."""
    return 1 + jnp.exp(w0 + w1 * x)


def neuron(w0, w1, w2, x0, x1):
    """Lecture 002, the sigmoid circuit."""
    return 1 / (1 + jnp.exp(-(w0 * x0 + w1 * x1 + w2)))


def logistic(x, w0, w1):
    """Lecture 002, as it is meant."""
    return 1 / (1 + jnp.exp(-(w0 + w1 * x)))


def gates(x, y, z, w):
    """Lecture 002: mul, add and max."""
    return 2 * (x * y + jnp.maximum(z, w))


EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "x₁x₂ + sin x₁ (lecture 000)": (product_plus_sine, (2.0, 5.0)),
    "x₁²(x₂x₃ − 2x₁²) (lecture 003)": (polynomial, (1.0, 2.0, 3.0)),
    "1 + exp(w₀ + w₁x) (lecture 002)": (exponential, (0.5, 1.0, -2.0)),
    "2(xy + max(z, w)) (gates of lecture 002)": (gates, (3.0, -4.0, 2.0, -1.0)),
    "1 / (1 + exp(−(w₀ + w₁x))) (lecture 002)": (logistic, (0.5, 1.0, -2.0)),
    "1 / (1 + exp(−(w₀x₀ + w₁x₁ + w₂))) (a neuron, lecture 002)": (
        neuron,
        (2.0, -3.0, -3.0, -1.0, -2.0),
    ),
}


class Example(NamedTuple):
    """One graph, and how far its gradient is from that of jax.grad."""

    graph: Graph
    value: float
    gradient: list[Any]
    nodes: int
    difference: float


class Result(NamedTuple):
    """The examples by name."""

    examples: dict[str, Example]


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    if len(config.sizes) < 2:
        raise ValueError(
            f"`sizes` must be those of inputs and outputs at least, got {config.sizes}."
        )
    check_positive(config, "sizes", "batch", whole=True)
    fnn.key(config.seed)


def run(config: Config) -> Result:
    """Traces every example in float64, the net in float32."""
    check(config)
    found = {}
    with jax.enable_x64(True):
        for name, (f, point) in EXAMPLES.items():
            found[name] = _example(f, *map(jnp.asarray, point))
    net, loss = fnn.mlp(config.sizes, "tanh"), fnn.losses.l2_loss
    keys = jax.random.split(fnn.key(config.seed), 3)
    x = jax.random.normal(keys[1], (config.batch, config.sizes[0]))
    targets = jax.random.normal(keys[2], (config.batch, config.sizes[-1]))
    found["the loss of a net"] = _example(fnn.mean_loss(net, loss), net.init(keys[0]), x, targets)
    return Result(found)


def _example(f: Callable[..., Any], *args: Any) -> Example:
    graph = trace(f, *args)
    gradient = jax.tree.leaves(graph.gradients())
    truth = jax.tree.leaves(jax.grad(f, tuple(range(len(args))))(*args))
    difference = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(gradient, truth, strict=True)
    )
    return Example(graph, float(graph.value), gradient, len(graph.nodes), difference)


def main(config: Config) -> None:
    check(config)
    path = folder("computation-graph", config.out)
    result = run(config)
    for name, example in result.examples.items():
        print(f"{name}\n\n{example.graph}\n")
    rows = [
        (name, f"{e.value:.6g}", e.nodes, f"{e.difference:.1e}")
        for name, e in result.examples.items()
    ]
    print_table(
        "Computational graphs",
        ("function", "value", "nodes", "greatest difference to jax.grad"),
        rows,
    )
    draw(path, result)
    save_metrics(
        path,
        config,
        {
            name: example._asdict() | {"graph": str(example.graph)}
            for name, example in result.examples.items()
        },
    )
    print(f"pictures and metrics in {path}")


def sentence(examples: list[Example]) -> str:
    """What the picture of these examples shows."""
    worst = max(e.difference for e in examples)
    return (
        "Forward, every gate gives a value (blue); backward, it multiplies the gradient from above "
        "by its local derivative (orange): "
        + (f"within {worst:.0e} of jax.grad" if worst else "equal to jax.grad")
    )


def draw(path: Path, result: Result) -> None:
    """Each graph as an SVG of its own; those of the lectures together as a PNG."""
    for number, example in enumerate(result.examples.values()):
        example.graph.draw(path / f"graph-{number}.svg")
    examples = {name: result.examples[name] for name in EXAMPLES}
    panels = [(name, e.graph, arrange(e.graph)) for name, e in examples.items()]
    widths = [picture.size[0] for *_, picture in panels]
    full = max(widths)
    rows = in_rows(widths, full)
    heights = [max(panels[i][2].size[1] for i in row) + 0.25 for row in rows]
    width, height = full + 0.3, sum(heights) + 0.6
    with figure(
        path / "computation-graph.png", sentence(list(examples.values())), size=(width, height)
    ) as (fig, axes):
        axes.remove()
        fig.set_layout_engine("none")  # the panels have their places
        top = sum(heights)
        for row, tall in zip(rows, heights, strict=True):
            left = 0.15
            free = full - sum(widths[i] for i in row)
            for i in row:
                name, graph, picture = panels[i]
                place = (left / width, (top - tall) / height, widths[i] / width, tall / height)
                panel = fig.add_axes(place)
                panel.set(xlim=(0, widths[i]), ylim=(tall - 0.25, -0.25))  # an inch is an inch
                panel.axis("off")
                panel.text(0, -0.05, name, fontsize=12)
                paint(panel, graph, picture)
                left += widths[i] + free / max(len(row) - 1, 1)
            top -= tall


def in_rows(widths: list[float], full: float) -> list[list[int]]:
    """The numbers of panels, in order, as many in a row as fit.

    >>> in_rows([3, 2, 4, 5], 5)
    [[0, 1], [2], [3]]
    """
    rows: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if rows[-1] and sum(widths[j] for j in rows[-1]) + width > full + 1e-9:
            rows.append([])
        rows[-1].append(i)
    return rows
