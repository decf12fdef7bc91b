"""How much accuracy does privacy cost?

    python -m experiments private-training --data-dir FOLDER-WITH-MNIST

Trains a small net on digits and MNIST by differentially private SGD (`fnn.rules.private_sgd`,
Poisson-sampled batches) at several noise multipliers, and without privacy: test accuracy against
epsilon at delta = 1e-5, mean and standard deviation over seeds. Expect the cost on digits (on
10,000 images of MNIST) to grow from 2.4 (1.5) points at epsilon = 14 to 5.0 (4.2) at 2 and 27 (10)
at 0.3. Takes about 90 seconds. Without the folder MNIST is downloaded; where that cannot be, it is
left out.

Epsilon is for one net whose settings were fixed beforehand. These settings were chosen by looking
at the same data, at a price in privacy that is not counted here; nor are the test accuracies
themselves private.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fnn
from experiments import _data, _run
from fnn import _validate, activations
from fnn.training import poisson_batches, shuffled_batches


@dataclass(frozen=True)
class Config:
    """What is trained, and how privately."""

    datasets: tuple[str, ...] = ("digits", "mnist")
    """Any sets with classes."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist or fashion-mnist; downloaded if left out."""
    noise_multipliers: tuple[float, ...] = (20.0, 10.0, 6.0, 4.0, 2.5, 1.5, 1.0)
    """Standard deviation of the noise in units of max_norm; one net for each, and for each seed."""
    max_norm: float = 1.0
    """Greatest norm of one example's gradient."""
    delta: float = 1e-5
    """Epsilon is for this delta."""
    sizes: tuple[int, ...] = (64,)
    """Hidden units, layer by layer."""
    activation: activations.Name = "tanh"
    """Any name out of fnn.activations.ACTIVATIONS; a bounded one keeps gradients small."""
    learning_rate: float = 0.01
    """Adam's step size."""
    epochs: int = 30
    """Expected passes over the training set."""
    batches: int = 8
    """Steps per pass: each takes every example with about one over this as its probability."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each of a split (of digits), the parameters, the batches and the noise."""
    out: Path | None = None
    """Run folder, runs/private-training if left out."""


TINY = Config(
    datasets=("digits",),
    noise_multipliers=(4.0, 1.0),
    sizes=(8,),
    epochs=2,
    batches=4,
    seeds=(0, 1),
)
GALLERY = Config(datasets=("digits",))  # mnist would be downloaded


class Curve(NamedTuple):
    """One data set."""

    dataset: str
    examples: int
    steps: int
    sampling_rate: float
    epsilon: np.ndarray  # [noise multipliers]
    accuracy: np.ndarray  # [noise multipliers, seeds], of the test set, in 0 ... 1
    baseline: np.ndarray  # [seeds], without privacy


