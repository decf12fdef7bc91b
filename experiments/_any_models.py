"""Models as users of Flax, Equinox, Haiku and plain JAX write them, for `any_model`.

Each is a function `(key, sizes, example) -> (loss, params)`, where `loss(params, x, target)` is
that of one example. Nothing in it is made for `fnn`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LETTERS = 27
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Sizes(NamedTuple):
    """How large the models are."""

    width: int  # features of a sequence model
    layers: int  # of nanoGPT
    channels: tuple[int, ...]  # of the convolutions of the CNN


class Kind(NamedTuple):
    """How a model is made, and what it takes."""

    library: str  # the package that it needs
    takes: str  # "images" or "letters"
    make: Callable[[Any, Sizes, Any], tuple[Callable[..., Any], Any]]


def flax_net(channels: tuple[int, ...]) -> Any:
    """A convolutional net in Flax, from batches of images to logits of 10 classes."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in channels:
                x = nn.relu(nn.Conv(size, (3, 3))(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Dense(64)(x.reshape((x.shape[0], -1))))
            return nn.Dense(10)(x)

    return Net()


def flax_mlp(key: Any, sizes: Sizes, image: Any) -> tuple[Callable[..., Any], Any]:
    """Two hidden layers, four times as wide as a sequence model."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x.ravel()
            for _ in range(2):
                x = nn.relu(nn.Dense(4 * sizes.width)(x))
            return nn.Dense(10)(x)

    net: Any = Net()

    def loss(params, x, label):
        return cross_entropy(net.apply(params, x), label)

    return loss, net.init(key, image)


def flax_cnn(key: Any, sizes: Sizes, image: Any) -> tuple[Callable[..., Any], Any]:
    net = flax_net(sizes.channels)

    def loss(params, x, label):
        logits = net.apply(params, x[None])
        return cross_entropy(logits[0], label)

    return loss, net.init(key, image[None])


def equinox_transformer(key: Any, sizes: Sizes, letters: Any) -> tuple[Callable[..., Any], Any]:
    """Embedding, a block of attention and an MLP, and a linear head."""
    import equinox as eqx

    width, heads = sizes.width, heads_of(sizes.width)

    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.embedding = eqx.nn.Embedding(LETTERS, width, key=keys[0])
            self.norms = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
            self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[1])
            self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[2])
            self.head = eqx.nn.Linear(width, LETTERS, key=keys[3])

        def __call__(self, letters):
            x = jax.vmap(self.embedding)(letters)
            seen = jnp.tril(jnp.ones((len(letters), len(letters)), bool))
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h, mask=seen)
            x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Net(key), eqx.is_inexact_array)

    def loss(params, letters, following):
        net = eqx.combine(params, static)
        return cross_entropy(net(letters), following).mean()

    return loss, params


def haiku_lstm(key: Any, sizes: Sizes, letters: Any) -> tuple[Callable[..., Any], Any]:
    """An LSTM on embedded letters, and a linear head."""
    import haiku as hk

    def forward(letters):
        x = hk.Embed(LETTERS, sizes.width)(letters)
        cell = hk.LSTM(sizes.width)
        outputs, _ = hk.dynamic_unroll(cell, x, cell.initial_state(None))
        return hk.Linear(LETTERS)(outputs)

    net = hk.without_apply_rng(hk.transform(forward))

    def loss(params, letters, following):
        return cross_entropy(net.apply(params, letters), following).mean()

    return loss, net.init(key, letters)


def nano_gpt(key: Any, sizes: Sizes, letters: Any) -> tuple[Callable[..., Any], Any]:
    """A GPT in plain JAX, without biases, with one table of letters for both ends."""
    width = sizes.width

    def draw(key, *shape):
        return 0.02 * jax.random.normal(key, shape)

    def layer_params(key):
        keys = jax.random.split(key, 4)
        return {
            "norm1": jnp.ones(width),
            "qkv": draw(keys[0], width, 3 * width),
            "out": draw(keys[1], width, width),
            "norm2": jnp.ones(width),
            "up": draw(keys[2], width, 4 * width),
            "down": draw(keys[3], 4 * width, width),
        }

    def loss(params, letters, following):
        x = params["letters"][letters] + params["positions"]
        for layer in params["layers"]:
            x = x + attention(layer, layer_norm(layer["norm1"], x))
            x = x + jax.nn.gelu(layer_norm(layer["norm2"], x) @ layer["up"]) @ layer["down"]
        logits = layer_norm(params["norm"], x) @ params["letters"].T
        return cross_entropy(logits, following).mean()

    keys = jax.random.split(key, sizes.layers + 2)
    params = {
        "letters": draw(keys[0], LETTERS, width),
        "positions": draw(keys[1], len(letters), width),
        "layers": [layer_params(k) for k in keys[2:]],
        "norm": jnp.ones(width),
    }
    return loss, params


def layer_norm(scale: Any, x: Any) -> Any:
    """Over the features."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale[None]


def attention(layer: Any, x: Any) -> Any:
    """Causal, with several heads."""
    length, width = x.shape
    heads = length, heads_of(width), -1
    q, k, v = (part.reshape(heads) for part in jnp.split(x @ layer["qkv"], 3, axis=1))
    scores = jnp.einsum("thk,shk->hts", q, k) / q.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones((1, length, length), bool))
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("hts,shk->thk", shares, v).reshape(x.shape) @ layer["out"]


def heads_of(width: int) -> int:
    """Heads of attention."""
    return max(1, width // 32)


MODELS: dict[str, Kind] = {
    "Flax MLP": Kind("flax", "images", flax_mlp),
    "Flax CNN": Kind("flax", "images", flax_cnn),
    "Equinox transformer": Kind("equinox", "letters", equinox_transformer),
    "Haiku LSTM": Kind("haiku", "letters", haiku_lstm),
    "nanoGPT": Kind("jax", "letters", nano_gpt),
}
