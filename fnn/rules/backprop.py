"""Backpropagation, by the hand-written backward passes.

    dz_L = dE/dz_L,    dz_l = (dz_{l+1} w_{l+1}^T) (.) f'(z_l),    dw_l = a_{l-1}^T dz_l,    db_l =
    sum over the batch of dz_l

Source: Rumelhart, Hinton, Williams (1986), doi:10.1038/323533a0; lectures 001 and 004 eqs 21-28.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from fnn.backprop import value_and_grad
from fnn.nets.activations import Elementwise, is_flat
from fnn.types import Array, Layer, Loss, Params, Rule


def backprop(net: Layer, loss: Loss) -> Rule:
    """The gradient of the mean loss, by `net.backward`.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer or `loss` no Loss.

    >>> import jax, jax.numpy as jnp, fnn
    >>> net = fnn.mlp((3, 2))
    >>> rule = backprop(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> value, grads, state = rule.value_and_grad(params, rule.init(jax.random.key(1), params), jnp.ones((5, 3)), jnp.ones((5, 2)))
    """
    function = value_and_grad(net, loss)
    warn_if_flat("backprop", net)
    return stateless("backprop", net, loss, function)


def warn_if_flat(rule: str, net: Layer) -> None:
    """Warns where an activation's derivative is 0 everywhere: no error passes it.

    To be called by a rule's constructor.
    """
    flat = next(
        (layer for layer in _all_layers(net) if isinstance(layer, Elementwise) and is_flat(layer)),
        None,
    )
    if flat is not None:
        warnings.warn(
            f"{rule}: the derivative of `{flat.name}` is 0 everywhere, so that nothing before it will be learned. Take another activation, "
            "or a rule that needs no derivative, such as `fnn.rules.evolution_strategies`.",
            stacklevel=3,
        )


def _all_layers(net: Layer) -> Iterator[Layer]:
    yield net
    for layer in net.layers:
        yield from _all_layers(layer)


def stateless(name: str, net: Layer, loss: Loss, function: Any) -> Rule:
    """A rule without state from `(params, x, targets, weights) -> (value, grads)`."""

    def with_state(
        params: Params, state: Any, x: Array, targets: Array, weights: Array | None = None
    ) -> tuple[Array, Params, Any]:
        return *function(params, x, targets, weights), state

    return Rule(name, lambda key, params: (), with_state, net.apply, loss)
