"""PEPITA: a second forward pass, on inputs that the error has modulated, stands in the place of the
backward pass.

    h_l = block_l(h_{l-1}),    e = dE/dh_L                              the first pass
    h'_0 = x + e F,    h'_l = block_l(h'_{l-1})                         the second one; F [outputs,
    inputs] is random and stays
    dw_l = h'_{l-1}^T (h_l - h'_l),    db_l = sum over the batch        hidden blocks
    dw_L = h'_{L-1}^T e                                                 the last one, by the error
    of the first pass

Descending: `w - rate dw`. No derivative of a hidden activation enters and no weight is used
backwards. To first order h_l - h'_l is -(e F w_1 ...) (.) f', so it does what backprop does so far
as F w_1 turns against w_L^T, which the rule itself brings about, as in feedback alignment.
Parameters behind the dense layer of a hidden block (a norm's scale) get zero. Where something
follows in the last block, e is carried through it, as if it were part of the loss.

F is He-uniform over the inputs times `projection_scale`, as in the authors' code: entries within
scale sqrt(6 / inputs). That code takes the last layer's error from the second pass; here, as in the
paper's algorithm 1, it is that of the first.

Source: Dellaferrera, Kreiman (2022), arXiv:2201.11665, algorithm 1; why it aligns: Srinivasan et
al. (2023), arXiv:2302.05440.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import check_net_and_loss, weighed, weighted_mean
from fnn.nets.blocks import dense_blocks, width
from fnn.nets.combinators import serial
from fnn.rules._blockwise import block_pass
from fnn.types import Array, Key, Layer, Loss, Params, Rule


def pepita(net: Layer, loss: Loss, *, projection_scale: float = 0.05) -> Rule:
    """Two forward passes, the second on `x + e F`; every layer learns from the difference.

    Args:
        net: a chain whose hidden blocks each begin with a dense layer; inputs are `[batch,
            features]`, floating point.
        loss: any loss that takes its outputs.
        projection_scale: of the entries of F, which lie within `projection_scale * sqrt(6 /
            inputs)`; above 0.

    Returns:
        A rule whose state is F, `[outputs, inputs]`.

    Raises:
        TypeError, ValueError: an argument cannot be meant, `net` has no hidden block or one that
            does not begin with a dense layer; at the call, `x` is not `[batch, features]` of
            floating-point numbers.

    Source: Dellaferrera, Kreiman (2022), arXiv:2201.11665.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = pepita(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> state.shape
    (2, 3)
    """
    check_net_and_loss(net, loss)
    _validate.positive("projection_scale", projection_scale)
    chain = dense_blocks("pepita", net)

    def init(key: Key, params: Params) -> Array:
        parts = chain.split(params)
        w = parts[0][0].w
        limit = float(projection_scale) * math.sqrt(6 / w.shape[0])
        return jax.random.uniform(key, (width(parts[-1]), w.shape[0]), w.dtype, -limit, limit)

    def value_and_grad(
        params: Params, state: Array, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Array]:
        _check_inputs(x)
        parts, hs, residuals, values, e = block_pass(chain, params, loss, x, targets)
        modulated, kept = chain.forward(parts, hs[0] + e @ state)
        dzs = [weighed(h - m, weights) for h, m in zip(hs[1:-1], modulated[1:-1], strict=True)]
        grads = [
            _hidden(*each)
            for each in zip(chain.layers[:-1], parts[:-1], kept[:-1], dzs, strict=True)
        ]
        grads.append(
            _last(chain.layers[-1], parts[-1], residuals[-1], kept[-1], weighed(e, weights))
        )
        return weighted_mean(values, weights), chain.join(grads), state

    return Rule("pepita", init, value_and_grad, net.apply, loss)


def _hidden(block: Layer, params: Params, residuals: Any, dz: Array) -> Params:
    """The dense layer's gradients from its own `dz`; zero for what follows."""
    return (
        block.layers[0].backward(params[0], residuals[0], dz)[0],
        *jax.tree.map(jnp.zeros_like, params[1:]),
    )


def _last(block: Layer, params: Params, residuals: Any, modulated: Any, e: Array) -> Params:
    """What follows the first layer by the first pass.

    The first layer by its inputs of the second and its error of the first.
    """
    after, dz = serial(*block.layers[1:]).backward(params[1:], residuals[1:], e)
    return (block.layers[0].backward(params[0], modulated[0], dz)[0], *after)


def _check_inputs(x: Any) -> None:
    _validate.is_float("x", x)
    if x.ndim != 2:
        raise ValueError(
            f"pepita: `x` has shape {tuple(x.shape)}, expected [batch, features]: the error is added to it. "
            "One example? Pass `x[None]`. Images? Flatten them to rows."
        )
