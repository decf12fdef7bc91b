"""What do per-example gradients of an unmodified Flax, Equinox, Haiku or plain JAX model cost?

    python -m experiments any-model
    python -m experiments any-model --dataset mnist --data-dir FOLDER

Norms and clipped gradients by `fnn.as_source` are held against those of `vmap(grad)`, for a Flax
MLP and CNN, an Equinox transformer, a Haiku LSTM and a GPT in plain JAX: the greatest error, what
is kept of the gradients, and time and temporary memory over those of the plain gradient, of runs
interleaved in random order. `again` is the plain gradient compiled once more: smaller differences
mean nothing. `one by one` goes through the examples by `lax.scan`. A model whose library is not
installed is left out.

Then the Flax CNN trains on images, some of them with wrong labels, by `fnn.as_layer`, and the
largest gradients point at the wrong labels.

Expect errors below 1e-6; clipped gradients at 0.9 to 1.5 times the CPU time of the plain gradient,
where `vmap(grad)` takes 0.7 to 2 times on the CNN and the sequence models and about 30 times on the
MLP; and some 80 % of the wrong labels of digits among as many largest gradients, 90 % by the loss
(of 3,000 images of mnist 76 % and 86 %). Takes about three minutes on 2 cores, six with mnist.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import fnn
from experiments._any_models import MODELS, Sizes, flax_net
from experiments._data import Dataset, load
from experiments._rivals import installed
from experiments._run import (
    COLOURS,
    check_positive,
    check_seeds,
    figure,
    folder,
    image,
    mean_std,
    plain_numbers,
    print_table,
    progress,
    save_metrics,
)
from experiments._timing import fresh, temporary_bytes, wall_and_cpu
from experiments.names import CHARACTERS, read_names
from experiments.per_example import flip, hits
from fnn import _validate, per_example
from fnn.types import Source

WAYS = {  # what the picture calls each
    "norms": "norms, fnn",
    "norms_by_vmap": "norms, vmap(grad)",
    "clipped": "clipped, fnn",
    "clipped_by_vmap": "clipped, vmap(grad)",
    "clipped_one_by_one": "clipped, one by one",
}
# of the tables
COLUMNS = "norms", "by vmap(grad)", "clipped", "by vmap(grad)", "one by one"
SHOWN = 3, 5  # rows and columns of images


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = tuple(MODELS)
    """Models to measure, by name."""
    width: int = 128
    """Features of the sequence models."""
    channels: tuple[int, ...] = (16, 32)
    """Channels of the convolutions of the Flax CNN."""
    layers: int = 4
    """Layers of nanoGPT."""
    length: int = 64
    """Letters of a sequence."""
    sequences: int = 16
    """Sequences in a batch."""
    images: int = 64
    """Images in a batch."""
    names: Path | None = None
    """Text file with a name a line, for the letters; the first names of the census if left out."""
    seconds: float = 3.0
    """Time spent on each function of a model."""
    dataset: str = "digits"
    """Images: digits, mnist or fashion-mnist."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist or fashion-mnist; downloaded if left out."""
    examples: int = 3000
    """Training images for the search of wrong labels, the first ones; all if there are fewer."""
    flipped: float = 0.03
    """Share of their labels that are given another class."""
    epochs: int = 5
    """Passes over them."""
    batch_size: int = 32
    """Of the training."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the wrong labels, the params and the shuffles; the first also of the models measured."""
    out: Path | None = None
    """Run folder; runs/any-model if not given."""


TINY = Config(
    models=("nanoGPT",),
    width=8,
    channels=(2,),
    layers=1,
    length=4,
    sequences=2,
    images=2,
    seconds=0.0,
    examples=100,
    epochs=1,
    seeds=(0,),
)

GALLERY = Config(seconds=0.5, seeds=(0,))


class Measured(NamedTuple):
    """One model; times and memory by the keys of `WAYS`, `plain` and `again`."""

    model: str
    parameters: int
    examples: int  # in the batch
    kinds: dict[str, int]  # of factors, how many parameters have them
    norm_error: float  # the greatest relative one
    clipped_error: float  # of the gradient, by norms
    wall: dict[str, float]  # seconds
    cpu: dict[str, float]  # seconds
    memory: dict[str, float]  # bytes


