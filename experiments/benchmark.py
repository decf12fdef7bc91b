"""What do hand-written gradients cost beside jax.grad, and an epoch of fit beside other loops?

    python -m experiments benchmark

Every figure is a ratio of medians, of runs interleaved in random order in one process. `noise` is jax.grad against a second
compilation of itself: differences smaller than that mean nothing. Below 1 is faster (or smaller) than jax.grad. PyTorch and
scikit-learn get a row each where they are installed. Takes about two minutes on 2 cores.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
from experiments._data import load
from experiments._run import figure, folder, print_table, progress, save_metrics

NETS = {"784-512-512-10": (784, 512, 512, 10), "784-128-10": (784, 128, 10), "64-32-10": (64, 32, 10), "5x256": (256,) * 6}
LOSS = fnn.losses.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Config:
    """How long to measure."""

    batches: tuple[int, ...] = (32, 128, 1024)
    """Batch sizes for every net."""
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


TINY = Config(batches=(8,), seconds=0.01, compilations=1, epochs=1)


class Row(NamedTuple):
    """One net at one batch size; ratios to jax.grad's."""

    net: str
    batch: int
    microseconds: float  # jax.grad's median
    time: float  # manual gradient
    noise: float  # jax.grad, compiled once more
    norms: float  # per-example norms
    memory: float  # temporary bytes of the manual gradient
    compiling: float  # tracing and compiling of the manual gradient


class Result(NamedTuple):
    """What was measured."""

    rows: list[Row]
    epoch_milliseconds: dict[str, float]  # 64-32-10 on digits at batch 32, medians
    repeat_compile: float  # repeat(layer, 100) over repeat(layer, 4)
    import_seconds: dict[str, float]  # medians


def interleaved(functions: dict[str, Callable[[], Any]], seconds: float, rng: random.Random) -> dict[str, float]:
    """The median time of every function in seconds; calls in random order, about `seconds` for each."""
    once = {}
    for name, f in functions.items():
        jax.block_until_ready(f())
        start = time.perf_counter()
        jax.block_until_ready(f())
        once[name] = time.perf_counter() - start
    calls = max(1, int(0.002 / max(once.values())))  # short functions are called several times a reading
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(3, int(seconds / (calls * statistics.mean(once.values()))))):
        for name in rng.sample(list(functions), len(functions)):
            start = time.perf_counter()
            out = [functions[name]() for _ in range(calls)]
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_net(name: str, batch: int, config: Config, rng: random.Random) -> Row:
    """One row of the table."""
    sizes = NETS[name]
    net = fnn.mlp(sizes)
    keys = jax.random.split(fnn.key(config.seed), 3)
    args = (
        jax.jit(net.init)(keys[0]),
        jax.random.normal(keys[1], (batch, sizes[0])),
        jax.random.randint(keys[2], (batch,), 0, sizes[-1]),
    )
    automatic = jax.value_and_grad(fnn.mean_loss(net, LOSS))
    functions = {
        "automatic": automatic,
        "again": automatic,
        "manual": fnn.value_and_grad(net, LOSS),
        "norms": fnn.per_example.norms(fnn.factors(net, LOSS)),
    }
    compiled = {key: jax.jit(_fresh(f)).lower(*args).compile() for key, f in functions.items()}
    times = interleaved({key: (lambda f=f: f(*args)) for key, f in compiled.items()}, config.seconds, rng)
    memory = {key: getattr(f.memory_analysis(), "temp_size_in_bytes", float("nan")) for key, f in compiled.items()}
    compiling = compile_times({key: functions[key] for key in ("automatic", "manual")}, args, config.compilations, rng)
    return Row(
        name,
        batch,
        times["automatic"] * 1e6,
        times["manual"] / times["automatic"],
        times["again"] / times["automatic"],
        times["norms"] / times["automatic"],
        memory["manual"] / memory["automatic"],
        compiling["manual"] / compiling["automatic"],
    )


