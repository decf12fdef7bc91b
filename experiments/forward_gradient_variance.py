"""How near do forward gradients come to the true gradient, and how many directions does that take?

    python -m experiments forward-gradient-variance

Takes one batch of digits and a ReLU net of 26,122 parameters and 256 hidden units, untrained and
trained, and the cosine between the true gradient and the mean of K estimates, K = 1, 2, 4, ...:
along directions in all weights, or in each example's hidden activations
(`fnn.rules.forward_gradient`). Beside them, for one estimate, node and weight perturbation: finite
noise, another for every example.

With P weights the squared cosine is distributed as Beta(K / 2, (P - 1) / 2), so that its mean is K
/ (K + P - 1), whatever the net. What is shown is the mean of the cosine itself, Gamma((K + 1) / 2)
Gamma((K + P - 1) / 2) / (Gamma(K / 2) Gamma((K + P) / 2)): about 0.8 of the root of that for K = 1,
and no different for large K. Along activations the estimate of hidden block l has the variance

    V_l = 1/m^2 sum_i (|h_(l-1),i|^2 + 1) sum_j f'_ij^2 (|d_i|^2 + d_ij^2)        m examples, d_i =
    dE_i/dh over all hidden units j

since what stands for d_i has the covariance |d_i|^2 I + d_i d_i^T; the cosine is near |g| /
sqrt(|g|^2 + sum_l V_l / K). The last block, whose gradient is exact, is part of g and of the
cosine; the hidden blocks alone are shown too.

Expect what theory says. One estimate along the weights has a cosine of 0.005 with the gradient,
1,024 of 0.19, untrained or trained. One along the activations has 0.14 untrained and 0.07 trained,
as 500 and 130 along the weights; 1,024 have 0.98 and 0.89. Node perturbation is as good as that;
weight perturbation, with a direction for every example, has 0.011 and 0.006. Takes about a minute
and a half.

Source: Baydin et al. (2022), arXiv:2202.08587; Ren et al. (2022), arXiv:2210.03310.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.scipy.special import gammaln

import fnn
from experiments._data import load
from experiments._run import (
    COLOURS,
    figure,
    folder,
    plain_numbers,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate
from fnn.nets.blocks import blocks
from fnn.rules.forward_gradient import forward_gradient
from fnn.rules.perturbation import node_perturbation, weight_perturbation


@dataclass(frozen=True)
class Config:
    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer, one layer at least."""
    batch_size: int = 32
    """Digits whose mean gradient is estimated."""
    tangents: int = 1024
    """The most directions; cosines are shown for powers of 2 up to it."""
    draws: int = 64
    """How often everything is drawn anew, 2 at least; ten times as often where there is one
    estimate only."""
    epochs: int = 20
    """Passes over the digits, by backprop, before the second measurement."""
    learning_rate: float = 1e-3
    """Adam's, for these."""
    std: float = 0.001
    """Of the noise of node and weight perturbation."""
    seed: int = 0
    """Of the parameters, the digits and the directions."""
    out: Path | None = None
    """Run folder; runs/forward-gradient-variance if not given."""


TINY = Config(hidden=(6,), batch_size=4, tangents=4, draws=2, epochs=1)