class Flips(NamedTuple):
    """The training images of one seed."""

    labels: np.ndarray  # [images], as given
    wrong: np.ndarray  # [images] bool
    norms: np.ndarray  # [images], after training
    losses: np.ndarray  # [images]
    accuracy: float  # on test images

    def found(self, scores: np.ndarray) -> float:
        """The share of wrong labels among as many examples of largest score as there are."""
        flags = int(self.wrong.sum())
        return float(hits(scores, self.wrong)[flags - 1]) / flags


class Result(NamedTuple):
    measured: list[Measured]
    missing: dict[str, str]  # the library that each model left out needs
    flips: list[Flips]  # of every seed; empty without Flax


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    for name in config.models:
        _validate.one_of("model", name, MODELS)
    _validate.one_of("dataset", config.dataset, ("digits", "mnist", "fashion-mnist"))
    sizes = "width", "layers", "length", "sequences", "images", "examples", "epochs", "batch_size"
    check_positive(config, *sizes, "channels", whole=True)
    check_positive(config, "learning_rate")
    check_seeds(config.seeds)


def run(
    config: Config, advance: Callable[[str], Any] = lambda text: None
) -> tuple[Dataset, Result]:
    """Measures and trains; the data come back with the training images that were used.

    `advance(text)` is called after every model and every seed.
    """
    check(config)
    data = load(config.dataset, data_dir=config.data_dir)
    x, t = data.x_train[: config.examples], data.t_train[: config.examples]
    data = data._replace(x_train=as_images(x), t_train=t, x_test=as_images(data.x_test))
    measured, missing, flips = [], {}, []
    for name in config.models:
        library = MODELS[name].library
        if installed(library):
            measured.append(measure(config, name, data))
        else:
            missing[name] = library
        advance(name)
    for seed in config.seeds:
        if installed("flax"):
            flips.append(search(config, data, seed))
        advance(f"seed {seed}")
    return data, Result(measured, missing, flips)


def as_images(x: np.ndarray) -> np.ndarray:
    """Rows of pixels as `[images, side, side, 1]`."""
    side = round(x.shape[1] ** 0.5)
    return x.reshape(-1, side, side, 1)


def letters(config: Config) -> np.ndarray:
    """Windows of the names one after the other, `[sequences, length + 1]`."""
    text = "." + ".".join(read_names(config.names, "first")[0])
    codes = np.array([CHARACTERS.index(c) for c in text], np.int32)
    starts = np.random.default_rng(config.seeds[0]).integers(
        0, len(codes) - config.length, config.sequences
    )
    return codes[starts[:, None] + np.arange(config.length + 1)]


def measure(config: Config, name: str, data: Dataset) -> Measured:
    """What the statistics of one model are, and what they cost."""
    if MODELS[name].takes == "images":
        batch = data.x_train[: config.images], data.t_train[: config.images]
    else:
        rows = letters(config)
        batch = rows[:, :-1], rows[:, 1:]
    batch = jax.tree.map(jnp.asarray, batch)
    sizes = Sizes(config.width, config.layers, config.channels)
    loss, params = MODELS[name].make(fnn.key(config.seeds[0]), sizes, batch[0][0])
    source = fnn.as_source(loss, fallback="allow")
    norms = jax.jit(per_example.norms(source))(params, *batch)
    functions = functions_of(loss, source, float(jnp.median(norms)))
    compiled = {}
    for way, f in functions.items():
        compiled[way] = jax.jit(fresh(f)).lower(params, *batch).compile()
    found = {way: f(params, *batch) for way, f in compiled.items()}
    calls = {way: (lambda f=f: f(params, *batch)) for way, f in compiled.items()}
    times = wall_and_cpu(calls, config.seconds, random.Random(config.seeds[0]))
    report = per_example.report(source, params, *batch)
    return Measured(
        name,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        len(batch[0]),
        dict(Counter(report.values()).most_common()),
        float((jnp.abs(found["norms"] / found["norms_by_vmap"] - 1)).max()),
        distance(found["clipped"].gradient, found["clipped_by_vmap"]),
        {way: time.wall for way, time in times.items()},
        {way: time.cpu for way, time in times.items()},
        {way: temporary_bytes(f) for way, f in compiled.items()},
    )


