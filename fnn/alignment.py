"""How near a rule's update comes to the true gradient: cosines, angles and norms, layer by layer.

Every function here makes a record for `fnn.fit(..., record=..., record_every=...)`, `(params,
rule_state, x, targets, weights=None)`, and can be called by itself. A layer is a block of the net
(`fnn.blocks`). An angle with a vector of zeros is NaN; in float32 an angle below 0.02 degrees is
rounding.

Source: Lillicrap et al. (2016), doi:10.1038/ncomms13276 (angles of deltas and weights); lecture 003
(alternatives to backprop).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.backprop import output_error, value_and_grad, weighted_mean
from fnn.factors import Outer, Scatter, is_factor, keep
from fnn.nets.blocks import blocks
from fnn.nets.combinators import check_net
from fnn.rules._blockwise import LocalRule
from fnn.rules.forward_forward import ForwardForward
from fnn.types import Array, Layer, Params, Rule, at_least_float32

Record = Callable[..., Any]


class Alignment(NamedTuple):
    """A rule's vector beside the true one."""

    cosine: Array  # [layers]
    angle: Array  # [layers], in degrees
    ratio: Array  # [layers], norm over the true one's norm
    cosine_of_all: Array  # [], all layers together
    angle_of_all: Array  # []
    ratio_of_all: Array  # []


class Goodness(NamedTuple):
    """What forward-forward's layers tell real examples from wrong ones by."""

    gap: Array  # [layers], mean goodness of real examples less that of wrong ones
    accuracy: Array  # [layers], share of examples on the right side of the threshold


def update_alignment(rule: Rule, net: Layer) -> Record:
    """The rule's gradient beside the true gradient of its loss, on the same batch.

    Costs one step of backprop.

    The loss is that of what the rule predicts: of `net.apply` for all rules but forward-forward,
    which writes labels into its inputs.

    Args:
        rule: any rule for `net`.
        net: any layer.

    Returns:
        `(params, rule_state, x, targets, weights=None) -> Alignment`.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> found = update_alignment(rule, net)(params, params, jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> found.cosine.round(4)  # its state, the feedback matrices, are the weights: this is backprop
    Array([1., 1.], dtype=float32)
    """
    _check_rule(rule, Rule)
    check_net(net)

    def mean(params: Params, x: Array, targets: Array, weights: Array | None) -> Array:
        return weighted_mean(rule.loss.value(rule.predict(params, x), targets), weights)

    true = value_and_grad(net, rule.loss) if rule.predict == net.apply else jax.value_and_grad(mean)

    def record(
        params: Params, state: Any, x: Array, targets: Array, weights: Array | None = None
    ) -> Alignment:
        ours, exact = (
            f(params, *s, x, targets, weights)[1]
            for f, s in ((rule.value_and_grad, (state,)), (true, ()))
        )
        return compare(net, ours, exact)

    return record


def compare(net: Layer, ours: Params, true: Params) -> Alignment:
    """Two trees like the params of a net, layer by layer.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> params = net.init(jax.random.key(0))
    >>> compare(net, jax.tree.map(lambda p: -2 * p, params), params).angle.round()
    Array([180., 180.], dtype=float32)
    """
    chain = blocks(net)
    dots, squares, true_squares = (
        jnp.stack(
            [_inner(a, b) for a, b in zip(chain.split(left), chain.split(right), strict=True)]
        )
        for left, right in ((ours, true), (ours, ours), (true, true))
    )
    each = _cosine(dots, squares, true_squares)
    of_all = _cosine(dots.sum(), squares.sum(), true_squares.sum())
    ratios = (
        jnp.sqrt(a / b) for a, b in ((squares, true_squares), (squares.sum(), true_squares.sum()))
    )
    ratio, ratio_of_all = ratios
    return Alignment(each, degrees(each), ratio, of_all, degrees(of_all), ratio_of_all)


def weight_angles(rule: LocalRule, net: Layer) -> Record:
    """The angle between every layer's weights and the feedback matrices in their place, in degrees,
    `[layers]`.

    The first layer's is not in use: it hands its error to nobody.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> weight_angles(rule, net)(params, params, None, None).round()
    Array([0., 0.], dtype=float32)
    """
    _check_rule(rule, LocalRule)
    check_net(net)
    matrices = rule.matrices
    if matrices is None:
        raise TypeError(
            f"`rule` must carry the error back through matrices like the weights, {rule} does not; feedback_alignment does."
        )
    chain = blocks(net)

    def only(tree: Params) -> list[Array]:
        return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]

    def record(
        params: Params, state: Any, x: Array, targets: Array, weights: Array | None = None
    ) -> Array:
        pairs = list(zip(chain.split(params), chain.split(matrices(params, state, x)), strict=True))
        return jnp.stack([degrees(_cosine_of(only(w), only(b))) for w, b in pairs])

    return record


