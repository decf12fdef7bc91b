"""Is a deep net without activations more than one matrix?

    python -m experiments linear-collapse

Trains a deep net on two spirals in the plane, once without activations (identity) and once with
them, in float64, and multiplies the weights of each out to one dense layer (`fnn.collapse`). Held
against each other: the outputs of net and matrix, and how much of the test set both get right,
beside logistic regression, which fits one matrix directly. Then the same distance of outputs for
nets of many depths and activations as they are initialised.

Expect the linear net and its matrix to differ by rounding alone, 4e-16 of the outputs, and to be as
good as logistic regression: 67.5 % right with seed 0, 58.5 to 69.5 % over the seeds 0 ... 4, and
logistic regression within 2 points. With relu the net gets 99.5 to 100 % right; its weights
multiplied out are another function, 50 to 65 % right. Untrained nets differ from their matrix by
0.02 to 0.05 times the output (one layer of tanh, nearly linear at small weights) up to 6 to 74
times (eight of relu). Takes about 8 seconds.

Source: lectures 002, 003 (linear collapse: W_n ... W_1 x + b is one matrix).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn.initializers import glorot_uniform
from sklearn.linear_model import LogisticRegression

import fnn
from experiments._data import Dataset, load
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate, activations

PLANAR = ("moons", "spirals", "flower")
COMPARED = ("relu", "tanh", "identity")
GRID = 150  # points along a side of the pictures


@dataclass(frozen=True)
class Config:
    dataset: str = "spirals"
    """moons, spirals or flower: two classes in the plane."""
    activation: activations.Name = "relu"
    """Activation of the net that is trained beside the linear one."""
    depth: int = 8
    """Hidden layers of the trained nets."""
    width: int = 32
    """Units in every hidden layer."""
    depths: tuple[int, ...] = (1, 2, 4, 8)
    """Hidden layers of the nets that are compared untrained."""
    learning_rate: float = 3e-3
    """Adam's step size."""
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 40
    """Examples per step."""
    seed: int = 0
    """Of the data, the parameters and the shuffles."""
    out: Path | None = None
    """Run folder; runs/linear-collapse if not given."""


TINY = Config(depth=2, width=8, depths=(1, 3), epochs=2, batch_size=200)


class Trained(NamedTuple):
    """A trained net, and what remains of it as one matrix."""

    activation: activations.Name
    # norm of (outputs - those of the matrix) over the test set, relative to the outputs
    difference: float
    accuracy: float  # on the test set, in 0 ... 1
    matrix_accuracy: float
    same_answers: float  # the share of the test set for which both say the same
    # logits of net and matrix on the picture's points, [GRID, GRID] each
    grid: tuple[np.ndarray, np.ndarray]


class Result(NamedTuple):
    linear: Trained
    nonlinear: Trained
    logistic_accuracy: float  # of logistic regression
    # as `Trained.difference`, of untrained nets: one number a depth
    differences: dict[str, list[float]]


def run(
    config: Config, advance: Callable[[str], Any] = lambda text: None
) -> tuple[Dataset, Result]:
    """Trains and collapses both nets; the data come back for the picture.

    `advance(text)` is called after every net.
    """
    check(config)
    data = load(config.dataset, seed=config.seed)
    logistic = LogisticRegression(C=np.inf).fit(data.x_train, data.t_train)  # no penalty
    with jax.enable_x64(True):
        linear = train(config, "identity", data)
        advance("identity")
        nonlinear = train(config, config.activation, data)
        advance(config.activation)
        differences = untrained(config, data.x_test.astype(np.float64))
    return data, Result(
        linear, nonlinear, float(logistic.score(data.x_test, data.t_test)), differences
    )


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    _validate.one_of("dataset", config.dataset, PLANAR)
    activations.get(config.activation)
    check_positive(config, "depth", "width", "epochs", "batch_size", "depths", whole=True)
    check_positive(config, "learning_rate")
    if not config.depths:
        raise ValueError("`depths` is empty: give one at least, `--depths 4`.")
    fnn.key(config.seed)


def make_net(config: Config, activation: activations.Name, depth: int) -> fnn.Layer:
    return fnn.mlp((2, *(config.width,) * depth, 1), activation, kernel_init=glorot_uniform())


def train(config: Config, activation: activations.Name, data: Dataset) -> Trained:
    """Trains a net, collapses it and compares the two."""
    net = make_net(config, activation, config.depth)
    rule = fnn.rules.backprop(net, fnn.losses.sigmoid_binary_cross_entropy)
    (x, t), (x_test, t_test) = (
        (x.astype(np.float64), t[:, None].astype(np.float64))
        for x, t in ((data.x_train, data.t_train), (data.x_test, data.t_test))
    )
    init_key, fit_key = jax.random.split(fnn.key(config.seed))
    settings = {"epochs": config.epochs, "batch_size": config.batch_size, "key": fit_key}
    params, _ = fnn.fit(
        rule, optax.adam(config.learning_rate), jax.jit(net.init)(init_key), (x, t), **settings
    )
    y, z = both_outputs(net, params, x_test)
    right, matrix_right, same = (
        float(((a > 0) == (b > 0)).mean()) for a, b in ((y, t_test), (z, t_test), (y, z))
    )
    first, second = (
        logits.reshape(GRID, GRID) for logits in both_outputs(net, params, points(data))
    )
    return Trained(activation, relative(y, z), right, matrix_right, same, (first, second))


