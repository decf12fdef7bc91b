"""An epoch in parts: what `fit` does between two looks at the clock.

Arrays are gone through by one compiled loop, whose first and last step are numbers that it is
given: an epoch in one part or in many, or begun anew in the middle, is the same program and gives
the same bits. An iterable is gone through step by step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import _validate
from fnn._processes import greatest
from fnn.sharding import Placement, padded, place_batch
from fnn.training.data import check_data, take
from fnn.training.steps import TrainState, batch_of, batch_weight, step, step_with_grads
from fnn.types import Array, Params, Rule

Record = Callable[..., Any]  # (params, rule_state, x, targets, weights) -> a tree of arrays
# (first, steps) -> the (start, stop) of each part
Segments = Callable[[int, int], Iterator[tuple[int, int]]]


class Recorder(NamedTuple):
    """What is recorded during training, before the steps 0, every, 2 every, ... of each epoch."""

    record: Record | None = None
    every: int = 1


class Loop(NamedTuple):
    """What is compiled into a training's steps; hashable."""

    rule: Rule
    optimizer: Any
    recorder: Recorder = Recorder()
    placement: Placement | None = None  # on a mesh


class Part(NamedTuple):
    """What some consecutive steps leave; all but the state on the host."""

    state: TrainState
    losses: np.ndarray  # [steps]
    counts: np.ndarray  # [steps]: what each batch weighs in the epoch's mean
    records: Any  # a tree of [records, ...]; None where nothing was recorded


class NonFiniteStep(Exception):
    """Raised inside an epoch, for `fit` to pass on."""

    def __init__(self, loss: np.ndarray, params: Params, leaf: str) -> None:
        """Keeps the loss of the bad step, the parameters before it and the path of the bad leaf."""
        self.loss, self.params, self.leaf = loss, params, leaf


