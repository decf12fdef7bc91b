"""Can a population find its way without a gradient, and what does that cost?

    python -m experiments evolution

In the plane first, where a population can be seen: OpenAI's evolution strategy (ES), separable
natural evolution strategies (SNES) and a (mu, lambda) genetic algorithm (GA) go down a bowl with
ripples, beside gradient descent (backprop). The plane is a net with two parameters and the bowl its
loss, so these are the rules of `fnn.rules` as they are. Expect gradient descent to stop in the
ripple where it starts, at a loss of 6.3, and the clouds, wider than a ripple, to cross them: to a
median loss of 0.00 by SNES, which shrinks its cloud at the end (in a quarter of 100 repetitions in
a ripple beside the lowest, at 0.49), and of 0.4 by ES and 0.5 by GA, which keep theirs.

Then a net of 64-128-128-10 units, 26,122 parameters, reads digits by the same rules and by
backprop. A step is a generation, judged on one batch; a backward pass counts as two forward passes.
Expect a test accuracy of 95.3 ± 0.3 % by ES, 95.8 ± 1.0 % by SNES, 89.3 ± 1.2 % by GA and 97.9 ±
0.4 % by backprop (three seeds). To 85 % ES needs about 90 times the forward passes of backprop,
counted in whole epochs: the direction that its 128 members find has a cosine with the gradient of
0.05. Settings were chosen on a part of the training set, but for backprop's, which were not tuned.
Takes about 3 minutes on one core: 13 seconds a seed by ES, 22 by SNES, 14 by GA.

Source: lecture 003, evolutionary algorithms; the papers of `fnn.rules.evolution`.
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
from jax import lax

import fnn
from experiments._data import load
from experiments._run import COLOURS, figure, folder, mean_std, print_table, progress, save_metrics
from fnn import _validate, training
from fnn.factors import PerExample, total
from fnn.rules.evolution import evolution_strategies, genetic_algorithm, snes

NAMES = ("ES", "SNES", "GA", "backprop")
GOAL = 0.85  # the accuracy at which costs are compared
# in the plane: first parameters, first std of all rules, the picture
START, STD, LIMITS = (-3.3, 2.4), 0.5, (-4.6, 1.4, -1.6, 4.4)


@dataclass(frozen=True)
class Config:
    generations: int = 40
    """Steps in the plane."""
    cloud: int = 32
    """Members of a generation in the plane."""
    repetitions: int = 100
    """Ways through the plane by each rule, which differ in their noise."""
    hidden: tuple[int, ...] = (128, 128)
    """ReLU units of the net for digits, layer by layer."""
    population: int = 128
    """Members of a generation on digits."""
    parents: int = 8
    """How many of them become parents in GA."""
    stds: tuple[float, float, float] = (0.02, 0.05, 0.01)
    """Standard deviations on digits: of ES, of SNES at first, of GA."""
    rates: tuple[float, float] = (0.02, 0.003)
    """Adam's learning rates for ES and for backprop; they fall to 0 along a cosine. SNES and GA
    have none."""
    epochs: int = 40
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, the same for all members."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the split, the parameters, the shuffles and the noise; the first is that of the plane."""
    out: Path | None = None
    """Run folder; runs/evolution if not given."""


TINY = Config(
    generations=4,
    cloud=6,
    repetitions=2,
    hidden=(8,),
    population=6,
    parents=2,
    epochs=2,
    batch_size=512,
    seeds=(0, 1),
)

GALLERY = Config(repetitions=20, seeds=(0,), epochs=20)


class Walk(NamedTuple):
    """One rule's ways through the plane."""

    name: str
    losses: np.ndarray  # [repetitions, generations + 1]: of the parameters
    path: np.ndarray  # [generations + 1, 2]: the parameters, first repetition
    # [generations, members, 2], first repetition; of gradient descent the parameters themselves
    clouds: np.ndarray

    @property
    def last(self) -> float:
        """The median of the last losses."""
        return float(np.median(self.losses[:, -1]))