class Result(NamedTuple):
    """All data sets, and why some were left out."""

    curves: tuple[Curve, ...]
    left_out: dict[str, str]


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Trains all nets. `advance(text)` is called after each.

    Raises:
        TypeError, ValueError: a flag is invalid, or no data set is to be had.
    """
    check(config)
    curves, left_out = [], {}
    for name in config.datasets:
        try:
            splits = [
                _data.load(name, seed=seed, data_dir=config.data_dir) for seed in config.seeds
            ]
        except (FileNotFoundError, ConnectionError) as error:
            left_out[name] = str(error)
            continue
        curves.append(_curve(config, splits, advance))
    if not curves:
        raise ValueError(f"No data set is to be had. {' '.join(left_out.values())}")
    return Result(tuple(curves), left_out)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid.

    Before any data are read.
    """
    for name in ("datasets", "noise_multipliers"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` must be one at least and each once, got {values}.")
    for name in config.datasets:
        _validate.one_of("dataset", name, _data.LOADERS)
    activations.get(config.activation)
    _run.check_positive(config, "sizes", "epochs", "batches", whole=True)
    _run.check_positive(config, "noise_multipliers", "max_norm", "learning_rate", "delta")
    if config.delta >= 1:
        raise ValueError(f"`delta` is a probability, so below 1, got {config.delta}.")
    _run.check_seeds(config.seeds)


def main(config: Config) -> None:
    """Prints the tables, saves `private-training.png` and `metrics.json`."""
    check(config)
    folder = _run.folder("private-training", config.out)
    nets = len(config.datasets) * len(config.seeds) * (len(config.noise_multipliers) + 1)
    with _run.progress(nets, "training") as advance:
        result = run(config, advance)
    for name, reason in result.left_out.items():
        print(f"{name} is left out: {reason}")
    for curve in result.curves:
        title = (
            f"{curve.dataset}: {curve.examples:,} examples, {curve.steps} steps, sampling rate "
            f"{curve.sampling_rate:.4f}"
        )
        columns = curve.epsilon, config.noise_multipliers, curve.accuracy
        rows = [
            (f"{epsilon:.2f}", f"{noise:g}", _run.mean_std(list(100 * a), 1))
            for epsilon, noise, a in zip(*columns, strict=True)
        ]
        rows.append(("not private", "0", _run.mean_std(list(100 * curve.baseline), 1)))
        _run.print_table(
            title,
            (f"epsilon (delta {config.delta:g})", "noise multiplier", "test accuracy (%)"),
            rows,
        )
    draw(result, config, folder / "private-training.png")
    print(
        f"Saved {_run.save_metrics(folder, config, result)} and {folder / 'private-training.png'}"
    )


def draw(result: Result, config: Config, path: Path) -> None:
    """Accuracy against epsilon, a line with error bars for each data set.

    What it is without privacy as a dashed line.
    """
    several = len(config.seeds) > 1
    with _run.figure(path, sentence(result), size=(7.0, 4.4)) as (_, axis):
        for curve, colour, marker in zip(result.curves, _run.COLOURS, "osD^vP*", strict=False):
            accuracy, baseline = 100 * curve.accuracy, 100 * curve.baseline.mean()
            label, bars = (
                f"{curve.dataset}, {curve.examples:,} examples",
                accuracy.std(1, ddof=1) if several else None,
            )
            axis.errorbar(
                curve.epsilon,
                accuracy.mean(1),
                bars,
                color=colour,
                marker=marker,
                markersize=5,
                elinewidth=1,
                capsize=3,
                label=label,
            )
            axis.axhline(baseline, color=colour, linestyle="--", linewidth=1.2)
            text = f"{curve.dataset} without privacy, {baseline:.1f} %"
            axis.annotate(
                text,
                (0.01, baseline),
                (0, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=colour,
            )
        axis.set(xscale="log", ylabel="test accuracy (%)")
        axis.set_xlabel(
            rf"privacy loss $\varepsilon$ at $\delta = 10^{{{np.log10(config.delta):.3g}}}$ "
            r"(smaller is more private)"
        )
        axis.margins(y=0.1)
        _run.plain_numbers(axis.xaxis)
        axis.legend(loc="lower right")


def _curve(config: Config, splits: list[_data.Dataset], advance: Callable[[str], Any]) -> Curve:
    """One data set, from a split for every seed."""
    data = splits[0]
    if not data.classes:
        raise ValueError(
            f"`datasets`: {data.name} has no classes, so that there is no accuracy. Choose one "
            "that has, such as digits."
        )
    net, examples = (
        fnn.mlp((data.features, *config.sizes, data.outputs), config.activation),
        len(data.x_train),
    )
    batch_size, optimizer = (
        max(1, round(examples / config.batches)),
        optax.adam(config.learning_rate),
    )
    source = fnn.source(net, data.loss)
    fnn.per_example.check_source(
        source, jax.jit(net.init)(fnn.key(config.seeds[0])), data.x_train[:64], data.t_train[:64]
    )

    def accuracies(rule: fnn.Rule, sampler: Any, text: str) -> list[float]:
        found = []
        for seed, split in zip(config.seeds, splits, strict=True):
            init_key, key = jax.random.split(fnn.key(seed))
            settings = {
                "epochs": config.epochs,
                "batch_size": batch_size,
                "key": key,
                "sampler": sampler,
            }
            params, _ = fnn.fit(
                rule,
                optimizer,
                jax.jit(net.init)(init_key),
                (split.x_train, split.t_train),
                **settings,
            )
            found.append(fnn.evaluate(rule, params, (split.x_test, split.t_test))["accuracy"])
            advance(f"{data.name}, {text}")
        return found

    rules = [
        fnn.rules.private_sgd(net, data.loss, config.max_norm, n, batch_size=batch_size)
        for n in config.noise_multipliers
    ]
    steps, rate = config.epochs * -(-examples // batch_size), batch_size / examples
    epsilon = np.array([rule.epsilon(steps, rate, config.delta) for rule in rules])
    accuracy = np.array(
        [accuracies(rule, poisson_batches, f"noise {rule.noise_multiplier:g}") for rule in rules]
    )
    baseline = np.array(
        accuracies(fnn.rules.backprop(net, data.loss), shuffled_batches, "not private")
    )
    return Curve(data.name, examples, steps, rate, epsilon, accuracy, baseline)


def sentence(result: Result) -> str:
    """What privacy costs on every data set, at its epsilon nearest to 2."""
    costs = []
    for curve in result.curves:
        i = int(np.argmin(np.abs(np.log(curve.epsilon / 2))))
        cost, of = (
            100 * (curve.baseline.mean() - curve.accuracy[i].mean()),
            "" if costs else " points of test accuracy",
        )
        costs.append(
            f"{cost:.1f}{of} on {curve.dataset} at "
            f"ε\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{curve.epsilon[i]:.1f}"
        )
    count = len(result.curves[0].baseline)
    return (
        f"Privacy costs {' and '.join(costs)} "
        f"({f'mean of {count} seeds, bars: standard deviation' if count > 1 else '1 seed'})"
    )
