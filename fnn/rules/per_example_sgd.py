"""SGD on per-example gradients.

`jax.vmap` of the single-example manual gradient, then an aggregate of your choice.

    g_i = dE_i/dw for every example i,    grads = aggregate(g_1, ..., g_m);    by default sum_i
    weight_i g_i / sum_i weight_i

which is backprop's gradient (lecture 002: the mean of per-example gradients is the batch gradient).
Another aggregate, a median say, is what a batch gradient cannot give. Costs batch x parameters of
memory.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fnn.backprop import value_and_grad, weighted_mean
from fnn.per_example import by_vmap
from fnn.rules.backprop import stateless, warn_if_flat
from fnn.types import Array, Layer, Loss, Params, Rule

Aggregate = Callable[[Array, Array], Array]


def mean(gradients: Array, weights: Array) -> Array:
    """The weighted mean over examples of `[batch, ...]`: backprop's gradient.

    >>> mean(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 1.0]))
    Array([2.], dtype=float32)
    """
    return weighted_mean(gradients, weights)


def per_example_sgd(net: Layer, loss: Loss, *, aggregate: Aggregate = mean) -> Rule:
    """Per-example gradients by `vmap`, aggregated leaf by leaf.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        aggregate: `(gradients [batch, ...], weights [batch]) -> [...]`; weight 0 is padding and
            must not count.

    Returns:
        A rule without state.

    Raises:
        TypeError: `net` is no Layer, `loss` no Loss or `aggregate` no function.

    >>> import fnn
    >>> per_example_sgd(fnn.mlp((3, 2)), fnn.losses.l2_loss)
    per_example_sgd
    """
    if not callable(aggregate):
        raise TypeError(
            f"`aggregate` must be a function (gradients [batch, ...], weights [batch]) -> [...], got {aggregate!r}."
        )
    each = by_vmap(value_and_grad(net, loss))
    warn_if_flat("per_example_sgd", net)

    def function(
        params: Params, x: Array, targets: Array, weights: Array | None
    ) -> tuple[Array, Params]:
        values, gradients = each(params, x, targets)
        w = jnp.ones(values.shape, values.dtype) if weights is None else weights
        return weighted_mean(values, w), jax.tree.map(
            lambda g: aggregate(g, w).astype(g.dtype), gradients
        )

    return stateless("per_example_sgd", net, loss, function)
