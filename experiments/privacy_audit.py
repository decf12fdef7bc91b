"""Is the noise as large as promised, and no example's share larger than the clip norm?

    python -m experiments privacy-audit

Trains a net on digits for a while, then asks `fnn.rules.private_sgd` for what it promises. The
noise: many draws of the gradient of one batch, less the gradient without noise, in units of
noise_multiplier * max_norm, must be standard normal (standard deviation, and the Kolmogorov-Smirnov
distance). The share: the sum of clipped gradients with and without one example, for many batches
and examples, some of them with other labels, a thousand times as large, or not finite, must differ
by at most max_norm to rounding, in float32 and float64. Ends in an error where a bound is broken.
Takes about 12 seconds.

An audit of numbers, not of privacy: it shows no error in sum and noise, and says nothing about
generators, sampling or what else is told.
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
from jax.flatten_util import ravel_pytree
from scipy import stats

import fnn
from experiments import _run
from experiments._data import Dataset, load
from fnn import activations

LIMIT = 5.0  # standard errors
KS_LIMIT = 2.4  # sqrt(samples) times the distance; a chance of 2e-5


@dataclass(frozen=True)
class Config:
    """What is audited, and how thoroughly."""

    max_norm: float = 1.0
    """Greatest norm of one example's gradient."""
    noise_multiplier: float = 1.1
    """Standard deviation of the noise in units of max_norm."""
    sizes: tuple[int, ...] = (32,)
    """Hidden units, layer by layer."""
    activation: activations.Name = "relu"
    """Any name out of fnn.activations.ACTIVATIONS."""
    epochs: int = 10
    """Passes of plain training before the audit: then some gradients are clipped and some are
    not."""
    batch_size: int = 256
    """Examples in a batch."""
    draws: int = 500
    """Draws of the noise of all parameters."""
    batches: int = 8
    """Batches whose neighbours are tried, each with every example taken out or put in."""
    seed: int = 0
    """Of everything."""
    out: Path | None = None
    """Run folder, runs/privacy-audit if left out."""


TINY = Config(sizes=(4,), epochs=1, batch_size=16, draws=20, batches=1)


class Result(NamedTuple):
    """What was measured, and which bounds that breaks."""

    samples: int
    std: float  # of the noise, in units of noise_multiplier * max_norm: 1
    ks_distance: float  # Kolmogorov and Smirnov's, to the standard normal distribution
    noise_counts: np.ndarray  # [bins]
    noise_edges: np.ndarray  # [bins + 1], in units of noise_multiplier * max_norm
    neighbours: int
    nothing: int  # neighbours whose example adds nothing: its gradient is not finite, or 0
    # by dtype: the largest difference of neighbouring sums, in units of max_norm
    largest: dict[str, float]
    allowed: dict[str, float]  # by dtype: 1 and what rounding may add
    clipped: float  # share of neighbours at the bound
    share_counts: np.ndarray  # [bins]
    share_edges: np.ndarray  # [bins + 1], in units of max_norm
    broken: tuple[str, ...]


def run(config: Config) -> Result:
    """Trains a little, and measures noise and shares."""
    check(config)
    data = load("digits", seed=config.seed)
    net = fnn.mlp((data.features, *config.sizes, data.outputs), config.activation)
    init_key, fit_key, noise_key = jax.random.split(fnn.key(config.seed), 3)
    rule, settings = (
        fnn.rules.backprop(net, data.loss),
        {"epochs": config.epochs, "batch_size": min(32, len(data.x_train)), "key": fit_key},
    )
    params, _ = fnn.fit(
        rule, optax.sgd(0.1), jax.jit(net.init)(init_key), (data.x_train, data.t_train), **settings
    )
    noise = _noise(config, net, data, params, noise_key)
    std, ks = float(noise.std()), float(stats.kstest(noise, "norm").statistic)
    shares = {dtype: _shares(config, net, data, params, dtype) for dtype in ("float32", "float64")}
    # a sum of batch_size vectors of norm max_norm has a relative error of some eps, and of it
    # max_norm is one part
    allowed = {dtype: 1 + 2 * config.batch_size * float(np.finfo(dtype).eps) for dtype in shares}
    largest = {dtype: float(share.max()) for dtype, share in shares.items()}
    broken = [
        f"the largest share in {d} is {largest[d]:.8f} max_norm, allowed is {allowed[d]:.8f}"
        for d in shares
        if largest[d] > allowed[d]
    ]
    if abs(std - 1) > LIMIT / (2 * len(noise)) ** 0.5:
        broken.append(f"the noise's standard deviation is {std:.5f} of what it must be")
    if ks * len(noise) ** 0.5 > KS_LIMIT:
        broken.append(f"the noise is not normal, Kolmogorov-Smirnov distance {ks:.5f}")
    exact = shares["float64"]
    return Result(
        len(noise),
        std,
        ks,
        *np.histogram(noise, np.linspace(-5, 5, 101)),
        len(exact),
        int((exact == 0).sum()),
        largest,
        allowed,
        float((exact > 1 - 1e-9).mean()),
        *np.histogram(exact / allowed["float64"], np.linspace(0, 1.2, 49)),
        tuple(broken),
    )


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    activations.get(config.activation)
    _run.check_positive(config, "sizes", "epochs", "batch_size", "draws", "batches", whole=True)
    _run.check_positive(config, "max_norm", "noise_multiplier")
    fnn.key(config.seed)


