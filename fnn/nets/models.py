"""Whole nets: `mlp`, the table `summary`, and `collapse`, which multiplies a linear net out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import he_normal, zeros
from jaxtyping import PyTree, Shaped

from fnn import _validate
from fnn.nets import activations
from fnn.nets.blocks import param_shapes
from fnn.nets.combinators import check_net, serial
from fnn.nets.layers import Dense, Initializer, dense
from fnn.types import ArrayLike, Layer


def mlp(
    sizes: Sequence[int],
    activation: activations.Name | Layer[Any] = "relu",
    *,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer[tuple[Any, ...]]:
    """A multi-layer perceptron: blocks `dense, activation`, and a last dense layer (logits).

    Args:
        sizes: `(inputs, hidden, ..., outputs)`, at least two numbers above 0.
        activation: a name out of `ACTIVATIONS`, or a layer.
        kernel_init: as for `dense`.
        bias_init: as for `dense`.

    Returns:
        A layer from `[..., sizes[0]]` to `[..., sizes[-1]]`; `params[l][0].w` is the weight of
        hidden block `l` and `params[-1].w` the last one.

    Raises:
        TypeError, ValueError: fewer than two sizes, a size that is no whole number above 0, an
            unknown activation.

    Source: lecture 003 (z_i = sigma(W_i z_{i-1} + b_i)), 004 eqs 21-28.

    >>> net = mlp((784, 512, 10), activation="relu")
    >>> net.apply(net.init(jax.random.key(0)), jnp.zeros((2, 784))).shape
    (2, 10)
    """
    if isinstance(sizes, str) or not hasattr(sizes, "__len__"):
        raise TypeError(
            "`sizes` must be a sequence of whole numbers, (inputs, ..., outputs), got "
            f"{sizes!r} ({type(sizes).__name__})."
        )
    if len(sizes) < 2:
        raise ValueError(
            f"`sizes` must hold at least two sizes, (inputs, ..., outputs), got {sizes!r}."
        )
    for i, size in enumerate(sizes):
        _validate.positive(f"sizes[{i}]", size, whole=True)
    layers = []
    for m, n in itertools.pairwise(sizes):
        layer = dense(m, n, kernel_init=kernel_init, bias_init=bias_init)
        layers.append(layer)
    last = layers.pop()
    nonlinear = activations.get(activation)
    hidden = [serial(layer, nonlinear) for layer in layers]
    return serial(*hidden, last)


def summary(
    net: Layer,
    input_shape: Sequence[int],
    *,
    dtype: Any = float,
) -> str:
    """A table of every layer with its output shape and number of parameters. Computes no array.

    Args:
        net: any layer.
        input_shape: shape of `x`, with or without a batch axis.
        dtype: dtype of `x`; a whole-number one for a net that begins with an embedding.

    Returns:
        The table as text, one line a layer, indented by nesting; equal layers in a row share one.

    >>> print(summary(mlp((784, 64, 10)), (32, 784)))
    layer                output shape    parameters
    serial               (32, 10)            50,890
      serial             (32, 64)            50,240
        dense(784, 64)   (32, 64)            50,240
        relu             (32, 64)                 0
      dense(64, 10)      (32, 10)               650
    """
    check_net(net)
    if not hasattr(input_shape, "__len__"):
        raise TypeError(
            f"`input_shape` must be a tuple, the shape of `x`, got {input_shape!r}. "
            f"Pass `(batch, {input_shape!r})`."
        )
    x = jax.ShapeDtypeStruct(tuple(input_shape), dtype)
    rows = list(_rows(net, x, 0, 1))
    width = max(len(name) for name, _, _ in rows) + 3
    rows.insert(0, ("layer", "output shape", "parameters"))
    return "\n".join(f"{name:<{width}}{shape:<15}{count:>11}" for name, shape, count in rows)


def _rows(layer, x, depth, times):
    """The row of a layer that comes `times` times, and those of the layers inside."""
    params = param_shapes(layer)
    y = jax.eval_shape(layer.apply, params, x)
    count = times * sum(leaf.size for leaf in jax.tree.leaves(params))
    indent = "  " * depth
    label = layer.name
    if times > 1:
        label = f"{times} x {label}"
    yield indent + label, str(y.shape), f"{count:,}"
    for inner, run in itertools.groupby(layer.layers):
        uses = len(list(run)) if layer.split else 1
        yield from _rows(inner, x, depth + 1, uses)
        x = jax.eval_shape(inner.apply, param_shapes(inner), x)


def collapse(params: PyTree[Shaped[ArrayLike, "..."]]) -> Dense:
    """The one dense layer that equals a net of dense layers without activations.

        w = w_1 w_2 ... w_n,    b accumulated

    Args:
        params: params of a net whose only parameters are `Dense`, in order: `mlp`, `serial`,
            `repeat` of one dense layer.

    Returns:
        `Dense(w=[in, out], b=[out])` such that `x @ w + b` is the output of the net where every
        activation is the identity.

    Raises:
        ValueError: no dense layer, other parameters than dense ones, sizes that do not chain, or
            stacked layers whose order the params do not tell (a `repeat` of several dense layers).

    Source: lectures 002, 003 (linear collapse): W_n ... W_1 x + b is one matrix.

    >>> net = mlp((3, 5, 2), "identity")
    >>> collapse(net.init(jax.random.key(0))).w.shape
    (3, 2)
    """
    layers = _dense_layers(params)
    if not layers:
        raise ValueError("`params` hold no Dense layer: there is nothing to collapse.")
    w, b = layers[0]
    for i, layer in enumerate(layers[1:], 1):
        takes = layer.w.shape[0]
        gives = w.shape[1]
        if takes != gives:
            raise ValueError(
                f"`params`: dense layer {i} takes {takes} features but the one before "
                f"gives {gives}."
            )
        w = w @ layer.w
        b = b @ layer.w + layer.b
    return Dense(w, b)


def _dense_layers(params):
    """The dense layers of a tree in order, with a bias each; those of a `repeat` one by one."""
    found = []
    before = ()  # the axes of layers of the Dense before
    for node in jax.tree.leaves(params, is_leaf=lambda p: isinstance(p, Dense)):
        if not isinstance(node, Dense):
            came = repr(node)
            if hasattr(node, "shape"):
                came = f"an array of shape {node.shape}"
            raise ValueError(f"`params` hold {came} outside a Dense layer: only those collapse.")
        stacked = node.w.shape[:-2]
        if stacked and before[:1] == stacked[:1]:
            raise ValueError(
                f"`params` hold two Dense layers in a row with a leading axis of {stacked[0]}: "
                "params do not tell their order (several layers in one `repeat`, several "
                "`repeat`s, or many nets?). Collapse each layer, or each net, by itself."
            )
        before = stacked
        w = node.w.reshape(-1, *node.w.shape[-2:])
        b = node.b
        if b is None:
            b = jnp.zeros((len(w), w.shape[2]), w.dtype)
        found += map(Dense, w, b.reshape(len(w), -1))
    return found
