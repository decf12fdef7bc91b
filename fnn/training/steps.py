"""One step, of which `fit` is made, and one epoch as a `lax.scan`.

Pure functions for a loop of one's own.

Any `Rule` and any optax optimiser go into the same loop. Source: lecture 002 (SGD), 004 (training
loop).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fnn.backprop import weighted_mean
from fnn.training.data import take
from fnn.types import Array, Key, Params, Rule


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
        optimizer: any optax optimiser.

    Returns:
        A pure function `(state, x, targets, weights=None) -> (state, value)` for `jax.jit`.

    >>> import fnn
    >>> net, optimizer = fnn.mlp((3, 2)), optax.sgd(0.1)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> state = init(rule, optimizer, net.init(jax.random.key(0)), jax.random.key(1))
    >>> state, value = jax.jit(step(rule, optimizer))(state, jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    update = step_with_grads(rule, optimizer)

    def one_step(
        state: TrainState, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[TrainState, Array]:
        state, value, _ = update(state, x, targets, weights)
        return state, value

    return one_step


def epoch(
    rule: Rule, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Array, Array]]:
    """One pass over data under `lax.scan`, in a given order.

    Args:
        rule: any rule.
        optimizer: any optax optimiser.

    Returns:
        A pure function `(state, batches, x, targets, weights=None) -> (state, losses [steps], mean
        loss)` for `jax.jit`. `batches` are `(rows [steps, batch], present [steps, batch] or None)`
        as from `fnn.training.shuffled_batches`, or in an order of your own. The mean is over
        examples, by their weights, not over batches.

    >>> import fnn
    >>> net, optimizer = fnn.mlp((3, 2)), optax.sgd(0.1)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> state = init(rule, optimizer, net.init(jax.random.key(0)), jax.random.key(1))
    >>> batches = fnn.training.data.shuffled_batches(2, 5, 2)
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> state, losses, mean = jax.jit(epoch(rule, optimizer))(state, batches, x, targets)
    >>> losses.shape
    (3,)
    """
    one_step = step(rule, optimizer)

    def one_epoch(
        state: TrainState,
        batches: tuple[Array, Array | None],
        x: Array,
        targets: Array,
        weights: Array | None = None,
    ) -> tuple[TrainState, Array, Array]:
        def body(
            state: TrainState, batch: tuple[Array, Array | None]
        ) -> tuple[TrainState, tuple[Array, Array]]:
            rows, w = batch_of(batch, weights)
            state, value = one_step(state, take(x, rows), take(targets, rows), w)
            return state, (value, batch_weight(rows, w))

        state, (losses, counts) = lax.scan(body, state, batches)
        return state, losses, weighted_mean(losses, counts)

    return one_epoch


def batch_of(
    batch: tuple[Array, Array | None], weights: Array | None
) -> tuple[Array, Array | None]:
    """The rows of a batch, and their weights: the user's, 0 where a row only fills up.

    None where neither is.
    """
    rows, present = batch
    if weights is None:
        return rows, present
    w = take(weights, rows)
    return rows, w if present is None else w * present.astype(w.dtype)


def batch_weight(rows: Array, weights: Array | None) -> Array:
    """What a batch counts for in the mean of an epoch."""
    return jnp.float32(rows.shape[0]) if weights is None else weights.sum()


def step_with_grads(
    rule: Rule, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Array, Params]]:
    """`step` that also returns the gradients."""

    def update(
        state: TrainState, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[TrainState, Array, Params]:
        value, grads, rule_state = rule.value_and_grad(
            state.params, state.rule, x, targets, weights
        )
        # several of optax's optimisers do not run in strict mode
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer_state, rule_state), value, grads

    return update
