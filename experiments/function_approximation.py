"""How well do nets of different widths approximate an unknown function from noisy samples?

    python -m experiments function-approximation

The function is sin 2x + 0.5 sin 5x on -3 ... 3; a net sees 200 samples of it with noise. For every
width, from several starts, a net with one hidden layer of tanh units is fitted, and its error is
measured against the function itself, which no net has seen.

Expect a root-mean-square error of 0.74 with one unit, 0.36 with 4, 0.07 with 16 and 0.05 with 32:
less than the noise of a single sample,
0.1, since a fit averages over samples. Takes about 10 seconds.

The first layer's weights and biases are drawn from N(0, 2²), so that its ramps start steep and
spread over the interval. With the start of `fnn.mlp`, He's weights and all biases 0, 32 units only
come to an error of 0.35 in as many steps.

Source: lecture 001, approximating unknown functions.
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
from jax.nn.initializers import normal

import fnn
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    mean_std,
    plain_numbers,
    print_table,
    progress,
    save_metrics,
)

# where errors are measured and pictures drawn
X = np.linspace(-3, 3, 601, dtype=np.float32)[:, None]


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Hidden units of each net, from few to many."""
    samples: int = 200
    """Points of the function that a net is fitted to."""
    noise: float = 0.1
    """Standard deviation of what is added to every sample."""
    learning_rate: float = 0.05
    """Adam's step size at the start; it falls to 0 along a cosine."""
    epochs: int = 200
    """Passes over the samples."""
    batch_size: int = 25
    """Samples per step."""
    starts: int = 10
    """Nets of each width, which differ in their first parameters and shuffles."""
    seed: int = 0
    """Of the samples, the parameters and the shuffles."""
    out: Path | None = None
    """Run folder; runs/function-approximation if not given."""


TINY = Config(widths=(1, 4), epochs=3, starts=3)


class Fits(NamedTuple):
    """All starts of one width."""

    units: int
    error: np.ndarray  # [starts]: root mean square of net minus function
    residual: np.ndarray  # [starts]: root mean square of net minus noisy samples
    median: np.ndarray  # [points]: the net of median error


class Result(NamedTuple):
    """The samples and what was fitted to them."""

    x: np.ndarray  # [samples, 1]
    y: np.ndarray  # [samples, 1]
    fits: tuple[Fits, ...]


def function(x: np.ndarray) -> np.ndarray:
    """What the nets do not know."""
    return np.sin(2 * x) + 0.5 * np.sin(5 * x)


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Fits nets of every width. `advance(text)` is called after every width."""
    check(config)
    rng = np.random.default_rng(config.seed)
    x = rng.uniform(-3, 3, (config.samples, 1)).astype(np.float32)
    y = (function(x) + rng.normal(0, config.noise, x.shape)).astype(np.float32)
    fits = []
    for width in config.widths:
        fits.append(fit(config, width, x, y))
        advance(f"{width} units, error {fits[-1].error.mean():.3f}")
    return Result(x, y, tuple(fits))


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "widths", "samples", "epochs", "batch_size", "starts", whole=True)
    if not config.widths:
        raise ValueError("`widths` is empty: give one at least, `--widths 8`.")
    check_positive(config, "noise", "learning_rate")
    fnn.key(config.seed)


def fit(config: Config, width: int, x: np.ndarray, y: np.ndarray) -> Fits:
    """Fits the nets of one width at once."""
    spread = normal(2.0)
    net = fnn.serial(
        fnn.dense(1, width, kernel_init=spread, bias_init=spread),
        fnn.activations.tanh,
        fnn.dense(width, 1),
    )
    steps = config.epochs * -(-config.samples // config.batch_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    keys = jax.random.split(fnn.key(config.seed), config.starts)
    settings = {"epochs": config.epochs, "batch_size": config.batch_size, "keys": keys}
    params, history = fnn.fit_many(
        fnn.rules.backprop(net, fnn.losses.l2_loss), optimizer, net.init, (x, y), **settings
    )
    if not np.isfinite(history.loss).all():
        raise ValueError(f"Nets of {width} units diverge. Choose a lower `learning_rate`.")
    predict = jax.jit(jax.vmap(net.apply, in_axes=(0, None)))
    curves, at_samples = np.split(
        np.asarray(predict(params, jnp.asarray(np.concatenate([X, x]))))[..., 0], [len(X)], axis=1
    )
    error = np.sqrt(((curves - function(X)[None, :, 0]) ** 2).mean(1))
    residual = np.sqrt(((at_samples - y[None, :, 0]) ** 2).mean(1))
    return Fits(width, error, residual, curves[np.argsort(error)[config.starts // 2]])


def main(config: Config) -> None:
    check(config)
    path = folder("function-approximation", config.out)
    with progress(len(config.widths), "fitting") as advance:
        result = run(config, advance)
    rows = [
        (fits.units, mean_std(list(fits.error), 3), mean_std(list(fits.residual), 3))
        for fits in result.fits
    ]
    title = (
        f"Root-mean-square errors, {config.starts} starts, {config.samples} samples, noise "
        f"{config.noise:g}"
    )
    print_table(title, ("hidden units", "to the function", "to the noisy samples"), rows)
    draw(path / "function-approximation.png", result, config)
    save_metrics(path, config, [fits._asdict() | {"median": None} for fits in result.fits])
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result, config: Config) -> None:
    """The samples with the narrowest, the middle and the widest net.

    And the error against the width.
    """
    first, last = result.fits[0], result.fits[-1]
    errors = [fits.error.mean() for fits in result.fits]
    change = (
        f"goes from {errors[0]:.2f} with {_units(first)} to {errors[-1]:.2f} with {_units(last)}"
    )
    title = f"The error of the fit {change}; the noise of a sample is {config.noise:g}"
    with figure(path, title, columns=2, size=(10.5, 4.3)) as (_, (left, right)):
        left.plot(
            *(a[:, 0] for a in (result.x, result.y)),
            ".",
            color="#999999",
            markersize=5,
            label="samples",
        )
        left.plot(
            X[:, 0], function(X)[:, 0], color="black", linewidth=3, alpha=0.35, label="function"
        )
        shown = sorted({0, len(result.fits) // 2, len(result.fits) - 1})
        for colour, style, i in zip(
            (COLOURS[1], COLOURS[3], COLOURS[0]), (":", "--", "-"), shown, strict=False
        ):
            left.plot(
                X[:, 0], result.fits[i].median, style, color=colour, label=_units(result.fits[i])
            )
        left.set(xlabel="x", ylabel="y", ylim=(-2, 3.1), title="nets of median error")
        left.legend(fontsize=9, ncols=3, loc="upper center")
        widths = [fits.units for fits in result.fits]
        right.loglog(
            widths,
            [fits.error for fits in result.fits],
            "o",
            color=COLOURS[0],
            alpha=0.35,
            markersize=4,
        )
        right.loglog(
            widths,
            errors,
            color=COLOURS[0],
            label=f"to the function (dots: {config.starts} starts)",
        )
        right.loglog(
            widths,
            [fits.residual.mean() for fits in result.fits],
            "--",
            color=COLOURS[1],
            label="to the noisy samples",
        )
        right.axhline(config.noise, color="black", linewidth=1, linestyle=":", label="noise")
        right.set(xlabel="hidden units", ylabel="root-mean-square error", xticks=widths)
        right.xaxis.set_major_formatter("{x:g}")
        right.minorticks_off()
        plain_numbers(right.yaxis)
        right.legend(fontsize=9)


def _units(fits: Fits) -> str:
    return f"{fits.units} unit{'s' if fits.units > 1 else ''}"
