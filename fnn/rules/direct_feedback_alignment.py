"""Direct feedback alignment: each block gets the output error through a random matrix of its own.

    dz_L = E,    dz_l = (E B_l) (.) f'(z_l),
    dw_l = h_{l-1}^T dz_l,    db_l = sum over the batch of dz_l

with E = dE/dz_L `[batch, outputs]` and B_l `[outputs, units of l]` fixed. No error passes from
block to block, so all blocks can learn at once.

What the hidden blocks get in the place of E, `signal`:

- `error`: E. Nokland (2016), arXiv:1609.01596.
- `sign`: sign(E), of each example before the mean over the batch. The same paper.
- `targets`: -targets, labels as one-hot rows; nothing has to wait for the outputs. Direct random
  target projection, Frenkel, Lefebvre, Bol (2021), doi:10.3389/fnins.2021.629892.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal

from fnn import _validate
from fnn.nets.blocks import width
from fnn.rules._blockwise import LocalRule, hidden_chain, local_rule, targets_like
from fnn.types import Array, Layer, Loss, by_recipe

Signal = Literal["error", "sign", "targets"]


@by_recipe
def direct_feedback_alignment(
    net: Layer,
    loss: Loss,
    *,
    signal: Signal = "error",
    feedback_init: Callable[..., Array] = lecun_normal(),
) -> LocalRule:
    """Every hidden block learns from the error at the outputs.

    Args:
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs; with the signal `"targets"` it says what targets are.
        signal: what the hidden blocks get: the `"error"`, its `"sign"`, or the `"targets"`.
        feedback_init: `(key, (outputs, units), dtype) -> B`, any of `jax.nn.initializers`.

    Returns:
        A rule whose state is the tuple of B, one for each hidden block.

    Raises:
        TypeError, ValueError: an argument is invalid; `net` is one block; at the call, the output
            of a block has other leading axes than that of the net.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = direct_feedback_alignment(net, fnn.losses.l2_loss)
    >>> [b.shape for b in rule.init(jax.random.key(1), net.init(jax.random.key(0)))]
    [(2, 4)]
    """
    chain = hidden_chain("direct_feedback_alignment", net, loss)
    _validate.one_of("signal", signal, get_args(Signal))

    def init(key, params):
        *widths, outputs = map(width, chain.split(params))
        dtype = jax.tree.leaves(params)[-1].dtype
        keys = jax.random.split(key, len(widths))
        pairs = zip(keys, widths, strict=True)
        return tuple(feedback_init(k, (outputs, units), dtype) for k, units in pairs)

    def errors(batch, state):
        error = batch.error
        if signal == "sign":
            error = jnp.sign(error)
        if signal == "targets":
            error = -targets_like(error, loss, batch.targets)
        dys = [error @ b for b in state]
        for i, dy in enumerate(dys):
            came = batch.hs[i + 1].shape
            if dy.shape != came:  # a net that sums positions away
                raise ValueError(
                    f"direct_feedback_alignment: hidden block {i} puts out {came}, but its "
                    f"error is {dy.shape}. Every block must keep the leading axes of the outputs."
                )
        return [*dys, batch.error], state

    name = f"direct_feedback_alignment({signal})".removesuffix("(error)")
    return local_rule(name, net, loss, chain, init, errors)
