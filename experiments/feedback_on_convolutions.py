"""How far does feedback alignment fall behind backprop on a CNN, and where is its angle lost?

    python -m experiments feedback-on-convolutions
    python -m experiments feedback-on-convolutions --dataset mnist --data-dir FOLDER

Convolutions and pools of `fnn`, one after the other, and a linear layer, trained by backprop and by
feedback alignment with fixed matrices, with the signs of the weights and by Kolen and Pollack's
rule. `last layer only` leaves the convolutions as they were drawn. The learning rate of each rule
is the best of a few on a fifth of the training images that is held out. The angle is that of the
update of a layer to the true gradient on the same batch; at 90 degrees it says nothing.

Expect on digits 97.4 ± 1.4 % by backprop, and nearly that by Kolen and Pollack's rule (97.4 ± 0.9)
and the signs (96.9 ± 1.1), at 20 to 40 degrees; by fixed matrices 85.6 ± 8.8 %, at 76 to 88
degrees, no more than the 88.9 ± 0.8 % of the last layer only. Takes about two minutes on 2 cores.

Expect on MNIST's first 10,000 images (`--dataset mnist --epochs 5 --batch-size 100 --rates 0.001
0.003 0.01 --every 50`) 97.8 ± 0.3 % by backprop, 97.7 ± 0.2 by Kolen and Pollack's rule and
97.4 ± 0.7 by the signs, at 22 to 48 degrees; by fixed matrices 95.2 ± 0.3 %, at 83 to 94 degrees,
as with the last layer only (95.4 ± 0.7). Takes about seven minutes on 2 cores.

Source: Bartunov et al. (2018), arXiv:1807.04587, for feedback alignment on convolutions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fnn
from experiments._data import Dataset, load
from experiments._run import (
    COLOURS,
    check_positive,
    check_seeds,
    figure,
    folder,
    mean_std,
    print_table,
    progress,
    save_metrics,
)
from experiments.credit_assignment import METHODS, number
from fnn import _validate

ON_CONVOLUTIONS = (
    "backprop",
    "Kolen-Pollack",
    "sign-symmetric",
    "feedback alignment",
    "last layer only",
)


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    """Images: digits, mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist or fashion-mnist; downloaded if left out."""
    examples: int = 10_000
    """Training images, the first ones; all if there are fewer."""
    methods: tuple[str, ...] = ON_CONVOLUTIONS
    """Rules, by the names of credit-assignment."""
    channels: tuple[int, ...] = (16, 32, 64)
    """Of each convolution; a pool after each halves the sides."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    """Adam's step sizes tried for every rule."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of first weights and shuffles."""
    every: int = 15
    """Steps from one measurement of the angles to the next."""
    out: Path | None = None
    """Run folder; runs/feedback-on-convolutions if not given."""


TINY = Config(
    examples=200,
    methods=("backprop", "feedback alignment"),
    channels=(2, 3),
    epochs=1,
    batch_size=50,
    rates=(0.01,),
    seeds=(0,),
    every=2,
)

GALLERY = Config(epochs=5, rates=(0.003,), seeds=(0,))


class Outcome(NamedTuple):
    """One rule."""

    method: str
    rate: float  # the best on the images held out
    accuracy: np.ndarray  # [seeds, epochs], on test images
    angles: np.ndarray  # [seeds, epochs, layers], degrees
    seconds: float  # of all trainings with that rate

    @property
    def final(self) -> list[float]:
        """The accuracy of every seed at the end, in %."""
        return list(100 * self.accuracy[:, -1])


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    _validate.one_of("dataset", config.dataset, ("digits", "mnist", "fashion-mnist"))
    for name in config.methods:
        _validate.one_of("method", name, ON_CONVOLUTIONS)
    check_positive(config, "examples", "channels", "epochs", "batch_size", "every", whole=True)
    check_positive(config, "rates")
    if not (config.rates and config.methods and config.channels):
        raise ValueError("`rates`, `methods` and `channels` must name one thing at least.")
    if "backprop" not in config.methods:
        raise ValueError("`methods` must have backprop, which the others are held against.")
    check_seeds(config.seeds)


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> list[Outcome]:
    """All rules on the same images. `advance(text)` is called after every rule."""
    check(config)
    data = load(config.dataset, data_dir=config.data_dir)
    data = data._replace(
        x_train=as_images(data.x_train)[: config.examples],
        t_train=data.t_train[: config.examples],
        x_test=as_images(data.x_test),
    )
    outcomes = []
    for name in config.methods:
        outcomes.append(measure(config, name, data))
        advance(f"{name}: {mean_std(outcomes[-1].final, 1)} %")
    return outcomes


def as_images(x: np.ndarray) -> np.ndarray:
    """Rows of pixels as `[images, side, side, 1]`."""
    side = round(x.shape[1] ** 0.5)
    return x.reshape(-1, side, side, 1)


def cnn(channels: tuple[int, ...], side: int, classes: int) -> fnn.Layer:
    """Convolutions of 3 x 3, each with a ReLU and a pool, and a linear layer."""
    layers = []
    inputs = 1
    for outputs in channels:
        if side < 2:
            raise ValueError(
                f"`channels` has {len(channels)} entries, but the image is one pixel before that. "
                "Give fewer."
            )
        layers += [fnn.conv(inputs, outputs, (3, 3)), fnn.activations.relu, fnn.max_pool((2, 2))]
        inputs, side = outputs, side // 2
    return fnn.serial(*layers, fnn.flatten(), fnn.dense(inputs * side**2, classes))


