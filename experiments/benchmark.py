"""What do hand-written gradients and per-example statistics cost beside jax.grad, and an epoch of
fit beside other loops?

    python -m experiments benchmark

Every figure is a ratio of medians, of runs interleaved in random order in one process. `noise` is
jax.grad against a second compilation of itself: differences smaller than that mean nothing. Below 1
is faster (or smaller) than jax.grad. PyTorch, scikit-learn, jax-privacy, Opacus and BackPACK get
rows where they are installed. Takes about five minutes on 2 cores.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from experiments import _rivals
from experiments._data import load
from experiments._run import figure, folder, print_table, progress, save_metrics
from experiments._timing import (
    compile_times,
    fresh,
    geometric_mean,
    interleaved,
    operations,
    temporary_bytes,
)

NETS = {
    "784-512-512-10": (784, 512, 512, 10),
    "784-128-10": (784, 128, 10),
    "64-32-10": (64, 32, 10),
    "5x256": (256,) * 6,
}
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels
STATISTICS = ("norms", "clipped", "moments", "gram")
PROGRAMS = ("norms", "clipped", "per_layer", "moments", "noise_scale")
RULES = {"fa": fnn.rules.feedback_alignment, "dfa": fnn.rules.direct_feedback_alignment}


@dataclass(frozen=True)
class Config:
    """How long to measure."""

    nets: tuple[str, ...] = tuple(NETS)
    """Nets of the tables, by name; the first is the one at which other libraries clip."""
    batches: tuple[int, ...] = (32, 128, 1024)
    """Batch sizes for every net."""
    gram_batch: int = 128
    """Greatest batch whose Gram matrix is taken: it is batch x batch."""
    memory_batches: tuple[int, ...] = (128, 1024, 8192)
    """Batch sizes for the temporary memory, which is compiled for and not run."""
    depths: tuple[int, ...] = (4, 16, 64)
    """Layers of the nets, 64 wide, whose programs are counted; they compile up to 16."""
    rival_batch: int = 128
    """Batch size at which other libraries clip, for the first net."""
    seconds: float = 2.0
    """Time spent on each function of a row."""
    compilations: int = 7
    """Compilations of each function, for the compile time."""
    epochs: int = 100
    """Epochs per run of a training loop."""
    seed: int = 0
    """Of the data and of the random order."""
    out: Path | None = None
    """Run folder; runs/benchmark if not given."""


TINY = Config(
    nets=("64-32-10",),
    batches=(8,),
    memory_batches=(8,),
    depths=(2,),
    rival_batch=8,
    seconds=0.01,
    compilations=1,
    epochs=1,
)


class Row(NamedTuple):
    """One net at one batch size; ratios to jax.grad's, nan where not measured."""

    net: str
    batch: int
    microseconds: float  # jax.grad's median
    time: float  # manual gradient
    noise: float  # jax.grad, compiled once more
    memory: float  # temporary bytes of the manual gradient
    compiling: float  # tracing and compiling of the manual gradient
    norms: float  # per-example statistics
    clipped: float
    moments: float
    gram: float
    fa: float  # a step of other rules, over the manual gradient
    dfa: float


class Memory(NamedTuple):
    """Temporary bytes of one net at one batch size; ratios to jax.grad's."""

    net: str
    batch: int
    megabytes: float  # jax.grad's
    norms: float
    clipped: float


class Program(NamedTuple):
    """Size of the programs of one net, or CPU time to trace and compile; ratios to jax.grad's."""

    net: str
    batch: int
    jax_grad: float  # operations, or seconds
    norms: float
    clipped: float
    per_layer: float
    moments: float
    noise_scale: float


class Rival(NamedTuple):
    """Another library's way to what `clipped_gradient` gives."""

    library: str
    way: str
    milliseconds: float
    to_plain: float  # over the library's own plain gradient
    to_fnn: float  # over fnn's clipped gradient


class Result(NamedTuple):
    """What was measured."""

    rows: list[Row]
    memory: list[Memory]
    operations: list[Program]
    compiling: list[Program]
    rivals: list[Rival]
    epoch_milliseconds: dict[str, float]  # 64-32-10 on digits at batch 32, medians
    repeat_compile: float  # repeat(layer, 100) over repeat(layer, 4)
    import_seconds: dict[str, float]  # medians


def arguments(name: str, batch: int, seed: int) -> tuple[Any, Any, Any]:
    """Params, inputs and labels for a net of `NETS`."""
    sizes, keys = NETS[name], jax.random.split(fnn.key(seed), 3)
    x, t = (
        jax.random.normal(keys[1], (batch, sizes[0])),
        jax.random.randint(keys[2], (batch,), 0, sizes[-1]),
    )
    return jax.jit(fnn.mlp(sizes).init)(keys[0]), x, t


