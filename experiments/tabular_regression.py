"""Does a net predict a disease better than a linear model, and does it learn as scikit-learn's
does?

    python -m experiments tabular-regression

Predicts the progression of diabetes in a year from ten measurements of 442 patients. On every
split, 353 train and 89 test, three models are fitted: ridge regression with its penalty chosen by
leave-one-out, a net by `fnn`, and the same net by scikit-learn's MLPRegressor. Both nets have the
same sizes, weights from Glorot's uniform distribution, half the squared error without a penalty,
Adam, float32, batches and epochs. What differs: scikit-learn draws the first biases too, ours are
0; and the random numbers of starts and shuffles.

Errors are root mean squares in standard deviations of the training targets (about 77 points of the
score), over ten splits. Expect 0.70 for ridge and 0.72 for both nets, which differ by 0.002 ±
0.016: a net gains nothing over a linear model from so few patients. Predicting the mean of the
training targets gives 0.96. Takes about 8 seconds.

Source: lecture 001, properties from tables of measured data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.nn.initializers import glorot_uniform
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor

import fnn
from experiments._data import Dataset, load
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    mean_std,
    print_table,
    progress,
    save_metrics,
)


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (32,)
    """Hidden ReLU units of both nets, layer by layer."""
    learning_rate: float = 1e-3
    """Adam's step size, of both nets."""
    epochs: int = 100
    """Passes over the training set, of both nets."""
    batch_size: int = 32
    """Patients per step, of both nets; at most 353."""
    splits: int = 10
    """How many splits of the patients, each with its own starts."""
    seed: int = 0
    """Seed of the first split and its starts; the others count on from it."""
    out: Path | None = None
    """Run folder; runs/tabular-regression if not given."""


TINY = Config(sizes=(4,), epochs=2, batch_size=100, splits=2)


class Split(NamedTuple):
    """Root-mean-square errors on the test part of one split, in standard deviations of the training
    targets."""

    mean: float  # of the mean of the training targets
    ridge: float
    fnn: np.ndarray  # [epochs], after each epoch
    sklearn: np.ndarray  # [epochs]


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> tuple[Split, ...]:
    """Fits all models on every split. `advance(text)` is called after every split."""
    check(config)
    found = []
    net = fnn.mlp((10, *config.sizes, 1), "relu", kernel_init=glorot_uniform())
    rule, optimizer = fnn.rules.backprop(net, fnn.losses.l2_loss), optax.adam(config.learning_rate)
    for seed in range(config.seed, config.seed + config.splits):
        data = load("diabetes", seed=seed)
        ridge = RidgeCV(np.logspace(-2, 4, 25)).fit(data.x_train, data.t_train[:, 0])
        ours = train(config, data, net, rule, optimizer, seed)
        mean = np.full(len(data.t_test), data.t_train.mean())
        found.append(
            Split(
                rmse(data, mean),
                rmse(data, ridge.predict(data.x_test)),
                ours,
                train_sklearn(config, data, seed),
            )
        )
        advance(f"ridge {found[-1].ridge:.3f}, fnn {ours[-1]:.3f}")
    return tuple(found)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "sizes", "epochs", "batch_size", "splits", whole=True)
    if not config.sizes:
        raise ValueError("`sizes` is empty: scikit-learn's net needs a hidden layer, `--sizes 32`.")
    check_positive(config, "learning_rate")
    for seed in (config.seed, config.seed + config.splits - 1):
        fnn.key(seed)


def rmse(data: Dataset, predicted: np.ndarray) -> float:
    """Root-mean-square error on the test set."""
    return float(np.sqrt(((predicted - data.t_test[:, 0]) ** 2).mean()))


def train(
    config: Config, data: Dataset, net: fnn.Layer, rule: fnn.Rule, optimizer: Any, seed: int
) -> np.ndarray:
    """The test error of the net by `fnn` after every epoch."""
    init_key, key = jax.random.split(fnn.key(seed))
    parts = (data.x_train, data.t_train), (data.x_test, data.t_test)
    settings = {"epochs": config.epochs, "batch_size": config.batch_size, "key": key}
    _, history = fnn.fit(
        rule, optimizer, jax.jit(net.init)(init_key), parts[0], validation=parts[1], **settings
    )
    return np.sqrt(2 * np.asarray(history.validation["loss"]))  # the loss is half the squared error


