"""How near the update of a rule is to the true gradient: angles, cosines and norms by layer.

`update_alignment`, `weight_angles`, `delta_angles` and `goodness` return a `Record`,
`(params, rule_state, x, targets, weights=None) -> arrays`, for `fnn.fit(..., record=...)` or for a
call by itself. A layer is a block of the net (`fnn.nets.blocks`). The angle of a vector of zeros is
NaN.

Source: Lillicrap et al. (2016), doi:10.1038/ncomms13276 (angles of deltas and weights); lecture 003
(alternatives to backprop).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import tree

from fnn.backprop import value_and_grad, weighted_mean
from fnn.factors import Conv, Outer, Reducer, Scatter, widen
from fnn.nets.blocks import blocks
from fnn.nets.combinators import check_net
from fnn.rules._blockwise import LocalRule
from fnn.rules.feedback_alignment import feedback_alignment
from fnn.rules.forward_forward import ForwardForward
from fnn.types import Array, Layer, Params, Record, Rule


class Alignment(NamedTuple):
    """The update of a rule beside the true gradient."""

    cosine: Array  # [layers]
    angle: Array  # [layers], in degrees
    ratio: Array  # [layers], norm over the norm of the true gradient


class Goodness(NamedTuple):
    """How well the layers of forward-forward separate right labels from wrong ones."""

    gap: Array  # [layers], mean goodness with right labels less that with wrong ones
    accuracy: Array  # [layers], share of examples on the right side of the threshold


def update_alignment(rule: Rule, net: Layer) -> Record:
    """The update of a rule beside the true gradient of its loss, on the same batch.

    Costs one step of backprop. The loss is that of `rule.predict`: of `net.apply` for all rules but
    forward-forward, which writes labels into its inputs.

    Args:
        rule: any rule for `net`.
        net: any layer.

    Returns:
        `(params, rule_state, x, targets, weights=None) -> Alignment`.

    Raises:
        TypeError: `rule` is no Rule or `net` no Layer.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> found = update_alignment(rule, net)(params, params, jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> found.cosine.round(4)  # with the weights as feedback matrices, this is backprop
    Array([1., 1.], dtype=float32)
    """
    _check_rule(rule, "predict")
    check_net(net)

    def backward(params, carry_back, dy, reduce=None):
        return carry_back(dy)

    # `jax.vjp` is a forward pass: it returns outputs, and a function that carries an error back.
    forward = functools.partial(jax.vjp, rule.predict)
    backprop = value_and_grad(Layer("predict", net.init, forward, backward), rule.loss)

    def record(params, state, x, targets, weights=None):
        ours = rule.value_and_grad(params, state, x, targets, weights)[1]
        true = backprop(params, x, targets, weights)[1]
        return compare(net, ours, true)

    return record


def compare(net: Layer, ours: Params, true: Params) -> Alignment:
    """Two trees like the params of a net, layer by layer.

    Args:
        net: any layer.
        ours: a tree like its params.
        true: another one, the true gradient.

    Returns:
        An `Alignment`; angles are exact to rounding, also near 0 and 180 degrees.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> params = net.init(jax.random.key(0))
    >>> compare(net, jax.tree.map(lambda p: -2 * p, params), params).angle.round()
    Array([180., 180.], dtype=float32)
    """
    chain = blocks(net)
    layers = map(_measure, chain.split(ours), chain.split(true))
    return jax.tree.map(lambda *values: jnp.stack(values), *layers)


def weight_angles(rule: LocalRule, net: Layer) -> Record:
    """The angles between the weights of every layer and its feedback matrices.

    The rule does not use those of the first layer: nothing is below it.

    Args:
        rule: one that carries the error back through matrices like the weights.
        net: the net of the rule.

    Returns:
        `(params, rule_state, x, targets, weights=None) -> [layers]`, in degrees.

    Raises:
        TypeError: `rule` has no such matrices.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> weight_angles(rule, net)(params, params, None, None).round()
    Array([0., 0.], dtype=float32)
    """
    _check_rule(rule, "matrices")
    feedback: Any = rule.matrices

    def matrices(params):
        return jax.tree.map(lambda a: a if a.ndim > 1 else jnp.zeros_like(a), params)

    def record(params, state, x, targets, weights=None):
        carriers = feedback(params, state, x)
        return compare(net, matrices(params), matrices(carriers)).angle

    return record


def delta_angles(rule: LocalRule, net: Layer) -> Record:
    """The mean angles between the deltas of a rule and the true ones, by layer.

    A delta is the gradient of the loss of an example at the pre-activations z_l: dy (.) f'(z_l);
    for an embedding, dy.

    Args:
        rule: one that gives each block an error.
        net: the net of the rule.

    Returns:
        `(params, rule_state, x, targets, weights=None) -> [layers]`, in degrees: weighted means
        over the examples whose angle is defined, where neither delta is 0; NaN where there is
        none, as for a block without a dense layer or an embedding.

    Raises:
        TypeError: `rule` gives no errors to blocks.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.feedback_alignment(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> delta_angles(rule, net)(params, params, jnp.ones((5, 3)), jnp.ones((5, 2))).round()
    Array([0., 0.], dtype=float32)
    """
    _check_rule(rule, "signals")
    chain = blocks(net)
    backprop = feedback_alignment(net, rule.loss)  # it is, with the params in place of B

    def record(params, state, x, targets, weights=None):
        parts = chain.split(params)
        _, residuals = chain.forward(parts, x)

        def deltas(errors):
            tree_of_deltas = chain.backward(parts, residuals, errors, DELTAS)
            return chain.split(tree_of_deltas)

        ours = rule.signals(params, state, x, targets)
        true = backprop.signals(params, params, x, targets)
        layers = map(jax.vmap(_measure), deltas(ours), deltas(true))
        angles = jnp.stack([layer.angle for layer in layers], axis=1)
        known = jnp.isfinite(angles)
        angles = jnp.where(known, angles, 0)
        share = weighted_mean(known.astype(angles.dtype), weights)
        return weighted_mean(angles, weights) / share

    return record


def goodness(rule: ForwardForward) -> Record:
    """How well forward-forward separates right labels from wrong ones, by layer.

    Args:
        rule: `fnn.rules.forward_forward(...)`.

    Returns:
        `(params, rule_state, x, targets, weights=None) -> Goodness`.

    Raises:
        TypeError: `rule` is another rule.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> rule = fnn.rules.forward_forward(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> goodness(rule)(params, state, jnp.ones((5, 3)), jnp.zeros(5, int)).gap.shape
    (1,)
    """
    _check_rule(rule, "goodness")

    def record(params, state, x, targets, weights=None):
        right, wrong, thresholds = rule.goodness(params, state, x, targets)
        limits = thresholds[:, None]
        sides = jnp.stack([right > limits, wrong < limits])
        share = sides.mean(0)
        gap = right - wrong
        return Goodness(weighted_mean(gap.T, weights), weighted_mean(share.T, weights))

    return record


def _measure(ours, true):
    """The `Alignment` of two trees, each as one vector.

    The angle of unit vectors u and v is 2 atan2(|u - v|, |u + v|).

    Source: Kahan (2006), "How futile are mindless assessments of roundoff in floating-point
    computation?", section "Mangled angles".
    """
    u, norm = _unit(ours)
    v, true_norm = _unit(true)
    across = tree.norm(tree.sub(u, v))
    along = tree.norm(tree.add(u, v))
    angle = 2 * jnp.arctan2(across, along)
    return Alignment(jnp.cos(angle), jnp.degrees(angle), norm / true_norm)


def _unit(vector):
    """A tree at norm 1 in float32 at least, and its norm."""
    wide = jax.tree.map(widen, vector)
    norm = tree.norm(wide)
    return tree.scale(1 / norm, wide), norm


def _delta(factor):
    """`[batch, ...]`: the gradient at the output of a weight; zeros for a bias or a scale."""
    if isinstance(factor, (Outer, Conv)):
        return factor.dz
    if isinstance(factor, Scatter):
        return factor.dy
    return jnp.zeros_like(factor.gradient)


def _check_rule(rule, name):
    """Raises unless a rule shows what is measured."""
    if getattr(rule, name, None) is None:
        raise TypeError(
            f"`rule` must be one with `{name}`, got {rule!r:.80}: it does not show what is "
            "measured here."
        )


DELTAS = Reducer("deltas", _delta, lambda deltas: jnp.moveaxis(deltas, 0, 1))
