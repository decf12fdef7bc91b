"""What happens at every gate of a computational graph, forward and backward?

    python -m experiments computation-graph

The worked examples of the lectures, traced from plain Python functions: each prints as it stands on the board, gate by gate, and is drawn
with the value and the gradient on every edge. Lecture 000: f = x1 x2 + sin x1 at (2, 5); 003: y = x1^2 (x2 x3 - 2 x1^2) at (1, 2, 3);
002: 1 + e^(w0 + w1 x) and the neuron 1 / (1 + e^-(w0 x0 + w1 x1 + w2)). Expect gradients that equal those of jax.grad to rounding.
The last graph is the loss of a small net. Takes about 5 seconds.
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
from experiments._run import figure, folder, print_table, save_metrics
from fnn import _check
from fnn.graph import Graph, trace
from fnn.graph.drawing import arranged, paint


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


EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "x1 x2 + sin x1 (lecture 000)": (product_plus_sine, (2.0, 5.0)),
    "x1^2 (x2 x3 - 2 x1^2) (lecture 003)": (polynomial, (1.0, 2.0, 3.0)),
    "1 + e^(w0 + w1 x) (lecture 002)": (exponential, (0.5, 1.0, -2.0)),
    "a sigmoid neuron (lecture 002)": (neuron, (2.0, -3.0, -3.0, -1.0, -2.0)),
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


def run(config: Config) -> Result:
    """Traces every example in float64, the net in float32."""
    found = {}
    with jax.enable_x64(True):
        for name, (f, point) in EXAMPLES.items():
            found[name] = _example(f, *map(jnp.asarray, point))
    net, loss = fnn.mlp(config.sizes, "tanh"), fnn.losses.l2_loss
    _check.positive("batch", config.batch, whole=True)
    keys = jax.random.split(fnn.key(config.seed), 3)
    x = jax.random.normal(keys[1], (config.batch, config.sizes[0]))
    targets = jax.random.normal(keys[2], (config.batch, config.sizes[-1]))
    found["the loss of a net"] = _example(fnn.mean_loss(net, loss), net.init(keys[0]), x, targets)
    return Result(found)


def _example(f: Callable[..., Any], *args: Any) -> Example:
    graph = trace(f, *args)
    gradient = jax.tree.leaves(graph.gradients())
    truth = jax.tree.leaves(jax.grad(f, tuple(range(len(args))))(*args))
    difference = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(gradient, truth, strict=True))
    return Example(graph, float(graph.value), gradient, len(graph.nodes), difference)


def main(config: Config) -> None:
    result = run(config)
    for name, example in result.examples.items():
        print(f"{name}\n\n{example.graph}\n")
    rows = [(name, f"{e.value:.6g}", e.nodes, f"{e.difference:.1e}") for name, e in result.examples.items()]
    print_table("Computational graphs", ("function", "value", "nodes", "greatest difference to jax.grad"), rows)
    path = folder("computation-graph", config.out)
    draw(path, result)
    save_metrics(path, config, {name: example._asdict() | {"graph": str(example.graph)} for name, example in result.examples.items()})
    print(f"pictures and metrics in {path}")


def draw(path: Path, result: Result) -> None:
    """Each graph as an SVG of its own; those of lectures 000, 003 and 002 together as a PNG."""
    for number, example in enumerate(result.examples.values()):
        example.graph.draw(path / f"graph-{number}.svg")
    worst = max(e.difference for e in result.examples.values())
    title = (
        f"Forward, every gate gives a value (blue); backward, it multiplies the gradient from above by its local derivative (orange): "
        f"within {worst:.0e} of jax.grad"
    )
    boards = [(name, example.graph, arranged(example.graph)) for name, example in list(result.examples.items())[:4]]
    width, heights = max(b.size[0] for *_, b in boards), [b.size[1] + 0.3 for *_, b in boards]
    with figure(path / "computation-graph.png", title, size=(width, sum(heights) + 0.8)) as (fig, axes):
        axes.remove()
        grid = fig.add_gridspec(len(boards), 1, height_ratios=heights)
        for row, (name, graph, board) in enumerate(boards):
            panel = fig.add_subplot(grid[row])
            panel.set(xlim=(0, width), ylim=(board.size[1], -0.3))
            panel.axis("off")
            panel.text(0, -0.1, name, fontsize=11)
            paint(panel, graph, board)