class Run(NamedTuple):
    """One rule on digits."""

    name: str
    accuracy: np.ndarray  # [seeds, epochs]: on the test set
    passes: int  # forward passes per epoch: images x members
    cosine: float  # of the first step's direction with the gradient; NaN but for ES
    seconds: float  # for the training of one seed, mean over seeds

    @property
    def to_goal(self) -> float:
        """Epochs until the mean accuracy over seeds is `GOAL`; NaN if it never is."""
        reached = np.flatnonzero(self.accuracy.mean(0) >= GOAL)
        return float(reached[0]) + 1 if len(reached) else np.nan


class Result(NamedTuple):
    """Both parts."""

    plane: tuple[Walk, ...]
    digits: tuple[Run, ...]


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Goes through the plane, then trains on digits.

    `advance(text)` after every rule and seed of the latter.
    """
    for name in (
        "generations",
        "cloud",
        "repetitions",
        "population",
        "parents",
        "epochs",
        "batch_size",
    ):
        _validate.positive(name, getattr(config, name), whole=True)
    for name in ("hidden", "stds", "rates"):
        for i, number in enumerate(getattr(config, name)):
            _validate.positive(f"{name}[{i}]", number, whole=name == "hidden")
    for name in ("cloud", "population"):
        if getattr(config, name) % 2 or getattr(config, name) < config.parents:
            raise ValueError(
                f"`{name}` must be an even number, at least `parents` {config.parents}; got "
                f"{getattr(config, name)}."
            )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"`seeds` must be at least one, each once; got {config.seeds}.")
    fnn.key(config.seeds[0])
    return Result(
        tuple(walk(config, name) for name in NAMES),
        tuple(train(config, name, advance) for name in NAMES),
    )


def rules(
    net: fnn.Layer, loss: fnn.Loss, population: int, parents: int, stds: tuple[float, ...]
) -> dict[str, fnn.Rule]:
    """All rules by their names."""
    return {
        "ES": evolution_strategies(net, loss, population=population, std=stds[0]),
        "SNES": snes(net, loss, population=population, std=stds[1]),
        "GA": genetic_algorithm(net, loss, parents=parents, children=population, std=stds[2]),
        "backprop": fnn.rules.backprop(net, loss),
    }


def ripples(p: Any) -> Any:
    """The loss in the plane, |p|^2 / 2 + sum of 1 - cos 2 pi p."""
    return (p * p / 2 + 1 - jnp.cos(2 * jnp.pi * p)).sum(-1)


def ripples_grad(p: Any) -> Any:
    """p + 2 pi sin 2 pi p."""
    return p + 2 * jnp.pi * jnp.sin(2 * jnp.pi * p)


def problem() -> tuple[fnn.Layer, fnn.Loss]:
    """The plane as a net, whose parameters are a point and whose output is that point.

    And the loss of the output.
    """

    def forward(point: Any, x: Any) -> tuple[Any, Any]:
        return jnp.broadcast_to(point[None, :], (x.shape[0], 2)), x

    def backward(point: Any, x: Any, dy: Any, reduce: Any = total) -> tuple[Any, Any]:
        return reduce(PerExample(dy)), jnp.zeros_like(x)

    net = fnn.Layer("point", lambda key: jnp.array(START), forward, backward)
    return net, fnn.Loss(
        "ripples", lambda outputs, _: ripples(outputs), lambda outputs, _: ripples_grad(outputs)
    )


def walk(config: Config, name: str) -> Walk:
    """One rule's ways through the plane, all at once."""
    net, loss = problem()
    rule: Any = rules(net, loss, config.cloud, config.parents, (STD, STD, STD))[name]
    rate = {"ES": optax.cosine_decay_schedule(0.7, config.generations), "backprop": 0.02}.get(
        name, 1.0
    )
    optimizer, start = optax.sgd(rate), jnp.array(START)
    one_step = training.step(rule, optimizer)

    def body(state: Any, _: None) -> tuple[Any, Any]:
        members = (
            rule.members(state.params, state.rule)
            if hasattr(rule, "members")
            else state.params[None, :]
        )
        after = one_step(state, jnp.zeros((1, 1)), jnp.zeros(1))[0]
        return after, (after.params, members)

    def way(key: Any) -> Any:
        first: Any = training.init(rule, optimizer, start, key)
        path, clouds = lax.scan(body, first, length=config.generations)[1]
        return jnp.concatenate([start[None, :], path]), clouds

    paths, clouds = jax.jit(jax.vmap(way))(
        jax.random.split(fnn.key(config.seeds[0]), config.repetitions)
    )
    return Walk(name, np.asarray(ripples(paths)), np.asarray(paths[0]), np.asarray(clouds[0]))