def paced(seconds: float = 0.5) -> Segments:
    """Parts that take about so long, told by the time that the ones before took."""
    size = 1

    def segments(first: int, steps: int) -> Iterator[tuple[int, int]]:
        nonlocal size
        start = first
        while start < steps:
            begun, stop = time.monotonic(), min(start + size, steps)
            yield start, stop
            took = time.monotonic() - begun
            size = (
                2 * size
                if took < seconds / 2 and stop - start == size
                else max(1, size // 2)
                if took > seconds
                else size
            )
            (size,) = greatest(size)
            start = stop

    return segments


def run_arrays(
    loop: Loop,
    state: TrainState,
    data: Any,
    e: int,
    first: int,
    draw: Callable[[int], tuple[Any, Any]],
    segments: Segments | None,
) -> Iterator[Part]:
    """The steps of an epoch from `first` on, over arrays in the order `draw(e)`.

    Where one does not stay finite, step by step from there.

    Without `segments` all of them are one part, by a loop whose length the compiler knows.
    """
    x, targets, weights = data
    rows, present = draw(e)
    run, every = _part_function(loop, segments is None), loop.recorder.every
    for start, stop in [(0, len(rows))] if segments is None else segments(first, len(rows)):
        after, losses, counts, records, finite = run(
            state, (rows, present), np.int32(start), np.int32(stop), *data
        )
        draw(e + 1)  # while the device is at work; `draw` remembers it for the next epoch
        if bool(finite):
            losses, counts = jax.device_get((losses, counts))
            yield Part(
                after,
                losses[start:stop],
                counts[start:stop],
                _slice(records, -(-start // every), -(-stop // every)),
            )
        else:
            of = (
                batch_of((rows[i], None if present is None else present[i]), weights)
                for i in range(start, stop)
            )
            batches = ((take(x, r), take(targets, r), w) for r, w in of)
            for part in _one_by_one(loop, state, batches, start):
                yield part
                # rounding differs step by step: if they stayed finite, these count
                after = part.state
        state = after


def run_iterable(
    loop: Loop, state: TrainState, data: Any, e: int, first: int, batch_size: int
) -> Iterator[Part]:
    """The steps of an epoch from `first` on, over an iterable of batches.

    It checks each batch as it enters. Every part is one step.
    """
    batches = data(e) if callable(data) else data
    if not isinstance(batches, Iterable):
        raise TypeError(
            "`data(epoch)` must return an iterable of batches (x, targets), "
            f"got {type(batches).__name__} in epoch {e}."
        )
    rest = iter(batches)
    if (skipped := sum(1 for _ in islice(rest, first))) < first:
        raise ValueError(
            f"`data` gave {skipped} batches in epoch {e}, of which {first} were done before. "
            "It must give the same again."
        )
    checked = _checked_batches(loop.rule, state.params, rest, e, first, batch_size)
    if loop.placement is not None:
        mesh = loop.placement.mesh
        checked = (place_batch(mesh, batch) for batch in checked)
    i = first
    for i, part in enumerate(_one_by_one(loop, state, checked, first), first + 1):  # noqa: B007
        yield part
    if i == 0:
        raise ValueError(
            f"`data` gave no batch in epoch {e}. A generator can be gone through only once: "
            "pass a list, or a function of the epoch."
        )


def record_structure(loop: Loop, state: TrainState, data: Any, batch_size: int) -> Any:
    """The structure of what is recorded of a batch; takes one where `data` is an iterable."""
    record: Any = loop.recorder.record
    if isinstance(data, tuple):
        x, targets, weights = jax.tree.map(lambda a: a[:batch_size], data)
    else:
        batches: Any = data(0) if callable(data) else data
        x, targets, weights = next(
            _checked_batches(loop.rule, state.params, iter(batches), 0, 0, batch_size)
        )
    # batches have them where they are filled up
    weights = jax.ShapeDtypeStruct((len(x),), jnp.float32) if weights is None else weights
    return jax.tree.structure(jax.eval_shape(record, state.params, state.rule, x, targets, weights))


def _slice(records: Any, first: int, last: int) -> Any:
    """What was recorded in a part, on the host; none of the rest of the epoch is copied."""
    return jax.device_get(
        jax.tree.map(lambda r: lax.dynamic_slice_in_dim(r, first, last - first), records)
    )


def _checked_batches(
    rule: Rule, params: Params, batches: Iterable[Any], e: int, first: int, batch_size: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Each batch checked and filled up; an error says which one it is."""
    for i, batch in enumerate(batches, first):
        place = f"batch {i} of epoch {e}"
        with _validate.inside(place):
            whole = padded(check_data(rule, params, batch, name=place, whole=False), batch_size)
        yield whole


def _one_by_one(
    loop: Loop, state: TrainState, batches: Iterable[Any], first: int
) -> Iterator[Part]:
    """Steps one by one, each checked; raises `NonFiniteStep` at the first that is not."""
    one_step, recorder = _step_function(loop), loop.recorder
    for i, (x, targets, weights) in enumerate(batches, first):
        found = None
        if recorder.record is not None and i % recorder.every == 0:
            found = _record_function(recorder.record)(state.params, state.rule, x, targets, weights)
        after, value, count, grads, finite = one_step(state, x, targets, weights)
        if not bool(finite):
            raise NonFiniteStep(
                np.asarray(value),
                state.params,
                _first_bad_leaf({"grads": grads, "params": after.params}),
            )
        state = after
        yield Part(state, *jax.tree.map(lambda a: a[None], jax.device_get((value, count, found))))


# Compiled functions are kept per rule and optimiser, so that a second `fit` with the same ones does
# not compile again.
@functools.lru_cache(maxsize=64)
def _part_function(loop: Loop, whole: bool) -> Callable[..., Any]:
    recorder, placement = loop.recorder, loop.placement
    # so that the loop takes what `eval_shape` has traced
    one_step = jax.jit(step(loop.rule, loop.optimizer))

    def part(
        state: TrainState,
        batches: Any,
        start: Array,
        stop: Array,
        x: Array,
        targets: Array,
        weights: Array | None,
    ) -> Any:
        def batch(i: Any) -> tuple[Array, Array, Array | None]:
            rows, w = batch_of(
                jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, keepdims=False), batches),
                weights,
            )
            return take(x, rows), take(targets, rows), w

        def body(i: Array, carry: Any) -> Any:
            state, losses, counts, records = carry
            given = batch(i)
            records = _recorded(recorder, i, records, (state.params, state.rule, *given))
            state, value = one_step(state, *given)
            return (
                state,
                _put(losses, value, i),
                _put(counts, batch_weight(given[0], given[2]), i),
                records,
            )

        steps = batches[0].shape[0]
        shapes = jax.eval_shape(
            lambda state, i: _quantities(one_step, recorder, state, batch(i)), state, 0
        )
        lengths = steps, steps, -(-steps // recorder.every)
        empty = (
            jax.tree.map(lambda s, n=n: jnp.zeros((n, *s.shape), s.dtype), shape)
            for n, shape in zip(lengths, shapes, strict=True)
        )
        bounds = (0, steps) if whole else (start, stop)
        state, losses, counts, records = lax.fori_loop(*bounds, body, (state, *empty))
        return (
            state,
            losses,
            counts,
            records,
            jnp.isfinite(losses).all() & _all_finite(state.params),
        )

    return jax.jit(part, out_shardings=placement and placement.out(4))


def _put(array: Array, value: Array, i: Array) -> Array:
    return lax.dynamic_update_index_in_dim(array, value, i, 0)


def _quantities(
    one_step: Callable[..., Any], recorder: Recorder, state: TrainState, batch: Any
) -> tuple[Array, Array, Any]:
    """What a step leaves behind: its loss, what the batch counts for, and what is recorded."""
    record = recorder.record
    return (
        one_step(state, *batch)[1],
        batch_weight(batch[0], batch[2]),
        record and record(state.params, state.rule, *batch),
    )


def _recorded(recorder: Recorder, i: Array, records: Any, given: tuple[Any, ...]) -> Any:
    """The records with that of step i, where it is the time.

    A `cond`, so that else the time is not spent.
    """
    record, every = recorder
    if record is None:
        return records

    def write() -> Any:
        return jax.tree.map(lambda all_, r: _put(all_, r, i // every), records, record(*given))

    return lax.cond(i % every == 0, write, lambda: records)


@functools.lru_cache(maxsize=64)
def _step_function(loop: Loop) -> Callable[..., Any]:
    update, placement = step_with_grads(loop.rule, loop.optimizer), loop.placement

    def checked(
        state: TrainState, x: Array, targets: Array, weights: Array | None
    ) -> tuple[TrainState, Array, Array, Params, Array]:
        state, value, grads = update(state, x, targets, weights)
        return (
            state,
            value,
            batch_weight(x, weights),
            grads,
            jnp.isfinite(value) & _all_finite(state.params),
        )

    return jax.jit(checked, out_shardings=placement and placement.out(4))


@functools.lru_cache(maxsize=64)
def _record_function(record: Record) -> Callable[..., Any]:
    return jax.jit(record)


def _all_finite(tree: Any) -> Array:
    return jnp.stack(
        [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.array(True)]
    ).all()


def _first_bad_leaf(trees: dict[str, Any]) -> str:
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(jnp.isfinite(leaf).all()):
                return name + jax.tree_util.keystr(path)
    return "none: the loss alone"
