"""Forward gradients: derivatives along random directions, taken in the forward pass (`jax.jvp`), in
the place of the backward pass.

    weights:      grads = mean over k of (dE/dw . v_k) v_k,    v_k ~ N(0, I) like the parameters, E
        the mean loss of the batch
    activations:  dE_i/dh_l ~ mean over k of s_ik u_ikl,       s_ik = sum over l of dE_i/dh_l .
        u_ikl,    u_ikl ~ N(0, I) like h_l

Both are unbiased, since E[v v^T] = I. Along weights one number tells about all P parameters:
E|grads|^2 = (P + 2) |dE/dw|^2 for one tangent. With K of them, r = V^T dE/dw has |r|^2 ~ |dE/dw|^2
chi^2_K, and V r is |r| N(0, I) in the P - 1 directions across dE/dw. So the squared cosine of grads
and dE/dw is distributed as Beta(K / 2, (P - 1) / 2), whatever the net; its mean is K / (K + P - 1).

Along activations an example has directions of its own. Examples do not touch each other, so that
one pass gives every example's own s_i: `batch` numbers, each about as many unknowns as there are
hidden units. Every block's own `backward` turns its estimate into gradients. The last block gets
the true dE_i/dh_L, which is known where the loss is computed.

Noise is on h_l, what a block puts out, after its activation; `backward` then applies f'. Were it on
the pre-activations, a unit whose f' is 0, a ReLU at rest, would be told s_i u too, nothing but
noise; here its share is 0. In return s_i sums over units at rest as well and is noisier: with half
of the ReLUs at rest the two come to the same variance. Where f' is 0 everywhere (`step`), a `jvp`
sees nothing either way.

Source: Baydin et al. (2022), arXiv:2202.08587 (weights); Ren, Kornblith, Liao, Hinton (2022),
arXiv:2210.03310 (activations; they add local losses, which are not here).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import _validate
from fnn.backprop import check_net_and_loss, mean_loss, weighed, weighted_mean
from fnn.factors.rows import times_row
from fnn.nets.blocks import blocks, hidden_blocks
from fnn.rules._blockwise import LocalRule, block_pass
from fnn.rules.backprop import warn_if_flat
from fnn.types import Array, Key, Layer, Loss, Params, Rule, at_least_float32

PERTURBED = ("weights", "activations")
# (f, f at 0, direction) -> how f changes along it
Change = Callable[[Callable[[Any], Array], Array, Any], Array]


def forward_gradient(
    net: Layer, loss: Loss, *, tangents: int = 1, perturb: str = "weights"
) -> Rule:
    """The mean of the gradient's shadows on random directions.

    Args:
        net: any layer; for `perturb="activations"` a chain of at least two blocks.
        loss: any loss that takes its outputs.
        tangents: how many directions are averaged, one forward pass each, at least 1. They are gone
            through one by one: memory does not grow with them.
        perturb: `"weights"`, one direction for the whole batch; or `"activations"`, one for each
            example and hidden block.

    Returns:
        A rule whose state is a key, split at every step; with `"activations"` a `LocalRule`.

    Raises:
        TypeError, ValueError: an argument cannot be meant; `net` is one block, with
            `"activations"`.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = forward_gradient(net, fnn.losses.l2_loss, tangents=8, perturb="activations")
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    check_net_and_loss(net, loss)
    _validate.positive("tangents", tangents, whole=True)
    _validate.one_of("perturb", perturb, PERTURBED)
    warn_if_flat("forward_gradient", net)
    if perturb == "activations":
        return by_activity("forward_gradient(activations)", net, loss, slope, draws=tangents)
    chain, mean = blocks(net), mean_loss(net, loss)

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Key]:
        state, key = jax.random.split(state)

        def draw(key: Key) -> tuple[Array, Params]:
            tangent = chain.join(normal_like(key, chain.split(params)))
            return along(lambda p: mean(p, x, targets, weights), params, tangent)

        return *mean_of_draws(draw, key, tangents), state

    return Rule("forward_gradient", lambda key, params: key, value_and_grad, net.apply, loss)


def along(
    function: Callable[[Any], Array], params: Params, tangent: Params
) -> tuple[Array, Params]:
    """A function's value, and its gradient's shadow on a direction, `(gradient . tangent) tangent`.

    Args:
        function: `(params) -> scalar`.
        params: where.
        tangent: a tree like `params`.

    Returns:
        `(value, a tree like params)`. The mean over directions sqrt(P) e_1, ..., sqrt(P) e_P is the
        gradient.

    >>> along(lambda p: (p**2).sum(), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]))
    (Array(5., dtype=float32), Array([6., 6.], dtype=float32))
    """
    value, derivative = jax.jvp(function, (params,), (tangent,))
    return value, jax.tree.map(lambda v: derivative.astype(v.dtype) * v, tangent)


