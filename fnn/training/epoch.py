"""The loop of a training: one step, steps over arrays, and steps over batches as they come.

Arrays are gone through by one compiled loop, whose first and last step are numbers that it is
given: an epoch in one part or in many, or begun anew in the middle, is the same program and gives
the same bits. The same loop under `vmap` trains many nets. Batches of an iterable are gone through
step by step, and the next one is fetched while the device is at work.

`init` and `step` are pure functions for a loop of one's own. Source: lecture 002 (SGD), 004
(training loop).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fnn import _validate
from fnn._processes import greatest
from fnn.factors import widen
from fnn.sharding import Placement, padded, place_batch
from fnn.tracing.jaxprs import has_primitive
from fnn.training.data import Batch, check_targets, check_values, trace_predict
from fnn.training.optimizers import update_of
from fnn.types import Array, Key, Params, Rule

Record = Callable[..., Any]  # (params, rule_state, x, targets, weights) -> a tree of arrays
# (first, stop) -> the (start, stop) of each part
Segments = Callable[[int, int], Iterator[tuple[int, int]]]


class TrainState(NamedTuple):
    """All that one step changes."""

    params: Params
    optimizer: Any  # the optax state
    rule: Any  # the rule's state


def init(
    rule: Rule, optimizer: optax.GradientTransformation, params: Params, key: Key
) -> TrainState:
    """The state before the first step.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> init(rule, optax.sgd(0.1), net.init(jax.random.key(0)), jax.random.key(1)).rule
    ()
    """
    return TrainState(params, optimizer.init(params), rule.init(key, params))


def step(
    rule: Rule, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Array]]:
    """One update.

    Args:
        rule: any rule.
        optimizer: any optax optimiser. One that asks for `value`, `grad` or `value_fn` gets the
            rule's value, its gradients, and its value at other params on the same batch.

    Returns:
        A pure function `(state, x, targets, weights=None) -> (state, value)` for `jax.jit`.

    >>> import fnn
    >>> net, optimizer = fnn.mlp((3, 2)), optax.sgd(0.1)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> state = init(rule, optimizer, net.init(jax.random.key(0)), jax.random.key(1))
    >>> state, value = jax.jit(step(rule, optimizer))(state, jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    update = update_of(optimizer)

    def one_step(
        state: TrainState, x: Any, targets: Array, weights: Array | None = None
    ) -> tuple[TrainState, Array]:
        def evaluate(params):
            return rule.value_and_grad(params, state.rule, x, targets, weights)

        def value_fn(params, obj_fn=None):  # line searches hand on what they have no use for
            return evaluate(params)[0]

        value, grads, rule_state = evaluate(state.params)
        updates, optimizer_state = update(grads, state.optimizer, state.params, value, value_fn)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, rule_state), value

    return one_step


class Loop(NamedTuple):
    """What is compiled into the steps of a training; hashable."""

    rule: Rule
    optimizer: Any  # or a function rate -> optimiser, where every net has a rate
    record: Record | None = None  # called before the steps 0, every, 2 every, ... of each epoch
    every: int = 1
    placement: Placement | None = None  # on a mesh
    nets: bool = False  # whether the state has an axis of nets in front
    alone: bool = False  # whether every step over arrays is a program of its own

    def step(self, rate: Array | None = None) -> Callable[..., tuple[TrainState, Array]]:
        """The step of one net."""
        optimizer = self.optimizer if rate is None else self.optimizer(rate)
        return step(self.rule, optimizer)

    def jit(self, function: Callable, others: int) -> Callable:
        """A compiled function that returns a state and so many other things."""
        return jax.jit(function, out_shardings=self.placement and self.placement.out(others))


class Part(NamedTuple):
    """What some consecutive steps leave. Many nets have an axis after that of steps or records."""

    state: TrainState
    losses: np.ndarray  # [steps]
    counts: np.ndarray  # [steps]: what each batch weighs in the epoch's mean
    records: Any  # a tree of [records, ...]; None where nothing was recorded


class NonFiniteStep(Exception):
    """A step that is not finite.

    Attributes:
        loss: of the step.
        params: before it.
        leaf: the first gradient or parameter that is not finite.
    """

    def __init__(self, loss: np.ndarray, params: Params, leaf: str) -> None:
        """Keeps all three."""
        super().__init__(leaf)
        self.loss = loss
        self.params = params
        self.leaf = leaf


