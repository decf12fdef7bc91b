"""What rules have in common that give every block of a net an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from fnn.backprop import (
    check_net_and_loss,
    fill_rows,
    forward_pass,
    output_error,
    share_rows,
    weighted_mean,
)
from fnn.nets.blocks import Blocks, hidden_blocks
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Layer, Loss, Params, Rule


@dataclass(frozen=True, repr=False, eq=False)
class LocalRule(Rule):
    """A `Rule` that shows the error it gives to each block, for `fnn.alignment`.

    Attributes:
        signals: `(params, state, x, targets) -> [dy_1, ..., dy_L]`: what the rule takes for
            dE_i/dh_l, of each example's own loss, at the output `[batch, ...]` of each of the net's
            `fnn.nets.blocks`.
        matrices: `(params, state, x) -> B`, a tree like the params that the error is carried back
            through; None where there is none.
    """

    signals: Callable[..., Sequence[Array]]
    matrices: Callable[..., Params] | None = None


class BlockPass(NamedTuple):
    """A batch and its forward pass block by block, up to the error at the outputs.

    Rows of weight 0 have inputs and errors of 0, whatever they hold.
    """

    chain: Blocks
    params: tuple[Params, ...]  # of every block
    hs: list[Array]  # [h_0, ..., h_L], each [batch, ...]
    residuals: list[Any]  # of every block
    error: Array  # like h_L: dE_i/dh_L, of each example's own loss
    values: Array  # [batch], the losses
    targets: Array  # [batch, ...]
    weights: Any  # [batch] or None

    def backward(self, i, dy):
        """The backward pass of block i."""
        return self.chain.layers[i].backward(self.params[i], self.residuals[i], dy)

    def gradient(self, i, dy):
        """The gradient of block i in the mean, from the error of each example's own loss."""
        return self.backward(i, share_rows(dy, self.weights))[0]


def block_pass(chain: Blocks, loss: Loss, params, x, targets, weights=None) -> BlockPass:
    """Checks a batch and runs a net on it block by block."""
    parts = chain.split(params)

    def forward(x):
        hs, residuals = chain.forward(parts, x)
        return hs[-1], (hs, residuals)

    outputs, (hs, residuals), values = forward_pass(forward, loss, x, targets, weights)
    t = fill_rows(targets, weights)
    error = output_error(loss, outputs, t)
    return BlockPass(chain, parts, hs, residuals, error, values, t, weights)


def block_rule(name, net: Layer, loss: Loss, chain: Blocks, init, gradients) -> Rule:
    """A rule from `gradients(block pass, state) -> (gradients of every block, next state)`."""

    def value_and_grad(params, state, x, targets, weights=None):
        batch = block_pass(chain, loss, params, x, targets, weights)
        grads, state = gradients(batch, state)
        return weighted_mean(batch.values, weights), chain.join(grads), state

    return Rule(name, init, value_and_grad, net.apply, loss)


def local_rule(name, net: Layer, loss: Loss, chain: Blocks, init, errors) -> LocalRule:
    """A rule where every block learns by its own backward pass from an error of its own.

    Args:
        name: of the rule.
        net: any chain.
        loss: any loss that takes its outputs.
        chain: the blocks of the net.
        init: `(key, params) -> state`.
        errors: `(block pass, state) -> (dys, next state)`, for every block the error of each
            example's own loss.
    """

    def gradients(batch, state):
        dys, state = errors(batch, state)
        return [batch.gradient(i, dy) for i, dy in enumerate(dys)], state

    def signals(params, state, x, targets):
        return errors(block_pass(chain, loss, params, x, targets), state)[0]

    rule = block_rule(name, net, loss, chain, init, gradients)
    return LocalRule(name, init, rule.value_and_grad, net.apply, loss, signals)


def hidden_chain(rule: str, net: Layer, loss: Loss) -> Blocks:
    """The blocks of a net that has hidden ones, for a rule that needs derivatives.

    Raises:
        TypeError, ValueError: `net` or `loss` is invalid, or `net` is one block.
    """
    check_net_and_loss(net, loss)
    warn_if_flat(rule, net, stacklevel=5)
    return hidden_blocks(rule, net)


def targets_like(outputs: Array, loss: Loss, targets: Array) -> Array:
    """Targets shaped and typed like the outputs: labels as one-hot rows."""
    if loss.targets == "labels":
        labels = targets.astype(int)  # int8 does not hold the number of 300 classes
        return jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return targets.astype(outputs.dtype)
