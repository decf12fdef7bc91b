"""Combinators: layers made of layers. Each returns a `Layer`, so they nest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.factors import is_factor, keep, total
from fnn.types import Array, Key, Layer, Params


@dataclass(frozen=True, repr=False)
class Chain(Layer):
    """A layer that is nothing but others one after the other.

    Rules that go layer by layer open it (`fnn.blocks`).

    Attributes:
        links: what is chained, in order; a layer comes once for each of its uses.
        split: `(params) -> params of each link`.
        join: `(params of each link) -> params`: `split` undone.
    """

    links: tuple[Layer, ...] = ()
    split: Callable[[Params], tuple[Params, ...]] = tuple
    join: Callable[[tuple[Params, ...]], Params] = tuple


def serial(*layers: Layer) -> Layer:
    """Layers one after the other: the output of each is the input of the next.

    Args:
        *layers: any layers, themselves `serial` or not.

    Returns:
        A layer whose params are the tuple of its layers' params.

    Raises:
        TypeError: something is no `Layer`. ValueError: at the call, `params` are those of another
            net.

    >>> from fnn import activations, dense
    >>> net = serial(dense(4, 8), activations.relu, dense(8, 2))
    >>> jax.tree.map(jnp.shape, net.init(jax.random.key(0)))
    (Dense(w=(4, 8), b=(8,)), (), Dense(w=(8, 2), b=(2,)))
    """
    for i, layer in enumerate(layers):
        _check_layer(f"layers[{i}]", layer)

    def init(key: Key) -> tuple[Any, ...]:
        _validate.is_key("key", key)
        return tuple(
            layer.init(k)
            for layer, k in zip(layers, jax.random.split(key, len(layers)), strict=True)
        )

    def forward(params: tuple[Any, ...], x: Array) -> tuple[Array, tuple[Any, ...]]:
        _check_chain(layers, params)
        kept = []
        for layer, p in zip(layers, params, strict=True):
            x, residuals = layer.forward(p, x)
            kept.append(residuals)
        return x, tuple(kept)

    def backward(
        params: tuple[Any, ...], residuals: tuple[Any, ...], dy: Array, reduce: Any = total
    ) -> tuple[tuple[Any, ...], Array]:
        _check_chain(layers, params)
        grads = []
        for layer, p, r in zip(
            reversed(layers), reversed(params), reversed(residuals), strict=True
        ):
            g, dy = layer.backward(p, r, dy, reduce)
            grads.append(g)
        return tuple(reversed(grads)), dy

    def split(params: Any) -> tuple[Any, ...]:
        _check_chain(layers, params)
        return params

    return Chain("serial", init, forward, backward, layers, layers, split)


def repeat(layer: Layer, n: int) -> Layer:
    """`n` copies of a layer, each with its own parameters, under one `lax.scan`.

    Compile time does not grow with depth.

    Args:
        layer: maps `[..., features]` to the same shape and dtype.
        n: how many, at least 1.

    Returns:
        A layer whose params are the layer's own, stacked on a leading axis of `n`.

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

    def init(key: Key) -> Any:
        _validate.is_key("key", key)
        return jax.vmap(layer.init)(jax.random.split(key, n))

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            at = f"params{jax.tree_util.keystr(path)}"
            _validate.is_array(at, leaf)
            if leaf.shape[:1] != (n,):
                raise ValueError(
                    f"{name}: `{at}` has shape {leaf.shape}, expected a leading axis of {n}. Params of another net?"
                )

        def body(x: Array, p: Any) -> tuple[Array, Any]:
            y, residuals = layer.forward(p, x)
            _check_same_shape(name, x, y)
            return y, residuals

        return lax.scan(body, jnp.asarray(x), params, length=n)

    def backward(params: Any, residuals: Any, dy: Array, reduce: Any = total) -> tuple[Any, Array]:
        def body(dy: Array, kept: tuple[Any, Any]) -> tuple[Array, Any]:
            grads, dx = layer.backward(*kept, dy, reduce)
            return dx, grads

        dx, grads = lax.scan(body, dy, (params, residuals), length=n, reverse=True)
        return jax.tree.map(reduce.stack, grads, is_leaf=is_factor), dx

    def split(params: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(n))

    def join(each: tuple[Any, ...]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    return Chain(name, init, forward, backward, (layer,), (layer,) * n, split, join)


def iterate(layer: Layer, n: int) -> Layer:
    """The same layer `n` times, with the same parameters every time, under one `lax.scan`.

    Tied weights, an unrolled recurrence.

    Args:
        layer: maps `[..., features]` to the same shape and dtype.
        n: how many times, at least 1.

    Returns:
        A layer with the layer's own params. A gradient sums over the uses; every per-example
        statistic is exact, cross terms between uses included: uses are to a factor what positions
        are.

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

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        def body(x: Array, _: None) -> tuple[Array, Any]:
            y, residuals = layer.forward(params, x)
            _check_same_shape(name, x, y)
            return y, residuals

        return lax.scan(body, jnp.asarray(x), None, length=n)

    def backward(params: Any, residuals: Any, dy: Array, reduce: Any = total) -> tuple[Any, Array]:
        def use(dy: Array, r: Any, reduce: Any) -> tuple[Any, Array]:
            return layer.backward(params, r, dy, reduce)

        if reduce.linear:  # nothing is kept but the sum
            shapes = jax.eval_shape(
                lambda dy, r: use(dy, jax.tree.map(lambda a: a[0], r), reduce)[0], dy, residuals
            )

            def add(carry: tuple[Array, Any], r: Any) -> tuple[tuple[Array, Any], None]:
                grads, dx = use(carry[0], r, reduce)
                return (dx, jax.tree.map(jnp.add, carry[1], grads)), None

            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            (dx, grads), _ = lax.scan(add, (dy, zeros), residuals, length=n, reverse=True)
            return grads, dx

        def keeping(dy: Array, r: Any) -> tuple[Array, Any]:
            kept, dx = use(dy, r, keep)
            return dx, kept

        dx, kept = lax.scan(keeping, dy, residuals, length=n, reverse=True)
        return jax.tree.map(lambda f: reduce(f.merged()), kept, is_leaf=is_factor), dx

    return Layer(name, layer.init, forward, backward, (layer,))


def residual(layer: Layer) -> Layer:
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

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        y, residuals = layer.forward(params, x)
        _check_same_shape(name, x, y)
        return x + y, residuals

    def backward(params: Any, residuals: Any, dy: Array, reduce: Any = total) -> tuple[Any, Array]:
        grads, dx = layer.backward(params, residuals, dy, reduce)
        return grads, dy + dx  # the sum copies dy to both of its terms

    return Layer(name, layer.init, forward, backward, (layer,))


def check_net(net: Any) -> None:
    """Raises a TypeError unless `net` is a `Layer`."""
    if not isinstance(net, Layer):
        raise TypeError(
            f"`net` must be a Layer, got {net!r}. Make one by `fnn.mlp` or `fnn.serial`."
        )


def _check_layer(name: str, value: Any) -> None:
    if not isinstance(value, Layer):
        mend = "An activation's name? Use `fnn.activations.get(name)`. A function? `fnn.elementwise(name, fn, derivative)`."
        if isinstance(value, (list, tuple)):
            mend = "A list of layers? Unpack it: `serial(*layers)`."
        raise TypeError(f"`{name}` must be a Layer, got {value!r}. {mend}")


def _check_chain(layers: tuple[Layer, ...], params: Any) -> None:
    # a NamedTuple is one layer's params
    if type(params) is not tuple or len(params) != len(layers):
        came = f"a tuple of {len(params)}" if type(params) is tuple else type(params).__name__
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"serial({names}): `params` must be a tuple of {len(layers)}, got {came}. Params of another net?"
        )


def _check_same_shape(name: str, x: Any, y: Any) -> None:
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"{name}: the layer inside must keep the shape, but maps {x.shape} {x.dtype} to {y.shape} {y.dtype}."
        )