def slope(f: Callable[[Any], Array], clean: Array, direction: Any) -> Array:
    """The derivative of `f` along a direction at 0.

    >>> slope(lambda u: 3.0 * u, jnp.zeros(1), jnp.array([2.0]))
    Array([6.], dtype=float32)
    """
    return jax.jvp(f, (jax.tree.map(jnp.zeros_like, direction),), (direction,))[1]


def by_activity(
    name: str,
    net: Layer,
    loss: Loss,
    change: Change,
    *,
    draws: int = 1,
    perturb_outputs: bool = False,
) -> LocalRule:
    """A rule that estimates dE_i/dh_l from how noise on the h_l changes each example's loss.

    Args:
        name: of the rule.
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs.
        change: `(losses, losses at 0, noise) -> [batch]`, such as `slope`, where `losses(noise)`
            are `[batch]`.
        draws: how many estimates are averaged.
        perturb_outputs: whether the outputs get noise too and the last block the estimate, in the
            place of the true error.

    Returns:
        A rule whose state is a key, split at every step. Its `signals` are the estimates that the
        next step takes.
    """
    check_net_and_loss(net, loss)
    chain = hidden_blocks(name, net)

    def passed(
        params: Params, key: Key, x: Array, targets: Array
    ) -> tuple[Array, Any, list[Array]]:
        """The losses, the residuals, and what every block is told."""
        parts, hs, residuals, values, error = block_pass(chain, params, loss, x, targets)
        losses = noisy_losses(chain.layers, loss, parts, x, targets)

        def draw(key: Key) -> list[Array]:
            return errors_along(
                losses, values, normal_rows(key, hs[1:] if perturb_outputs else hs[1:-1]), change
            )

        told = mean_of_draws(draw, key, draws)
        return values, residuals, told if perturb_outputs else [*told, error]

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Key]:
        state, key = jax.random.split(state)
        values, residuals, dys = passed(params, key, x, targets)
        grads = chain.backward(chain.split(params), residuals, [weighed(dy, weights) for dy in dys])
        return weighted_mean(values, weights), grads, state

    def signals(params: Params, state: Key, x: Array, targets: Array) -> list[Array]:
        return passed(params, jax.random.split(state)[1], x, targets)[2]

    return LocalRule(name, lambda key, params: key, value_and_grad, net.apply, loss, signals)


def noisy_losses(
    layers: tuple[Layer, ...], loss: Loss, parts: Any, x: Array, targets: Array
) -> Callable[[Any], Array]:
    """`(noise) -> losses [batch]` with `noise[l]` added to what block l puts out.

    Blocks beyond the last noise get none.
    """

    def losses(noise: Any) -> Array:
        h = jnp.asarray(x)
        for layer, p, n in itertools.zip_longest(layers, parts, noise):
            h = layer.apply(p, h) if n is None else layer.apply(p, h) + n
        return loss.value(h, jnp.asarray(targets))

    return losses


def errors_along(
    losses: Callable[[Any], Array], clean: Array, noise: list[Array], change: Change
) -> list[Array]:
    """What stands for dE_i/dh_l.

    Each example's noise times how its loss changes along it, `[batch, ...]` each.
    """
    s = change(losses, clean, noise)
    return [times_row(n, s) for n in noise]


def normal_rows(key: Key, arrays: Any) -> Any:
    """Numbers of N(0, 1) like a tree of `[batch, ...]`.

    Row i is drawn by a key of its own, `fold_in(key, i)`, whatever the batch is.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(
        jnp.arange(jax.tree.leaves(arrays)[0].shape[0])
    )
    return jax.vmap(normal_like)(keys, arrays)


def normal_like(key: Key, tree: Any) -> Any:
    """Numbers of N(0, 1) like a tree of arrays.

    One vector, cut into the leaves in order, since one draw compiles faster than many.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        raise ValueError(
            "`params` has no arrays, so nothing can be perturbed. Give the net a layer with parameters, such as `fnn.dense`."
        )
    ends = np.cumsum([leaf.size for leaf in leaves])
    drawn = jnp.split(jax.random.normal(key, (ends[-1],), leaves[0].dtype), ends[:-1])
    return jax.tree.unflatten(
        structure,
        [v.reshape(leaf.shape).astype(leaf.dtype) for v, leaf in zip(drawn, leaves, strict=True)],
    )


def mean_of_draws(draw: Callable[[Key], Any], key: Key, draws: int) -> Any:
    """The mean of `draw(key_k)` over the keys `jax.random.split(key, draws)`, in the memory of one.

    Sums are float32 at least.
    """
    keys = jax.random.split(key, draws)
    if draws == 1:
        return draw(keys[0])
    shapes = jax.eval_shape(draw, keys[0])

    def add(total: Any, key: Key) -> tuple[Any, None]:
        return jax.tree.map(lambda t, a: t + a.astype(t.dtype), total, draw(key)), None

    zeros = jax.tree.map(lambda s: at_least_float32(jnp.zeros(s.shape, s.dtype)), shapes)
    total, _ = lax.scan(add, zeros, keys)
    return jax.tree.map(lambda t, s: (t / int(draws)).astype(s.dtype), total, shapes)
