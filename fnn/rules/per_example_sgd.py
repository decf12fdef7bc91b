"""SGD on per-example gradients: each by the manual backward pass, and an aggregate of your choice.

    g_i = dE_i/dw for every example i,    grads = aggregate(g_1, ..., g_m);
    by default sum_i weight_i g_i / sum_i weight_i

which is backprop's gradient (lecture 002: the mean of per-example gradients is the batch gradient).
Another aggregate, a median say, is what a batch gradient cannot give. Costs batch x parameters of
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.backprop import value_and_grad, weighted_mean
from fnn.per_example import by_vmap
from fnn.rules.backprop import stateless
from fnn.types import Array, Layer, Loss, Rule, by_recipe

Aggregate = Callable[[Array, Array], Array]


@by_recipe
def per_example_sgd(net: Layer, loss: Loss, *, aggregate: Aggregate = weighted_mean) -> Rule:
    """Per-example gradients by `vmap`, aggregated leaf by leaf.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        aggregate: `(gradients [batch, ...], weights [batch]) -> [...]`; weight 0 is padding and
            must not count, whatever the row holds. `fnn.backprop.weighted_mean`, the default,
            makes it backprop's gradient.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer, `loss` no Loss or `aggregate` no function.

    >>> import fnn
    >>> per_example_sgd(fnn.mlp((3, 2)), fnn.losses.l2_loss)
    per_example_sgd
    """
    _validate.is_function("aggregate", aggregate, "(gradients [batch, ...], weights [batch])")
    one_by_one = by_vmap(value_and_grad(net, loss))

    def function(params, x, targets, weights):
        values, gradients = one_by_one(params, x, targets)
        w = jnp.ones_like(values) if weights is None else weights
        grads = jax.tree.map(lambda g: aggregate(g, w).astype(g.dtype), gradients)
        return weighted_mean(values, w), grads

    return stateless("per_example_sgd", net, loss, function)
