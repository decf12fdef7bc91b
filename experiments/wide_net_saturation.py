"""Which weights saturate the units of a wide net?

    python -m experiments wide-net-saturation

Draws nets with several hidden layers of equal width, with weights from N(0, 1) and from N(0,
1/fan_in), and sends standard normal inputs, as many as the layers are wide, through them. A unit is
saturated on an example where its output is within 1 % of its limit (|tanh z| > .99; sigmoid below
.01 or above .99). Then it passes hardly any gradient on: measured is also the mean slope, relative
to the greatest (1 for tanh, 1/4 for sigmoid). In the first layer of a wide net z ~ N(0, variance *
width), which gives the share.

Expect at width 1,000, in the first layer, 93.3 % of tanh and 88.5 % of sigmoid units saturated by
weights from N(0, 1), as the normal distribution says to 0.1 %, and 0.8 % and less than 0.001 % by
N(0, 1/fan_in). The mean slope falls with 1 / sqrt(width) in the first case, to 2.5 % (tanh), and
stays at 61 % in the second. Takes about 7 seconds.

Source: lecture 004 (random initialisation), 002 and 003 (saturation).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal

import fnn
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    plain_numbers,
    print_table,
    progress,
    save_metrics,
)
from fnn import activations

LIMITS = {"tanh": math.atanh(0.99), "sigmoid": math.log(99)}  # beyond this |z| a unit is saturated
STEEPEST = {"tanh": 1.0, "sigmoid": 0.25}
# the variance
WEIGHTS = {"N(0, 1)": lambda fan_in: 1.0, "N(0, 1/fan_in)": lambda fan_in: 1 / fan_in}


@dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (3, 10, 30, 100, 300, 1000)
    """Units in every layer, and inputs."""
    layers: int = 3
    """Hidden layers."""
    examples: int = 200
    """Inputs that are sent through."""
    nets: int = 5
    """Nets of each kind; the figures are their means."""
    seed: int = 0
    """Of the inputs and the weights."""
    out: Path | None = None
    """Run folder; runs/wide-net-saturation if not given."""


TINY = Config(widths=(3, 30), layers=2, examples=20, nets=2)


class Curve(NamedTuple):
    """One activation with one kind of weights."""

    activation: str
    weights: str
    saturated: np.ndarray  # [widths, layers]: the share of units and examples
    slope: np.ndarray  # [widths, layers]: the mean slope, relative to the greatest
    expected: np.ndarray  # [widths]: the share in the first layer, by the normal distribution


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> list[Curve]:
    """Measures every activation with both kinds of weights.

    `advance(text)` is called after every width.
    """
    check(config)
    found: dict[tuple[str, str], list[np.ndarray]] = {
        (unit, weights): [] for unit in LIMITS for weights in WEIGHTS
    }
    for width in config.widths:
        for kind, measured in measure(config, width).items():
            found[kind].append(measured)
        advance(f"width {width}")
    curves = []
    for (unit, weights), measured in found.items():
        deviations = [math.sqrt(WEIGHTS[weights](width) * width) for width in config.widths]
        expected = np.array([share_beyond(LIMITS[unit] / deviation) for deviation in deviations])
        saturated, slope = np.moveaxis(np.array(measured), 1, 0)
        curves.append(Curve(unit, weights, saturated, slope, expected))
    return curves


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "layers", "examples", "nets", "widths", whole=True)
    if not config.widths:
        raise ValueError("`widths` is empty: give one at least, `--widths 100`.")
    fnn.key(config.seed)


def share_beyond(limit: float) -> float:
    """P(|z| > limit) for a standard normal z."""
    return math.erfc(limit / math.sqrt(2))


def measure(config: Config, width: int) -> dict[tuple[str, str], np.ndarray]:
    """Share of saturated units and mean relative slope, layer by layer, `[2, layers]`, for every
    activation and kind of weights."""
    dense = fnn.dense(width, width, kernel_init=normal(1.0))
    init = jax.jit(fnn.repeat(dense, config.layers).init)
    means = {
        unit: jax.jit(functools.partial(layer_means, unit, dense, config.layers)) for unit in LIMITS
    }
    sums: dict[tuple[str, str], np.ndarray] = {}
    for key in jax.random.split(fnn.key(config.seed), config.nets):
        x_key, key = jax.random.split(key)
        x, standard = jax.random.normal(x_key, (config.examples, width)), init(key)
        for weights, variance in WEIGHTS.items():
            params = standard._replace(w=math.sqrt(variance(width)) * standard.w)
            for unit in LIMITS:
                sums[unit, weights] = sums.get((unit, weights), 0.0) + np.asarray(
                    means[unit](params, x)
                )
    return {kind: total / config.nets for kind, total in sums.items()}


def layer_means(unit: str, dense: fnn.Layer, layers: int, params: Any, x: Any) -> Any:
    """Of one net and its inputs.

    Share of saturated units and mean relative slope in every layer, `[2, layers]`.
    """
    activation = activations.get(unit)
    net = fnn.repeat(fnn.serial(dense, activation), layers)
    _, (_, (z, a)) = net.forward((params, ()), x)  # [layers, examples, width]
    slope = activation.backward((), (z, a), jnp.ones_like(z))[1] / STEEPEST[unit]
    return jnp.stack([(jnp.abs(z) > LIMITS[unit]).mean((1, 2)), slope.mean((1, 2))])


def main(config: Config) -> None:
    """Prints the table, saves `wide-net-saturation.png` and `metrics.json`."""
    check(config)
    path = folder("wide-net-saturation", config.out)
    with progress(len(config.widths), "measuring") as advance:
        curves = run(config, advance)
    for name, what in (
        ("saturated", "Saturated units (%)"),
        ("slope", "Mean slope (% of the greatest)"),
    ):
        rows = [
            (
                f"{curve.activation}, {curve.weights}, {layer + 1}",
                *(f"{100 * share:.2f}" for share in getattr(curve, name)[:, layer]),
            )
            for curve in curves
            for layer in sorted({0, config.layers - 1})
        ]
        rows += [
            (f"{c.activation}, {c.weights}, expected", *(f"{100 * s:.2f}" for s in c.expected))
            for c in curves
            if name == "saturated"
        ]
        print_table(f"{what} by width", ("units, weights, layer", *map(str, config.widths)), rows)
    draw(path / "wide-net-saturation.png", curves, config)
    save_metrics(path, config, curves)
    print(f"picture and metrics in {path}")


def sentence(curves: list[Curve], config: Config) -> str:
    of = {
        kind: [
            f"{100 * c.saturated[-1, 0]:.2g} % of {c.activation}"
            for c in curves
            if c.weights == kind
        ]
        for kind in WEIGHTS
    }
    shares = " units; ".join(
        f"weights from {kind} saturate {' and '.join(parts)}" for kind, parts in of.items()
    )
    return f"In the first layer, {config.widths[-1]:,} units wide, {shares} units".replace(
        "N(0, 1", "N(0,\N{NO-BREAK SPACE}1"
    )


def draw(path: Path, curves: list[Curve], config: Config) -> None:
    """Share of saturated units against width, with what a normal z gives; the mean slope."""
    with figure(path, sentence(curves, config), columns=2, size=(10, 4.4)) as (_, (left, right)):
        for curve in curves:
            colour, marker = (
                COLOURS[list(LIMITS).index(curve.activation)],
                "o" if curve.weights == "N(0, 1)" else "s",
            )
            label = f"{curve.activation}, {curve.weights}"
            left.plot(
                config.widths, 100 * curve.expected, color=colour, linestyle=":", linewidth=1.2
            )
            left.plot(config.widths, 100 * curve.saturated[:, 0], marker, color=colour, label=label)
            right.plot(
                config.widths,
                100 * curve.slope[:, 0],
                "-",
                marker=marker,
                color=colour,
                label=label,
            )
        left.plot([], [], "k:", linewidth=1.2, label="expected of a normal z")
        left.set(ylabel="saturated units, first layer (%)", ylim=(-3, 103))
        right.set(
            ylabel="mean slope, first layer (% of the greatest)", yscale="log", ylim=(None, 100)
        )
        plain_numbers(right.yaxis)
        for axis in (left, right):
            axis.set(xlabel="width (units a layer, and inputs)", xscale="log")
            axis.xaxis.set_major_formatter("{x:,.0f}")
        left.legend(fontsize=9)
