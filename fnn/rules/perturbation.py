"""Perturbation: noise on nodes or weights, times how much the loss rises with it.

    node:    dE_i/dh_l ~ (E_i(h + std u_i) - E_i) / std  u_il,
             u_il ~ N(0, I) like what hidden block l puts out for example i
    weight:  grads = sum_i weight_i (E_i(w + std v_i) - E_i) / std  v_i / sum_i weight_i,
             v_i ~ N(0, I) like the parameters

Every example has its own noise, from its own key: it does not depend on the other examples. For
std -> 0 node perturbation is `forward_gradient(perturb="activations")` with the same noise, and
weight perturbation the mean over examples of (dE_i/dw . v_i) v_i. For any std the expectation is
the gradient of the mean loss over the noise, in w, or in h_l; the block's `backward` carries the
node's on, at the inputs and f' without noise. Antithetic pairs, (E(+) - E(-)) / (2 std), cancel
what is even in the noise.

Noise is on h_l, what a block puts out, after its activation, and `backward` applies f'. In the
texts it is mostly on the pre-activations and no f' is needed (`fnn.rules.forward_gradient` says
what that changes). The last block gets the true error at the outputs; with `perturb_outputs` an
estimate like every other, as in those texts: then the rule uses only the values of the loss.

Source: Williams (1992), doi:10.1007/BF00992696; Werfel, Xie, Seung (2005),
doi:10.1162/0899766054796941; Hiratani, Mehta, Lillicrap, Latham (2022), On the stability and
scalability of node perturbation learning, NeurIPS 35. Jabri, Flower (1992), doi:10.1109/72.105429
(one weight after another); Cauwenberghs (1993), A fast stochastic error-descent algorithm, NIPS 5
(all at once); Zuge, Klos, Memmesheimer (2023), doi:10.1103/PhysRevX.13.021006,
doi:10.1101/2021.10.04.463055 (weight against node).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float
from optax import tree

from fnn import _validate
from fnn.backprop import (
    check_net_and_loss,
    fill_rows,
    forward_pass,
    forward_with,
    share_rows,
    weighted_mean,
)
from fnn.factors import widen
from fnn.rules._blockwise import LocalRule, hidden_chain
from fnn.rules._noise import keep_key, normal_like, scale, weighted_sum
from fnn.rules.forward_gradient import by_activity
from fnn.types import Array, Layer, Loss, Rule, by_recipe


@by_recipe
def node_perturbation(
    net: Layer,
    loss: Loss,
    *,
    std: float = 0.001,
    antithetic: bool = False,
    perturb_outputs: bool = False,
) -> LocalRule:
    """Finite noise on what hidden blocks put out, times what it changes in each example's loss.

    Args:
        net: a chain of at least two blocks.
        loss: any loss that takes its outputs.
        std: of the noise, in units of the activations, above 0. In float32 rounding shows below
            about 1e-4, curvature above 1e-2.
        antithetic: whether to compare noise with minus noise, by one more forward pass, and not
            with none.
        perturb_outputs: whether the outputs get noise too, and the last block the estimate in the
            place of the true error.

    Returns:
        A rule whose state is a key, split at every step.

    Raises:
        TypeError, ValueError: an argument is invalid; `net` is one block.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = node_perturbation(net, fnn.losses.l2_loss, std=0.1)
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    """
    chain, change = hidden_chain("node_perturbation", net, loss), difference(std, antithetic)
    return by_activity("node_perturbation", net, loss, chain, change, 1, perturb_outputs)


@by_recipe
def weight_perturbation(
    net: Layer,
    loss: Loss,
    *,
    std: float = 0.001,
    antithetic: bool = False,
    microbatch_size: int = 1,
) -> Rule:
    """Finite noise on all parameters at once, times what it changes in one example's loss.

    Every example has its own noise.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        std: of the noise, in units of the parameters, above 0. In float32 rounding shows below
            about 1e-4, curvature above 1e-2.
        antithetic: whether to compare noise with minus noise, by one more forward pass, and not
            with none.
        microbatch_size: the most examples at a time, each of which takes the memory of some seven
            sets of parameters; its greatest common divisor with the batch size is taken. 1 was the
            fastest on a CPU.

    Returns:
        A rule whose state is a key, split at every step. It draws a number for every parameter and
        example, and no matrix serves two examples: a step is much slower than that of other rules.

    Raises:
        TypeError, ValueError: an argument is invalid.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = weight_perturbation(net, fnn.losses.l2_loss, std=0.1)
    >>> params, state = net.init(jax.random.key(0)), jax.random.key(1)
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, state, x, targets)
    """
    check_net_and_loss(net, loss)
    _validate.positive("microbatch_size", microbatch_size, whole=True)
    change = difference(std, antithetic)

    def value_and_grad(params, state, x, targets, weights=None):
        state, key = jax.random.split(state)
        values = forward_pass(forward_with(net, params), loss, x, targets, weights)[2]

        def one(example):
            i, x, target, value = example
            noise = normal_like(jax.random.fold_in(key, i), params)

            def loss_at(step):
                outputs = net.apply(tree.add(params, step), x[None])
                return loss.value(outputs, target[None])[0]

            return scale(change(loss_at, value, noise), noise)

        rows = fill_rows(x, weights), fill_rows(targets, weights), values
        shares = share_rows(jnp.ones_like(widen(values)), weights)
        examples = jnp.arange(values.shape[0]), *rows
        grads = weighted_sum(one, shares, examples, microbatch_size)
        return weighted_mean(values, weights), grads, state

    return Rule("weight_perturbation", keep_key, value_and_grad, net.apply, loss)


def difference(std: float, antithetic: bool = False) -> Callable[..., Float[Array, " batch"]]:
    """How a function changes by a finite step along a direction.

    Returns:
        `(f, f at 0, direction) -> (f(std direction) - f(0)) / std`, or, antithetic, `(f(std
        direction) - f(-std direction)) / (2 std)`.

    >>> f, at_0, direction = lambda u: u**2, jnp.zeros(1), jnp.ones(1)
    >>> difference(0.5)(f, at_0, direction), difference(0.5, antithetic=True)(f, at_0, direction)
    (Array([0.5], dtype=float32), Array([0.], dtype=float32))
    """
    _validate.positive("std", std)
    step = float(std)

    def change(f, at_0, direction):
        up = f(tree.scale(step, direction))
        if not antithetic:
            return (up - at_0) / step
        down = f(tree.scale(-step, direction))
        return (up - down) / (2 * step)

    return change
