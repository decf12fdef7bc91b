"""Losses: optax's names and values, one number per example, each with its gradient written by hand.

`value(outputs, targets)` is `[batch]`: what optax leaves per element is summed over every axis but
the first, so `l2_loss` of `[batch, out]` is 1/2 sum (y - t)^2 per example. `grad` is the gradient
of each example's own value with respect to its outputs; the mean over the batch lives in one place,
`fnn.backprop`. To add a loss, write one `Loss(...)` (most easily by `loss(...)`) and put it into
`LOSSES`: the tests run over that tuple.

Sources: lectures 000 (regression, classification), 003 (empirical risk), 004 eqs 5 and 24; values
as in `optax.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import xlog1py, xlogy

from fnn import _validate
from fnn.types import Array, Loss


@dataclass(frozen=True)
class Targets:
    """What a loss takes for targets.

    Their shape (checked while tracing) and their values (checked where data enters).
    """

    # whole numbers [batch, ...] for outputs [batch, ..., classes]; else shaped and typed like the
    # outputs
    labels: bool
    check: Callable[[np.ndarray, int], None]  # (concrete targets, classes); raises ValueError
    # elementwise or per row; all must hold for an example to be correct
    correct: Callable[[Array, Array], Array] | None


def loss(
    name: str,
    value: Callable[..., Array],
    grad: Callable[..., Array],
    targets: Targets,
    **settings: Any,
) -> Loss:
    """A loss from functions per element, or per row of the last axis.

    Args:
        name: what tables call it.
        value: `(outputs, targets, **settings) -> [batch, ...]`; the axes after the first are summed
            here.
        grad: `(outputs, targets, **settings) -> like outputs`.
        targets: one of `REAL`, `UNIT`, `SIGNS`, `DISTRIBUTION`, `LABELS`.
        **settings: numbers that both take, with their defaults.

    Returns:
        A `Loss` that checks shapes and dtypes before it computes; `loss(setting=number)` changes a
        setting.
    """

    def checked(outputs: Any, t: Any) -> tuple[Array, Array]:
        return jnp.asarray(outputs), _check_shapes(name, targets, outputs, t)

    def per_example(outputs: Array, t: Array) -> Array:
        v = value(*checked(outputs, t), **settings)
        return v.sum(tuple(range(1, v.ndim)))

    def gradient(outputs: Array, t: Array) -> Array:
        return grad(*checked(outputs, t), **settings)

    def check(outputs: Any, t: Any) -> None:
        _check_shapes(name, targets, outputs, t)
        _validate.finite("targets", t)
        targets.check(np.asarray(t), outputs.shape[-1])

    def correct(outputs: Array, t: Array) -> Array:
        assert targets.correct is not None
        hit = targets.correct(*checked(outputs, t))
        return hit.all(tuple(range(1, hit.ndim)))

    def with_parameters(**new: Any) -> Loss:
        for setting, number in new.items():
            _validate.one_of(f"setting of {name}", setting, settings)
            _validate.positive(setting, number)
        return loss(
            name,
            value,
            grad,
            targets,
            **{**settings, **{k: np.asarray(v).item() for k, v in new.items()}},
        )

    return Loss(
        name, per_example, gradient, check, correct if targets.correct else None, with_parameters
    )


def _check_shapes(name: str, targets: Targets, outputs: Any, t: Any) -> Array:
    """The targets as an array that fits the outputs; raises where shapes or dtypes cannot be meant."""
    _validate.is_float("outputs", outputs)
    _validate.is_array("targets", t)
    least = 2 if targets.labels else 1
    if outputs.ndim < least:
        raise ValueError(
            f"{name}: `outputs` has shape {outputs.shape}, expected [batch{', ..., classes' if targets.labels else ', ...'}]."
        )
    if not targets.labels:
        if t.shape != outputs.shape:
            raise ValueError(
                f"{name}: `targets` has shape {tuple(t.shape)} but `outputs` has {tuple(outputs.shape)}; they must be equal (nothing is "
                f"broadcast). {_mend_shape(outputs.shape, t)}"
            )
        if jnp.issubdtype(t.dtype, jnp.floating):
            _validate.same_dtype("targets", t, "outputs", outputs)
        return jnp.asarray(t).astype(outputs.dtype)  # whole numbers and bools become floats exactly
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(
            f"{name}: `targets` must be whole-number labels, got {t.dtype}. "
            "Float labels? `targets.astype(jnp.int32)`. One-hot rows? Use softmax_cross_entropy."
        )
    if t.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name}: `targets` has shape {tuple(t.shape)}, expected {tuple(outputs.shape[:-1])}: "
            f"one label per row of `outputs` {tuple(outputs.shape)}."
        )
    return jnp.asarray(t)


def _mend_shape(expected: tuple[int, ...], t: Any) -> str:
    if t.shape == expected[:-1]:
        if expected[-1] == 1:
            return "Pass `targets[:, None]`."
        return "Labels? Use softmax_cross_entropy_with_integer_labels, or `jax.nn.one_hot(targets, classes)`."
    return "Pass `targets.reshape(outputs.shape)` if the order is right."


def _any_number(t: np.ndarray, classes: int) -> None:
    """Finite is enough."""


def _in_unit_interval(t: np.ndarray, classes: int) -> None:
    if ((t < 0) | (t > 1)).any():
        raise ValueError(
            f"`targets` must be probabilities in 0 ... 1, got {t.min()} ... {t.max()}. Signs -1, 1? Pass `(targets + 1) / 2`."
        )


def _plus_or_minus_one(t: np.ndarray, classes: int) -> None:
    if (np.abs(t) != 1).any():
        row = int(np.argwhere(np.abs(t) != 1)[0][0])
        raise ValueError(
            f"`targets` must be -1 or 1, got {np.unique(t[row])} in row {row}. Classes 0, 1? Pass `2 * targets - 1`."
        )


def _rows_sum_to_one(t: np.ndarray, classes: int) -> None:
    _in_unit_interval(t, classes)
    sums = np.asarray(t, np.float64).sum(-1)
    bad = np.argwhere(np.abs(sums - 1) > 1e-2)
    if len(bad):
        raise ValueError(
            f"`targets` must have rows that sum to 1, got {sums[tuple(bad[0])]:.6g} in row {_place(bad[0])}. "
            "A one-hot row of a label out of range is all zeros."
        )


def _labels_in_range(t: np.ndarray, classes: int) -> None:
    bad = np.argwhere((t < 0) | (t >= classes))
    if len(bad):
        raise ValueError(
            f"`targets` must be labels in 0 ... {classes - 1} for {classes} outputs, got {t[tuple(bad[0])]} in row {_place(bad[0])}. "
            "Labels that count from 1? Pass `targets - 1`."
        )


def _place(index: np.ndarray) -> str:
    """A row, or row and position."""
    return str(int(index[0])) if len(index) == 1 else str(tuple(int(i) for i in index))


def _same_argmax(outputs: Array, t: Array) -> Array:
    return outputs.argmax(-1) == t.argmax(-1)


REAL = Targets(False, _any_number, None)
UNIT = Targets(False, _in_unit_interval, lambda z, t: (z > 0) == (t > 0.5))  # for logits
PROBABILITY = Targets(False, _in_unit_interval, lambda p, t: (p > 0.5) == (t > 0.5))
SIGNS = Targets(False, _plus_or_minus_one, lambda y, t: (y > 0) == (t > 0))
DISTRIBUTION = Targets(False, _rows_sum_to_one, _same_argmax)
LABELS = Targets(
    True, _labels_in_range, lambda z, t: z.argmax(-1).astype(jnp.int32) == t.astype(jnp.int32)
)


def _huber(y: Array, t: Array, delta: float) -> Array:
    size = jnp.abs(y - t)  # e^2/2 where |e| <= delta, delta (|e| - delta/2) beyond
    near = jnp.minimum(size, delta)
    return 0.5 * near**2 + delta * (size - near)


def _binary_cross_entropy_grad(p: Array, t: Array) -> Array:
    # -t/p + (1 - t)/(1 - p); a term whose coefficient is 0 is 0 also where its divisor is
    return jnp.where(t == 1, 0, (1 - t) / jnp.where(t == 1, 1, 1 - p)) - jnp.where(
        t == 0, 0, t / jnp.where(t == 0, 1, p)
    )


def _label_value(z: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), labels[..., None], axis=-1)[..., 0]


def _label_grad(z: Array, labels: Array) -> Array:
    # softmax(z) - one_hot(labels), as a scatter into the softmax: no [batch, classes] of zeros and
    # ones is formed
    p = jax.nn.softmax(z, axis=-1)
    rows = p.reshape(-1, z.shape[-1])
    return rows.at[jnp.arange(len(rows)), labels.reshape(-1)].add(-1).reshape(z.shape)


def _softmax_grad(z: Array, t: Array) -> Array:
    # d/dz of -sum t (z - ln sum e^z) = softmax(z) sum(t) - t; sum(t) = 1 for a distribution
    return jax.nn.softmax(z, axis=-1) * t.sum(-1, keepdims=True) - t


# Lecture 000 (its printed sqrt(Y^2 - T^2) is wrong): 1/2 sum (y - t)^2, dE/dy = y - t. optax: half
# the squared error.
l2_loss = loss("l2_loss", lambda y, t: 0.5 * (y - t) ** 2, lambda y, t: y - t, REAL)
squared_error = loss("squared_error", lambda y, t: (y - t) ** 2, lambda y, t: 2 * (y - t), REAL)
huber_loss = loss(
    "huber_loss", _huber, lambda y, t, delta: jnp.clip(y - t, -delta, delta), REAL, delta=1.0
)
log_cosh = loss(
    "log_cosh",
    lambda y, t: jnp.logaddexp(y - t, t - y) - np.log(2.0).astype(y.dtype),
    lambda y, t: jnp.tanh(y - t),
    REAL,
)
# max(0, 1 - y t) for t = -1 or 1; at the kink the gradient is 0, as for jax.nn.relu.
hinge_loss = loss(
    "hinge_loss",
    lambda y, t: jax.nn.relu(1 - y * t),
    lambda y, t: jnp.where(1 - y * t > 0, -t, jnp.zeros_like(t)),
    SIGNS,
)
# -(t ln s(z) + (1 - t) ln(1 - s(z))), stable for every logit: lecture 004 eq 24 with a = s(z);
# dE/dz = a - t.
sigmoid_binary_cross_entropy = loss(
    "sigmoid_binary_cross_entropy",
    lambda z, t: t * jax.nn.softplus(-z) + (1 - t) * jax.nn.softplus(z),
    lambda z, t: lax.logistic(z) - t,
    UNIT,
)
# Lecture 004 eq 5, on probabilities as printed; infinite where a certain answer is wrong (on logits
# it stays finite).
binary_cross_entropy = loss(
    "binary_cross_entropy",
    lambda p, t: -xlogy(t, p) - xlog1py(1 - t, -p),
    _binary_cross_entropy_grad,
    PROBABILITY,
)
# Lecture 000: H(p, q) = -sum p ln q, q = softmax(z).
softmax_cross_entropy = loss(
    "softmax_cross_entropy",
    lambda z, t: -(t * jax.nn.log_softmax(z, axis=-1)).sum(-1),
    _softmax_grad,
    DISTRIBUTION,
)
softmax_cross_entropy_with_integer_labels = loss(
    "softmax_cross_entropy_with_integer_labels", _label_value, _label_grad, LABELS
)
# Lecture 000: KL(t || q) = sum t ln(t/q); the outputs are ln q.
kl_divergence = loss(
    "kl_divergence",
    lambda log_q, t: (xlogy(t, t) - t * log_q).sum(-1),
    lambda log_q, t: -t,
    DISTRIBUTION,
)

LOSSES = (
    l2_loss,
    squared_error,
    huber_loss,
    log_cosh,
    hinge_loss,
    sigmoid_binary_cross_entropy,
    binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    kl_divergence,
)
"""Every loss, by the name that `get` knows it."""


def get(name: str | Loss) -> Loss:
    """The loss of that name; a loss is returned as it is.

    Raises:
        ValueError: no loss has this name; offers the nearest.

    >>> get("l2_loss").value(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
    Array([2.5], dtype=float32)
    """
    if isinstance(name, Loss):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"`loss` must be a name or a Loss, got {name!r}. A function? Make it a loss: `fnn.Loss(name, value, grad)`."
        )
    known = {known_loss.name: known_loss for known_loss in LOSSES}
    _validate.one_of("loss", name, known)
    return known[name]