class Curve(NamedTuple):
    """Cosines of one estimate."""

    net: str
    estimate: str
    draws: int
    tangents: np.ndarray  # [counts]: K
    mean: np.ndarray  # [counts], over draws
    std: np.ndarray  # [counts]
    predicted: np.ndarray  # [counts]


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> list[Curve]:
    """Measures the untrained and the trained net; calls `advance(text)` after every estimate."""
    check(config)
    data = load("digits", seed=config.seed)
    net = fnn.mlp((data.features, *config.hidden, data.outputs))
    batch = (
        jnp.asarray(data.x_train[: config.batch_size]),
        jnp.asarray(data.t_train[: config.batch_size]),
    )
    params_key, fit_key, key = jax.random.split(fnn.key(config.seed), 3)
    params = jax.jit(net.init)(params_key)
    settings = {"epochs": config.epochs, "batch_size": 32, "key": fit_key}
    trained, _ = fnn.fit(
        fnn.rules.backprop(net, data.loss),
        optax.adam(config.learning_rate),
        params,
        (data.x_train, data.t_train),
        **settings,
    )
    rules = {
        "weights": (forward_gradient(net, data.loss), config.tangents, config.draws),
        "activations": (
            forward_gradient(net, data.loss, perturb="activations"),
            config.tangents,
            config.draws,
        ),
        "node perturbation": (
            node_perturbation(net, data.loss, std=config.std),
            1,
            10 * config.draws,
        ),
        "weight perturbation": (
            weight_perturbation(net, data.loss, std=config.std),
            1,
            10 * config.draws,
        ),
    }
    curves = []
    for name, (rule, most, draws) in rules.items():
        measure, counts = (
            jax.jit(partial(cosines, net, rule, most=most)),
            2 ** np.arange(int(np.log2(most)) + 1),
        )
        for which, p in (("untrained", params), ("trained", trained)):
            # [draws, counts, 2]
            found = np.asarray(measure(p, batch, jax.random.split(key, draws)))[:, counts - 1]
            theory = expected(net, data.loss, p, batch, name, counts)
            for i, part in enumerate(
                ("", ", hidden blocks alone") if name == "activations" else ("",)
            ):
                mean, std = found[..., i].mean(0), found[..., i].std(0, ddof=1)
                curves.append(Curve(which, name + part, draws, counts, mean, std, theory[i]))
            advance(f"{name}, {which}")
    return curves


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    if not config.hidden:
        raise ValueError("`hidden` is empty: give one layer at least, `--hidden 128`.")
    for name in ("batch_size", "tangents", "draws", "epochs"):
        _validate.positive(name, getattr(config, name), whole=True)
    if config.draws < 2:
        raise ValueError(
            f"`draws` must be at least 2, since their spread is shown; got {config.draws}."
        )
    fnn.key(config.seed)


def cosines(net: fnn.Layer, rule: fnn.Rule, params: Any, batch: Any, keys: Any, most: int) -> Any:
    """Cosines of the true gradient and the mean of the first 1, 2, ... estimates, `[draws, most,
    2]`: of all, and of the hidden blocks."""
    true = fnn.value_and_grad(net, rule.loss)(params, *batch)[1]

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        state, total = carry
        _, grads, state = rule.value_and_grad(params, state, *batch)
        total = jax.tree.map(jnp.add, total, grads)
        return (state, total), jnp.stack([cosine(total, true), cosine(total[:-1], true[:-1])])

    return lax.map(
        lambda key: lax.scan(step, (key, jax.tree.map(jnp.zeros_like, true)), length=most)[1], keys
    )


def cosine(a: Any, b: Any) -> Any:
    """Of the angle between two trees."""
    return dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b))


