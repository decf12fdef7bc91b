"""Direct feedback alignment: each block gets the output error through a random matrix of its own.

    dz_L = E,    dz_l = (E B_l) (.) f'(z_l),
    dw_l = h_{l-1}^T dz_l,    db_l = sum over the batch of dz_l

with E = dE/dz_L `[batch, outputs]` and B_l `[outputs, units of l]` fixed. No error passes from
block to block, so all blocks can learn at once. Where block l puts out an image for an example, B_l
is `[outputs, height, width, channels]`.

What the hidden blocks get in the place of E, `signal`:

- `error`: E. Nokland (2016), arXiv:1609.01596.
- `sign`: sign(E), of each example before the mean over the batch. The same paper.
- `targets`: -targets, labels as one-hot rows; nothing has to wait for the outputs. Direct random
  target projection, Frenkel, Lefebvre, Bol (2021), doi:10.3389/fnins.2021.629892.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal

from fnn import _validate
from fnn.nets.blocks import convolves, width
from fnn.rules._blockwise import LocalRule, hidden_chain, local_rule, targets_like
from fnn.types import Array, Layer, Loss, by_recipe

Signal = Literal["error", "sign", "targets"]


@by_recipe
def direct_feedback_alignment(
    net: Layer,
    loss: Loss,
    *,
    input_shape: tuple[int, ...] | None = None,
    signal: Signal = "error",
    feedback_init: Callable[..., Array] = lecun_normal(),
) -> LocalRule:
    """Every hidden block learns from the error at the outputs.

    Args:
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs; with the signal `"targets"` it says what targets are.
        input_shape: of one example, `(28, 28, 1)` say, without the batch axis. Only a net needs it
            whose hidden blocks put out images, or positions that the outputs have not.
        signal: what the hidden blocks get: the `"error"`, its `"sign"`, or the `"targets"`.
        feedback_init: `(key, (outputs, units), dtype) -> B`, any of `jax.nn.initializers`; `units`
            are all numbers that the block puts out for an example.

    Returns:
        A rule whose state is the tuple of B, one for each hidden block.

    Raises:
        TypeError, ValueError: an argument is invalid; `net` is one block, or has convolutions and
            `input_shape` is missing; at the call, the output of a block has another shape than its
            error.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = direct_feedback_alignment(net, fnn.losses.l2_loss)
    >>> [b.shape for b in rule.init(jax.random.key(1), net.init(jax.random.key(0)))]
    [(2, 4)]
    """
    chain = hidden_chain("direct_feedback_alignment", net, loss)
    _validate.one_of("signal", signal, get_args(Signal))

    _check_input_shape(net, input_shape)

    def init(key, params):
        parts = chain.split(params)
        dtype = jax.tree.leaves(params)[-1].dtype
        *hidden, (*positions, outputs) = _output_shapes(chain, parts, input_shape, dtype)
        keys = jax.random.split(key, len(hidden))
        matrices = []
        for k, shape in zip(keys, hidden, strict=True):
            units = shape[len(positions) :]
            b = feedback_init(k, (outputs, math.prod(units)), dtype)
            matrices.append(b.reshape(outputs, *units))
        return tuple(matrices)

    def errors(batch, state):
        error = batch.error
        if signal == "sign":
            error = jnp.sign(error)
        if signal == "targets":
            error = -targets_like(error, loss, batch.targets)
        dys = [jnp.tensordot(error, b, 1) for b in state]
        for i, dy in enumerate(dys):
            came = batch.hs[i + 1].shape
            if dy.shape != came:  # a net that sums positions away
                raise ValueError(
                    f"direct_feedback_alignment: hidden block {i} puts out {came}, but its "
                    f"error is {dy.shape}. Every block must keep the leading axes of the outputs. "
                    f"Else pass the shape of one example: `input_shape={batch.hs[0].shape[1:]}`."
                )
        return [*dys, batch.error], state

    name = f"direct_feedback_alignment({signal})".removesuffix("(error)")
    return local_rule(name, net, loss, chain, init, errors)


def _output_shapes(chain, params, input_shape, dtype):
    """The shape of what each block puts out for an example."""
    if input_shape is None:
        return [(width(part),) for part in params]
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    hs, _ = jax.eval_shape(chain.forward, params, x)
    return [h.shape[1:] for h in hs[1:]]


def _check_input_shape(net, input_shape):
    """Raises unless it is a shape, and there where it is needed."""
    expected = "`input_shape` of direct_feedback_alignment must be the shape of one example"
    if input_shape is None:
        if convolves(net):
            raise ValueError(
                f"{expected}, (28, 28, 1) say, got None. `net` has convolutions, whose outputs "
                "depend on the size of images."
            )
        return
    if not isinstance(input_shape, tuple):
        raise TypeError(f"{expected}, a tuple, got {input_shape!r:.80}.")
    for i, size in enumerate(input_shape):
        _validate.positive(f"input_shape[{i}]", size, whole=True)
