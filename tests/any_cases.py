"""Losses of one example in plain JAX, of every kind that `fnn.as_source` has to read.

`CASES` maps a name to a function that builds the case. Call it inside `jax.enable_x64(True)`. All
but a few axes of a case differ in length, so that a transposition shows.

The losses run under strict dtype promotion and rank promotion "raise".
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXAMPLES = 5


class AnyCase(NamedTuple):
    """The loss of one example, and what is expected of its factors.

    Attributes:
        name: the key of the case.
        loss: `(params, *example) -> scalar`.
        params: a tree of arrays.
        batch: trees of arrays `[examples, ...]`.
        kinds: `{keystr of a leaf: text of the report}`, where the text is beyond doubt. The parts
            of a `Sum` are in alphabetical order.
        tolerance: norm-wise relative error of a gradient.
        standard: whether it needs the dtype and rank promotion that JAX has by default.
    """

    name: str
    loss: Callable
    params: Any
    batch: tuple
    kinds: dict[str, str]
    tolerance: float = 1e-12
    standard: bool = False


class Draw:
    """Random arrays, sent by `jax.device_put`: `jnp.asarray` compiles a program for every shape."""

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def normal(self, *shape: int) -> Any:
        """Normal numbers, in float64."""
        return jax.device_put(np.asarray(self.rng.normal(size=shape)))

    def weight(self, *shape: int, inputs: int | None = None) -> Any:
        """Normal numbers over the root of the number of inputs, which is the last axis but one."""
        if inputs is None:
            inputs = shape[-2] if len(shape) > 1 else 4
        return jax.device_put(self.rng.normal(size=shape) / np.sqrt(inputs))

    def whole(self, end: int, *shape: int, start: int = 0) -> Any:
        """Whole numbers from `start` to `end - 1`, in int32."""
        return jax.device_put(np.asarray(self.rng.integers(start, end, shape), np.int32))


CASES: dict[str, Callable[[], AnyCase]] = {}


def case(build: Callable, name: str | None = None, **options: Any) -> Callable:
    """Registers `build(draw) -> (loss, params, batch, kinds)`."""
    name = name or build.__name__

    def built() -> AnyCase:
        loss, params, batch, kinds = build(Draw(name))
        return AnyCase(name, loss, params, batch, kinds, **options)

    assert name not in CASES
    CASES[name] = built
    return build


# What the losses are made of


def distance(y: Any, target: Any) -> Any:
    """Half the squared distance."""
    return 0.5 * jnp.sum((y - target) ** 2)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Of logits `[..., classes]` at integer labels `[...]`, summed."""
    log_probabilities = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)
    return -jnp.sum(picked)


def add(y: Any, bias: Any) -> Any:
    """`y [..., out]` plus a bias `[out]`."""
    return y + jnp.broadcast_to(bias, y.shape)


def dense(params: dict, x: Any) -> Any:
    """`x @ W + b`, with or without positions."""
    return add(x @ params["W"], params["b"])


def mlp(params: dict, x: Any) -> Any:
    """Two dense layers."""
    h = jnp.tanh(dense(params["first"], x))
    return dense(params["second"], h)


