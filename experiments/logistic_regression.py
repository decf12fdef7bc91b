"""Is one neuron with cross-entropy logistic regression, and what if the classes can be separated?

    python -m experiments logistic-regression

The classes are malignant (P = 1) and benign tumours, 569 in all, by standardised features. A
neuron's output z is the logarithm of the odds P/(1 - P), so that P is the sigmoid of z. Trained to
convergence (scipy's BFGS on fnn's gradient, float64) on six features, its coefficients are those of
scikit-learn's LogisticRegression without a penalty: expect a difference of about 1e-8.

All 30 features separate the classes without an error (a linear programme finds how). Then there is
no optimum: along a separating direction the cross-entropy falls to 0 the longer the weights become,
and the norm of the weights grows for ever. Expect it to grow
2.5-fold from step 3,000 to 30,000 of gradient descent, where that of the six features grows by less
than 1 %. Takes about 4 seconds.

Source: lectures 000 and 002 (odds, logistic regression).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from scipy.optimize import linprog, minimize
from sklearn import datasets
from sklearn.linear_model import LogisticRegression

import fnn
from experiments._run import COLOURS, check_positive, figure, folder, print_table, save_metrics
from fnn import _validate, training
from fnn.nets.layers import Dense

LOSS = fnn.losses.sigmoid_binary_cross_entropy


@dataclass(frozen=True)
class Config:
    features: tuple[str, ...] = (
        "mean radius",
        "mean texture",
        "mean smoothness",
        "mean compactness",
        "mean concave points",
        "mean symmetry",
    )
    """Features, as scikit-learn names them, for which the optimum is sought."""
    steps: int = 30_000
    """Steps of gradient descent on the chosen and on all features, at least 10."""
    learning_rate: float = 0.5
    """Step size of gradient descent."""
    bins: int = 10
    """Groups of tumours of like z, of the same size, whose share of malignant ones is compared with
    P."""
    out: Path | None = None
    """Run folder; runs/logistic-regression if not given."""


TINY = Config(steps=200)


class Result(NamedTuple):
    """What was measured.

    Coefficients are changes of ln odds by one standard deviation of a feature.
    """

    coefficients: np.ndarray  # [features + 1]: fnn's, the intercept last
    scikit_learn: np.ndarray  # [features + 1]
    gradient: float  # the greatest number in fnn's gradient there
    z: np.ndarray  # [tumours]: ln odds of malignant
    malignant: np.ndarray  # [tumours]: 0 or 1
    # [2, steps + 1]: of the weights under gradient descent, on the chosen and on all features
    norms: np.ndarray
    # cross-entropy (nats) at a separating solution for all features times a number
    scaled: dict[float, float]


def run(config: Config) -> Result:
    """Fits the chosen features, and follows gradient descent on these and on all."""
    check(config)
    data, targets, names = tumours()
    chosen = data[:, [names.index(name) for name in config.features]]
    if separator(chosen, targets) is not None:
        raise ValueError(
            "`features` separate the classes without an error, so there is no optimum. Choose "
            f"fewer than {len(names)}."
        )
    with jax.enable_x64(True):
        params, gradient = optimum(chosen, targets)
        norms = np.stack([descend(x, targets, config) for x in (chosen, data)])
        z = np.asarray(fnn.dense(chosen.shape[1], 1).apply(params, chosen))[:, 0]
        scaled = {
            c: cross_entropy(separator(data, targets), c, data, targets) for c in (1.0, 10.0, 100.0)
        }
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(
        chosen, targets[:, 0]
    )
    theirs = np.append(model.coef_[0], model.intercept_)
    return Result(
        np.append(params.w[:, 0], params.b), theirs, gradient, z, targets[:, 0], norms, scaled
    )


def tumours() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All 569: standardised features `[tumours, 30]`, 1 for malignant `[tumours, 1]`, the names of
    the features."""
    data: Any = datasets.load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return x, 1.0 - data.target[:, None], [str(name) for name in data.feature_names]


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    data, _, names = tumours()
    if not config.features or len(set(config.features)) < len(config.features):
        raise ValueError(
            f"`features` must name at least one feature and each once, got {config.features}."
        )
    for name in config.features:
        _validate.one_of("feature", name, names)
    check_positive(config, "steps", "bins", whole=True)
    check_positive(config, "learning_rate")
    if config.bins > len(data):
        raise ValueError(f"`bins` is {config.bins} but there are only {len(data)} tumours.")
    if config.steps < 10:
        raise ValueError(
            f"`steps` must be at least 10, got {config.steps}: the norm at the end is compared "
            "with that at a tenth of them."
        )


