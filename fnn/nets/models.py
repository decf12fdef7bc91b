"""Whole nets: `mlp`, the table `summary`, and `collapse`, which multiplies a linear net out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import he_normal, zeros

from fnn import _validate
from fnn.nets import activations
from fnn.nets.combinators import serial
from fnn.nets.layers import Dense, Initializer, dense
from fnn.types import Layer, Params


def mlp(
    sizes: Sequence[int],
    activation: str | Layer = "relu",
    *,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer:
    """A multi-layer perceptron.

    A `serial` of blocks `dense, activation`, and a last block that is linear (logits).

    Args:
        sizes: `(inputs, hidden, ..., outputs)`, at least two numbers above 0.
        activation: a name out of `ACTIVATIONS`, or a layer.
        kernel_init, bias_init: as for `dense`.

    Returns:
        A layer from `[..., sizes[0]]` to `[..., sizes[-1]]`; `params[l][0].w` is hidden block `l`'s
        weight and `params[-1].w` the last one's.

    Raises:
        TypeError, ValueError: fewer than two sizes, a size that is not a whole number above 0, an
            unknown activation.

    Source: lecture 003 (z_i = sigma(W_i z_{i-1} + b_i)), 004 eqs 21-28.

    >>> net = mlp((784, 512, 10), activation="relu")
    >>> net.apply(net.init(jax.random.key(0)), jnp.zeros((2, 784))).shape
    (2, 10)
    """
    if isinstance(sizes, str) or not hasattr(sizes, "__len__"):
        raise TypeError(
            f"`sizes` must be a sequence of whole numbers, (inputs, ..., outputs), got {sizes!r} ({type(sizes).__name__})."
        )
    if len(sizes) < 2:
        raise ValueError(
            f"`sizes` must hold at least two sizes, (inputs, ..., outputs), got {sizes!r}."
        )
    for i, size in enumerate(sizes):
        _validate.positive(f"sizes[{i}]", size, whole=True)
    layers = [
        dense(m, n, kernel_init=kernel_init, bias_init=bias_init)
        for m, n in itertools.pairwise(sizes)
    ]
    hidden = activations.get(activation)
    return serial(*(serial(layer, hidden) for layer in layers[:-1]), layers[-1])


def summary(net: Layer, input_shape: Sequence[int], *, dtype: Any = float) -> str:
    """A table of every layer with its output shape and number of parameters. Computes no array.

    Args:
        net: any layer.
        input_shape: shape of `x`, with or without a batch axis.
        dtype: dtype of `x`; a whole-number one for a net that begins with an embedding.

    Returns:
        The table as text, one line a layer, indented by nesting.

    >>> print(summary(mlp((784, 64, 10)), (32, 784)))
    layer                output shape    parameters
    serial               (32, 10)            50,890
      serial             (32, 64)            50,240
        dense(784, 64)   (32, 64)            50,240
        relu             (32, 64)                 0
      dense(64, 10)      (32, 10)               650
    """
    if not isinstance(net, Layer):
        raise TypeError(f"`net` must be a Layer, got {net!r}.")
    if not hasattr(input_shape, "__len__"):
        raise TypeError(
            f"`input_shape` must be a tuple, the shape of `x`, got {input_shape!r}. Pass `(batch, {input_shape!r})`."
        )
    rows: list[tuple[str, str, str]] = []

    def visit(layer: Layer, x: Any, depth: int) -> Any:
        params = jax.eval_shape(layer.init, jax.eval_shape(jax.random.key, 0))
        y = jax.eval_shape(layer.apply, params, x)
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
        rows.append(("  " * depth + layer.name, str(y.shape), f"{count:,}"))
        for inner in layer.layers:
            x = visit(inner, x, depth + 1)
        return y

    visit(net, jax.ShapeDtypeStruct(tuple(input_shape), dtype), 0)
    width = max(len(name) for name, _, _ in rows) + 3
    table = [("layer", "output shape", "parameters"), *rows]
    return "\n".join(f"{name:<{width}}{shape:<15}{count:>11}" for name, shape, count in table)


def collapse(params: Params) -> Dense:
    """The one dense layer that a net of dense layers without activations amounts to.

    `w = w_1 w_2 ... w_n`, b accumulated.

    Args:
        params: params of a net whose only parameters are `Dense`, in order: `mlp`, `serial`,
            `repeat` of one dense layer.

    Returns:
        `Dense(w=[in, out], b=[out])` such that `x @ w + b` is the net's output where every
        activation is the identity.

    Raises:
        ValueError: no dense layer, other parameters than dense ones, sizes that do not chain, or
            stacked layers whose order the params do not tell (a `repeat` of several dense layers).

    Source: lectures 002, 003 (linear collapse): W_n ... W_1 x + b is one matrix.

    >>> net = mlp((3, 5, 2), "identity")
    >>> collapse(net.init(jax.random.key(0))).w.shape
    (3, 2)
    """
    w, b = None, None
    for i, layer in enumerate(_dense_layers(params)):
        bias = jnp.zeros(layer.w.shape[-1:], layer.w.dtype) if layer.b is None else layer.b
        if w is None or b is None:
            w, b = layer.w, bias
        elif w.shape[1] != layer.w.shape[0]:
            raise ValueError(
                f"`params`: dense layer {i} takes {layer.w.shape[0]} features but the one before gives {w.shape[1]}."
            )
        else:
            w, b = w @ layer.w, b @ layer.w + bias
    if w is None or b is None:
        raise ValueError("`params` hold no Dense layer: there is nothing to collapse.")
    return Dense(w, b)


def _dense_layers(params: Params) -> list[Dense]:
    """The dense layers of a tree in order; those that `repeat` stacked one by one."""
    found: list[Dense] = []
    before: tuple[int, ...] = ()  # the axes of layers of the Dense before
    for node in jax.tree.leaves(params, is_leaf=lambda p: isinstance(p, Dense)):
        if not isinstance(node, Dense):
            came = f"an array of shape {node.shape}" if hasattr(node, "shape") else repr(node)
            raise ValueError(
                f"`params` hold {came} outside a Dense layer: only dense layers collapse."
            )
        stacked = node.w.shape[:-2]
        if stacked and before and stacked[0] == before[0]:
            raise ValueError(
                f"`params` hold two Dense layers in a row with a leading axis of {stacked[0]}: params do not tell their order "
                "(several layers in one `repeat`, several `repeat`s, or many nets?). Collapse each layer's, or each net's, by itself."
            )
        before = stacked
        flat = jax.tree.map(lambda leaf, k=len(stacked): leaf.reshape(-1, *leaf.shape[k:]), node)
        found += (
            [jax.tree.map(lambda leaf, i=i: leaf[i], flat) for i in range(len(flat.w))]
            if stacked
            else [node]
        )
    return found
