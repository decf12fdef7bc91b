"""Difference target propagation.

Learned inverses carry targets down, and every hidden block comes nearer to its own.

    h_l = f_l(h_{l-1}),    l = 1 ... L                              the blocks; E is the loss at h_L
    t_{L-1} = h_{L-1} - target_rate dE/dh_{L-1}                     the first target, each example
    by its own E
    t_{l-1} = h_{l-1} - g_l(h_l) + g_l(t_l)                         the others; the difference takes
    off what g_l itself gets wrong
    hidden block l    descends |f_l(h_{l-1}) - t_l|^2 / (2 target_rate), h_{l-1} and t_l fixed, by
    its own backward pass
    last block        descends E
    inverse g_l       descends |g_l(f_l(h_{l-1} + eps)) - (h_{l-1} + eps)|^2, eps ~ N(0,
    noise_std^2), after it has been used

The paper's hidden loss is without 1 / (2 target_rate). With it the last hidden block gets
backprop's own gradient whatever the rate, the others gradients of about that size, so that learning
rates and losses mean what they mean for backprop; with one hidden layer the rule is backprop, and
needs no inverse. While g is linear nothing depends on `target_rate` but rounding.

Each g_l is a dense layer, orthogonal at first, by default without an activation: that was no worse
on digits, and with five hidden layers of ReLU better than with ReLU (validation accuracy .97
against .94). Its step is `inverse_rate / (1 + mean |f_l(h + eps)|^2)`, normalised least mean
squares: a linear g cannot diverge at a rate below 1, however large h becomes. Plain SGD did in that
net at a rate of 0.01.

Source: Lee, Zhang, Fischer, Bengio (2015), arXiv:1412.7525, algorithm 1. Normalised steps: Nagumo,
Noda (1967), IEEE Transactions on Automatic Control 12(3).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import orthogonal

from fnn import _validate
from fnn.backprop import check_net_and_loss, weighed, weighted_mean
from fnn.nets import activations
from fnn.nets.blocks import hidden_blocks, width
from fnn.nets.combinators import serial
from fnn.nets.layers import dense
from fnn.rules._blockwise import block_pass
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params, Rule, at_least_float32


class Inverses(NamedTuple):
    """The state of `target_propagation`."""

    key: Key  # of the noise; split at every step
    # of g_2 ... g_{L-1}: each (Dense(w=[width of h_l, width of h_{l-1}], b), ())
    params: tuple[Params, ...]


def target_propagation(
    net: Layer,
    loss: Loss,
    *,
    target_rate: float = 0.1,
    inverse_rate: float = 0.1,
    noise_std: float = 0.1,
    inverse_activation: str | Layer = "identity",
) -> Rule:
    """Difference target propagation with inverses that learn in the same step.

    Args:
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs.
        target_rate: how far the first target is from the activity, in units of the error; above 0.
            Matters where g is not linear.
        inverse_rate: of the inverses' own normalised SGD, at least 0 and best below 1; 0 leaves
            them as they are drawn.
        noise_std: of the noise on the activities that the inverses learn from, at least 0.
        inverse_activation: what follows the dense layer of every inverse; a name or a layer.

    Returns:
        A rule whose state is `Inverses`: a key, and the inverses' params.

    Raises:
        TypeError, ValueError: an argument cannot be meant, or `net` has no hidden block.

    Source: Lee, Zhang, Fischer, Bengio (2015), arXiv:1412.7525.

    >>> import fnn
    >>> net = fnn.mlp((3, 5, 4, 2))
    >>> rule = target_propagation(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> jax.tree.map(jnp.shape, state.params)
    ((Dense(w=(4, 5), b=(5,)), ()),)
    """
    check_net_and_loss(net, loss)
    warn_if_flat("target_propagation", net)
    _validate.positive("target_rate", target_rate)
    _validate.not_negative("inverse_rate", inverse_rate)
    _validate.not_negative("noise_std", noise_std)
    inverse_rate, noise_std = float(inverse_rate), float(noise_std)
    activation = activations.get(inverse_activation)
    chain, rate = hidden_blocks("target_propagation", net), float(target_rate)

    def init(key: Key, params: Params) -> Inverses:
        parts = chain.split(params)[:-1]
        key, *keys = jax.random.split(key, len(parts))
        made = (g.init(k) for g, k in zip(_inverses(parts, activation), keys, strict=True))
        return Inverses(
            key, tuple(_as_dtype_of(p, g) for p, g in zip(parts[1:], made, strict=True))
        )

    def value_and_grad(
        params: Params, state: Inverses, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Any, Any]:
        parts, hs, residuals, values, e = block_pass(chain, params, loss, x, targets)
        gs = _inverses(parts[:-1], activation)
        top = -rate * chain.layers[-1].backward(parts[-1], residuals[-1], e)[1]
        shifts = _carried_down(gs, state.params, hs[2:-1], top)
        dys = [weighed(dy, weights) for dy in (*(shift / -rate for shift in shifts), e)]
        grads = chain.backward(parts, residuals, dys)
        key, *keys = jax.random.split(state.key, len(parts) - 1)
        noisy = [
            h + noise_std * jax.random.normal(k, h.shape, h.dtype)
            for h, k in zip(hs[1:-2], keys, strict=True)
        ]
        known = [
            f.apply(p, h) for f, p, h in zip(chain.layers[1:-1], parts[1:-1], noisy, strict=True)
        ]
        each = zip(gs, state.params, known, noisy, strict=True)
        return (
            weighted_mean(values, weights),
            grads,
            Inverses(key, tuple(_nearer(*one, weights, inverse_rate) for one in each)),
        )

    return Rule("target_propagation", init, value_and_grad, net.apply, loss)


def _inverses(parts: Sequence[Params], activation: Layer) -> list[Layer]:
    """g_2, ... for the params of the hidden blocks."""
    widths = [width(p) for p in parts]
    return [
        serial(dense(n, m, kernel_init=orthogonal()), activation)
        for m, n in itertools.pairwise(widths)
    ]


def _carried_down(
    gs: Sequence[Layer], params: Sequence[Params], hs: Sequence[Array], top: Array
) -> list[Array]:
    """`t_l - h_l` of every hidden block from that of the last.

    The h are those of the blocks that have an inverse.
    """
    shifts = [top]  # differences are what is carried: t - h of rounded sums would lose small ones
    for g, p, h in zip(reversed(gs), reversed(params), reversed(hs), strict=True):
        shifts.append(g.apply(p, h + shifts[-1]) - g.apply(p, h))
    return shifts[::-1]


def _nearer(
    g: Layer, params: Params, known: Array, wanted: Array, weights: Array | None, rate: float
) -> Params:
    """The params of an inverse after its step: `known` is f(h + eps), `wanted` h + eps."""
    y, residuals = g.forward(params, known)
    grads, _ = g.backward(params, residuals, weighed(2 * (y - wanted), weights))
    wide = at_least_float32(known)
    # the 1 is the bias's input
    size = weighted_mean(((wide * wide).sum(-1) + 1).reshape(wide.shape[0], -1).sum(1), weights)
    step = rate / jnp.maximum(size, 1)  # without any weight the size is 0, and so are the gradients
    return jax.tree.map(
        lambda p, d: (p.astype(step.dtype) - step * d.astype(step.dtype)).astype(p.dtype),
        params,
        grads,
    )


def _as_dtype_of(params: Params, tree: Params) -> Params:
    """The tree in the dtype of the params."""
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