def layer_norm(params: dict, x: Any) -> Any:
    """Over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    unit = centred * lax.rsqrt(variance + 1e-5)
    return add(unit * jnp.broadcast_to(params["scale"], x.shape), params["bias"])


def attention(q: Any, k: Any, v: Any) -> Any:
    """Causal; all `[positions, heads, width]`."""
    length, _, width = q.shape
    scores = jnp.einsum("thk,shk->hts", q, k) / np.sqrt(width).item()
    seen = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(seen[None], scores, -1e9)
    return jnp.einsum("hts,shk->thk", jax.nn.softmax(scores), v)


def dense_params(draw: Draw, inputs: int, outputs: int) -> dict:
    return {"W": draw.weight(inputs, outputs), "b": draw.normal(outputs)}


def mlp_params(draw: Draw) -> dict:
    return {"first": dense_params(draw, 4, 6), "second": dense_params(draw, 6, 3)}


def stacked_params(draw: Draw, layers: int, width: int) -> dict:
    return {"W": draw.weight(layers, width, width), "b": draw.normal(layers, width)}


def norm_params(draw: Draw, width: int) -> dict:
    return {"scale": 1 + 0.3 * draw.normal(width), "bias": draw.normal(width)}


DENSE = {"['W']": "Outer", "['b']": "PerExample"}
STACKED = {"['W']": "Stacked(Outer)", "['b']": "Stacked(PerExample)"}
MLP = {f"['{layer}']{leaf}": DENSE[leaf] for layer in ("first", "second") for leaf in DENSE}


# Dense layers


@case
def plain_mlp(draw):
    def loss(params, x, target):
        return distance(mlp(params, x), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def classifier(draw):
    def loss(params, x, label):
        h = jax.nn.gelu(dense(params["first"], x))
        return cross_entropy(dense(params["second"], h), label)

    batch = (draw.normal(EXAMPLES, 4), draw.whole(3, EXAMPLES))
    return loss, mlp_params(draw), batch, MLP


@case
def jit_inside(draw):
    layer = jax.jit(lambda params, x: jnp.tanh(dense(params, x)))

    def loss(params, x, target):
        h = layer(params["first"], x)
        return distance(layer(params["second"], h), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def whole_loss_jitted(draw):
    @jax.jit
    def loss(params, x, target):
        return distance(jnp.tanh(dense(params, x)), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, dense_params(draw, 4, 3), batch, DENSE


def _remat(draw, policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def block(params, x):
        h = jnp.tanh(dense(params["up"], x))
        return x + jnp.sin(dense(params["down"], h))

    def loss(params, x, target):
        h = block(params["block"], x)
        return distance(dense(params["head"], h), target)

    params = {
        "block": {"up": dense_params(draw, 4, 6), "down": dense_params(draw, 6, 4)},
        "head": dense_params(draw, 4, 3),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    kinds = {
        "['block']['up']['W']": "Outer",
        "['block']['up']['b']": "PerExample",
        "['block']['down']['W']": "Outer",
        "['block']['down']['b']": "PerExample",
        "['head']['W']": "Outer",
    }
    return loss, params, batch, kinds


@case
def remat(draw):
    return _remat(draw, None)


@case
def remat_that_saves_products(draw):
    return _remat(draw, jax.checkpoint_policies.dots_saveable)


@case
def remat_in_jit_in_remat(draw):
    inner = jax.checkpoint(lambda params, x: jnp.tanh(dense(params, x)))
    middle = jax.jit(lambda params, x: jnp.sin(inner(params["first"], x)))

    @jax.checkpoint
    def outer(params, x):
        return dense(params["second"], middle(params, x))

    def loss(params, x, target):
        return distance(outer(params, x), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def transposed(draw):
    def loss(params, x, target):
        h = jnp.tanh(params["first"].T @ x)
        h = jnp.tanh(params["second"] @ h)
        return distance(h @ params["third"].T, target)

    params = {
        "first": draw.weight(4, 6),
        "second": draw.weight(7, 6),
        "third": draw.weight(3, 7),
    }
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    kinds = {"['first']": "Outer", "['second']": "Outer", "['third']": "Outer"}
    return loss, params, batch, kinds


@case
def reshaped_weights(draw):
    """A weight kept flat, and one kept as a tensor."""

    def loss(params, x, target):
        h = jnp.tanh(x @ params["flat"].reshape(4, 6))
        return distance(h @ params["tensor"].reshape(6, 7), target)

    params = {"flat": draw.normal(24), "tensor": draw.weight(2, 3, 7)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 7))
    return loss, params, batch, {"['tensor']": "Outer"}


@case
def sequence(draw):
    def loss(params, x, target):
        return distance(mlp(params, x), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def positions_on_two_axes(draw):
    def loss(params, x, target):
        return distance(jnp.tanh(dense(params, x)), target)

    batch = (draw.normal(EXAMPLES, 2, 7, 4), draw.normal(EXAMPLES, 2, 7, 3))
    return loss, dense_params(draw, 4, 3), batch, DENSE


@case
def sequence_pooled(draw):
    """The mean over positions comes after the product."""

    def loss(params, x, label):
        h = jnp.tanh(dense(params["first"], x)).mean(0)
        return cross_entropy(dense(params["second"], h), label)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.whole(3, EXAMPLES))
    return loss, mlp_params(draw), batch, MLP


@case
def vmap_inside(draw):
    def layer(params, x):
        return jnp.tanh(dense(params, x))

    def loss(params, x, target):
        y = jax.vmap(layer, (None, 0))(params, x)
        return distance(y, target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    return loss, dense_params(draw, 4, 3), batch, DENSE


@case
def map_inside(draw):
    """A `lax.map` over positions, each with a position-wise net."""

    def loss(params, x, target):
        def net(x):
            h = jnp.tanh(dense(params["first"], x))
            return dense(params["second"], h)

        return distance(lax.map(net, x), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def thrice_tied(draw):
    def loss(params, x, target):
        h = jnp.tanh(dense(params, x))
        h = jnp.tanh(dense(params, h))
        return distance(dense(params, h), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, dense_params(draw, 4, 4), batch, DENSE


@case
def tied_to_its_transpose(draw):
    """An autoencoder with one weight."""

    def loss(params, x):
        h = jnp.tanh(x @ params["W"])
        return distance(h @ params["W"].T, x)

    return loss, {"W": draw.weight(6, 4)}, (draw.normal(EXAMPLES, 6),), {"['W']": "Outer"}


@case
def tied_with_and_without_positions(draw):
    def loss(params, x, sequence, target):
        h = jnp.tanh(x @ params["W"])
        more = jnp.tanh(sequence @ params["W"]).sum(0)
        return distance(h + more, target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 3))
    return loss, {"W": draw.weight(4, 3)}, batch, {"['W']": "Outer"}


@case
def log_bilinear(draw):
    def loss(params, x, y):
        score = x @ params["W"] @ y
        return jax.nn.softplus(-score)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Outer"}


@case
def gradient_penalty(draw):
    """The loss has a derivative in it."""

    def loss(params, x, target):
        def score(x):
            h = jnp.tanh(dense(params["first"], x))
            return jnp.sum(dense(params["second"], h) * target)

        slope = jax.grad(score)(x)
        return score(x) + (jnp.sum(slope**2) - 1) ** 2

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


# Scans


@case
def recurrent(draw):
    """A net over time; its params are constants of the scan."""

    def loss(params, xs, targets):
        def step(h, x):
            h = jnp.tanh(x @ params["U"] + h @ params["W"] + params["b"])
            return h, h @ params["V"]

        _, ys = lax.scan(step, jnp.zeros(6, xs.dtype), xs)
        return distance(ys, targets)

    params = {
        "U": draw.weight(4, 6),
        "W": draw.weight(6, 6),
        "b": draw.normal(6),
        "V": draw.weight(6, 3),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    kinds = {"['U']": "Outer", "['W']": "Outer", "['b']": "PerExample", "['V']": "Outer"}
    return loss, params, batch, kinds


@case
def recurrent_reversed(draw):
    """The scan runs from the last position to the first, two at a time."""

    def loss(params, xs, target):
        def step(h, x):
            return jnp.tanh(x @ params["U"] + h @ params["W"]), None

        h, _ = lax.scan(step, jnp.zeros(3, xs.dtype), xs, reverse=True, unroll=2)
        return distance(h, target)

    params = {"U": draw.weight(4, 3), "W": draw.weight(3, 3)}
    batch = (draw.normal(EXAMPLES, 6, 4), draw.normal(EXAMPLES, 3))
    return loss, params, batch, {"['U']": "Outer", "['W']": "Outer"}


@case
def stacked_layers(draw):
    def loss(params, x, target):
        def layer(h, own):
            return h + jnp.tanh(dense(own, h)), None

        h = x @ params["in"]
        h, _ = lax.scan(layer, h, params["layers"])
        return distance(h @ params["out"], target)

    params = {
        "in": draw.weight(4, 6),
        "layers": stacked_params(draw, 7, 6),
        "out": draw.weight(6, 3),
    }
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    kinds = {
        "['in']": "Outer",
        "['layers']['W']": "Stacked(Outer)",
        "['layers']['b']": "Stacked(PerExample)",
        "['out']": "Outer",
    }
    return loss, params, batch, kinds


@case
def stacked_layers_of_a_sequence(draw):
    def loss(params, x, target):
        def layer(h, own):
            return h + jnp.tanh(dense(own, h)), None

        h, _ = lax.scan(layer, x, params)
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    return loss, stacked_params(draw, 3, 4), batch, STACKED


@case
def scan_with_remat(draw):
    def loss(params, x, target):
        @jax.checkpoint
        def layer(h, own):
            middle = jnp.tanh(dense(own["up"], h))
            return h + dense(own["down"], middle), None

        h, _ = lax.scan(layer, x, params)
        return distance(h, target)

    params = {
        "up": {"W": draw.weight(3, 4, 6), "b": draw.normal(3, 6)},
        "down": {"W": draw.weight(3, 6, 4), "b": draw.normal(3, 4)},
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    kinds = {
        "['up']['W']": "Stacked(Outer)",
        "['up']['b']": "Stacked(PerExample)",
        "['down']['W']": "Stacked(Outer)",
        "['down']['b']": "Stacked(PerExample)",
    }
    return loss, params, batch, kinds


@case
def recurrent_in_stacked(draw):
    """Layers under a scan, each a net over time."""

    def loss(params, xs, targets):
        def layer(xs, own):
            def step(h, x):
                h = jnp.tanh(x @ own["U"] + h @ own["W"] + own["b"])
                return h, h

            _, hs = lax.scan(step, jnp.zeros(4, xs.dtype), xs)
            return hs, None

        hs, _ = lax.scan(layer, xs, params)
        return distance(hs, targets)

    params = {
        "U": draw.weight(3, 4, 4),
        "W": draw.weight(3, 4, 4),
        "b": draw.normal(3, 4),
    }
    batch = (draw.normal(EXAMPLES, 6, 4), draw.normal(EXAMPLES, 6, 4))
    kinds = {
        "['U']": "Stacked(Outer)",
        "['W']": "Stacked(Outer)",
        "['b']": "Stacked(PerExample)",
    }
    return loss, params, batch, kinds


@case
def stacked_in_recurrent(draw):
    """A net over time, each step of which has layers under a scan."""

    def loss(params, xs, target):
        def step(h, x):
            def layer(h, own):
                return jnp.tanh(dense(own, h)), None

            h, _ = lax.scan(layer, h + x @ params["U"], params["layers"])
            return h, None

        h, _ = lax.scan(step, jnp.zeros(4, xs.dtype), xs)
        return distance(h, target)

    params = {"U": draw.weight(6, 4), "layers": stacked_params(draw, 3, 4)}
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 4))
    kinds = {
        "['U']": "Outer",
        "['layers']['W']": "Stacked(Outer)",
        "['layers']['b']": "PerExample",
    }
    return loss, params, batch, kinds


@case
def stacked_twice(draw):
    """Groups of layers, both under scans; all groups share a weight."""

    def loss(params, x, target):
        def group(h, own):
            def layer(h, own):
                return h + jnp.tanh(dense(own, h)), None

            h, _ = lax.scan(layer, h, own)
            return jnp.sin(h @ params["shared"]), None

        h, _ = lax.scan(group, x, params["groups"])
        return distance(h, target)

    params = {
        "groups": {"W": draw.weight(2, 3, 4, 4), "b": draw.normal(2, 3, 4)},
        "shared": draw.weight(4, 4),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    kinds = {
        "['groups']['W']": "Stacked(Stacked(Outer))",
        "['groups']['b']": "Stacked(Stacked(PerExample))",
        "['shared']": "Outer",
    }
    return loss, params, batch, kinds


@case
def params_in_the_carry(draw):
    def loss(params, xs, target):
        def step(carry, x):
            own, h = carry
            h = jnp.tanh(x @ own["U"] + h @ own["W"] + own["b"])
            return (own, h), None

        (_, h), _ = lax.scan(step, (params, jnp.zeros(3, xs.dtype)), xs)
        return distance(h, target)

    params = {"U": draw.weight(4, 3), "W": draw.weight(3, 3), "b": draw.normal(3)}
    batch = (draw.normal(EXAMPLES, 6, 4), draw.normal(EXAMPLES, 3))
    kinds = {"['U']": "Outer", "['W']": "Outer", "['b']": "PerExample"}
    return loss, params, batch, kinds


@case
def params_that_the_carry_changes(draw):
    """The weight decays from step to step."""

    def loss(params, xs, target):
        def step(carry, x):
            w, h = carry
            h = jnp.tanh(x @ w + h)
            return (0.9 * w, h), None

        (_, h), _ = lax.scan(step, (params["W"], jnp.zeros(3, xs.dtype)), xs)
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 6, 4), draw.normal(EXAMPLES, 3))
    return loss, {"W": draw.weight(4, 3)}, batch, {}


@case
def fori_loop(draw):
    def loss(params, x, target):
        def turn(_, h):
            return jnp.tanh(dense(params, h))

        return distance(lax.fori_loop(0, 3, turn, x), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, dense_params(draw, 4, 4), batch, DENSE


@case
def lstm(draw):
    def loss(params, xs, target):
        def cell(state, x):
            c, h = state
            gates = x @ params["W_ih"] + h @ params["W_hh"] + params["b"]
            i, f, g, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), None

        zeros = jnp.zeros(3, xs.dtype)
        (_, h), _ = lax.scan(cell, (zeros, zeros), xs)
        return distance(h @ params["V"], target)

    params = {
        "W_ih": draw.weight(4, 12),
        "W_hh": draw.weight(3, 12),
        "b": draw.normal(12),
        "V": draw.weight(3, 6),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 6))
    kinds = {"['W_ih']": "Outer", "['W_hh']": "Outer", "['b']": "PerExample", "['V']": "Outer"}
    return loss, params, batch, kinds


# Layers of one stacked leaf, picked one at a time


@case
def stacked_in_a_python_loop(draw):
    def loss(params, x, target):
        h = x
        for i in range(3):
            h = h + jnp.tanh(add(h @ params["W"][i], params["b"][i]))
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    return loss, stacked_params(draw, 3, 4), batch, {"['W']": "Stacked(Outer)"}


@case
def some_layers_of_a_stack(draw):
    """One layer of the stack is used twice, and one never."""

    def loss(params, x, target):
        h = x
        for i in (2, 0, 2):
            h = jnp.tanh(h @ params["W"][i])
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, {"W": draw.weight(6, 4, 4)}, batch, {"['W']": "Outer"}


@case
def dynamic_index_in_a_loop(draw):
    def loss(params, x, target):
        def layer(h, i):
            w = lax.dynamic_index_in_dim(params["W"], i, keepdims=False)
            return h + jnp.tanh(h @ w), None

        h, _ = lax.scan(layer, x, jnp.arange(3))
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, {"W": draw.weight(3, 4, 4)}, batch, {}


@case
def dynamic_index_of_the_example(draw):
    """The data says which of the stacked weights the example takes."""

    def loss(params, x, i, target):
        w = lax.dynamic_index_in_dim(params["W"], i, keepdims=False)
        return distance(jnp.tanh(x @ w), target)

    batch = (draw.normal(EXAMPLES, 4), draw.whole(3, EXAMPLES), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(3, 4, 6)}, batch, {}


# Branches


def _cond(draw, choose):
    def small(params, x):
        return jnp.tanh(x @ params["small"]) @ params["both"]

    def large(params, x):
        h = jnp.sin(x @ params["large"])
        return jnp.tanh(h @ params["both"]) * 2

    def loss(params, x, target):
        y = lax.cond(choose(params, x), small, large, params, x)
        return distance(add(y, params["b"]), target)

    params = {
        "small": draw.weight(4, 6),
        "large": draw.weight(4, 6),
        "both": draw.weight(6, 3),
        "b": draw.normal(3),
    }
    x = np.asarray(draw.normal(EXAMPLES, 4)).copy()
    x[:, 0] = [1.0, -1.0, 2.0, -0.5, 0.3]
    batch = (jax.device_put(x), draw.normal(EXAMPLES, 3))
    kinds = {
        "['small']": "Outer",
        "['large']": "Outer",
        "['both']": "Outer",
        "['b']": "PerExample",
    }
    return loss, params, batch, kinds


@case
def cond_on_the_example(draw):
    return _cond(draw, lambda params, x: x[0] > 0)


@case
def cond_on_params(draw):
    """All examples take the same branch, which is not known before."""
    return _cond(draw, lambda params, x: jnp.sum(params["b"] ** 2) < 1000)


@case
def switch(draw):
    def loss(params, x, i, target):
        branches = [
            lambda: jnp.tanh(x @ params["W"]),
            lambda: x @ params["V"].T,
            lambda: jnp.zeros(3, x.dtype),
        ]
        return distance(lax.switch(i, branches) + params["b"], target)

    params = {"W": draw.weight(4, 3), "V": draw.weight(3, 4), "b": draw.normal(3)}
    which = jax.device_put(np.array([0, 1, 2, 1, 0], np.int32))
    batch = (draw.normal(EXAMPLES, 4), which, draw.normal(EXAMPLES, 3))
    kinds = {"['W']": "Outer", "['V']": "Outer", "['b']": "PerExample"}
    return loss, params, batch, kinds


# Embeddings


def _embedding(draw, look_up, tokens, table=(7, 3)):
    """A loss of the rows `[positions, 3]` that `look_up(table, tokens)` gives."""

    def loss(params, tokens, target):
        rows = look_up(params["E"], tokens)
        return distance(jnp.tanh(rows) @ params["W"], target)

    params = {"E": draw.normal(*table), "W": draw.weight(3, 4)}
    batch = (tokens, draw.normal(*tokens.shape, 4))
    return loss, params, batch, {"['E']": "Scatter", "['W']": "Outer"}


# of a table of 7 rows; rows that come twice, negative ones, and ones out of range
FAR_TOKENS = ((0, 6, -1, 9, 6, 2), (7, 3, 3, -7, -8, 1), (5, 5, 100, 0, -9, 4))


def _far_tokens():
    return jax.device_put(np.array(FAR_TOKENS, np.int32))


@case
def embedding_by_take(draw):
    def look_up(table, tokens):
        return jnp.take(table, tokens, axis=0)

    return _embedding(draw, look_up, draw.whole(7, EXAMPLES, 6))


@case
def embedding_by_index(draw):
    return _embedding(draw, lambda table, tokens: table[tokens], draw.whole(7, EXAMPLES, 6))


@case
def embedding_of_one_token(draw):
    return _embedding(draw, lambda table, token: table[token], draw.whole(7, EXAMPLES))


@case
def embedding_in_columns(draw):
    def look_up(table, tokens):
        return jnp.take(table, tokens, axis=1).T

    return _embedding(draw, look_up, draw.whole(7, EXAMPLES, 6), table=(3, 7))


@case
def embedding_of_one_column(draw):
    return _embedding(draw, lambda table, t: table[:, t], draw.whole(7, EXAMPLES), table=(3, 7))


@case
def embedding_of_tokens_on_two_axes(draw):
    return _embedding(draw, lambda table, tokens: table[tokens], draw.whole(7, EXAMPLES, 2, 6))


@case
def embedding_by_index_out_of_range(draw):
    return _embedding(draw, lambda table, tokens: table[tokens], _far_tokens())


@case
def embedding_by_take_out_of_range(draw):
    """`jnp.take` fills with NaN, which is masked."""

    def look_up(table, tokens):
        rows = jnp.take(table, tokens, axis=0)
        return jnp.where(jnp.isnan(rows), 0.5, rows)

    return _embedding(draw, look_up, _far_tokens())


def _by_mode(draw, mode, tokens):
    fill_value = 0.5 if mode == "fill" else None

    def look_up(table, tokens):
        return jnp.take(table, tokens, axis=0, mode=mode, fill_value=fill_value)

    return _embedding(draw, look_up, tokens)


@case
def embedding_filled(draw):
    return _by_mode(draw, "fill", _far_tokens())


@case
def embedding_clipped(draw):
    return _by_mode(draw, "clip", _far_tokens())


@case
def embedding_wrapped(draw):
    return _by_mode(draw, "wrap", _far_tokens())


@case
def embedding_in_bounds(draw):
    def look_up(table, tokens):
        return table.at[tokens].get(mode="promise_in_bounds")

    return _embedding(draw, look_up, draw.whole(7, EXAMPLES, 6))


@case
def embedding_looked_up_in_a_scan(draw):
    def look_up(table, tokens):
        _, rows = lax.scan(lambda carry, token: (carry, table[token]), None, tokens)
        return rows

    return _embedding(draw, look_up, draw.whole(7, EXAMPLES, 6))


@case
def embedding_of_fixed_positions(draw):
    """All examples look up the same rows."""

    def loss(params, x, target):
        h = x + params["P"][jnp.arange(6)]
        return distance(jnp.tanh(h) @ params["W"], target)

    params = {"P": draw.normal(7, 3), "W": draw.weight(3, 4)}
    batch = (draw.normal(EXAMPLES, 6, 3), draw.normal(EXAMPLES, 6, 4))
    return loss, params, batch, {"['P']": "Scatter", "['W']": "Outer"}


@case
def embeddings_tied_twice(draw):
    """Two look-ups in one table, of different numbers of tokens."""

    def loss(params, tokens, others):
        h = jnp.tanh(params["E"][tokens] @ params["W"]).sum(0)
        return distance(h, params["E"][others].mean(0))

    params = {"E": draw.normal(7, 3), "W": draw.weight(3, 3)}
    batch = (draw.whole(7, EXAMPLES, 6), draw.whole(7, EXAMPLES, 4))
    return loss, params, batch, {"['W']": "Outer"}


@case
def tied_embedding_and_head(draw):
    def loss(params, tokens, labels):
        h = params["E"][tokens]
        h = h + jnp.tanh(dense(params["layer"], h))
        return cross_entropy(h @ params["E"].T, labels)

    params = {"E": draw.normal(7, 3), "layer": dense_params(draw, 3, 3)}
    batch = (draw.whole(7, EXAMPLES, 6), draw.whole(7, EXAMPLES, 6))
    kinds = {
        "['E']": "Sum(Outer, Scatter)",
        "['layer']['W']": "Outer",
        "['layer']['b']": "PerExample",
    }
    return loss, params, batch, kinds


@case
def one_hot_embedding(draw):
    """A look-up written as a product."""

    def loss(params, tokens, target):
        rows = jax.nn.one_hot(tokens, 7, dtype=params["E"].dtype) @ params["E"]
        return distance(jnp.tanh(rows), target)

    batch = (draw.whole(7, EXAMPLES, 6), draw.normal(EXAMPLES, 6, 3))
    return loss, {"E": draw.normal(7, 3)}, batch, {"['E']": "Outer"}


# Heads, experts, and weights of several parts


@case
def einsum_of_heads(draw):
    def loss(params, x, target):
        h = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["in"]) + params["b"][None])
        h = jnp.tanh(jnp.einsum("thk,hkj->thj", h, params["each"]))
        return distance(jnp.einsum("thj,hjd->td", h, params["out"]), target)

    params = {
        "in": draw.weight(7, 2, 3, inputs=7),
        "b": draw.normal(2, 3),
        "each": draw.weight(2, 3, 4),
        "out": draw.weight(2, 4, 8, inputs=8),
    }
    batch = (draw.normal(EXAMPLES, 6, 7), draw.normal(EXAMPLES, 6, 8))
    kinds = {"['in']": "Outer", "['each']": "Stacked(Outer)", "['out']": "Outer"}
    return loss, params, batch, kinds


@case
def einsum_of_one_position(draw):
    def loss(params, x, target):
        h = jnp.tanh(jnp.einsum("d,dhk->hk", x, params["in"]))
        h = jnp.tanh(jnp.einsum("hk,hkj->hj", h, params["each"]))
        return distance(jnp.einsum("hj,hjd->d", h, params["out"]), target)

    params = {
        "in": draw.weight(7, 2, 3, inputs=7),
        "each": draw.weight(2, 3, 4),
        "out": draw.weight(2, 4, 8, inputs=8),
    }
    batch = (draw.normal(EXAMPLES, 7), draw.normal(EXAMPLES, 8))
    kinds = {"['in']": "Outer", "['each']": "Stacked(Outer)", "['out']": "Outer"}
    return loss, params, batch, kinds


@case
def einsum_with_the_axes_elsewhere(draw):
    """Heads last, and outputs before inputs."""

    def loss(params, x, target):
        h = jnp.tanh(jnp.einsum("dt,kdh->htk", x, params["in"]))
        h = jnp.tanh(jnp.einsum("htk,jkh->jth", h, params["each"]))
        return distance(jnp.einsum("jth,djh->dt", h, params["out"]), target)

    params = {
        "in": draw.weight(3, 7, 2, inputs=7),
        "each": draw.weight(4, 3, 2, inputs=3),
        "out": draw.weight(8, 4, 2, inputs=8),
    }
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 8, 6))
    kinds = {"['in']": "Outer", "['each']": "Stacked(Outer)", "['out']": "Outer"}
    return loss, params, batch, kinds


@case
def vmap_over_heads(draw):
    def loss(params, x, target):
        y = jax.vmap(dense, (0, None), 1)(params, x)
        return distance(jnp.tanh(y), target)

    params = {"W": draw.weight(2, 7, 3), "b": draw.normal(2, 3)}
    batch = (draw.normal(EXAMPLES, 6, 7), draw.normal(EXAMPLES, 6, 2, 3))
    return loss, params, batch, {"['W']": "Outer"}


@case
def experts_with_a_dense_gate(draw):
    def loss(params, x, target):
        gate = jax.nn.softmax(x @ params["gate"])
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]))
        y = jnp.einsum("tef,efo->teo", h, params["down"])
        return distance(jnp.einsum("te,teo->to", gate, y), target)

    params = {
        "gate": draw.weight(4, 2),
        "up": draw.weight(2, 4, 7),
        "down": draw.weight(2, 7, 3),
    }
    batch = (draw.normal(EXAMPLES, 6, 4), draw.normal(EXAMPLES, 6, 3))
    kinds = {"['gate']": "Outer", "['up']": "Outer", "['down']": "Stacked(Outer)"}
    return loss, params, batch, kinds


@case
def expert_of_the_example(draw):
    """The best of the experts alone is computed."""

    def loss(params, x, target):
        gate = jax.nn.softmax(x @ params["gate"])
        best = jnp.argmax(gate)
        y = jnp.tanh(x @ params["W"][best]) * gate[best]
        return distance(y, target)

    params = {"gate": draw.weight(4, 3), "W": draw.weight(3, 4, 6)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, params, batch, {"['gate']": "Outer"}


@case
def expert_of_every_position(draw):
    def loss(params, x, target):
        gate = jax.nn.softmax(x @ params["gate"])
        best = jnp.argmax(gate, axis=1)
        weights = params["W"][best]
        y = jnp.tanh(jnp.einsum("td,tdf->tf", x, weights))
        share = jnp.take_along_axis(gate, best[:, None], axis=1)
        return distance(y * share, target)

    params = {"gate": draw.weight(4, 3), "W": draw.weight(3, 4, 6)}
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    return loss, params, batch, {"['gate']": "Outer"}


@case
def split_weight(draw):
    def loss(params, x, target):
        first, second, third = jnp.split(params["W"], 3, axis=1)
        gate = jax.nn.sigmoid(x @ first)
        y = gate * jnp.tanh(x @ second) + jnp.sin(x @ third)
        return distance(y, target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 2))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Outer"}


@case
def split_weight_for_different_inputs(draw):
    def loss(params, x, z, target):
        w, v = params["W"][:3], params["W"][3:]
        return distance(jnp.tanh(x @ w + z @ v), target)

    batch = (draw.normal(EXAMPLES, 3), draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(7, 6)}, batch, {"['W']": "Outer"}


@case
def slices_of_a_weight(draw):
    def loss(params, x, target):
        h = jnp.tanh(x @ params["W"][:, :3])
        return distance(h + jnp.sin(x @ params["W"][:, 3:]), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Outer"}


@case
def slices_that_overlap(draw):
    """They leave a part of the weight unused, too."""

    def loss(params, x, target):
        h = jnp.tanh(x @ params["W"][:, 1:4])
        return distance(h + jnp.sin(x @ params["W"][:, 2:8:2]), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, {"W": draw.weight(4, 9)}, batch, {"['W']": "Outer"}


@case
def joined_weights(draw):
    """Two leaves as one weight, of inputs and of outputs."""

    def loss(params, x, target):
        first = jnp.concatenate([params["a"], params["b"]], axis=1)
        second = jnp.concatenate([params["c"], params["d"]], axis=0)
        return distance(jnp.tanh(x @ first) @ second, target)

    params = {
        "a": draw.weight(4, 2),
        "b": draw.weight(4, 5),
        "c": draw.weight(3, 6),
        "d": draw.weight(4, 6),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    kinds = {"['a']": "Outer", "['b']": "Outer", "['c']": "Outer", "['d']": "Outer"}
    return loss, params, batch, kinds


@case
def stack_of_leaves(draw):
    """Layers in a list, stacked for a scan."""

    def loss(params, x, target):
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

        def layer(h, own):
            return h + jnp.tanh(dense(own, h)), None

        h, _ = lax.scan(layer, x, layers)
        return distance(h, target)

    params = [dense_params(draw, 4, 4) for _ in range(3)]
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    return loss, params, batch, {}


@case
def fused_qkv(draw):
    def loss(params, x, target):
        q, k, v = jnp.split(dense(params["qkv"], x), 3, axis=1)
        heads = (7, 2, 4)
        y = attention(q.reshape(heads), k.reshape(heads), v.reshape(heads))
        return distance(y.reshape(7, 8) @ params["out"], target)

    params = {"qkv": dense_params(draw, 6, 24), "out": draw.weight(8, 3)}
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 7, 3))
    kinds = {"['qkv']['W']": "Outer", "['qkv']['b']": "PerExample", "['out']": "Outer"}
    return loss, params, batch, kinds


@case
def attention_block(draw):
    def loss(params, x, target):
        own = params["attention"]
        h = layer_norm(params["norm1"], x)
        q = jnp.einsum("td,dhk->thk", h, own["q"])
        k = jnp.einsum("td,dhk->thk", h, own["k"])
        v = jnp.einsum("td,dhk->thk", h, own["v"])
        x = x + jnp.einsum("thk,hkd->td", attention(q, k, v), own["o"])
        h = layer_norm(params["norm2"], x)
        h = jax.nn.gelu(dense(params["up"], h))
        return distance(x + dense(params["down"], h), target)

    params = {
        "norm1": norm_params(draw, 6),
        "attention": {
            "q": draw.weight(6, 2, 3, inputs=6),
            "k": draw.weight(6, 2, 3, inputs=6),
            "v": draw.weight(6, 2, 3, inputs=6),
            "o": draw.weight(2, 3, 6, inputs=6),
        },
        "norm2": norm_params(draw, 6),
        "up": dense_params(draw, 6, 8),
        "down": dense_params(draw, 8, 6),
    }
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 7, 6))
    kinds = {
        "['norm1']['scale']": "PerExample",
        "['norm1']['bias']": "PerExample",
        "['attention']['q']": "Outer",
        "['attention']['k']": "Outer",
        "['attention']['v']": "Outer",
        "['attention']['o']": "Outer",
        "['norm2']['scale']": "PerExample",
        "['up']['W']": "Outer",
        "['up']['b']": "PerExample",
        "['down']['W']": "Outer",
    }
    return loss, params, batch, kinds


# Weights made of other weights


@case
def lora_in_the_weight(draw):
    def loss(params, x, target):
        w = params["W"] + params["A"] @ params["B"]
        return distance(jnp.tanh(x @ w), target)

    params = {"W": draw.weight(6, 4), "A": draw.weight(6, 2), "B": draw.weight(2, 4)}
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 7, 4))
    return loss, params, batch, {"['W']": "Outer"}


@case
def lora_in_the_activations(draw):
    def loss(params, x, target):
        w = lax.stop_gradient(params["W"])
        y = x @ w + (x @ params["A"]) @ params["B"]
        return distance(jnp.tanh(y), target)

    params = {"W": draw.weight(6, 4), "A": draw.weight(6, 2), "B": draw.weight(2, 4)}
    batch = (draw.normal(EXAMPLES, 7, 6), draw.normal(EXAMPLES, 7, 4))
    return loss, params, batch, {"['W']": "Zero", "['A']": "Outer", "['B']": "Outer"}


@case
def weight_norm(draw):
    def loss(params, x, target):
        v = params["V"]
        size = jnp.sqrt(jnp.sum(v**2, axis=0, keepdims=True))
        w = jnp.broadcast_to(params["g"], v.shape) * v / size
        return distance(jnp.tanh(add(x @ w, params["b"])), target)

    params = {"V": draw.weight(4, 6), "g": 1 + 0.3 * draw.normal(6), "b": draw.normal(6)}
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    kinds = {"['V']": "Sum(Mapped(Outer), Outer)", "['g']": "Mapped(Outer)", "['b']": "PerExample"}
    return loss, params, batch, kinds


@case
def masked_weight(draw):
    mask = jax.device_put((np.arange(24).reshape(4, 6) % 5 != 2).astype(np.float64))

    def loss(params, x, target):
        return distance(jnp.tanh(x @ (params["W"] * mask)), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Mapped(Outer)"}


@case
def positive_weight(draw):
    """A function of every number of the weight."""

    def loss(params, x, target):
        w = jax.nn.softplus(params["W"])
        return distance(jnp.tanh(x @ w), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Mapped(Outer)"}


@case
def scaled_weight(draw):
    """By a number, by a leaf of one number, and by the data's number."""

    def loss(params, x, s, target):
        w = (0.5 * params["W"]) * params["scale"]
        return distance(jnp.tanh(x @ (w * s)), target)

    params = {"W": draw.weight(4, 6), "scale": 1 + 0.3 * draw.normal()}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES), draw.normal(EXAMPLES, 6))
    return loss, params, batch, {"['scale']": "Mapped(Outer)"}


