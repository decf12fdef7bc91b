"""Which hidden units die from too long a step or from a bad bias, and does one ever come back?

    python -m experiments dead-relu

A unit is dead if the derivative of its activation is exactly 0 on every training example. One
hidden layer of 64 units learns digits by plain SGD, with several activations: by learning rates
from 0.1 to 4, and from biases of 0 down to -4. Of the ReLU units expect 2 or 3 % to be dead before
training, 9 to 30 % after ten epochs by a rate of 1, 91 to 97 % by 1.5 and 98 to 100 % by 2, where
the net only guesses; a first bias of -1 kills 39 to 48 %, -4 all (over seeds 0 ... 4). No leaky
unit dies. Units of elu and gelu die as well, 0 to 5 % by a rate of
1.5 and 20 to 53 % by 4, for their derivatives come so near to 0 that float32 rounds them to it.

A dead unit's weights and bias get a gradient of exactly 0, and the inputs of a first layer do not
change: expect none to come back, and none to move by a single bit. To be alive is not enough: from
a first bias of -4 no leaky, elu or gelu unit is dead, but in ten epochs these nets come to a test
accuracy of 6 to 51 % only. What diverges to NaN is not counted as dead. Takes about 7 seconds.

Source: lectures 000 and 002 (ReLU: dies left of 0), 003 (leaky ReLU).
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

import fnn
from experiments._data import Dataset, load
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
from fnn import activations, training
from fnn.nets.activations import Name
from fnn.training import shuffled_batches


@dataclass(frozen=True)
class Config:
    activations: tuple[Name, ...] = ("relu", "leaky_relu", "elu", "gelu")
    """Of the hidden layer; at most seven."""
    hidden: int = 64
    """Hidden units."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 1.5, 2.0, 4.0)
    """Learning rates, from biases of 0."""
    watched: float = 1.5
    """The one of these that is drawn epoch by epoch."""
    biases: tuple[float, ...] = (-1.0, -2.0, -4.0)
    """First biases of the hidden units other than 0, by the first learning rate."""
    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 32
    """Examples per step."""
    seed: int = 0
    """Of the split, the parameters and the shuffles."""
    out: Path | None = None
    """Run folder; runs/dead-relu if not given."""


TINY = Config(
    activations=("relu", "leaky_relu"),
    hidden=16,
    rates=(0.1, 4.0),
    watched=4.0,
    biases=(-4.0,),
    epochs=2,
    batch_size=128,
)


