"""Data at the door: checked by value once, before training begins; and batches of one size, filled up with weight 0."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import _check
from fnn._types import Array, Key, Params, Rule


def check_data(
    rule: Rule, params: Params, data: Any, *, batch_size: int | None = None, name: str = "data"
) -> tuple[Array, Array, Array | None]:
    """Checks data where they enter, values included, and puts them on the device.

    Args:
        rule: its loss says what targets may be.
        params: of the rule's net, or their shapes.
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]`.
        batch_size: at most the number of examples, if given.
        name: what errors call the tuple.

    Returns:
        `(x, targets, weights)`; weights None where there are none.

    Raises:
        TypeError, ValueError: not a tuple of arrays of one length; no example, or fewer than a batch; NaN or Inf (with row
            and column); targets that the loss cannot mean; weights that are negative or all zero; params of another net.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> check_data(rule, net.init(jax.random.key(0)), (jnp.ones((2, 3)), jnp.array([0, 2])))
    Traceback (most recent call last):
    ValueError: `targets` must be labels in 0 ... 1 for 2 outputs, got 2 in row 1. Labels that count from 1? Pass `targets - 1`.
    """
    if not (isinstance(data, tuple) and len(data) in (2, 3)):
        raise TypeError(f"`{name}` must be a tuple (x, targets) or (x, targets, weights) of arrays, got {type(data).__name__}.")
    rows = len(data[0]) if getattr(data[0], "shape", ()) else 0
    for part, value in zip(("x", "targets", "weights"), data, strict=False):
        _check.is_array(part, value)
        if value.ndim < 1:
            raise ValueError(f"`{part}` is a single number, expected an array with a row per example.")
        if value.shape[0] != rows:
            raise ValueError(f"`{part}` has {value.shape[0]} rows but `x` has {rows}: one per example.")
        if value.size == 0:
            raise ValueError(f"`{part}` is empty, shape {tuple(value.shape)}.")
        _check.finite(part, value)
    x, targets = jnp.asarray(data[0]), jnp.asarray(data[1])
    weights = jnp.asarray(data[2]) if len(data) == 3 else None
    if batch_size is not None and batch_size > rows:
        raise ValueError(f"`batch_size` is {batch_size} but `{name}` has only {rows} examples.")
    if weights is not None:
        _check_weights(weights, rows)
    outputs = jax.eval_shape(rule.predict, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    rule.loss.check(outputs, targets)
    return x, targets, weights


def shuffled_batches(key: Key, examples: int, batch_size: int) -> tuple[Array, Array | None]:
    """Shuffled row numbers `[steps, batch]`, and which of them are examples: 1, or 0 for those that fill up the last batch.

    The second is None where every batch is full.
    """
    order = jax.random.permutation(key, examples).astype(jnp.int32)
    missing = -examples % batch_size
    if not missing:
        return order.reshape(-1, batch_size), None
    index = jnp.concatenate([order, jnp.zeros(missing, jnp.int32)]).reshape(-1, batch_size)
    present = (jnp.arange(index.size) < examples).astype(jnp.float32).reshape(index.shape)
    return index, present


def take(a: Array, rows: Array) -> Array:
    """Rows that are known to exist."""
    return a.at[rows].get(mode="promise_in_bounds")


def padded(batch: tuple[Any, Any, Any], batch_size: int) -> tuple[Any, Any, Any]:
    """A batch filled up to `batch_size` by copies of its first row with weight 0.

    >>> padded((np.array([[5.0], [6.0]]), np.array([1, 2]), None), 3)[1:]
    (array([1, 2, 1]), array([1., 1., 0.], dtype=float32))
    """
    x, targets, weights = batch
    missing = batch_size - x.shape[0]
    if missing < 0:
        raise ValueError(f"A batch has {x.shape[0]} examples, more than `batch_size` {batch_size}.")
    weights = np.ones(x.shape[0], np.float32) if weights is None else weights
    if not missing:
        return x, targets, weights
    rows = np.concatenate([np.arange(x.shape[0]), np.zeros(missing, int)])
    return x[rows], targets[rows], np.where(np.arange(batch_size) < x.shape[0], np.asarray(weights)[rows], 0).astype(weights.dtype)


def _check_weights(weights: Any, examples: int) -> None:
    if weights.shape != (examples,):
        raise ValueError(f"`weights` has shape {tuple(weights.shape)}, expected ({examples},): one per example.")
    least = float(np.asarray(weights).min())
    if least < 0 or not float(np.asarray(weights).max()) > 0:
        raise ValueError(f"`weights` must be at least 0 and not all 0, got a least of {least}.")
