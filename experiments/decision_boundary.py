"""What boundary can 3, 6 and 20 hidden units draw, and what does each unit compute?

    python -m experiments decision-boundary

Trains nets with one hidden layer on two spirals in the plane, for every width from several starts. The picture shows the net of median
accuracy: above, its probability of the purple class and the boundary where that is 1/2; below, the output of every hidden unit over the
plane, purple above 0 and orange below. A tanh unit is a ramp across one straight line. The last layer adds the ramps up, so more units
bend the boundary more often.

Expect about 74 % of the training set right with 3 units, 88 % with 6 and 99 % with 20, as means over ten starts; with 6 units a start
matters (± 7 points). On the easier moons, `--dataset moons`, 6 units do as well as 20 (97 %). Takes about 8 seconds.

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
from experiments._run import figure, folder, mean_std, print_table, progress, save_metrics
from fnn import _check, activations

CLASSES = ("#B35806", "#542788")  # the two ends of the colour map PuOr


@dataclass(frozen=True)
class Config:
    dataset: str = "spirals"
    """spirals, moons or flower."""
    widths: tuple[int, ...] = (3, 6, 20)
    """Hidden units of each net, at most six widths."""
    activation: str = "tanh"
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


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> tuple[Dataset, tuple[Nets, ...]]:
    """Trains the nets of every width. `advance(text)` is called after every width."""
    _check.one_of("dataset", config.dataset, ("spirals", "moons", "flower"))
    for name in ("epochs", "batch_size", "starts", "pixels"):
        _check.positive(name, getattr(config, name), whole=True)
    for i, width in enumerate(config.widths):
        _check.positive(f"widths[{i}]", width, whole=True)
    if not 1 <= len(config.widths) <= 6:
        raise ValueError(f"`widths` must be one to six whole numbers above 0, got {config.widths}.")
    _check.positive("learning_rate", config.learning_rate)
    activations.get(config.activation)
    data, found = load(config.dataset, seed=config.seed), []
    for width in config.widths:
        found.append(train(config, data, width))
        advance(f"{width} units, {100 * found[-1].train_accuracy.mean():.1f} %")
    return data, tuple(found)


def train(config: Config, data: Dataset, width: int) -> Nets:
    """Trains the nets of one width at once and maps that of median accuracy."""
    net = fnn.mlp((2, width, 2), config.activation)
    keys = jax.random.split(fnn.key(config.seed), config.starts)
    settings = {"epochs": config.epochs, "batch_size": config.batch_size, "keys": keys}
    rule, optimizer = fnn.rules.backprop(net, data.loss), optax.adam(config.learning_rate)
    params, _ = fnn.fit_many(rule, optimizer, net.init, (data.x_train, data.t_train), **settings)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(config.starts)]
    on_train, on_test = (
        np.array([fnn.evaluate(rule, p, part)["accuracy"] for p in each])
        for part in ((data.x_train, data.t_train), (data.x_test, data.t_test))
    )
    shown = int(np.argsort(on_train)[config.starts // 2])
    plane = jnp.asarray(grid(data, config.pixels))
    probability = jax.nn.softmax(net.apply(each[shown], plane))[..., 1]
    unit_maps = jnp.moveaxis(net.layers[0].apply(each[shown][0], plane), -1, 0)
    return Nets(width, on_train, on_test, shown, np.asarray(probability), np.asarray(unit_maps))


def grid(data: Dataset, pixels: int) -> np.ndarray:
    """The points of the square that `edges` bound, `[pixels, pixels, 2]`."""
    left, right, bottom, top = edges(data)
    return np.stack(np.meshgrid(np.linspace(left, right, pixels), np.linspace(bottom, top, pixels)), axis=-1).astype(np.float32)


def edges(data: Dataset) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the square around the training points, with a margin."""
    low, high = data.x_train.min(0), data.x_train.max(0)
    (x, y), half = (low + high) / 2, 0.55 * float((high - low).max())
    return float(x - half), float(x + half), float(y - half), float(y + half)


def main(config: Config) -> None:
    with progress(len(config.widths), config.dataset) as advance:
        data, found = run(config, advance)
    rows = [(n.units, mean_std(list(100 * n.train_accuracy), 1), mean_std(list(100 * n.test_accuracy), 1)) for n in found]
    print_table(f"{config.dataset}, {config.starts} starts", ("hidden units", "train accuracy (%)", "test accuracy (%)"), rows)
    path = folder("decision-boundary", config.out)
    draw(path / "decision-boundary.png", data, found, config)
    fields = ("units", "train_accuracy", "test_accuracy", "shown")
    save_metrics(path, config, [{name: getattr(nets, name) for name in fields} for nets in found])
    print(f"picture and metrics in {path}")


def draw(path: Path, data: Dataset, found: tuple[Nets, ...], config: Config) -> None:
    """For every width the boundary, and below it the output of every hidden unit."""
    numbers = [", ".join(figures[:-1]) + f" and {figures[-1]}" if figures[1:] else figures[0] for figures in _figures(found)]
    starts = f"mean of {config.starts} starts; median drawn" if config.starts > 1 else "one start"
    title = f"{numbers[0]} hidden units get {numbers[1]} % of the training set right ({starts})"
    with figure(path, title, size=(3.4 * len(found), 6.6)) as (fig, axes):
        axes.remove()
        sides: Any = fig.subfigures(2, len(found), height_ratios=(1.2, 1), squeeze=False)
        for column, nets in enumerate(found):
            axis = sides[0, column].subplots()
            _plane(axis, nets.probability, data, 0.0, 1.0)
            axis.contour(nets.probability, levels=[0.5], colors="black", extent=edges(data), linewidths=1.5)
            for label, colour in enumerate(CLASSES):
                axis.scatter(*data.x_train[data.t_train == label].T, s=9, color=colour, edgecolors="white", linewidths=0.3)
            axis.set_title(f"{nets.units} hidden units: {100 * nets.train_accuracy[nets.shown]:.1f} % right")
            axis.set(xlabel="x₁", ylabel="x₂")
            axis.locator_params(nbins=5)
            columns = min(nets.units, max(3, math.ceil(math.sqrt(nets.units))))
            sides[1, column].suptitle("output of each hidden unit", fontsize=11)
            grids = sides[1, column].subplots(math.ceil(nets.units / columns), columns, squeeze=False).ravel()
            for cell in grids:
                cell.set_axis_off()
                cell.set_anchor("N")
            for cell, unit_map in zip(grids, nets.unit_maps, strict=False):
                limit = float(np.abs(unit_map).max()) or 1.0
                _plane(cell, unit_map, data, -limit, limit)


def _figures(found: tuple[Nets, ...]) -> tuple[list[str], list[str]]:
    return [str(n.units) for n in found], [f"{100 * n.train_accuracy.mean():.1f}" for n in found]


def _plane(axis: Any, values: np.ndarray, data: Dataset, low: float, high: float) -> None:
    axis.imshow(values, origin="lower", extent=edges(data), cmap="PuOr", vmin=low, vmax=high, alpha=0.6)
    axis.grid(False)
