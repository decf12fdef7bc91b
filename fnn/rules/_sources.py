"""What rules have in common that need the gradient of every example, and no net."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax.numpy as jnp

from fnn.backprop import check_net_and_loss, source
from fnn.per_example.norms import check_is_source
from fnn.rules.backprop import warn_if_flat
from fnn.types import Layer, Loss, Source


def source_of(rule: str, net: Layer | Source, loss: Loss | None) -> tuple[Source, Callable, Loss]:
    """The source of a rule, its `predict`, and its loss.

    Args:
        rule: its name.
        net: a layer, with a loss; or a source, without one.
        loss: takes the outputs of the layer; None for a source.

    Raises:
        TypeError: they are neither a layer with a loss nor a source alone.
    """
    if isinstance(net, Layer) or loss is not None:
        if not isinstance(net, Layer) and callable(net):
            raise TypeError(
                f"`net` must be a Layer if there is a loss, got {net!r:.60}. A source takes no "
                f"loss: name the settings, as in `{rule}(source, max_norm=1.0)`. A model? Make it "
                "a layer: `fnn.as_layer(model.apply)`."
            )
        layer = cast(Layer, net)
        measure = cast(Loss, loss)
        check_net_and_loss(layer, measure)
        warn_if_flat(rule, layer, stacklevel=5)
        return source(layer, measure), layer.apply, measure
    check_is_source(net)
    return net, _no_outputs, Loss("source", _no_value, _no_value)


def _no_outputs(params, x):
    """A source says nothing of outputs; `fit` asks for their shape."""
    return jnp.zeros((x.shape[0], 0))


def _no_value(outputs, targets):
    raise TypeError(
        "A rule of a source has no outputs to measure. For `fnn.evaluate` and validation, pass a "
        "layer and a loss: `fnn.as_layer(apply)` makes a layer of any model."
    )
