"""Do the largest gradients point at wrong labels? How large a batch is worth it?

    python -m experiments per-example

Gives 5 % of the training labels of scikit-learn's digits another class, trains on them, and ranks
the training examples by the norms of their gradients (Paul, Ganguli, Dziugaite 2021,
arXiv:2107.07075, early in training), beside their losses to compare. A wrong label stands out until
the net knows it by heart: so the net is small, its epochs are few, and norms are averaged over
training. The noise scale (McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162) is the batch
that gets about half the progress that a step can make.

Expect more than 90 % wrong labels among those flagged to find 60 % of them, a little more by the
loss, and a noise scale that grows from about 90 to some 500 examples, without the wrong labels to
some 170. Takes about 6 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from experiments._data import load
from experiments._run import (
    COLOURS,
    check_positive,
    check_seeds,
    figure,
    folder,
    mean_std,
    plain_numbers,
    print_table,
    progress,
    save_metrics,
)


@dataclass(frozen=True)
class Config:
    flipped: float = 0.05
    """Share of the training labels that are given another class."""
    sizes: tuple[int, ...] = (64,)
    """Hidden units, layer by layer."""
    learning_rate: float = 0.1
    """Step size of plain SGD."""
    epochs: int = 10
    """Passes over the training set."""
    batch_size: int = 32
    """Examples per step."""
    measurements: int = 5
    """How often in an epoch the gradients are measured."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws its split, its wrong labels and its net."""
    out: Path | None = None
    """Run folder; runs/per-example if not given."""


TINY = Config(sizes=(8,), epochs=2, batch_size=128, measurements=2, seeds=(0,))
RECALL = 0.6  # where precision is reported


class SeedResult(NamedTuple):
    """One net. Norms (nats) and losses (nats) are means over all measurements."""

    seed: int
    wrong: np.ndarray  # [train] bool
    norms: np.ndarray  # [train]
    losses: np.ndarray  # [train]
    # [epochs, 2, 2]: the epoch's mean (trace, squared gradient) of (all examples, those with right
    # labels)
    noise: np.ndarray
    test_accuracy: float


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    if not 0 < config.flipped < 1:
        raise ValueError(f"`flipped` must be a share between 0 and 1, got {config.flipped}.")
    check_positive(config, "learning_rate")
    check_positive(config, "sizes", "epochs", "batch_size", "measurements", whole=True)
    check_seeds(config.seeds)


