"""Times as medians of runs interleaved in random order in one process.

A ratio of two of them means something, one alone does not.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Times(NamedTuple):
    """Medians, in seconds a call."""

    wall: float
    cpu: float  # of all threads of the process


def interleaved(
    functions: dict[str, Callable[[], Any]], seconds: float, rng: random.Random
) -> dict[str, float]:
    """The median time of every function in seconds.

    Calls in random order, about `seconds` for each.
    """
    return {name: times.wall for name, times in wall_and_cpu(functions, seconds, rng).items()}


def wall_and_cpu(
    functions: dict[str, Callable[[], Any]], seconds: float, rng: random.Random
) -> dict[str, Times]:
    """The same with the CPU time beside it, which other processes disturb less."""
    once = {}
    for name, f in functions.items():
        jax.block_until_ready(f())
        once[name] = _seconds(f, 1).wall
    # short functions are called several times a reading
    calls = max(1, int(0.002 / max(once.values())))
    readings: dict[str, list[Times]] = {name: [] for name in functions}
    for _ in range(max(3, int(seconds / (calls * statistics.mean(once.values()))))):
        for name in rng.sample(list(functions), len(functions)):
            readings[name].append(_seconds(functions[name], calls))
    return {
        name: Times(*map(statistics.median, zip(*found, strict=True)))
        for name, found in readings.items()
    }


def _seconds(f: Callable[[], Any], calls: int) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    out = [f() for _ in range(calls)]
    jax.block_until_ready(out)
    return Times((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)


def compile_times(
    functions: dict[str, Callable[..., Any]], args: Any, repetitions: int, rng: random.Random
) -> dict[str, float]:
    """The median CPU time to trace and compile in seconds.

    JAX's caches in memory are cleared before every reading.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name in rng.sample(list(functions), len(functions)):
            jax.clear_caches()
            jitted = jax.jit(fresh(functions[name]))
            start = time.process_time()
            jitted.lower(*args).compile()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def operations(f: Callable[..., Any], *args: Any) -> int:
    """How many lines of the lowered program define a value."""
    lines = jax.jit(fresh(f)).lower(*args).as_text().splitlines()
    return sum(bool(re.match(r"\s*%[^=]*= ", line)) for line in lines)


def temporary_bytes(compiled: Any) -> float:
    """What a compiled function needs beside its arguments and results, by XLA's own analysis."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", float("nan"))


def fresh(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that nothing is found in a cache."""
    return lambda *args: f(*args)


def geometric_mean(ratios: list[float]) -> float:
    """The geometric mean of numbers above 0; nan are left out.

    >>> round(geometric_mean([0.5, 2.0, float("nan")]), 6)
    1.0
    """
    return float(np.exp(np.nanmean(np.log(ratios))))
