"""Forward gradients: derivatives along random directions in the forward pass (`jax.jvp`).

    weights:      grads = mean over k of (dE/dw . v_k) v_k,    v_k ~ N(0, I) like the parameters,
                  E the mean loss of the batch
    activations:  dE_i/dh_l ~ mean over k of s_ik u_ikl,    s_ik = sum over l of dE_i/dh_l . u_ikl,
                  u_ikl ~ N(0, I) like h_l

Both are unbiased, since E[v v^T] = I. Along weights one number stands for all P parameters:
E|grads|^2 = (P + 2) |dE/dw|^2 for one tangent. With K of them, r = V^T dE/dw has |r|^2 ~ |dE/dw|^2
chi^2_K, and V r is |r| N(0, I) in the P - 1 directions across dE/dw. So the squared cosine of grads
and dE/dw is distributed as Beta(K / 2, (P - 1) / 2), whatever the net; its mean is K / (K + P - 1).

Along activations every example has its own directions. Examples do not touch each other, so that
one pass gives the s_i of every example: `batch` numbers, each for about as many unknowns as there
are hidden units. Every block's own `backward` turns its estimate into gradients. The last block
gets the true dE_i/dh_L, which is known where the loss is computed.

Noise is on h_l, what a block puts out, after its activation; `backward` then applies f'. With noise
on the pre-activations, a unit whose f' is 0, a ReLU at rest, would get s_i u too, which is nothing
but noise; here it gets 0. In return s_i sums over units at rest as well and is noisier: with half
of the ReLUs at rest the two have the same variance. Where f' is 0 everywhere (`step`), a `jvp` sees
nothing either way.

Source: Baydin et al. (2022), arXiv:2202.08587 (weights); Ren, Kornblith, Liao, Hinton (2022),
arXiv:2210.03310 (activations; they add local losses, which are not here).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, get_args

import jax
from jaxtyping import Float, PyTree
from optax import tree

from fnn import _validate
from fnn.backprop import mean_loss
from fnn.factors import scale_rows
from fnn.nets.blocks import Blocks, hidden_blocks
from fnn.rules._blockwise import LocalRule, local_rule
from fnn.rules._noise import keep_key, mean_of_draws, normal_like, normal_rows, scale
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Layer, Loss, Rule, by_recipe

Perturbed = Literal["weights", "activations"]


@by_recipe
def forward_gradient(
    net: Layer, loss: Loss, *, tangents: int = 1, perturb: Perturbed = "weights"
) -> Rule:
    """The mean of directional derivatives times their random directions.

    Args:
        net: any layer; for `perturb="activations"` a chain of at least two blocks.
        loss: any loss that takes its outputs.
        tangents: how many directions are averaged, one forward pass each, at least 1. They run one
            after the other: memory does not grow with them.
        perturb: `"weights"`, one direction for the whole batch; or `"activations"`, one for each
            example and hidden block.

    Returns:
        A rule whose state is a key, split at every step; with `"activations"` a `LocalRule`.

    Raises:
        TypeError, ValueError: an argument is invalid; `net` is one block, with `"activations"`.

    >>> import fnn, jax.numpy as jnp
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = forward_gradient(net, fnn.losses.l2_loss, tangents=8, perturb="activations")
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    """
    mean = mean_loss(net, loss)
    _validate.positive("tangents", tangents, whole=True)
    _validate.one_of("perturb", perturb, get_args(Perturbed))
    warn_if_flat("forward_gradient", net)
    if perturb == "activations":
        chain = hidden_blocks("forward_gradient", net)
        return by_activity("forward_gradient(activations)", net, loss, chain, slope, tangents)

    def value_and_grad(params, state, x, targets, weights=None):
        state, key = jax.random.split(state)

        def draw(key):
            v = normal_like(key, params)
            value, dv = jax.jvp(lambda p: mean(p, x, targets, weights), (params,), (v,))
            return value, scale(dv, v)

        value, grads = mean_of_draws(draw, key, tangents)
        return value, grads, state

    return Rule("forward_gradient", keep_key, value_and_grad, net.apply, loss)


def slope(f: Callable, at_0: Float[Array, " batch"], direction: PyTree) -> Array:
    """The derivative of `f` along a direction at 0.

    >>> import jax.numpy as jnp
    >>> slope(lambda u: 3.0 * u, jnp.zeros(1), jnp.array([2.0]))
    Array([6.], dtype=float32)
    """
    return jax.jvp(f, (tree.zeros_like(direction),), (direction,))[1]


def by_activity(
    name: str,
    net: Layer,
    loss: Loss,
    chain: Blocks,
    change: Callable[..., Array],
    draws: int = 1,
    perturb_outputs: bool = False,
) -> LocalRule:
    """A rule that estimates dE_i/dh_l from how noise on the h_l changes each example's loss.

    Args:
        name: of the rule.
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs.
        chain: the blocks of the net.
        change: `(f, f at 0, direction) -> how f changes along it`, such as `slope`.
        draws: how many estimates are averaged.
        perturb_outputs: whether the outputs get noise too, and the last block the estimate in the
            place of the true error.

    Returns:
        A rule whose state is a key, split at every step. Its `signals` are the estimates that the
        next step takes.
    """

    def errors(batch, state):
        state, key = jax.random.split(state)
        hs = batch.hs[1:] if perturb_outputs else batch.hs[1:-1]

        def losses(noise):
            h = batch.hs[0]
            for layer, p, u in itertools.zip_longest(chain.layers, batch.params, noise):
                h = layer.apply(p, h)
                if u is not None:
                    h += u
            return loss.value(h, batch.targets)

        def draw(key):
            noise = normal_rows(key, hs)
            s = change(losses, batch.values, noise)
            return [scale_rows(u, s).astype(u.dtype) for u in noise]

        dys = mean_of_draws(draw, key, draws)
        return dys if perturb_outputs else [*dys, batch.error], state

    return local_rule(name, net, loss, chain, keep_key, errors)