def main(config: Config) -> None:
    """Prints the table, saves `privacy-audit.png` and `metrics.json`.

    Raises an error where a bound is broken.
    """
    check(config)
    folder = _run.folder("privacy-audit", config.out)
    result = run(config)
    rows: list[tuple[str, ...]] = [
        (
            "noise: standard deviation / (noise_multiplier max_norm)",
            f"{result.std:.5f}",
            f"1 ± {LIMIT / (2 * result.samples) ** 0.5:.5f}",
        ),
        (
            "noise: Kolmogorov-Smirnov distance to normal",
            f"{result.ks_distance:.5f}",
            f"{KS_LIMIT / result.samples**0.5:.5f}",
        ),
        *(
            (
                f"largest share / max_norm, {d}",
                f"{result.largest[d]:.12g}",
                f"{result.allowed[d]:.12g}",
            )
            for d in result.largest
        ),
    ]
    title = (
        f"{result.samples:,} draws of noise, {result.neighbours:,} pairs of neighbouring batches, "
        f"{100 * result.clipped:.0f} % clipped"
    )
    _run.print_table(title, ("", "measured", "bound"), rows)
    draw(result, folder / "privacy-audit.png")
    print(f"Saved {_run.save_metrics(folder, config, result)} and {folder / 'privacy-audit.png'}")
    if result.broken:
        raise ArithmeticError(f"The audit failed: {'; '.join(result.broken)}.")


def draw(result: Result, path: Path) -> None:
    """The noise against the normal density, and the shares against the clip norm."""
    verdict = "breaks its promise" if result.broken else "keeps its promise"
    title = (
        f"Private SGD {verdict}: the noise's standard deviation is {result.std:.4f} times what it "
        f"must be, and one example changes the sum by at most {result.largest['float32']:.7f} clip "
        f"norms ({result.neighbours:,} pairs)"
    )
    with _run.figure(path, title, columns=2, size=(10, 4.2)) as (_, (left, right)):
        z = np.linspace(-5, 5, 201)
        density = result.noise_counts / result.samples / np.diff(result.noise_edges)
        left.stairs(
            density,
            result.noise_edges,
            fill=True,
            color=_run.COLOURS[5],
            label=f"{result.samples:,} draws",
        )
        left.plot(
            z, stats.norm.pdf(z), color=_run.COLOURS[6], linewidth=1.2, label="normal density"
        )
        left.set(
            xlabel="noise / (noise multiplier × clip norm)",
            ylabel="density",
            yscale="log",
            ylim=(1e-6, 10),
        )
        left.legend(loc="upper center", ncols=2)
        right.stairs(
            result.share_counts,
            result.share_edges,
            fill=True,
            color=_run.COLOURS[0],
            label="pairs of neighbouring batches",
        )
        right.axvline(1, color=_run.COLOURS[1], linestyle="--", linewidth=1.5, label="clip norm")
        right.set(
            xlabel="change of the sum by one example / clip norm", ylabel="pairs", yscale="log"
        )
        right.legend(loc="upper center", bbox_to_anchor=(0.45, 1))


def _noise(config: Config, net: fnn.Layer, data: Dataset, params: Any, key: Any) -> np.ndarray:
    """`[draws * parameters]`.

    Gradients less the one without noise, in units of what the noise is to be.
    """
    batch = data.x_train[: config.batch_size], data.t_train[: config.batch_size]
    noisy, still = (
        _gradient(config, net, data.loss, noise) for noise in (config.noise_multiplier, 0.0)
    )
    rest = still(params, key, *batch)
    every = jax.jit(lambda keys: jax.lax.map(lambda k: noisy(params, k, *batch) - rest, keys))(
        jax.random.split(key, config.draws)
    )
    return np.asarray(every).ravel() * (len(batch[0]) / (config.noise_multiplier * config.max_norm))


def _shares(config: Config, net: fnn.Layer, data: Dataset, params: Any, dtype: str) -> np.ndarray:
    """`[neighbours]`: the norm of the difference that one example makes to the sum, in units of
    `max_norm`."""
    rng, found = np.random.default_rng(config.seed), []
    with jax.enable_x64(dtype == "float64"):
        total = _gradient(config, net, data.loss, 0.0)
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)

        @jax.jit
        def differences(x: Any, t: Any, present: Any) -> Any:
            def one(i: Any) -> Any:
                sums = [total(params, key, x, t, present.at[i].set(w)) for w in (1.0, 0.0)]
                return jnp.linalg.norm(sums[0] - sums[1]) * len(x)

            return jax.lax.map(one, jnp.arange(len(x)))

        key = fnn.key(config.seed)
        for _ in range(config.batches):
            rows = rng.choice(
                len(data.x_train), min(2 * config.batch_size, len(data.x_train)), replace=False
            )
            x, t, kind = (
                data.x_train[rows].astype(dtype),
                data.t_train[rows],
                rng.integers(0, 8, len(rows)),
            )
            # another label
            t = np.where(kind == 1, rng.integers(0, data.classes, len(rows)), t).astype(np.int32)
            x[kind == 2] *= 1000
            x[kind == 3, :1] = np.where(
                rng.random((int((kind == 3).sum()), 1)) < 0.5, np.nan, np.inf
            )
            # half are taken out of the batch, half are put in
            present = (np.arange(len(rows)) < len(rows) // 2).astype(dtype)
            found.append(np.asarray(differences(x, t, jnp.asarray(present))) / config.max_norm)
    return np.concatenate(found)


def _gradient(
    config: Config, net: fnn.Layer, loss: fnn.Loss, noise_multiplier: float
) -> Callable[..., Any]:
    """The rule's gradient as one vector.

    It is a function `(params, key, x, targets, weights=None) -> [parameters]`.
    """
    rule = fnn.rules.private_sgd(net, loss, config.max_norm, noise_multiplier)
    return lambda params, key, *batch: ravel_pytree(
        rule.value_and_grad(params, rule.init(key, params), *batch)[1]
    )[0]
