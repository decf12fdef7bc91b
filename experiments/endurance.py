"""Does a training that is killed again and again end as one that never was, and what does it cost
to be ready for that?

    python -m experiments endurance --kills 200

A net learns digits by node perturbation, whose random numbers are part of its state, and saves
after every epoch. Its process is killed (SIGKILL, which nothing can catch) at random moments: while
it starts, while it trains, or while it saves; then it is started again, in a process of its own,
until it is done. Expect it to go on every time, parameters with the SHA-256 of a run that nobody
disturbed, and nothing left in its folder but checkpoints. Then 784-512-512-10, the largest net of
`benchmark`, is trained on as many examples as MNIST has, with and without a checkpoint after every
epoch: expect 2 to 4 % more time. The memory is measured with a wider net, in processes of their
own: expect one copy of the state, that which is being written, or less where the steps that follow
begin when it is done, give or take what a process differs from another. 200 kills take three to six
minutes on two cores, and the rest four.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fnn
from experiments._data import load
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate, checkpoint
from fnn.checkpoint import Checkpointer

KINDS = ("starting", "training", "saving")
# what the processes are at when they are killed
TURNS = ("training", "saving", "training", "saving", "starting")
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels
RULES = {rule.__name__: rule for rule in fnn.rules.RULES}


@dataclass(frozen=True)
class Config:
    """What is killed, and how often."""

    kills: int = 200
    """Processes to kill."""
    rule: str = "node_perturbation"
    """What trains: the name of a constructor in fnn.rules.RULES."""
    epochs: int = 400
    """Of a training, each followed by a checkpoint."""
    hidden: tuple[int, ...] = (512, 512)
    """Hidden layers of the net whose training is timed with and without checkpoints."""
    examples: int = 60_000
    """Of an epoch of that net: noise of MNIST's size, at batch 128."""
    wide: tuple[int, ...] = (4096, 4096)
    """Hidden layers of the net whose memory is measured, large enough to be told from the rest of
    the process."""
    repetitions: int = 21
    """Trainings with and without, for the medians of time, and processes in threes for that of
    memory; nothing is measured if 0."""
    seed: int = 0
    """Of the parameters, the batches, and the moments."""
    out: Path | None = None
    """Run folder; runs/endurance if not given."""


GALLERY = Config(kills=30, repetitions=0)
TINY = Config(kills=1, epochs=20, hidden=(8,), examples=256, wide=(8,), repetitions=1)


class Kill(NamedTuple):
    """One process that was killed."""

    kind: str  # one of KINDS: what it was meant to be at
    epoch: int  # of the newest checkpoint
    unfinished: bool  # whether a checkpoint was half written


class Cost(NamedTuple):
    """Training with a checkpoint after every epoch, beside training without."""

    ratio: float  # of the medians of the time
    interval: tuple[float, float]  # of confidence, 95 %
    copies: float  # peak memory more, in copies of the state, of the wide net
    megabytes: float  # of that state


class Result(NamedTuple):
    """What became of it."""

    kills: list[Kill]
    digests: list[str]  # SHA-256 of the parameters of every training that came to its end
    expected: str  # of one that was not disturbed
    left: list[str]  # what lies in the folders beside checkpoints
    cost: Cost | None


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    check_positive(config, "kills", "epochs", "hidden", "examples", "wide", whole=True)
    _validate.one_of("rule", config.rule, RULES)
    _validate.not_negative("repetitions", config.repetitions)
    fnn.key(config.seed)


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Kills and counts. `advance(text)` after each kill.

    Raises:
        ValueError: a process that was not killed failed.
    """
    check(config)
    rng, kills, digests, left = random.Random(config.seed), [], [], []
    with tempfile.TemporaryDirectory() as home:
        expected = _end_of(_started(config, Path(home, "expected")))
        startup = _startup(config, Path(home, "startup"))
        place = Path(home, "0")
        while len(kills) < config.kills:
            # it came to its end before
            if (
                kill := _killed(config, place, TURNS[len(kills) % len(TURNS)], rng, startup)
            ) is None:
                digests.append(_end_of(_started(config, place)))
                left += _beside_checkpoints(place)
                place = Path(home, str(len(digests)))
                continue
            kills.append(kill)
            advance(f"epoch {kill.epoch}")
        digests.append(_end_of(_started(config, place)))
        left += _beside_checkpoints(place)
    return Result(kills, digests, expected, left, _cost(config) if config.repetitions else None)


class Child(NamedTuple):
    """A process that trains."""

    process: Any
    answer: multiprocessing.connection.Connection  # gives its parameters' SHA-256 when it is done


def _context() -> Any:
    """New processes are forked from one that has imported all this and started nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _started(config: Config, place: Path) -> Child:
    context = _context()
    answer, mouth = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(config, place, mouth), daemon=True)
    process.start()
    mouth.close()
    return Child(process, answer)


