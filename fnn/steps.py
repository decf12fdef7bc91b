"""One step, and one epoch as a `lax.scan`: what `fit` is made of, as pure functions for a loop of one's own.

Any `Rule` and any optax optimiser go into the same loop. Source: lecture 002 (SGD), 004 (training loop).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnn import _check
from fnn._types import Array, Key, Params, Rule
from fnn.backprop import weighted_mean
from fnn.data import check_data, padded, take

Record = Callable[..., Any]  # (params, rule_state, x, targets, weights) -> a tree of arrays


class TrainState(NamedTuple):
    """All that one step changes."""

    params: Params
    optimizer: Any  # the optax state
    rule: Any  # the rule's state


def init(rule: Rule, optimizer: optax.GradientTransformation, params: Params, key: Key) -> TrainState:
    """The state before the first step.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> init(fnn.rules.backprop(net, fnn.losses.l2_loss), optax.sgd(0.1), net.init(jax.random.key(0)), jax.random.key(1)).rule
    ()
    """
    return TrainState(params, optimizer.init(params), rule.init(key, params))


def step(rule: Rule, optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, Array]]:
    """One update.

    Args:
        rule: any rule.
        optimizer: any optax optimiser.

    Returns:
        A pure function `(state, x, targets, weights=None) -> (state, value)` for `jax.jit`.

    >>> import fnn
    >>> net, optimizer = fnn.mlp((3, 2)), optax.sgd(0.1)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> state = init(rule, optimizer, net.init(jax.random.key(0)), jax.random.key(1))
    >>> state, value = jax.jit(step(rule, optimizer))(state, jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    update = _step_with_grads(rule, optimizer)

    def one_step(state: TrainState, x: Array, targets: Array, weights: Array | None = None) -> tuple[TrainState, Array]:
        state, value, _ = update(state, x, targets, weights)
        return state, value

    return one_step


def epoch(rule: Rule, optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, Array, Array]]:
    """One pass over data under `lax.scan`, in a given order.

    Args:
        rule: any rule.
        optimizer: any optax optimiser.

    Returns:
        A pure function `(state, batches, x, targets, weights=None) -> (state, losses [steps], mean loss)` for `jax.jit`.
        `batches` are `(rows [steps, batch], present [steps, batch] or None)` as from `fnn.data.shuffled_batches`, or in
        an order of your own. The mean is over examples, by their weights, not over batches.

    >>> import fnn
    >>> net, optimizer = fnn.mlp((3, 2)), optax.sgd(0.1)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> state = init(rule, optimizer, net.init(jax.random.key(0)), jax.random.key(1))
    >>> batches = fnn.data.shuffled_batches(2, 5, 2)
    >>> state, losses, mean = jax.jit(epoch(rule, optimizer))(state, batches, jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> losses.shape
    (3,)
    """
    recorded = recorded_epoch(rule, optimizer, None, 1)

    def one_epoch(
        state: TrainState, batches: tuple[Array, Array | None], x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[TrainState, Array, Array]:
        return recorded(state, batches, x, targets, weights)[:3]

    return one_epoch


def recorded_epoch(
    rule: Rule, optimizer: optax.GradientTransformation, record: Record | None, every: int
) -> Callable[..., tuple[TrainState, Array, Array, Any]]:
    """`epoch` that also returns what `record(params, rule_state, x, targets, weights)` gave before the steps 0, every, 2 every, ..."""
    one_step = step(rule, optimizer)

    def one_epoch(
        state: TrainState, batches: tuple[Array, Array | None], x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[TrainState, Array, Array, Any]:
        def body(state: TrainState, numbered: tuple[Array, tuple[Array, Array | None]]) -> tuple[TrainState, tuple[Array, Array, Any]]:
            i, batch = numbered
            rows, w = batch_of(batch, weights)
            given = take(x, rows), take(targets, rows), w
            found = () if record is None else _at_stride(record, i % every == 0, (state.params, state.rule, *given))
            state, value = one_step(state, *given)
            return state, (value, jnp.ones((), jnp.float32) if w is None else w.sum(), found)

        steps = jnp.arange(batches[0].shape[0])
        state, (losses, counts, records) = lax.scan(body, state, (steps, batches))
        return state, losses, weighted_mean(losses, counts), jax.tree.map(lambda r: r[::every], records)

    return one_epoch


def _at_stride(record: Record, now: Array, given: tuple[Any, ...]) -> Any:
    """`record(*given)`, or zeros where it is not the time; a `cond`, so that the time is not spent either."""
    shapes = jax.eval_shape(record, *given)
    return lax.cond(now, lambda: record(*given), lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def batch_of(batch: tuple[Array, Array | None], weights: Array | None) -> tuple[Array, Array | None]:
    """The rows of a batch, and their weights: the user's, 0 where a row only fills up; None where neither is."""
    rows, present = batch
    if weights is None:
        return rows, present
    w = take(weights, rows)
    return rows, w if present is None else w * present.astype(w.dtype)


def _step_with_grads(rule: Rule, optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, Array, Params]]:
    def update(state: TrainState, x: Array, targets: Array, weights: Array | None = None) -> tuple[TrainState, Array, Params]:
        value, grads, rule_state = rule.value_and_grad(state.params, state.rule, x, targets, weights)
        with jax.numpy_dtype_promotion("standard"):  # several of optax's optimisers do not run in strict mode
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, rule_state), value, grads

    return update


class NonFiniteStep(Exception):
    """Raised inside an epoch, for `fit` to pass on: the losses of its steps so far, the parameters before the bad step, the bad leaf."""

    def __init__(self, losses: list[Array], params: Params, leaf: str) -> None:
        self.losses, self.params, self.leaf = losses, params, leaf


# Compiled functions are kept per rule and optimiser, so that a second `fit` with the same ones does not compile again.
@functools.lru_cache(maxsize=64)
def _epoch_function(rule: Rule, optimizer: optax.GradientTransformation, record: Record | None, every: int) -> Callable[..., Any]:
    one_epoch = recorded_epoch(rule, optimizer, record, every)

    def checked(state: TrainState, *batches_and_data: Any) -> tuple[TrainState, Array, Array, Any, Array]:
        state, losses, mean, records = one_epoch(state, *batches_and_data)
        return state, losses, mean, records, jnp.isfinite(losses).all() & _all_finite(state.params)

    return jax.jit(checked)


@functools.lru_cache(maxsize=64)
def _step_function(rule: Rule, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    update = _step_with_grads(rule, optimizer)

    def checked(state: TrainState, *batch: Any) -> tuple[TrainState, Array, Params, Array]:
        state, value, grads = update(state, *batch)
        return state, value, grads, jnp.isfinite(value) & _all_finite(state.params)

    return jax.jit(checked)


@functools.lru_cache(maxsize=64)
def _record_function(record: Record) -> Callable[..., Any]:
    return jax.jit(record)


class Epoch(NamedTuple):
    """What an epoch leaves."""

    state: TrainState
    losses: Array  # [steps]
    mean: Array  # over examples
    records: Any  # a tree of [records, ...]; () where nothing is recorded


class Recorder(NamedTuple):
    """What is recorded on the way, before the steps 0, every, 2 every, ... of each epoch."""

    record: Record | None = None
    every: int = 1


def run_arrays(
    rule: Rule, optimizer: Any, state: TrainState, data: Any, e: int, recorder: Recorder, draw: Callable[[int], tuple[Any, Any]]
) -> Epoch:
    """One epoch over arrays in the order `draw(e)`; where it does not stay finite, the same epoch step by step to find where."""
    x, targets, weights = data
    rows, present = draw(e)
    after, losses, mean, records, finite = _epoch_function(rule, optimizer, *recorder)(state, (rows, present), *data)
    draw(e + 1)  # while the device is at work; `draw` remembers it for the next epoch
    if bool(finite):
        return Epoch(after, losses, mean, records)
    batches = (batch_of((rows[i], None if present is None else present[i]), weights) for i in range(len(rows)))
    again = _careful_steps(rule, optimizer, state, ((take(x, rows), take(targets, rows), w) for rows, w in batches))
    return _joined(*again, records)  # rounding differs step by step: then this one, which stayed finite, counts


def run_iterable(rule: Rule, optimizer: Any, state: TrainState, data: Any, e: int, recorder: Recorder, batch_size: int) -> Epoch:
    """One epoch over an iterable of batches, each checked as it enters."""
    batches = data(e) if callable(data) else data
    if not isinstance(batches, Iterable):
        raise TypeError(f"`data(epoch)` must return an iterable of batches (x, targets), got {type(batches).__name__} in epoch {e}.")
    records: list[Any] = []
    checked = _checked_batches(rule, state.params, batches, e, batch_size)
    state, losses, counts = _careful_steps(rule, optimizer, state, checked, recorder, records)
    if not losses:
        raise ValueError(
            f"`data` gave no batch in epoch {e}. A generator can be gone through only once: pass a list, or a function of the epoch."
        )
    return _joined(state, losses, counts, jax.tree.map(lambda *found: jnp.stack(found), *records) if records else ())


def _joined(state: TrainState, losses: list[Array], counts: list[Array], records: Any) -> Epoch:
    """The state, the losses of the steps, their mean over examples, and what was recorded."""
    return Epoch(state, jnp.stack(losses), weighted_mean(jnp.stack(losses), jnp.stack(counts)), records)


def _checked_batches(rule: Rule, params: Params, batches: Iterable[Any], e: int, batch_size: int) -> Iterator[tuple[Any, Any, Any]]:
    """Each batch checked and filled up; an error says which one it is."""
    for i, batch in enumerate(batches):
        place = f"batch {i} of epoch {e}"
        with _check.inside(place):
            whole = padded(check_data(rule, params, batch, name=place, whole=False), batch_size)
        yield whole


def _careful_steps(
    rule: Rule, optimizer: Any, state: TrainState, batches: Iterable[Any], recorder: Recorder = Recorder(), records: Any = None
) -> tuple[TrainState, list[Array], list[Array]]:
    """Steps one by one, each checked; raises `NonFiniteStep` at the first that is not. What is recorded is put at the end of `records`."""
    one_step = _step_function(rule, optimizer)
    losses: list[Array] = []
    counts: list[Array] = []
    for i, (x, targets, weights) in enumerate(batches):
        if recorder.record is not None and i % recorder.every == 0:
            records.append(_record_function(recorder.record)(state.params, state.rule, x, targets, weights))
        after, value, grads, finite = one_step(state, x, targets, weights)
        losses.append(value)
        counts.append(jnp.float32(len(x)) if weights is None else jnp.asarray(weights).sum())
        if not bool(finite):
            raise NonFiniteStep(losses, state.params, _first_bad_leaf({"grads": grads, "params": after.params}))
        state = after
    return state, losses, counts


def _all_finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)] or [jnp.array(True)]).all()


def _first_bad_leaf(trees: dict[str, Any]) -> str:
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(jnp.isfinite(leaf).all()):
                return name + jax.tree_util.keystr(path)
    return "none: the loss alone"
