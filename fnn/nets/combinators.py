"""Combinators: layers made of layers. Each returns a `Layer`, so they nest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.factors import Stacked, is_factor, keep, total
from fnn.factors.base import scan
from fnn.types import Layer, P, by_recipe


@by_recipe
def serial(*layers: Layer[Any]) -> Layer[tuple[Any, ...]]:
    """Layers one after the other: the output of each is the input of the next.

    Args:
        *layers: any layers, themselves `serial` or not.

    Returns:
        A layer whose params are the tuple of the params of its layers.

    Raises:
        TypeError: an argument is no `Layer`. ValueError: at the call, `params` are those of another
            net.

    >>> from fnn import activations, dense
    >>> net = serial(dense(4, 8), activations.relu, dense(8, 2))
    >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0)))
    (Dense(w=(4, 8), b=(8,)), (), Dense(w=(8, 2), b=(2,)))
    """
    for i, layer in enumerate(layers):
        _check_layer(f"layers[{i}]", layer)

    def init(key):
        _validate.is_key("key", key)
        keys = jax.random.split(key, len(layers))
        return tuple(layer.init(k) for layer, k in zip(layers, keys, strict=True))

    def forward(params, x):
        _check_chain(layers, params)
        kept = []
        for layer, p in zip(layers, params, strict=True):
            x, residuals = layer.forward(p, x)
            kept.append(residuals)
        return x, tuple(kept)

    def backward(params, residuals, dy, reduce=total):
        _check_chain(layers, params)
        grads = []
        parts = zip(layers, params, residuals, strict=True)
        for layer, p, r in reversed(list(parts)):
            g, dy = layer.backward(p, r, dy, reduce)
            grads.append(g)
        grads.reverse()
        return tuple(grads), dy

    def split(params):
        _check_chain(layers, params)
        return params

    return Layer("serial", init, forward, backward, layers, split, tuple)


@by_recipe
def repeat(layer: Layer[P], n: int) -> Layer[P]:
    """`n` copies of a layer, each with its own parameters, under one `lax.scan`.

    Compile time does not grow with depth.

    Args:
        layer: maps `[..., features]` to the same shape and dtype.
        n: how many, at least 1.

    Returns:
        A layer whose params are those of the layer, stacked on a leading axis of `n`.

    Raises:
        ValueError: at the call, the layer changes the shape, or `params` are not stacked `n` times.

    >>> from fnn import activations, dense
    >>> net = repeat(serial(dense(4, 4), activations.tanh), 3)
    >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0)))
    (Dense(w=(3, 4, 4), b=(3, 4)), ())
    """
    _check_layer("layer", layer)
    _validate.positive("n", n, whole=True)
    name = f"repeat({layer.name}, {n})"

    def init(key):
        _validate.is_key("key", key)
        keys = jax.random.split(key, n)
        return jax.vmap(layer.init)(keys)

    def forward(params, x):
        _check_stacked(name, params, n)

        def body(x, p):
            y, residuals = layer.forward(p, x)
            _check_same_shape(name, x, y)
            return y, residuals

        return scan(body, jnp.asarray(x), params, length=n)

    def backward(params, residuals, dy, reduce=total):
        def body(dy, kept):
            p, r = kept
            grads, dx = layer.backward(p, r, dy, reduce)
            return dx, grads

        def stack(result):
            return Stacked(result) if is_factor(result) else reduce.stack(result)

        dx, grads = lax.scan(body, dy, (params, residuals), length=n, reverse=True)
        grads = jax.tree.map(stack, grads, is_leaf=is_factor)
        return grads, dx

    def split(params):
        def params_of(i):
            return jax.tree.map(lambda leaf: leaf[i], params)

        return tuple(map(params_of, range(n)))

    def join(parts):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    layers = (layer,) * n
    return Layer(name, init, forward, backward, layers, split, join)


@by_recipe
def iterate(layer: Layer[P], n: int) -> Layer[P]:
    """The same layer `n` times, with the same parameters every time, under one `lax.scan`.

    These are tied weights, or a recurrence that is unrolled. Uses are to a factor what positions
    are, so that every per-example statistic is exact, cross terms between uses included.

    Args:
        layer: maps `[..., features]` to the same shape and dtype.
        n: how many times, at least 1.

    Returns:
        A layer with the params of the layer. A gradient sums over the uses.

    Raises:
        ValueError: at the call, the layer changes the shape.

    Source: Rumelhart, Hinton, Williams (1986): a recurrent net as an equivalent feed-forward net
    with equal weights.

    >>> from fnn import activations, dense
    >>> net = iterate(serial(dense(4, 4), activations.tanh), 3)
    >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0)))
    (Dense(w=(4, 4), b=(4,)), ())
    """
    _check_layer("layer", layer)
    _validate.positive("n", n, whole=True)
    name = f"iterate({layer.name}, {n})"

    def forward(params, x):
        def body(x, _):
            y, residuals = layer.forward(params, x)
            _check_same_shape(name, x, y)
            return y, residuals

        return scan(body, jnp.asarray(x), None, length=n)

    def backward(params, residuals, dy, reduce=total):
        def body(dy, r):
            factors, dx = layer.backward(params, r, dy, keep)
            return dx, factors

        def merge(factor):
            return reduce(keep(factor).merged())  # `keep` raises where it is no factor

        dx, uses = lax.scan(body, dy, residuals, length=n, reverse=True)
        grads = jax.tree.map(merge, uses, is_leaf=is_factor)
        return grads, dx

    layers = (layer,) * n
    return Layer(name, layer.init, forward, backward, layers)


@by_recipe
def residual(layer: Layer[P]) -> Layer[P]:
    """The layer plus its input, `y = x + layer(x)`.

    Args:
        layer: maps `[..., features]` to the same shape.

    Returns:
        A layer with the same params.

    Raises:
        ValueError: at the call, the layer changes the shape.

    Source: He, Zhang, Ren, Sun (2015), arXiv:1512.03385.

    >>> from fnn import activations
    >>> residual(activations.identity).apply((), jnp.array([[3.0]]))
    Array([[6.]], dtype=float32)
    """
    _check_layer("layer", layer)
    name = f"residual({layer.name})"

    def forward(params, x):
        y, residuals = layer.forward(params, x)
        _check_same_shape(name, x, y)
        return x + y, residuals

    def backward(params, residuals, dy, reduce=total):
        grads, dx = layer.backward(params, residuals, dy, reduce)
        return grads, dy + dx  # the sum copies dy to both of its terms

    return Layer(name, layer.init, forward, backward, (layer,))


def check_net(net: Layer) -> None:
    """Raises a TypeError unless `net` is a `Layer`."""
    if not isinstance(net, Layer):
        mend = "Make one: `fnn.mlp((3, 5, 2))`."
        if callable(net):
            mend = "A function or a model? Make it a layer: `fnn.as_layer(model.apply)`."
        raise TypeError(f"`net` must be a Layer, got {net!r:.80}. {mend}")


def _check_layer(name, value):
    if isinstance(value, Layer):
        return
    mend = (
        "An activation's name? Use `fnn.activations.get(name)`. A function? "
        "`fnn.elementwise(name, fn, derivative)`."
    )
    if isinstance(value, (list, tuple)):
        mend = "A list of layers? Unpack it: `serial(*layers)`."
    raise TypeError(f"`{name}` must be a Layer, got {value!r:.80}. {mend}")


def _check_chain(layers, params):
    came = type(params).__name__
    if type(params) is tuple:  # a NamedTuple is one layer's params
        if len(params) == len(layers):
            return
        came = f"a tuple of {len(params)}"
    names = ", ".join(layer.name for layer in layers)
    raise ValueError(
        f"serial({names}): `params` must be a tuple of {len(layers)}, got {came}. "
        "Params of another net?"
    )


def _check_stacked(name, params, n):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        at = f"params{jax.tree_util.keystr(path)}"
        _validate.is_array(at, leaf)
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"{name}: `{at}` has shape {leaf.shape}, expected a leading axis of {n}. "
                "Params of another net?"
            )


def _check_same_shape(name, x, y):
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"{name}: the layer inside must keep the shape, but maps {x.shape} {x.dtype} to "
            f"{y.shape} {y.dtype}."
        )
