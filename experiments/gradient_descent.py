"""How long may a step of gradient descent be, and how many examples does a step need?

    python -m experiments gradient-descent

A linear neuron with two weights and half the squared error is a quadratic with the curvatures 1 and
10. Along each the error after k steps is the first error times (1 - rate curvature)^k. So it
shrinks for rates below 2/curvature and grows above: the bound is 0.2 here. Expect the paths to
follow this closed form to about 1e-13 of the first error, to creep at 0.1 of the bound, to zigzag
at 0.95 and to diverge at 1.05.

Then a linear regression on 353 patients (diabetes) with one rate for all: by single examples, by
batches of 32, by the whole set. After one epoch the loss exceeds that of least squares by 0.02,
0.13 and 0.25 with seed 0, over the seeds 0 ... 4 by 0.008 to 0.046, 0.08 to 0.13 and 0.23 to 0.25:
the more steps, the further. Then noise sets a floor: over the last tenth of 300 epochs the excess
is 0.02 to 0.03, 0.002 to 0.004 and 0.001 to 0.003. The whole set has no noise; its rest is the
direction of least curvature, 0.009, along which it creeps. Takes about 5 seconds.

Source: lectures 000 (gradient descent) and 002 (gradient descent, SGD).
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
from jax import lax

import fnn
from experiments._data import load
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    print_table,
    progress,
    save_metrics,
)
from fnn import training
from fnn.nets.layers import Dense

# columns: the directions of the two curvatures
AXES = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
BEST, START = np.array([1.0, -0.5]), np.array([-2.0, -1.0])
LOSS = fnn.losses.l2_loss


@dataclass(frozen=True)
class Config:
    curvatures: tuple[float, float] = (1.0, 10.0)
    """Of the quadratic, along its two axes."""
    fractions: tuple[float, ...] = (0.1, 0.95, 1.05)
    """Learning rates on the quadratic, in units of the bound 2 / (greater curvature)."""
    steps: int = 30
    """Steps on the quadratic."""
    batch_sizes: tuple[int, ...] = (1, 32, 353)
    """Examples per step of the regression; it has 353."""
    learning_rate: float = 0.02
    """Of the regression, for all batch sizes."""
    epochs: int = 300
    """Passes over the 353 examples."""
    seed: int = 0
    """Of the regression's split and shuffles."""
    out: Path | None = None
    """Run folder; runs/gradient-descent if not given."""


TINY = Config(epochs=3, steps=5)


