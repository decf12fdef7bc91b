"""Are the hand-written gradients those of jax.grad, before and after training on real digits?

    python -m experiments compare-gradients

Trains an MLP on scikit-learn's 8 x 8 digits (80 % train, 20 % test, stratified) with the hand-written backward pass, and
compares manual and automatic gradient of the whole training set leaf by leaf, before the first step and after the last.
Expect relative errors of about 1e-7 before training (float32 rounding) and a test accuracy of about 98 %. Takes about 10 seconds.

Late in training softmax(z) - one_hot cancels: there float32's rounding grows beyond the tolerance in both gradients, and the
comparison asks instead how far each is from the gradient in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

import fnn
from experiments._data import load
from experiments._run import figure, folder, print_table, progress, save_metrics
from fnn.checks import GradientReport


@dataclass(frozen=True)
class Config:
    """What the comparison trains."""

    sizes: tuple[int, ...] = (256, 128)
    """Hidden units, layer by layer."""
    activation: str = "relu"
    """Any name out of fnn.activations.ACTIVATIONS."""
    learning_rate: float = 2e-3
    """AdamW's step size at the start; it falls to 0 along a cosine."""
    weight_decay: float = 0.1
    """AdamW's decay of the weights."""
    epochs: int = 60
    """Passes over the training set."""
    batch_size: int = 32
    """Examples per step."""
    seed: int = 0
    """Of the split, the parameters and the shuffles."""
    out: Path | None = None
    """Run folder; runs/compare-gradients if not given."""


TINY = Config(sizes=(8,), epochs=2, batch_size=256)


class Result(NamedTuple):
    """What was measured."""

    before: GradientReport
    after: GradientReport
    history: fnn.History
    test_accuracy: float


def run(config: Config, advance=lambda text="": None) -> Result:
    """Compares, trains, compares. `advance(text)` is called after every epoch."""
    data = load("digits", seed=config.seed)
    net = fnn.mlp((data.x_train.shape[1], *config.sizes, data.classes), config.activation)
    init_key, fit_key = jax.random.split(fnn.key(config.seed))
    params = jax.jit(net.init)(init_key)
    train, test = (data.x_train, data.t_train), (data.x_test, data.t_test)
    steps = config.epochs * -(-len(data.x_train) // config.batch_size)
    rule = fnn.rules.backprop(net, data.loss)
    before = fnn.compare_gradients(net, data.loss, params, *train)
    params, history = fnn.fit(
        rule,
        optax.adamw(optax.cosine_decay_schedule(config.learning_rate, steps), weight_decay=config.weight_decay),
        params,
        train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        key=fit_key,
        validation=test,
        callback=lambda epoch, metrics: advance(f"loss {metrics['loss']:.4f}"),
    )
    after = fnn.compare_gradients(net, data.loss, params, *train)
    return Result(before, after, history, float(history.validation["accuracy"][-1]))


def main(config: Config) -> None:
    with progress(config.epochs, "training") as advance:
        result = run(config, advance)
    print_report("before training", result.before)
    print_report("after training", result.after)
    print_table(
        "Compiled cost of the gradient of the whole training set",
        ("", "flops", "bytes accessed", "temporary bytes"),
        [
            (name, f"{cost.flops:,.0f}", f"{cost.bytes_accessed:,.0f}", f"{cost.temporary_bytes:,}")
            for name, cost in (("manual", result.before.manual), ("automatic", result.before.automatic))
        ],
    )
    print(f"test accuracy {result.test_accuracy:.4f}")
    path = folder("compare-gradients", config.out)
    draw(path / "compare-gradients.png", result)
    save_metrics(path, config, result)
    print(f"picture and metrics in {path}")


def print_report(when: str, report: GradientReport) -> None:
    """A row for every leaf; below, those beyond the tolerance, with their distance to the gradient in float64."""
    rows = [
        (
            leaf.path,
            leaf.shape,
            f"{leaf.max_difference:.1e}",
            f"{leaf.relative_error:.1e}",
            f"{leaf.cosine:.8f}",
            "yes" if leaf.exact else "no",
        )
        for leaf in report.leaves
    ]
    title = f"Manual against automatic gradient {when}: they {'agree' if report.passed else 'DIFFER'}"
    print_table(title, ("leaf", "shape", "max |m - a|", "rel. error", "cosine", "exact"), rows)
    beyond = [(leaf.path, *(f"{e:.1e}" for e in leaf.against_float64)) for leaf in report.leaves if leaf.against_float64]
    if beyond:
        print_table(f"Beyond the tolerance {report.tolerance:.0e}: distance to float64", ("leaf", "manual", "jax.grad"), beyond)


def draw(path: Path, result: Result) -> None:
    """Learning curve, and the relative error of every leaf before and after training."""
    verdict = (
        "agree with those of jax.grad to rounding" if result.before.passed and result.after.passed else "DIFFER from those of jax.grad"
    )
    title = f"Hand-written gradients reach {100 * result.test_accuracy:.1f} % test accuracy on digits and {verdict}"
    with figure(path, title, columns=2, size=(10, 4.2)) as (_, (left, right)):
        epochs = np.arange(1, len(result.history.loss) + 1)
        left.semilogy(epochs, result.history.loss, label="training loss")
        left.semilogy(epochs, result.history.validation["loss"], label="test loss")
        left.semilogy(epochs, 1 - np.asarray(result.history.validation["accuracy"]), label="test error rate")
        left.set(xlabel="epoch", ylabel="cross-entropy (nats), error rate")
        left.legend()
        names = [f"{leaf.path}  {leaf.shape}" for leaf in result.before.leaves]
        rows = np.arange(len(names))
        for report, marker, label in ((result.before, "o", "before training"), (result.after, "s", "after training")):
            right.semilogx([max(leaf.relative_error, 1e-9) for leaf in report.leaves], rows, marker, label=label)
            truth = [leaf.against_float64[1] if leaf.against_float64 else float("nan") for leaf in report.leaves]
            if not np.isnan(truth).all():
                right.semilogx(truth, rows, "kx", label=f"jax.grad against float64, {label}")
        right.axvline(result.before.tolerance, color="black", linestyle="--", linewidth=1, label="float32 tolerance")
        right.set(
            xlabel="relative difference, manual against jax.grad",
            yticks=rows,
            yticklabels=names,
            ylim=(len(names) + 1.5, -0.5),
            xlim=(1e-9, 1e-2),
        )
        right.legend(fontsize=8, loc="lower left")
