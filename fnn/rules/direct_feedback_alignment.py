"""Direct feedback alignment.

The error at the outputs reaches every block through a fixed random matrix of its own.

    dz_L = E,    dz_l = (E B_l) (.) f'(z_l),    dw_l = h_{l-1}^T dz_l,    db_l = sum over the batch
    of dz_l

with E = dE/dz_L `[batch, outputs]` and B_l `[outputs, units of l]`; no error passes from block to
block, so that all can learn at once.

What the hidden blocks are told in the place of E, `signal`:

- `error`: E. Nokland (2016), arXiv:1609.01596.
- `sign`: sign(E), of each example before the mean over the batch. The same paper.
- `targets`: -targets, labels as one-hot rows; nothing needs to wait for the outputs. Direct random
target projection, Frenkel, Lefebvre,
  Bol (2021), doi:10.3389/fnins.2021.629892.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal

from fnn import _validate
from fnn.backprop import check_net_and_loss, weighed, weighted_mean
from fnn.nets.blocks import hidden_blocks, width
from fnn.rules._blockwise import LocalRule, block_pass
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params

SIGNALS = ("error", "sign", "targets")


def direct_feedback_alignment(
    net: Layer,
    loss: Loss,
    *,
    signal: str = "error",
    feedback_init: Callable[..., Array] = lecun_normal(),
) -> LocalRule:
    """Every hidden block learns from the error at the outputs.

    Args:
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs.
        signal: what the hidden blocks are told: `"error"`, `"sign"` of it, or the `"targets"`.
        feedback_init: `(key, (outputs, units), dtype) -> B`, any of `jax.nn.initializers`.

    Returns:
        A rule whose state is the tuple of B, one for each hidden block.

    Raises:
        TypeError, ValueError: an argument cannot be meant; `net` is one block; at the call, a
            block's output has not the leading axes of the net's.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = direct_feedback_alignment(net, fnn.losses.l2_loss)
    >>> [b.shape for b in rule.init(jax.random.key(1), net.init(jax.random.key(0)))]
    [(2, 4)]
    """
    check_net_and_loss(net, loss)
    chain = hidden_blocks("direct_feedback_alignment", net)
    warn_if_flat("direct_feedback_alignment", net)
    _validate.one_of("signal", signal, SIGNALS)
    _validate.is_function("feedback_init", feedback_init, "(key, shape, dtype) -> array")

    def init(key: Key, params: Params) -> tuple[Array, ...]:
        *hidden, last = chain.split(params)
        keys = jax.random.split(key, len(hidden))
        dtype = jax.tree.leaves(last)[0].dtype
        return tuple(
            feedback_init(k, (width(last), width(p)), dtype)
            for k, p in zip(keys, hidden, strict=True)
        )

    def passed(
        params: Params, state: tuple[Array, ...], x: Array, targets: Array
    ) -> tuple[Array, Any, list[Array]]:
        """The losses, the residuals, and what every block is told."""
        found = block_pass(chain, params, loss, x, targets)
        told = _signal(signal, found.error, targets)
        hidden = zip(state, found.hs[1:-1], strict=True)
        return (
            found.values,
            found.residuals,
            [*(_sent(told, b, h, i) for i, (b, h) in enumerate(hidden)), found.error],
        )

    def value_and_grad(
        params: Params,
        state: tuple[Array, ...],
        x: Array,
        targets: Array,
        weights: Array | None = None,
    ) -> tuple[Array, Params, tuple[Array, ...]]:
        values, residuals, dys = passed(params, state, x, targets)
        grads = chain.backward(chain.split(params), residuals, [weighed(dy, weights) for dy in dys])
        return weighted_mean(values, weights), grads, state

    def signals(params: Params, state: tuple[Array, ...], x: Array, targets: Array) -> list[Array]:
        return passed(params, state, x, targets)[2]

    name = (
        "direct_feedback_alignment" if signal == "error" else f"direct_feedback_alignment({signal})"
    )
    return LocalRule(name, init, value_and_grad, net.apply, loss, signals)


def _signal(signal: str, error: Array, targets: Array) -> Array:
    """What the hidden blocks are told, `[batch, ..., outputs]`."""
    if signal == "error":
        return error
    if signal == "sign":
        return jnp.sign(error)
    t = jnp.asarray(targets)
    if jnp.issubdtype(t.dtype, jnp.integer) and t.ndim < error.ndim:
        return -jax.nn.one_hot(t, error.shape[-1], dtype=error.dtype)
    return -t.astype(error.dtype)


def _sent(told: Array, b: Array, h: Array, i: int) -> Array:
    dy = told @ b
    if dy.shape != h.shape:
        raise ValueError(
            f"direct_feedback_alignment: hidden block {i} puts out {h.shape}, but the error sent to it is {dy.shape}. "
            "Every block must keep the leading axes that the outputs have, and B its units."
        )
    return dy
