"""A net as the chain of its blocks: what rules that go layer by layer see.

A block is a layer with weights and what follows it, its activation say, up to the next layer with
weights. An `mlp`, a flat `serial` and a `repeat` of the same layers have the same blocks. What is
no chain, a `residual` say, stays whole.

    h_0 = x,    h_l = block_l(h_{l-1}),    outputs = h_L     (lecture 003: the representations z_l)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Shaped

from fnn.factors import total
from fnn.nets.combinators import check_net, serial
from fnn.nets.convolution import Kernel
from fnn.nets.layers import Dense
from fnn.types import Abstract, Array, Layer, Params, Residuals


class Blocks(NamedTuple):
    """The blocks of a net, and its params by block.

    Attributes:
        layers: each a `serial` that begins with the layer that has the weights.
        split: `(params) -> params of each block`.
        join: `(params of each block) -> params`, and so for trees like them.
    """

    layers: tuple[Layer, ...]
    split: Callable[[Params], tuple[Params, ...]]
    join: Callable[[Sequence[Params]], Params]

    def forward(self, params: Params, x: Array) -> tuple[list[Array], Residuals]:
        """`[h_0, ..., h_L]`, the input and every block's output, and the residuals of each."""
        outputs = [jnp.asarray(x)]
        kept = []
        for layer, p in zip(self.layers, params, strict=True):
            h, residuals = layer.forward(p, outputs[-1])
            outputs.append(h)
            kept.append(residuals)
        return outputs, kept

    def backward(
        self,
        params: Params,
        residuals: Residuals,
        dys: Sequence[Array],
        reduce: Any = total,
    ) -> Params:
        """The gradients where block l gets its own `dys[l]`, as a tree like the params."""
        grads = []
        for layer, p, r, dy in zip(self.layers, params, residuals, dys, strict=True):
            g, _ = layer.backward(p, r, dy, reduce)
            grads.append(g)
        return self.join(grads)


def blocks(net: Layer) -> Blocks:
    """The blocks of a net.

    Args:
        net: any layer; `serial` and `repeat` are opened.

    Returns:
        Its `Blocks`; a net that is no chain is one block. Layers without weights before the first
        that has some belong to that one.

    >>> import fnn
    >>> inner = fnn.serial(fnn.dense(3, 3), fnn.activations.tanh)
    >>> ends = fnn.dense(2, 3), fnn.dense(3, 1)
    >>> net = fnn.serial(ends[0], fnn.activations.relu, fnn.repeat(inner, 2), ends[1])
    >>> [[layer.name for layer in block.layers] for block in blocks(net).layers]
    [['dense(2, 3)', 'relu'], ['dense(3, 3)', 'tanh'], ['dense(3, 3)', 'tanh'], ['dense(3, 1)']]
    """
    links = _links(net)
    starts = [i for i, layer in enumerate(links) if has_weights(layer)]
    bounds = list(itertools.pairwise([0, *starts[1:], len(links)]))

    def split(params):
        parts = _split(net, params)
        return tuple(tuple(parts[start:end]) for start, end in bounds)

    def join(parts):
        return _join(net, itertools.chain.from_iterable(parts))

    layers = tuple(serial(*links[start:end]) for start, end in bounds)
    return Blocks(layers, split, join)


def hidden_blocks(rule: str, net: Layer) -> Blocks:
    """The blocks of a net that has hidden ones.

    Raises:
        TypeError: `net` is no Layer. ValueError: it is one block, in which a rule that goes block
            by block sees no hidden layer.
    """
    check_net(net)
    found = blocks(net)
    if len(found.layers) < 2:
        raise ValueError(
            f"`net` of {rule} must be a chain of at least two layers with weights, got {net.name}, "
            "which is one block: the rule trains block by block and does not see inside. Build it "
            "by `fnn.mlp((inputs, hidden, outputs))` or `fnn.serial`."
        )
    return found


def dense_blocks(rule: str, net: Layer) -> Blocks:
    """The blocks of a net whose hidden ones each begin with a dense layer.

    Raises:
        TypeError, ValueError: `net` is none such.
    """
    chain = hidden_blocks(rule, net)
    for i, block in enumerate(chain.layers[:-1]):
        if not begins_with_dense(block):
            raise ValueError(
                f"`net` of {rule}: hidden block {i} must begin with a dense layer, got "
                f"{block.layers[0].name}. The rule has a formula for the weights of `fnn.dense` "
                "alone. Build the net by `fnn.mlp`, or by `fnn.serial` of dense layers and "
                "activations."
            )
    return chain


def width(params: PyTree[Shaped[Abstract, "..."]]) -> int:
    """How many numbers a block puts out for an example, by its last matrix `[in, out]`."""
    return _matrices(params)[-1].shape[-1]


def input_width(params: PyTree[Shaped[Abstract, "..."]]) -> int:
    """How many numbers a block takes from an example, by its first matrix `[in, out]`."""
    return _matrices(params)[0].shape[-2]


def has_weights(layer: Layer) -> bool:
    """Whether a layer has a matrix or a kernel; a norm's scale and bias are none."""
    return bool(_matrices(param_shapes(layer)))


def begins_with_dense(block: Layer) -> bool:
    """Whether the layer that gives a block its weights is `fnn.dense`."""
    return isinstance(_first_params(block), Dense)


def begins_with_linear(block: Layer) -> bool:
    """Whether the layer that gives a block its weights is dense or a convolution."""
    return isinstance(_first_params(block), (Dense, Kernel))


def convolves(layer: Layer) -> bool:
    """Whether there is a convolution in a layer, whose output depends on the size of images."""
    params = param_shapes(layer)
    nodes = jax.tree.leaves(params, is_leaf=lambda p: isinstance(p, Kernel))
    return any(isinstance(node, Kernel) for node in nodes)


def param_shapes(layer: Layer) -> Params:
    """The params of a layer as shapes and dtypes; computes no array."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(layer.init, key)


def _matrices(params):
    """The arrays of two axes and more."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]


def _first_params(block):
    """The params of the first layer of a block, as shapes; None for a combinator."""
    first = block.layers[0]
    return None if first.layers else param_shapes(first)


def _links(layer):
    """The layers of a chain, chains inside it opened."""
    if layer.split is None:
        return [layer]
    links = []
    for inner in layer.layers:
        links += _links(inner)
    return links


def _split(layer, params):
    """The params of each link."""
    if layer.split is None:
        return [params]
    links = []
    for inner, part in zip(layer.layers, layer.split(params), strict=True):
        links += _split(inner, part)
    return links


def _join(layer, parts):
    """The params of a layer from the next of its links' params."""
    if layer.join is None:
        return next(parts)
    return layer.join(tuple(_join(inner, parts) for inner in layer.layers))