@case
def fixed_product_of_a_weight(draw):
    """The weight between two constant matrices."""
    left, right = draw.normal(7, 4), draw.normal(3, 6)

    def loss(params, x, target):
        w = left @ params["W"] @ right
        return distance(jnp.tanh(x @ w), target)

    batch = (draw.normal(EXAMPLES, 7), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 3)}, batch, {}


# A leaf in a product, and raw


@case
def raw_and_product(draw):
    def loss(params, x, s, target):
        y = jnp.tanh(x @ params["W"])
        return distance(y, target) + s * jnp.sum(jnp.abs(params["W"]))

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {}


@case
def raw_with_data_and_product(draw):
    """An array of the data as large as the weight."""

    def loss(params, x, noise, target):
        y = jnp.tanh(x @ params["W"])
        return distance(y, target) + jnp.sum(jnp.sin(params["W"]) * noise)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4, 6), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {}


@case
def noise_in_the_weight(draw):
    """Bayes by backprop: every example draws its weight."""

    def loss(params, x, key, target):
        noise = jax.random.normal(key, (4, 6), x.dtype)
        w = params["mean"] + jnp.exp(params["log_scale"]) * noise
        return distance(jnp.tanh(x @ w), target)

    params = {"mean": draw.weight(4, 6), "log_scale": draw.normal(4, 6)}
    keys = jax.random.split(jax.random.key(3), EXAMPLES)
    batch = (draw.normal(EXAMPLES, 7, 4), keys, draw.normal(EXAMPLES, 7, 6))
    return loss, params, batch, {}