def paced(seconds: float = 0.5) -> Segments:
    """Parts that take about so long, told by the time that the ones before took."""
    size = 1

    def segments(first: int, stop: int) -> Iterator[tuple[int, int]]:
        nonlocal size
        start = first
        while start < stop:
            end = min(start + size, stop)
            begun = time.monotonic()
            yield start, end
            took = time.monotonic() - begun
            if took > seconds:
                size = max(1, size // 2)
            elif took < seconds / 2 and end - start == size:
                size = 2 * size
            (size,) = greatest(size)
            start = end

    return segments


# arrays -----------------------------------------------------------------------------------------


def run_arrays(
    loop: Loop,
    state: TrainState,
    data: Batch,
    order: tuple[Any, Any],
    bounds: tuple[int, int],
    segments: Segments | None = None,
    rates: Array | None = None,
) -> Iterator[Part]:
    """Steps over arrays.

    Args:
        loop: of the training.
        state: before the first of these steps.
        data: `(x, targets, weights)` on the device.
        order: `(rows [steps, batch], present [steps, batch] or None)` of the epoch; rows are
            `[nets, steps, batch]` for many nets.
        bounds: the first step, and the one after the last.
        segments: how the steps go into parts; None makes one part of them.
        rates: `[nets]`, or None.

    Raises:
        NonFiniteStep: the state or a loss of a net is not finite. Of many nets, none raises.
    """
    if loop.alone:
        yield from run_batches(loop, state, _batches(order, *bounds, data), bounds[0])
        return
    steps = order[0].shape[-2]
    whole = segments is None and bounds == (0, steps)
    run = _arrays_function(loop, whole)
    for start, stop in [bounds] if segments is None else segments(*bounds):
        numbers = np.int32(start), np.int32(stop)
        after, losses, counts, records, finite = run(state, rates, order, numbers, data)
        if not loop.nets and not bool(finite):
            for part in run_batches(loop, state, _batches(order, start, stop, data), start):
                yield part
                # rounding differs step by step: if they stayed finite, these count
                state = part.state
            continue
        losses, counts = jax.device_get((losses, counts))
        found = _slice(records, -(-start // loop.every), -(-stop // loop.every))
        yield Part(after, losses[start:stop], counts[start:stop], found)
        state = after


def is_faster_alone(rule: Rule, params: Params, x: Any) -> bool:
    """Whether steps are faster one by one: XLA's convolutions are slow in a loop, on the CPU."""
    if jax.default_backend() != "cpu":
        return False
    return has_primitive(trace_predict(rule, params, x).jaxpr, "conv_general_dilated")


def _batches(order, start, stop, data):
    """The batches of some steps."""
    x, targets, weights = data
    rows, present = order
    for i in range(start, stop):
        r, w = _weigh((rows[i], None if present is None else present[i]), weights)
        yield _take(x, r), _take(targets, r), w


def _take(tree, rows):
    """Rows that are known to exist, of every array of a tree."""
    return jax.tree.map(lambda a: a.at[rows].get(mode="promise_in_bounds"), tree)


def _weigh(batch, weights):
    """The rows of a batch, and their weights: the user's, 0 where a row only fills up.

    None where neither is.
    """
    rows, present = batch
    if weights is None:
        return rows, present
    w = _take(weights, rows)
    return rows, w if present is None else w * present.astype(w.dtype)


def _count(targets, weights):
    """What a batch counts for in the mean of an epoch."""
    return jnp.float32(targets.shape[0]) if weights is None else weights.sum()


# Compiled functions are kept per loop, so that a second `fit` with the same rule and optimiser does
# not compile again.
@functools.lru_cache(maxsize=64)
def _arrays_function(loop: Loop, whole: bool) -> Callable[..., Any]:
    """`(state, rate, order, (start, stop), data) -> (state, losses, counts, records, finite)`.

    Args:
        loop: of the training.
        whole: whether it goes through the whole epoch, so that the compiler knows the length.
    """

    def part(state, rate, order, bounds, data):
        x, targets, weights = data
        one_step = jax.jit(loop.step(rate))  # the loop takes what `eval_shape` has traced
        steps = order[0].shape[0]

        def batch(i):
            own = jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, i, keepdims=False), order)
            rows, w = _weigh(own, weights)
            return _take(x, rows), _take(targets, rows), w

        def measure(state, i):
            given = batch(i)
            found = loop.record and loop.record(state.params, state.rule, *given)
            return one_step(state, *given)[1], _count(*given[1:]), found

        def body(i, carry):
            state, losses, counts, records = carry
            given = batch(i)
            records = _record(loop, i, records, (state.params, state.rule, *given))
            state, value = one_step(state, *given)
            return state, _put(losses, value, i), _put(counts, _count(*given[1:]), i), records

        loss, count, record = jax.eval_shape(measure, state, 0)
        empty = [_zeros(loss, steps), _zeros(count, steps), _zeros(record, -(-steps // loop.every))]
        first, stop = (0, steps) if whole else bounds
        state, losses, counts, records = lax.fori_loop(first, stop, body, (state, *empty))
        finite = jnp.isfinite(losses).all() & _all_finite(state.params)
        return state, losses, counts, records, finite

    if loop.nets:
        part = jax.vmap(part, (0, 0, (0, None), None, None), (0, 1, 1, 1, 0))
    return loop.jit(part, 4)


def _zeros(shapes, length):
    """Zeros for so many of every array of a tree of shapes."""
    return jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), shapes)


def _put(array, value, i):
    return lax.dynamic_update_index_in_dim(array, value, i, 0)


def _record(loop, i, records, given):
    """The records with that of step i, where it is the time; else the time is not spent."""
    if loop.record is None:
        return records

    def write():
        return jax.tree.map(lambda a, r: _put(a, r, i // loop.every), records, loop.record(*given))

    return lax.cond(i % loop.every == 0, write, lambda: records)


def _slice(records, first, last):
    """What was recorded in a part, on the host; none of the rest of the epoch is copied."""
    found = jax.tree.map(lambda r: lax.dynamic_slice_in_dim(r, first, last - first), records)
    return jax.device_get(found)


# batches ----------------------------------------------------------------------------------------


def run_batches(
    loop: Loop, state: TrainState, batches: Iterable[Batch], first: int
) -> Iterator[Part]:
    """Steps over batches, each a part. The next batch is fetched while the device is at work.

    Args:
        loop: of the training.
        state: before the first of these steps.
        batches: `(x, targets, weights)` each, all of one shape.
        first: the number of the first step in its epoch.

    Raises:
        NonFiniteStep: the state or the loss is not finite; looked at one step late.
    """
    run = _batch_function(loop)
    left = iter(batches)
    before = None
    i = first
    while True:
        try:
            batch = next(left, None)
        except BaseException:
            if before is not None:
                yield _finish(loop, *before)  # what is done counts
            raise
        if batch is None:
            break
        found = None
        if loop.record is not None and i % loop.every == 0:
            found = _record_function(loop.record)(state.params, state.rule, *batch)
        after = run(state, *batch)
        if before is not None:
            yield _finish(loop, *before)
        before = state, batch, after, found
        state = after[0]
        i += 1
    if before is not None:
        yield _finish(loop, *before)


def _finish(loop, state, batch, after, found):
    """The part of a step, once the device is through with it."""
    new, numbers = after
    value, count, finite = np.asarray(numbers)
    if not finite:
        raise NonFiniteStep(value, state.params, _first_bad_leaf(loop, state, batch, new))
    records = None if found is None else jax.tree.map(lambda a: np.asarray(a)[None], found)
    return Part(new, value[None], count[None], records)


@functools.lru_cache(maxsize=64)
def _batch_function(loop: Loop) -> Callable[..., Any]:
    """`(state, x, targets, weights) -> (state, [loss, count, whether all is finite])`."""
    one_step = loop.step()

    def run(state, x, targets, weights):
        after, value = one_step(state, x, targets, weights)
        finite = jnp.isfinite(value) & _all_finite(after.params)
        value = widen(value)
        count = _count(targets, weights)
        # one array, since every array costs the host some time
        return after, jnp.stack([a.astype(value.dtype) for a in (value, count, finite)])

    return loop.jit(run, 1)


@functools.lru_cache(maxsize=64)
def _record_function(record: Record) -> Callable[..., Any]:
    return jax.jit(record)


def _all_finite(tree):
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all() if leaves else jnp.array(True)


def _first_bad_leaf(loop, state, batch, after):
    """The path of the first gradient or parameter that is not finite."""
    _, grads, _ = jax.jit(loop.rule.value_and_grad)(state.params, state.rule, *batch)
    for name, tree in {"grads": grads, "params": after.params}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(jnp.isfinite(leaf).all()):
                return name + jax.tree_util.keystr(path)
    return "none: the loss alone"


def batches_of(
    loop: Loop,
    params: Params,
    data: Any,
    epoch: int,
    first: int,
    batch_size: int,
    most: int | None = None,
) -> Iterator[Batch]:
    """The batches of an epoch of an iterable from `first` on, checked and filled up.

    Args:
        loop: of the training.
        params: of the rule's net, or their shapes.
        data: an iterable of batches, or a function of the epoch that returns one.
        epoch: its number.
        first: how many batches are done before.
        batch_size: rows of every batch; smaller ones are filled up with weight 0.
        most: how many of them; None for all.

    Raises:
        TypeError, ValueError: a batch is invalid; there is none; other ones than before.
    """
    source = data(epoch) if callable(data) else data
    if not isinstance(source, Iterable):
        raise TypeError(
            "`data(epoch)` must return an iterable of batches (x, targets), "
            f"got {type(source).__name__} in epoch {epoch}."
        )
    rest = iter(source)
    skipped = sum(1 for _ in islice(rest, first))
    if skipped < first:
        raise ValueError(
            f"`data` gave {skipped} batches in epoch {epoch}, of which {first} were done before. "
            "It must give the same again."
        )
    if most is not None:
        rest = islice(rest, most)
    known: dict[Any, Any] = {}  # the outputs for batches of a shape
    for i, batch in enumerate(_together(rest, epoch, first, loop.placement), first):
        place = f"batch {i} of epoch {epoch}"
        with _validate.inside(place):
            whole = jax.tree.map(_copy, check_values(_as_arrays(batch), place))
            if whole[1].shape[0] != batch_size:
                whole = padded(whole, batch_size)
            shape = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(whole))
            if shape not in known:
                known[shape] = trace_predict(loop.rule, params, whole[0]).out_info
            check_targets(loop.rule, known[shape], whole[1])
        if loop.placement is not None:
            given = whole if whole[2] is not None else whole[:2]
            whole = place_batch(loop.placement.mesh, given)
        yield whole


def _copy(leaf):
    """A copy of a NumPy array: JAX may read it in place, while a loader fills it anew."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _together(batches, epoch, first, placement):
    """The batches of this process; an error in all where one has no batch and another has.

    Else the others wait for ever in the next step.
    """
    if placement is None or not placement.mesh.is_multi_process:
        yield from batches
        return
    for i in count(first):
        error = None
        batch = None
        try:
            batch = next(batches, None)
        except Exception as raised:
            error = raised
        number = 1 + jax.process_index()
        failed, ended, goes_on = greatest(
            number if error else 0,
            number if batch is None and not error else 0,
            number if batch is not None else 0,
        )
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"Process {failed - 1} raised an error in batch {i} of epoch {epoch} of its data; "
                "what it prints says which."
            )
        if ended and goes_on:
            raise ValueError(
                f"`data` of process {ended - 1} ended before batch {i} of epoch {epoch}, which "
                f"process {goes_on - 1} has. All must give equally many batches."
            )
        if ended:
            return
        yield batch


def _as_arrays(batch):
    """A batch as a tuple of arrays; loaders give lists, and arrays of other libraries."""
    if isinstance(batch, list):
        batch = tuple(batch)
    if not isinstance(batch, tuple):
        return batch

    def convert(leaf):
        other = not hasattr(leaf, "sharding") and not isinstance(leaf, (np.ndarray, np.generic))
        return np.asarray(leaf) if other and hasattr(leaf, "__array__") else leaf

    return jax.tree.map(convert, batch, is_leaf=lambda leaf: hasattr(leaf, "__array__"))
