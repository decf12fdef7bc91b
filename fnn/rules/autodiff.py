"""The same gradient by JAX's own reverse mode, to compare `backprop` with."""

from __future__ import annotations

import jax

from fnn.backprop import mean_loss
from fnn.rules.backprop import stateless, warn_if_flat
from fnn.types import Layer, Loss, Rule, by_recipe


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
    by_jax = jax.value_and_grad(mean_loss(net, loss))
    warn_if_flat("autodiff", net)
    return stateless("autodiff", net, loss, by_jax)