@case
def nothing_but_raw(draw):
    """No product at all: the largest of sums."""

    def loss(params, x, target):
        y = jnp.max(params["W"] + jnp.broadcast_to(x[:, None], (4, 6)), axis=0)
        return distance(y, target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {}


@case
def product_by_hand(draw):
    """`x @ W` as a multiplication and a sum."""

    def loss(params, x, target):
        wide = jnp.broadcast_to(x[:, None], (4, 6))
        y = jnp.sum(wide * params["W"], axis=0)
        return distance(jnp.tanh(y), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {}


@case
def weight_decay(draw):
    def loss(params, x, target):
        h = jnp.tanh(dense(params["first"], x))
        y = dense(params["second"], h)
        decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return distance(y, target) + 0.5 * 0.1 * decay

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    kinds = {"['first']['W']": "Sum(Outer, Same)", "['second']['W']": "Sum(Outer, Same)"}
    return loss, mlp_params(draw), batch, kinds


@case
def weight_decay_alone(draw):
    """A leaf that the example has no part in."""

    def loss(params, x, target):
        y = jnp.tanh(x @ params["W"])
        return distance(y, target) + 0.05 * jnp.sum(params["other"] ** 2)

    params = {"W": draw.weight(4, 6), "other": draw.normal(3, 7)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, params, batch, {"['W']": "Outer", "['other']": "Same"}


# Derivatives of one's own, wrong on purpose: the gradient is what they say


@case
def custom_vjp_of_an_activation(draw):
    @jax.custom_vjp
    def act(z):
        return jnp.tanh(z)

    def forward(z):
        return act(z), z

    def backward(z, dy):
        return (dy * jnp.cos(z) * 3,)

    act.defvjp(forward, backward)

    def loss(params, x, target):
        h = act(dense(params["first"], x))
        return distance(dense(params["second"], h), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def custom_jvp_of_an_activation(draw):
    @jax.custom_jvp
    def act(z):
        return jnp.tanh(z)

    @act.defjvp
    def _(primals, tangents):
        (z,) = primals
        (dz,) = tangents
        return act(z), dz * jnp.cos(z) * 3

    def loss(params, x, target):
        h = act(dense(params["first"], x))
        return distance(dense(params["second"], h), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, mlp_params(draw), batch, MLP


def _wrong_product(draw, product):
    def loss(params, x, target):
        h = jnp.tanh(product(x, params["first"]))
        return distance(product(h, params["second"]), target)

    params = {"first": draw.weight(4, 6), "second": draw.weight(6, 3)}
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    return loss, params, batch, {"['first']": "Outer", "['second']": "Outer"}


@case
def custom_vjp_of_a_product(draw):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, (x, w)

    def backward(saved, dy):
        x, w = saved
        return jnp.sin(dy) @ w.T, jnp.cos(x).T @ (2 * dy)

    product.defvjp(forward, backward)
    return _wrong_product(draw, product)


@case
def custom_jvp_of_a_product(draw):
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    @product.defjvp
    def _(primals, tangents):
        x, w = primals
        dx, dw = tangents
        return x @ w, 2 * (dx @ w) + jnp.cos(x) @ dw

    return _wrong_product(draw, product)


@case
def custom_vjp_by_broadcasting(draw):
    """Its derivative multiplies vectors by `jnp.outer`, with no product."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, (x, w)

    def backward(saved, dy):
        x, w = saved
        return 3 * (w @ dy), jnp.outer(jnp.cos(x), dy)

    product.defvjp(forward, backward)

    def loss(params, x, target):
        return distance(jnp.tanh(product(x, params["W"])), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {}


@case
def custom_vjp_that_gives_nothing(draw):
    """Its derivative by the weight is zero."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        return x @ w, w

    def backward(w, dy):
        return dy @ w.T, jnp.zeros_like(w)

    product.defvjp(forward, backward)

    def loss(params, x, target):
        h = jnp.tanh(x @ params["before"])
        return distance(product(h, params["W"]), target)

    params = {"before": draw.weight(4, 6), "W": draw.weight(6, 3)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, params, batch, {"['before']": "Outer"}


@case
def straight_through(draw):
    """The weight is rounded, and its gradient is that of the weight itself."""

    def loss(params, x, target):
        w = params["W"]
        rounded = w + lax.stop_gradient(jnp.round(4 * w) / 4 - w)
        return distance(jnp.tanh(x @ rounded), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    return loss, {"W": draw.weight(4, 6)}, batch, {"['W']": "Outer"}


# Data and leaves of other kinds


@case
def dropout(draw):
    def loss(params, x, key, target):
        h = jnp.tanh(dense(params["first"], x))
        kept = jax.random.bernoulli(key, 0.7, h.shape)
        h = jnp.where(kept, h / 0.7, 0.0)
        return distance(dense(params["second"], h), target)

    keys = jax.random.split(jax.random.key(7), EXAMPLES)
    batch = (draw.normal(EXAMPLES, 7, 4), keys, draw.normal(EXAMPLES, 7, 3))
    return loss, mlp_params(draw), batch, MLP


@case
def batch_of_trees(draw):
    def loss(params, example):
        y = dense(params, example["x"]["value"]) * example["weight"]
        return distance(y, example["target"])

    example = {
        "x": {"value": draw.normal(EXAMPLES, 4)},
        "weight": draw.normal(EXAMPLES),
        "target": draw.normal(EXAMPLES, 6),
    }
    return loss, dense_params(draw, 4, 6), (example,), DENSE


@case
def unused_and_stopped_leaves(draw):
    def loss(params, x, target):
        h = jnp.tanh(x @ lax.stop_gradient(params["stopped"]))
        return distance(h @ params["W"], target)

    params = {
        "W": draw.weight(6, 3),
        "stopped": draw.weight(4, 6),
        "unused": draw.normal(7, 2),
        "unused_vector": draw.normal(7),
        "unused_number": draw.normal(),
    }
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    kinds = {
        "['W']": "Outer",
        "['stopped']": "Zero",
        "['unused']": "Zero",
        "['unused_vector']": "Zero",
        "['unused_number']": "Zero",
    }
    return loss, params, batch, kinds


@case
def integer_leaf(draw):
    """A counter of steps warms up the output."""

    def loss(params, x, target):
        warm = jnp.minimum(params["step"].astype(x.dtype) / 100, 1.0)
        return distance(warm * jnp.tanh(x @ params["W"]), target)

    step = jax.device_put(np.asarray(30, np.int32))
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    params = {"W": draw.weight(4, 6), "step": step}
    return loss, params, batch, {"['W']": "Outer", "['step']": "Zero"}


@case
def scales_and_biases(draw):
    def loss(params, x, target):
        h = layer_norm(params["norm"], x @ params["W"])
        return distance(h * params["temperature"], target)

    params = {
        "W": draw.weight(4, 6),
        "norm": norm_params(draw, 6),
        "temperature": 1 + 0.3 * draw.normal(),
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 6))
    kinds = {
        "['W']": "Outer",
        "['norm']['scale']": "PerExample",
        "['norm']['bias']": "PerExample",
        "['temperature']": "PerExample",
    }
    return loss, params, batch, kinds


class Pair(NamedTuple):
    """A layer."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Net:
    """A net, as a registered dataclass."""

    layers: list
    head: Any


@case
def containers(draw):
    def loss(params, x, target):
        h = x
        for layer in params["net"].layers:
            h = jnp.tanh(h @ layer.weight + layer.bias)
        kernel, bias = params["net"].head
        return distance(h @ kernel + bias, target)

    layers = [
        Pair(draw.weight(4, 6), draw.normal(6)),
        Pair(draw.weight(6, 7), draw.normal(7)),
    ]
    head = (draw.weight(7, 3), draw.normal(3))
    params = {"net": Net(layers, head), "nothing": None, "empty": []}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    kinds = {
        "['net'].layers[0].weight": "Outer",
        "['net'].layers[0].bias": "PerExample",
        "['net'].layers[1].weight": "Outer",
        "['net'].head[0]": "Outer",
        "['net'].head[1]": "PerExample",
    }
    return loss, params, batch, kinds


@case
def params_of_one_array(draw):
    def loss(w, x, target):
        return distance(jnp.tanh(x @ w), target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 6))
    return loss, draw.weight(4, 6), batch, {"": "Outer"}


# Axes of length 1


@case
def one_unit(draw):
    """A layer of one output, and one of one input."""

    def loss(params, x, target):
        return distance(mlp(params, x), target)

    params = {"first": dense_params(draw, 4, 1), "second": dense_params(draw, 1, 3)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, params, batch, {}


@case
def one_unit_of_a_sequence(draw):
    def loss(params, x, target):
        return distance(mlp(params, x), target)

    params = {"first": dense_params(draw, 1, 1), "second": dense_params(draw, 1, 3)}
    batch = (draw.normal(EXAMPLES, 7, 1), draw.normal(EXAMPLES, 7, 3))
    return loss, params, batch, {}


@case
def one_layer_stacked(draw):
    def loss(params, x, target):
        def layer(h, own):
            return h + jnp.tanh(dense(own, h)), None

        h, _ = lax.scan(layer, x, params)
        return distance(h, target)

    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, stacked_params(draw, 1, 4), batch, {}


@case
def one_head(draw):
    def loss(params, x, target):
        h = jnp.tanh(jnp.einsum("td,dhk->thk", x, params["in"]))
        h = jnp.tanh(jnp.einsum("thk,hkj->thj", h, params["each"]))
        return distance(jnp.einsum("thj,hjd->td", h, params["out"]), target)

    params = {
        "in": draw.weight(7, 1, 3, inputs=7),
        "each": draw.weight(1, 3, 4),
        "out": draw.weight(1, 4, 8, inputs=4),
    }
    batch = (draw.normal(EXAMPLES, 6, 7), draw.normal(EXAMPLES, 6, 8))
    return loss, params, batch, {"['in']": "Outer", "['out']": "Outer"}


@case
def batch_of_one(draw):
    loss, params, batch, kinds = sequence(draw)
    return loss, params, jax.tree.map(lambda a: a[:1], batch), kinds


@case
def sequences_of_length_one(draw):
    loss, params, batch, kinds = sequence(draw)
    return loss, params, jax.tree.map(lambda a: a[:, :1], batch), kinds


@case
def embedding_of_sequences_of_length_one(draw):
    return _embedding(draw, lambda table, tokens: table[tokens], draw.whole(7, EXAMPLES, 1))


@case
def recurrent_of_one_step(draw):
    loss, params, (xs, targets), kinds = recurrent(draw)
    return loss, params, (xs[:, :1], targets[:, :1]), kinds


# Low precision


@functools.partial(case, tolerance=2e-2)
def bfloat16_compute(draw):
    """Float32 params, cast for the products."""

    def low(tree):
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)

    def loss(params, x, target):
        own = low(params)
        h = jnp.tanh(dense(own["first"], x.astype(jnp.bfloat16)))
        y = dense(own["second"], h)
        return distance(y.astype(jnp.float32), target)

    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 3))
    params, batch = _float32((mlp_params(draw), batch))
    return loss, params, batch, MLP


@functools.partial(case, tolerance=2e-2)
def bfloat16_stacked(draw):
    """Products of bfloat16 that give float32, in layers under a scan."""

    def loss(params, x, target):
        def layer(h, own):
            w = own["W"].astype(jnp.bfloat16)
            low = h.astype(jnp.bfloat16)
            y = jnp.matmul(low, w, preferred_element_type=jnp.float32)
            return h + jnp.tanh(add(y, own["b"])), None

        h, _ = lax.scan(layer, x, params)
        return distance(h, target)

    params = stacked_params(draw, 3, 4)
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 7, 4))
    params, batch = _float32((params, batch))
    return loss, params, batch, STACKED


@functools.partial(case, tolerance=1e-5)
def float32(draw):
    loss, params, batch, kinds = plain_mlp(draw)
    params, batch = _float32((params, batch))
    return loss, params, batch, kinds


def _float32(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


# Convolutions


class Convolution(NamedTuple):
    """Shapes of one example and of the kernel, and options of `lax.conv_general_dilated`."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    layout: tuple[str, str, str]
    options: dict[str, Any]


LINE = ("NCH", "OIH", "NCH")
LINE_LAST = ("NHC", "HIO", "NHC")
IMAGE = ("NCHW", "OIHW", "NCHW")
IMAGE_LAST = ("NHWC", "HWIO", "NHWC")
VOLUME = ("NCDHW", "OIDHW", "NCDHW")

CONVOLUTIONS = {
    "1d": Convolution((3, 10), (4, 3, 2), LINE, {}),
    "1d_channels_last": Convolution((10, 3), (2, 3, 4), LINE_LAST, {}),
    "1d_causal": Convolution((10, 3), (4, 3, 2), LINE_LAST, {"padding": [(3, 0)]}),
    "1d_strided_and_dilated": Convolution(
        (3, 13), (4, 3, 2), LINE, {"window_strides": (2,), "rhs_dilation": (3,)}
    ),
    "2d": Convolution((3, 8, 7), (5, 3, 2, 4), IMAGE, {}),
    "2d_channels_last": Convolution((8, 7, 3), (2, 4, 3, 5), IMAGE_LAST, {}),
    "2d_mixed_layouts": Convolution((8, 3, 7), (4, 5, 2, 3), ("NHCW", "WOHI", "WNCH"), {}),
    "same": Convolution((3, 8, 7), (5, 3, 2, 4), IMAGE, {"padding": "SAME"}),
    "same_strided": Convolution(
        (8, 7, 3), (2, 4, 3, 5), IMAGE_LAST, {"padding": "SAME", "window_strides": (3, 2)}
    ),
    "padded_unevenly": Convolution((3, 8, 7), (5, 3, 2, 4), IMAGE, {"padding": [(0, 1), (3, 2)]}),
    "cropped": Convolution((3, 8, 7), (5, 3, 2, 4), IMAGE, {"padding": [(-1, 0), (1, -2)]}),
    "strided": Convolution((3, 9, 8), (5, 3, 2, 4), IMAGE, {"window_strides": (2, 3)}),
    "dilated": Convolution((3, 9, 8), (5, 3, 2, 4), IMAGE, {"rhs_dilation": (3, 2)}),
    "strided_dilated_and_padded": Convolution(
        (9, 8, 3),
        (2, 4, 3, 5),
        IMAGE_LAST,
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "padding": [(1, 2), (0, 3)]},
    ),
    "groups": Convolution((6, 8, 7), (4, 3, 2, 5), IMAGE, {"feature_group_count": 2}),
    "groups_channels_last": Convolution(
        (8, 7, 6), (2, 5, 2, 9), IMAGE_LAST, {"feature_group_count": 3, "window_strides": (2, 1)}
    ),
    "depthwise": Convolution((3, 8, 7), (3, 1, 2, 4), IMAGE, {"feature_group_count": 3}),
    "depthwise_twice_as_wide": Convolution(
        (8, 7, 3), (2, 4, 1, 6), IMAGE_LAST, {"feature_group_count": 3, "padding": "SAME"}
    ),
    "transposed": Convolution(
        (3, 4, 5), (6, 3, 2, 4), IMAGE, {"lhs_dilation": (2, 3), "padding": [(1, 2), (3, 2)]}
    ),
    "transposed_and_dilated": Convolution(
        (4, 5, 3),
        (2, 4, 3, 6),
        IMAGE_LAST,
        {"lhs_dilation": (3, 2), "rhs_dilation": (2, 1), "padding": [(2, 2), (3, 1)]},
    ),
    "transposed_groups": Convolution(
        (4, 3, 5),
        (6, 2, 2, 3),
        IMAGE,
        {"lhs_dilation": (2, 1), "padding": [(1, 1), (2, 0)], "feature_group_count": 2},
    ),
    "1x1": Convolution((3, 8, 7), (5, 3, 1, 1), IMAGE, {}),
    "1x1_strided": Convolution((8, 7, 3), (1, 1, 3, 5), IMAGE_LAST, {"window_strides": (3, 2)}),
    "as_large_as_the_image": Convolution((3, 4, 6), (5, 3, 4, 6), IMAGE, {}),
    "one_channel": Convolution((1, 8, 7), (1, 1, 2, 4), IMAGE, {}),
    "3d": Convolution((2, 4, 5, 6), (3, 2, 2, 1, 4), VOLUME, {"padding": "SAME"}),
}


def convolve(x: Any, kernel: Any, layout: tuple[str, str, str], **options: Any) -> Any:
    """`lax.conv_general_dilated`, in steps of 1 and without padding unless told otherwise."""
    steps = (1,) * (x.ndim - 2)
    options = {"window_strides": steps, "padding": "VALID", **options}
    return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)


def _convolution(draw, of):
    axis = of.layout[0].index("N")
    out_axis = of.layout[2].index("N")

    def convolved(x, kernel):
        x = jnp.expand_dims(x, axis)
        return convolve(x, kernel, of.layout, **of.options).squeeze(out_axis)

    def loss(params, x, target):
        return distance(jnp.tanh(convolved(x, params["kernel"])), target)

    inputs = np.prod(of.kernel) / of.kernel[of.layout[1].index("O")]
    params = {"kernel": draw.weight(*of.kernel, inputs=inputs)}
    x = draw.normal(EXAMPLES, *of.x)
    shape = jax.eval_shape(convolved, x[0], params["kernel"]).shape
    return loss, params, (x, draw.normal(EXAMPLES, *shape)), {"['kernel']": "Conv"}


for _name, _of in CONVOLUTIONS.items():
    case(functools.partial(_convolution, of=_of), name=f"convolution_{_name}")


@case
def convolution_transposed_by_lax(draw):
    def loss(params, x, target):
        y = lax.conv_transpose(
            x[None], params["kernel"], (2, 3), "SAME", dimension_numbers=IMAGE_LAST
        )
        return distance(jnp.tanh(y[0]), target)

    params = {"kernel": draw.weight(3, 4, 2, 6, inputs=12)}
    batch = (draw.normal(EXAMPLES, 4, 3, 2), draw.normal(EXAMPLES, 8, 9, 6))
    return loss, params, batch, {"['kernel']": "Conv"}


@case
def convolution_of_several_views(draw):
    """An example is a set of images."""

    def loss(params, x, target):
        y = convolve(x, params["kernel"], IMAGE)
        return distance(jnp.tanh(y).mean(0), target)

    params = {"kernel": draw.weight(4, 3, 2, 5, inputs=30)}
    batch = (draw.normal(EXAMPLES, 2, 3, 8, 7), draw.normal(EXAMPLES, 4, 7, 3))
    return loss, params, batch, {"['kernel']": "Conv"}


@case
def convolutional_net(draw):
    def loss(params, x, label):
        h = convolve(x[None], params["first"], IMAGE, padding="SAME")
        h = jax.nn.relu(h + params["b"][None, :, None, None])
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        h = jnp.tanh(convolve(h, params["second"], IMAGE, window_strides=(2, 1)))
        return cross_entropy(h.reshape(-1) @ params["head"], label)

    params = {
        "first": draw.weight(4, 3, 2, 3, inputs=18),
        "b": draw.normal(4),
        "second": draw.weight(2, 4, 3, 2, inputs=24),
        "head": draw.weight(4, 6),
    }
    batch = (draw.normal(EXAMPLES, 3, 8, 7), draw.whole(6, EXAMPLES))
    kinds = {
        "['first']": "Conv",
        "['b']": "PerExample",
        "['second']": "Conv",
        "['head']": "Outer",
    }
    return loss, params, batch, kinds


@case
def convolutions_stacked(draw):
    def loss(params, x, target):
        def layer(h, own):
            y = convolve(h, own["kernel"], IMAGE, padding="SAME")
            return h + jnp.tanh(y + own["b"][None, :, None, None]), None

        h, _ = lax.scan(layer, x[None], params)
        return distance(h[0], target)

    params = {"kernel": draw.weight(4, 3, 3, 2, 5, inputs=30), "b": draw.normal(4, 3)}
    batch = (draw.normal(EXAMPLES, 3, 8, 7), draw.normal(EXAMPLES, 3, 8, 7))
    kinds = {"['kernel']": "Stacked(Conv)", "['b']": "Stacked(PerExample)"}
    return loss, params, batch, kinds


@case
def convolution_in_a_recurrent_net(draw):
    """One kernel at every step of a scan."""

    def loss(params, xs, target):
        def step(h, x):
            y = convolve(h, params["kernel"], LINE, padding="SAME")
            return jnp.tanh(x[None] + y), None

        h, _ = lax.scan(step, jnp.zeros_like(xs[:1]), xs)
        return distance(h[0], target)

    params = {"kernel": draw.weight(3, 3, 4, inputs=12)}
    batch = (draw.normal(EXAMPLES, 6, 3, 7), draw.normal(EXAMPLES, 3, 7))
    return loss, params, batch, {"['kernel']": "Conv"}


@case
def convolution_tied_at_two_sizes(draw):
    """One kernel for an image and for a smaller one."""

    def loss(params, x, small, target):
        h = jnp.tanh(convolve(x[None], params["kernel"], IMAGE))
        less = jnp.tanh(convolve(small[None], params["kernel"], IMAGE))
        return distance(h.mean((0, 2, 3)) + less.mean((0, 2, 3)), target)

    params = {"kernel": draw.weight(4, 3, 2, 5, inputs=30)}
    images = (draw.normal(EXAMPLES, 3, 8, 7), draw.normal(EXAMPLES, 3, 4, 6))
    return loss, params, (*images, draw.normal(EXAMPLES, 4)), {}


@case
def convolution_with_a_standardised_kernel(draw):
    def loss(params, x, target):
        kernel = params["kernel"]
        centred = kernel - kernel.mean((1, 2, 3), keepdims=True)
        size = jnp.sqrt(jnp.mean(centred**2, (1, 2, 3), keepdims=True))
        y = convolve(x[None], 0.3 * centred / size, IMAGE)
        return distance(jnp.tanh(y[0]), target)

    params = {"kernel": draw.weight(4, 3, 2, 5, inputs=30)}
    batch = (draw.normal(EXAMPLES, 3, 8, 7), draw.normal(EXAMPLES, 4, 7, 3))
    return loss, params, batch, {"['kernel']": "Mapped(Conv)"}
