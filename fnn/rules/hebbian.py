"""Hebbian learning: hidden layers by Oja's rule, without an error; the last by the delta rule.

    y = f(x w + b),    dw = x^T y - w (y^T y (.) T),
    that is    dw_ij = y_j (x_i - sum_k w_ik y_k T_kj);    db = 0

Means over the batch; x is the dense layer's input, y the block's output. `grads` is -dw, since
optimisers descend.

    "none"       T_kj = 1 where k = j     every unit alone: each finds the first component, up to
                                          its sign (Oja 1982)
    "subspace"   T_kj = 1                 the units together span the leading components, none in
                                          particular (Oja, Karhunen 1985; Oja 1989)
    "sanger"     T_kj = 1 where k <= j    unit j finds the j-th component, in order of variance
                                          (Sanger 1989)

That holds for linear units without a bias; the components are the eigenvectors of the mean of x^T
x, the covariance's where x is centred. With an activation it is nonlinear PCA (Karhunen,
Joutsensalo 1994). On digits through ReLU the output for y gave better features than the
pre-activation (hidden layer of 16: validation accuracy .91 against .85).

The rule diverges unless the learning rate is below about 1 / mean |x|^2, less than the delta rule
needs: `optax.multi_transform` gives the hidden blocks a rate of their own (on digits .97 instead of
.96 for two hidden layers of 128).

Source: Oja (1982), doi:10.1007/BF00275687; Oja, Karhunen (1985), doi:10.1016/0022-247X(85)90131-3;
Oja (1989), Int. J. Neural Systems 1(1); Sanger (1989), doi:10.1016/0893-6080(89)90044-0; Karhunen,
Joutsensalo (1994), Neural Networks 7(1); the delta rule: Widrow, Hoff (1960), Adaptive switching
circuits.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax.numpy as jnp
from optax import tree

from fnn import _validate
from fnn.backprop import check_net_and_loss, share_rows
from fnn.nets.blocks import dense_blocks
from fnn.rules._blockwise import block_rule
from fnn.types import Layer, Loss, Rule, by_recipe

Competition = Literal["none", "subspace", "sanger"]


@by_recipe
def hebbian(net: Layer, loss: Loss, *, competition: Competition = "subspace") -> Rule:
    """Oja's rule in the hidden layers, the true error in the last block.

    Args:
        net: a chain whose hidden blocks each begin with a dense layer; what follows in a block
            stays as it is.
        loss: any loss that takes its outputs; it trains only the last block.
        competition: `"none"`, `"subspace"` or `"sanger"`, as above. "none" is for one unit: more
            are copies of it.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer or `loss` no Loss. ValueError: `competition` is unknown, or
            `net` has no hidden block or one that does not begin with a dense layer.

    Source: Oja (1982), doi:10.1007/BF00275687; Sanger (1989), doi:10.1016/0893-6080(89)90044-0.

    >>> import fnn, jax
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = hebbian(net, fnn.losses.l2_loss, competition="sanger")
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, (), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> grads[0][0].b
    Array([0., 0., 0., 0.], dtype=float32)
    """
    check_net_and_loss(net, loss)
    _validate.one_of("competition", competition, get_args(Competition))
    chain = dense_blocks("hebbian", net)

    def gradients(batch, state):
        grads = list(tree.zeros_like(batch.params[:-1]))
        for i, (still, *rest) in enumerate(grads):
            dense = batch.params[i][0]
            x = batch.hs[i]
            y = batch.hs[i + 1]
            share = share_rows(y, batch.weights)
            dw = _oja(competition, dense.w, x, y, share)
            learnt = still._replace(w=-dw)
            grads[i] = learnt, *rest
        last = batch.gradient(-1, batch.error)
        return [*grads, last], state

    return block_rule("hebbian", net, loss, chain, lambda key, params: (), gradients)


def _oja(competition, w, x, y, share):
    """`x^T y - w (y^T y (.) T)`; the second term keeps weights finite and units apart.

    `share` is y times what its example counts for in the mean.
    """
    # positions are examples
    x = x.reshape(-1, x.shape[-1])
    y = y.reshape(-1, y.shape[-1])
    share = share.reshape(y.shape)
    if competition == "subspace":
        rebuilt = y @ w.T
        missing = x - rebuilt
        return missing.T @ share  # the same without a matrix [out, out]
    growth = x.T @ share
    if competition == "sanger":
        products = y.T @ share
        return growth - w @ jnp.triu(products)
    squares = y * share
    decay = squares.sum(0, keepdims=True)
    return growth - w * decay
