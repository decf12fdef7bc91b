"""How do the alternatives to backprop compare in one training loop.

Accuracy, time, passes, and the angle to the true gradient?

    python -m experiments credit-assignment
    python -m experiments credit-assignment --datasets digits mnist1d mnist --data-dir FOLDER

Every rule trains the same net, for the same epochs, with the same batches; its learning rate is the
best of the same few on a part of the training data that is held out; test data have no part in the
choice. `last layer only` is backprop that leaves the hidden layers as they were drawn: what a rule
has to beat to have taught them anything. Rules that solve for the weights (extreme learning),
choose them (the genetic algorithm) or bring steps of their own (SNES) have no learning rate.

What to expect, and how long it takes, is in docs/rules.md, whose table this makes.

Source: lecture 003 (alternatives to backprop); the papers are named in `fnn.rules`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn.initializers import lecun_normal

import fnn
from experiments._data import Dataset, load
from experiments._run import (
    COLOURS,
    check_seeds,
    figure,
    folder,
    mean_std,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate, rules
from fnn.nets.blocks import blocks
from fnn.rules.backprop import stateless

RATES = tuple(float(r) for r in np.logspace(-4, -1, 7).round(6))


class Method(NamedTuple):
    """A rule in the comparison."""

    make: Callable[[fnn.Layer, fnn.Loss], fnn.Rule]
    # forward passes that the matrix products of a step are worth; what is drawn is not counted
    passes: float
    # None: sgd(1.0), nothing to tune
    optimizer: Callable[[float], optax.GradientTransformation] | None = optax.adam


def last_layer_only(net: fnn.Layer, loss: fnn.Loss) -> fnn.Rule:
    """Backprop that leaves the hidden layers alone: the baseline."""
    chain, whole = blocks(net), fnn.value_and_grad(net, loss)

    def function(*given: Any) -> tuple[Any, Any]:
        value, grads = whole(*given)
        *hidden, last = chain.split(grads)
        return value, chain.join([*jax.tree.map(jnp.zeros_like, hidden), last])

    return stateless("last layer only", net, loss, function)


DECAY = 1.5e-3  # a step: the share that Kolen and Pollack's weights and feedback lose


def adam_with_decay(rate: float) -> optax.GradientTransformation:
    """Adam whose weights lose the share `DECAY` at every step, whatever the rate."""
    return optax.adamw(rate, weight_decay=DECAY / rate)


METHODS: dict[str, Method] = {
    "backprop": Method(rules.backprop, 3),
    "Kolen-Pollack": Method(
        partial(rules.feedback_alignment, feedback=rules.kolen_pollack(DECAY)), 3, adam_with_decay
    ),
    "weight mirror": Method(partial(rules.feedback_alignment, feedback="weight_mirror"), 5),
    "sign-symmetric": Method(partial(rules.feedback_alignment, feedback="sign_symmetric"), 3),
    "feedback alignment": Method(rules.feedback_alignment, 3),
    "direct feedback alignment": Method(rules.direct_feedback_alignment, 2),
    "direct, sign of the error": Method(partial(rules.direct_feedback_alignment, signal="sign"), 2),
    "direct random targets": Method(partial(rules.direct_feedback_alignment, signal="targets"), 2),
    "target propagation": Method(rules.target_propagation, 5.5),
    "forward-forward": Method(rules.forward_forward, 5),
    "PEPITA": Method(rules.pepita, 3),
    "Hebbian": Method(rules.hebbian, 3),
    "forward gradient, activities": Method(
        partial(rules.forward_gradient, perturb="activations"), 4
    ),
    "forward gradient, weights": Method(rules.forward_gradient, 3),
    "node perturbation": Method(rules.node_perturbation, 3),
    "weight perturbation": Method(rules.weight_perturbation, 2),
    "evolution strategies": Method(rules.evolution_strategies, 129),
    "SNES": Method(partial(rules.snes, population=128), 129, None),
    "genetic algorithm": Method(partial(rules.genetic_algorithm, std=0.01), 129, None),
    "extreme learning": Method(rules.extreme_learning, 2, None),
    "last layer only": Method(last_layer_only, 1),
}


@dataclass(frozen=True)
class Config:
    datasets: tuple[str, ...] = ("digits", "mnist1d")
    """Data sets, by the names of `experiments train`."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rules, by name."""
    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    epochs: int = 30
    """Passes over the training data, in the search and after it."""
    batch_size: int = 32
    """Examples per step."""
    rates: tuple[float, ...] = RATES
    """Adam's step sizes tried for every rule."""
    validation: float = 0.2
    """Share of the training data held out for the search."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of first weights and shuffles; the search has a seed of its own."""
    every: int = 45
    """Steps from one measurement of the angle to the next."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist."""
    out: Path | None = None
    """Run folder; runs/credit-assignment if not given."""


TINY = Config(
    datasets=("digits",),
    methods=("backprop", "extreme learning", "last layer only"),
    hidden=(8, 8),
    epochs=2,
    batch_size=256,
    rates=(0.01,),
    seeds=(0,),
    every=4,
)

