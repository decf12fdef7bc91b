"""How much of the gradient arrives at the first layer of a deep net?

    python -m experiments vanishing-gradients

Measures dE/dz in every hidden layer of untrained nets of 64 units a layer, for every one of some
digits, over a grid of depths, activations and initialisers, in float64. dE/dz is the gradient of a
layer's biases; that of its weights is dE/dz times the inputs. One backward pass gives the norms of
all examples and layers (`fnn.factors` with a reducer).

A layer of sigmoids multiplies the gradient by sigma' <= 1/4 and by its weights. Orthogonal weights
keep lengths: what arrives k layers further down is then at most .25^k. That bound is checked for
every example and layer.

Expect, over the seeds 0 ... 4, a layer of sigmoids to pass on at most 0.243 to 0.245 of the
gradient, so that the first of 32 has 4e-20 of what the last one has (bound 2e-19), while tanh and
ReLU keep it where their initialiser suits them (ReLU: N(0, 2/fan_in), 0.5 to 1.6). With weights
from N(0, 1) it explodes: ReLU to 1e23 to 3e23, tanh to 3e9 to 5e9; sigmoids then lose least, 0.001
to 0.05, since large weights make up for the slope. Takes about 9 seconds.

Source: lecture 003 (vanishing gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, orthogonal

import fnn
from experiments._data import load
from experiments._run import check_positive, figure, folder, print_table, progress, save_metrics
from fnn import activations
from fnn.factors import Reducer

ACTIVATIONS = ("sigmoid", "tanh", "relu")
WIDTH = 64  # as the digits have pixels
DRAWS = {"normal": normal(1.0), "orthogonal": orthogonal()}
INITIALISERS = {  # what is drawn, and the factor
    "N(0, 1)": ("normal", 1.0),
    "N(0, 1/fan_in)": ("normal", WIDTH**-0.5),
    "N(0, 2/fan_in)": ("normal", (2 / WIDTH) ** 0.5),
    "orthogonal": ("orthogonal", 1.0),
}
DARKEST = 12  # the power of ten where the picture's colours end
# [layers, batch] under `repeat`
NORMS = Reducer("norms of each layer", lambda factor: jnp.sqrt(factor.squared_norm()))


@dataclass(frozen=True)
class Config:
    depths: tuple[int, ...] = (4, 8, 16, 32)
    """Numbers of hidden layers, rising, 2 at least; the last is drawn layer by layer."""
    examples: int = 200
    """Digits whose gradients are measured."""
    seed: int = 0
    """Of the parameters and the digits."""
    out: Path | None = None
    """Run folder; runs/vanishing-gradients if not given."""


TINY = Config(depths=(3,), examples=20)


class Cell(NamedTuple):
    """One net of the grid; layers are counted from the input."""

    activation: str
    initialiser: str
    norms: np.ndarray  # [depth]: of dE/dz in every hidden layer, the mean over examples
    ratio: float  # of the first one to the last one
    step: float  # the greatest ratio of a layer's to the next one's, of all layers and examples


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> list[Cell]:
    """Measures the whole grid. `advance(text)` is called after every depth of an activation."""
    check(config)
    data = load("digits", seed=config.seed)
    batch = data.x_train[: config.examples].astype(np.float64), data.t_train[: config.examples]
    cells = []
    with jax.enable_x64(True):
        params = draw_params(config)
        for activation in ACTIVATIONS:
            for depth in config.depths:
                net = fnn.serial(
                    fnn.repeat(
                        fnn.serial(fnn.dense(WIDTH, WIDTH), activations.get(activation)), depth
                    ),
                    fnn.dense(WIDTH, 10),
                )
                norms = jax.jit(
                    lambda params, x, t, net=net: (
                        fnn.source(net, data.loss)(params, x, t, reduce=NORMS)[1][0][0].b
                    )
                )
                for name, (hidden, last) in params.items():
                    first_layers = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], hidden)
                    cells.append(
                        cell(
                            activation, name, np.asarray(norms(((first_layers, ()), last), *batch))
                        )
                    )
                advance(f"{activation}, {depth} layers")
    return cells


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "examples", "depths", whole=True)
    if (
        not config.depths
        or config.depths[0] < 2
        or any(b <= a for a, b in zip(config.depths, config.depths[1:], strict=False))
    ):
        raise ValueError(f"`depths` must be rising whole numbers from 2 on, got {config.depths}.")
    fnn.key(config.seed)


def draw_params(config: Config) -> dict[str, tuple[Any, Any]]:
    """By initialiser: hidden layers, stacked, as many as the deepest net has, and a last layer to
    the 10 logits, N(0, 1/fan_in)."""
    hidden_key, last_key = jax.random.split(fnn.key(config.seed))
    last = jax.jit(fnn.dense(WIDTH, 10, kernel_init=normal(WIDTH**-0.5)).init)(last_key)
    nets = {
        name: fnn.repeat(fnn.dense(WIDTH, WIDTH, kernel_init=draw), config.depths[-1])
        for name, draw in DRAWS.items()
    }
    drawn = {name: jax.jit(net.init)(hidden_key) for name, net in nets.items()}
    return {
        name: (drawn[draw]._replace(w=factor * drawn[draw].w), last)
        for name, (draw, factor) in INITIALISERS.items()
    }


def cell(activation: str, initialiser: str, norms: np.ndarray) -> Cell:
    """Of the norms `[depth, examples]`.

    An example whose gradient vanished altogether (saturated, dead) has no ratio.
    """
    below, above = norms[:-1], norms[1:]
    steps = below[above > 0] / above[above > 0]
    means = norms.mean(1)
    return Cell(
        activation, initialiser, means, float(means[0] / means[-1]), float(steps.max(initial=0.0))
    )


def main(config: Config) -> None:
    """Prints the grid, saves `vanishing-gradients.png` and `metrics.json`."""
    check(config)
    path = folder("vanishing-gradients", config.out)
    with progress(len(ACTIVATIONS) * len(config.depths), "measuring") as advance:
        cells = run(config, advance)
    rows = [
        (", ".join(kind), *(f"{c.ratio:.0e}" for c in row), f"{max(c.step for c in row):.3f}")
        for kind, row in grid(cells).items()
    ]
    title = (
        "Norm of dE/dz in the first hidden layer relative to the last one; the most that a single "
        "layer passes on"
    )
    print_table(title, ("units, weights", *map(str, config.depths), "one layer"), rows)
    print(
        "bound for sigmoid units and orthogonal weights: a step of 0.25, "
        f"{0.25 ** (config.depths[-1] - 1):.1e} over all layers"
    )
    draw(path / "vanishing-gradients.png", cells, config)
    save_metrics(path, config, cells)
    print(f"picture and metrics in {path}")


def grid(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells by activation and initialiser, a cell a depth."""
    return {
        (a, i): [c for c in cells if (c.activation, c.initialiser) == (a, i)]
        for a in ACTIVATIONS
        for i in INITIALISERS
    }