def functions_of(loss: Any, source: Source, bound: float) -> dict[str, Any]:
    """What is measured: the plain gradient, twice, and the ways of `WAYS`."""

    def plain(params, *batch):
        def mean(params):
            return jax.vmap(loss, (None, 0, 0))(params, *batch).mean()

        return jax.value_and_grad(mean)(params)

    def gradients(params, *batch):
        return jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)

    def norms_by_vmap(params, *batch):
        return per_example.norms_of(gradients(params, *batch))

    def clipped_by_vmap(params, *batch):
        found = gradients(params, *batch)
        scales = jnp.minimum(1, bound / per_example.norms_of(found))
        return jax.tree.map(lambda g: jnp.tensordot(scales, g, 1) / len(scales), found)

    def clipped_one_by_one(params, *batch):
        def add(total, example):
            found = jax.grad(loss)(params, *example)
            scale = jnp.minimum(1, bound / optax.tree.norm(found)) / len(batch[0])
            return jax.tree.map(lambda a, g: a + scale * g, total, found), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)[0]

    return {
        "plain": plain,
        "again": plain,
        "norms": per_example.norms(source),
        "norms_by_vmap": norms_by_vmap,
        "clipped": per_example.clipped_gradient(source, bound),
        "clipped_by_vmap": clipped_by_vmap,
        "clipped_one_by_one": clipped_one_by_one,
    }


def distance(tree: Any, right: Any) -> float:
    """Of two gradients, by norms, relative to the second."""
    a, b = ravel_pytree(tree)[0], ravel_pytree(right)[0]
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def search(config: Config, data: Dataset, seed: int) -> Flips:
    """Trains the Flax CNN on images with wrong labels, and measures the gradient of each."""
    rng = np.random.default_rng(seed)
    labels, wrong = flip(data.t_train, data.classes, config.flipped, rng)
    net = flax_net(config.channels)
    layer = fnn.as_layer(
        net.apply, lambda key: net.init(key, jnp.asarray(data.x_train[:1])), batched=True
    )
    init_key, key = jax.random.split(fnn.key(seed))
    rule = fnn.rules.backprop(layer, data.loss)
    params, _ = fnn.fit(
        rule,
        optax.adam(config.learning_rate),
        layer.init(init_key),
        (data.x_train, labels),
        epochs=config.epochs,
        batch_size=config.batch_size,
        key=key,
    )
    source = fnn.source(layer, data.loss)

    def both(params, x, labels):
        return per_example.norms(source)(params, x, labels), source(params, x, labels)[0]

    in_parts = per_example.accumulate(both, 100, reduction="examples")
    norms, losses = jax.jit(in_parts)(params, data.x_train, labels)
    test = data.x_test, data.t_test
    accuracy = fnn.evaluate(rule, params, test, batch_size=500)["accuracy"]
    return Flips(labels, wrong, np.asarray(norms), np.asarray(losses), accuracy)


def ratios(measured: Measured, clock: str, ways: Any = WAYS) -> list[float]:
    """Of wall time, CPU time or memory, to the plain gradient."""
    found = getattr(measured, clock)
    return [found[way] / found["plain"] for way in ways]


def sentence(config: Config, result: Result) -> str:
    """What the picture shows."""
    parts = []
    if result.measured:
        rows = np.array([ratios(m, "cpu") for m in result.measured])
        spans = [f"{rows[:, i].min():.2f} to {rows[:, i].max():.2f}" for i in (2, 3)]
        models = f"{len(rows)} unmodified models" if len(rows) > 1 else "an unmodified model"
        parts.append(
            f"By fnn clipped gradients of {models} take {spans[0]} times the CPU time of the plain "
            f"gradient, by vmap(grad) {spans[1]} times"
        )
    if result.flips:
        found = np.mean([f.found(f.norms) for f in result.flips])
        chance = np.mean([f.wrong.mean() for f in result.flips])
        several = f" (mean of {len(result.flips)} seeds)" if len(result.flips) > 1 else ""
        parts.append(
            f"the {100 * chance:.0f} % of {config.dataset} with the largest gradients hold "
            f"{100 * found:.0f} % of the wrong labels{several}"
        )
    return "; ".join(parts)


def main(config: Config) -> None:
    check(config)
    path = folder("any-model", config.out)
    with progress(len(config.models) + len(config.seeds), "any model") as advance:
        data, result = run(config, advance)
    print_models(result)
    print_flips(config, result)
    draw(path / "any-model.png", config, data, result)
    flips = [
        {"norms": f.found(f.norms), "losses": f.found(f.losses), "accuracy": f.accuracy}
        for f in result.flips
    ]
    found = {"measured": result.measured, "missing": result.missing, "flips": flips}
    save_metrics(path, config, found)
    print(f"picture and metrics in {path}")


