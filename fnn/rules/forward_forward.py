"""Forward-forward: two forward passes and no backward one.

Every block learns on its own to tell right labels from wrong ones.

The label is written over the first inputs. Positive examples carry the right one, negative ones a
wrong one. A block gets its input normalised, h_l = block_l(n(h_{l-1})), n(h) = h / sqrt(mean(h^2)).
It raises its goodness G = sum(h^2) above a threshold for positive examples and lowers it below for
negative ones:

    E_l = softplus(theta - G+) + softplus(G- - theta),
    dE_l/dh+ = -2 h+ s(theta - G+),    dE_l/dh- = 2 h- s(G- - theta),    dw_l = n(h_{l-1})^T dz_l

with s the sigmoid and theta a multiple of the number of units. The first block takes the inputs as
they are. The last block is a softmax on the last hidden one's activities for a neutral label,
1/classes each; no error goes back from it.

Source: Hinton (2022), arXiv:2212.13345, sections 2 and 3; lecture 003 (forward-forward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from fnn import _validate
from fnn.backprop import fill_rows, share_rows
from fnn.backprop import value_and_grad as backpropagate
from fnn.factors import scale_rows, widen
from fnn.nets.blocks import param_shapes, width
from fnn.rules._blockwise import hidden_chain
from fnn.rules._noise import keep_key
from fnn.types import Array, ArrayLike, Key, Layer, Loss, Rule, by_recipe

Prediction = Literal["softmax", "goodness"]
EPSILON = 1e-8


@dataclass(frozen=True, repr=False, eq=False)
class ForwardForward(Rule):
    """A `Rule` that shows its goodness, for `fnn.alignment`.

    Attributes:
        goodness: `(params, state, x, targets) -> (positive [layers, batch], negative [layers,
            batch], thresholds [layers])`.
    """

    goodness: Callable[..., tuple[Array, Array, Array]]


@by_recipe
def forward_forward(
    net: Layer,
    loss: Loss,
    *,
    threshold: float = 1.0,
    amplitude: float = 1.0,
    predict: Prediction = "softmax",
) -> ForwardForward:
    """Layer-local learning by goodness.

    Args:
        net: a chain of at least two blocks: the hidden ones learn by goodness, the last is the
            softmax.
        loss: one whose targets are labels or one-hot rows; the softmax learns by it.
        threshold: theta per unit, above 0: activities of mean square 1 are just at a threshold of
            1.
        amplitude: what a label is written as, where the other inputs of the label are 0; above 0.
        predict: `"softmax"`, by the last block; or `"goodness"`, the sum of G over the hidden
            blocks but the first (over that one, if it is the only one) for every label in turn:
            outputs are goodnesses then, and `classes` forward passes are run.

    Returns:
        A rule whose state is a key, for the wrong labels; its value is the last block's loss.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, `x` is not `[batch, features]`
            with at least as many features as classes, or there is but one class.

    >>> import fnn
    >>> net = fnn.mlp((6, 4, 4, 3))
    >>> rule = forward_forward(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> x, labels = jnp.ones((5, 6)), jnp.zeros(5, int)
    >>> value, grads, state = rule.value_and_grad(params, state, x, labels)
    """
    chain = hidden_chain("forward_forward", net, loss)
    _check_loss(loss)
    _validate.positive("threshold", threshold)
    _validate.positive("amplitude", amplitude)
    _validate.one_of("predict", predict, get_args(Prediction))
    theta = float(threshold)  # a NumPy number would widen the arrays
    softmax = chain.layers[-1]
    classes = width(param_shapes(softmax))
    codes = float(amplitude) * np.eye(classes)  # what each label is written as
    neutral = codes.mean(0)
    by_softmax = backpropagate(softmax, loss)

    def features(params, x):
        """The inputs of the last block, for a neutral label."""
        inputs = write_label(x, neutral)
        hs, _ = _hidden(chain, params, inputs)
        return normalise(hs[-1])

    def value_and_grad(params, state, x, targets, weights=None):
        state, key = jax.random.split(state)
        x = fill_rows(x, weights)
        *parts, last = chain.split(params)
        h = features(params, x)
        value, last_grads = by_softmax(last, h, targets, weights)
        inputs = _right_and_wrong(loss, codes, x, targets, key)
        hs, residuals = _hidden(chain, params, inputs)
        grads = []
        for i, p in enumerate(parts):
            layer = chain.layers[i]
            dy = _goodness_gradient(hs[i], theta, weights)
            block_grads, _ = layer.backward(p, residuals[i], dy)
            grads.append(block_grads)
        grads = chain.join([*grads, last_grads])
        return value, grads, state

    def outputs(params, x):
        if predict == "goodness":
            return _scores(chain, params, x, codes)
        *_, last = chain.split(params)
        return softmax.apply(last, features(params, x))

    def goodness(params, state, x, targets):
        _, key = jax.random.split(state)
        inputs = _right_and_wrong(loss, codes, x, targets, key)
        hs, _ = _hidden(chain, params, inputs)
        both = jnp.stack([_goodness(h) for h in hs])
        right, wrong = jnp.split(both, 2, axis=1)
        thresholds = [theta * h.shape[-1] for h in hs]
        return right, wrong, jnp.array(thresholds, both.dtype)

    return ForwardForward("forward_forward", keep_key, value_and_grad, outputs, loss, goodness)


def _right_and_wrong(loss, codes, x, targets, key):
    """Inputs with right labels and, below them, with wrong ones."""
    if loss.targets == "one_hot":
        targets = targets.argmax(-1)
    right = jnp.asarray(targets, jnp.int32)
    wrong = wrong_labels(key, right, len(codes))
    labels = jnp.concatenate([right, wrong])
    both = jnp.concatenate([x, x])
    written = jnp.asarray(codes)[labels]
    return write_label(both, written)


def _hidden(chain, params, x):
    """The activities and residuals of every hidden block."""
    hs, kept = [], []
    *parts, _ = chain.split(params)
    for layer, p in zip(chain.layers, parts, strict=False):
        h, residuals = layer.forward(p, x)
        hs.append(h)
        kept.append(residuals)
        x = normalise(h)
    return hs, kept


def _scores(chain, params, x, codes):
    """The goodness of every label, `[batch, classes]`."""

    def score(code):
        inputs = write_label(x, code)
        hs, _ = _hidden(chain, params, inputs)
        counted = hs[1:] or hs
        return sum(map(_goodness, counted))

    score_labels = jax.vmap(score, out_axes=1)
    return score_labels(jnp.asarray(codes))


def _goodness_gradient(h, theta, weights):
    """dE_l/dh of positive examples and, below them, negative ones, as shares in their means."""
    limit = theta * h.shape[-1]
    over = _goodness(h) - limit
    over = over.reshape(2, -1)
    sign = jnp.array([[-1], [1]], over.dtype)
    share = share_rows(jnp.ones_like(over[0]), weights)
    chance = lax.logistic(sign * over)
    slope = 2 * sign * chance * share[None]  # -2 s(theta - G+) and 2 s(G- - theta)
    return scale_rows(h, slope.ravel()).astype(h.dtype)


def _goodness(h):
    """`[batch]`, the sum of squared activities."""
    squares = jnp.square(widen(h))
    return squares.sum(-1)


def write_label(
    x: Float[ArrayLike, "batch features"], label: Float[ArrayLike, "... classes"]
) -> Float[Array, "batch features"]:
    """The label in the place of the first features.

    Raises:
        ValueError: `x` is no rows, or they are narrower than the label.

    >>> write_label(jnp.zeros((1, 4)), jnp.ones(2))
    Array([[1., 1., 0., 0.]], dtype=float32)
    """
    classes = label.shape[-1]
    if x.ndim != 2 or x.shape[1] < classes:
        raise ValueError(
            f"forward_forward: `x` has shape {tuple(x.shape)}, expected [batch, features] with at "
            f"least {classes} features, over which the label is written. Put zeros before the "
            "features: `jnp.pad(x, ((0, 0), (classes, 0)))`."
        )
    rows = jnp.asarray(x)
    label = label.astype(x.dtype)
    return rows.at[:, :classes].set(label)


def wrong_labels(key: Key, labels: Int[Array, " batch"], classes: int) -> Int[Array, " batch"]:
    """For each label another one; all others are equally likely.

    >>> bool((wrong_labels(jax.random.key(0), jnp.zeros(99, int), 3) != 0).all())
    True
    """
    shift = jax.random.randint(key, labels.shape, 1, classes, labels.dtype)
    return (labels + shift) % classes


def normalise(h: Float[Array, "batch units"]) -> Float[Array, "batch units"]:
    """Every row at mean square 1, so that a block cannot read the goodness of the one before.

    Zeros stay zeros.

    >>> normalise(jnp.array([[3.0, -3.0]])).round(4)
    Array([[ 1., -1.]], dtype=float32)
    """
    mean_square = _goodness(h) / h.shape[-1]
    scale = lax.rsqrt(mean_square + EPSILON)
    return scale_rows(h, scale).astype(h.dtype)


def _check_loss(loss):
    if loss.targets not in ("labels", "one_hot"):
        raise ValueError(
            "`loss` of forward_forward must be one for one class per example, since a label is "
            f"written into the input; {loss} takes {loss.targets}. Take `softmax_cross_entropy`, "
            "or `softmax_cross_entropy_with_integer_labels`. A loss of your own? Say what its "
            'targets are: `fnn.Loss(..., targets="labels")`.'
        )
