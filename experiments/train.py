"""Train a net by any rule and optimiser on any data set, once for every seed.

    python -m experiments train --dataset digits --sizes 128 64 --rule backprop --optimizer adam
    --seeds 0 1 2

Prints the losses and the accuracy of every seed, and their mean; draws the learning curves. A seed
gives the net its first parameters and the order of its batches; `--data-seed` draws or splits the
data. The defaults reach about 97 % on the test digits in a few seconds.

A run has a folder of its own, runs/train-001, with a checkpoint after every epoch, but while
another is being written. Stop it when you like (Ctrl-C finishes the step and saves; even `kill -9`
costs no more than what came after the last checkpoint), and go on:

    python -m experiments train --resume runs/train-001

It ends bit for bit as if it had not been stopped. `python -m experiments runs` lists runs and
compares their curves.

`--devices 8` splits every batch over 8 devices, and `--distributed` over the devices of several
processes: docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import fnn
from experiments import _data, _processes, _run, _runs
from fnn import _validate, activations
from fnn.checkpoint import Checkpointer, Stopped


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    """digits, moons, spirals, flower, breast-cancer, diabetes, mnist1d, mnist or fashion-mnist."""
    sizes: tuple[int, ...] = (128, 64)
    """Sizes of the hidden layers; the data give those of input and output."""
    activation: activations.Name = "relu"
    """Activation of the hidden layers: relu, tanh, sigmoid, gelu, ..."""
    rule: str = "backprop"
    """What assigns credit: the name of a constructor in fnn.rules.RULES."""
    optimizer: str = "adam"
    """sgd, momentum, nesterov, adam, adamw, nadam, radam, adabelief, adagrad, rmsprop, lamb or
    lion."""
    learning_rate: float = 1e-3
    """Learning rate, above 0."""
    schedule: str = "constant"
    """constant, or cosine: from the learning rate down to 0 over the whole run."""
    clip_norm: float | None = None
    """Greatest global norm of a gradient; none is clipped if left out."""
    epochs: int = 20
    """Passes over the train set."""
    batch_size: int = 32
    """Examples per step, at most all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One net is trained for every seed."""
    data_seed: int = 0
    """Seed of the data's draw and split."""
    data_dir: Path | None = None
    """Folder with the IDX files of mnist or fashion-mnist; downloaded if left out."""
    dtype: str = "float32"
    """float32, bfloat16 or float64."""
    keep: int = 3
    """Newest checkpoints of every seed that are kept; the one of the best test loss is kept too."""
    tensorboard: bool = False
    """Write event files for TensorBoard too (needs tensorboardX)."""
    devices: int = 1
    """Devices that train together; 0 for all there are."""
    model: int = 1
    """Over how many of these the weights are split, where the plan does; the batch is split over
    the others."""
    plan: str = "replicated"
    """Where the parameters lie: replicated, tensor_parallel or fully_sharded."""
    distributed: bool = False
    """Train on all devices of several processes, each started with this command:
    docs/scaling.md."""
    resume: Path | None = None
    """Folder of a run to go on with; all other flags are those that it began with."""
    out: Path | None = None
    """Folder of a new run; runs/train-001, -002, ... if left out."""


TINY = Config(
    dataset="moons",
    sizes=(8,),
    optimizer="sgd",
    learning_rate=0.1,
    epochs=2,
    batch_size=100,
    seeds=(0, 1),
)

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadam": optax.nadam,
    "radam": optax.radam,
    "adabelief": optax.adabelief,
    "adagrad": optax.adagrad,
    "rmsprop": optax.rmsprop,
    "lamb": optax.lamb,
    "lion": optax.lion,
}
"""Every optimiser, `rate -> optax optimiser`, by the name of its flag."""
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float64")
PLANS = {plan.__name__: plan for plan in fnn.sharding.PLANS}
RULES = {rule.__name__: rule for rule in fnn.rules.RULES}

OnEpoch = Callable[[int, dict[str, float]], Any]


class SeedResult(NamedTuple):
    """One net. The curves are `[epochs]`; accuracies are in 0 ... 1, and None for regression."""

    seed: int
    train_loss: float  # after training, as the next four
    train_accuracy: float | None
    test_loss: float
    test_accuracy: float | None
    epoch_loss: np.ndarray  # the mean over each epoch's examples, each taken before its step
    epoch_test_loss: np.ndarray  # after each epoch
    epoch_test_accuracy: np.ndarray | None


