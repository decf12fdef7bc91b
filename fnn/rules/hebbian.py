"""Hebbian learning below, the delta rule on top: hidden layers by Oja's rule, without an error.

The last block by the true one.

    y = f(x w + b),    dw = x^T y - w (y^T y (.) T),    that is    dw_ij = y_j (x_i - sum_k w_ik y_k
    T_kj);    db = 0

Means over the batch; x is the dense layer's input, y the block's output. `grads` is -dw, since
optimisers descend.

    "none"       T_kj = 1 where k = j     every unit alone, and so each finds the first component,
    up to its sign (Oja 1982)
    "subspace"   T_kj = 1                 the units together span the leading components, none in
    particular (Oja, Karhunen 1985; Oja 1989)
    "sanger"     T_kj = 1 where k <= j    unit j finds the j-th component, in order of variance
    (Sanger 1989)

That holds for linear units without a bias; the components are the eigenvectors of the mean of x^T
x, the covariance's where x is centred. With an activation it is nonlinear PCA (Karhunen,
Joutsensalo 1994). On digits through ReLU the output for y gave better features than the
pre-activation (hidden layer of 16: validation accuracy .91 against .85).

The rule diverges unless the learning rate is below about 1 / mean |x|^2, less than the delta rule
likes: `optax.multi_transform` gives the hidden blocks a rate of their own (on digits .97 instead of
.96 for two hidden layers of 128).

Source: Oja (1982), doi:10.1007/BF00275687; Oja, Karhunen (1985), doi:10.1016/0022-247X(85)90131-3;
Oja (1989), Int. J. Neural Systems 1(1); Sanger (1989), doi:10.1016/0893-6080(89)90044-0; Karhunen,
Joutsensalo (1994), Neural Networks 7(1); the delta rule: Widrow, Hoff (1960), Adaptive switching
circuits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import check_net_and_loss, weighed, weighted_mean
from fnn.nets.blocks import dense_blocks
from fnn.rules._blockwise import block_pass
from fnn.rules.backprop import stateless
from fnn.types import Array, Layer, Loss, Params, Rule

COMPETITIONS = ("none", "subspace", "sanger")


def hebbian(net: Layer, loss: Loss, *, competition: str = "subspace") -> Rule:
    """Oja's rule in the hidden layers, the true error in the last block.

    Args:
        net: a chain whose hidden blocks each begin with a dense layer; what follows in a block
            stays as it is.
        loss: any loss that takes its outputs; only the last block is trained by it.
        competition: `"none"`, `"subspace"` or `"sanger"`, as above. "none" is for one unit: more
            are copies of it.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer or `loss` no Loss. ValueError: `competition` is unknown, or
            `net` has no hidden block or one that does not begin with a dense layer.

    Source: Oja (1982), doi:10.1007/BF00275687; Sanger (1989), doi:10.1016/0893-6080(89)90044-0.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = hebbian(net, fnn.losses.l2_loss, competition="sanger")
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, (), jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> grads[0][0].b
    Array([0., 0., 0., 0.], dtype=float32)
    """
    check_net_and_loss(net, loss)
    _validate.one_of("competition", competition, COMPETITIONS)
    chain = dense_blocks("hebbian", net)

    def function(
        params: Params, x: Array, targets: Array, weights: Array | None
    ) -> tuple[Array, Params]:
        parts, hs, residuals, values, error = block_pass(chain, params, loss, x, targets)
        dy = weighed(error, weights)
        grads = [
            _hidden(p, x, y, weights, competition)
            for p, x, y in zip(parts[:-1], hs[:-2], hs[1:-1], strict=True)
        ]
        grads.append(chain.layers[-1].backward(parts[-1], residuals[-1], dy)[0])
        return weighted_mean(values, weights), chain.join(grads)

    return stateless("hebbian", net, loss, function)


def _hidden(params: Params, x: Array, y: Array, weights: Array | None, competition: str) -> Params:
    """Minus the update of a hidden block; all but the dense layer's `w` stays."""
    # positions are examples
    share, x, y = (a.reshape(-1, a.shape[-1]) for a in (weighed(y, weights), x, y))
    still = jax.tree.map(jnp.zeros_like, params)
    return (still[0]._replace(w=_step(params[0].w, x, y, share, competition)), *still[1:])


def _step(w: Array, x: Array, y: Array, share: Array, competition: str) -> Array:
    """`w (y^T y (.) T) - x^T y`; the first keeps weights finite and units apart.

    `share` is y times what its example counts for.
    """
    if competition == "subspace":
        # nothing of size units x units; what the units do not yet reproduce
        return (y @ w.T - x).T @ share
    inhibition = (
        w * jnp.broadcast_to((y * share).sum(0), w.shape)
        if competition == "none"
        else w @ jnp.triu(y.T @ share)
    )
    return inhibition - x.T @ share
