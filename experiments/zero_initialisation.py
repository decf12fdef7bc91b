"""What can a net learn whose weights all start at zero?

    python -m experiments zero-initialisation

Trains nets with two hidden layers on the flower, of whose second class only every third point is
kept, so that the classes are unequal: sigmoid and ReLU, from zero and from random weights (He), by
gradient descent on the whole set. After every step it measures how far apart the units of a hidden
layer are: the largest difference between their incoming weights, or their biases.

Expect a spread of exactly 0 between sigmoid units over 2000 steps: the net learns, but as if it had
one unit in each layer, and is right on 74.9 % of the points, as the larger class alone; from random
weights 92.5 %. With ReLU nothing but the last bias ever moves, to logit(mean y) = -1.0936; from
random weights 94.4 %. One thing the algebra does not say: at some widths (17 and 33 of those tried,
none up to 16) the sum for every unit is not rounded alike, and sigmoid units come apart by 1e-8 to
2e-7. Takes about 6 seconds.

Source: lecture 004, eqs 14-20.
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
from jax.nn.initializers import he_normal, zeros

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
from fnn.nets.activations import Name

ACTIVATIONS: tuple[Name, ...] = ("sigmoid", "relu")
STARTS = {"zero": zeros, "random": he_normal()}


@dataclass(frozen=True)
class Config:
    width: int = 6
    """Units in each of the two hidden layers, at least 2."""
    learning_rate: float = 0.5
    """Step size of gradient descent."""
    steps: int = 2000
    """Steps, each on all points."""
    keep: int = 3
    """Of the second class one point in so many is kept."""
    seed: int = 0
    """Of the data and of the random weights."""
    out: Path | None = None
    """Run folder; runs/zero-initialisation if not given."""


TINY = Config(width=3, steps=20)


class Training(NamedTuple):
    """One net; parameters are those before the first step and after each."""

    loss: np.ndarray  # [steps], nats, before each step
    weights: np.ndarray  # [steps + 1, width]: from the first input to the units of the first layer
    spread: np.ndarray  # [steps + 1]: greatest difference between the units of a hidden layer
    last_bias: np.ndarray  # [steps + 1]
    others_moved: float  # how far any other parameter has ever been from its start
    accuracy: float  # after the last step


class Result(NamedTuple):
    share: float  # of class 1: mean y
    logit: float  # ln(share / (1 - share))
    nets: dict[str, Training]  # by activation and start: "sigmoid zero", ...


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Trains the four nets. `advance(text)` is called after each."""
    check(config)
    data = load("flower", seed=config.seed)
    x, t = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.t_train, data.t_test])
    rows = np.concatenate([np.flatnonzero(t == 0), np.flatnonzero(t == 1)[:: config.keep]])
    x, y = x[rows], t[rows, None].astype(np.float32)
    nets = {}
    for activation in ACTIVATIONS:
        for start in STARTS:
            nets[f"{activation} {start}"] = train(config, activation, start, x, y)
            advance(f"{activation} {start}")
    share = float(y.mean())
    return Result(share, float(np.log(share / (1 - share))), nets)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "width", "steps", "keep", whole=True)
    check_positive(config, "learning_rate")
    if config.width < 2:
        raise ValueError(
            f"`width` must be at least 2, since units are compared, got {config.width}."
        )
    fnn.key(config.seed)


def train(config: Config, activation: Name, start: str, x: np.ndarray, y: np.ndarray) -> Training:
    """Gradient descent on all points, with every step's parameters kept."""
    net = fnn.mlp((2, config.width, config.width, 1), activation, kernel_init=STARTS[start])
    rule, optimizer = (
        fnn.rules.backprop(net, fnn.losses.sigmoid_binary_cross_entropy),
        optax.sgd(config.learning_rate),
    )
    step = training.step(rule, optimizer)
    init_key, rule_key = jax.random.split(fnn.key(config.seed))

    def body(state: training.TrainState, _: None) -> tuple[training.TrainState, Any]:
        after, value = step(state, jnp.asarray(x), jnp.asarray(y))
        return after, (value, state.params)

    @jax.jit
    def descend() -> Any:
        return jax.lax.scan(
            body,
            training.init(rule, optimizer, net.init(init_key), rule_key),
            None,
            length=config.steps,
        )

    state, (loss, path) = jax.tree.map(np.asarray, descend())
    if not np.isfinite(loss).all():
        raise ValueError(
            f"The {activation} net diverges from {start} weights. Choose a lower `learning_rate`."
        )
    path = jax.tree.map(
        lambda before, end: np.append(before, end[None], axis=0), path, state.params
    )
    (first, _), (second, _), last = path  # every leaf [steps + 1, ...]
    spread = np.max(
        [np.ptp(leaf, axis=-1).reshape(config.steps + 1, -1).max(-1) for leaf in (*first, *second)],
        axis=0,
    )
    moved = max(float(np.abs(leaf - leaf[:1]).max()) for leaf in (*first, *second, last.w))
    accuracy = fnn.evaluate(rule, state.params, (x, y))["accuracy"]
    return Training(loss, first.w[:, 0], spread, last.b[:, 0], moved, accuracy)


