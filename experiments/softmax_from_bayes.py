"""Is softmax Bayes' rule?

    python -m experiments softmax-from-bayes

Three classes of points in the plane are Gaussian, with priors of 0.5, 0.3 and 0.2. With z_k = ln
P(x|C_k) P(C_k), softmax(z) should be the posterior P(C_k|x) that Bayes' rule gives from scipy's
densities: expect them to differ by less than 1e-14 in float64. Where all densities underflow to 0,
Bayes' rule as printed gives 0/0; softmax(z) still gives the posterior.

If the classes share one covariance, z is linear in x up to a number common to all, which softmax
ignores; so one dense layer can give the posterior, and its weights can be learnt from labelled
points alone. Expect it to get as many points right as Bayes' rule to a few tenths of a percent, and
straight boundaries; with a covariance for every class they are curved. Takes about 4 seconds.

Source: lectures 000 and 002 (softmax from Bayes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import ListedColormap
from scipy.stats import multivariate_normal

import fnn
from experiments._run import COLOURS, check_positive, figure, folder, print_table, save_metrics

MEANS = np.array([[-1.5, -0.5], [1.5, -1.0], [0.5, 1.8]])
SHARED = np.array([[[1.0, 0.3], [0.3, 0.8]]] * 3)
OWN = np.array([[[0.4, 0.0], [0.0, 1.5]], [[1.5, 0.6], [0.6, 0.6]], [[0.3, -0.1], [-0.1, 0.3]]])
FAR = np.array([[120.0, 80.0]])
SHOWN = 400  # points in the picture
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    priors: tuple[float, float, float] = (0.5, 0.3, 0.2)
    """P(C_k), above 0, with the sum 1."""
    grid: int = 201
    """Points per side of the square on which posteriors are compared and drawn."""
    examples: int = 3000
    """Labelled points that the dense layer learns from, and again as many on which it is tested."""
    epochs: int = 300
    """Steps of gradient descent, each on all points."""
    learning_rate: float = 0.5
    """Its step size."""
    seed: int = 0
    """Of the points and of the layer's first weights."""
    out: Path | None = None
    """Run folder; runs/softmax-from-bayes if not given."""


TINY = Config(grid=21, examples=300, epochs=20)


class Posterior(NamedTuple):
    """P(C_k|x) on the grid, `[grid, grid, 3]`."""

    bayes: np.ndarray
    softmax: np.ndarray
    difference: float  # the greatest


class Result(NamedTuple):
    """What was measured."""

    axis: np.ndarray  # [grid]
    points: np.ndarray  # [examples, 2], of classes that share a covariance
    labels: np.ndarray  # [examples]
    shared: Posterior
    own: Posterior
    learnt: np.ndarray  # [grid, grid, 3]: by the dense layer
    # the mean over the test points of |learnt - Bayes|, the greatest of the three
    learnt_error: float
    accuracy: tuple[float, float]  # on test points: by Bayes' rule, by the dense layer
    # [3], at the point FAR: softmax(z), and Bayes' rule as printed
    far: tuple[np.ndarray, np.ndarray]


def run(config: Config) -> Result:
    """Compares softmax(z) with Bayes' rule for both kinds of classes, and trains a dense layer on
    points of the first."""
    check(config)
    axis = np.linspace(-5, 5, config.grid)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    shared, own = (posterior(grid, covariances, config.priors) for covariances in (SHARED, OWN))
    rng = np.random.default_rng(config.seed)
    (x, t), (x_test, t_test) = (draw_points(rng, config) for _ in range(2))
    learnt = train(config, x, t)
    bayes, ours = bayes_rule(x_test, SHARED, config.priors), learnt(x_test)
    accuracy = float((bayes.argmax(-1) == t_test).mean()), float((ours.argmax(-1) == t_test).mean())
    far = softmax_of_z(FAR, OWN, config.priors)[0], bayes_rule(FAR, OWN, config.priors)[0]
    error = float(np.abs(ours - bayes).max(-1).mean())
    return Result(axis, x, t, shared, own, learnt(grid), error, accuracy, far)


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "priors")
    if len(config.priors) != 3 or abs(sum(config.priors) - 1) > 1e-9:
        raise ValueError(
            f"`priors` must be three numbers with the sum 1, got {config.priors} with the sum "
            f"{sum(config.priors):g}."
        )
    check_positive(config, "grid", "examples", "epochs", whole=True)
    check_positive(config, "learning_rate")
    if config.grid < 2:
        raise ValueError(
            f"`grid` must be at least 2, since boundaries are drawn, got {config.grid}."
        )
    fnn.key(config.seed)


