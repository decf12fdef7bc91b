"""Is the noise of DP-SGD as large as promised, and no example's share larger than the clip norm?

    python -m experiments privacy-audit

On digits and a net that is trained a little: draws many private gradients of one batch and looks at what is left without the batch
(it must be normal, with standard deviation noise_multiplier * max_norm), and takes one example after the other out of the batch, before
clipping bites and after: the clipped sum may move by max_norm at most. Ends with an error where a bound is broken. Takes about 10 seconds.

A finite probe of the code, not a proof of privacy: see fnn/rules/private_sgd.py for what is and is not guaranteed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import fnn
from experiments._data import load
from experiments._run import COLOURS, figure, folder, print_table, progress, save_metrics
from fnn import _check


@dataclass(frozen=True)
class Config:
    """What is audited."""

    sizes: tuple[int, ...] = (32,)
    """Hidden units, layer by layer."""
    max_norm: float = 2.5
    """Clip norm."""
    noise_multiplier: float = 1.1
    """Standard deviation of the noise in the sum, in clip norms."""
    batch_size: int = 256
    """Examples in the audited batch."""
    draws: int = 400
    """Private gradients of that batch."""
    epochs: int = 6
    """Passes of ordinary training before the audit."""
    seed: int = 0
    """Of the split, the net and the noise."""
    out: Path | None = None
    """Run folder; runs/privacy-audit if not given."""


TINY = Config(sizes=(4,), batch_size=16, draws=8, epochs=1)
NAMES = ("before training", "after training")


class Result(NamedTuple):
    """What was measured, in units of what was promised."""

    noise: np.ndarray  # [draws * parameters] sorted: every coordinate of the noise over noise_multiplier * max_norm
    std: float  # their standard deviation: 1
    std_bound: float  # how far from 1 it may be: five standard errors
    ks: float  # Kolmogorov-Smirnov distance to the normal distribution
    ks_bound: float  # greatest distance of a true sample, but for a chance of 1e-6
    shares: dict[str, np.ndarray]  # [batch]: |sum - sum without the example| / max_norm
    clipped: dict[str, float]  # share of the batch whose gradient was longer than max_norm


def run(config: Config, advance=lambda text="": None) -> Result:
    """Measures; `advance(text)` is called after each of three parts."""
    _check.positive("draws", config.draws, whole=True)
    data = load("digits", seed=config.seed)
    net, loss = fnn.mlp((data.features, *config.sizes, data.classes), "tanh"), data.loss
    source = fnn.factors(net, loss)
    init_key, fit_key, noise_key = jax.random.split(fnn.key(config.seed), 3)
    x, t = data.x_train[: config.batch_size], data.t_train[: config.batch_size]
    first = jax.jit(net.init)(init_key)
    fnn.per_example.check_source(source, first, x, t)
    settings = {"epochs": config.epochs, "batch_size": 32, "key": fit_key}
    trained, _ = fnn.fit(fnn.rules.backprop(net, loss), optax.adam(2e-3), first, (data.x_train, data.t_train), **settings)
    shares, clipped = {}, {}
    for name, params in zip(NAMES, (first, trained), strict=True):
        shares[name], clipped[name] = neighbours(source, params, x, t, config.max_norm)
        advance(name)
    noise = noises(net, loss, trained, x, t, noise_key, config)
    advance("noise")
    ks = float(stats.kstest(noise, "norm").statistic)
    # the distance of a true sample of n is beyond d with probability 2 exp(-2 n d^2) at most (Dvoretzky, Kiefer, Wolfowitz; Massart 1990)
    ks_bound = float(np.sqrt(np.log(2e6) / (2 * noise.size)))
    return Result(np.sort(noise), float(noise.std()), 5 / np.sqrt(2 * noise.size), ks, ks_bound, shares, clipped)


def neighbours(source: Any, params: Any, x: Any, t: Any, max_norm: float) -> tuple[np.ndarray, float]:
    """How far the clipped sum moves when one example leaves, over `max_norm`, for every example; and how many gradients were longer."""
    clipped_sum = fnn.per_example.clipped_gradient(source, max_norm, reduction="sum")

    @jax.jit
    def moves(params: Any, x: Any, t: Any) -> tuple[Any, Any]:
        whole = clipped_sum(params, x, t)

        def move(weights: Any) -> Any:
            other = clipped_sum(params, x, t, weights=weights).gradient
            return optax.tree.norm(jax.tree.map(jnp.subtract, whole.gradient, other))

        return jax.lax.map(move, 1 - jnp.eye(len(x), dtype=x.dtype)), whole.norms

    distances, norms = moves(params, jnp.asarray(x), jnp.asarray(t))
    return np.asarray(distances, np.float64) / max_norm, float((norms > max_norm).mean())


def noises(net: fnn.Layer, loss: fnn.Loss, params: Any, x: Any, t: Any, key: Any, config: Config) -> np.ndarray:
    """What private gradients of one batch have beside the clipped sum, in units of the promised standard deviation."""
    rule = fnn.rules.private_sgd(net, loss, config.max_norm, config.noise_multiplier, batch_size=len(x))
    silent = fnn.rules.private_sgd(net, loss, config.max_norm, 0.0, batch_size=len(x))

    def gradient(rule: Any, key: Any) -> Any:
        grads = rule.value_and_grad(params, rule.init(key, params), x, t)[1]
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])

    @jax.jit
    def draw(keys: Any) -> Any:
        without = gradient(silent, keys[0])
        return jax.lax.map(lambda key: gradient(rule, key) - without, keys)

    noise = np.asarray(draw(jax.random.split(key, config.draws)), np.float64)
    return noise.ravel() * len(x) / (config.noise_multiplier * config.max_norm)


def check(result: Result) -> None:
    """Raises an ArithmeticError where a promise is broken."""
    if abs(result.std - 1) > result.std_bound:
        raise ArithmeticError(f"The noise's standard deviation is {result.std:.5f} times the promised, beyond 1 ± {result.std_bound:.5f}.")
    if result.ks > result.ks_bound:
        raise ArithmeticError(
            f"The noise is not normal: Kolmogorov-Smirnov distance {result.ks:.5f}, at most {result.ks_bound:.5f} expected."
        )
    for name, shares in result.shares.items():
        if shares.max() > 1 + 1e-4:  # a difference of two float32 sums
            raise ArithmeticError(f"{name}: one example moves the clipped sum by {shares.max():.6f} clip norms.")


def main(config: Config) -> None:
    with progress(3, "auditing") as advance:
        result = run(config, advance)
    rows = [
        ("standard deviation of the noise / promised", f"{result.std:.5f}", f"1 ± {result.std_bound:.5f}"),
        ("Kolmogorov-Smirnov distance to normal", f"{result.ks:.5f}", f"at most {result.ks_bound:.5f}"),
        *((f"greatest move by one example / clip norm, {name}", f"{s.max():.6f}", "at most 1 + 1e-4") for name, s in result.shares.items()),
        *((f"share of gradients that were clipped, {name}", f"{100 * c:.1f} %", "") for name, c in result.clipped.items()),
    ]
    print_table(
        f"Audit of private_sgd: {result.noise.size:,} coordinates of noise, {config.batch_size} neighbours",
        ("", "measured", "promised"),
        rows,
    )
    path = folder("privacy-audit", config.out)
    draw(path / "privacy-audit.png", result)
    save_metrics(path, config, result._replace(noise=np.quantile(result.noise, np.linspace(0, 1, 101))))
    print(f"picture and metrics in {path}")
    check(result)


def draw(path: Path, result: Result) -> None:
    """The noise against the normal density, and how far one example moves the sum."""
    most = max(shares.max() for shares in result.shares.values())
    title = (
        f"The noise of DP-SGD is {result.std:.4f} times as large as promised; one example moves the sum by {most:.4f} clip norms at most"
    )
    with figure(path, title, columns=2, size=(10.6, 4.2)) as (_, (left, right)):
        z = np.linspace(-4.5, 4.5, 200)
        left.hist(result.noise, bins=np.linspace(-4.5, 4.5, 91), density=True, color=COLOURS[5], label="measured")
        left.plot(z, stats.norm.pdf(z), color=COLOURS[6], label="normal density")
        left.set(xlabel="noise / (noise multiplier × clip norm)", ylabel="density", yscale="log", ylim=(1e-5, 10))
        left.legend(loc="upper left")
        for (name, shares), colour in zip(result.shares.items(), (COLOURS[1], COLOURS[0]), strict=True):
            right.hist(shares, bins=np.arange(-0.01, 1.1, 0.02), color=colour, alpha=0.6, label=name)
        right.axvline(1, color="black", linestyle="--", linewidth=1, label="clip norm")
        right.set(xlabel="move of the clipped sum by one example / clip norm", ylabel="examples", yscale="log", xlim=(0, 1.1))
        right.legend(loc="upper left")