def _train(config: Config, place: Path, mouth: Any) -> None:
    """What runs in a process: goes on with the training in a folder, or begins it."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(place.parent / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    data, net = load("digits", seed=config.seed), fnn.mlp((64, 16, 10))
    rule, settings = (
        RULES[config.rule](net, data.loss),
        {"batch_size": 128, "key": fnn.key(config.seed + 1), "epochs": config.epochs},
    )
    params = jax.jit(net.init)(fnn.key(config.seed))
    train = data.x_train, data.t_train
    params, _ = fnn.fit(
        rule,
        optax.adam(0.01),
        params,
        train,
        checkpoint=Checkpointer(place, seconds=0.02),
        **settings,
    )
    mouth.send(
        hashlib.sha256(
            b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))
        ).hexdigest()
    )


def _startup(config: Config, place: Path) -> float:
    """The seconds until a process has its first checkpoint."""
    begun, child = time.monotonic(), _started(config, place)
    _wait(child, lambda: bool(checkpoint.steps(place)))
    child.process.kill()
    return time.monotonic() - begun


def _end_of(child: Child) -> str:
    """What a process answers when it is done."""
    try:
        return child.answer.recv()
    except EOFError:
        child.process.join()
        raise ValueError(
            f"A training that nobody killed ended with code {child.process.exitcode}."
        ) from None
    finally:
        child.process.join()


def _killed(
    config: Config, place: Path, kind: str, rng: random.Random, startup: float
) -> Kill | None:
    """Goes on with a training and kills its process at a random moment.

    None where it came to its end before.
    """
    before, child = checkpoint.steps(place), _started(config, place)
    try:
        if kind == "starting":
            time.sleep(rng.uniform(0, startup))
        else:
            _wait(child, lambda: checkpoint.steps(place) != before)
            if kind == "saving":
                _wait(child, lambda: any(place.glob(".unfinished-*")))
            time.sleep(rng.uniform(0, 0.01 if kind == "saving" else 0.2))
        ended = child.answer.poll()
    finally:
        child.process.kill()
        child.process.join()
    if ended:
        return None
    if child.process.exitcode != -signal.SIGKILL:
        raise ValueError(
            f"A training that nobody had killed yet ended with code {child.process.exitcode}."
        )
    there = checkpoint.steps(place)
    epoch = checkpoint.manifest(place).metadata["epoch"] if there else 0
    return Kill(kind, epoch, any(place.glob(".unfinished-*")))


def _wait(child: Child, until: Callable[[], bool]) -> None:
    while child.process.is_alive() and not until():
        time.sleep(0.0005)


def _beside_checkpoints(place: Path) -> list[str]:
    whole = {f"step-{step:012d}" for step in checkpoint.steps(place)}
    return sorted(path.name for path in place.iterdir() if path.name not in whole)


def _cost(config: Config) -> Cost:
    """The ratio of the times in one process; the peaks of memory in a new one each."""
    with _context().Pool(1) as pool:
        times = pool.apply(_times, (config,))
    peaks: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(-(-config.repetitions // 3)):
        for saved in peaks:
            with _context().Pool(1) as pool:
                peaks[saved].append(pool.apply(_peak, (config, saved)))
    size = _state_bytes(config)
    copies = (statistics.median(peaks[True]) - statistics.median(peaks[False])) / size
    return Cost(_ratio(times), _interval(times, config.seed), copies, size / 1e6)


def _trainer(
    config: Config, hidden: tuple[int, ...], examples: int, epochs: int
) -> Callable[[bool], Any]:
    """`train(saved)`."""
    rng, keys = np.random.default_rng(config.seed), jax.random.split(fnn.key(config.seed), 2)
    x, t = (
        rng.normal(size=(examples, 784)).astype(np.float32),
        rng.integers(0, 10, examples).astype(np.int32),
    )
    net, optimizer = fnn.mlp((784, *hidden, 10)), optax.adam(1e-3)
    rule, params = fnn.rules.backprop(net, LOSS), jax.jit(net.init)(keys[0])

    def train(saved: bool) -> Any:
        with tempfile.TemporaryDirectory() as place:
            saver = Checkpointer(place, wait=True) if saved else None
            return fnn.fit(
                rule,
                optimizer,
                params,
                (x, t),
                epochs=epochs,
                batch_size=128,
                key=keys[1],
                checkpoint=saver,
            )

    return train


def _times(config: Config) -> list[tuple[float, float]]:
    """Seconds of a training without and with checkpoints, side by side and in random order."""
    train = _trainer(config, config.hidden, config.examples, epochs=4)
    for saved in (False, True):
        train(saved)
    times, rng = [], random.Random(config.seed)
    for _ in range(config.repetitions):
        took = {}
        for saved in rng.sample((False, True), 2):
            begun = time.perf_counter()
            train(saved)
            took[saved] = time.perf_counter() - begun
        times.append((took[False], took[True]))
    return times


def _ratio(times: Sequence[tuple[float, float]]) -> float:
    plain, saving = (statistics.median(each) for each in zip(*times, strict=True))
    return saving / plain


def _interval(times: list[tuple[float, float]], seed: int) -> tuple[float, float]:
    """By the bootstrap: the ratio of pairs that are drawn from these, again and again."""
    rng = random.Random(seed)
    ratios = sorted(_ratio(rng.choices(times, k=len(times))) for _ in range(1000))
    return ratios[25], ratios[974]


def _peak(config: Config, saved: bool) -> float:
    _trainer(config, config.wide, examples=256, epochs=3)(saved)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _state_bytes(config: Config) -> int:
    """Of the wide net: parameters, and the two moments and the count of Adam."""
    params = jax.eval_shape(fnn.mlp((784, *config.wide, 10)).init, jax.random.key(0))
    state = params, jax.eval_shape(optax.adam(1e-3).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def main(config: Config) -> None:
    check(config)
    path = folder("endurance", config.out)
    with progress(config.kills, "kills") as advance:
        result = run(config, advance)
    rows = [
        (
            kind,
            sum(k.kind == kind for k in result.kills),
            sum(k.kind == kind and k.unfinished for k in result.kills),
        )
        for kind in KINDS
    ]
    print_table(
        f"{config.kills} processes killed",
        ("while", "kills", "with a checkpoint half written"),
        rows,
    )
    same = sum(digest == result.expected for digest in result.digests)
    print(
        f"{same} of {len(result.digests)} trainings ended with the parameters of an undisturbed "
        f"one, SHA-256 {result.expected[:16]}..."
    )
    print(f"Left beside checkpoints: {', '.join(result.left) or 'nothing'}")
    if result.cost:
        timed, wide = (
            "-".join(map(str, (784, *hidden, 10))) for hidden in (config.hidden, config.wide)
        )
        more, low, high = (
            100 * (ratio - 1) for ratio in (result.cost.ratio, *result.cost.interval)
        )
        print(
            f"A checkpoint after every epoch of {config.examples:,} examples: {timed} takes "
            f"{more:.1f} % more time"
        )
        print(
            f"(95 % interval {low:.1f} to {high:.1f} %), and {wide}, whose state has "
            f"{result.cost.megabytes:.0f} MB,"
        )
        print(f"{result.cost.copies:.2f} copies of it more memory at the peak")
    draw(path / "endurance.png", result)
    print(f"Saved {save_metrics(path, config, result)} and {path / 'endurance.png'}")
    if same < len(result.digests) or result.left:
        raise ValueError("A training did not end as it should have: see above.")


def draw(path: Path, result: Result) -> None:
    """How far the training was at every kill."""
    same = sum(digest == result.expected for digest in result.digests)
    title = (
        f"{len(result.kills)} kills, and {same} of {len(result.digests)} trainings ended bit for "
        "bit as if there had been none"
    )
    with figure(path, title) as (_, axes):
        axes.plot([kill.epoch for kill in result.kills], color="#999999", linewidth=1, zorder=1)
        for kind, colour, marker in zip(KINDS, COLOURS, "osv", strict=False):
            shown = [(i, kill.epoch) for i, kill in enumerate(result.kills) if kill.kind == kind]
            if shown:
                axes.scatter(
                    *zip(*shown, strict=True),
                    color=colour,
                    marker=marker,
                    s=16,
                    label=kind,
                    zorder=2,
                )
        axes.set(xlabel="kill", ylabel="epoch of the newest checkpoint")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
        axes.legend(title="killed while", loc="upper center", ncols=len(KINDS))