def functions_of(name: str) -> dict[str, Callable[..., Any]]:
    """What is compared with `automatic`, for a net of `NETS`."""
    return functions_on(fnn.mlp(NETS[name]))


def functions_on(net: fnn.Layer) -> dict[str, Callable[..., Any]]:
    """What is compared with `automatic`, for any net."""
    automatic = jax.value_and_grad(fnn.mean_loss(net, LOSS))
    source = fnn.source(net, LOSS)
    statistics_of = fnn.per_example
    return {
        "automatic": automatic,
        "again": automatic,
        "manual": fnn.value_and_grad(net, LOSS),
        "norms": statistics_of.norms(source),
        "clipped": statistics_of.clipped_gradient(source, 1.0),
        "per_layer": statistics_of.clipped_gradient(source, 1.0, per_layer=True),
        "moments": statistics_of.moments(source),
        "noise_scale": statistics_of.noise_scale(source),
        "gram": statistics_of.gram(source),
    }


def measure_net(name: str, batch: int, config: Config, rng: random.Random) -> Row:
    """One row of the table."""
    functions, args = functions_of(name), arguments(name, batch, config.seed)
    for key in ("per_layer", "noise_scale"):
        del functions[key]
    if batch > config.gram_batch:
        del functions["gram"]
    compiled = {key: jax.jit(fresh(f)).lower(*args).compile() for key, f in functions.items()}
    calls = {key: (lambda f=f: f(*args)) for key, f in compiled.items()}
    times = interleaved(calls | rule_calls(name, *args), config.seconds, rng)
    ratios = {
        key: times[key] / times["automatic"] if key in times else float("nan")
        for key in ("manual", "again", *STATISTICS)
    }
    memory = temporary_bytes(compiled["manual"]) / temporary_bytes(compiled["automatic"])
    compiling = compile_times(
        {key: functions[key] for key in ("automatic", "manual")}, args, config.compilations, rng
    )
    rest = *(ratios[key] for key in STATISTICS), *(times[key] / times["manual"] for key in RULES)
    microseconds = times["automatic"] * 1e6
    return Row(
        name,
        batch,
        microseconds,
        ratios["manual"],
        ratios["again"],
        memory,
        compiling["manual"] / compiling["automatic"],
        *rest,
    )


def rule_calls(name: str, params: Any, x: Any, t: Any) -> dict[str, Callable[[], Any]]:
    """A step of every rule of `RULES`, compiled, with its state as an argument."""
    calls = {}
    for key, make in RULES.items():
        rule = make(fnn.mlp(NETS[name]), LOSS)
        args = params, rule.init(fnn.key(0), params), x, t
        step = (
            jax.jit(
                fresh(
                    lambda params, state, x, t, rule=rule: rule.value_and_grad(params, state, x, t)[
                        :2
                    ]
                )
            )
            .lower(*args)
            .compile()
        )
        calls[key] = lambda step=step, args=args: step(*args)
    return calls


def measure_memory(name: str, batch: int, config: Config) -> Memory:
    """One row of the table of memory."""
    functions, args = functions_of(name), arguments(name, batch, config.seed)
    size = {
        key: temporary_bytes(jax.jit(fresh(functions[key])).lower(*args).compile())
        for key in ("automatic", "norms", "clipped")
    }
    return Memory(
        name,
        batch,
        size["automatic"] / 1e6,
        size["norms"] / size["automatic"],
        size["clipped"] / size["automatic"],
    )


def measure_programs(depth: int, config: Config, rng: random.Random) -> tuple[Program, Program]:
    """Operations of the programs of a net 64 wide, and CPU time to trace and compile them."""
    net = fnn.mlp((64,) * (depth + 1))
    keys = jax.random.split(fnn.key(config.seed), 2)
    args = jax.jit(net.init)(keys[0]), jax.random.normal(keys[1], (32, 64)), jnp.zeros(32, int)
    functions = {key: f for key, f in functions_on(net).items() if key in ("automatic", *PROGRAMS)}
    counts = {key: operations(f, *args) for key, f in functions.items()}
    seconds = dict.fromkeys(functions, float("nan"))
    if depth <= 16:
        seconds = compile_times(functions, args, config.compilations, rng)
    rows = []
    for found in (counts, seconds):
        whole = found["automatic"]
        ratios = [found[key] / whole for key in PROGRAMS]
        rows.append(Program(f"64 wide, depth {depth}", 32, whole, *ratios))
    return rows[0], rows[1]


