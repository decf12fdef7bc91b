"""Losses: optax's names, one value per example, each with its gradient written by hand.

`value(outputs, targets)` is `[batch]`: what optax leaves per element is summed over every axis but
the first, so `l2_loss` of `[batch, out]` is 1/2 sum (y - t)^2 per example. `grad` is the gradient
of each example's own value with respect to its outputs; the mean over the batch lives in one place,
`fnn.backprop`. Narrow dtypes are computed in float32. To add a loss, write one `loss(...)` entry
and put its name into `Name`: the tests run over `LOSSES`.

Sources: lectures 000 (regression, classification), 003 (empirical risk), 004 eqs 5 and 24; values
by optax where it has them to rounding error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import nn
from jax.lax import logistic, stop_gradient
from jax.numpy import exp, expm1, log1p, where
from jax.scipy.special import xlog1py, xlogy

from fnn import _validate
from fnn.factors import widen
from fnn.types import Loss, TargetKind, by_recipe


@by_recipe
def loss(
    name: str,
    value: Callable,
    grad: Callable,
    targets: TargetKind = "numbers",
    **settings: float,
) -> Loss:
    """A loss from functions per element, or per row of the last axis.

    Both get targets of the outputs' dtype (labels: int32), and float32 where outputs are narrower.

    Args:
        name: what tables call it.
        value: `(outputs, targets, **settings) -> [batch, ...]`; the axes after the first are summed
            here.
        grad: `(outputs, targets, **settings) -> like outputs`.
        targets: what targets are, as in `Loss`.
        **settings: numbers above 0 that both take, with their defaults.

    Returns:
        A `Loss` that checks shapes and dtypes before it computes; `loss(setting=number)` changes a
        setting. The value and the gradient of a row with a label out of range are NaN.

    Raises:
        ValueError: `targets` is no kind of targets.

    >>> cubic = loss("cubic", lambda y, t: abs(y - t) ** 3, lambda y, t: 3 * (y - t) * abs(y - t))
    >>> cubic.value(jnp.array([[2.0, 1.0]]), jnp.zeros((1, 2)))
    Array([9.], dtype=float32)
    """
    _validate.one_of("kind of targets", targets, get_args(TargetKind))

    def per_example(outputs, t):
        y, t = _enter(name, targets, outputs, t)
        each = value(y, t, **settings)
        values = each.sum(range(1, each.ndim))
        return _leave(targets, outputs, t, values)

    def gradient(outputs, t):
        y, t = _enter(name, targets, outputs, t)
        return _leave(targets, outputs, t, grad(y, t, **settings))

    def check(outputs, t):
        _check_shapes(name, targets, outputs, t)
        _validate.finite("targets", t)
        _check_values(targets, np.asarray(t), outputs)

    def correct(outputs, t):
        y, t = _enter(name, targets, outputs, t)
        hit = _is_correct(targets, y, t)
        return hit.all(range(1, hit.ndim))

    def with_settings(**new):
        changed = dict(settings)
        for setting, number in new.items():
            _validate.one_of(f"setting of {name}", setting, settings)
            _validate.positive(setting, number)
            changed[setting] = float(number)
        return loss(name, value, grad, targets, **changed)

    decides = None if targets == "numbers" else correct
    return Loss(name, per_example, gradient, targets, check, decides, with_settings)


@by_recipe
def from_function(
    value: Callable,
    name: str = "",
    targets: TargetKind = "numbers",
) -> Loss:
    """A loss from its value alone; the gradient is by `jax.vjp`.

    Args:
        value: `(outputs, targets) -> [batch, ...]`; the axes after the first are summed, as for
            optax's losses.
        name: what tables call it; by default the function's.
        targets: what targets are, as in `Loss`.

    Returns:
        A `Loss`.

    Raises:
        TypeError, ValueError: `value` is no function, or `targets` no kind of targets.

    >>> import optax
    >>> cosine = from_function(optax.cosine_distance)
    >>> cosine, cosine.value(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 1.0]]))
    (cosine_distance, Array([1.], dtype=float32))
    """
    _validate.is_function("value", value, "(outputs, targets) -> [batch]")

    def grad(outputs, t):
        values, pullback = jax.vjp(lambda y: value(y, t), outputs)
        return pullback(jnp.ones_like(values))[0]

    name = name or getattr(value, "__name__", "loss")
    return loss(name, value, grad, targets)


def _enter(name, kind, outputs, t):
    """Checked arrays for the formulas: float32 at least; an invalid label becomes -1."""
    _check_shapes(name, kind, outputs, t)
    _validate.fits("targets", t)
    outputs = widen(jnp.asarray(outputs))
    t = jnp.asarray(t)
    if kind != "labels":
        return outputs, t.astype(outputs.dtype)
    t = t.astype(int)  # 64 bits stay, and int8 does not hold the number of 300 classes
    valid = (t >= 0) & (t < outputs.shape[-1])
    return outputs, where(valid, t, -1).astype(jnp.int32)


def _leave(kind, outputs, t, found):
    """Values or gradients in the dtype of the outputs; NaN where a label is invalid."""
    if kind == "labels":
        # Not in the outputs: XLA's exp of a constant NaN is a number on CPUs (jaxlib 0.10.2).
        invalid = (t < 0).any(range(found.ndim, t.ndim))
        invalid = jnp.expand_dims(invalid, range(t.ndim, found.ndim))
        found = found * where(invalid, jnp.nan, 1)  # NaN in derivatives too
    return found.astype(jnp.asarray(outputs).dtype)


def _check_shapes(name, kind, outputs, t):
    """Raises unless the targets have the shape and the dtype that a loss of `outputs` takes."""
    _validate.is_float("outputs", outputs)
    _validate.is_array("targets", t)
    shapes = f"{name}: `targets` has shape {t.shape} but `outputs` has"
    if kind == "labels":
        _check_labels(name, shapes, outputs, t)
        return
    if t.shape != outputs.shape:
        raise ValueError(
            f"{shapes} {outputs.shape}; they must be equal (nothing is broadcast). "
            "One output? Pass `targets[:, None]`. Labels? Use "
            "softmax_cross_entropy_with_integer_labels, or `jax.nn.one_hot(targets, classes)`."
        )
    if jnp.issubdtype(t.dtype, jnp.floating):
        _validate.same_dtype("targets", t, "outputs", outputs)


def _check_labels(name, shapes, outputs, t):
    """Raises unless the targets are whole numbers, one per row of the outputs."""
    if not jnp.issubdtype(t.dtype, jnp.integer):
        raise TypeError(
            f"{name}: `targets` must be whole-number labels, got {t.dtype}. Float labels? "
            "`targets.astype(jnp.int32)`. One-hot rows? Use softmax_cross_entropy."
        )
    expected = outputs.shape[:-1]
    if t.shape != expected:
        raise ValueError(
            f"{shapes} shape {outputs.shape}, [batch, ..., classes]; expected {expected}, "
            "one label per row."
        )


UNIT = "be probabilities in 0 ... 1, got {} in row {}. Signs -1, 1? Pass `(targets + 1) / 2`."
# By kind: what concrete targets must be.
EXPECTED = {
    "numbers": "be whole numbers that the outputs' dtype holds exactly, got {} in row {}. "
    "Scale them, or pass floats.",
    "bits": UNIT,
    "probabilities": UNIT,
    "signs": "be -1 or 1, got {} in row {}. Classes 0, 1? Pass `2 * targets - 1`.",
    "one_hot": UNIT,
    "labels": "be labels in 0 ... {2} for {3} outputs, got {0} in row {1}. "
    "Labels that count from 1? Pass `targets - 1`.",
}


def _check_values(kind, t, outputs):
    """Raises where concrete targets are not what the loss takes."""
    classes = outputs.shape[-1]
    last = classes - 1 if kind == "labels" else 1
    valid = (t >= 0) & (t <= last)
    if kind == "signs":
        valid = abs(t) == 1
    if kind == "numbers":
        wide = np.promote_types(outputs.dtype, np.float32)
        held = np.asarray(jnp.asarray(t), wide)  # JAX may keep 32 bits of 64
        is_held = held == t.astype(np.longdouble)
        valid = is_held | (t.dtype.kind not in "iu")
    _require(valid, t, EXPECTED[kind], last, classes)
    if kind == "one_hot":
        text = "have rows that sum to 1, got {:.6g} in row {}. A label out of range has a row of 0."
        sums = t.sum(-1, dtype=np.float64)
        valid = abs(sums - 1) <= 1e-2
        _require(valid, sums, text)


def _require(valid, found, text, *more):
    """Raises a ValueError that shows the first of `found` that is not valid."""
    if not valid.all():
        place = tuple(np.argwhere(~valid)[0])
        expected = text.format(found[place], place[0], *more)
        raise ValueError(f"`targets` must {expected}")


CUTS = {"bits": 0, "signs": 0, "probabilities": 0.5}  # above which an output says yes


def _is_correct(kind, outputs, t):
    """Whether an element, or a row of classes, is right."""
    if kind in CUTS:
        says_yes = outputs > CUTS[kind]
        return says_yes == (t > 0.5)
    if kind == "one_hot":
        t = t.argmax(-1)
    label = outputs.argmax(-1)
    return label.astype(t.dtype) == t


def _probability_grad(p, t):
    # -t/p + (1 - t)/(1 - p) = (p - t) / (p (1 - p)); 1 and -1 for right and certain answers
    size = p * (1 - p)
    certain = (p == t) & (size == 0)
    return where(certain, 1 - 2 * t, (p - t) / where(certain, 1, size))


def _shift(z):
    """`z - max`: the softmax is the same, and its exponentials are at most 1."""
    top = stop_gradient(z.max(-1, keepdims=True))
    return z - where(jnp.isfinite(top), top, 0)


def _softmax_parts(z):
    """`z - max`, its exponentials, and their sums: of the ones, and of those below 1."""
    shifted = _shift(z)
    e = exp(shifted)
    below = where(e < 1, e, 0)
    ones = (e - below).sum(-1, keepdims=True)
    rest = below.sum(-1, keepdims=True)
    return shifted, e, ones, rest


def _cross_entropy(z, t):
    shifted, _, ones, rest = _softmax_parts(z)
    log_sum = log1p(ones - 1 + rest)
    surprise = log_sum - shifted  # -ln p
    return (t * surprise).sum(-1)


def _cross_entropy_grad(z, t):
    # p - t, and for p > 1/2 the equal (1 - t) - (1 - p); the sum of t is 1 for a distribution
    _, e, ones, rest = _softmax_parts(z)
    p = e / (ones + rest)
    others = (ones - e + rest) / (ones + rest)
    total = t.sum(-1, keepdims=True)
    return where(p > 0.5, total - t - total * others, total * p - t)


def _label_parts(z, labels):
    """The exponentials of all but the label, and `z - max` at the label."""
    shifted = _shift(z)
    at_label = nn.one_hot(labels, z.shape[-1], dtype=bool)
    # -inf before the exp and not 0 after it: XLA then holds one array less
    others = exp(where(at_label, -jnp.inf, shifted))
    own = jnp.take_along_axis(shifted, labels[..., None], axis=-1)
    return others, own


def _label_value(z, labels):
    others, own = _label_parts(z, labels)
    rest = others.sum(-1, keepdims=True)
    surprise = log1p(rest + expm1(own)) - own
    return surprise[..., 0]


def _label_grad(z, labels):
    others, own = _label_parts(z, labels)
    rest = others.sum(-1, keepdims=True)
    errors = _put(others, labels, -rest[..., 0])
    return errors / (rest + exp(own))


@functools.partial(jnp.vectorize, signature="(classes),(),()->(classes)")
def _put(row, label, number):
    return row.at[label].set(number)


# Lecture 000 (its printed sqrt(Y^2 - T^2) is wrong): 1/2 sum (y - t)^2, dE/dy = y - t.
l2_loss = loss("l2_loss", optax.l2_loss, lambda y, t: y - t)
squared_error = loss("squared_error", optax.squared_error, lambda y, t: 2 * (y - t))
# e^2/2 where |e| <= delta, and delta (|e| - delta/2) beyond, for e = y - t.
huber_loss = loss(
    "huber_loss", optax.huber_loss, lambda y, t, delta: (y - t).clip(-delta, delta), delta=1.0
)
# ln cosh(y - t).
log_cosh = loss("log_cosh", optax.log_cosh, lambda y, t: jnp.tanh(y - t))
# max(0, 1 - y t) for t = -1 or 1; at the kink the gradient is 0, as for jax.nn.relu.
hinge_loss = loss(
    "hinge_loss",
    optax.hinge_loss,
    lambda y, t: -t * jnp.maximum(jnp.sign(1 - y * t), 0),  # unlike a comparison, it passes NaN on
    "signs",
)
# Lecture 004 eq 24 with a = s(z): -(t ln s(z) + (1 - t) ln(1 - s(z))). dE/dz = a - t cancels for a
# right answer; with 1 - a = s(-z) it is (1 - t) a - t (1 - a).
sigmoid_binary_cross_entropy = loss(
    "sigmoid_binary_cross_entropy",
    optax.sigmoid_binary_cross_entropy,
    lambda z, t: (1 - t) * logistic(z) - t * logistic(-z),
    "bits",
)
# Lecture 004 eq 5, on probabilities as printed; infinite where a certain answer is wrong (on logits
# it stays finite).
binary_cross_entropy = loss(
    "binary_cross_entropy",
    lambda p, t: -xlogy(t, p) - xlog1py(1 - t, -p),
    _probability_grad,
    "probabilities",
)
# Lecture 000: H(p, q) = -sum p ln q, q = softmax(z).
softmax_cross_entropy = loss(
    "softmax_cross_entropy", _cross_entropy, _cross_entropy_grad, "one_hot"
)
softmax_cross_entropy_with_integer_labels = loss(
    "softmax_cross_entropy_with_integer_labels", _label_value, _label_grad, "labels"
)
# Lecture 000: KL(t || q) = sum t ln(t/q); the outputs are ln q.
kl_divergence = loss(
    "kl_divergence",
    optax.kl_divergence,
    lambda log_q, t: -where(t >= 0, t, jnp.nan),
    "one_hot",
)

# For completion by a type checker.
Name = Literal[
    "l2_loss",
    "squared_error",
    "huber_loss",
    "log_cosh",
    "hinge_loss",
    "sigmoid_binary_cross_entropy",
    "binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "kl_divergence",
]


def get(name: Name | str | Loss) -> Loss:
    """The loss of that name; a loss is returned as it is.

    Args:
        name: a name out of `Name`, or a loss.

    Returns:
        A loss.

    Raises:
        ValueError: no loss has this name; offers the nearest.

    >>> get("l2_loss").value(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
    Array([2.5], dtype=float32)
    """
    if isinstance(name, Loss):
        return name
    _validate.one_of("loss", name, get_args(Name))
    return globals()[name]


LOSSES = tuple(map(get, get_args(Name)))