class Result(NamedTuple):
    """All seeds, and what they have in common."""

    dataset: str
    parameters: int
    seeds: tuple[SeedResult, ...]


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid.

    Before any data are read.
    """
    activations.get(config.activation)
    names = {"dataset": _data.LOADERS, "rule": RULES}
    for kind, choices in {
        **names,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "dtype": DTYPES,
        "plan": PLANS,
    }.items():
        _validate.one_of(kind, getattr(config, kind), choices)
    _run.check_positive(config, "sizes", "epochs", "batch_size", "keep", "model", whole=True)
    _run.check_positive(
        config, "learning_rate", *(["clip_norm"] if config.clip_norm is not None else [])
    )
    _run.check_seeds(config.seeds)
    fnn.key(config.data_seed)
    if config.tensorboard:
        _runs.check_tensorboard()
    _validate.not_negative("devices", config.devices)
    if config.resume is not None and config != Config(
        resume=config.resume, distributed=config.distributed
    ):
        raise ValueError(
            "`resume` takes all other flags from the run's own config.json. Leave them out."
        )


def run(config: Config, on_epoch: OnEpoch | None = None, path: Path | None = None) -> Result:
    """Trains one net for every seed.

    Args:
        config: the flags.
        on_epoch: `(epoch, metrics) -> stop`, called after every epoch of every seed, as `fnn.fit`'s
            callback.
        path: the run folder, for checkpoints, from which training goes on where there are some, and
            `metrics.jsonl`; None writes nothing.

    Returns:
        The numbers of every seed.

    Raises:
        TypeError, ValueError: a flag or the data are invalid.
        NonFiniteError: training diverged.
    """
    check(config)
    data = _data.load(config.dataset, seed=config.data_seed, data_dir=config.data_dir)
    with jax.enable_x64(config.dtype == "float64"):
        net = fnn.mlp((data.features, *config.sizes, data.outputs), config.activation)
        rule = RULES[config.rule](net, data.loss)
        optimizer = make_optimizer(config, len(data.x_train))
        train, test = (
            _cast(part, config.dtype)
            for part in ((data.x_train, data.t_train), (data.x_test, data.t_test))
        )
        mesh = _mesh(config)
        out = path if _processes.leads() else None
        with (
            contextlib.nullcontext()
            if out is None
            else _runs.metrics_writer(out, config.seeds, config.tensorboard) as write
        ):
            fits = [
                _Fit(path and _checkpointer(config, path, seed), _callback(seed, on_epoch, write))
                for seed in config.seeds
            ]
            seeds = tuple(
                _train(config, seed, net, rule, optimizer, train, test, fit, mesh)
                for seed, fit in zip(config.seeds, fits, strict=True)
            )
        shapes = jax.eval_shape(net.init, fnn.key(0))
    return Result(data.name, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), seeds)


def main(config: Config) -> None:
    """Prints the table, saves `train.png` and `metrics.json`."""
    if config.distributed:
        _processes.start()
    check(config)
    if config.resume is None:
        # before there is a folder, which would say that a run can go on
        _mesh(config)
        _data.load(config.dataset, seed=config.data_seed, data_dir=config.data_dir)
        folder = _processes.same_path(
            _runs.begin("train", config, config.out) if _processes.leads() else None
        )
    else:
        folder, config = (
            config.resume,
            replace(_runs.config_of(config.resume, Config), distributed=config.distributed),
        )
    with _run.progress(
        len(config.seeds) * config.epochs, f"{config.dataset}, {config.rule}"
    ) as advance:
        try:
            result = run(
                config, lambda epoch, metrics: advance(f"loss {metrics['loss']:.4f}"), folder
            )
        except Stopped:
            again = (
                "python -m experiments train --resume "
                f"{folder}{' --distributed' * config.distributed}"
            )
            raise Stopped(f"Stopped; all is saved in {folder}. Go on: {again}") from None
    if not _processes.leads():
        return
    title = (
        f"{result.dataset}: {config.rule}, {config.optimizer}, {result.parameters:,} parameters, "
        f"{config.epochs} epochs"
    )
    _run.print_table(title, ("seed", "train loss", "test loss", "test accuracy"), _rows(result))
    draw(result, config, folder / "train.png")
    print(f"Saved {_run.save_metrics(folder, config, result)} and {folder / 'train.png'}")


def make_optimizer(config: Config, examples: int) -> optax.GradientTransformation:
    """The optimiser that the flags describe, for a train set of so many examples."""
    steps = config.epochs * math.ceil(examples / config.batch_size)
    rate = (
        config.learning_rate
        if config.schedule == "constant"
        else optax.cosine_decay_schedule(config.learning_rate, steps)
    )
    optimizer = OPTIMIZERS[config.optimizer](rate)
    return (
        optimizer
        if config.clip_norm is None
        else optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    )


def draw(result: Result, config: Config, path: Path) -> None:
    """Learning curves: a pale line for every seed, a strong one for their mean."""
    several, accuracy = len(result.seeds) > 1, result.seeds[0].test_accuracy is not None
    with _run.figure(path, _sentence(result, config), columns=1 + accuracy) as (_, axes):
        left, *right = np.atleast_1d(axes)
        mean = ", mean" if several else ""
        _curves(
            left,
            [seed.epoch_loss for seed in result.seeds],
            _run.COLOURS[0],
            f"train, during the epoch{mean}",
        )
        _curves(
            left,
            [seed.epoch_test_loss for seed in result.seeds],
            _run.COLOURS[1],
            f"test, after it{mean}",
        )
        if several:
            left.plot([], color="#777777", alpha=0.5, linewidth=1, label="each seed")
        left.set(
            ylabel="loss (nats)" if accuracy else "loss (half the squared error)", yscale="log"
        )
        _run.plain_numbers(left.yaxis)
        left.legend(fontsize=9)
        for axis in right:
            _curves(
                axis,
                [
                    100 * seed.epoch_test_accuracy
                    for seed in result.seeds
                    if seed.epoch_test_accuracy is not None
                ],
                _run.COLOURS[1],
            )
            axis.set(ylabel="test accuracy (%)")
        for axis in (left, *right):
            axis.set(xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)


class _Fit(NamedTuple):
    """What `fit` tells others, and where it saves."""

    checkpoint: Checkpointer | None
    callback: OnEpoch


def _checkpointer(config: Config, path: Path, seed: int) -> Checkpointer:
    return Checkpointer(
        path / "checkpoints" / f"seed-{seed}",
        keep=config.keep,
        best="validation_loss",
        metadata=_run.jsonable(config),
    )


def _callback(seed: int, on_epoch: OnEpoch | None, write: _runs.Write | None) -> OnEpoch:
    def callback(epoch: int, metrics: dict[str, float]) -> Any:
        if write is not None:
            write(seed, epoch, metrics)
        return None if on_epoch is None else on_epoch(epoch, metrics)

    return callback


def _mesh(config: Config) -> Mesh | None:
    """The mesh that the flags describe; none for one device."""
    if config.devices == 1 and not config.distributed:
        return None
    data = (
        None if config.distributed or not config.devices else max(1, config.devices // config.model)
    )
    return fnn.sharding.make_mesh(data=data, model=config.model)


def _train(
    config: Config,
    seed: int,
    net: fnn.Layer,
    rule: fnn.Rule,
    optimizer: Any,
    train: Any,
    test: Any,
    fit: _Fit,
    mesh: Mesh | None,
) -> SeedResult:
    init_key, fit_key = jax.random.split(fnn.key(seed))
    params = _cast(jax.jit(net.init)(init_key), config.dtype)
    settings = {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "key": fit_key,
        **fit._asdict(),
    }
    if mesh is not None:
        settings |= {"mesh": mesh, "plan": PLANS[config.plan](mesh, params)}
    data = (
        fnn.training.own_batches(train, config.batch_size, fit_key, config.epochs)
        if config.distributed
        else train
    )
    params, history = fnn.fit(rule, optimizer, params, data, validation=test, **settings)
    on_train, on_test = (
        fnn.evaluate(rule, params, part, batch_size=min(len(part[0]), 10_000))
        for part in (train, test)
    )
    curves = {name: np.asarray(values) for name, values in history.validation.items()}
    return SeedResult(
        seed,
        on_train["loss"],
        on_train.get("accuracy"),
        on_test["loss"],
        on_test.get("accuracy"),
        np.asarray(history.loss),
        curves["loss"],
        curves.get("accuracy"),
    )


def _cast(tree: Any, dtype: str) -> Any:
    """The arrays of a tree; those of floating-point numbers in `dtype`."""
    return jax.tree.map(
        lambda a: (
            a.astype(jax.numpy.dtype(dtype))
            if jax.numpy.issubdtype(a.dtype, jax.numpy.floating)
            else a
        ),
        tree,
    )


def _rows(result: Result) -> list[tuple[str, ...]]:
    columns = [
        [getattr(seed, name) for seed in result.seeds]
        for name in ("train_loss", "test_loss", "test_accuracy")
    ]
    cells = [
        [f"{value:.4f}" if value is not None else "-" for value in column] for column in columns
    ]
    mean = ["-" if None in column else _run.mean_std(column) for column in columns]
    return [
        *((str(seed.seed), *row) for seed, *row in zip(result.seeds, *cells, strict=True)),
        ("mean ± std", *mean),
    ]


def _sentence(result: Result, config: Config) -> str:
    accuracies = [
        100 * seed.test_accuracy for seed in result.seeds if seed.test_accuracy is not None
    ]
    loss = _run.mean_std([seed.test_loss for seed in result.seeds], 3)
    reached = (
        f"gets {_run.mean_std(accuracies, 1)} % of the test set right"
        if accuracies
        else f"comes to a test loss of {loss}"
    )
    seeds = f"{len(result.seeds)} seeds" if len(result.seeds) > 1 else "1 seed"
    return (
        f"{result.dataset}: {config.rule} with {config.optimizer} {reached} after {config.epochs} "
        f"epochs ({seeds})"
    )


def _curves(axis: Any, curves: list[np.ndarray], colour: str, label: str | None = None) -> None:
    epochs = np.arange(1, len(curves[0]) + 1)
    for curve in curves:
        axis.plot(epochs, curve, color=colour, alpha=0.3, linewidth=1)
    axis.plot(
        epochs,
        np.mean(curves, axis=0),
        color=colour,
        label=label,
        marker="o" if len(epochs) == 1 else None,
    )
