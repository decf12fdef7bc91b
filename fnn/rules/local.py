"""What rules that hand every block an error of its own have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fnn._types import Array, Params, Rule


@dataclass(frozen=True, repr=False)
class LocalRule(Rule):
    """A `Rule` that shows what it tells each block, for `fnn.alignment`.

    Attributes:
        signals: `(params, state, x, targets) -> [dy_1, ..., dy_L]`: what stands in the place of dE_i/dh_l, of each example's own loss, at
            the output `[batch, ...]` of each of the net's `fnn.blocks`.
        matrices: `(params, state, x) -> B`, a tree like the params that the error is carried back through; None where there is none.
    """

    signals: Callable[..., Sequence[Array]]
    matrices: Callable[..., Params] | None = None