def train(config: Config, name: str, advance: Callable[[str], Any]) -> Run:
    """One rule on digits, by every seed."""
    data = load("digits", seed=config.seeds[0])
    net = fnn.mlp((data.features, *config.hidden, data.classes))
    rule = rules(net, data.loss, config.population, config.parents, config.stds)[name]
    falling = partial(
        optax.cosine_decay_schedule,
        decay_steps=config.epochs * -(-len(data.x_train) // config.batch_size),
    )
    learnt = dict(zip(("ES", "backprop"), config.rates, strict=True))
    optimizer, init = (
        optax.adam(falling(learnt[name])) if name in learnt else optax.sgd(1.0),
        jax.jit(net.init),
    )
    accuracies, seconds, measured = [], [], np.nan
    for seed in config.seeds:
        data = load("digits", seed=seed)
        init_key, key = jax.random.split(fnn.key(seed))
        params, train_set, test_set = (
            init(init_key),
            (data.x_train, data.t_train),
            (data.x_test, data.t_test),
        )
        if name == "ES" and seed == config.seeds[0]:
            measured = cosine(rule, net, params, key, *(a[: config.batch_size] for a in train_set))
        settings: Any = {
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "key": key,
            "validation": test_set,
        }
        begun = time.perf_counter()
        _, history = fnn.fit(rule, optimizer, params, train_set, **settings)
        seconds.append(time.perf_counter() - begun)
        accuracies.append(np.asarray(history.validation["accuracy"]))
        advance(f"{name}, seed {seed}: {100 * accuracies[-1][-1]:.1f} %")
    passes = len(data.x_train) * (3 if name == "backprop" else config.population + 1)
    return Run(name, np.stack(accuracies), passes, measured, float(np.mean(seconds)))


def cosine(rule: fnn.Rule, net: fnn.Layer, params: Any, key: Any, *batch: Any) -> float:
    """Between what the rule gives the optimiser in the first step and the gradient."""

    @jax.jit
    def of(params: Any, key: Any, *batch: Any) -> Any:
        trees = (
            rule.value_and_grad(params, rule.init(key, params), *batch)[1],
            fnn.value_and_grad(net, rule.loss)(params, *batch)[1],
        )
        a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in trees)
        return a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))

    return float(of(params, key, *batch))


def main(config: Config) -> None:
    with progress(len(NAMES) * len(config.seeds), "training") as advance:
        result = run(config, advance)
    ends = [(way, *np.quantile(way.losses[:, -1], (0.1, 0.5, 0.9))) for way in result.plane]
    rows = [
        (way.name, f"{way.losses[0, 0]:.2f}", f"{median:.3f}", f"{low:.3f} ... {high:.3f}")
        for way, low, median, high in ends
    ]
    title = (
        f"In the plane, {config.generations} generations of {config.cloud}, {config.repetitions} "
        "repetitions"
    )
    print_table(title, ("rule", "first loss", "last loss, median", "of 80 % of them"), rows)
    goal = f"{100 * GOAL:.0f} %"
    rows = [
        (
            r.name,
            mean_std(list(100 * r.accuracy[:, -1]), 1),
            f"{r.to_goal:.0f}",
            f"{r.to_goal * r.passes:.2g}",
            f"{r.seconds:.1f}",
        )
        for r in result.digits
    ]
    columns = (
        "rule",
        "test accuracy (%)",
        f"epochs to {goal}",
        f"forward passes to {goal}",
        "seconds a seed",
    )
    print_table(f"Digits, {config.epochs} epochs, {len(config.seeds)} seeds", columns, rows)
    print(f"cosine of the first direction of ES with the gradient: {result.digits[0].cosine:.3f}")
    path = folder("evolution", config.out)
    draw(path / "evolution.png", result, config)
    plane = [way._asdict() | {"clouds": None, "losses": way.losses[:, -1]} for way in result.plane]
    save_metrics(
        path,
        config,
        {
            "plane": plane,
            "digits": [r._asdict() | {"epochs_to_goal": r.to_goal} for r in result.digits],
        },
    )
    print(f"picture and metrics in {path}")