def dot(a: Any, b: Any) -> Any:
    """The inner product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def expected(
    net: fnn.Layer, loss: fnn.Loss, params: Any, batch: Any, name: str, counts: np.ndarray
) -> np.ndarray:
    """What theory has for the mean cosine, `[2, counts]`.

    Of all, and of the hidden blocks along activations.
    """
    _, true = fnn.value_and_grad(net, loss)(params, *batch)
    p = sum(leaf.size for leaf in jax.tree.leaves(params))
    if name == "weights":
        with jax.enable_x64(True):  # gammaln(P) is some 10^5, and differences of it are wanted
            k = jnp.asarray(counts, jnp.float64)
            mean = jnp.exp(
                gammaln((k + 1) / 2)
                + gammaln((k + p - 1) / 2)
                - gammaln(k / 2)
                - gammaln((k + p) / 2)
            )
            return np.stack([np.asarray(mean)] * 2)
    if name == "weight perturbation":  # for every example (P + 1) |g_i|^2
        norms = fnn.per_example.norms(fnn.source(net, loss))(params, *batch)
        variance = (p + 1) * float((norms**2).sum()) / len(norms) ** 2
    else:
        variance = activity_variance(net, loss, params, batch)
    squares = [float(dot(g, g)) for g in (true, true[:-1])]
    return np.stack([np.sqrt(s / (s + variance / counts)) for s in squares])


def activity_variance(net: fnn.Layer, loss: fnn.Loss, params: Any, batch: Any) -> float:
    """The sum of V_l over hidden blocks of dense layer and ReLU, for one estimate."""
    hs, _ = blocks(net).forward(blocks(net).split(params), batch[0])
    # with B = w: dE_i/dh_l
    told = fnn.rules.feedback_alignment(net, loss).signals(params, params, *batch)
    d, inputs, outputs = (
        [np.asarray(a, np.float64) for a in some] for some in (told[:-1], hs[:-2], hs[1:-1])
    )
    whole = np.sum([(a**2).sum(1) for a in d], axis=0)
    each = [
        ((h**2).sum(1) + 1) * ((y > 0) * (whole[:, None] + a**2)).sum(1)
        for h, y, a in zip(inputs, outputs, d, strict=True)
    ]
    return float(np.sum(each)) / len(batch[0]) ** 2


def main(config: Config) -> None:
    with progress(8, "measuring") as advance:
        curves = run(config, advance)
    rows = [
        (
            f"{c.estimate}, {c.net}",
            c.tangents[i],
            f"{c.mean[i]:.4f} ± {c.std[i]:.4f}",
            f"{c.predicted[i]:.4f}",
        )
        for c in curves
        for i in sorted({0, len(c.tangents) // 2, len(c.tangents) - 1})
    ]
    print_table("Cosine with the true gradient", ("estimate", "K", "mean ± sd", "predicted"), rows)
    path = folder("forward-gradient-variance", config.out)
    draw(path / "forward-gradient-variance.png", curves, config)
    save_metrics(path, config, curves)
    print(f"picture and metrics in {path}")


def draw(path: Path, curves: list[Curve], config: Config) -> None:
    """Cosine against the number of directions, untrained and trained."""
    first = {c.estimate: c for c in curves if c.net == "untrained"}
    weights, one = first["weights"], first["activations"].mean[0]
    as_many = float(f"{np.interp(one, weights.predicted, weights.tangents):.1g}")
    title = (
        "One direction per example in the hidden activations comes as near to the gradient, a "
        f"cosine of {one:.2f}, as about {as_many:.0f} directions in the weights (untrained net); "
        "node perturbation is the same, in finite steps"
    )
    styles: dict[str, Any] = {
        "activations": {
            "color": COLOURS[0],
            "marker": "o",
            "label": "forward gradient, activations",
        },
        "activations, hidden blocks alone": {
            "color": COLOURS[5],
            "marker": "s",
            "label": "the same, hidden blocks alone",
        },
        "weights": {"color": COLOURS[1], "marker": "^", "label": "forward gradient, weights"},
        "node perturbation": {
            "color": COLOURS[2],
            "marker": "D",
            "label": "node perturbation, K = 1",
        },
        "weight perturbation": {
            "color": COLOURS[3],
            "marker": "v",
            "label": "weight perturbation, K = 1",
        },
    }
    beside = {
        "activations, hidden blocks alone": 1.12,
        "node perturbation": 0.75,
        "weight perturbation": 0.75,
    }
    with figure(path, title, columns=2, size=(10.5, 4.8)) as (_, panels):
        for axes, net in zip(panels, ("untrained", "trained"), strict=True):
            for c in (c for c in curves if c.net == net):
                # side by side, so that bars do not hide each other
                x = c.tangents * beside.get(c.estimate, 1.0)
                axes.errorbar(
                    x,
                    c.mean,
                    c.std,
                    linestyle="none",
                    markersize=5,
                    capsize=2,
                    elinewidth=1,
                    **styles[c.estimate],
                )
                if "perturbation" not in c.estimate:
                    axes.plot(
                        c.tangents,
                        c.predicted,
                        "--",
                        color=styles[c.estimate]["color"],
                        linewidth=1.2,
                    )
            axes.plot([], [], "--", color="black", linewidth=1.2, label="theory")
            axes.set(xscale="log", yscale="log", xlabel="estimates averaged, K", title=f"{net} net")
            axes.set_ylim(0.3 * weights.mean[0], 1.3)  # a bar that reaches below 0 is cut off
            plain_numbers(axes.xaxis)
            plain_numbers(axes.yaxis)
        panels[0].set(ylabel="cosine with the true gradient")
        panels[0].legend(fontsize=9, loc="lower right")
        note = (
            f"mean ± standard deviation of {config.draws} draws,\n{10 * config.draws} of node and "
            "weight perturbation"
        )
        panels[1].text(0.98, 0.03, note, ha="right", fontsize=9, transform=panels[1].transAxes)