class Result(NamedTuple):
    """What was measured."""

    paths: np.ndarray  # [fractions, steps + 1, 2]: weights
    errors: np.ndarray  # [fractions, steps + 1, 2]: less the optimum, along the two axes
    closed_form: np.ndarray  # [fractions, steps + 1, 2]: first error x (1 - rate curvature)^k
    difference: float  # of errors and closed form, the greatest, in units of the first error
    excess: np.ndarray  # [batch sizes, epochs + 1]: loss on all examples less that of least squares
    examples: int  # of the regression
    features: int


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Descends on the quadratic by every rate and on the regression by every batch size.

    `advance(text)` after each of the latter.
    """
    check(config)
    curvatures = np.array(config.curvatures)
    rates = np.array(config.fractions) * 2 / curvatures.max()
    paths = descend(curvatures, rates, config.steps)
    errors = (paths - BEST) @ AXES
    factors = 1 - rates[:, None] * curvatures  # [fractions, 2]
    closed_form = errors[:, :1] * factors[:, None] ** np.arange(config.steps + 1)[:, None]
    difference = float(np.abs(errors - closed_form).max() / np.linalg.norm(START - BEST))
    data = load("diabetes", seed=config.seed)
    excess = []
    for size in config.batch_sizes:
        excess.append(regression(config, size, data.x_train, data.t_train))
        advance(f"batch size {size}")
    return Result(
        paths, errors, closed_form, difference, np.stack(excess), len(data.x_train), data.features
    )


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    for name in ("curvatures", "fractions", "batch_sizes"):
        if not getattr(config, name):
            raise ValueError(f"`{name}` is empty: give one number at least.")
    check_positive(config, "batch_sizes", "steps", "epochs", whole=True)
    check_positive(config, "curvatures", "fractions", "learning_rate")
    fnn.key(config.seed)


def descend(curvatures: np.ndarray, rates: np.ndarray, count: int) -> np.ndarray:
    """The weights before the first step and after each, by every rate in float64, `[rates, count +
    1, 2]`.

    The mean of 1/2 (x w - x best)^2 over the two rows of x has the second derivative x^T x / 2,
    which is `axes diag(curvatures) axes^T`.
    """
    x = np.sqrt(2 * curvatures)[:, None] * AXES.T

    def path(rate: Any) -> Any:
        rule, optimizer = fnn.rules.backprop(fnn.dense(2, 1, bias_init=None), LOSS), optax.sgd(rate)
        one_step = training.step(rule, optimizer)

        def body(state: Any, _: None) -> tuple[Any, Any]:
            return one_step(state, jnp.asarray(x), jnp.asarray(x @ BEST[:, None]))[
                0
            ], state.params.w[:, 0]

        state = training.init(rule, optimizer, Dense(jnp.asarray(START[:, None]), None), fnn.key(0))
        return lax.scan(body, state, length=count + 1)[1]

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.vmap(path))(jnp.asarray(rates)))


def regression(config: Config, batch_size: int, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The excess of the loss before training and after every epoch, `[epochs + 1]`."""
    net = fnn.dense(x.shape[1], 1)
    rule, start = fnn.rules.backprop(net, LOSS), Dense(jnp.zeros((x.shape[1], 1)), jnp.zeros(1))
    settings = {
        "epochs": config.epochs,
        "batch_size": batch_size,
        "key": fnn.key(config.seed),
        "validation": (x, t),
    }
    _, history = fnn.fit(rule, optax.sgd(config.learning_rate), start, (x, t), **settings)
    inputs, targets = np.append(x, np.ones_like(t), axis=1).astype(np.float64), t.astype(np.float64)
    least = ((inputs @ np.linalg.lstsq(inputs, targets)[0] - targets) ** 2).mean() / 2
    return np.append(fnn.evaluate(rule, start, (x, t))["loss"], history.validation["loss"]) - least


