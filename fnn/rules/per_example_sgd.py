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
from jaxtyping import Float

from fnn import _validate
from fnn.backprop import value_and_grad, weighted_mean
from fnn.per_example import by_vmap
from fnn.rules.backprop import stateless, warn_if_flat
from fnn.types import Array, Layer, Loss, Rule, by_recipe

Aggregate = Callable[[Array, Array], Array]


def mean(gradients: Float[Array, "batch ..."], weights: Float[Array, " batch"]) -> Array:
    """The weighted mean over examples: backprop's gradient.

    >>> mean(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 1.0]))
    Array([2.], dtype=float32)
    """
    return weighted_mean(gradients, weights)


@by_recipe
def per_example_sgd(net: Layer, loss: Loss, *, aggregate: Aggregate = mean) -> Rule:
    """Per-example gradients by `vmap`, aggregated leaf by leaf.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        aggregate: `(gradients [batch, ...], weights [batch]) -> [...]`; weight 0 is padding and
            must not count, whatever the row holds.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer, `loss` no Loss or `aggregate` no function.

    >>> import fnn
    >>> per_example_sgd(fnn.mlp((3, 2)), fnn.losses.l2_loss)
    per_example_sgd
    """
    form = "(gradients [batch, ...], weights [batch]) -> [...]"
    _validate.is_function("aggregate", aggregate, form)
    one_by_one = by_vmap(value_and_grad(net, loss))
    warn_if_flat("per_example_sgd", net)

    def function(params, x, targets, weights):
        values, gradients = one_by_one(params, x, targets)
        w = jnp.ones_like(values) if weights is None else weights
        grads = jax.tree.map(lambda g: aggregate(g, w).astype(g.dtype), gradients)
        return weighted_mean(values, w), grads

    return stateless("per_example_sgd", net, loss, function)