def sentence(result: Result, config: Config) -> str:
    """What the picture shows."""
    after = ", ".join(f"{way.last:.2f} ({way.name})" for way in result.plane)
    accuracy = ", ".join(
        f"{100 * r.accuracy[:, -1].mean():.1f} % ({r.name})" for r in result.digits
    )
    es, backprop = result.digits[0], result.digits[-1]
    times = es.to_goal * es.passes / (backprop.to_goal * backprop.passes)
    cost = (
        f"ES takes {times:.0f} times backprop's forward passes"
        if np.isfinite(times)
        else "not all get there"
    )
    losses = result.plane[0].losses
    plane = (
        f"In {config.generations} generations the loss in the plane goes from {losses[0, 0]:.1f} "
        f"to {after}, median of {len(losses)}"
    )
    return (
        f"{plane}. After {config.epochs} epochs of digits the test accuracy is {accuracy}; for "
        f"{100 * GOAL:.0f} % {cost}"
    )


def draw(path: Path, result: Result, config: Config) -> None:
    """Above, clouds and ways through the plane.

    Below, the accuracy on digits by epochs and by forward passes.
    """
    with figure(path, sentence(result, config), size=(13, 8)) as (fig, axes):
        axes.remove()
        sides: Any = fig.subfigures(2, 1)
        for axis, way in zip(
            np.ravel(sides[0].subplots(1, 4, sharey=True)), result.plane, strict=True
        ):
            draw_way(axis, way)
        left, right = np.ravel(sides[1].subplots(1, 2, sharey=True))
        for i, r in enumerate(result.digits):
            epochs, style = (
                np.arange(1, r.accuracy.shape[1] + 1),
                {"color": COLOURS[i], "linestyle": ("-", "--", "-.", ":")[i]},
            )
            for axis, x in ((left, epochs), (right, epochs * r.passes)):
                axis.plot(x, 100 * r.accuracy.T, alpha=0.3, linewidth=0.8, **style)
                axis.plot(x, 100 * r.accuracy.mean(0), label=r.name, **style)
        for axis in (left, right):
            axis.axhline(100 * GOAL, color="black", linewidth=0.8, label=f"{100 * GOAL:.0f} %")
        left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 102))
        right.set(
            xlabel="forward passes (images × members; a backward pass counts as two)", xscale="log"
        )
        left.xaxis.get_major_locator().set_params(integer=True)
        several = len(config.seeds) > 1
        left.legend(
            loc="lower right",
            title=f"mean of {len(config.seeds)} seeds (thin: each)" if several else "one seed",
        )


def draw_way(axis: Any, way: Walk) -> None:
    """Some clouds, and the way of the parameters, over the loss; darker is higher."""
    grid = np.stack(
        np.meshgrid(np.linspace(*LIMITS[:2], 201), np.linspace(*LIMITS[2:], 201)), axis=-1
    )
    heights, count = np.asarray(ripples(grid)), len(way.clouds)
    axis.contourf(
        *np.moveaxis(grid, -1, 0),
        heights,
        levels=np.linspace(0, 24, 9),
        cmap="Greys",
        alpha=0.45,
        extend="max",
    )
    for i, g in enumerate(
        sorted({0, count // 8, count // 3, count - 1}) if way.clouds.shape[1] > 1 else ()
    ):
        axis.plot(
            *way.clouds[g].T,
            "osv^"[i],
            color=COLOURS[i],
            markersize=3.5,
            label=f"generation {g + 1}",
        )
    axis.plot(*way.path.T, "-", color="black", linewidth=1.3, label="parameters")
    axis.plot(
        0,
        0,
        "*",
        color="white",
        markeredgecolor="black",
        markersize=14,
        zorder=1.5,
        label="least loss",
    )
    title = f"{way.name}, 1 of {len(way.losses)}: loss {way.losses[0, -1]:.2f}"
    axis.set(xlabel="parameter θ₁", xlim=LIMITS[:2], ylim=LIMITS[2:], aspect="equal", title=title)
    axis.grid(visible=False)
    if way.name == "ES":
        axis.set_ylabel("parameter θ₂")
        axis.legend(
            title="darker: higher loss",
            fontsize=8,
            title_fontsize=8,
            loc="upper right",
            frameon=True,
            edgecolor="none",
        )