def final(excess: np.ndarray) -> np.ndarray:
    """The mean excess over the last tenth of the epochs, `[batch sizes]`."""
    return excess[:, -max(1, excess.shape[1] // 10) :].mean(1)


def running_mean(excess: np.ndarray) -> np.ndarray:
    """Of every epoch's excess from the first on, `[epochs]`.

    The mean over the epochs of up to a tenth less or more than its number.
    """
    numbers = np.arange(1, len(excess) + 1)
    return np.array([excess[(numbers >= 0.9 * n) & (numbers <= 1.1 * n)].mean() for n in numbers])


def main(config: Config) -> None:
    check(config)
    path = folder("gradient-descent", config.out)
    with progress(len(config.batch_sizes), "regression") as advance:
        result = run(config, advance)
    distance = np.linalg.norm(result.errors, axis=-1)
    rows = [
        (f"{f:g} of 2/curvature", f"{d[0]:.3f}", f"{d[-1]:.2e}")
        for f, d in zip(config.fractions, distance, strict=True)
    ]
    print_table(
        "Distance to the optimum of the quadratic",
        ("learning rate", "at the start", f"after {config.steps} steps"),
        rows,
    )
    print(
        f"greatest difference to error x (1 - rate curvature)^k: {result.difference:.1e} of the "
        "first error"
    )
    rows = [
        (
            size,
            f"{-(-result.examples // size)}",
            f"{4 * size * (result.features + 1):,}",
            f"{excess[1]:.5f}",
            f"{last:.1e}",
        )
        for size, excess, last in zip(
            config.batch_sizes, result.excess, final(result.excess), strict=True
        )
    ]
    columns = (
        "batch size",
        "steps per epoch",
        "bytes per batch",
        "excess after 1 epoch",
        "mean of the last tenth",
    )
    print_table(
        f"Regression: loss less that of least squares, {config.epochs} epochs", columns, rows
    )
    draw(path / "gradient-descent.png", result, config)
    numbers = {
        "difference": result.difference,
        "distance": distance,
        "excess": result.excess,
        "final_excess": final(result.excess),
    }
    save_metrics(path, config, numbers)
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result, config: Config) -> None:
    """Paths on the quadratic, the error and its closed form, and the regression by batch size."""
    distance = np.linalg.norm(result.errors, axis=-1)
    times = ", ".join(
        f"{d[-1] / d[0]:.2g} × at {f:g}" for f, d in zip(config.fractions, distance, strict=True)
    )
    after = ", ".join(
        f"{e:.2g} with {size}"
        for size, e in zip(config.batch_sizes, result.excess[:, 1], strict=True)
    )
    title = (
        f"In {config.steps} steps the error becomes {times} of the bound 2/curvature, as its "
        f"closed form says to {result.difference:.0e}; "
        f"one epoch of SGD leaves an excess loss of {after} examples a step"
    )
    with figure(path, title, columns=3, size=(13, 4.9)) as (_, (left, middle, right)):
        draw_paths(left, result, config)
        markers = "osv^Dx"
        for i, (fraction, d) in enumerate(zip(config.fractions, distance, strict=True)):
            colour = COLOURS[i % len(COLOURS)]
            middle.semilogy(
                np.linalg.norm(result.closed_form[i], axis=-1),
                color=colour,
                label=f"{fraction:g} of the bound",
            )
            middle.semilogy(d, markers[i % len(markers)], color=colour, markersize=4)
        middle.plot(
            [], [], "o", color="#777777", markersize=4, label="measured (lines: closed form)"
        )
        middle.set(xlabel="step", ylabel="distance to the optimum")
        middle.legend(fontsize=10)
        epochs = np.arange(1, config.epochs + 1)
        for i, (size, excess, last) in enumerate(
            zip(config.batch_sizes, result.excess, final(result.excess), strict=True)
        ):
            colour = COLOURS[i % len(COLOURS)]
            right.loglog(epochs, excess[1:], linewidth=0.6, alpha=0.35, color=colour)
            right.loglog(
                epochs,
                running_mean(excess[1:]),
                color=colour,
                label=f"{size} a step, at the end {last:.2g}",
            )
        right.plot(
            [],
            [],
            linewidth=0.6,
            alpha=0.5,
            color="#777777",
            label="every epoch (lines: mean of ± 10 %)",
        )
        right.set(xlabel="epoch", ylabel="excess loss (variances of the target)")
        right.set_ylim(bottom=result.excess[result.excess > 0].min() / 5)
        right.legend(fontsize=9, loc="lower left")


def draw_paths(axes: Any, result: Result, config: Config) -> None:
    """The first 15 steps over lines of equal loss."""
    limit = 1.2 * np.abs(START - BEST).max()
    grid = np.stack(
        np.meshgrid(
            BEST[0] + np.linspace(-limit, limit, 201), BEST[1] + np.linspace(-limit, limit, 201)
        ),
        axis=-1,
    )
    loss = (((grid - BEST) @ AXES) ** 2 * config.curvatures).sum(-1) / 2
    axes.contour(
        *np.moveaxis(grid, -1, 0), np.sqrt(loss), levels=8, colors="#BBBBBB", linewidths=0.8
    )
    for fraction, weights in zip(config.fractions, result.paths, strict=True):
        axes.plot(
            *weights[:16].T, "o-", markersize=3, linewidth=1, label=f"{fraction:g} of the bound"
        )
    axes.plot(*BEST, "k*", markersize=13, label="optimum", zorder=5)
    low, high = BEST - limit, BEST + limit
    axes.set(
        xlabel="weight w₁",
        ylabel="weight w₂",
        xlim=(low[0], high[0]),
        ylim=(low[1], high[1]),
        aspect="equal",
    )
    axes.grid(visible=False)
    axes.legend(fontsize=10, loc="upper right", frameon=True, framealpha=1, edgecolor="none")
