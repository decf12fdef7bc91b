"""Training: `fit` and `evaluate`; many nets at once are in `fnn.training.many`.

Data flows one way: key -> init -> params -> forward -> loss.grad -> backward -> grads -> optax ->
params. Data are a tuple `(x, targets)` or `(x, targets, weights)` of arrays `[examples, ...]`,
which stay on the device (the order of each epoch is drawn on the host), or an iterable of such
tuples, one a batch, where they do not fit. The steps are in `fnn.training.steps`, the epochs in
`fnn.training.epoch`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from fnn import _validate
from fnn.checkpoint import Checkpointer
from fnn.factors import widen
from fnn.sharding import Placement, Plan, padded, place, placed_order, placed_state
from fnn.training.checkpointing import begin, saver_of
from fnn.training.data import (
    Sampler,
    check_batches,
    check_data,
    check_rule,
    drawn,
    epoch_seeds,
    shuffled_batches,
)
from fnn.training.epoch import (
    Loop,
    NonFiniteStep,
    Part,
    Record,
    Recorder,
    Segments,
    paced,
    record_structure,
    run_arrays,
    run_iterable,
)
from fnn.training.history import History, Log, add, end_epoch, history
from fnn.training.steps import TrainState, init
from fnn.types import Array, ArrayLike, Key, Params, Rule

Callback = Callable[[int, dict[str, float]], Any]


class NonFiniteError(FloatingPointError):
    """A loss or an update that is not finite stopped `fit`.

    Attributes:
        params: the last parameters that were finite.
        step: the step, counted from 0 over all epochs.
        leaf: the first gradient (or parameter) that is not finite, as a path such as
            `grads[0][0].w`.
        history: the losses up to the step.
    """

    def __init__(self, stop: NonFiniteStep, log: Log) -> None:
        """Adds the loss of the bad step to the log, and says what to do about it."""
        self.params, self.leaf, self.step = stop.params, stop.leaf, log.steps
        log.step_loss.append(stop.loss[None])
        self.history = history(log)
        super().__init__(
            f"Training stopped at step {self.step} (epoch {len(log.loss)}, batch {log.at_hand}): "
            f"loss {float(stop.loss)}, first non-finite leaf {stop.leaf}. A lower learning rate, "
            "or gradient clipping (optax.clip_by_global_norm), may mend it. "
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
    checkpoint: Checkpointer | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
) -> tuple[Params, History]:
    """Trains a net.

    Args:
        rule: what turns a batch into a loss and an update direction: `fnn.rules.backprop(net,
            loss)`, ...
        optimizer: any optax optimiser; a schedule counts steps.
        params: where to start; they are not changed.
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]`, kept on the
            device; or an iterable of such tuples, one a batch of at most `batch_size`, gone through
            anew every epoch (a list, a loader; not a generator, which can be gone through once; a
            function of the epoch that returns one may stand for it).
        epochs: passes over the data, at least 1.
        batch_size: examples per step, at most all; the last batch may have fewer, none is dropped.
        key: from `jax.random.key`; for the rule's state and the shuffles.
        validation: data as above (arrays), measured after every epoch by `evaluate`.
        callback: `(epoch, metrics) -> stop`, called after every epoch, counted from 0; training
            stops where it returns something true.
        sampler: `(seed, examples, batch_size) -> (rows, present)`, an epoch's batches of arrays;
            `fnn.training.poisson_batches` is another.
        record: `(params, rule_state, x, targets, weights) -> tree of arrays`, such as those of
            `fnn.alignment`, called inside the compiled epoch before the steps 0, `record_every`,
            2 `record_every`, ... of every epoch; `history.records` has them. It is compiled in:
            pass the same function again, and nothing compiles again.
        record_every: the stride in steps, at least 1.
        checkpoint: a `fnn.checkpoint.Checkpointer`. The training saves into its folder and, where
            that has a checkpoint, goes on from it: called again with the same arguments, or more
            epochs, it gives bit for bit what a training that never stopped gives. What can be seen
            of another training (settings, shapes, key) is refused; another learning rate or other
            numbers in the data cannot be seen. SIGTERM and Ctrl-C finish the step and save.
            `callback` is called anew for an epoch whose checkpoint was not finished; one that it
            has stopped has ended.
        mesh: of `fnn.sharding.make_mesh`: batches are split over its axis "data" and filled up by
            rows of weight 0 where it does not divide them; arrays of data are on every device. With
            several processes all call `fit` alike, with the same arrays or each with an iterable of
            its own part of every batch, `batch_size / jax.process_count()` rows.
        plan: where the params lie on the mesh, such as `fnn.sharding.fully_sharded(mesh, params)`;
            the optimiser's and the rule's state follow. None has them on every device.

    Returns:
        `(params, history)`.

    Raises:
        TypeError, ValueError: an argument or the data are invalid; before any training, but for
            the batches of an iterable, which are checked as they come.
        NonFiniteError: a loss or an update became NaN or infinite; carries the last finite
            parameters.
        CheckpointError: the checkpoint is damaged, or is of another training, or of more epochs.
        Stopped: a `SystemExit`: the process was told to stop, and all is saved.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> data = np.ones((8, 3), np.float32), np.ones((8, 2), np.float32)
    >>> rule, params = fnn.rules.backprop(net, fnn.losses.l2_loss), net.init(jax.random.key(0))
    >>> params, history = fit(rule, optax.sgd(0.1), params, data,
    ...                       epochs=3, batch_size=4, key=jax.random.key(1))
    >>> history.step_loss.shape
    (6,)
    """
    check_settings(rule, optimizer, epochs, batch_size, callback)
    recorder = _recorder(record, record_every)
    _validate.is_key("key", key)
    rule_key, order_key = jax.random.split(key)
    data, validation = _check_both(rule, params, data, validation, batch_size, epochs)
    settings = _settings(rule, data, validation, batch_size, sampler, recorder)
    _check_best(checkpoint, rule, validation)
    state, placement = _placed(rule, optimizer, params, rule_key, mesh, plan)
    if mesh is not None:
        data = place(mesh, data) if isinstance(data, tuple) else data
        validation = jax.device_get(validation)  # for evaluate, which puts it where the params are
    loop = Loop(rule, optimizer, recorder, placement)
    run = _epoch_runner(
        data, order_key, epochs, batch_size, sampler, paced() if checkpoint else None, placement
    )
    with saver_of(checkpoint) as saver:
        state, log, ended, keep = begin(checkpoint, saver, state, key, settings, epochs)
        for e in range(len(log.loss), 0 if ended else epochs):
            try:
                for part in run(loop, state, data, e, log.at_hand):
                    state = part.state
                    add(log, part.losses, part.counts, part.records)
                    keep(state, log)
            except NonFiniteStep as stop:
                raise NonFiniteError(stop, log) from None
            end_epoch(log)
            if validation is not None:
                log.validation.append(evaluate(rule, state.params, validation, checked=True))
            metrics = {"loss": float(log.loss[-1])} | {
                f"validation_{k}": v for k, v in (log.validation or [{}])[-1].items()
            }
            ended = callback is not None and bool(callback(e, metrics))
            keep(state, log, metrics, last=e == epochs - 1, ended=ended)
            if ended:
                break
    if log.records and log.structure is None:  # there was nothing left to train
        log.structure = record_structure(loop, state, data, batch_size)
    return state.params, history(log)


def evaluate(
    rule: Rule,
    params: Params,
    data: tuple[ArrayLike, ...],
    *,
    batch_size: int | None = None,
    checked: bool = False,
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
        TypeError, ValueError: the data are invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> data = np.zeros((8, 3), np.float32), np.zeros(8, int)
    >>> sorted(evaluate(rule, net.init(jax.random.key(0)), data))
    ['accuracy', 'loss']
    """
    check_rule(rule)
    x, targets, weights = data if checked else check_data(rule, params, data)
    count = x.shape[0]
    size = count if batch_size is None else batch_size
    _validate.positive("batch_size", size, whole=True)
    weights = np.ones(count, np.float32) if weights is None else weights
    sums: dict[str, float] = {}
    for i in range(0, count, size):
        batch = padded(
            (x[i : i + size], targets[i : i + size], weights[i : i + size]), min(size, count)
        )
        for name, s in _sums_function(rule)(params, *batch).items():
            sums[name] = sums.get(name, 0.0) + float(s)
    return {name: s / sums["weight"] for name, s in sums.items() if name != "weight"}


# Kept per rule, as the compiled functions of `fnn.training.epoch`.
@functools.lru_cache(maxsize=64)
def _sums_function(rule: Rule) -> Callable[..., dict[str, Array]]:
    def sums(params: Params, x: Array, targets: Array, weights: Array) -> dict[str, Array]:
        outputs = rule.predict(params, x)
        values = widen(rule.loss.value(outputs, targets))
        w = weights.astype(values.dtype)
        found = {"weight": w.sum(), "loss": (w * values).sum()}
        if rule.loss.correct is not None:
            found["accuracy"] = (w * rule.loss.correct(outputs, targets).astype(w.dtype)).sum()
        return found

    return jax.jit(sums)


def _epoch_runner(
    data: Any,
    key: Key,
    epochs: int,
    batch_size: int,
    sampler: Any,
    segments: Segments | None,
    placement: Placement | None,
) -> Callable[..., Iterator[Part]]:
    """`(loop, state, data, epoch, first) -> parts` for arrays, or for an iterable."""
    _validate.is_function(
        "sampler",
        sampler,
        "(seed, examples, batch_size) -> (rows, present), such as `fnn.training.poisson_batches`",
    )
    if not isinstance(data, tuple):
        if sampler is not shuffled_batches:
            raise ValueError(
                "`sampler` draws from arrays, but `data` is an iterable, with batches of its own. "
                "Pass arrays, or no sampler."
            )
        here = (
            -(-batch_size // jax.process_count())
            if placement and placement.mesh.is_multi_process
            else batch_size
        )
        return functools.partial(run_iterable, batch_size=here)
    seeds = epoch_seeds(key, epochs + 1)

    @functools.lru_cache(maxsize=2)
    def draw(e: int) -> tuple[Any, Any]:
        rows, present = drawn(sampler, seeds[e], data[0].shape[0], batch_size)
        return (rows, present) if placement is None else placed_order(placement.mesh, rows, present)

    return functools.partial(run_arrays, draw=draw, segments=segments)


def _placed(
    rule: Rule, optimizer: Any, params: Params, key: Key, mesh: Mesh | None, plan: Plan | None
) -> tuple[TrainState, Placement | None]:
    """The first state, on the mesh if there is one."""
    if mesh is None:
        if plan is not None:
            raise ValueError(
                "`plan` says where params lie on a mesh, but `mesh` is None. "
                "Pass the mesh too: `fnn.sharding.make_mesh()`."
            )
        return init(rule, optimizer, params, key), None
    params = place(mesh, params, plan)
    return placed_state(mesh, plan, params, init(rule, optimizer, params, key))


def _settings(
    rule: Rule, data: Any, validation: Any, batch_size: int, sampler: Any, recorder: Recorder
) -> dict[str, Any]:
    """What a training that goes on must share with the one that began, as JSON has it."""
    examples, validated = (
        len(part[0]) if isinstance(part, tuple) else None for part in (data, validation)
    )
    settings = {
        "rule": str(rule),
        "loss": str(rule.loss),
        "examples": examples,
        "validation examples": validated,
        "batch_size": int(batch_size),
        "sampler": getattr(sampler, "__name__", "a sampler"),
        "records": recorder.record is not None,
        "record_every": recorder.every,
    }
    return (
        settings
        if examples
        else {name: setting for name, setting in settings.items() if name != "examples"}
    )


def _recorder(record: Any, every: Any) -> Recorder:
    if record is not None:
        _validate.is_function(
            "record", record, "(params, rule_state, x, targets, weights) -> tree of arrays"
        )
        _validate.hashable("record", record)
    _validate.positive("record_every", every, whole=True)
    return Recorder(record, int(every))


def check_settings(
    rule: Any, optimizer: Any, epochs: Any, batch_size: Any, callback: Any = None
) -> None:
    """Raises unless rule, optimiser and the numbers of a training are valid."""
    check_rule(rule)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"`optimizer` must be an optax optimiser, got {optimizer!r}. "
            "Make one: `optax.sgd(0.1)`."
        )
    for name, value in (("rule", rule), ("optimizer", optimizer)):
        _validate.hashable(name, value)
    _validate.positive("epochs", epochs, whole=True)
    _validate.positive("batch_size", batch_size, whole=True)
    if callback is not None:
        _validate.is_function("callback", callback, "(epoch, metrics) -> stop")


def _check_best(checkpoint: Any, rule: Rule, validation: Any) -> None:
    """Raises unless the metric by which the best checkpoint is chosen will be there."""
    best = getattr(checkpoint, "best", None)
    measured = ["loss"] + ["validation_loss"] * (validation is not None)
    measured += ["validation_accuracy"] * (validation is not None and rule.loss.correct is not None)
    if best is not None and best not in measured:
        raise ValueError(
            f"`best` of `checkpoint` must be a metric of this training, {', '.join(measured)}; "
            f"got {best!r}."
        )


def _check_both(
    rule: Rule, params: Params, data: Any, validation: Any, batch_size: int, epochs: int
) -> tuple[Any, Any]:
    """The data and the validation data of `fit`, checked.

    An iterable's batches are checked as they come.
    """
    if isinstance(data, tuple):
        data = check_data(rule, params, data, batch_size=batch_size)
    else:
        check_batches(data, epochs)
    if validation is not None:
        with _validate.inside("`validation`"):
            validation = check_data(rule, params, validation, name="validation")
    return data, validation
