"""Where does each activation learn, where does it saturate, and how is softplus a sum of sigmoids?

    python -m experiments activations

Draws every activation of fnn.activations with its hand-written derivative, from the one that is
flat least to the one that is flat most. It saturates where |derivative| < 0.005, as a share of [-8,
8]: there hardly anything of a gradient comes through. Expect 0 % for identity, leaky_relu (whose
slope on the left is 0.01), soft_sign and squareplus, 34 % for sigmoid, 50 % for relu, 58 % for tanh
and 100 % for the threshold neuron `step`, through which backprop learns nothing. Of softmax, which
is no function of one number, the first of two outputs stands here, softmax(x, 0), which is
sigmoid(x).

For inputs from N(0, 1) the outputs of sigmoid are 0.5 on average and those of relu 0.4: they are
not zero-centred. Those of tanh are, at 0.

Softplus, ln(1 + e^x), is nearly the sum of the shifted sigmoids s(x + 1/2 - i) over i = 1, 2, 3,
...: the greatest error is 0.01058, at x = 0. Summed from i = 0, as the lecture prints it, it is
nearly ln(1 + e^(x + 1)) instead, and up to 1 too large. Takes about 4 seconds.

Source: lectures 000 (threshold, sigmoid, ReLU, softplus), 002 (tanh; saturation, not zero-centred),
003 (leaky ReLU); all in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

import fnn
from experiments._run import COLOURS, check_positive, figure, folder, print_table, save_metrics
from fnn.nets.activations import ACTIVATIONS, sigmoid, softmax, softplus


@dataclass(frozen=True)
class Config:
    limit: float = 8.0
    """Activations are measured and drawn for inputs from -limit to limit."""
    threshold: float = 0.005
    """An activation saturates where the derivative is nearer to 0 than this."""
    points: int = 16_001
    """Inputs on the axis, evenly spaced; an odd number has 0 among them."""
    out: Path | None = None
    """Run folder; runs/activations if not given."""


TINY = Config(points=161)


class Curve(NamedTuple):
    """One activation on the axis."""

    y: np.ndarray  # [points]
    derivative: np.ndarray  # [points]
    saturated: float  # share of the axis, 0 ... 1
    greatest: float  # the greatest |derivative|
    mean: float  # of the outputs, for inputs from N(0, 1)


class Softplus(NamedTuple):
    """Softplus and the sums of shifted sigmoids, `[points]`."""

    y: np.ndarray
    shifted: np.ndarray  # [terms + 1, points]: s(x + 1/2 - i), i = 0 ... terms
    error_from_one: np.ndarray  # sum over i >= 1, less ln(1 + e^x)
    error_from_zero: np.ndarray  # sum over i >= 0, less ln(1 + e^x)
    error_to_next: np.ndarray  # sum over i >= 0, less ln(1 + e^(x + 1))


class Result(NamedTuple):
    """What was measured."""

    x: np.ndarray  # [points]
    curves: dict[str, Curve]
    softplus: Softplus


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "limit", "threshold")
    check_positive(config, "points", whole=True)
    if config.limit > 100:
        raise ValueError(
            "`limit` must be at most 100, since softplus is summed up of as many sigmoids; got "
            f"{config.limit:g}."
        )


def run(config: Config) -> Result:
    """Evaluates every activation and its derivative in float64."""
    check(config)
    with jax.enable_x64(True):
        x = jnp.linspace(-config.limit, config.limit, config.points)
        curves = {
            activation.name: curve(activation, x, config.threshold) for activation in ACTIVATIONS
        }
        terms = math.ceil(config.limit) + 20  # further ones are below 1e-8 on the axis
        return Result(np.asarray(x), curves, softplus_sums(x, terms))


def curve(activation: fnn.Layer, x: Any, threshold: float) -> Curve:
    """Outputs and derivatives on the axis, and what the outputs are on average for inputs from N(0,
    1): for as many of its quantiles."""
    y, slope = outputs(activation, x)
    mean, _ = outputs(activation, ndtri(jnp.asarray((np.arange(len(x)) + 0.5) / len(x))))
    saturated, greatest = float((jnp.abs(slope) < threshold).mean()), float(jnp.abs(slope).max())
    return Curve(np.asarray(y), np.asarray(slope), saturated, greatest, float(mean.mean()))


def outputs(activation: fnn.Layer, x: Any) -> tuple[Any, Any]:
    """Outputs, and derivatives by the layer's own backward pass.

    Of softmax its first output for the inputs (x, 0).
    """
    if activation is softmax:
        y, residuals = softmax.forward((), jnp.stack([x, jnp.zeros_like(x)], axis=-1))
        first = jnp.stack([jnp.ones_like(x), jnp.zeros_like(x)], axis=-1)
        return y[:, 0], softmax.backward((), residuals, first)[1][:, 0]
    y, residuals = activation.forward((), x)
    return y, activation.backward((), residuals, jnp.ones_like(y))[1]


def softplus_sums(x: Any, terms: int) -> Softplus:
    """The sums from i = 1 and from i = 0, against the functions that they tend to."""
    shifted = jnp.stack([sigmoid.apply((), x + 0.5 - i) for i in range(terms + 1)])
    y, next_y = softplus.apply((), x), softplus.apply((), x + 1)
    from_one, from_zero = shifted[1:].sum(0), shifted.sum(0)
    return Softplus(*map(np.asarray, (y, shifted, from_one - y, from_zero - y, from_zero - next_y)))


def worst(x: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """The greatest absolute error and where it is."""
    i = int(np.abs(error).argmax())
    return float(abs(error[i])), float(x[i])


def main(config: Config) -> None:
    check(config)
    path = folder("activations", config.out)
    result = run(config)
    rows = [
        (name, f"{100 * c.saturated:.1f} %", f"{c.greatest:.3f}", decimals(c.mean, 3))
        for name, c in ordered(result)
    ]
    columns = (
        "activation",
        f"|derivative| < {config.threshold:g}",
        "greatest |derivative|",
        "mean output",
    )
    print_table(
        f"Saturation for inputs from -{config.limit:g} to {config.limit:g}; mean output for "
        "N(0, 1)",
        columns,
        rows,
    )
    sums = {
        name: worst(result.x, error)
        for name, error in result.softplus._asdict().items()
        if name.startswith("error")
    }
    names = (
        "from i = 1, against ln(1 + e^x)",
        "from i = 0, against ln(1 + e^x)",
        "from i = 0, against ln(1 + e^(x+1))",
    )
    rows = [
        (name, f"{error:.5f}", f"{x:.2f}")
        for name, (error, x) in zip(names, sums.values(), strict=True)
    ]
    print_table("Sums of the sigmoids s(x + 1/2 - i)", ("sum", "greatest error", "at x ="), rows)
    draw(path / "activations.png", result, config)
    shares = {
        name: {"saturated": c.saturated, "greatest_derivative": c.greatest, "mean": c.mean}
        for name, c in result.curves.items()
    }
    save_metrics(path, config, {"activations": shares, "softplus": sums})
    print(f"picture and metrics in {path}")


def decimals(value: float, digits: int = 2) -> str:
    """A number, whose 0 has no sign.

    >>> decimals(-0.001), decimals(-0.81)
    ('0.00', '−0.81')
    """
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def ordered(result: Result) -> list[tuple[str, Curve]]:
    """The activations by the share of the axis on which they saturate."""
    return sorted(result.curves.items(), key=lambda item: item[1].saturated)


def sentence(result: Result, config: Config) -> str:
    """What the picture shows."""
    saturated = {name: f"{100 * curve.saturated:.1f} %" for name, curve in result.curves.items()}
    mean = {name: decimals(curve.mean) for name, curve in result.curves.items()}
    error, where = worst(result.x, result.softplus.error_from_one)
    return (
        f"The slope is below {config.threshold:g} on {saturated['sigmoid']} of [−{config.limit:g}, "
        f"{config.limit:g}] for sigmoid, on {saturated['tanh']} for tanh, {saturated['relu']} for "
        f"ReLU, {saturated['leaky_relu']} for leaky ReLU; for inputs from N(0, 1) the mean output "
        f"is {mean['sigmoid']} of sigmoid, {mean['tanh']} of tanh, {mean['relu']} of ReLU; "
        f"softplus is a sum of shifted sigmoids to within {error:.4f}, at x = {decimals(where, 1)}"
    )


def draw(path: Path, result: Result, config: Config) -> None:
    """A panel for every activation; below, softplus and the sums of sigmoids."""
    with figure(path, sentence(result, config), size=(10, 12)) as (fig, axes):
        axes.remove()
        parts: Any = fig.subfigures(2, 1, height_ratios=(3, 1.1))
        draw_activations(parts[0], result, config)
        draw_softplus(parts[1].subplots(1, 2), result)


def draw_activations(fig: Any, result: Result, config: Config) -> None:
    """Small multiples on the same axes; shaded where the activation saturates."""
    columns = 6
    panels = fig.subplots(
        -(-len(result.curves) // columns), columns, sharex=True, sharey=True
    ).ravel()
    for axis, (name, found) in zip(panels, ordered(result), strict=False):
        flat = np.abs(found.derivative) < config.threshold
        axis.fill_between(
            result.x,
            0,
            1,
            where=flat,
            transform=axis.get_xaxis_transform(),
            color="#DDDDDD",
            linewidth=0,
            label="saturated",
        )
        axis.plot(result.x, found.y, color=COLOURS[0], label="activation")
        axis.plot(result.x, found.derivative, color=COLOURS[1], linestyle="--", label="derivative")
        axis.set_title(
            f"{name}\n{100 * found.saturated:.1f} %, mean {decimals(found.mean)}", fontsize=9.5
        )
        axis.set(xlim=(-config.limit, config.limit), ylim=(-1.3, 2.3), yticks=(-1, 0, 1, 2))
    for axis in panels[len(result.curves) :]:
        axis.axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", fontsize=11)
    fig.supxlabel(
        "input x; the percentage is the saturated (shaded) share, the mean that of the outputs for "
        "inputs from N(0, 1)",
        fontsize=10,
    )


def draw_softplus(axes: Any, result: Result) -> None:
    """Left the sigmoids and their sum; right how far the sums are from softplus."""
    (left, right), x, sums = axes, result.x, result.softplus
    left.plot(x, sums.shifted[1:].T, color="#AAAAAA", linewidth=1)
    left.plot([], [], color="#AAAAAA", linewidth=1, label="σ(x + ½ − i), i = 1, 2, ...")
    left.plot(x, sums.y + sums.error_from_one, color=COLOURS[0], label="their sum")
    left.plot(x, sums.y, color=COLOURS[1], linestyle="--", label="softplus, ln(1 + eˣ)")
    left.set(xlabel="input x", ylabel="output", xlim=(-4, 4), ylim=(-0.2, 4.2))
    left.legend(loc="upper left", fontsize=10)
    right.semilogy(x, np.abs(sums.error_from_one), label="from i = 1, to ln(1 + eˣ)")
    right.semilogy(x, np.abs(sums.error_from_zero), "--", label="from i = 0, to ln(1 + eˣ)")
    right.semilogy(x, np.abs(sums.error_to_next), ":", label="from i = 0, to ln(1 + eˣ⁺¹)")
    right.set(xlabel="input x", ylabel="|sum − function|", ylim=(1e-8, 10))
    right.legend(loc="lower center", fontsize=10)