def posterior(x: np.ndarray, covariances: np.ndarray, priors: tuple[float, ...]) -> Posterior:
    """Both ways to the posterior, and how far they are apart."""
    bayes, softmax = bayes_rule(x, covariances, priors), softmax_of_z(x, covariances, priors)
    return Posterior(bayes, softmax, float(np.abs(bayes - softmax).max()))


def bayes_rule(x: np.ndarray, covariances: np.ndarray, priors: tuple[float, ...]) -> np.ndarray:
    """P(C_k|x) = P(x|C_k) P(C_k) / sum_j P(x|C_j) P(C_j), `[..., 3]`.

    NaN where every density underflows to 0.
    """
    densities = [
        multivariate_normal(mean, covariance).pdf(x)
        for mean, covariance in zip(MEANS, covariances, strict=True)
    ]
    joint = np.stack(
        [
            np.reshape(density, x.shape[:-1]) * prior
            for density, prior in zip(densities, priors, strict=True)
        ],
        axis=-1,
    )
    with np.errstate(invalid="ignore"):
        return joint / joint.sum(-1, keepdims=True)


def softmax_of_z(x: np.ndarray, covariances: np.ndarray, priors: tuple[float, ...]) -> np.ndarray:
    """fnn's softmax of z_k = ln P(C_k) - ln det(2 pi S_k) / 2 - (x - m_k)^T S_k^-1 (x - m_k) / 2,
    in float64, `[..., 3]`."""
    z = []
    for mean, covariance, prior in zip(MEANS, covariances, priors, strict=True):
        distance = np.einsum("...i,ij,...j->...", x - mean, np.linalg.inv(covariance), x - mean)
        z.append(np.log(prior) - np.log(np.linalg.det(2 * np.pi * covariance)) / 2 - distance / 2)
    with jax.enable_x64(True):
        return np.asarray(fnn.activations.softmax.apply((), jnp.asarray(np.stack(z, axis=-1))))