def measure_rivals(config: Config, rng: random.Random) -> list[Rival]:
    """Clipped gradients of the first net in every library that is installed, in one interleaved
    run."""
    name = config.nets[0]
    params, x, t = arguments(name, config.rival_batch, config.seed)
    functions, net = functions_of(name), fnn.mlp(NETS[name])
    ours = {"plain gradient": functions["automatic"], "clipped_gradient": functions["clipped"]}
    calls = {"fnn": {way: (lambda f=jax.jit(fresh(f)): f(params, x, t)) for way, f in ours.items()}}
    calls |= _rivals.per_example(net, NETS[name], params, x, t)
    flat = {(library, way): call for library, ways in calls.items() for way, call in ways.items()}
    named = {f"{library}: {way}": call for (library, way), call in flat.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hooks of PyTorch's libraries
        times = interleaved(named, 0.0, rng)
        # the slow ones disturb the others
        quick = {key: call for key, call in named.items() if times[key] < 20 * min(times.values())}
        times |= interleaved(quick, config.seconds, rng)
    rivals = []
    for library, way in flat:
        plain = times.get(f"{library}: plain gradient", times["fnn: plain gradient"])
        milliseconds = times[f"{library}: {way}"]
        rivals.append(
            Rival(
                library,
                way,
                1e3 * milliseconds,
                milliseconds / plain,
                milliseconds / times["fnn: clipped_gradient"],
            )
        )
    return rivals


def measure_epochs(config: Config, rng: random.Random) -> dict[str, float]:
    """Milliseconds per epoch of plain SGD, 64-32-10 on digits at batch 32, in every loop that is
    installed."""
    data = load("digits", seed=config.seed)
    x, t = data.x_train, data.t_train
    loops = {
        "fnn.fit": _fit_loop(x, t, config),
        "Python loop, jitted step": _rivals.python_loop(x, t, config.epochs, config.seed),
    }
    if _rivals.installed("torch"):
        loops["PyTorch eager"] = _rivals.torch_loop(x, t, config.epochs)
    loops["scikit-learn MLPClassifier"] = _rivals.sklearn_loop(x, t, config.epochs, config.seed)
    return {
        name: 1e3 * s / config.epochs for name, s in interleaved(loops, config.seconds, rng).items()
    }


def measure_repeat(config: Config, rng: random.Random) -> float:
    """Compile time of the gradient through `repeat(layer, 100)` over that through `repeat(layer,
    4)`."""
    layer = fnn.residual(fnn.serial(fnn.dense(32, 32), fnn.activations.relu))
    batch = jnp.ones((8, 32)), jnp.ones((8, 32))
    times = {}
    for n in (4, 100):
        net = fnn.repeat(layer, n)
        params = jax.jit(net.init)(fnn.key(config.seed))
        times[n] = compile_times(
            {"f": fnn.value_and_grad(net, fnn.losses.l2_loss)},
            (params, *batch),
            config.compilations,
            rng,
        )["f"]
    return times[100] / times[4]


def measure_import(config: Config, rng: random.Random) -> dict[str, float]:
    """Seconds to start Python and import, in new processes."""
    commands = {
        "import jax, optax": "import jax, optax",
        "import fnn, jax, optax": "import jax, optax, fnn",
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(config.compilations):
        for name in rng.sample(list(commands), len(commands)):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", commands[name]],
                check=True,
                cwd=Path(fnn.__file__).parents[1],
            )
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def run(config: Config, advance: Callable[[str], None] = lambda text: None) -> Result:
    """Measures everything. `advance(text)` is called after every part, `parts(config)` times."""
    rng = random.Random(config.seed)

    def done(text: str, value: Any) -> Any:
        advance(text)
        return value

    rows = [
        done(f"{name} at {batch}", measure_net(name, batch, config, rng))
        for name in config.nets
        for batch in config.batches
    ]
    memory = [
        done(f"memory at {batch}", measure_memory(name, batch, config))
        for name in config.nets
        for batch in config.memory_batches
    ]
    programs = [
        done(f"programs at depth {depth}", measure_programs(depth, config, rng))
        for depth in config.depths
    ]
    return Result(
        rows,
        memory,
        [row for row, _ in programs],
        [row for _, row in programs],
        done("other libraries", measure_rivals(config, rng)),
        done("epochs", measure_epochs(config, rng)),
        done("repeat", measure_repeat(config, rng)),
        done("import", measure_import(config, rng)),
    )


def parts(config: Config) -> int:
    """How many parts `run` has."""
    rows = len(config.batches) + len(config.memory_batches)
    return len(config.nets) * rows + len(config.depths) + 4


def main(config: Config) -> None:
    with progress(parts(config), "benchmark") as advance:
        result = run(config, advance)
    _print_rows(
        "Time of jax.grad, and ratios to it",
        result.rows,
        ("microseconds", "time", "noise", "memory", "compiling"),
    )
    _print_rows("Per-example statistics: ratios of time", result.rows, STATISTICS)
    _print_rows("A step of other rules: ratios to the manual gradient", result.rows, tuple(RULES))
    _print_rows(
        "Temporary memory of jax.grad (MB), and ratios to it",
        result.memory,
        ("megabytes", "norms", "clipped"),
    )
    columns = ("jax_grad", *PROGRAMS)
    _print_rows("Operations of jax.grad's program, and ratios to it", result.operations, columns)
    _print_rows("CPU seconds to trace and compile, and ratios to it", result.compiling, columns)
    rivals = [
        (r.library, r.way, f"{r.milliseconds:.2f}", f"{r.to_plain:.2f}", f"{r.to_fnn:.2f}")
        for r in result.rivals
    ]
    title = f"Clipped gradients elsewhere, {config.nets[0]} at batch {config.rival_batch}"
    print_table(
        title, ("library", "way", "ms", "to its plain gradient", "to fnn's clipped"), rivals
    )
    ours = result.epoch_milliseconds["fnn.fit"]
    epochs = [
        (name, f"{ms:.2f}", f"{ms / ours:.1f}") for name, ms in result.epoch_milliseconds.items()
    ]
    print_table(
        "An epoch of SGD, 64-32-10 on digits at batch 32", ("loop", "ms", "ratio to fit"), epochs
    )
    print(
        f"repeat(layer, 100) compiles in {result.repeat_compile:.2f} times the time of "
        "repeat(layer, 4)"
    )
    print("; ".join(f"{name}: {s:.2f} s" for name, s in result.import_seconds.items()))
    path = folder("benchmark", config.out)
    draw(path / "benchmark.png", result)
    save_metrics(path, config, result)
    print(f"picture and metrics in {path}")


def _print_rows(title: str, rows: list[Any], columns: tuple[str, ...]) -> None:
    """Net, batch and some columns; below, the geometric mean of every ratio."""
    absolute = {"microseconds": ".0f", "megabytes": ".2f", "jax_grad": ".4g"}
    cells = [
        (r.net, r.batch, *(_number(getattr(r, c), absolute.get(c, ".3f")) for c in columns))
        for r in rows
    ]
    means = [
        "" if c in absolute else _number(geometric_mean([getattr(r, c) for r in rows]), ".3f")
        for c in columns
    ]
    print_table(title, ("net", "batch", *columns), [*cells, ("geometric mean", "", *means)])


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def draw(path: Path, result: Result) -> None:
    """Time ratios of every row."""
    mean = {
        name: geometric_mean([getattr(row, name) for row in result.rows])
        for name in ("time", "clipped")
    }
    title = (
        f"A hand-written gradient takes {mean['time']:.2f} times as long as jax.grad, one with "
        f"every example clipped {mean['clipped']:.2f}"
    )
    labels = {
        "time": "manual gradient",
        "noise": "jax.grad compiled again",
        "norms": "per-example norms",
        "clipped": "clipped gradient",
    }
    labels |= {"moments": "mean and variance", "gram": "Gram matrix"}
    with figure(path, title, size=(8, 5)) as (_, axes):
        names = [f"{row.net}, {row.batch}" for row in result.rows]
        for (name, label), marker in zip(labels.items(), "oxsD^v", strict=True):
            axes.plot([getattr(row, name) for row in result.rows], names, marker, label=label)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xlabel="time over that of jax.grad", ylabel="net, batch size", xlim=(0, None))
        axes.invert_yaxis()
        axes.legend()


def _fit_loop(x: np.ndarray, t: np.ndarray, config: Config) -> Callable[[], Any]:
    net, optimizer = fnn.mlp((64, 32, 10)), optax.sgd(0.1)
    rule, params = fnn.rules.backprop(net, LOSS), jax.jit(net.init)(fnn.key(config.seed))
    data = jnp.asarray(x), jnp.asarray(t)
    return lambda: fnn.fit(
        rule, optimizer, params, data, epochs=config.epochs, batch_size=32, key=fnn.key(config.seed)
    )