def delta_angles(rule: LocalRule, net: Layer) -> Record:
    """The mean over the batch of the angle between a layer's deltas, the rule's and the true ones,
    in degrees, `[layers]`.

    A delta is an example's gradient at the pre-activations z_l: dy (.) f'(z_l), of its own loss.
    Examples whose true or own delta is 0 do not count. An embedding's are its dy.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> delta_angles(rule, net)(params, params, jnp.ones((5, 3)), jnp.ones((5, 2))).round()
    Array([0., 0.], dtype=float32)
    """
    _check_rule(rule, LocalRule)
    check_net(net)
    chain = blocks(net)

    def record(
        params: Params, state: Any, x: Array, targets: Array, weights: Array | None = None
    ) -> Array:
        parts = chain.split(params)
        hs, residuals = chain.forward(parts, x)
        dy, true = output_error(rule.loss, hs[-1], targets), []
        for layer, p, kept in reversed(list(zip(chain.layers, parts, residuals, strict=True))):
            grads, dx = layer.backward(p, kept, dy, keep)
            true.insert(0, _deltas(grads))
            dy = dx
        signals = rule.signals(params, state, x, targets)
        ours = [
            _deltas(f.backward(p, r, dy, keep)[0])
            for f, p, r, dy in zip(chain.layers, parts, residuals, signals, strict=True)
        ]
        return jnp.stack([_mean_angle(a, b, weights) for a, b in zip(ours, true, strict=True)])

    return record


def goodness(rule: ForwardForward) -> Record:
    """Forward-forward's gap of goodness and its accuracy at telling right labels from wrong ones,
    `[layers]` each.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.forward_forward(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> params = net.init(jax.random.key(0))
    >>> goodness(rule)(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.zeros(5, int)).gap.shape
    (1,)
    """
    _check_rule(rule, ForwardForward)

    def record(
        params: Params, state: Any, x: Array, targets: Array, weights: Array | None = None
    ) -> Goodness:
        right, wrong, thresholds = rule.goodness(params, state, x, targets)
        w = (
            jnp.ones(right.shape[1], right.dtype)
            if weights is None
            else weights.astype(right.dtype)
        )
        share = (w / w.sum())[None]
        sides = (right > thresholds[:, None]).astype(w.dtype) + (
            wrong < thresholds[:, None]
        ).astype(w.dtype)
        return Goodness(((right - wrong) * share).sum(1), (sides * share).sum(1) / 2)

    return record


def degrees(cosine: Array) -> Array:
    """The angle of a cosine, in degrees.

    >>> degrees(jnp.array([1.0, 0.0, -1.0]))
    Array([  0.,  90., 180.], dtype=float32)
    """
    return jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))


def _inner(a: Params, b: Params) -> Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([(at_least_float32(u) * at_least_float32(v)).sum() for u, v in pairs]).sum()


def _cosine(dot: Array, square: Array, other_square: Array) -> Array:
    return dot / jnp.sqrt(square) / jnp.sqrt(other_square)


def _cosine_of(a: Params, b: Params) -> Array:
    return _cosine(_inner(a, b), _inner(a, a), _inner(b, b))


def _deltas(factors: Params) -> Array:
    """`[batch, numbers]`: what every weight of a block was given at its output."""
    kept = jax.tree.leaves(factors, is_leaf=is_factor)
    found = [
        f.dz if isinstance(f, Outer) else f.dy for f in kept if isinstance(f, (Outer, Scatter))
    ]
    if not found:
        raise ValueError(
            "`net` has a block without a dense layer or an embedding: what its deltas are, its factors do not say."
        )
    return jnp.concatenate([dz.reshape(dz.shape[0], -1) for dz in found], axis=1)


def _mean_angle(a: Array, b: Array, weights: Array | None) -> Array:
    wide_a, wide_b = at_least_float32(a), at_least_float32(b)
    dots, squares, other = (
        (u * v).sum(1) for u, v in ((wide_a, wide_b), (wide_a, wide_a), (wide_b, wide_b))
    )
    counts = (squares > 0) & (other > 0)
    w = (
        counts.astype(dots.dtype)
        if weights is None
        else counts.astype(dots.dtype) * weights.astype(dots.dtype)
    )
    one = jnp.ones_like(squares)
    angles = degrees(_cosine(dots, jnp.where(counts, squares, one), jnp.where(counts, other, one)))
    return (w * angles).sum() / w.sum()


def _check_rule(rule: Any, kind: type) -> None:
    if not isinstance(rule, kind):
        raise TypeError(
            f"`rule` must be a {kind.__name__}, got {rule!r:.80}: it does not show what is measured here."
        )
