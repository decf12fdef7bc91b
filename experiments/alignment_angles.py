"""Do the weights turn towards fixed random feedback, so that the update turns towards the gradient?

    python -m experiments alignment-angles

Left, Lillicrap's linear net of 30, 20 and 10 units learns a random linear function by feedback
alignment: the angle between what the hidden layer is told and what backprop would tell it. Middle
and right, a net of two hidden layers on handwritten digits: the angle between each rule's update of
the hidden layers and the true gradient on the same batch.

Expect the linear net to come from 90 to below 30 degrees. On digits, from a start of small weights,
feedback alignment and direct feedback alignment come from about 90 to 35-45 degrees, the weight
mirror to 7, Kolen and Pollack's feedback, with weights that decay as it does, to
5. From He's start, weights as large as the feedback itself, feedback alignment stays at about 60
degrees, and learns as well. Takes about 40 seconds.

Source: Lillicrap et al. (2016), doi:10.1038/ncomms13276 (figure 1 for the linear net); Akrout et
al. (2019), arXiv:1904.05391; lecture 003.
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
from jax.nn.initializers import he_normal, normal, uniform

import fnn
from experiments._data import load
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
from fnn import _validate, alignment, rules

LINEAR = (30, 20, 10)
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer of the net for digits."""
    std: float = 0.03
    """Standard deviation of the small first weights; feedback is drawn from N(0, 2/inputs)."""
    learning_rate: float = 0.1
    """SGD's step size on digits."""
    epochs: int = 30
    """Passes over the digits."""
    batch_size: int = 32
    """Digits per step."""
    every: int = 9
    """Steps from one measurement to the next."""
    decay: float = 1.5e-3
    """Share that Kolen and Pollack's weights and feedback lose at every step."""
    linear_steps: int = 2000
    """Steps of the linear net, one example each."""
    linear_rate: float = 0.005
    """Its step size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of first weights, feedback and shuffles; means and spreads are over these."""
    out: Path | None = None
    """Run folder; runs/alignment-angles if not given."""


TINY = Config(hidden=(8, 8), epochs=2, batch_size=256, every=2, linear_steps=40, seeds=(0, 1))


