"""What experiments on two classes in the plane share.

Nets from several starts, the one of median accuracy, and its picture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

import fnn

# the two ends of the colour map PuOr: class 0 orange, class 1 purple
CLASSES = ("#B35806", "#542788")

Extent = tuple[float, float, float, float]  # left, right, bottom and top of a square


class Starts(NamedTuple):
    """Nets of one kind that differ in their first parameters and shuffles."""

    train_accuracy: np.ndarray  # [starts], in 0 ... 1
    test_accuracy: np.ndarray  # [starts]
    loss: np.ndarray  # [starts, epochs], the mean of each epoch, before each step
    shown: int  # the start of median training accuracy
    params: Any  # of that one


def train_starts(
    rule: fnn.Rule,
    optimizer: Any,
    net: fnn.Layer,
    train: Any,
    test: Any,
    *,
    epochs: int,
    batch_size: int,
    starts: int,
    seed: int,
) -> Starts:
    """Trains a net from every start at once and tests it on both parts, each `(x, targets)`.

    Raises:
        ValueError: a net diverges.
    """
    keys = jax.random.split(fnn.key(seed), starts)
    params, history = fnn.fit_many(
        rule, optimizer, net.init, train, epochs=epochs, batch_size=batch_size, keys=keys
    )
    loss = np.asarray(history.loss)
    if diverged := int((~np.isfinite(loss)).any(1).sum()):
        raise ValueError(f"{diverged} of {starts} nets diverge. Choose a lower `learning_rate`.")
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(starts)]
    on_train, on_test = (
        np.array([fnn.evaluate(rule, p, part)["accuracy"] for p in each]) for part in (train, test)
    )
    shown = int(np.argsort(on_train)[starts // 2])
    return Starts(on_train, on_test, loss, shown, each[shown])


def grid(extent: Extent, pixels: int) -> np.ndarray:
    """The points of a square, `[pixels, pixels, 2]`; rows from the bottom up."""
    left, right, bottom, top = extent
    return np.stack(
        np.meshgrid(np.linspace(left, right, pixels), np.linspace(bottom, top, pixels)), axis=-1
    ).astype(np.float32)


def draw_values(axis: Any, values: np.ndarray, extent: Extent, low: float, high: float) -> None:
    """Values over the plane, `[pixels, pixels]`: `low` is orange, `high` purple."""
    axis.imshow(values, origin="lower", extent=extent, cmap="PuOr", vmin=low, vmax=high, alpha=0.6)
    axis.grid(False)


def draw_regions(
    axis: Any, probability: np.ndarray, extent: Extent, x: np.ndarray, t: np.ndarray
) -> None:
    """The probability of class 1 over the plane, the boundary where it is 1/2, and the points `x`
    of the classes `t`."""
    draw_values(axis, probability, extent, 0.0, 1.0)
    if probability.min() < 0.5 < probability.max():  # else there is no boundary
        axis.contour(probability, levels=[0.5], colors="black", extent=extent, linewidths=1.5)
    for label, colour in enumerate(CLASSES):
        axis.scatter(*x[t == label].T, s=10, color=colour, edgecolors="white", linewidths=0.3)
    axis.set(xlabel="x₁", ylabel="x₂")
    axis.locator_params(nbins=5)
