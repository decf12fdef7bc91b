"""PEPITA: a second forward pass, on inputs that the error modulates, replaces the backward pass.

    h_l = block_l(h_{l-1}),    e = dE/dh_L              the first pass
    h'_0 = x + e F,    h'_l = block_l(h'_{l-1})         the second; F [outputs, inputs] is random
                                                        and fixed
    dw_l = h'_{l-1}^T (h_l - h'_l),    db_l = sum over the batch        hidden blocks
    dw_L = h'_{L-1}^T e                                                 the last block, by the error
                                                                        of the first pass

Descending: `w - rate dw`. The rule uses no derivative of a hidden activation and no weight
backwards. To first order h_l - h'_l is -(e F w_1 ...) (.) f', so it does what backprop does as far
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

from jax.nn.initializers import he_uniform
from optax import tree

from fnn import _validate
from fnn.backprop import check_net_and_loss, share_rows
from fnn.nets.blocks import dense_blocks, width
from fnn.rules._blockwise import block_rule
from fnn.types import Layer, Loss, Rule, by_recipe


@by_recipe
def pepita(net: Layer, loss: Loss, *, projection_scale: float = 0.05) -> Rule:
    """Two forward passes, the second on `x + e F`; every layer learns from the difference.

    Args:
        net: a chain whose hidden blocks each begin with a dense layer.
        loss: any loss that takes its outputs.
        projection_scale: the entries of F lie within `projection_scale * sqrt(6 / inputs)`; above
            0.

    Returns:
        A rule whose state is F, `[outputs, inputs]`.

    Raises:
        TypeError, ValueError: an argument is invalid, `net` has no hidden block or one that does
            not begin with a dense layer.

    Source: Dellaferrera, Kreiman (2022), arXiv:2201.11665.

    >>> import fnn, jax, jax.numpy as jnp
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = pepita(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> state, x, targets = rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    >>> state.shape
    (2, 3)
    """
    check_net_and_loss(net, loss)
    _validate.positive("projection_scale", projection_scale)
    scale = float(projection_scale)  # a NumPy number would widen the arrays
    draw = he_uniform(in_axis=1, out_axis=0)
    chain = dense_blocks("pepita", net)

    def init(key, params):
        first, *_, last = chain.split(params)
        w = first[0].w
        shape = width(last), len(w)
        projection = draw(key, shape, w.dtype)
        return scale * projection

    def gradients(batch, state):
        shift = batch.error @ state
        inputs = batch.hs[0] + shift
        hs, residuals = chain.forward(batch.params, inputs)
        grads = list(tree.zeros_like(batch.params[:-1]))
        for i, (_, *rest) in enumerate(grads):
            block = chain.layers[i]
            dense = block.layers[0]
            params = batch.params[i][0]
            change = batch.hs[i + 1] - hs[i + 1]
            dz = share_rows(change, batch.weights)
            dense_grads, _ = dense.backward(params, residuals[i][0], dz)
            grads[i] = dense_grads, *rest
        # only the first layer of the last block gets the inputs of the second pass
        first = residuals[-1][0]
        rest = batch.residuals[-1][1:]
        second = batch._replace(residuals=[(first, *rest)])
        last = second.gradient(-1, batch.error)
        return [*grads, last], state

    return block_rule("pepita", net, loss, chain, init, gradients)
