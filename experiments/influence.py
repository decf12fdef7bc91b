"""Which training images helped or hurt a test image most?

    python -m experiments influence

TracIn (Pruthi, Liu, Kale, Sundararajan 2020, arXiv:2002.08484): to first order, a step of SGD on training image i lowers the loss of
test image j by (rate / batch size) <g_i, g_j>. Summed over a checkpoint per epoch that is the score: the largest have helped j most,
the smallest, below 0, have hurt it most. The inner products come from factors; no gradient is formed.

Two checks can fail: helpers should carry the test image's label, and what hurts another one; and steps on single images from the last
checkpoint should change test losses as predicted, the better the smaller the step. Expect more than 95 %, and correlations above 0.95
for the step of training and 0.9999 for a hundredth of it. Takes about 5 seconds, 8 with 10,000 images of mnist.
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
from experiments._run import COLOURS, figure, folder, print_table, progress, save_metrics
from fnn import _check


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    """digits, mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist or fashion-mnist; downloaded if left out."""
    sizes: tuple[int, ...] = (64,)
    """Hidden units, layer by layer."""
    learning_rate: float = 0.1
    """Step size of plain SGD."""
    epochs: int = 15
    """Passes over the training set; one checkpoint after each."""
    batch_size: int = 32
    """Examples per step."""
    test_images: int = 360
    """How many test images, the first ones, are explained; all if there are fewer."""
    top: int = 4
    """How many helpers, and how many that hurt, count and are shown."""
    pairs: int = 200
    """Random pairs of a training and a test image whose prediction is held against a step."""
    seed: int = 0
    """Of the split, the parameters, the shuffles and the pairs."""
    out: Path | None = None
    """Run folder; runs/influence if not given."""


TINY = Config(sizes=(8,), epochs=2, batch_size=256, test_images=40, top=2, pairs=20)


class Result(NamedTuple):
    """Scores and changes of loss are in nats; rows and columns are numbers of training and test images."""

    scores: np.ndarray  # [train, test]
    said: np.ndarray  # [test]: the net's answers
    losses: np.ndarray  # [test]
    changes: np.ndarray  # [2, pairs]: of test losses by a step on one training image, predicted and measured
    correlation: tuple[float, float]  # of predicted and measured changes, by a step of training and by a hundredth of it


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> tuple[Dataset, Result]:
    """Trains, scores and checks; the data come back with the test images that were explained. `advance(text)` after every epoch."""
    _check.one_of("dataset", config.dataset, ("digits", "mnist", "fashion-mnist"))
    for name in ("epochs", "test_images", "top", "pairs"):
        _check.positive(name, getattr(config, name), whole=True)
    data = load(config.dataset, seed=config.seed, data_dir=config.data_dir)
    data = data._replace(x_test=data.x_test[: config.test_images], t_test=data.t_test[: config.test_images])
    train, test = (data.x_train, data.t_train), (data.x_test, data.t_test)
    net = fnn.mlp((data.features, *config.sizes, data.classes))
    rule, optimizer, source = fnn.rules.backprop(net, data.loss), optax.sgd(config.learning_rate), fnn.factors(net, data.loss)
    inner, step = jax.jit(fnn.per_example.inner_products(source)), config.learning_rate / config.batch_size
    init_key, key = jax.random.split(fnn.key(config.seed))
    params, scores = jax.jit(net.init)(init_key), np.zeros((len(train[0]), len(test[0])), np.float32)
    for epoch_key in jax.random.split(key, config.epochs):
        # `fit` begins anew for every checkpoint, but plain SGD has no state to lose
        params, history = fnn.fit(rule, optimizer, params, train, epochs=1, batch_size=config.batch_size, key=epoch_key)
        scores += step * np.asarray(inner(params, train, test))
        advance(f"loss {float(history.loss[0]):.4f}")
    rng = np.random.default_rng(config.seed)
    i, j = (rng.integers(0, len(part[0]), config.pairs) for part in (train, test))
    pairs = (train[0][i], train[1][i]), (test[0][j], test[1][j])
    changes, small = (single_steps(net, data.loss, params, size, *pairs) for size in (step, step / 100))
    said, losses = net.apply(params, jnp.asarray(test[0])).argmax(-1), source(params, *test)[0]
    correlation = float(np.corrcoef(changes)[0, 1]), float(np.corrcoef(small)[0, 1])
    return data, Result(scores, np.asarray(said), np.asarray(losses), changes, correlation)


def single_steps(net: fnn.Layer, loss: fnn.Loss, params: Any, step: float, train: Any, test: Any) -> np.ndarray:
    """Predicted and measured change of every test loss by a step on the training image beside it, in float64, `[2, pairs]`."""

    def both(pair: Any) -> Any:
        on, of = jax.tree.map(lambda a: a[None], pair)
        moved = jax.tree.map(lambda p, g: p - step * g, params, value_and_grad(params, *on)[1])
        return jnp.stack([-step * inner(params, on, of)[0, 0], value_and_grad(moved, *of)[0] - value_and_grad(params, *of)[0]])

    inner, value_and_grad = fnn.per_example.inner_products(fnn.factors(net, loss)), fnn.value_and_grad(net, loss)
    with jax.enable_x64(True):  # in float32 rounding hides the smaller changes
        params = jax.tree.map(lambda a: a.astype(np.float64), params)
        pairs = [(np.asarray(x, np.float64), targets) for x, targets in (train, test)]
        return np.asarray(jax.jit(lambda *pairs: jax.lax.map(both, pairs))(*pairs)).T


def shares(data: Dataset, result: Result, top: int) -> dict[str, float]:
    """How often the labels of helpers, and of those that hurt, are what one would expect, over all test images."""
    order = np.argsort(result.scores, axis=0)
    helpers, hurters = data.t_train[order[::-1][:top]], data.t_train[order[:top]]  # [top, test]
    wrong = result.said != data.t_test
    return {
        "helpers with the label of the test image": float((helpers == data.t_test[None]).mean()),
        "hurt by another label": float((hurters != data.t_test[None]).mean()),
        "wrong answers hurt by the label answered": float((hurters == result.said[None])[:, wrong].mean()) if wrong.any() else math.nan,
    }


def chosen(data: Dataset, result: Result) -> list[int]:
    """The test images to show: three wrong answers of the highest loss, the right one of the highest, and one of median loss."""
    order = np.argsort(-result.losses)
    right = result.said[order] == data.t_test[order]
    return [*order[~right][:3], *order[right][:1], *order[right][1:][(right.sum() - 1) // 2 :][:1]]


def main(config: Config) -> None:
    with progress(config.epochs, "training") as advance:
        data, result = run(config, advance)
    found = shares(data, result, config.top)
    chances = (np.mean(data.t_train[:, None] == data.t_test[None]), np.mean(data.t_train[:, None] != data.t_test[None]), 1 / data.classes)
    rows = [(name, f"{100 * share:.1f} %", f"{100 * chance:.1f} %") for (name, share), chance in zip(found.items(), chances, strict=True)]
    accuracy = float((result.said == data.t_test).mean())
    title = f"Labels of the {config.top} of the highest and lowest score, {len(data.t_test)} test images, {100 * accuracy:.1f} % right"
    print_table(title, ("share", "measured", "by chance"), rows)
    step, small = result.correlation
    print(f"{config.pairs} steps on one image, predicted and measured change: correlation {step:.4f}, by a hundredth of a step {small:.6f}")
    path = folder("influence", config.out)
    draw(path / "influence.png", data, result, config)
    save_metrics(path, config, {"shares": found, "test_accuracy": accuracy, "correlation": result.correlation})
    print(f"picture and metrics in {path}")


def draw(path: Path, data: Dataset, result: Result, config: Config) -> None:
    """A row for each test image: the image, what helped it most, what hurt it most; beside, predicted and measured changes."""
    images, found, top = chosen(data, result), list(shares(data, result, config.top).values()), config.top
    title = (
        f"{100 * found[0]:.1f} % of the training images that helped most carry the label of the test image, {100 * found[1]:.1f} % of "
        f"those that hurt most another; steps on one image change the loss as predicted (correlation {result.correlation[0]:.4f})"
    )
    with figure(path, title, size=(13, 1.2 * len(images) + 1)) as (fig, axes):
        axes.remove()
        sides: Any = fig.subfigures(1, 4, width_ratios=(1, top, top, 4.5))
        grids = []
        for side, columns, head in zip(sides, (1, top, top), ("test image", "helped it most", "hurt it most"), strict=False):
            side.suptitle(head if columns == 1 else f"{head}: label, score (nats)", fontsize=11)
            grids.append(side.subplots(len(images), columns, squeeze=False))
        for row, j in enumerate(images):
            _image(grids[0][row, 0], data.x_test[j], f"is {data.t_test[j]}, said {result.said[j]}", "black")
            order = np.argsort(-result.scores[:, j])
            for grid, best, colour in ((grids[1], order[:top], COLOURS[2]), (grids[2], order[: -top - 1 : -1], COLOURS[1])):
                for axis, i in zip(grid[row], best, strict=True):
                    _image(axis, data.x_train[i], f"{data.t_train[i]},  {result.scores[i, j]:+.2f}".replace("-", "−"), colour)
        axis = sides[3].subplots()
        axis.axline((0, 0), slope=1, color="black", linewidth=1, label="measured = predicted")
        axis.plot(*result.changes, ".", alpha=0.6, label="a pair of images")
        axis.set(xlabel="predicted change (nats)", ylabel="measured change (nats)", box_aspect=1)
        axis.set_title("change of a test loss by a step on one image", fontsize=10)
        for scale, axle in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
            scale("symlog", linthresh=1e-5)
            axle.set_ticks([-1e-1, -1e-3, -1e-5, 1e-5, 1e-3, 1e-1])
        axis.legend(fontsize=9)


def _image(axis: Any, pixels: np.ndarray, text: str, colour: str) -> None:
    """A square picture without ticks, framed, with text above."""
    side = math.isqrt(len(pixels))
    axis.imshow(pixels.reshape(side, side), cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_title(text, fontsize=9, color=colour)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=1.5)