def print_models(result: Result) -> None:
    """Errors, kinds of factors, time and memory; a model left out has a word."""
    rows = []
    for m in result.measured:
        kinds = ", ".join(f"{kind} {count}" for kind, count in m.kinds.items())
        errors = f"{m.norm_error:.0e}", f"{m.clipped_error:.0e}"
        rows.append((m.model, f"{m.parameters:,}", m.examples, *errors, kinds))
    rows += [(name, f"needs {library}", *[""] * 4) for name, library in result.missing.items()]
    columns = "model", "parameters", "batch", "norms off", "clipped off", "kept"
    print_table("Against vmap(grad): the greatest relative error", columns, rows)
    for clock, unit, size in (("wall", "ms", 1e3), ("cpu", "ms", 1e3), ("memory", "MB", 1e-6)):
        rows = []
        for m in result.measured:
            cells = [f"{ratio:.2f}" for ratio in ratios(m, clock, ["again", *WAYS])]
            rows.append((m.model, f"{size * getattr(m, clock)['plain']:.1f}", *cells))
        what = {"wall": "Wall time", "cpu": "CPU time", "memory": "Temporary memory"}[clock]
        columns = "model", f"plain, {unit}", "again", *COLUMNS
        print_table(f"{what} of the plain gradient, and ratios to it", columns, rows)


def print_flips(config: Config, result: Result) -> None:
    """How many wrong labels are found."""
    rows = []
    for seed, f in zip(config.seeds, result.flips, strict=False):
        shares = f.found(f.norms), f.found(f.losses), f.wrong.mean(), f.accuracy
        rows.append((seed, *(f"{100 * share:.1f}" for share in shares)))
    if len(rows) > 1:
        columns = np.array([row[1:] for row in rows], float).T
        rows.append(("mean", *(mean_std(list(column), 1) for column in columns)))
    columns = "seed", "by norm", "by loss", "by chance", "test accuracy"
    title = f"Wrong labels of {config.dataset} among as many examples of a Flax CNN, %"
    print_table(title, columns, rows or [("needs flax", *[""] * 4)])


def draw(path: Path, config: Config, data: Dataset, result: Result) -> None:
    """Time ratios as bars; beside, the images of the largest gradients."""
    with figure(path, sentence(config, result), size=(13, 5.4)) as (fig, axes):
        axes.remove()
        sides: Any = fig.subfigures(1, 2, width_ratios=(1.25, 1))
        left, right = sides
        draw_times(left.subplots(), result.measured)
        if not result.flips:
            return
        first = result.flips[0]
        order = np.argsort(-first.norms, kind="stable")
        grid = right.subplots(*SHOWN)
        for axis, i in zip(grid.flat, order, strict=False):
            colour = COLOURS[1] if first.wrong[i] else "black"
            was = f", is {data.t_train[i]}" if first.wrong[i] else ""
            image(axis, data.x_train[i].ravel())
            axis.set_title(f"label {first.labels[i]}{was}", fontsize=9, color=colour)
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour, linewidth=2 if first.wrong[i] else 1)
        right.suptitle(
            f"the largest gradients of seed {config.seeds[0]}; wrong labels in colour", fontsize=11
        )


def draw_times(axis: Any, measured: list[Measured]) -> None:
    """A group of bars for each model, from 1 to the left where it is faster than plain."""
    places = np.arange(len(measured))
    height = 0.8 / len(WAYS)
    colours = COLOURS[0], "#9ECAE1", COLOURS[2], "#A1D99B", "#BDBDBD"
    for i, (way, colour) in enumerate(zip(WAYS, colours, strict=True)):
        values = np.array([ratios(m, "cpu", [way])[0] for m in measured])
        rows = places + i * height
        axis.barh(rows, values - 1, height, left=1, label=WAYS[way], color=colour)
        for value, row in zip(values, rows, strict=True):
            side, shift = ("left", 3) if value > 1 else ("right", -3)
            at = {"xy": (value, row), "xytext": (shift, 0), "textcoords": "offset points"}
            axis.annotate(f"{value:.2f}", **at, ha=side, va="center_baseline", fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(
        xscale="log",
        yticks=places + 0.4 - height / 2,
        yticklabels=[m.model for m in measured],
        xlabel="CPU time over that of the plain gradient",
    )
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    plain_numbers(axis.xaxis)
    axis.legend()