class Curve(NamedTuple):
    """Angles of one rule in degrees, over training and over the seeds."""

    rule: str
    start: str
    steps: np.ndarray  # [records]
    angles: np.ndarray  # [seeds, records, hidden layers]
    accuracy: np.ndarray  # [seeds] on test data; nan for the linear net

    @property
    def first(self) -> float:
        """The mean angle at the start, over the seeds and the hidden layers."""
        return float(np.nanmean(self.angles[:, 0]))

    @property
    def last(self) -> np.ndarray:
        """`[seeds]`: the mean angle over the last fifth of training and the hidden layers."""
        return np.nanmean(self.angles[:, -max(1, len(self.steps) // 5) :], axis=(1, 2))


def check(config: Config) -> None:
    """Raises unless the numbers are valid."""
    for name in ("epochs", "batch_size", "every", "linear_steps"):
        _validate.positive(name, getattr(config, name), whole=True)
    for name in ("std", "learning_rate", "decay", "linear_rate"):
        _validate.positive(name, getattr(config, name))
    for i, units in enumerate(config.hidden):
        _validate.positive(f"hidden[{i}]", units, whole=True)
    if not config.hidden:
        raise ValueError(
            "`hidden` is empty: feedback alignment needs a hidden layer, `--hidden 128`."
        )
    check_seeds(config.seeds)


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> list[Curve]:
    """The linear net, then every rule from both starts.

    `advance(text)` is called after every curve.
    """
    check(config)
    curves = [linear(config)]
    advance("linear")
    sizes = (64, *config.hidden, 10)
    he = fnn.mlp(sizes, kernel_init=he_normal())
    for start, net in (("small", fnn.mlp(sizes, kernel_init=normal(config.std))), ("He", he)):
        for rule, decay in made(config, net, he.init):
            curves.append(digits(config, rule, decay, net, start))
            advance(f"{rule}, {start} start")
    return curves


def made(config: Config, net: fnn.Layer, draw: Callable[..., Any]) -> list[tuple[fnn.Rule, float]]:
    """The rules compared, and what share of their weights decays at a step.

    Feedback is drawn as He draws weights, whatever the start.
    """
    kinds = (
        (rules.random_feedback(draw), 0.0),
        (rules.weight_mirror(draw=draw), 0.0),
        (rules.kolen_pollack(config.decay, draw), config.decay),
    )
    aligned = [(rules.feedback_alignment(net, LOSS, feedback=kind), decay) for kind, decay in kinds]
    return [*aligned, (rules.direct_feedback_alignment(net, LOSS), 0.0)]


def linear(config: Config) -> Curve:
    """Lillicrap's linear net.

    The angle of the deltas on examples that it is not trained on, at every step that counts.
    """
    net = fnn.mlp(LINEAR, "identity", kernel_init=uniform_around_zero(0.01))
    feedback = rules.random_feedback(
        fnn.mlp(LINEAR, "identity", kernel_init=uniform_around_zero(0.5)).init
    )
    rule = rules.feedback_alignment(net, fnn.losses.l2_loss, feedback=feedback)
    measure = alignment.delta_angles(rule, net)
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, LINEAR[::2])
    x = rng.normal(size=(config.linear_steps + 200, LINEAR[0])).astype(np.float32)
    y = (x @ target).astype(np.float32)
    held_x, held_y = jnp.asarray(x[-200:]), jnp.asarray(y[-200:])

    def record(params: Any, state: Any, *_: Any) -> Any:
        return measure(params, state, held_x, held_y)[:-1]

    data = x[:-200], y[:-200]
    _, records = train(
        config, rule, net, optax.sgd(config.linear_rate), data, record, epochs=1, batch_size=1
    )
    return Curve(
        str(rule),
        "linear",
        np.arange(records.shape[1]) * config.every,
        records,
        np.full(len(config.seeds), np.nan),
    )


def digits(config: Config, rule: fnn.Rule, decay: float, net: fnn.Layer, start: str) -> Curve:
    """The angles of a rule's updates of the hidden layers on digits."""
    data = load("digits")
    measure = alignment.update_alignment(rule, net)

    def record(*given: Any) -> Any:
        return measure(*given).angle[:-1]

    settings = {"epochs": config.epochs, "batch_size": config.batch_size}
    train_data = data.x_train, data.t_train
    optimizer = optax.chain(
        optax.add_decayed_weights(decay / config.learning_rate), optax.sgd(config.learning_rate)
    )
    found, records = train(config, rule, net, optimizer, train_data, record, **settings)
    accuracy = [
        fnn.evaluate(rule, params, (data.x_test, data.t_test))["accuracy"] for params in found
    ]
    per_epoch = -(-len(data.x_train) // config.batch_size)
    within = np.arange(0, per_epoch, config.every)
    steps = (np.arange(config.epochs)[:, None] * per_epoch + within).ravel()
    return Curve(str(rule), start, steps, records, np.array(accuracy))


def train(
    config: Config, rule: Any, net: Any, optimizer: Any, data: Any, record: Any, **settings: Any
) -> tuple[list[Any], np.ndarray]:
    """The params for every seed, and the records `[seeds, records, layers]`."""
    found, records = [], []
    for seed in config.seeds:
        key, fit_key = jax.random.split(fnn.key(seed))
        params = jax.jit(net.init)(key)
        params, history = fnn.fit(
            rule,
            optimizer,
            params,
            data,
            key=fit_key,
            record=record,
            record_every=config.every,
            **settings,
        )
        found.append(params)
        records.append(np.asarray(history.records))
    return found, np.stack(records)


def uniform_around_zero(limit: float) -> Any:
    """An initialiser: uniform in [-limit, limit]."""

    def draw(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
        return uniform(2 * limit)(key, shape, dtype) - limit

    return draw


def main(config: Config) -> None:
    path = folder("alignment-angles", config.out)
    with progress(9, "training") as advance:
        curves = run(config, advance)
    rows = [
        (
            _name(c.rule),
            c.start,
            f"{c.first:.0f}",
            mean_std(list(c.last), 1),
            "-" if c.start == "linear" else mean_std(list(c.accuracy), 3),
        )
        for c in curves
    ]
    columns = ("rule", "start", "angle at first", "over the last fifth", "test accuracy")
    print_table(
        f"Angles in degrees, {len(config.seeds)} seeds, mean of the hidden layers", columns, rows
    )
    draw(path / "alignment-angles.png", curves, config)
    save_metrics(
        path, config, [c._asdict() | {"angles": c.angles.mean(0), "last": c.last} for c in curves]
    )
    print(f"picture and metrics in {path}")


def draw(path: Path, curves: list[Curve], config: Config) -> None:
    """Angles over training: the linear net, and on digits from small weights and from He's."""
    by_start = {
        start: [c for c in curves if c.start == start] for start in ("linear", "small", "He")
    }
    small, he = (by_start[start][0] for start in ("small", "He"))
    title = (
        f"Feedback alignment's update comes from {small.first:.0f}° to {small.last.mean():.0f}° "
        f"off the gradient where weights start small, and to {he.last.mean():.0f}° where they "
        "start as large as the feedback"
    )
    panels = zip(
        by_start,
        (
            "linear net 30-20-10",
            f"digits, weights from N(0, {config.std:g}²)",
            "digits, He's weights",
        ),
        strict=True,
    )
    with figure(path, title, columns=3, size=(12, 4.2)) as (_, axes):
        for axis, (start, label) in zip(axes, panels, strict=True):
            for curve, colour, style in zip(
                by_start[start], COLOURS, ("-", "--", "-.", ":"), strict=False
            ):
                each = np.nanmean(curve.angles, axis=2)
                axis.plot(curve.steps, each.mean(0), style, color=colour, label=_name(curve.rule))
                axis.fill_between(
                    curve.steps, each.min(0), each.max(0), color=colour, alpha=0.2, linewidth=0
                )
            axis.axhline(90, color="black", linewidth=1)
            axis.set(xlabel="step", title=label, ylim=(0, 105), yticks=(0, 30, 60, 90))
        axes[0].set(ylabel="angle to the true gradient, degrees")
        axes[2].legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.5))


def _name(rule: str) -> str:
    names = {"feedback_alignment": "fixed feedback", "direct_feedback_alignment": "direct feedback"}
    names |= {
        "feedback_alignment(weight_mirror)": "weight mirror",
        "feedback_alignment(kolen_pollack)": "Kolen-Pollack",
    }
    return names[rule]