def untrained(config: Config, x: np.ndarray) -> dict[str, list[float]]:
    """The relative difference of the outputs of net and matrix before any training.

    For every activation, a number a depth.
    """
    differences: dict[str, list[float]] = {name: [] for name in COMPARED}
    for depth in config.depths:
        # the same with every activation
        params = jax.jit(make_net(config, "identity", depth).init)(fnn.key(config.seed))
        for name in COMPARED:
            differences[name].append(
                relative(*both_outputs(make_net(config, name, depth), params, x))
            )
    return differences


def both_outputs(net: fnn.Layer, params: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of a net, and those of its weights multiplied out to one dense layer."""
    y = jax.jit(net.apply)(params, jnp.asarray(x))
    matrix = fnn.collapse(params)
    return np.asarray(y), np.asarray(fnn.dense(*matrix.w.shape).apply(matrix, x))


def relative(y: np.ndarray, z: np.ndarray) -> float:
    return float(np.linalg.norm(y - z) / np.linalg.norm(y))


def points(data: Dataset) -> np.ndarray:
    """A grid over the plane in which the data lie, `[GRID * GRID, 2]`."""
    low, high = data.x_train.min(0) - 0.2, data.x_train.max(0) + 0.2
    axes = [np.linspace(a, b, GRID, dtype=np.float64) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)


def main(config: Config) -> None:
    """Prints both tables, saves `linear-collapse.png` and `metrics.json`."""
    check(config)
    path = folder("linear-collapse", config.out)
    with progress(2, "training") as advance:
        data, result = run(config, advance)
    both = (result.linear, result.nonlinear)
    rows = [
        (
            net.activation,
            f"{net.difference:.1e}",
            *(
                f"{100 * share:.1f} %"
                for share in (net.accuracy, net.matrix_accuracy, net.same_answers)
            ),
        )
        for net in both
    ]
    head = ("net", "relative difference", "net right", "matrix right", "same answers")
    print_table(
        f"{config.depth} hidden layers on {data.name}, after training, and their product",
        head,
        rows,
    )
    print(f"logistic regression: {100 * result.logistic_accuracy:.1f} % right")
    rows = [(name, *(f"{d:.1e}" for d in row)) for name, row in result.differences.items()]
    print_table("The same before training, by depth", ("net", *map(str, config.depths)), rows)
    draw(path / "linear-collapse.png", data, result, config)
    save_metrics(
        path,
        config,
        result._replace(linear=both[0]._replace(grid=()), nonlinear=both[1]._replace(grid=())),
    )
    print(f"picture and metrics in {path}")


def sentence(result: Result, depth: int) -> str:
    linear, other = result.linear, result.nonlinear
    verdict = "are one matrix" if linear.difference < 1e-12 else "are NOT one matrix"
    shares = [
        100 * share
        for share in (
            linear.accuracy,
            result.logistic_accuracy,
            other.accuracy,
            other.matrix_accuracy,
        )
    ]
    differ = f"{shares[2]:.1f}" != f"{shares[3]:.1f}"
    multiplied = (
        f"but {shares[3]:.1f} % once multiplied out"
        if differ
        else "and as many once multiplied out"
    )
    return (
        f"{depth} hidden layers without activations {verdict} (outputs differ by "
        f"{linear.difference:.0e}): {shares[0]:.1f} % right, logistic regression {shares[1]:.1f} "
        f"%; with {other.activation} {shares[2]:.1f} %, {multiplied}"
    )


def draw(path: Path, data: Dataset, result: Result, config: Config) -> None:
    """What both nets say in the plane, with the boundary of their matrices.

    The differences of untrained nets against depth.
    """
    with figure(path, sentence(result, config.depth), columns=3, size=(10, 3.9)) as (
        _,
        (left, middle, right),
    ):
        for axis, net in ((left, result.linear), (middle, result.nonlinear)):
            u, v = points(data).reshape(GRID, GRID, 2).transpose(2, 0, 1)
            axis.contourf(
                u,
                v,
                net.grid[0],
                levels=(-np.inf, 0, np.inf),
                colors=(COLOURS[0], COLOURS[1]),
                alpha=0.25,
            )
            axis.contour(
                u, v, net.grid[1], levels=(0,), colors="black", linestyles="--", linewidths=1.5
            )
            for label, marker in ((0, "o"), (1, "^")):
                axis.plot(
                    *data.x_test[data.t_test == label].T, marker, color=COLOURS[label], markersize=3
                )
            name = "no activation" if net is result.linear else net.activation
            axis.set_title(f"{name} (dashed: multiplied out)", fontsize=10)
            axis.set(xlabel="$x_1$", ylabel="$x_2$", box_aspect=1)
            axis.grid(False)
        for (name, row), marker in zip(result.differences.items(), "os^", strict=True):
            right.loglog(config.depths, row, marker=marker, markersize=5, label=name)
        right.set(
            xlabel="hidden layers",
            ylabel="|net − matrix| / |net|",
            box_aspect=1,
            xticks=config.depths,
            xticklabels=config.depths,
        )
        right.xaxis.minorticks_off()
        right.set_title("outputs before training", fontsize=10)
        right.legend(fontsize=9, loc="center left")
