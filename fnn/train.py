"""Training: `fit` and `evaluate`; many nets at once are in `fnn.many`.

Data flows one way: key -> init -> params -> forward -> loss.grad -> backward -> grads -> optax -> params. Data are a tuple
`(x, targets)` or `(x, targets, weights)` of arrays `[examples, ...]`, which stay on the device (the order of each epoch is drawn
on the host), or an iterable of such tuples, one a batch, where they do not fit. The steps themselves are in `fnn.steps`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import _check
from fnn._types import Array, ArrayLike, Key, Params, Rule, at_least_float32
from fnn.data import Sampler, check_batches, check_data, check_rule, drawn, epoch_seeds, padded, shuffled_batches
from fnn.steps import Epoch, NonFiniteStep, Record, Recorder, init, run_arrays, run_iterable

Callback = Callable[[int, dict[str, float]], Any]


class History(NamedTuple):
    """What `fit` measured. From `fit_many` every array has a leading axis of nets."""

    loss: Array  # [epochs]: the mean over the epoch's examples, each taken before its step
    step_loss: Array  # [steps]: the loss of every batch
    validation: dict[str, Array]  # [epochs] each: what `evaluate` gives after every epoch; {} without validation data
    records: Any = ()  # a tree of [records, ...]: what `record` gave


class NonFiniteError(FloatingPointError):
    """A loss or an update that is not finite stopped `fit`.

    Attributes:
        params: the last parameters that were finite.
        step: the step, counted from 0 over all epochs.
        leaf: the first gradient (or parameter) that is not finite, as a path such as `grads[0][0].w`.
        history: the losses up to the step.
    """

    def __init__(self, epoch: int, steps_before: int, stop: NonFiniteStep, history: History) -> None:
        self.params, self.leaf, self.history = stop.params, stop.leaf, history
        self.step = steps_before + len(stop.losses) - 1
        super().__init__(
            f"Training stopped at step {self.step} (epoch {epoch}, batch {len(stop.losses) - 1}): loss {float(stop.losses[-1])}, "
            f"first non-finite leaf {stop.leaf}. A lower learning rate, or gradient clipping (optax.clip_by_global_norm), may mend it. "
            "`error.params` are the last finite parameters."
        )


def fit(
    rule: Rule,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: Any,
    *,
    epochs: int,
    batch_size: int,
    key: Key,
    validation: Any = None,
    callback: Callback | None = None,
    sampler: Sampler = shuffled_batches,
    record: Record | None = None,
    record_every: int = 1,
) -> tuple[Params, History]:
    """Trains a net.

    Args:
        rule: what turns a batch into a loss and an update direction: `fnn.rules.backprop(net, loss)`, ...
        optimizer: any optax optimiser; a schedule counts steps.
        params: where to start; they are not changed.
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]`, kept on the device; or an iterable of
            such tuples, one a batch of at most `batch_size`, gone through anew every epoch (a list, a loader; not a
            generator, which can be gone through once; a function of the epoch that returns one may stand for it).
        epochs: passes over the data, at least 1.
        batch_size: examples per step, at most all; the last batch may have fewer, none is dropped.
        key: from `jax.random.key`; for the rule's state and the shuffles.
        validation: data as above (arrays), measured after every epoch by `evaluate`.
        callback: `(epoch, metrics) -> stop`, called after every epoch, counted from 0; training stops where it returns something true.
        sampler: `(seed, examples, batch_size) -> (rows, present)`, an epoch's batches of arrays; `fnn.data.poisson_batches` is another.
        record: `(params, rule_state, x, targets, weights) -> tree of arrays`, such as those of `fnn.alignment`, called inside the compiled
            epoch before the steps 0, `record_every`, 2 `record_every`, ... of every epoch; `history.records` has them. It is compiled
            in: pass the same function again, and nothing compiles again.
        record_every: the stride in steps, at least 1.

    Returns:
        `(params, history)`.

    Raises:
        TypeError, ValueError: an argument or the data cannot be meant; before any training, but for the batches of an
            iterable, which are checked as they come.
        NonFiniteError: a loss or an update became NaN or infinite; carries the last finite parameters.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> data = jnp.ones((8, 3)), jnp.ones((8, 2))
    >>> params, history = fit(fnn.rules.backprop(net, fnn.losses.l2_loss), optax.sgd(0.1), net.init(jax.random.key(0)), data,
    ...                       epochs=3, batch_size=4, key=jax.random.key(1))
    >>> history.step_loss.shape
    (6,)
    """
    check_settings(rule, optimizer, epochs, batch_size, callback)
    recorder = _recorder(record, record_every)
    _check.is_key("key", key)
    rule_key, key = jax.random.split(key)
    data, validation = _check_both(rule, params, data, validation, batch_size, epochs)
    state = init(rule, optimizer, params, rule_key)
    step_losses: list[Array] = []
    epoch_losses: list[Array] = []
    metrics: list[dict[str, float]] = []
    records: list[Any] = []
    run = _epoch_runner(data, key, epochs, batch_size, sampler)
    for e in range(epochs):
        try:
            state, losses, mean, found = run(rule, optimizer, state, data, e, recorder)
        except NonFiniteStep as stop:
            before = sum(len(losses) for losses in step_losses)
            history = _history(epoch_losses, [*step_losses, jnp.stack(stop.losses)], metrics, records)
            raise NonFiniteError(e, before, stop, history) from None
        step_losses.append(losses)
        epoch_losses.append(mean)
        records.append(found)
        if validation is not None:
            metrics.append(evaluate(rule, state.params, validation, checked=True))
        validated = {f"validation_{name}": number for name, number in metrics[-1].items()} if metrics else {}
        if callback is not None and bool(callback(e, {"loss": float(mean)} | validated)):
            break
    return state.params, _history(epoch_losses, step_losses, metrics, records)


def evaluate(
    rule: Rule, params: Params, data: tuple[ArrayLike, ...], *, batch_size: int | None = None, checked: bool = False
) -> dict[str, float]:
    """The mean loss over data, and the accuracy where the loss is one for classes.

    Args:
        rule: its `predict` and `loss` are used.
        params: of the rule's net.
        data: `(x, targets)` or `(x, targets, weights)`.
        batch_size: how many examples at a time; all, if None.
        checked: True where `check_data` has already passed these data.

    Returns:
        `{"loss": ...}`, and `"accuracy"` in 0 ... 1 (an example counts by its weight).

    Raises:
        TypeError, ValueError: the data cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> sorted(evaluate(rule, net.init(jax.random.key(0)), (jnp.zeros((8, 3)), jnp.zeros(8, int))))
    ['accuracy', 'loss']
    """
    check_rule(rule)
    x, targets, weights = data if checked else check_data(rule, params, data)
    count = x.shape[0]
    size = count if batch_size is None else batch_size
    _check.positive("batch_size", size, whole=True)
    weights = jnp.ones(count, jnp.float32) if weights is None else weights
    sums: dict[str, float] = {}
    for i in range(0, count, size):
        batch = padded((x[i : i + size], targets[i : i + size], weights[i : i + size]), min(size, count))
        for name, s in _sums_function(rule)(params, *batch).items():
            sums[name] = sums.get(name, 0.0) + float(s)
    return {name: s / sums["weight"] for name, s in sums.items() if name != "weight"}


# Kept per rule, as the compiled functions of `fnn.steps`.
@functools.lru_cache(maxsize=64)
def _sums_function(rule: Rule) -> Callable[..., dict[str, Array]]:
    def sums(params: Params, x: Array, targets: Array, weights: Array) -> dict[str, Array]:
        outputs = rule.predict(params, x)
        values = at_least_float32(rule.loss.value(outputs, targets))
        w = weights.astype(values.dtype)
        found = {"weight": w.sum(), "loss": (w * values).sum()}
        if rule.loss.correct is not None:
            found["accuracy"] = (w * rule.loss.correct(outputs, targets).astype(w.dtype)).sum()
        return found

    return jax.jit(sums)


def _epoch_runner(data: Any, key: Key, epochs: int, batch_size: int, sampler: Any) -> Callable[..., Epoch]:
    """`(rule, optimizer, state, data, epoch, recorder) -> Epoch` for arrays, or for an iterable."""
    _check.is_function("sampler", sampler, "(seed, examples, batch_size) -> (rows, present), such as `fnn.data.poisson_batches`")
    if not isinstance(data, tuple):
        if sampler is not shuffled_batches:
            raise ValueError("`sampler` draws from arrays, but `data` is an iterable, with batches of its own. Pass arrays, or no sampler.")
        return functools.partial(run_iterable, batch_size=batch_size)
    seeds = epoch_seeds(key, epochs + 1)

    @functools.lru_cache(maxsize=2)
    def draw(e: int) -> tuple[Any, Any]:
        return drawn(sampler, seeds[e], data[0].shape[0], batch_size)

    return functools.partial(run_arrays, draw=draw)


def _recorder(record: Any, every: Any) -> Recorder:
    if record is not None:
        _check.is_function("record", record, "(params, rule_state, x, targets, weights) -> tree of arrays")
        _check.hashable("record", record)
    _check.positive("record_every", every, whole=True)
    return Recorder(record, int(every))


def _history(epoch_losses: list[Array], step_losses: list[Array], metrics: list[dict[str, float]], records: list[Any]) -> History:
    # joined on the host: no program to compile for every length
    losses, steps, found = jax.device_get((epoch_losses, step_losses, records))
    validation = {name: jnp.array([m[name] for m in metrics]) for name in (metrics[0] if metrics else ())}
    joined = jax.tree.map(lambda *epochs: jnp.asarray(np.concatenate(epochs)), *found) if found else ()
    return History(jnp.asarray(np.array(losses)), jnp.asarray(np.concatenate(steps)), validation, joined)


def check_settings(rule: Any, optimizer: Any, epochs: Any, batch_size: Any, callback: Any = None) -> None:
    """Raises unless rule, optimiser and the numbers of a training can be meant."""
    check_rule(rule)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"`optimizer` must be an optax optimiser, got {optimizer!r}. Make one: `optax.sgd(0.1)`.")
    for name, value in (("rule", rule), ("optimizer", optimizer)):
        _check.hashable(name, value)
    _check.positive("epochs", epochs, whole=True)
    _check.positive("batch_size", batch_size, whole=True)
    if callback is not None:
        _check.is_function("callback", callback, "(epoch, metrics) -> stop")


def _check_both(rule: Rule, params: Params, data: Any, validation: Any, batch_size: int, epochs: int) -> tuple[Any, Any]:
    """The data and the validation data of `fit`, checked; an iterable's batches are checked as they come."""
    if isinstance(data, tuple):
        data = check_data(rule, params, data, batch_size=batch_size)
    else:
        check_batches(data, epochs)
    if validation is not None:
        with _check.inside("`validation`"):
            validation = check_data(rule, params, validation, name="validation")
    return data, validation