def sentence(cells: list[Cell]) -> str:
    sigmoid, relu = grid(cells)["sigmoid", "orthogonal"], grid(cells)["relu", "N(0, 2/fan_in)"][-1]
    step, ratio, depth = max(c.step for c in sigmoid), sigmoid[-1].ratio, len(sigmoid[-1].norms)
    holds = "at most" if step <= 0.25 else "MORE than a quarter, up to"
    return (
        f"A layer of sigmoids with orthogonal weights passes on {holds} {step:.3f} of the "
        f"gradient: the first of {depth} has {ratio:.0e} of what the last one has; with ReLU and "
        f"N(0, 2/fan_in) {relu.ratio:.2g}"
    ).replace("N(0, 2", "N(0,\N{NO-BREAK SPACE}2")


def draw(path: Path, cells: list[Cell], config: Config) -> None:
    """Layer by layer with orthogonal weights, under the bound, and the net of the title with ReLU.

    And the whole grid.
    """
    rows, depth = grid(cells), config.depths[-1]
    with figure(path, sentence(cells), columns=2, size=(10, 5.0)) as (_, (left, right)):
        layers = np.arange(1, depth + 1)
        kinds = [
            *((activation, "orthogonal") for activation in ACTIVATIONS),
            ("relu", "N(0, 2/fan_in)"),
        ]
        for kind, marker in zip(kinds, "os^D", strict=True):
            norms = rows[kind][-1].norms
            left.semilogy(
                layers, norms / norms[-1], marker=marker, markersize=4, label=", ".join(kind)
            )
        left.semilogy(
            layers, 0.25 ** (depth - layers), "k:", label="$0.25^k$, bound for sigmoid, orthogonal"
        )
        left.set(
            xlabel="hidden layer, from the input",
            ylabel="|dE/dz| relative to the last hidden layer",
        )
        left.legend(fontsize=9, loc="lower right")
        # no -0.0
        powers = (
            np.log10([[max(c.ratio, 1e-300) for c in row] for row in rows.values()]).round(1) + 0.0
        )
        right.imshow(powers, cmap="PuOr", vmin=-DARKEST, vmax=DARKEST, aspect="auto")
        for (i, j), power in np.ndenumerate(powers):
            right.text(
                j,
                i,
                f"{power:+.1f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if abs(power) > 8 else "black",
            )
        labels = [f"{activation}, {initialiser}" for activation, initialiser in rows]
        right.set(
            xlabel="hidden layers", xticks=range(len(config.depths)), xticklabels=config.depths
        )
        right.set_yticks(range(len(labels)), labels, fontsize=9)
        cut = f"; colours end at ±{DARKEST}" if np.abs(powers).max() > DARKEST else ""
        right.set_title(
            f"powers of ten of |dE/dz|, first / last hidden layer{cut}", fontsize=10, loc="right"
        )
        right.grid(False)
