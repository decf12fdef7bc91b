"""A net as the chain of its blocks: what rules that go layer by layer see.

A block is a layer with weights and what follows it, its activation say, up to the next layer with
weights: `dense, relu` of an `mlp`, of a flat `serial`, or of each turn of a `repeat` are the same
blocks. What is no chain, a `residual` say, stays whole.

    h_0 = x,    h_l = block_l(h_{l-1}),    outputs = h_L        (lecture 003: the latent
    representations z_l)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn.factors import total
from fnn.nets.combinators import Chain, check_net, serial
from fnn.nets.layers import Dense
from fnn.types import Array, Layer, Params


class Blocks(NamedTuple):
    """A net's blocks and its params by block.

    Attributes:
        layers: each a `serial` that begins with the layer that has the weights.
        split: `(params) -> params of each block`.
        join: `(params of each block) -> params`, and so for trees like them.
    """

    layers: tuple[Layer, ...]
    split: Callable[[Params], tuple[Params, ...]]
    join: Callable[[Sequence[Params]], Params]

    def forward(self, params: Sequence[Params], x: Array) -> tuple[list[Array], list[Any]]:
        """`[h_0, ..., h_L]`, the input and every block's output, and the residuals of every block."""
        hs, kept = [jnp.asarray(x)], []
        for layer, p in zip(self.layers, params, strict=True):
            h, residuals = layer.forward(p, hs[-1])
            hs.append(h)
            kept.append(residuals)
        return hs, kept

    def backward(
        self,
        params: Sequence[Params],
        residuals: Sequence[Any],
        dys: Sequence[Array],
        reduce: Any = total,
    ) -> Params:
        """The gradients where block l is given its own `dys[l]`, as a tree like the net's params."""
        each = zip(self.layers, params, residuals, dys, strict=True)
        return self.join([layer.backward(p, r, dy, reduce)[0] for layer, p, r, dy in each])


def blocks(net: Layer) -> Blocks:
    """The blocks of a net.

    Args:
        net: any layer; `serial` and `repeat` are opened.

    Returns:
        Its `Blocks`; a net that is no chain is one block. Layers without weights before the first
        that has some belong to that one.

    >>> import fnn
    >>> inner = fnn.serial(fnn.dense(3, 3), fnn.activations.tanh)
    >>> net = fnn.serial(fnn.dense(2, 3), fnn.activations.relu, fnn.repeat(inner, 2), fnn.dense(3, 1))
    >>> [[layer.name for layer in block.layers] for block in blocks(net).layers]
    [['dense(2, 3)', 'relu'], ['dense(3, 3)', 'tanh'], ['dense(3, 3)', 'tanh'], ['dense(3, 1)']]
    """
    links = _links(net)
    sizes = _sizes(links)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]

    def grouped(items: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [tuple(items[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def split(params: Params) -> tuple[Params, ...]:
        return tuple(grouped(_split(net, params)))

    def join(each: Sequence[Params]) -> Params:
        return _join(net, [p for block in each for p in block])

    return Blocks(tuple(serial(*group) for group in grouped(links)), split, join)


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
            f"`net` of {rule} must be a chain of at least two layers with weights, got {net.name}, which is one block: "
            "the rule trains block by block and does not see inside. Build it by `fnn.mlp((inputs, hidden, outputs))` or `fnn.serial`."
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
                f"`net` of {rule}: hidden block {i} must begin with a dense layer, got {block.layers[0].name}. The rule's formula is one "
                "for the weights of `fnn.dense`. Build the net by `fnn.mlp`, or by `fnn.serial` of dense layers and activations."
            )
    return chain


def width(params: Params) -> int:
    """How many numbers a block puts out for an example, by its last matrix `[in, out]`."""
    return [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1][-1].shape[-1]


def has_weights(layer: Layer) -> bool:
    """Whether a layer has a matrix among its parameters; a norm's scale and bias are none."""
    return any(leaf.ndim > 1 for leaf in jax.tree.leaves(_shapes(layer)))


def begins_with_dense(block: Layer) -> bool:
    """Whether the layer that gives a block its weights is `fnn.dense`."""
    first = block.layers[0]
    return not first.layers and isinstance(_shapes(first), Dense)


def _shapes(layer: Layer) -> Params:
    """A layer's params as shapes and dtypes; computes no array."""
    return jax.eval_shape(layer.init, jax.eval_shape(jax.random.key, 0))


def _links(layer: Layer) -> list[Layer]:
    return (
        [inner for link in layer.links for inner in _links(link)]
        if isinstance(layer, Chain)
        else [layer]
    )


def _split(layer: Layer, params: Params) -> list[Params]:
    if not isinstance(layer, Chain):
        return [params]
    return [
        inner
        for link, p in zip(layer.links, layer.split(params), strict=True)
        for inner in _split(link, p)
    ]


def _join(layer: Layer, each: list[Params]) -> Params:
    """The params of a layer from those of its innermost links, which are taken off the list from
    the front."""
    if not isinstance(layer, Chain):
        return each.pop(0)
    return layer.join(tuple(_join(link, each) for link in layer.links))


def _sizes(links: list[Layer]) -> list[int]:
    """How many links each block has: a new one begins at every link with weights but the first."""
    sizes, begun = [0], False
    for link in links:
        if has_weights(link):
            if begun:
                sizes.append(0)
            begun = True
        sizes[-1] += 1
    return sizes
