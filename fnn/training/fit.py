"""Training: `fit`, many nets at once by `fit_many`, and `evaluate`.

Data flows one way: key -> init -> params -> forward -> loss.grad -> backward -> grads -> optax ->
params. Data are a tuple `(x, targets)` or `(x, targets, weights)` of arrays `[examples, ...]`,
which stay on the device (the order of each epoch is drawn on the host), or an iterable of such
tuples, one a batch, where they do not fit. The steps are in `fnn.training.epoch`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from fnn import _validate
from fnn.checkpoint import Checkpointer
from fnn.factors import widen
from fnn.factors.base import sum_leaves
from fnn.sharding import Plan, place, placed_order, placed_state
from fnn.training.checkpointing import begin, data_fingerprint, fingerprints, saver_of
from fnn.training.data import (
    Sampler,
    check_best,
    check_both,
    check_data,
    check_many,
    check_record,
    check_rule,
    check_settings,
    check_validation,
    drawn,
    epoch_seeds,
    shuffled_batches,
)
from fnn.training.epoch import (
    Loop,
    NonFiniteStep,
    Part,
    Record,
    TrainState,
    batches_of,
    init,
    is_faster_alone,
    paced,
    run_arrays,
    run_batches,
)
from fnn.training.history import History, Length, Log, add, end_epoch, history
from fnn.training.optimizers import known_optimizer, with_average
from fnn.types import Array, ArrayLike, Key, Params, Rule

Callback = Callable[[int, dict[str, Any]], Any]
Parts = Callable[[TrainState, int, int, int | None], Iterator[Part]]


class NonFiniteError(FloatingPointError):
    """A loss or an update that is not finite stopped `fit`.

    Attributes:
        params: the last parameters that were finite.
        step: the step, counted from 0 over all epochs.
        leaf: the first gradient (or parameter) that is not finite, as a path such as
            `grads[0][0].w`.
        history: the losses up to the step.
    """

    params: Params = None
    step: int = 0
    leaf: str = ""
    history: History | None = None


def fit(
    rule: Rule,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
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
    state: TrainState | None = None,
    ema: float | None = None,
    evaluation_params: Callable[[Any, Params], Params] | None = None,
) -> tuple[Params, History]:
    """Trains a net.

    Args:
        rule: what turns a batch into a loss and an update direction: `fnn.rules.backprop(net,
            loss)`, ...
        optimizer: any optax optimiser; a schedule counts steps. One that asks for `value`, `grad`
            or `value_fn` gets them from the rule, on the batch of the step. Equal ones of optax
            with numbers for settings compile once; one with a function or an array, build once.
        params: where to start; they are not changed. With `state`, params like those in it.
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]`, kept on the
            device; or an iterable of such tuples, one a batch of at most `batch_size`, gone through
            anew every epoch (a list, a loader; not a generator, which can be gone through once; a
            function of the epoch that returns one may stand for it). A batch may be a list, and
            hold arrays of other libraries. The next one is fetched while the device is at work.
        epochs: passes over the data, at least 1.
        steps: in the place of `epochs`, how many steps in all; the last epoch may be incomplete.
            For endless streams.
        batch_size: examples per step, at most all; the last batch may have fewer, none is dropped.
        key: from `jax.random.key`; for the rule's state and the shuffles.
        validation: data as above (arrays), measured after every epoch by `evaluate`, a batch of
            `batch_size` at a time.
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
            epochs, it gives bit for bit what a training that never stopped gives. Another
            training (settings, key, the programs of rule and optimiser with all their numbers, a
            sample of the rows of arrays) is refused, unless the `Checkpointer` has
            `on_change="warn"`. For it the first batch of an iterable is read once more; the values
            of its batches are not compared. SIGTERM and Ctrl-C finish the step and save. `callback`
            is called again for an epoch whose checkpoint was not finished. A training that
            `callback` has stopped has ended.
        mesh: of `fnn.sharding.make_mesh`: batches are split over its axis "data" and filled up by
            rows of weight 0 where it does not divide them; arrays of data are on every device. With
            several processes all call `fit` alike, with the same arrays or each with an iterable of
            its own part of every batch, `batch_size / jax.process_count()` rows.
        plan: where the params lie on the mesh, such as `fnn.sharding.fully_sharded(mesh, params)`;
            the optimiser's and the rule's state follow. None has them on every device.
        state: `history.state` of another `fit` with the same rule and optimiser, which this one
            goes on from.
        ema: the decay of an exponential moving average of the params, in 0 ... 1: validation
            measures the average, and it is what `fit` returns. `history.state` has the params.
        evaluation_params: `(optimizer_state, params) -> params`, what validation measures and `fit`
            returns, such as `optax.contrib.schedule_free_eval_params`.

    Returns:
        `(params, history)`.

    Raises:
        TypeError, ValueError: an argument or the data are invalid; before any training, but for
            the batches of an iterable, which are checked as they come.
        NonFiniteError: a loss or an update became NaN or infinite; carries the last finite
            parameters.
        CheckpointError: the checkpoint is damaged, or is of another training, or of more epochs;
            the folder is read-only, before training; or a save failed.
        Stopped: a `SystemExit`: the process was told to stop, and all is saved.
        Any error that ends the training, a callback's or a loader's too, has `params` and
        `history`: what was trained until then.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> data = np.ones((8, 3), np.float32), np.ones((8, 2), np.float32)
    >>> rule, params = fnn.rules.backprop(net, fnn.losses.l2_loss), net.init(jax.random.key(0))
    >>> params, history = fit(rule, optax.sgd(0.1), params, data,
    ...                       epochs=3, batch_size=4, key=jax.random.key(1))
    >>> history.step_loss.shape
    (6,)
    """
    check_settings(rule, optimizer, batch_size, callback)
    length = _length(epochs, steps)
    check_record(record, record_every)
    _validate.is_key("key", key)
    optimizer, choose = _choose_params(known_optimizer(optimizer), ema, evaluation_params)
    rule_key, order_key = jax.random.split(key)
    data, validation = check_both(rule, params, data, validation, batch_size, epochs or 1)
    settings = _settings(rule, data, validation, batch_size, sampler, record, record_every, ema)
    check_best(checkpoint, rule, validation)
    first, placement = _first_state(rule, optimizer, params, rule_key, state, mesh, plan)
    _check_choice(choose, first)
    if mesh is not None:
        data = place(mesh, data) if isinstance(data, tuple) else data
        validation = jax.device_get(validation)  # `evaluate` puts it where the params are
    arrays = data if isinstance(data, tuple) else validation
    alone = mesh is None and arrays is not None and is_faster_alone(rule, params, arrays[0])
    loop = Loop(rule, optimizer, record, int(record_every), placement, alone=alone)
    segments = None if checkpoint is None else paced()
    parts = _parts_of(loop, data, order_key, batch_size, sampler, segments)

    def measure(state):
        return evaluate_checked(rule, choose(state), validation, batch_size, alone=alone)

    with saver_of(checkpoint) as saver:
        if saver is not None:
            settings |= _fingerprints(loop, first, data, batch_size)
        own = None if ema is None and evaluation_params is None else choose
        begun = begin(checkpoint, saver, first, key, settings, length, own)
        training = Training(*begun, length, callback, measure if validation is not None else None)
        del first, begun  # so that nothing holds the first state while others follow
        state, log = training.run(parts)
    if log.records and log.structure is None:  # there was nothing left to train
        log.structure = _record_structure(loop, state, data, batch_size)
    return choose(state), history(log, state)


def fit_many(
    rule: Rule,
    optimizer: Any,
    init_params: Callable[[Key], Params],
    data: tuple[ArrayLike, ...],
    *,
    epochs: int,
    batch_size: int,
    keys: Array,
    learning_rates: Array | None = None,
    validation: Any = None,
    callback: Callback | None = None,
    record: Record | None = None,
    record_every: int = 1,
) -> tuple[Params, History]:
    """Trains many nets at once, `vmap` over keys (and learning rates).

    Seeds, ensembles, small searches.

    Args:
        rule: what turns a batch into a loss and an update direction, as for `fit`.
        optimizer: an optax optimiser; with `learning_rates`, a function `rate -> optimiser`, such
            as `optax.sgd`.
        init_params: `key -> params`, such as `net.init`.
        data: `(x, targets)` or `(x, targets, weights)` on the device, arrays `[examples, ...]`,
            the same for all nets.
        epochs: passes over the data, at least 1.
        batch_size: examples per step and net, at most all.
        keys: `[nets]`, from `jax.random.split`; each gives a net its parameters and its shuffles.
        learning_rates: `[nets]`, one above 0 for each net.
        validation: as for `fit`.
        callback: as for `fit`; the metrics are arrays `[nets]`.
        record: as for `fit`, called for every net.
        record_every: the stride in steps, at least 1.

    Returns:
        `(params, history)` with a leading axis of nets. A net that diverges has NaN in its history
        and stops no other.

    Raises:
        TypeError, ValueError: an argument or the data are invalid; before any training.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> data = jnp.ones((8, 3)), jnp.ones((8, 2))
    >>> keys, rates = jax.random.split(jax.random.key(0), 5), jnp.logspace(-3, -1, 5)
    >>> params, history = fit_many(rule, optax.sgd, net.init, data,
    ...     epochs=3, batch_size=4, keys=keys, learning_rates=rates)
    >>> history.loss.shape
    (5, 3)
    """
    check_many(rule, optimizer, batch_size, callback, keys, learning_rates)
    length = _length(epochs, None)
    check_record(record, record_every)
    _validate.is_function("init_params", init_params, "key -> params, such as `net.init`")
    shapes = jax.eval_shape(init_params, keys[0])
    arrays = check_data(rule, shapes, data, batch_size=batch_size)
    validation = check_validation(rule, shapes, validation)
    optimizer = known_optimizer(optimizer)
    rates = None if learning_rates is None else jnp.asarray(learning_rates)
    loop = Loop(rule, optimizer, record, int(record_every), nets=True)
    first, order_keys = _first_states(rule, optimizer, init_params)(keys, rates)
    seeds = [epoch_seeds(key, epochs + 1) for key in order_keys]  # as `fit` draws them

    def parts(state, e, first, most):
        orders = [shuffled_batches(seed[e], arrays[1].shape[0], batch_size) for seed in seeds]
        rows = np.stack([rows for rows, _ in orders])
        order = rows, orders[0][1]
        return run_arrays(loop, state, arrays, order, (first, rows.shape[1]), rates=rates)

    def measure(state):
        return evaluate_checked(rule, state.params, validation, batch_size, nets=True)

    measured = measure if validation is not None else None
    training = Training(first, Log(), False, None, length, callback, measured)
    del first
    state, log = training.run(parts)
    return state.params, history(log, state, nets=True)


@dataclass
class Training:
    """Epochs one after the other, and what is done at the end of each.

    Attributes:
        state: where the training stands.
        log: what was measured up to there.
        ended: whether the callback has stopped it.
        keep: of `checkpointing.begin`; None saves nothing.
        length: how long it is.
        callback: of `fit`.
        measure: `(state) -> metrics` of the validation data, if there are any.
    """

    state: TrainState
    log: Log
    ended: bool
    keep: Callable[..., None] | None
    length: Length
    callback: Callback | None
    measure: Callable[[TrainState], dict[str, Any]] | None

    def run(self, parts: Parts) -> tuple[TrainState, Log]:
        """Trains.

        Args:
            parts: `(state, epoch, first step, most steps) -> the parts of the epoch`.

        Returns:
            The state and the log at the end. An error that ends the training has `params` and
            `history`.
        """
        log = self.log
        try:
            if log.at_hand and self.length.left(log) == 0:  # a run that is done, read again
                self.keep = None
                self._end_epoch()
            while not (self.ended or self.length.is_over(log)):
                left = self.length.left(log)
                for part in parts(self.state, len(log.loss), log.at_hand, left):
                    self.state = part.state
                    add(log, part.losses, part.counts, part.records)
                    if self.keep is not None:
                        self.keep(self.state, log)
                if not log.at_hand:
                    _no_batch(log, self.length)
                    break
                self._end_epoch()
        except NonFiniteStep as stop:
            raise _non_finite(stop, log) from None
        except BaseException as error:
            if getattr(error, "params", None) is None:
                vars(error).update(params=self.state.params, history=history(log, self.state))
            raise
        return self.state, log

    def _end_epoch(self):
        """Closes an epoch: its loss, validation, callback and checkpoint."""
        log = self.log
        if self.keep is not None and self.length.steps == log.steps:
            self.keep(self.state, log, last=True)  # more steps go on from within the epoch
            self.keep = None
        epoch = len(log.loss)
        end_epoch(log)
        loss = log.loss[-1]
        metrics = {"loss": loss if np.ndim(loss) else float(loss)}
        if self.measure is not None:
            log.validation.append(self.measure(self.state))
            for name, value in log.validation[-1].items():
                metrics[f"validation_{name}"] = value
        self.ended = self.callback is not None and _is_true(self.callback(epoch, metrics))
        if self.keep is not None:
            last = self.length.is_over(log)
            self.keep(self.state, log, metrics, last=last, ended=self.ended)


def _is_true(answer):
    """Whether a callback stops the training."""
    if np.size(answer) != 1 and answer is not None and hasattr(answer, "dtype"):
        raise ValueError(
            f"`callback` must return one bool, got an array {np.shape(answer)}. Take its `.all()`."
        )
    return bool(answer)


def _no_batch(log, length):
    """Says that an epoch has no batch: a warning where a stream has ended before so many steps."""
    if length.steps is None or not log.steps:
        raise ValueError(
            f"`data` gave no batch in epoch {len(log.loss)}. A generator can be gone through only "
            "once: pass a list, or a function of the epoch."
        )
    text = f"`data` ended after {log.steps} steps, of which `steps` are {length.steps}."
    warnings.warn(text, stacklevel=4)


def _non_finite(stop, log):
    """The error of `fit` at a step that is not finite."""
    log.step_loss.append(stop.loss[None])
    error = NonFiniteError(
        f"Training stopped at step {log.steps} (epoch {len(log.loss)}, batch {log.at_hand}): "
        f"loss {float(stop.loss)}, first non-finite leaf {stop.leaf}. A lower learning rate, "
        "or gradient clipping (optax.clip_by_global_norm), may mend it; or an embedding has no "
        "row for an index. `error.params` are the last finite parameters."
    )
    error.params = stop.params
    error.step = log.steps
    error.leaf = stop.leaf
    error.history = history(log)
    return error


def evaluate(
    rule: Rule,
    params: Params,
    data: tuple[ArrayLike, ...],
    *,
    batch_size: int | None = None,
) -> dict[str, float]:
    """The mean loss over data, and the accuracy where the loss is one for classes.

    Args:
        rule: its `predict` and `loss` are used.
        params: of the rule's net.
        data: `(x, targets)` or `(x, targets, weights)`.
        batch_size: how many examples at a time; all, if None.

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
    checked = check_data(rule, params, data)
    if batch_size is not None:
        _validate.positive("batch_size", batch_size, whole=True)
    size = batch_size or checked[1].shape[0]
    alone = size < checked[1].shape[0] and is_faster_alone(rule, params, checked[0])
    return evaluate_checked(rule, params, checked, size, alone=alone)


def evaluate_checked(
    rule: Rule,
    params: Params,
    data: Any,
    batch_size: int,
    *,
    nets: bool = False,
    alone: bool = False,
) -> dict[str, Any]:
    """`evaluate` of data that `check_data` has passed.

    Args:
        rule: of the net.
        params: of the net; of many, with an axis of nets in front.
        data: `(x, targets, weights)`.
        batch_size: how many examples at a time.
        nets: whether there are many nets.
        alone: whether every batch is a program of its own.

    Returns:
        The numbers, or arrays `[nets]` of them.
    """
    count = data[1].shape[0]
    size = min(batch_size, count)
    of_batch, of_all = _sums_functions(rule, size, nets)
    if alone:
        found = [of_batch(params, data, i) for i in range(-(-count // size))]
        sums = jax.tree.map(lambda *parts: sum_leaves(parts), *found)
    else:
        sums = of_all(params, data)
    sums = dict(jax.device_get(sums))
    weight = sums.pop("weight")
    return {name: s / weight if nets else float(s / weight) for name, s in sums.items()}


# Kept per rule, as the compiled functions of `fnn.training.epoch`.
@functools.lru_cache(maxsize=64)
def _sums_functions(rule: Rule, size: int, nets: bool) -> tuple[Callable, Callable]:
    """`(params, data, i) -> sums over a batch`, and `(params, data) -> sums over all examples`."""

    def measure(params, x, targets, weights):
        outputs = rule.predict(params, x)
        values = widen(rule.loss.value(outputs, targets))
        w = weights.astype(values.dtype)
        found = {"weight": w.sum(), "loss": jnp.where(w > 0, w * values, 0).sum()}
        if rule.loss.correct is not None:
            found["accuracy"] = (w * rule.loss.correct(outputs, targets).astype(w.dtype)).sum()
        return found

    def of_batch(params, data, i):
        x, targets, weights = data
        count = targets.shape[0]
        weights = jnp.ones(count, jnp.float32) if weights is None else weights
        start = jnp.minimum(i * size, count - size)

        def cut(a):
            return lax.dynamic_slice_in_dim(a, start, size)

        fresh = start + jnp.arange(size) >= i * size  # the last batch overlaps the one before
        own = jnp.where(fresh, cut(weights), 0)
        return measure(params, jax.tree.map(cut, x), cut(targets), own)

    def of_all(params, data):
        def add(i, found):
            return jax.tree.map(jnp.add, found, of_batch(params, data, i))

        batches = -(-data[1].shape[0] // size)
        if batches == 1:
            return of_batch(params, data, 0)
        shapes = jax.eval_shape(of_batch, params, data, 0)
        empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.fori_loop(0, batches, add, empty)

    if nets:
        of_all = jax.vmap(of_all, (0, None))
    return jax.jit(of_batch), jax.jit(of_all)


def _first(size, *trees):
    """The first rows of every array."""
    return jax.tree.map(lambda a: a[:size], trees)


def _parts_of(loop, data, key, batch_size, sampler, segments) -> Parts:
    """The function that goes through an epoch, of arrays or of an iterable."""
    form = "(seed, examples, batch_size) -> (rows, present), such as `poisson_batches`"
    _validate.is_function("sampler", sampler, form)
    if not isinstance(data, tuple):
        if sampler is not shuffled_batches:
            raise ValueError(
                "`sampler` draws from arrays, but `data` is an iterable, with batches of its own. "
                "Pass arrays, or no sampler."
            )
        several = loop.placement is not None and loop.placement.mesh.is_multi_process
        own = -(-batch_size // jax.process_count()) if several else batch_size

        def of_iterable(state, e, first, most):
            batches = batches_of(loop, state.params, data, e, first, own, most)
            return run_batches(loop, state, batches, first)

        return of_iterable

    seeds = functools.cache(functools.partial(epoch_seeds, key))

    @functools.lru_cache(maxsize=2)
    def draw(e):
        some = seeds(1 << (e + 1).bit_length())  # those of an epoch do not depend on how many
        order = drawn(sampler, some[e], data[1].shape[0], batch_size)
        return order if loop.placement is None else placed_order(loop.placement.mesh, *order)

    def of_arrays(state, e, first, most):
        order = draw(e)
        stop = len(order[0])
        if most is not None:
            stop = min(stop, first + most)
        for part in run_arrays(loop, state, data, order, (first, stop), segments):
            draw(e + 1)
            yield part

    return of_arrays


def _choose_params(optimizer, ema, evaluation_params):
    """The optimiser, and `(state) -> params` that are measured and returned."""
    if ema is not None:
        if evaluation_params is not None:
            raise TypeError("Give one of `ema` and `evaluation_params`: both say what to return.")
        _validate.positive("ema", ema)
        if ema >= 1:
            raise ValueError(f"`ema` must be below 1, got {ema!r}. A usual decay is 0.999.")

        def average(state):
            return jax.tree.map(
                lambda a, p: a.astype(p.dtype), state.optimizer.params, state.params
            )

        return with_average(optimizer, float(ema)), average
    if evaluation_params is None:
        return optimizer, lambda state: state.params
    form = "(optimizer_state, params) -> params"
    _validate.is_function("evaluation_params", evaluation_params, form)
    return optimizer, lambda state: evaluation_params(state.optimizer, state.params)


def _check_choice(choose, state):
    """Raises unless the params to measure are like those that are trained."""
    try:
        found = jax.eval_shape(choose, state)
    except (AttributeError, TypeError, ValueError) as error:
        error.add_note("`evaluation_params(optimizer_state, params)` raised this.")
        raise
    if jax.tree.structure(found) != jax.tree.structure(state.params):
        raise ValueError("`evaluation_params` must return a tree like the params.")


def _first_state(rule, optimizer, params, key, given, mesh, plan):
    """The first state, on the mesh if there is one."""
    if mesh is None and plan is not None:
        raise ValueError(
            "`plan` says where params lie on a mesh, but `mesh` is None. "
            "Pass the mesh too: `fnn.sharding.make_mesh()`."
        )
    if mesh is not None:
        params = place(mesh, params, plan)
    state = init(rule, optimizer, params, key)
    if given is not None:
        _check_state(given, state)
        state = jax.tree.map(jnp.asarray, given)
    if mesh is None:
        return state, None
    return placed_state(mesh, plan, params, state)


def _check_state(given, state):
    """Raises unless a state of another `fit` is like that of this one."""
    if not isinstance(given, TrainState):
        raise TypeError(f"`state` must be `history.state` of a `fit`, got {type(given).__name__}.")
    came, expected = (
        (jax.tree.structure(tree), list(map(_validate.describe, jax.tree.leaves(tree))))
        for tree in (given, state)
    )
    if came != expected:
        raise ValueError(
            "`state` is of another rule, optimiser or net: its arrays differ from those that this "
            "training begins with. Pass the rule, the optimiser and `ema` that it ended with."
        )


@functools.lru_cache(maxsize=64)
def _first_states(rule, optimizer, init_params):
    """`(keys, rates) -> (states, keys of the orders)` of many nets."""

    def first(key, rate):
        params_key, key = jax.random.split(key)
        rule_key, order_key = jax.random.split(key)  # as `fit` does with its key
        own = optimizer if rate is None else optimizer(rate)
        return init(rule, own, init_params(params_key), rule_key), order_key

    return jax.jit(jax.vmap(first))


def _record_structure(loop, state, data, batch_size):
    """The structure of what is recorded of a batch; takes one where `data` is an iterable."""
    if isinstance(data, tuple):
        x, targets, weights = _first(batch_size, *data)
    else:
        x, targets, weights = next(batches_of(loop, state.params, data, 0, 0, batch_size))
    if weights is None:  # batches have them where they are filled up
        weights = jax.ShapeDtypeStruct((targets.shape[0],), jnp.float32)
    found = jax.eval_shape(loop.record, state.params, state.rule, x, targets, weights)
    return jax.tree.structure(found)


# the arguments ----------------------------------------------------------------------------------


def _length(epochs, steps) -> Length:
    if (epochs is None) == (steps is None):
        raise TypeError("Give one of `epochs` and `steps`.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None:
            _validate.positive(name, value, whole=True)
    return Length(epochs, steps)


def _settings(rule, data, validation, batch_size, sampler, record, every, ema) -> dict[str, Any]:
    """What a training that goes on must share with the one that began, as JSON has it."""
    settings = {
        "rule": str(rule),
        "loss": str(rule.loss),
        "batch_size": int(batch_size),
        "sampler": getattr(sampler, "__name__", "a sampler"),
        "records": record is not None,
        "record_every": int(every),
        "ema": ema,
        "validation": None if validation is None else data_fingerprint(validation),
    }
    if isinstance(data, tuple):
        settings["examples"] = len(data[1])
    return settings


def _fingerprints(loop, state, data, batch_size):
    """What tells whether a run that goes on has the same programs and data."""
    found = {}
    batch = data
    if isinstance(data, tuple):
        found["data"] = data_fingerprint(data)
    elif callable(data) or iter(data) is not data:
        here = loop._replace(placement=None)
        batch = next(batches_of(here, state.params, data, 0, 0, batch_size), None)
    else:
        return found  # a stream, whose batches come once
    if batch is None:
        return found

    def shape(array):  # of two rows, so that arrays and batches of any size have one program
        dtype = array.dtype if isinstance(array, jax.Array) else _validate.canonical_dtype(array)
        return jax.ShapeDtypeStruct((2, *array.shape[1:]), dtype)

    x, targets = jax.tree.map(shape, batch[:2])
    weights = jax.ShapeDtypeStruct((2,), jnp.float32)
    programs = fingerprints(loop.rule, loop.optimizer, state, (x, targets, weights))
    return found | {f"program of the {name}": value for name, value in programs.items()}
