"""Backpropagation, by the hand-written backward passes, and the same by JAX, to compare with.

    dz_L = dE/dz_L,    dz_l = (dz_{l+1} w_{l+1}^T) (.) f'(z_l),
    dw_l = a_{l-1}^T dz_l,    db_l = sum over the batch of dz_l

Source: Rumelhart, Hinton, Williams (1986), doi:10.1038/323533a0; lectures 001 and 004 eqs 21-28.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax

from fnn.backprop import mean_loss, value_and_grad
from fnn.nets.activations import Elementwise, is_flat
from fnn.types import Layer, Loss, Rule, by_recipe


@by_recipe
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
    >>> x, targets = jnp.ones((5, 3)), jnp.ones((5, 2))
    >>> value, grads, state = rule.value_and_grad(params, (), x, targets)
    """
    return stateless("backprop", net, loss, value_and_grad(net, loss))


@by_recipe
def autodiff(net: Layer, loss: Loss) -> Rule:
    """The gradient of the mean loss by `jax.value_and_grad`.

    Uses `net.apply` and `loss.value` alone.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer or `loss` no Loss.

    >>> import fnn
    >>> autodiff(fnn.mlp((3, 2)), fnn.losses.l2_loss)
    autodiff
    """
    return stateless("autodiff", net, loss, jax.value_and_grad(mean_loss(net, loss)))


def stateless(name: str, net: Layer, loss: Loss, function: Callable) -> Rule:
    """A rule without state from `(params, x, targets, weights) -> (value, grads)`."""
    warn_if_flat(name, net, stacklevel=5)

    def with_state(params, state, x, targets, weights=None):
        return *function(params, x, targets, weights), state

    return Rule(name, lambda key, params: (), with_state, net.apply, loss)


def warn_if_flat(rule: str, net: Layer, stacklevel: int = 4) -> None:
    """Warns where the derivative of an activation is 0 everywhere: no error passes it.

    At a level of 4, call it in the constructor of a rule that is decorated by `by_recipe`.
    """
    for layer in _all_layers(net):
        if isinstance(layer, Elementwise) and is_flat(layer):
            warnings.warn(
                f"{rule}: the derivative of `{layer.name}` is 0 everywhere, so no layer before it "
                "learns. Take another activation, or a rule that needs no derivative, such as "
                "`fnn.rules.evolution_strategies`.",
                stacklevel=stacklevel,
            )
            return


def _all_layers(net):
    yield net
    for layer in net.layers:
        yield from _all_layers(layer)
