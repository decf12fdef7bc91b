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
from fnn.factors import materialise
from fnn.per_example import by_vmap
from fnn.per_example.norms import ask
from fnn.rules._sources import source_of
from fnn.types import Array, Layer, Loss, Rule, Source, by_recipe

Aggregate = Callable[[Array, Array], Array]


@by_recipe
def per_example_sgd(
    net: Layer | Source, loss: Loss | None = None, *, aggregate: Aggregate = weighted_mean
) -> Rule:
    """Per-example gradients by `vmap`, aggregated leaf by leaf.

    Args:
        net: any layer; or a source, such as `fnn.as_source(loss_fn)`, without a loss, whose
            gradients are written out.
        loss: any loss that takes the outputs of the layer.
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
    factors_of, predict, own_loss = source_of("per_example_sgd", net, loss)

    def written_out(params, *batch):
        return ask(factors_of, materialise, params, *batch)

    one_by_one = written_out
    if isinstance(net, Layer):
        one_by_one = by_vmap(value_and_grad(net, own_loss))

    def with_state(params, state, x, targets, weights=None):
        values, gradients = one_by_one(params, x, targets)
        w = jnp.ones_like(values) if weights is None else weights
        grads = jax.tree.map(lambda g: aggregate(g, w).astype(g.dtype), gradients)
        return weighted_mean(values, w), grads, state

    return Rule("per_example_sgd", lambda key, params: (), with_state, predict, own_loss)