def measure(config: Config, name: str, data: Dataset) -> Outcome:
    """The search for a rate, then every seed with the best one."""
    net = cnn(config.channels, data.x_train.shape[1], data.classes)
    rule = METHODS[name].make(net, data.loss)
    rate = search(config, name, net, rule, data)
    aligned = fnn.alignment.update_alignment(rule, net)

    def angle(*given: Any) -> Any:
        return aligned(*given).angle

    more = {
        "validation": (data.x_test, data.t_test),
        "record": angle,
        "record_every": config.every,
    }
    make_optimizer: Any = METHODS[name].optimizer
    optimizer, begun = make_optimizer(rate), time.perf_counter()
    accuracy, angles = [], []
    for seed in config.seeds:
        images = data.x_train, data.t_train
        _, history = train(config, rule, optimizer, net, images, fnn.key(seed), more)
        accuracy.append(np.asarray(history.validation["accuracy"]))
        records = np.asarray(history.records)
        angles.append(records.reshape(config.epochs, -1, records.shape[-1]).mean(1))
    seconds = time.perf_counter() - begun
    return Outcome(name, rate, np.stack(accuracy), np.stack(angles), seconds)


def search(config: Config, name: str, net: fnn.Layer, rule: fnn.Rule, data: Dataset) -> float:
    """The rate of the best accuracy on images held out."""
    if len(config.rates) == 1:
        return config.rates[0]
    scores = []
    kept, held = parts(data)
    make_optimizer: Any = METHODS[name].optimizer
    for rate in config.rates:
        params, _ = train(config, rule, make_optimizer(rate), net, kept, fnn.key(2**32 - 1), {})
        scores.append(fnn.evaluate(rule, params, held, batch_size=500)["accuracy"])
    return config.rates[int(np.argmax(scores))]


def train(
    config: Config, rule: fnn.Rule, optimizer: Any, net: fnn.Layer, images: Any, key: Any, more: Any
) -> tuple[Any, fnn.History]:
    """A net from its first weights on."""
    init_key, fit_key = jax.random.split(key)
    params = jax.jit(net.init)(init_key)
    sizes = {"epochs": config.epochs, "batch_size": config.batch_size}
    return fnn.fit(rule, optimizer, params, images, key=fit_key, **sizes, **more)


def parts(data: Dataset) -> tuple[Any, Any]:
    """Four fifths of the training images to train on, and one to choose the rate by."""
    rows = np.random.default_rng(0).permutation(len(data.x_train))
    held, kept = np.split(rows, [len(rows) // 5])
    return (data.x_train[kept], data.t_train[kept]), (data.x_train[held], data.t_train[held])


def layer_names(outcome: Outcome) -> list[str]:
    """From the images to the classes."""
    return [*(f"conv {i + 1}" for i in range(outcome.angles.shape[-1] - 1)), "linear"]


def sentence(config: Config, outcomes: list[Outcome]) -> str:
    """What the picture shows."""
    best = {o.method: float(np.mean(o.final)) for o in outcomes}
    points = {name: best["backprop"] - best[name] for name in best if name != "backprop"}
    others = [
        f"{name} {abs(gap):.1f} points {'below' if gap > 0 else 'above'}"
        for name, gap in points.items()
    ]
    return (
        f"On {config.dataset} a CNN comes to {best['backprop']:.1f} % by backprop; "
        f"{', '.join(others)}"
    )


def main(config: Config) -> None:
    check(config)
    path = folder("feedback-on-convolutions", config.out)
    with progress(len(config.methods), "training") as advance:
        outcomes = run(config, advance)
    names = layer_names(outcomes[0])
    rows = []
    for o in outcomes:
        angles = [number(a, ".0f") for a in o.angles[:, -1].mean(0)]
        rows.append((o.method, f"{o.rate:g}", mean_std(o.final, 1), f"{o.seconds:.0f}", *angles))
    columns = "rule", "rate", "test accuracy, %", "seconds", *names
    title = f"{config.dataset}: {config.epochs} epochs; angles to the gradient in the last, degrees"
    print_table(title, columns, rows)
    draw(path / "feedback-on-convolutions.png", config, outcomes)
    save_metrics(path, config, outcomes)
    print(f"picture and metrics in {path}")


def draw(path: Path, config: Config, outcomes: list[Outcome]) -> None:
    """Accuracy over epochs; the angle of every layer in the last epoch."""
    with figure(path, sentence(config, outcomes), columns=2, size=(11, 4.6)) as (_, (left, right)):
        for i, (o, marker) in enumerate(zip(outcomes, "osD^v", strict=False)):
            look = {"color": COLOURS[i], "marker": marker, "markersize": 5}
            epochs = np.arange(1, o.accuracy.shape[1] + 1)
            left.plot(epochs, 100 * o.accuracy.mean(0), label=o.method, **look)
            if len(o.accuracy) > 1:
                spread = 100 * o.accuracy.std(0, ddof=1)
                mean = 100 * o.accuracy.mean(0)
                left.fill_between(epochs, mean - spread, mean + spread, color=COLOURS[i], alpha=0.2)
            if o.method not in ("backprop", "last layer only"):
                angles = o.angles[:, -1].mean(0)
                right.plot(layer_names(o), angles, **look)
        left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(0, 101))
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(loc="lower right")
        right.axhline(90, color="black", linewidth=1, linestyle=":")
        right.set(
            ylabel="update to gradient in the last epoch, degrees",
            ylim=(-3, 100),
            yticks=(0, 30, 60, 90),
        )
