"""Forward-forward: two forward passes and no backward one.

Every block learns for itself to tell right labels from wrong ones.

The label is written over the first inputs. Positive examples carry the right one, negative ones a
wrong one. With the input of a block normalised, h_l = block_l(n(h_{l-1})), n(h) = h /
sqrt(mean(h^2)), a block raises its goodness G = sum(h^2) above a threshold for positive examples
and lowers it below for negative ones:

    E_l = softplus(theta - G+) + softplus(G- - theta),    dE_l/dh+ = -2 h+ s(theta - G+),
    dE_l/dh- = 2 h- s(G- - theta) dw_l = n(h_{l-1})^T dz_l

with s the sigmoid and theta a multiple of the number of units. The first block takes the inputs as
they are. The last block is a softmax on the last hidden one's activities for a neutral label,
1/classes each; no error goes back from it.

Source: Hinton (2022), arXiv:2212.13345, sections 2 and 3; lecture 003 (forward-forward).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import check_net_and_loss, forward_pass, output_error, weighed, weighted_mean
from fnn.nets.blocks import hidden_blocks, width
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params, Rule, at_least_float32

PREDICTIONS = ("softmax", "goodness")
EPSILON = 1e-8


@dataclass(frozen=True, repr=False)
class ForwardForward(Rule):
    """A `Rule` that shows its goodness, for `fnn.alignment`.

    Attributes:
        goodness: `(params, state, x, targets) -> (positive [layers, batch], negative [layers,
            batch], thresholds [layers])`.
    """

    goodness: Callable[..., tuple[Array, Array, Array]]


def forward_forward(
    net: Layer,
    loss: Loss,
    *,
    threshold: float = 1.0,
    amplitude: float = 1.0,
    predict: str = "softmax",
) -> ForwardForward:
    """Layer-local learning by goodness.

    Args:
        net: a chain of at least two blocks: the hidden ones learn by goodness, the last is the
            softmax.
        loss: one for classes, labels or one-hot rows; the softmax learns by it.
        threshold: theta per unit, above 0: activities of mean square 1 are just at a threshold of
            1.
        amplitude: what a label is written as, where the other inputs of the label are 0; above 0.
        predict: `"softmax"`, by the last block; or `"goodness"`, the sum of G over the hidden
            blocks but the first (over that one, if it is alone) for every label written in turn:
            outputs are goodnesses then, and `classes` passes forward are run.

    Returns:
        A rule whose state is a key, for the wrong labels; its value is the last block's loss.

    Raises:
        TypeError, ValueError: an argument cannot be meant; at the call, `x` is not `[batch,
            features]` with at least as many features as classes, or there is but one class.

    >>> import fnn
    >>> net = fnn.mlp((6, 4, 4, 3))
    >>> rule = forward_forward(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 6)), jnp.zeros(5, int))
    """
    check_net_and_loss(net, loss)
    chain = hidden_blocks("forward_forward", net)
    warn_if_flat("forward_forward", net)
    if not _of_one_class(loss):
        raise ValueError(
            f"`loss` of forward_forward must be one for one class per example, since a label is written into the input; got {loss}. Take "
            "`softmax_cross_entropy`, or `softmax_cross_entropy_with_integer_labels`."
        )
    _validate.positive("threshold", threshold)
    _validate.positive("amplitude", amplitude)
    # a NumPy number would widen the arrays
    threshold, amplitude = float(threshold), float(amplitude)
    _validate.one_of("predict", predict, PREDICTIONS)

    def hidden(parts: Any, x: Array) -> tuple[list[Array], list[Any]]:
        return _hidden(chain.layers[:-1], parts[:-1], x)

    def inputs(x: Array, targets: Array, key: Key, classes: int) -> Array:
        return _right_and_wrong(x, _labels(targets), key, classes, amplitude)

    def neutral(x: Array, classes: int) -> Array:
        return written(x, jnp.full((x.shape[0], classes), amplitude / classes, x.dtype))

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Key]:
        state, key = jax.random.split(state)
        parts, x = chain.split(params), jnp.asarray(x)
        classes = width(parts[-1])
        hs, kept = hidden(parts, inputs(x, targets, key, classes))
        dys = [_goodness_gradient(h, threshold, weights) for h in hs]

        def last(x: Array) -> tuple[Array, Any]:  # neutral examples teach the last block alone
            return chain.layers[-1].forward(
                parts[-1], normalised(hidden(parts, neutral(x, classes))[0][-1])
            )

        outputs, residuals, values = forward_pass(last, loss, x, targets)
        error = weighed(output_error(loss, outputs, targets), weights)
        return (
            weighted_mean(values, weights),
            chain.backward(parts, [*kept, residuals], [*dys, error]),
            state,
        )

    def outputs_of(params: Params, x: Array) -> Array:
        parts, classes = chain.split(params), width(chain.split(params)[-1])
        _check_inputs(x, classes)
        x = jnp.asarray(x)
        if predict == "softmax":
            return chain.layers[-1].apply(
                parts[-1], normalised(hidden(parts, neutral(x, classes))[0][-1])
            )

        def of(label: Array) -> Array:
            hs = hidden(parts, written(x, jnp.broadcast_to(label[None], (x.shape[0], classes))))[0]
            return jnp.stack([_goodness(h) for h in (hs[1:] or hs)]).sum(0)

        return jax.vmap(of, out_axes=1)(amplitude * jnp.eye(classes, dtype=x.dtype))

    def goodness(
        params: Params, state: Key, x: Array, targets: Array
    ) -> tuple[Array, Array, Array]:
        parts, m = chain.split(params), x.shape[0]
        hs, _ = hidden(
            parts, inputs(jnp.asarray(x), targets, jax.random.split(state)[1], width(parts[-1]))
        )
        of = jnp.stack([_goodness(h) for h in hs])
        return of[:, :m], of[:, m:], jnp.array([threshold * h.shape[-1] for h in hs], of.dtype)

    return ForwardForward(
        "forward_forward", lambda key, params: key, value_and_grad, outputs_of, loss, goodness
    )


def _hidden(
    layers: Sequence[Layer], parts: Sequence[Params], x: Array
) -> tuple[list[Array], list[Any]]:
    """The activities and residuals of every hidden block."""
    hs, kept = [], []
    for i, (layer, p) in enumerate(zip(layers, parts, strict=True)):
        h, residuals = layer.forward(p, normalised(hs[-1]) if i else x)
        hs.append(h)
        kept.append(residuals)
    return hs, kept


def _right_and_wrong(x: Array, labels: Array, key: Key, classes: int, amplitude: float) -> Array:
    """Positive examples and, below them, negative ones."""
    _check_inputs(x, classes)
    both = jnp.concatenate([labels, wrong_labels(key, labels, classes)])
    return written(
        jnp.concatenate([x, x]), amplitude * jax.nn.one_hot(both, classes, dtype=x.dtype)
    )


def written(x: Array, label: Array) -> Array:
    """The label `[batch, classes]` over the first features of `[batch, features]`.

    >>> written(jnp.zeros((1, 4)), jnp.ones((1, 2)))
    Array([[1., 1., 0., 0.]], dtype=float32)
    """
    return jnp.concatenate([label, x[:, label.shape[1] :]], axis=1)


def wrong_labels(key: Key, labels: Array, classes: int) -> Array:
    """For each label another one, all others alike likely.

    >>> bool((wrong_labels(jax.random.key(0), jnp.zeros(99, int), 3) != 0).all())
    True
    """
    return (labels + jax.random.randint(key, labels.shape, 1, classes, labels.dtype)) % classes


def normalised(h: Array) -> Array:
    """Every row at mean square 1, so that a block cannot read the goodness of the one before.

    Zeros stay zeros.

    >>> normalised(jnp.array([[3.0, -3.0]])).round(4)
    Array([[ 1., -1.]], dtype=float32)
    """
    wide = at_least_float32(h)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + EPSILON)).astype(h.dtype)


def _goodness(h: Array) -> Array:
    """`[batch]`, the sum of squared activities."""
    wide = at_least_float32(h)
    return (wide * wide).sum(-1)


def _goodness_gradient(h: Array, threshold: float, weights: Array | None) -> Array:
    """dE_l/dh of positive examples and, below them, negative ones, each weighed in its mean."""
    m = h.shape[0] // 2
    over = _goodness(h) - threshold * h.shape[-1]
    slope = jnp.concatenate([-jax.lax.logistic(-over[:m]), jax.lax.logistic(over[m:])])
    dy = (2 * slope[:, None] * at_least_float32(h)).astype(h.dtype)
    return jnp.concatenate([weighed(dy[:m], weights), weighed(dy[m:], weights)])


def _of_one_class(loss: Loss) -> bool:
    """Whether a loss calls the largest output right, whatever its sign.

    Losses of several yes-or-no questions do not.
    """
    outputs = jnp.array([[-1.0, -2.0]])
    for targets in (jnp.array([0]), jnp.array([[1.0, 0.0]])):
        with contextlib.suppress(TypeError, ValueError), jax.ensure_compile_time_eval():
            return loss.correct is not None and bool(loss.correct(outputs, targets)[0])
    return False


def _labels(targets: Array) -> Array:
    t = jnp.asarray(targets)
    return (t if jnp.issubdtype(t.dtype, jnp.integer) and t.ndim == 1 else t.argmax(-1)).astype(
        jnp.int32
    )


def _check_inputs(x: Array, classes: int) -> None:
    if classes < 2:
        raise ValueError(
            "forward_forward: `net` has one output; negative examples need a second class. Use two outputs and softmax."
        )
    if x.ndim != 2 or x.shape[1] < classes:
        raise ValueError(
            f"forward_forward: `x` has shape {tuple(x.shape)}, expected [batch, features] with at least {classes} features, over which "
            "the label is written. Put zeros before the features: `jnp.pad(x, ((0, 0), (classes, 0)))`."
        )
