"""Many nets at once: `fit_many`, `fit` under `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import _validate
from fnn.training.data import check_data, epoch_seeds, shuffled_batches
from fnn.training.fit import check_settings
from fnn.training.history import History
from fnn.training.steps import TrainState, epoch, init
from fnn.types import Array, ArrayLike, Key, Params, Rule


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
    make, rates = _optimizers(rule, optimizer, keys, learning_rates, epochs, batch_size)
    _validate.is_function("init_params", init_params, "key -> params, such as `net.init`")
    x, targets, weights = check_data(
        rule, jax.eval_shape(init_params, keys[0]), data, batch_size=batch_size
    )
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
    return state.params, History(
        jnp.asarray(by_epoch.T), jnp.asarray(np.concatenate(list(by_step), 1)), {}
    )


# Kept per rule, as the compiled functions of `fnn.training.steps`.
@functools.lru_cache(maxsize=64)
def _many_functions(
    rule: Rule, make: Any, init_params: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(keys, rates) -> (states, keys)` and one epoch of all nets.

    `make` is an optimiser, or a function of the rate.
    """

    def of(rate: Array) -> optax.GradientTransformation:
        return make if hasattr(make, "update") else make(rate)

    def first(key: Key, rate: Array) -> tuple[TrainState, Key]:
        params_key, key = jax.random.split(key)
        rule_key, key = jax.random.split(key)  # as `fit` does with its key
        return init(rule, of(rate), init_params(params_key), rule_key), key

    def one_epoch(
        rate: Array, state: TrainState, rows: Array, present: Array | None, *data: Any
    ) -> tuple[TrainState, Array, Array]:
        return epoch(rule, of(rate))(state, (rows, present), *data)

    return jax.jit(jax.vmap(first)), jax.jit(
        jax.vmap(one_epoch, in_axes=(0, 0, 0, None, None, None, None))
    )


def _optimizers(
    rule: Any, optimizer: Any, keys: Any, rates: Any, epochs: Any, batch_size: Any
) -> tuple[Any, Array]:
    """What `fit_many` trains each net with, checked.

    An optimiser or a function of the rate, and the rates.
    """
    _check_keys(keys)
    if rates is None:
        check_settings(rule, optimizer, epochs, batch_size)
        return optimizer, jnp.ones(keys.shape)
    _validate.is_float("learning_rates", rates)
    if not callable(optimizer):
        raise TypeError(
            "`optimizer` must be a function rate -> optimiser where `learning_rates` are given, "
            f"got {optimizer!r}. Pass `optax.sgd`."
        )
    if rates.shape != keys.shape or not bool(((rates > 0) & jnp.isfinite(rates)).all()):
        raise ValueError(
            f"`learning_rates` must be one finite number above 0 per key, {keys.shape}, "
            f"got {rates}."
        )
    check_settings(rule, optimizer(0.1), epochs, batch_size)
    return optimizer, jnp.asarray(rates)


def _check_keys(keys: Any) -> None:
    if not (hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"`keys` must be an array of keys from `jax.random.split(key, nets)`, got {keys!r:.80}."
        )
    if keys.ndim != 1 or not keys.size:
        raise ValueError(
            f"`keys` must be one key per net, [nets], got shape {keys.shape}. "
            "Pass `jax.random.split(key, nets)`."
        )