GALLERY = Config(
    datasets=("digits",),
    seeds=(0,),
    rates=(0.001, 0.003162),
    every=90,
    methods=(
        "backprop",
        "Kolen-Pollack",
        "feedback alignment",
        "direct feedback alignment",
        "forward-forward",
        "PEPITA",
        "forward gradient, activities",
        "extreme learning",
        "last layer only",
    ),
)


class Outcome(NamedTuple):
    """One rule on one data set."""

    method: str
    rate: float  # that was best on the data held out; nan without one
    accuracy: np.ndarray  # [seeds, epochs] on test data, after every epoch
    seconds: float  # an epoch, the median
    passes: float  # forward passes an epoch
    # [epochs]: of the hidden layers' update to the true gradient, degrees, mean over the layers
    angle: np.ndarray

    @property
    def final(self) -> np.ndarray:
        """`[seeds]`: the accuracy at the end."""
        return self.accuracy[:, -1]


def check(config: Config) -> None:
    """Raises unless the config is valid."""
    for name in ("epochs", "batch_size", "every"):
        _validate.positive(name, getattr(config, name), whole=True)
    for name in config.methods:
        _validate.one_of("method", name, METHODS)
    for i, rate in enumerate(config.rates):
        _validate.positive(f"rates[{i}]", rate)
    if not (config.rates and config.methods and config.datasets and config.hidden):
        raise ValueError(
            "`rates`, `methods`, `datasets` and `hidden` must name one thing at least."
        )
    if not 0 < config.validation < 1:
        raise ValueError(
            f"`validation` must be a share above 0 and below 1, got {config.validation}."
        )
    check_seeds(config.seeds)


def run(
    config: Config, advance: Callable[[str], Any] = lambda text: None
) -> dict[str, list[Outcome]]:
    """All rules on all data sets. `advance(text)` is called after every rule."""
    check(config)
    found: dict[str, list[Outcome]] = {}
    for name in config.datasets:
        data = load(name, data_dir=config.data_dir)
        if not data.classes:
            raise ValueError(
                f"`datasets` has {name}, which has no classes to be right about. Take digits, "
                "mnist1d, mnist, ..."
            )
        found[name] = []
        for method in config.methods:
            found[name].append(measure(config, method, data))
            advance(f"{method} on {name}: {100 * found[name][-1].final.mean():.1f} %")
    return found