def optimum(x: np.ndarray, targets: np.ndarray) -> tuple[Dense, float]:
    """The neuron of least cross-entropy, and the greatest number in the gradient there."""
    net = fnn.dense(x.shape[1], 1)
    start, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, net.init(fnn.key(0))))
    value_and_grad = jax.jit(fnn.value_and_grad(net, LOSS))

    def function(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, grads = value_and_grad(unravel(jnp.asarray(flat)), x, targets)
        return float(value), np.asarray(ravel_pytree(grads)[0])

    found = minimize(function, np.asarray(start), jac=True, method="BFGS", options={"gtol": 1e-10})
    return jax.tree.map(np.asarray, unravel(jnp.asarray(found.x))), float(np.abs(found.jac).max())


def descend(x: np.ndarray, targets: np.ndarray, config: Config) -> np.ndarray:
    """The norm of the weights before the first step of gradient descent and after each, `[steps +
    1]`."""
    rule, optimizer = (
        fnn.rules.backprop(fnn.dense(x.shape[1], 1), LOSS),
        optax.sgd(config.learning_rate),
    )
    one_step = training.step(rule, optimizer)

    def body(state: Any, _: None) -> tuple[Any, Any]:
        state = one_step(state, x, targets)[0]
        return state, jnp.linalg.norm(state.params.w)

    state = training.init(
        rule, optimizer, Dense(jnp.zeros((x.shape[1], 1)), jnp.zeros(1)), fnn.key(0)
    )
    norms = np.append(
        0.0, jax.jit(lambda state: lax.scan(body, state, length=config.steps))(state)[1]
    )
    if not np.isfinite(norms).all():
        raise ValueError(
            f"Gradient descent diverges at `learning_rate` {config.learning_rate:g}. Choose a "
            "lower one."
        )
    return norms


def separator(x: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """Weights and, last, a bias with z >= 1 for every malignant and z <= -1 for every benign
    tumour; None if there are none."""
    sign = 2 * targets - 1
    # sign z >= 1, written as rows @ v <= -1
    rows = -sign * np.append(x, np.ones_like(sign), axis=1)
    found = linprog(
        np.zeros(rows.shape[1]), A_ub=rows, b_ub=-np.ones(len(rows)), bounds=(None, None)
    )
    return found.x if found.success else None


def cross_entropy(
    solution: np.ndarray | None, scale: float, x: np.ndarray, targets: np.ndarray
) -> float:
    """The mean cross-entropy in nats of the neuron with `scale` times that solution.

    NaN where there is none.
    """
    if solution is None:
        return float("nan")
    params = Dense(scale * solution[:-1, None], scale * solution[-1:])
    return float(LOSS.value(fnn.dense(x.shape[1], 1).apply(params, x), targets).mean())


def growth(norms: np.ndarray) -> np.ndarray:
    """By what factor the norm grew from a tenth of the steps to the end."""
    return norms[:, -1] / norms[:, (norms.shape[1] - 1) // 10]


def wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """The ends of Wilson's interval (95 %) for a share that was found among `count`.

    It has a width at 0 and 1 too.
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def main(config: Config) -> None:
    check(config)
    path = folder("logistic-regression", config.out)
    result = run(config)
    names = (*config.features, "intercept")
    rows = [
        (name, f"{ours:.6f}", f"{theirs:.6f}", f"{abs(ours - theirs):.1e}", f"{np.exp(ours):.2f}")
        for name, ours, theirs in zip(names, result.coefficients, result.scikit_learn, strict=True)
    ]
    print_table(
        "ln odds of malignant", ("feature", "fnn", "scikit-learn", "difference", "odds times"), rows
    )
    (of_chosen, of_all), (end, end_all) = growth(result.norms), result.norms[:, -1]
    print(
        f"greatest number in the gradient {result.gradient:.1e}; norm of the weights after "
        f"{config.steps:,} steps of gradient descent:"
    )
    print(
        f"chosen features {end:.3f}, {of_chosen:.4f} times that at a tenth of them; all 30 "
        f"features {end_all:.3f}, {of_all:.4f} times"
    )
    scales = ", ".join(f"{value:.3g} at {scale:g} times" for scale, value in result.scaled.items())
    print(f"cross-entropy on all 30 features along a separating solution: {scales} (nats)")
    draw(path / "logistic-regression.png", result, config)
    numbers = {
        name: getattr(result, name)
        for name in ("coefficients", "scikit_learn", "gradient", "scaled")
    }
    save_metrics(
        path,
        config,
        {**numbers, "norms_at_the_end": result.norms[:, -1], "growth": growth(result.norms)},
    )
    print(f"picture and metrics in {path}")


def draw(path: Path, result: Result, config: Config) -> None:
    """Coefficients of both; shares of malignant tumours against the sigmoid.

    Norms under gradient descent.
    """
    difference, (of_chosen, of_all) = (
        np.abs(result.coefficients - result.scikit_learn).max(),
        growth(result.norms),
    )
    separable = "separate" if np.isfinite(list(result.scaled.values())).all() else "do NOT separate"
    title = (
        f"One neuron has scikit-learn's coefficients to {difference:.0e}; from step "
        f"{config.steps // 10:,} to {config.steps:,} the norm of its weights grows "
        f"{of_chosen:.3f}-fold on {len(config.features)} features and {of_all:.2f}-fold on all 30, "
        f"which {separable} the classes"
    )
    with figure(path, title, columns=3, size=(13, 4.6)) as (_, (left, middle, right)):
        rows = np.arange(len(result.coefficients))
        left.axvline(0, color="black", linewidth=1)
        left.plot(
            result.scikit_learn,
            rows,
            "o",
            color=COLOURS[1],
            markersize=12,
            fillstyle="none",
            label="scikit-learn",
        )
        left.plot(result.coefficients, rows, "o", color=COLOURS[0], markersize=5, label="fnn")
        left.set(
            xlabel="change of ln odds per standard deviation",
            yticks=rows,
            yticklabels=(*config.features, "intercept"),
        )
        left.invert_yaxis()
        left.legend()
        draw_probabilities(middle, result, config.bins)
        for norms, label in zip(
            result.norms, (f"{len(config.features)} features", "all 30 features"), strict=True
        ):
            right.semilogx(np.arange(1, config.steps + 1), norms[1:], label=label)
        right.axhline(
            np.linalg.norm(result.coefficients[:-1]),
            color="black",
            linestyle="--",
            linewidth=1,
            label="optimum, BFGS",
        )
        right.set(xlabel="step of gradient descent", ylabel="norm of the weights")
        right.legend()


def draw_probabilities(axis: Any, result: Result, bins: int) -> None:
    """The sigmoid, and in groups of the same size by z the mean P and the share of malignant
    tumours, with Wilson's interval.

    Where the curve bends, the mean P of a wide group is not the P of its mean z.
    """
    groups = np.array_split(np.argsort(result.z), bins)
    values = result.z, 1 / (1 + np.exp(-result.z)), result.malignant
    mean, predicted, share = (
        np.array([of_all[group].mean() for group in groups]) for of_all in values
    )
    low, high = wilson(share, np.array([len(group) for group in groups]))
    limit = 1.1 * np.abs(mean).max()
    z = np.linspace(-limit, limit, 201)
    axis.plot(
        z,
        np.asarray(fnn.activations.sigmoid.apply((), z.astype(np.float32))),
        color=COLOURS[0],
        label="P = sigmoid(z)",
    )
    axis.plot(
        mean,
        predicted,
        "s",
        color=COLOURS[0],
        markersize=9,
        fillstyle="none",
        label="mean P of a group",
    )
    # an end at a share of 0 or 1 may be off by rounding
    bars = np.maximum([share - low, high - share], 0)
    axis.errorbar(
        mean,
        share,
        bars,
        fmt="o",
        color=COLOURS[1],
        markersize=5,
        label="measured share (95 % interval)",
    )
    axis.set(
        xlabel="z = ln odds (groups at their mean)",
        ylabel="share of malignant tumours",
        xlim=(-limit, limit),
    )
    axis.set(ylim=(-0.05, 1.35), yticks=np.linspace(0, 1, 6))  # room for the legend
    axis.legend(loc="upper left", fontsize=10)