def main(config: Config) -> None:
    """Prints a table, saves `zero-initialisation.png` and `metrics.json`."""
    check(config)
    path = folder("zero-initialisation", config.out)
    with progress(len(ACTIVATIONS) * len(STARTS), "training") as advance:
        result = run(config, advance)
    rows = [
        (
            name,
            f"{net.spread.max():.3g}",
            f"{net.others_moved:.3g}",
            f"{net.last_bias[-1]:.4f}",
            f"{net.loss[-1]:.4f}",
            f"{100 * net.accuracy:.1f} %",
        )
        for name, net in result.nets.items()
    ]
    head = ("net, start", "spread", "others moved", "last bias", "loss", "right")
    print_table(
        f"{config.steps} steps from zero and from random weights: greatest spread between the "
        "units of a layer",
        head,
        rows,
    )
    larger = 100 * max(result.share, 1 - result.share)
    print(
        f"mean y {result.share:.4f}, its logit {result.logit:.4f}; the larger class is "
        f"{larger:.1f} % of the points"
    )
    draw(path / "zero-initialisation.png", result)
    save_metrics(
        path,
        config,
        result._replace(nets={name: net._replace(weights=()) for name, net in result.nets.items()}),
    )
    print(f"picture and metrics in {path}")


def sentence(result: Result) -> str:
    sigmoid, relu = result.nets["sigmoid zero"], result.nets["relu zero"]
    spread, moved = float(sigmoid.spread.max()), relu.others_moved
    units = "stay identical to the last bit" if spread == 0 else f"come apart by {spread:.1g}"
    others = (
        "only the last bias moves"
        if moved == 0
        else f"not only the last bias moves (others by {moved:.1g}); it comes"
    )
    return (
        f"From zero, the sigmoid units of a layer {units} over {len(sigmoid.loss)} steps; with "
        f"ReLU {others}, to {relu.last_bias[-1]:.3f}, where logit(mean y) is {result.logit:.3f}"
    )


def draw(path: Path, result: Result) -> None:
    """The sigmoid units' weights; what moves in the ReLU net; the losses of all four."""
    colours = dict(zip(result.nets, COLOURS, strict=False))
    with figure(path, sentence(result), columns=3, size=(10, 4.0)) as (_, (left, middle, right)):
        for name, width in (("sigmoid random", 1.2), ("sigmoid zero", 3)):
            lines = left.plot(result.nets[name].weights, color=colours[name], linewidth=width)
            lines[0].set_label(f"{name.split()[1]} start, {len(lines)} units")
        low, high = (
            result.nets["sigmoid random"].weights.min(),
            result.nets["sigmoid random"].weights.max(),
        )
        left.set(
            xlabel="step",
            ylabel="weight from $x_1$ to a hidden unit",
            title="sigmoid, first layer",
            ylim=(1.1 * low, 1.7 * high),
        )
        relu = result.nets["relu zero"]
        middle.plot(relu.last_bias, color=colours["relu zero"], label="last bias")
        middle.axhline(
            result.logit, color="black", linestyle="--", linewidth=1.2, label="logit(mean y)"
        )
        middle.axhline(relu.others_moved, color="#808080", label="any other, at most")
        middle.set(
            xlabel="step",
            ylabel="parameter",
            title="ReLU, zero start",
            xlim=(0, max(len(relu.loss) // 20, 5)),
        )
        for (name, net), dash in zip(result.nets.items(), ("-", "-", "--", "--"), strict=True):
            right.plot(
                net.loss, color=colours[name], linestyle=dash, label=name.replace("relu", "ReLU")
            )
        right.set(
            xlabel="step",
            ylabel="loss (nats)",
            title="training loss",
            ylim=(0, 1.4 * result.nets["sigmoid random"].loss.max()),
        )
        for axis in (left, middle, right):
            axis.legend(
                fontsize=9,
                loc="best" if axis is middle else "upper right" if axis is right else "upper left",
            )