class Run(NamedTuple):
    """One net's training. Where it diverged, shares and accuracy are NaN."""

    activation: Name
    rate: float
    bias: float
    share: np.ndarray  # [epochs + 1]: of dead units, before training and after every epoch
    ever: int  # units that were dead at least once
    revived: int  # units that were dead after an epoch and not after a later one
    # units that were dead after an epoch and whose weights or bias changed later by any bit
    moved: int
    accuracy: float  # on the test set


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> tuple[Run, ...]:
    """Trains a net by every rate, and from every bias, with every activation.

    `advance(text)` after each.
    """
    check(config)
    data, runs = load("digits", seed=config.seed), []
    settings = [(rate, 0.0) for rate in config.rates] + [
        (config.rates[0], bias) for bias in config.biases
    ]
    for name in config.activations:
        net = fnn.mlp((data.features, config.hidden, data.classes), name)
        rule = fnn.rules.backprop(net, data.loss)
        start, one_epoch = jax.jit(net.init)(fnn.key(config.seed)), epoch_function(rule, name, data)
        for rate, bias in settings:
            runs.append(
                train(
                    config,
                    rule,
                    start,
                    one_epoch,
                    data,
                    Run(name, rate, bias, np.empty(0), 0, 0, 0, np.nan),
                )
            )
            advance(f"{name}, rate {rate:g}, bias {bias:g}")
    return tuple(runs)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    for name in config.activations:
        activations.get(name)
    if not 1 <= len(config.activations) <= len(COLOURS):
        raise ValueError(
            f"`activations` must be 1 to {len(COLOURS)} names, got {len(config.activations)}."
        )
    check_positive(config, "rates")
    if config.watched not in config.rates:
        raise ValueError(
            f"`watched` must be one of the rates {config.rates}, got {config.watched!r}."
        )
    for i, bias in enumerate(config.biases):
        if not np.isfinite(bias) or bias == 0:
            raise ValueError(
                f"`biases[{i}]` must be a finite number other than 0, which the rates are tried "
                f"with; got {bias!r}."
            )
    for name in ("activations", "rates", "biases"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise ValueError(f"`{name}` has repeats, {getattr(config, name)}: give each once.")
    check_positive(config, "hidden", "epochs", "batch_size", whole=True)
    fnn.key(config.seed)


def epoch_function(rule: fnn.Rule, activation: Name, data: Dataset) -> Callable[..., Any]:
    """`(state, rate, batches) -> (state, dead [hidden])`, one epoch of plain SGD.

    The rate is an argument, so that it compiles once.
    """
    layer = activations.get(activation)
    x, t = jnp.asarray(data.x_train), jnp.asarray(data.t_train)

    def one_epoch(state: Any, rate: Any, batches: Any) -> tuple[Any, Any]:
        if batches is not None:
            one_step = training.step(rule, optax.sgd(rate))

            def body(state: Any, batch: Any) -> tuple[Any, None]:
                rows, present = batch
                return one_step(state, x[rows], t[rows], present)[0], None

            state, _ = jax.lax.scan(body, state, batches)
        first = state.params[0][0]
        z, residuals = layer.forward((), x @ first.w + first.b[None, :])
        return state, (layer.backward((), residuals, jnp.ones_like(z))[1] == 0).all(0)

    return jax.jit(one_epoch)


def train(
    config: Config,
    rule: fnn.Rule,
    start: Any,
    one_epoch: Callable[..., Any],
    data: Dataset,
    setting: Run,
) -> Run:
    """One net's training from `start` with other hidden biases, and its dead units after every
    epoch."""
    rate, ((first, _), last) = jnp.float32(setting.rate), start
    params = ((first._replace(b=jnp.full_like(first.b, setting.bias)), ()), last)
    state, dead = one_epoch(training.init(rule, optax.sgd(1.0), params, fnn.key(0)), rate, None)
    masks, weights = [np.asarray(dead)], [incoming(state.params)]
    for e in range(config.epochs):
        state, dead = one_epoch(
            state, rate, shuffled_batches((config.seed, e), len(data.x_train), config.batch_size)
        )
        masks.append(np.asarray(dead))
        weights.append(incoming(state.params))
    found, kept = np.stack(masks), np.stack(weights)
    finite = np.all(np.isfinite(kept), axis=(1, 2))
    found &= finite[:, None]  # at NaN the derivative of relu is 0, but that is no death
    ever = np.any(found, axis=0)
    # a unit's weights when it was first found dead
    death = kept[found.argmax(0), :, np.arange(config.hidden)]
    moved = np.any(death != kept[finite][-1].T, axis=1) & ever
    return setting._replace(
        share=np.where(finite, found.mean(1), np.nan),
        ever=int(ever.sum()),
        revived=int((found[:-1] & ~found[1:] & finite[1:, None]).any(0).sum()),
        moved=int(moved.sum()),
        accuracy=fnn.evaluate(rule, state.params, (data.x_test, data.t_test))["accuracy"]
        if finite[-1]
        else np.nan,
    )


def incoming(params: Any) -> np.ndarray:
    """Weights and bias of every hidden unit, `[features + 1, hidden]`."""
    first = params[0][0]
    return np.append(first.w, first.b[None, :], axis=0)


def main(config: Config) -> None:
    check(config)
    path = folder("dead-relu", config.out)
    with progress(
        len(config.activations) * (len(config.rates) + len(config.biases)), "training"
    ) as advance:
        runs = run(config, advance)
    for name, chosen in (("rate", by_rate(runs)), ("bias", by_bias(runs, config.rates[0]))):
        rows = [
            (
                r.activation,
                f"{getattr(r, name):g}",
                *map(percent, (r.share[0], r.share[-1], r.accuracy)),
            )
            for r in chosen
        ]
        constant = "biases of 0" if name == "rate" else f"learning rate {config.rates[0]:g}"
        title = f"{config.hidden} hidden units, {config.epochs} epochs, {constant}"
        print_table(title, ("activation", name, "dead before", "dead after", "test accuracy"), rows)
    ever, revived, moved = (
        sum(getattr(r, name) for r in runs) for name in ("ever", "revived", "moved")
    )
    print(
        f"{ever} units were found dead; {revived} came back, the weights of {moved} moved by a bit "
        "or more"
    )
    draw(path / "dead-relu.png", runs, config)
    save_metrics(path, config, runs)
    print(f"picture and metrics in {path}")


def percent(share: float, digits: int = 1) -> str:
    """A share in percent, or that there is none."""
    return f"{100 * share:.{digits}f} %" if np.isfinite(share) else "diverged"


def by_rate(runs: tuple[Run, ...]) -> list[Run]:
    """Those from biases of 0."""
    return [r for r in runs if r.bias == 0]


def by_bias(runs: tuple[Run, ...], rate: float) -> list[Run]:
    """Those by the rate that biases are tried with."""
    return [r for r in runs if r.rate == rate]


def sentence(runs: tuple[Run, ...], config: Config) -> str:
    """What the picture shows; nets that diverged are named apart."""
    watched = [r for r in by_rate(runs) if r.rate == config.watched]
    dead = ", ".join(
        f"{percent(r.share[-1], 0)} with {r.activation}"
        for r in watched
        if np.isfinite(r.share[-1])
    )
    lost = ", ".join(r.activation for r in watched if not np.isfinite(r.share[-1]))
    parts = ([f"these hidden units are dead: {dead}"] if dead else []) + (
        [f"these nets have diverged: {lost}"] if lost else []
    )
    ever, revived = (sum(getattr(r, name) for r in runs) for name in ("ever", "revived"))
    came_back = (
        f"of {ever} units that died in all {len(runs)} nets {revived or 'none'} came back"
        if ever
        else "no unit of any net died"
    )
    return (
        f"After {config.epochs} epochs by a learning rate of {config.watched:g} "
        f"{', '.join(parts)}; {came_back}"
    )


def draw(path: Path, runs: tuple[Run, ...], config: Config) -> None:
    """Shares of dead units: over training, by learning rate, by first bias."""
    with figure(path, sentence(runs, config), columns=3, size=(13, 4.6)) as (
        _,
        (left, middle, right),
    ):
        for i, name in enumerate(config.activations):
            style: Any = {
                "color": COLOURS[i],
                "marker": "osv^Dx*"[i],
                "markersize": max(3, 8 - 1.5 * i),
                "label": name,
            }
            of_rates = [r for r in by_rate(runs) if r.activation == name]
            (shown,) = (r for r in of_rates if r.rate == config.watched)
            left.plot(100 * shown.share, **style)
            middle.plot([r.rate for r in of_rates], [100 * r.share[-1] for r in of_rates], **style)
            of_biases = [r for r in by_bias(runs, config.rates[0]) if r.activation == name]
            right.plot([r.bias for r in of_biases], [100 * r.share[-1] for r in of_biases], **style)
        left.set(
            xlabel=f"epoch, by a learning rate of {config.watched:g}",
            ylabel="dead hidden units (%)",
        )
        middle.set(
            xlabel="learning rate, biases of 0",
            ylabel=f"dead after {config.epochs} epochs (%)",
            xscale="log",
        )
        plain_numbers(middle.xaxis)
        middle.set_xticks(config.rates)
        middle.set_xticks([], minor=True)
        right.set(
            xlabel=f"first bias, by a learning rate of {config.rates[0]:g}",
            ylabel=f"dead after {config.epochs} epochs (%)",
        )
        for axes in (left, middle, right):
            axes.set(ylim=(-4, 104))
        middle.legend()