def draw_points(rng: np.random.Generator, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Points of the classes that share a covariance, and their labels."""
    labels = rng.choice(3, config.examples, p=config.priors)
    noise = rng.multivariate_normal(np.zeros(2), SHARED[0], config.examples)
    return (MEANS[labels] + noise).astype(np.float32), labels.astype(np.int32)


def train(config: Config, x: np.ndarray, t: np.ndarray) -> Any:
    """A dense layer trained by softmax cross-entropy.

    A function from points to its three probabilities.
    """
    net = fnn.dense(2, 3)
    init_key, fit_key = jax.random.split(fnn.key(config.seed))
    rule, optimizer = fnn.rules.backprop(net, LOSS), optax.sgd(config.learning_rate)
    settings = {"epochs": config.epochs, "batch_size": config.examples, "key": fit_key}
    params, _ = fnn.fit(rule, optimizer, net.init(init_key), (x, t), **settings)
    return lambda x: np.asarray(
        fnn.activations.softmax.apply((), net.apply(params, jnp.asarray(x, jnp.float32)))
    )


def main(config: Config) -> None:
    check(config)
    path = folder("softmax-from-bayes", config.out)
    result = run(config)
    rows = [("greatest |softmax(z) - Bayes|, shared covariance", f"{result.shared.difference:.1e}")]
    rows += [("greatest |softmax(z) - Bayes|, own covariances", f"{result.own.difference:.1e}")]
    rows += [
        (
            f"softmax(z) at {FAR[0].tolist()}, own covariances",
            ", ".join(f"{p:.4g}" for p in result.far[0]),
        )
    ]
    rows += [("Bayes' rule as printed, there", ", ".join(f"{p:.4g}" for p in result.far[1]))]
    rows += [
        ("test points right, Bayes' rule, shared covariance", f"{100 * result.accuracy[0]:.2f} %")
    ]
    rows += [("test points right, learnt dense layer", f"{100 * result.accuracy[1]:.2f} %")]
    rows += [("mean distance of its probabilities to Bayes'", f"{result.learnt_error:.4f}")]
    print_table("Softmax and Bayes' rule", ("", "measured"), rows)
    draw(path / "softmax-from-bayes.png", result)
    numbers = {name: getattr(result, name) for name in ("learnt_error", "accuracy", "far")}
    differences = {"shared": result.shared.difference, "own": result.own.difference}
    save_metrics(path, config, {**numbers, "greatest_difference": differences})
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result) -> None:
    """The regions of both kinds of classes, and both posteriors along a line."""
    difference = max(result.shared.difference, result.own.difference)
    title = (
        f"softmax(ln P(x|C) P(C)) differs from Bayes' posterior by at most {difference:.0e}; a "
        "dense layer learnt from points gets "
        f"{100 * result.accuracy[1]:.1f} % right, Bayes' rule {100 * result.accuracy[0]:.1f} %"
    )
    with figure(path, title, columns=3, size=(13, 4.9)) as (_, (left, middle, right)):
        some = slice(0, SHOWN)
        left.scatter(
            *result.points[some].T, c=[COLOURS[k] for k in result.labels[some]], s=7, linewidths=0
        )
        draw_regions(left, result.axis, result.shared.bayes, "one covariance for all classes")
        draw_boundaries(
            left, result.axis, result.learnt, colors="black", linestyles="dashed", linewidths=1.5
        )
        left.plot([], [], "k--", linewidth=1.5, label="boundaries, learnt")
        shown, examples = min(SHOWN, len(result.points)), len(result.points)
        left.plot(
            [],
            [],
            ".",
            color="#777777",
            label=f"points, {shown:,} of {examples:,}"
            if shown < examples
            else f"{examples:,} points",
        )
        left.legend(loc="lower left", fontsize=9, frameon=True, framealpha=1)
        draw_regions(middle, result.axis, result.own.bayes, "a covariance for every class")
        row = int(np.abs(result.axis - 0.5).argmin())
        middle.axhline(result.axis[row], color="black", linestyle=":", linewidth=1.5)
        every = max(1, len(result.axis) // 50)
        for k in range(3):
            right.plot(
                result.axis,
                result.own.bayes[row, :, k],
                color=COLOURS[k],
                label=f"Bayes, class {k + 1}",
            )
            right.plot(
                result.axis[::every],
                result.own.softmax[row, ::every, k],
                "o",
                color=COLOURS[k],
                markersize=4,
            )
        right.plot([], [], "o", color="#777777", markersize=4, label="softmax(z)")
        right.set(
            xlabel="x₁",
            ylabel="posterior P(C|x)",
            ylim=(-0.03, 1.25),
            yticks=np.linspace(0, 1, 6),
            box_aspect=1,
        )
        right.set_title(f"along the dotted line, x₂ = {result.axis[row]:.2g}", fontsize=10)
        right.legend(ncols=2, fontsize=9, loc="upper center")


def draw_regions(axes: Any, axis: np.ndarray, probabilities: np.ndarray, title: str) -> None:
    """The most probable class by colour, its posterior by lines at 0.6, 0.8 and 0.95."""
    best = probabilities.argmax(-1)
    axes.pcolormesh(
        axis,
        axis,
        best,
        cmap=ListedColormap(COLOURS[:3]),
        vmin=0,
        vmax=2,
        alpha=0.25,
        linewidth=0,
        rasterized=True,
    )
    axes.contour(
        axis, axis, probabilities.max(-1), levels=(0.6, 0.8, 0.95), colors="#555555", linewidths=0.8
    )
    for k, mean in enumerate(MEANS):
        axes.text(
            *mean,
            f"C{'₁₂₃'[k]}",
            ha="center",
            va="center",
            fontsize=13,
            bbox={"fc": "white", "ec": COLOURS[k], "boxstyle": "round"},
        )
    axes.set(xlabel="x₁", ylabel="x₂", aspect="equal", xlim=axis[[0, -1]], ylim=axis[[0, -1]])
    axes.grid(visible=False)
    axes.set_title(f"{title}; lines: 0.6, 0.8, 0.95", fontsize=10)


def draw_boundaries(axes: Any, axis: np.ndarray, probabilities: np.ndarray, **style: Any) -> None:
    """Where the most probable class changes, each boundary once."""
    first, second, third = np.moveaxis(probabilities, -1, 0)
    inside_first = first > np.maximum(second, third)
    axes.contour(axis, axis, first - np.maximum(second, third), levels=(0,), **style)
    axes.contour(axis, axis, np.where(inside_first, np.nan, second - third), levels=(0,), **style)
