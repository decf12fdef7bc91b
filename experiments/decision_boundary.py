"""What boundary can 3, 6 and 20 hidden units draw, and what does each unit compute?

    python -m experiments decision-boundary

Trains nets with one hidden layer on two spirals in the plane, for every width from several starts.
The picture shows the net of median accuracy: above, its probability of the purple class and the
boundary where that is 1/2; below, the output of every hidden unit over the plane, purple above 0
and orange below. A tanh unit is a ramp across one straight line. The last layer adds the ramps up,
so more units bend the boundary more often.

Expect about 74 % of the training set right with 3 units, 88 % with 6 and 99 % with 20, as means
over ten starts; with 6 units a start matters (± 7 points). On the easier moons, `--dataset moons`,
6 units do as well as 20 (97 %). Takes about 8 seconds.

Source: lecture 000, 3, 6 and 20 hidden neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from experiments._data import Dataset, load
from experiments._plane import Extent, draw_regions, draw_values, grid, train_starts
from experiments._run import (
    check_positive,
    figure,
    folder,
    mean_std,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate, activations


@dataclass(frozen=True)
class Config:
    dataset: str = "spirals"
    """spirals, moons or flower."""
    widths: tuple[int, ...] = (3, 6, 20)
    """Hidden units of each net, at most six widths."""
    activation: activations.Name = "tanh"
    """Any name out of fnn.activations.ACTIVATIONS."""
    learning_rate: float = 0.02
    """Adam's step size."""
    epochs: int = 200
    """Passes over the training set."""
    batch_size: int = 40
    """Examples per step."""
    starts: int = 10
    """Nets of each width, which differ in their first parameters and shuffles."""
    pixels: int = 150
    """Points of the plane's grid along each axis."""
    seed: int = 0
    """Of the data, the parameters and the shuffles."""
    out: Path | None = None
    """Run folder; runs/decision-boundary if not given."""


TINY = Config(widths=(2, 5), epochs=2, batch_size=200, starts=3, pixels=20)


class Nets(NamedTuple):
    """The nets of one width; the maps are those of the net of median training accuracy."""

    units: int
    train_accuracy: np.ndarray  # [starts], in 0 ... 1
    test_accuracy: np.ndarray  # [starts]
    shown: int  # the start of median training accuracy
    probability: np.ndarray  # [pixels, pixels], of class 1; rows from the bottom up
    unit_maps: np.ndarray  # [units, pixels, pixels]: the output of every hidden unit


def run(
    config: Config, advance: Callable[[str], Any] = lambda text: None
) -> tuple[Dataset, tuple[Nets, ...]]:
    """Trains the nets of every width. `advance(text)` is called after every width."""
    check(config)
    data, found = load(config.dataset, seed=config.seed), []
    for width in config.widths:
        found.append(train(config, data, width))
        advance(f"{width} units, {100 * found[-1].train_accuracy.mean():.1f} %")
    return data, tuple(found)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    _validate.one_of("dataset", config.dataset, ("spirals", "moons", "flower"))
    check_positive(config, "epochs", "batch_size", "starts", "pixels", "widths", whole=True)
    if not 1 <= len(config.widths) <= 6:
        raise ValueError(f"`widths` must be one to six whole numbers above 0, got {config.widths}.")
    if config.pixels < 2:
        raise ValueError(
            f"`pixels` must be at least 2, since boundaries are drawn, got {config.pixels}."
        )
    check_positive(config, "learning_rate")
    activations.get(config.activation)
    fnn.key(config.seed)


def train(config: Config, data: Dataset, width: int) -> Nets:
    """Trains the nets of one width at once and maps that of median accuracy."""
    net = fnn.mlp((2, width, 2), config.activation)
    rule, optimizer = fnn.rules.backprop(net, data.loss), optax.adam(config.learning_rate)
    settings = {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "starts": config.starts,
        "seed": config.seed,
    }
    nets = train_starts(
        rule, optimizer, net, (data.x_train, data.t_train), (data.x_test, data.t_test), **settings
    )
    plane = jnp.asarray(grid(edges(data), config.pixels))
    probability = jax.nn.softmax(net.apply(nets.params, plane))[..., 1]
    unit_maps = jnp.moveaxis(net.layers[0].apply(nets.params[0], plane), -1, 0)
    return Nets(
        width,
        nets.train_accuracy,
        nets.test_accuracy,
        nets.shown,
        np.asarray(probability),
        np.asarray(unit_maps),
    )


def edges(data: Dataset) -> Extent:
    """Left, right, bottom and top of the square around the training points, with a margin."""
    low, high = data.x_train.min(0), data.x_train.max(0)
    (x, y), half = (low + high) / 2, 0.55 * float((high - low).max())
    return float(x - half), float(x + half), float(y - half), float(y + half)


def main(config: Config) -> None:
    check(config)
    path = folder("decision-boundary", config.out)
    with progress(len(config.widths), config.dataset) as advance:
        data, found = run(config, advance)
    rows = [
        (
            n.units,
            mean_std(list(100 * n.train_accuracy), 1),
            mean_std(list(100 * n.test_accuracy), 1),
        )
        for n in found
    ]
    print_table(
        f"{config.dataset}, {config.starts} starts",
        ("hidden units", "train accuracy (%)", "test accuracy (%)"),
        rows,
    )
    draw(path / "decision-boundary.png", data, found, config)
    fields = ("units", "train_accuracy", "test_accuracy", "shown")
    save_metrics(path, config, [{name: getattr(nets, name) for name in fields} for nets in found])
    print(f"picture and metrics in {path}")


def draw(path: Path, data: Dataset, found: tuple[Nets, ...], config: Config) -> None:
    """For every width the boundary, and below it the output of every hidden unit."""
    numbers = [
        ", ".join(figures[:-1]) + f" and {figures[-1]}" if figures[1:] else figures[0]
        for figures in _figures(found)
    ]
    starts = f"mean of {config.starts} starts; median drawn" if config.starts > 1 else "one start"
    title = f"{numbers[0]} hidden units get {numbers[1]} % of the training set right ({starts})"
    with figure(path, title, size=(3.4 * len(found), 6.6)) as (fig, axes):
        axes.remove()
        sides: Any = fig.subfigures(2, len(found), height_ratios=(1.2, 1), squeeze=False)
        for column, nets in enumerate(found):
            axis = sides[0, column].subplots()
            draw_regions(axis, nets.probability, edges(data), data.x_train, data.t_train)
            axis.set_title(
                f"{nets.units} hidden unit{'s' * (nets.units > 1)}: "
                f"{100 * nets.train_accuracy[nets.shown]:.1f} % right"
            )
            columns = min(nets.units, max(3, math.ceil(math.sqrt(nets.units))))
            sides[1, column].suptitle("output of each hidden unit", fontsize=11)
            grids = (
                sides[1, column]
                .subplots(math.ceil(nets.units / columns), columns, squeeze=False)
                .ravel()
            )
            for cell in grids:
                cell.set_axis_off()
                cell.set_anchor("N")
            for cell, unit_map in zip(grids, nets.unit_maps, strict=False):
                limit = float(np.abs(unit_map).max()) or 1.0
                draw_values(cell, unit_map, edges(data), -limit, limit)


def _figures(found: tuple[Nets, ...]) -> tuple[list[str], list[str]]:
    return [str(n.units) for n in found], [f"{100 * n.train_accuracy.mean():.1f}" for n in found]