def train_sklearn(config: Config, data: Dataset, seed: int) -> np.ndarray:
    """The test error of the net by scikit-learn after every epoch."""
    # from a number every call of `partial_fit` would shuffle alike
    rng = np.random.RandomState(seed)
    settings = {
        "learning_rate_init": config.learning_rate,
        "batch_size": config.batch_size,
        "alpha": 0.0,
        "random_state": rng,
    }
    net, errors = MLPRegressor(hidden_layer_sizes=config.sizes, **settings), []
    for _ in range(config.epochs):
        net.partial_fit(data.x_train, data.t_train[:, 0])
        errors.append(rmse(data, np.asarray(net.predict(data.x_test))))
    return np.array(errors)


def errors(splits: tuple[Split, ...]) -> dict[str, list[float]]:
    """Test errors of every model, one a split; of the nets those after the last epoch."""
    return {
        "the mean": [split.mean for split in splits],
        "ridge": [split.ridge for split in splits],
        "net, fnn": [float(split.fnn[-1]) for split in splits],
        "net, scikit-learn": [float(split.sklearn[-1]) for split in splits],
    }


def main(config: Config) -> None:
    check(config)
    path = folder("tabular-regression", config.out)
    with progress(config.splits, "fitting") as advance:
        splits = run(config, advance)
    found = errors(splits)
    least = {
        "net, fnn": [split.fnn.min() for split in splits],
        "net, scikit-learn": [split.sklearn.min() for split in splits],
    }
    rows = [
        (name, mean_std(values, 3), mean_std(least[name], 3) if name in least else "")
        for name, values in found.items()
    ]
    print_table(
        f"Test error (standard deviations), {config.splits} splits",
        ("model", "after training", "least of any epoch"),
        rows,
    )
    difference = np.subtract(found["net, fnn"], found["net, scikit-learn"])
    print(f"fnn's net minus scikit-learn's, split by split: {mean_std(list(difference), 3)}")
    draw(path / "tabular-regression.png", splits, config)
    save_metrics(path, config, {"errors": found, "splits": splits})
    print(f"picture and metrics in {path}")


def draw(path: Path, splits: tuple[Split, ...], config: Config) -> None:
    """The test errors of the nets over training, and those of every model split by split."""
    found = errors(splits)
    mean = {name: f"{np.mean(values):.3f}" for name, values in found.items()}
    nets = f"fnn's net by {mean['net, fnn']}, scikit-learn's by {mean['net, scikit-learn']}"
    title = (
        f"On diabetes ridge errs by {mean['ridge']}, {nets} standard deviations ({config.splits} "
        "splits)"
    )
    colours = dict(zip(found, ("#7F7F7F", COLOURS[2], COLOURS[0], COLOURS[1]), strict=True))
    with figure(path, title, columns=2, size=(10.5, 4.3)) as (_, (left, right)):
        epochs = np.arange(1, config.epochs + 1)
        for name, style, curves in (
            ("net, fnn", "-", [split.fnn for split in splits]),
            ("net, scikit-learn", "--", [split.sklearn for split in splits]),
        ):
            left.plot(epochs, np.mean(curves, axis=0), style, color=colours[name], label=name)
        for name in ("the mean", "ridge"):
            left.axhline(np.mean(found[name]), color=colours[name], linestyle=":", label=name)
        left.set(
            xlabel="epoch",
            ylabel="test error (standard deviations)",
            title=f"mean of {config.splits} splits",
        )
        left.legend(fontsize=9)
        models = [name for name in found if name != "the mean"]
        right.plot(
            range(len(models)),
            np.array([found[name] for name in models]),
            color="#BBBBBB",
            linewidth=0.8,
            zorder=1,
        )
        for i, name in enumerate(models):
            right.plot([i] * len(splits), found[name], "o", color=colours[name], markersize=5)
            right.plot([i - 0.2, i + 0.2], [np.mean(found[name])] * 2, color="black", linewidth=2)
        right.set(
            ylabel="test error (standard deviations)",
            title="every split; bars: means",
            xlim=(-0.5, len(models) - 0.5),
        )
        right.set_xticks(range(len(models)), models)
