"""Perturbation: shake the nodes or the weights, see by how much the loss rises, and move against
it.

    node:    dE_i/dh_l ~ (E_i(h + std u_i) - E_i) / std  u_il,     u_il ~ N(0, I) like what hidden
        block l puts out for example i
    weight:  grads = sum_i weight_i (E_i(w + std v_i) - E_i) / std  v_i / sum_i weight_i,    v_i ~
        N(0, I) like the parameters

Every example has noise of its own, from a key of its own: it does not depend on who else is in the
batch. For std -> 0 node perturbation is `forward_gradient(perturb="activations")` with the same
noise, and weight perturbation the mean over examples of (dE_i/dw . v_i) v_i. For any std the
expectation is the gradient of the mean loss over the noise, in w, or in h_l; the node's is carried
on by the block's `backward` at the inputs and f' without noise. Antithetic pairs, (E(+) - E(-)) /
(2 std), cancel what is even in the noise.

Noise is on h_l, what a block puts out, after its activation, and `backward` applies f'. In the
texts it is mostly on the pre-activations and no f' is needed (`fnn.rules.forward_gradient` says
what that changes). The last block gets the true error at the outputs; with `perturb_outputs` an
estimate like every other, as in those texts: then of the loss nothing but its values is used.

Source: Williams (1992), doi:10.1007/BF00992696; Werfel, Xie, Seung (2005),
doi:10.1162/0899766054796941; Hiratani, Mehta, Lillicrap, Latham (2022), On the stability and
scalability of node perturbation learning, NeurIPS 35. Jabri, Flower (1992), doi:10.1109/72.105429
(one weight after another); Cauwenberghs (1993), A fast stochastic error-descent algorithm, NIPS 5
(all at once); Zuge, Klos, Memmesheimer (2023), doi:10.1103/PhysRevX.13.021006,
doi:10.1101/2021.10.04.463055 (weight against node).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.backprop import check_net_and_loss, forward_pass, weighed, weighted_mean
from fnn.nets.blocks import blocks
from fnn.rules._blockwise import LocalRule
from fnn.rules.backprop import warn_if_flat
from fnn.rules.forward_gradient import Change, by_activity, normal_like
from fnn.types import Array, Key, Layer, Loss, Params, Rule, at_least_float32


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
        perturb_outputs: whether the outputs get noise too and the last block the estimate, in the
            place of the true error.

    Returns:
        A rule whose state is a key, split at every step.

    Raises:
        TypeError, ValueError: an argument cannot be meant; `net` is one block.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = node_perturbation(net, fnn.losses.l2_loss, std=0.1)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    change = difference(std, antithetic)
    _check_flag("perturb_outputs", perturb_outputs)
    rule = by_activity("node_perturbation", net, loss, change, perturb_outputs=perturb_outputs)
    warn_if_flat("node_perturbation", net)
    return rule


def weight_perturbation(
    net: Layer,
    loss: Loss,
    *,
    std: float = 0.001,
    antithetic: bool = False,
    microbatch_size: int = 1,
) -> Rule:
    """Finite noise on all parameters at once, another for every example, times what it changes in
    that example's loss.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        std: of the noise, in units of the parameters, above 0. In float32 rounding shows below
            about 1e-4, curvature above 1e-2.
        antithetic: whether to compare noise with minus noise, by one more forward pass, and not
            with none.
        microbatch_size: how many examples at a time, each of which takes the memory of some seven
            sets of parameters. 1 was the fastest on a CPU.

    Returns:
        A rule whose state is a key, split at every step. It draws a number for every parameter and
        example, and no matrix serves two
        examples: a step is much slower than one of the other rules.

    Raises:
        TypeError, ValueError: an argument cannot be meant.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> rule = weight_perturbation(net, fnn.losses.l2_loss, std=0.1)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    check_net_and_loss(net, loss)
    _validate.positive("microbatch_size", microbatch_size, whole=True)
    change, chain = difference(std, antithetic), blocks(net)

    def value_and_grad(
        params: Params, state: Key, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Key]:
        state, key = jax.random.split(state)
        _, _, values = forward_pass(lambda x: net.forward(params, x), loss, x, targets)
        x, targets, parts = jnp.asarray(x), jnp.asarray(targets), chain.split(params)

        def one(row: Array, share: Array) -> Params:
            noise = normal_like(jax.random.fold_in(key, row), parts)

            def loss_at(shift: Params) -> Array:
                moved = chain.join(jax.tree.map(jnp.add, parts, shift))
                return loss.value(net.apply(moved, x[row][None]), targets[row][None])[0]

            s = share * at_least_float32(change(loss_at, values[row], noise))
            return jax.tree.map(lambda v: s.astype(v.dtype) * v, noise)

        shares = weighed(jnp.ones_like(at_least_float32(values)), weights)
        return (
            weighted_mean(values, weights),
            chain.join(_sum_over_rows(one, shares, parts, microbatch_size)),
            state,
        )

    return Rule("weight_perturbation", lambda key, params: key, value_and_grad, net.apply, loss)


def difference(std: float, antithetic: bool = False) -> Change:
    """`(f, f at 0, direction) -> (f(std direction) - f(0)) / std`, or, antithetic, `(f(std
    direction) - f(-std direction)) / (2 std)`.

    >>> f, at_0, direction = lambda u: u**2, jnp.zeros(1), jnp.ones(1)
    >>> difference(0.5)(f, at_0, direction), difference(0.5, antithetic=True)(f, at_0, direction)
    (Array([0.5], dtype=float32), Array([0.], dtype=float32))
    """
    _validate.positive("std", std)
    _check_flag("antithetic", antithetic)
    std = float(std)

    def change(f: Callable[[Any], Array], clean: Array, direction: Any) -> Array:
        up = f(jax.tree.map(lambda u: std * u, direction))
        return (
            (up - f(jax.tree.map(lambda u: -std * u, direction))) / (2 * std)
            if antithetic
            else (up - clean) / std
        )

    return change


def _sum_over_rows(one: Callable[[Array, Array], Any], shares: Array, like: Any, size: int) -> Any:
    """The sum of `one(row, share)` over all rows, `size` of them at a time.

    Sums are float32 at least.
    """
    batch = shares.shape[0]
    size = min(size, batch)
    padded = jnp.pad(shares, (0, -batch % size)).reshape(-1, size)
    # what fills up the last of them has a share of 0
    rows = (jnp.arange(padded.size) % batch).reshape(padded.shape)

    def add(total: Any, chunk: tuple[Array, Array]) -> tuple[Any, None]:
        some = jax.vmap(one)(*chunk)
        return jax.tree.map(lambda t, a: t + a.astype(t.dtype).sum(0), total, some), None

    zeros = jax.tree.map(lambda a: at_least_float32(jnp.zeros_like(a)), like)
    total, _ = lax.scan(add, zeros, (rows, padded))
    return jax.tree.map(lambda t, a: t.astype(a.dtype), total, like)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r:.80}.")