def run(config: Config, advance=lambda text="": None) -> tuple[SeedResult, ...]:
    """Trains and measures, once for every seed. `advance(text)` is called after every epoch."""
    check(config)
    net = fnn.mlp((64, *config.sizes, 10))
    rule, optimizer = (
        fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels),
        optax.sgd(config.learning_rate),
    )
    source = fnn.source(net, rule.loss)
    norms, noise_scale = fnn.per_example.norms(source), fnn.per_example.noise_scale(source)

    @jax.jit
    def measure(params: Any, x: Any, targets: Any, right: Any) -> tuple[Any, Any, Any]:
        noises = noise_scale(params, x, targets), noise_scale(params, x, targets, weights=right)
        noise = jnp.array([[n.trace for n in noises], [n.squared_gradient for n in noises]])
        return norms(params, x, targets), source(params, x, targets)[0], noise

    def train(seed: int) -> SeedResult:
        data, rng = load("digits", seed=seed), np.random.default_rng(seed)
        targets, wrong = flip(data.t_train, data.classes, config.flipped, rng)
        if config.batch_size > (most := len(targets) // config.measurements):
            between = f"the examples from one of {config.measurements} measurements to the next"
            raise ValueError(
                f"`batch_size` must be at most {most}, {between}; got {config.batch_size}. Lower "
                "it, or `measurements`."
            )
        init_key, key = jax.random.split(fnn.key(seed))
        params, measured = jax.jit(net.init)(init_key), []
        for epoch_key in jax.random.split(key, config.epochs):
            # an epoch in parts, to measure after each: `fit` begins anew, but plain SGD has no
            # state to lose
            for i, part in enumerate(
                np.array_split(rng.permutation(len(targets)), config.measurements)
            ):
                batch, part_key = (
                    (data.x_train[part], targets[part]),
                    jax.random.fold_in(epoch_key, i),
                )
                params, _ = fnn.fit(
                    rule,
                    optimizer,
                    params,
                    batch,
                    epochs=1,
                    batch_size=config.batch_size,
                    key=part_key,
                )
                measured.append(
                    jax.device_get(
                        measure(params, data.x_train, targets, (~wrong).astype(np.float32))
                    )
                )
            advance(f"seed {seed}")
        all_norms, losses, noise = (np.stack(parts) for parts in zip(*measured, strict=True))
        accuracy = fnn.evaluate(rule, params, (data.x_test, data.t_test))["accuracy"]
        return SeedResult(
            seed,
            wrong,
            all_norms.mean(0),
            losses.mean(0),
            noise.reshape(config.epochs, -1, 2, 2).mean(1),
            accuracy,
        )

    return tuple(train(seed) for seed in config.seeds)


def flip(
    targets: np.ndarray, classes: int, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The labels with a share of them given another class, every other one equally likely.

    And which, `[examples]` bool.
    """
    count = round(share * len(targets))
    if not 0 < count < len(targets):
        raise ValueError(
            f"`flipped` must be a share between 0 and 1, got {share}: {count} of {len(targets)} "
            "labels."
        )
    wrong = rng.permutation(len(targets)) < count
    return np.where(
        wrong, (targets + rng.integers(1, classes, len(targets))) % classes, targets
    ).astype(targets.dtype), wrong


def hits(scores: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """How many wrong labels are among the 1, 2, ... examples of largest score, `[examples]`."""
    return np.cumsum(wrong[np.argsort(-scores, kind="stable")])


def precision_at(scores: np.ndarray, wrong: np.ndarray, recall: Any = RECALL) -> Any:
    """The share of wrong labels among as many flagged examples as find that share of all wrong
    labels."""
    found = hits(scores, wrong)
    flags = 1 + np.searchsorted(found, np.asarray(recall) * wrong.sum() - 1e-9)
    return found[flags - 1] / flags


def noise_scale_of(results: tuple[SeedResult, ...]) -> np.ndarray:
    """`[epochs, 2]` in examples.

    Averages over the seeds (an epoch's are taken already), and only then the ratio.
    """
    trace, squared_gradient = np.moveaxis(np.mean([r.noise for r in results], axis=0), 1, 0)
    return trace / squared_gradient


def sentence(results: tuple[SeedResult, ...]) -> str:
    """What the picture shows.

    To point at wrong labels is to be nearer to nothing but them than to what chance gives.
    """
    found, chance = (
        [100 * precision_at(r.norms, r.wrong) for r in results],
        100 * np.mean([r.wrong.mean() for r in results]),
    )
    gain = (np.mean(found) - chance) / (100 - chance)
    point = (
        "point"
        if gain > 0.5
        else "point more often than by chance"
        if gain > 0.05
        else "do NOT point"
    )
    every, right = (
        f"{scale:.0f} examples" if scale > 0 else "more examples than can be told"
        for scale in noise_scale_of(results)[-1]
    )
    return (
        f"The largest gradients {point} at wrong labels: {mean_std(found, 0)} % of those flagged "
        f"are wrong where {100 * RECALL:.0f} % are found ({chance:.0f} % by chance). The noise "
        f"scale ends at {every}, without the wrong labels at {right}"
        f"{' (pale: single seeds)' if len(results) > 1 else ''}"
    )


def main(config: Config) -> None:
    check(config)
    path = folder("per-example", config.out)
    with progress(len(config.seeds) * config.epochs, "training") as advance:
        results = run(config, advance)
    rows = [
        (
            r.seed,
            *(f"{precision_at(scores, r.wrong):.3f}" for scores in (r.norms, r.losses)),
            f"{r.test_accuracy:.3f}",
            *(f"{scale:.0f}" for scale in noise_scale_of((r,))[-1]),
        )
        for r in results
    ]
    columns = ("seed", "by norm", "by loss", "test accuracy", "noise scale", "without wrong ones")
    print_table(f"Precision at recall {RECALL}, and the last epoch's noise scale", columns, rows)
    flipped, cuts = int(results[0].wrong.sum()), []
    for flags in (
        min(max(1, round(times * flipped)), len(results[0].wrong))
        for times in (0.25, 0.5, 1, 1.5, 2)
    ):
        norms, losses = np.transpose(
            [[hits(scores, r.wrong)[flags - 1] for scores in (r.norms, r.losses)] for r in results]
        )
        cuts.append(
            (
                flags,
                *(
                    mean_std(list(share), 3)
                    for share in (norms / flags, norms / flipped, losses / flags)
                ),
            )
        )
    columns = ("flagged", "precision by norm", "recall by norm", "precision by loss")
    print_table(
        f"The largest norms and losses; {flipped} of {len(results[0].wrong)} labels are wrong",
        columns,
        cuts,
    )
    draw(path / "per-example.png", results, config)
    summary = [
        {
            "seed": r.seed,
            "precision": precision_at(r.norms, r.wrong),
            "noise_scale": noise_scale_of((r,)),
        }
        for r in results
    ]
    save_metrics(
        path, config, {"seeds": summary, "noise_scale": noise_scale_of(results), "cut_offs": cuts}
    )
    print(f"picture and metrics in {path}")


def draw(path: Path, results: tuple[SeedResult, ...], config: Config) -> None:
    """Norms of right and wrong labels; precision against recall; the noise scale by epoch."""
    wrong, norms = (
        np.concatenate([getattr(r, name) for r in results]) for name in ("wrong", "norms")
    )
    noise = noise_scale_of(results)
    with figure(path, sentence(results), columns=3, size=(13, 4.4)) as (_, (left, middle, right)):
        for mask, label in ((~wrong, "right label"), (wrong, "wrong label")):
            weights = np.full(mask.sum(), 100 / mask.sum())
            left.hist(
                norms[mask],
                np.geomspace(norms.min(), norms.max(), 40),
                weights=weights,
                label=label,
                alpha=0.6,
            )
        left.set(
            xscale="log",
            xlabel="gradient norm, mean over training (nats)",
            ylabel="share of its group per bin (%)",
        )
        recall, parts = (
            np.arange(1, 101) / 100,
            np.array_split(results[0].wrong, config.measurements),
        )
        steps = np.arange(1, config.epochs + 1) * sum(
            -(-len(part) // config.batch_size) for part in parts
        )
        for name, colour in (("norms", COLOURS[0]), ("losses", COLOURS[4])):
            curves = [precision_at(getattr(r, name), r.wrong, recall) for r in results]
            middle.plot(recall, np.transpose(curves), color=colour, alpha=0.25, linewidth=1)
            middle.plot(recall, np.mean(curves, axis=0), color=colour, label=f"largest {name}")
        middle.axhline(wrong.mean(), color="gray", linestyle=":", label="by chance")
        middle.set(xlabel="recall", ylabel="precision", ylim=(0, 1.03), xlim=(0, 1.01))
        for i, label in enumerate(("all training examples", "without the wrong labels")):
            right.plot(
                steps,
                np.transpose([noise_scale_of((r,))[:, i] for r in results]),
                color=COLOURS[1 - i],
                alpha=0.25,
                linewidth=1,
            )
            right.plot(steps, noise[:, i], "o-", color=COLOURS[1 - i], label=label)
        right.set(
            yscale="log",
            xlabel="step (mean of the epoch up to it)",
            ylabel="gradient noise scale (examples)",
        )
        for axis in (left.xaxis, right.yaxis):
            plain_numbers(axis)
        for axis, place in ((left, "upper left"), (middle, (0.02, 0.12)), (right, "upper left")):
            axis.legend(loc=place)
