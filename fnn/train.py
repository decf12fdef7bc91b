"""Training: `fit`, `fit_many` (many nets at once) and `evaluate`.

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
from fnn.steps import NonFiniteStep, TrainState, epoch, init, run_arrays, run_iterable

Callback = Callable[[int, dict[str, float]], Any]


class History(NamedTuple):
    """What `fit` measured. From `fit_many` every array has a leading axis of nets."""

    loss: Array  # [epochs]: the mean over the epoch's examples, each taken before its step
    step_loss: Array  # [steps]: the loss of every batch
    validation: dict[str, Array]  # [epochs] each: what `evaluate` gives after every epoch; {} without validation data


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
    _check_settings(rule, optimizer, epochs, batch_size, callback)
    _check.is_key("key", key)
    rule_key, key = jax.random.split(key)
    data, validation = _check_both(rule, params, data, validation, batch_size, epochs)
    state = init(rule, optimizer, params, rule_key)
    step_losses: list[Array] = []
    epoch_losses: list[Array] = []
    metrics: list[dict[str, float]] = []
    run = _epoch_runner(data, key, epochs, batch_size, sampler)
    for e in range(epochs):
        try:
            state, losses, mean = run(rule, optimizer, state, data, e)
        except NonFiniteStep as stop:
            before = sum(len(losses) for losses in step_losses)
            history = _history(epoch_losses, [*step_losses, jnp.stack(stop.losses)], metrics)
            raise NonFiniteError(e, before, stop, history) from None
        step_losses.append(losses)
        epoch_losses.append(mean)
        if validation is not None:
            metrics.append(evaluate(rule, state.params, validation, checked=True))
        validated = {f"validation_{name}": number for name, number in metrics[-1].items()} if metrics else {}
        if callback is not None and bool(callback(e, {"loss": float(mean)} | validated)):
            break
    return state.params, _history(epoch_losses, step_losses, metrics)


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
) -> tuple[Params, History]:
    """Trains many nets at once, `vmap` over keys (and learning rates): seeds, ensembles, small searches.

    Args:
        rule, epochs, batch_size: as for `fit`.
        optimizer: an optax optimiser; with `learning_rates`, a function `rate -> optimiser`, such as `optax.sgd`.
        init_params: `key -> params`, such as `net.init`.
        data: `(x, targets)` or `(x, targets, weights)` on the device, the same for all nets.
        keys: `[nets]`, from `jax.random.split`; each gives a net its parameters and its shuffles.
        learning_rates: `[nets]`, one above 0 for each net.

    Returns:
        `(params, history)` with a leading axis of nets. A net that diverges has NaN in its history and stops no other.

    Raises:
        TypeError, ValueError: an argument or the data cannot be meant; before any training.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> params, history = fit_many(fnn.rules.backprop(net, fnn.losses.l2_loss), optax.sgd, net.init,
    ...     (jnp.ones((8, 3)), jnp.ones((8, 2))), epochs=3, batch_size=4, keys=jax.random.split(jax.random.key(0), 5),
    ...     learning_rates=jnp.logspace(-3, -1, 5))
    >>> history.loss.shape
    (5, 3)
    """
    make, rates = _optimizers(rule, optimizer, keys, learning_rates, epochs, batch_size)
    _check.is_function("init_params", init_params, "key -> params, such as `net.init`")
    x, targets, weights = check_data(rule, jax.eval_shape(init_params, keys[0]), data, batch_size=batch_size)
    first, one_epoch = _many_functions(rule, make, init_params)
    state, fit_keys = first(keys, rates)
    seeds = [epoch_seeds(key, epochs + 1) for key in fit_keys]  # as `fit` draws them
    step_losses: list[Array] = []
    epoch_losses: list[Array] = []
    for e in range(epochs):
        orders = [shuffled_batches(seed[e], x.shape[0], batch_size) for seed in seeds]
        rows = np.stack([rows for rows, _ in orders])
        state, losses, means = one_epoch(rates, state, rows, orders[0][1], x, targets, weights)
        step_losses.append(losses)
        epoch_losses.append(means)
    # joined on the host: a program with an operand per epoch compiles for seconds
    by_epoch, by_step = (np.array(losses) for losses in jax.device_get((epoch_losses, step_losses)))
    return state.params, History(jnp.asarray(by_epoch.T), jnp.asarray(np.concatenate(list(by_step), 1)), {})


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
def _many_functions(rule: Rule, make: Any, init_params: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(keys, rates) -> (states, keys)` and one epoch of all nets; `make` is an optimiser, or a function of the rate."""

    def of(rate: Array) -> optax.GradientTransformation:
        return make if hasattr(make, "update") else make(rate)

    def first(key: Key, rate: Array) -> tuple[TrainState, Key]:
        params_key, key = jax.random.split(key)
        rule_key, key = jax.random.split(key)  # as `fit` does with its key
        return init(rule, of(rate), init_params(params_key), rule_key), key

    def one_epoch(rate: Array, state: TrainState, rows: Array, present: Array | None, *data: Any) -> tuple[TrainState, Array, Array]:
        return epoch(rule, of(rate))(state, (rows, present), *data)

    return jax.jit(jax.vmap(first)), jax.jit(jax.vmap(one_epoch, in_axes=(0, 0, 0, None, None, None, None)))


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


def _epoch_runner(data: Any, key: Key, epochs: int, batch_size: int, sampler: Any) -> Callable[..., tuple[TrainState, Array, Array]]:
    """`(rule, optimizer, state, data, epoch) -> (state, losses, mean)` for arrays, or for an iterable."""
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


def _history(epoch_losses: list[Array], step_losses: list[Array], metrics: list[dict[str, float]]) -> History:
    losses, steps = jax.device_get((epoch_losses, step_losses))  # joined on the host: no program to compile for every length
    validation = {name: jnp.array([m[name] for m in metrics]) for name in (metrics[0] if metrics else ())}
    return History(jnp.asarray(np.array(losses)), jnp.asarray(np.concatenate(steps)), validation)


def _check_settings(rule: Any, optimizer: Any, epochs: Any, batch_size: Any, callback: Any = None) -> None:
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


def _optimizers(rule: Any, optimizer: Any, keys: Any, rates: Any, epochs: Any, batch_size: Any) -> tuple[Any, Array]:
    """What `fit_many` trains each net with, checked: an optimiser or a function of the rate, and the rates."""
    _check_keys(keys)
    if rates is None:
        _check_settings(rule, optimizer, epochs, batch_size)
        return optimizer, jnp.ones(keys.shape)
    _check.is_float("learning_rates", rates)
    if not callable(optimizer):
        raise TypeError(
            f"`optimizer` must be a function rate -> optimiser where `learning_rates` are given, got {optimizer!r}. Pass `optax.sgd`."
        )
    if rates.shape != keys.shape or not bool(((rates > 0) & jnp.isfinite(rates)).all()):
        raise ValueError(f"`learning_rates` must be one finite number above 0 per key, {keys.shape}, got {rates}.")
    _check_settings(rule, optimizer(0.1), epochs, batch_size)
    return optimizer, jnp.asarray(rates)


def _check_keys(keys: Any) -> None:
    if not (hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`keys` must be an array of keys from `jax.random.split(key, nets)`, got {keys!r:.80}.")
    if keys.ndim != 1 or not keys.size:
        raise ValueError(f"`keys` must be one key per net, [nets], got shape {keys.shape}. Pass `jax.random.split(key, nets)`.")