def measure(config: Config, name: str, data: Dataset) -> Outcome:
    """The search, then every seed with the best rate."""
    method = METHODS[name]
    net = net_of(config, name, data)
    rule = method.make(net, data.loss)
    rate = search(config, rule, method.optimizer, net, data) if method.optimizer else float("nan")
    optimizer = method.optimizer(rate) if method.optimizer else optax.sgd(1.0)
    accuracy, ticks, angles = [], [], []
    aligned = fnn.alignment.update_alignment(rule, net)

    def record(*given: Any) -> Any:
        return aligned(*given).angle[:-1].mean()

    for seed in config.seeds:
        key, fit_key = jax.random.split(fnn.key(seed))
        stamps = []
        settings = {"epochs": config.epochs, "batch_size": config.batch_size, "key": fit_key}
        settings |= {
            "validation": (data.x_test, data.t_test),
            "callback": lambda e, m, stamps=stamps: stamps.append(time.perf_counter()),
        }
        settings |= (
            {"record": record, "record_every": config.every} if seed == config.seeds[0] else {}
        )
        _, history = fnn.fit(
            rule, optimizer, jax.jit(net.init)(key), (data.x_train, data.t_train), **settings
        )
        accuracy.append(np.asarray(history.validation["accuracy"]))
        if seed == config.seeds[0]:
            angles = np.asarray(history.records).reshape(config.epochs, -1).mean(1)
        if seed != config.seeds[0] or len(config.seeds) == 1:
            ticks += list(np.diff(stamps))
    steps = -(-len(data.x_train) // config.batch_size)
    return Outcome(
        name,
        rate,
        np.stack(accuracy),
        float(np.median(ticks)),
        method.passes * steps,
        np.asarray(angles),
    )


def net_of(config: Config, name: str, data: Dataset) -> fnn.Layer:
    """The same net for all, but for extreme learning, whose hidden layers stay as drawn.

    For it tanh units that are not saturated.
    """
    sizes = (data.features, *config.hidden, data.outputs)
    return (
        fnn.mlp(sizes, "tanh", kernel_init=lecun_normal())
        if name == "extreme learning"
        else fnn.mlp(sizes)
    )


def search(config: Config, rule: fnn.Rule, optimizer: Any, net: fnn.Layer, data: Dataset) -> float:
    """The learning rate of the best accuracy on examples held out, one net for each."""
    rows = np.random.default_rng(0).permutation(len(data.x_train))
    held, kept = np.split(rows, [int(config.validation * len(rows))])
    keys = jnp.broadcast_to(fnn.key(2**32 - 1), (len(config.rates),))
    params, _ = fnn.fit_many(
        rule,
        optimizer,
        net.init,
        (data.x_train[kept], data.t_train[kept]),
        epochs=config.epochs,
        batch_size=min(config.batch_size, len(kept)),
        keys=keys,
        learning_rates=jnp.asarray(config.rates),
    )
    nets = [jax.tree.map(lambda p, i=i: p[i], params) for i in range(len(config.rates))]
    scores = [
        fnn.evaluate(rule, p, (data.x_train[held], data.t_train[held]))["accuracy"] for p in nets
    ]
    return config.rates[int(np.argmax(scores))]


def main(config: Config) -> None:
    check(config)
    path = folder("credit-assignment", config.out)
    with progress(len(config.datasets) * len(config.methods), "training") as advance:
        found = run(config, advance)
    for name, outcomes in found.items():
        rows = [
            (
                o.method,
                number(o.rate, "g"),
                mean_std(list(100 * o.final), 1),
                f"{1e3 * o.seconds:.0f}",
                f"{o.passes:.0f}",
                number(o.angle[0], ".0f"),
                number(o.angle[-1], ".0f"),
            )
            for o in outcomes
        ]
        columns = (
            "rule",
            "rate",
            "test accuracy, %",
            "ms per epoch",
            "passes per epoch",
            "angle in epoch 1",
            "in the last",
        )
        print_table(
            f"{name}: {config.epochs} epochs, seeds {', '.join(map(str, config.seeds))}",
            columns,
            rows,
        )
        draw(path / f"{name}.png", name, outcomes)
    save_metrics(
        path,
        config,
        {
            name: [o._asdict() | {"final": o.final} for o in outcomes]
            for name, outcomes in found.items()
        },
    )
    print(f"pictures and metrics in {path}")


def number(value: float, form: str) -> str:
    """A cell of the table: what is not a number is none."""
    return "-" if np.isnan(value) else f"{value:{form}}"


def draw(path: Path, name: str, outcomes: list[Outcome]) -> None:
    """Accuracy at the end; and over epochs, time and passes; and the angle."""
    best = max(outcomes, key=lambda o: o.final.mean())
    base = next((o for o in outcomes if o.method == "last layer only"), None)
    above = sum(o.final.mean() > base.final.mean() for o in outcomes) if base else 0
    beat = (
        f"; {above} of {len(outcomes) - 1} rules beat training the last layer only" if base else ""
    )
    title = f"On {name} {best.method} comes to {100 * best.final.mean():.1f} %{beat}"
    order = sorted(outcomes, key=lambda o: o.final.mean())
    looks = {
        o.method: (COLOURS[i % 7], ("-", "--", ":")[i // 7 % 3])
        for i, o in enumerate(reversed(order))
    }
    with figure(path, title, columns=3, rows=2, size=(15, 9)) as (
        _,
        ((bars, epochs, times), (passes, angles, legend)),
    ):
        several = (
            f" (mean ± sd of {len(best.final)} seeds)" if len(best.final) > 1 else ", one seed"
        )
        final = [100 * o.final.mean() for o in order]
        spread = [100 * (o.final.std(ddof=1) if len(o.final) > 1 else 0.0) for o in order]
        bars.errorbar(
            final,
            range(len(order)),
            xerr=spread,
            fmt="none",
            ecolor="black",
            linewidth=1,
            capsize=2,
        )
        bars.scatter(final, range(len(order)), c=[looks[o.method][0] for o in order], zorder=3)
        bars.set(
            yticks=range(len(order)),
            yticklabels=[o.method for o in order],
            xlabel="test accuracy, %" + several,
        )
        if base:
            bars.axvline(100 * base.final.mean(), color="black", linewidth=1, linestyle=":")
        for o in reversed(order):
            colour, style = looks[o.method]
            mean, steps = 100 * o.accuracy.mean(0), np.arange(1, o.accuracy.shape[1] + 1)
            for axis, x in (
                (epochs, steps),
                (times, steps * o.seconds),
                (passes, steps * o.passes),
            ):
                axis.plot(x, mean, style, color=colour, linewidth=1.4)
            angles.plot(steps, o.angle, style, color=colour, linewidth=1.4)
            legend.plot([], [], style, color=colour, label=o.method)
        for axis, label in (
            (epochs, "epoch"),
            (times, "training time, seconds"),
            (passes, "forward passes of a batch, or their worth"),
        ):
            axis.set(
                xlabel=label,
                ylabel="test accuracy, %",
                xscale="linear" if axis is epochs else "log",
            )
        angles.axhline(90, color="black", linewidth=1)
        angles.set(
            xlabel="epoch",
            ylabel="hidden update to gradient, degrees",
            ylim=(0, 130),
            yticks=(0, 30, 60, 90, 120),
        )
        legend.axis("off")
        legend.legend(loc="center left", fontsize=9)
