"""What rules that hand every block an error of its own have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fnn.backprop import forward_pass, output_error
from fnn.nets.blocks import Blocks
from fnn.types import Array, Loss, Params, Rule


@dataclass(frozen=True, repr=False)
class LocalRule(Rule):
    """A `Rule` that shows what it tells each block, for `fnn.alignment`.

    Attributes:
        signals: `(params, state, x, targets) -> [dy_1, ..., dy_L]`: what stands in the place of
            dE_i/dh_l, of each example's own loss, at the output `[batch, ...]` of each of the net's
            `fnn.blocks`.
        matrices: `(params, state, x) -> B`, a tree like the params that the error is carried back
            through; None where there is none.
    """

    signals: Callable[..., Sequence[Array]]
    matrices: Callable[..., Params] | None = None


class BlockPass(NamedTuple):
    """A forward pass block by block, up to the error at the outputs."""

    parts: tuple[Params, ...]  # the params of every block
    hs: list[Array]  # [h_0, ..., h_L], each [batch, ...]
    residuals: list[Any]  # of every block
    values: Array  # [batch], the losses
    error: Array  # like h_L: dE_i/dh_L, of each example's own loss


def block_pass(chain: Blocks, params: Params, loss: Loss, x: Array, targets: Array) -> BlockPass:
    """The forward pass of a net by its blocks; shapes are checked as by `fnn.value_and_grad`."""
    parts = chain.split(params)

    def forward(x: Array) -> tuple[Array, tuple[list[Array], list[Any]]]:
        hs, residuals = chain.forward(parts, x)
        return hs[-1], (hs, residuals)

    outputs, (hs, residuals), values = forward_pass(forward, loss, x, targets)
    return BlockPass(parts, hs, residuals, values, output_error(loss, outputs, targets))
