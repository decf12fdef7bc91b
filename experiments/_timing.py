"""Times as medians of runs interleaved in random order in one process.

A ratio of two of them means something, one alone does not.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(
    functions: dict[str, Callable[[], Any]], seconds: float, rng: random.Random
) -> dict[str, float]:
    """The median time of every function in seconds.

    Calls in random order, about `seconds` for each.
    """
    once = {}
    for name, f in functions.items():
        jax.block_until_ready(f())
        start = time.perf_counter()
        jax.block_until_ready(f())
        once[name] = time.perf_counter() - start
    # short functions are called several times a reading
    calls = max(1, int(0.002 / max(once.values())))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(max(3, int(seconds / (calls * statistics.mean(once.values()))))):
        for name in rng.sample(list(functions), len(functions)):
            start = time.perf_counter()
            out = [functions[name]() for _ in range(calls)]
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


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