def compile_times(functions: dict[str, Callable[..., Any]], args: Any, repetitions: int, rng: random.Random) -> dict[str, float]:
    """The median time to trace and compile in seconds; JAX's caches are cleared before every reading."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name in rng.sample(list(functions), len(functions)):
            jax.clear_caches()
            fresh = jax.jit(_fresh(functions[name]))
            start = time.perf_counter()
            fresh.lower(*args).compile()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def measure_epochs(config: Config, rng: random.Random) -> dict[str, float]:
    """Milliseconds per epoch of plain SGD, 64-32-10 on digits at batch 32, in every loop that is installed."""
    data = load("digits", seed=config.seed)
    x, t = data.x_train, data.t_train
    loops = {"fnn.fit": _fit_loop(x, t, config), "Python loop, jitted step": _python_loop(x, t, config)}
    if importlib.util.find_spec("torch"):
        loops["PyTorch eager"] = _torch_loop(x, t, config)
    loops["scikit-learn MLPClassifier"] = _sklearn_loop(x, t, config)
    return {name: 1e3 * s / config.epochs for name, s in interleaved(loops, config.seconds, rng).items()}


def measure_repeat(config: Config, rng: random.Random) -> float:
    """Compile time of the gradient through `repeat(layer, 100)` over that through `repeat(layer, 4)`."""
    layer = fnn.residual(fnn.serial(fnn.dense(32, 32), fnn.activations.relu))
    batch = jnp.ones((8, 32)), jnp.ones((8, 32))
    times = {}
    for n in (4, 100):
        net = fnn.repeat(layer, n)
        params = jax.jit(net.init)(fnn.key(config.seed))
        times[n] = compile_times({"f": fnn.value_and_grad(net, fnn.losses.l2_loss)}, (params, *batch), config.compilations, rng)["f"]
    return times[100] / times[4]


def measure_import(config: Config, rng: random.Random) -> dict[str, float]:
    """Seconds to start Python and import, in new processes."""
    commands = {"import jax, optax": "import jax, optax", "import fnn, jax, optax": "import jax, optax, fnn"}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(config.compilations):
        for name in rng.sample(list(commands), len(commands)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", commands[name]], check=True)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def run(config: Config, advance: Callable[[str], None] = lambda text: None) -> Result:
    """Measures everything. `advance(text)` is called after every row."""
    rng = random.Random(config.seed)
    rows = []
    for name in NETS:
        for batch in config.batches:
            rows.append(measure_net(name, batch, config, rng))
            advance(f"{name} at {batch}")
    return Result(rows, measure_epochs(config, rng), measure_repeat(config, rng), measure_import(config, rng))


def main(config: Config) -> None:
    with progress(len(NETS) * len(config.batches), "benchmark") as advance:
        result = run(config, advance)
    columns = ("net", "batch", "jax.grad (µs)", "manual", "noise", "norms", "memory", "trace and compile")
    cells = [(r.net, r.batch, f"{r.microseconds:.0f}", *(f"{v:.3f}" for v in r[3:])) for r in result.rows]
    means = [f"{geometric_mean([float(row[i]) for row in result.rows]):.3f}" for i in range(3, 8)]
    print_table("Ratios to jax.grad", columns, [*cells, ("geometric mean", "", "", *means)])
    ours = result.epoch_milliseconds["fnn.fit"]
    epochs = [(name, f"{ms:.2f}", f"{ms / ours:.1f}") for name, ms in result.epoch_milliseconds.items()]
    print_table("An epoch of SGD, 64-32-10 on digits at batch 32", ("loop", "ms", "ratio to fit"), epochs)
    print(f"repeat(layer, 100) compiles in {result.repeat_compile:.2f} times the time of repeat(layer, 4)")
    print("; ".join(f"{name}: {s:.2f} s" for name, s in result.import_seconds.items()))
    path = folder("benchmark", config.out)
    draw(path / "benchmark.png", result)
    save_metrics(path, config, result)
    print(f"picture and metrics in {path}")


def geometric_mean(ratios: list[float]) -> float:
    """The geometric mean of numbers above 0.

    >>> round(geometric_mean([0.5, 2.0]), 6)
    1.0
    """
    return float(np.exp(np.mean(np.log(ratios))))


def draw(path: Path, result: Result) -> None:
    """Time ratios of every row."""
    mean = geometric_mean([row.time for row in result.rows])
    with figure(path, f"Hand-written gradients take {mean:.2f} times as long as jax.grad (geometric mean)", size=(8, 4.5)) as (_, axes):
        labels = [f"{row.net}, {row.batch}" for row in result.rows]
        for name, marker in (("time", "o"), ("noise", "x"), ("norms", "s")):
            label = {"time": "manual gradient", "noise": "jax.grad compiled again", "norms": "per-example norms"}[name]
            axes.plot([getattr(row, name) for row in result.rows], labels, marker, label=label)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xlabel="time over that of jax.grad", ylabel="net, batch size", xlim=(0, None))
        axes.invert_yaxis()
        axes.legend()


def _fresh(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that nothing is found in a cache."""
    return lambda *args: f(*args)


def _fit_loop(x: np.ndarray, t: np.ndarray, config: Config) -> Callable[[], Any]:
    net, optimizer = fnn.mlp((64, 32, 10)), optax.sgd(0.1)
    rule, params = fnn.rules.backprop(net, LOSS), jax.jit(net.init)(fnn.key(config.seed))
    data = jnp.asarray(x), jnp.asarray(t)
    return lambda: fnn.fit(rule, optimizer, params, data, epochs=config.epochs, batch_size=32, key=fnn.key(config.seed))


def _python_loop(x: np.ndarray, t: np.ndarray, config: Config) -> Callable[[], Any]:
    net, rng = fnn.mlp((64, 32, 10)), np.random.default_rng(config.seed)
    gradient, params = fnn.value_and_grad(net, LOSS), jax.jit(net.init)(fnn.key(config.seed))
    step = jax.jit(lambda p, x, t: jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient(p, x, t)[1]))

    def loop() -> Any:
        p = params
        for _ in range(config.epochs):
            order = rng.permutation(len(x))
            for i in range(0, len(x), 32):
                p = step(p, x[order[i : i + 32]], t[order[i : i + 32]])
        return p

    return loop


def _torch_loop(x: np.ndarray, t: np.ndarray, config: Config) -> Callable[[], Any]:
    import torch  # pyright: ignore[reportMissingImports]

    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer, loss = torch.optim.SGD(net.parameters(), 0.1), torch.nn.CrossEntropyLoss()
    inputs, labels = torch.from_numpy(x), torch.from_numpy(t.astype(np.int64))

    def loop() -> None:
        for _ in range(config.epochs):
            for rows in torch.randperm(len(inputs)).split(32):
                optimizer.zero_grad()
                loss(net(inputs[rows]), labels[rows]).backward()
                optimizer.step()

    return loop


def _sklearn_loop(x: np.ndarray, t: np.ndarray, config: Config) -> Callable[[], Any]:
    from sklearn.neural_network import MLPClassifier

    def loop() -> None:
        settings: dict[str, Any] = {"batch_size": 32}
        net = MLPClassifier((32,), solver="sgd", learning_rate_init=0.1, momentum=0.0, alpha=0.0, random_state=config.seed, **settings)
        for _ in range(config.epochs):
            net.partial_fit(x, t, classes=np.arange(10))

    return loop
