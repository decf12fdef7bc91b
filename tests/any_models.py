"""Losses of one example of unmodified models: Flax (Linen and nnx), Equinox, Haiku, plain JAX.

`MODELS` maps a name to a function that builds an `AnyCase`. Call it inside
`jax.enable_x64(True)`; it raises ImportError where the library is not installed.

Every model is called as its library's users call it. Where that takes a batch, the loss adds an
axis of length 1. The params are in float64, and moved off their initial values, of which many are
0 or 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from any_cases import (
    EXAMPLES,
    AnyCase,
    Draw,
    add,
    attention,
    cross_entropy,
    dense,
    dense_params,
    distance,
    layer_norm,
    norm_params,
)
from jax import lax

MODELS: dict[str, Callable[[], AnyCase]] = {}
KEY = 0  # of the initial params, which are replaced


def model(build: Callable, *, standard: bool = True) -> Callable:
    """Registers `build(draw) -> (loss, params, batch, kinds)`."""
    name = build.__name__
    promotion = "standard" if standard else "strict"
    ranks = "allow" if standard else "raise"

    def built() -> AnyCase:
        with jax.numpy_dtype_promotion(promotion), jax.numpy_rank_promotion(ranks):
            loss, params, batch, kinds = build(Draw(name))
        return AnyCase(name, loss, params, batch, kinds, standard=standard)

    assert name not in MODELS
    MODELS[name] = built
    return build


def moved(tree: Any, draw: Draw) -> Any:
    """The arrays in float64, with random numbers added."""

    def move(leaf):
        noise = 0.3 * draw.rng.normal(size=leaf.shape)
        return jax.device_put(np.asarray(leaf, np.float64) + noise)

    return jax.tree.map(move, tree)


# Flax, Linen


def _linen(draw, net, x, score):
    """The loss `score(outputs, target)` of a net that takes batches `x`, and its params.

    What is no param stays as it is: running averages.
    """
    variables = dict(net.init(jax.random.key(KEY), x[:1]))
    params = moved(variables.pop("params"), draw)

    def loss(params, x, target):
        outputs = net.apply({"params": params, **variables}, x[None])
        return score(outputs[0], target)

    return loss, params


@model
def linen_mlp(draw):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(6)(x))
            x = nn.LayerNorm()(x)
            return nn.Dense(3, use_bias=False)(x)

    x = draw.normal(EXAMPLES, 4)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = {
        "['Dense_0']['kernel']": "Outer",
        "['Dense_0']['bias']": "PerExample",
        "['LayerNorm_0']['scale']": "PerExample",
        "['LayerNorm_0']['bias']": "PerExample",
        "['Dense_1']['kernel']": "Outer",
    }
    return loss, params, (x, draw.normal(EXAMPLES, 3)), kinds


@model
def linen_cnn(draw):
    import optax
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 2))(x)
            x = nn.relu(nn.GroupNorm(num_groups=2)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(5, (2, 3), strides=(2, 1), padding="VALID")(x))
            x = x.reshape((x.shape[0], -1))
            return nn.Dense(6)(x)

    x = draw.normal(EXAMPLES, 9, 8, 3)
    score = optax.softmax_cross_entropy_with_integer_labels
    loss, params = _linen(draw, Net(), x, score)
    kinds = {
        "['Conv_0']['kernel']": "Conv",
        "['Conv_0']['bias']": "PerExample",
        "['GroupNorm_0']['scale']": "PerExample",
        "['GroupNorm_0']['bias']": "PerExample",
        "['Conv_1']['kernel']": "Conv",
        "['Dense_0']['kernel']": "Outer",
    }
    return loss, params, (x, draw.whole(6, EXAMPLES)), kinds


@model
def linen_separable_convolutions(draw):
    """Depthwise, in groups, dilated, circular, and 1 x 1."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.silu(nn.Conv(6, (3, 2), feature_group_count=3)(x))
            x = nn.silu(nn.Conv(4, (2, 3), feature_group_count=2, padding="VALID")(x))
            x = nn.silu(nn.Conv(5, (3, 2), kernel_dilation=(2, 1), padding="CIRCULAR")(x))
            return nn.Conv(2, (1, 1))(x).mean((1, 2))

    x = draw.normal(EXAMPLES, 8, 7, 3)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = {f"['Conv_{i}']['kernel']": "Conv" for i in range(4)}
    return loss, params, (x, draw.normal(EXAMPLES, 2)), kinds


@model
def linen_autoencoder(draw):
    """A convolution, and a transposed one back."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(5, (3, 2), strides=(2, 2))(x))
            return nn.ConvTranspose(3, (3, 2), strides=(2, 2))(x)

    x = draw.normal(EXAMPLES, 8, 6, 3)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = {
        "['Conv_0']['kernel']": "Conv",
        "['ConvTranspose_0']['kernel']": "Conv",
        "['ConvTranspose_0']['bias']": "PerExample",
    }
    return loss, params, (x, draw.normal(EXAMPLES, 8, 6, 3)), kinds


def _linen_transformer(draw, *, tied):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 6)
            places = self.param("places", nn.initializers.normal(), (5, 6))
            x = embed(tokens) + places
            h = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=mask)
            h = nn.LayerNorm()(x)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(h)))
            x = nn.LayerNorm()(x)
            return embed.attend(x) if tied else nn.Dense(7)(x)

    tokens = draw.whole(7, EXAMPLES, 5)
    loss, params = _linen(draw, Net(), tokens, cross_entropy)
    block = "['MultiHeadDotProductAttention_0']"
    parts = ("query", "key", "value", "out")
    kinds = {f"{block}['{part}']['kernel']": "Outer" for part in parts}
    kinds |= {
        "['Embed_0']['embedding']": "Sum(Outer, Scatter)" if tied else "Scatter",
        "['LayerNorm_0']['scale']": "PerExample",
        f"{block}['out']['bias']": "PerExample",
        "['Dense_0']['kernel']": "Outer",
        "['Dense_0']['bias']": "PerExample",
        "['Dense_1']['kernel']": "Outer",
    }
    return loss, params, (tokens, draw.whole(7, EXAMPLES, 5)), kinds


@model
def linen_transformer(draw):
    return _linen_transformer(draw, tied=False)


@model
def linen_transformer_tied(draw):
    return _linen_transformer(draw, tied=True)


def _linen_layers(draw, *, remat, scan):
    """Blocks under `nn.scan`, or one after the other."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.tanh(nn.Dense(6)(nn.LayerNorm()(x)))
            return x + nn.Dense(4)(h), None

    layer = nn.remat(Block) if remat else Block

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if scan:
                axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                layers = nn.scan(layer, length=3, **axes)
                x, _ = layers(name="layers")(x, None)
            else:
                for i in range(3):
                    x, _ = layer(name=f"layers_{i}")(x, None)
            return nn.Dense(5)(x)

    x = draw.normal(EXAMPLES, 7, 4)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = {"['Dense_0']['kernel']": "Outer"}
    own = {
        "['Dense_0']['kernel']": "Outer",
        "['Dense_0']['bias']": "PerExample",
        "['Dense_1']['kernel']": "Outer",
        "['LayerNorm_0']['scale']": "PerExample",
    }
    if scan:
        kinds |= {f"['layers']{leaf}": f"Stacked({kind})" for leaf, kind in own.items()}
    else:
        kinds |= {f"['layers_{i}']{leaf}": own[leaf] for i in range(3) for leaf in own}
    return loss, params, (x, draw.normal(EXAMPLES, 7, 5)), kinds


@model
def linen_scan(draw):
    return _linen_layers(draw, remat=False, scan=True)


@model
def linen_remat(draw):
    return _linen_layers(draw, remat=True, scan=False)


@model
def linen_scan_with_remat(draw):
    return _linen_layers(draw, remat=True, scan=True)


def _linen_recurrent(draw, name, kinds):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            # a cell makes its first state in the dtype of its params
            cell = getattr(nn, name)(3, param_dtype=jnp.float64, name="cell")
            x = nn.RNN(cell)(x)
            return nn.Dense(5)(x)

    x = draw.normal(EXAMPLES, 7, 4)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = kinds | {"['Dense_0']['kernel']": "Outer"}
    return loss, params, (x, draw.normal(EXAMPLES, 7, 5)), kinds


@model
def linen_lstm(draw):
    kinds = {f"['cell']['h{gate}']['bias']": "PerExample" for gate in "ifgo"}
    for gate in "ifgo":
        kinds |= {f"['cell']['{side}{gate}']['kernel']": "Outer" for side in "ih"}
    return _linen_recurrent(draw, "LSTMCell", kinds)


@model
def linen_optimized_lstm(draw):
    """It joins the kernels of its gates at every step."""
    kinds = {f"['cell']['{side}{gate}']['kernel']": "Outer" for side in "ih" for gate in "ifgo"}
    return _linen_recurrent(draw, "OptimizedLSTMCell", kinds)


@model
def linen_gru(draw):
    kinds = {f"['cell']['{side}{gate}']['kernel']": "Outer" for side in "ih" for gate in "rzn"}
    return _linen_recurrent(draw, "GRUCell", kinds)


@model
def linen_weight_norm(draw):
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.WeightNorm(nn.Dense(6))(x))
            return nn.Dense(3)(x)

    x = draw.normal(EXAMPLES, 4)
    loss, params = _linen(draw, Net(), x, distance)
    kinds = {
        "['Dense_0']['kernel']": "Sum(Mapped(Outer), Outer)",
        "['Dense_0']['bias']": "PerExample",
        "['WeightNorm_0']['Dense_0/kernel/scale']": "Mapped(Outer)",
        "['Dense_1']['kernel']": "Outer",
    }
    return loss, params, (x, draw.normal(EXAMPLES, 3)), kinds


@model
def linen_batch_norm(draw):
    """By running averages."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 2), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            return nn.Dense(6)(x.reshape((x.shape[0], -1)))

    x = draw.normal(EXAMPLES, 6, 4, 3)
    loss, params = _linen(draw, Net(), x, cross_entropy)
    kinds = {
        "['Conv_0']['kernel']": "Conv",
        "['BatchNorm_0']['scale']": "PerExample",
        "['BatchNorm_0']['bias']": "PerExample",
        "['Dense_0']['kernel']": "Outer",
    }
    return loss, params, (x, draw.whole(6, EXAMPLES)), kinds


@model
def linen_dropout(draw):
    """A key for every example."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.Dense(6)(x))
            x = nn.Dropout(0.4, deterministic=not train)(x)
            return nn.Dense(3)(x)

    net = Net()
    x = draw.normal(EXAMPLES, 4)
    params = moved(net.init(jax.random.key(KEY), x[:1], train=False)["params"], draw)

    def loss(params, x, key, target):
        outputs = net.apply({"params": params}, x[None], train=True, rngs={"dropout": key})
        return distance(outputs[0], target)

    keys = jax.random.split(jax.random.key(5), EXAMPLES)
    kinds = {"['Dense_0']['kernel']": "Outer", "['Dense_1']['kernel']": "Outer"}
    return loss, params, (x, keys, draw.normal(EXAMPLES, 3)), kinds


# Flax, nnx


def _nnx(draw, net, score):
    """The loss `score(outputs, target)` of a net that takes batches, and its params."""
    from flax import nnx

    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def loss(params, x, target):
        outputs = nnx.merge(graph, params, rest)(x[None])
        return score(outputs[0], target)

    return loss, moved(params, draw)


@model
def nnx_mlp(draw):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 6, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.second = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.gelu(self.first(x))
            return self.second(self.norm(x))

    loss, params = _nnx(draw, Net(nnx.Rngs(KEY)), distance)
    kinds = {
        "['first']['kernel'].value": "Outer",
        "['first']['bias'].value": "PerExample",
        "['norm']['scale'].value": "PerExample",
        "['second']['kernel'].value": "Outer",
    }
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, params, batch, kinds


@model
def nnx_cnn(draw):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(3, 4, (3, 2), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.conv2 = nnx.Conv(4, 5, (2, 3), strides=(2, 1), rngs=rngs)
            self.head = nnx.Linear(5, 6, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv1(x)))
            x = nnx.avg_pool(x, (2, 2), (2, 2))
            x = nnx.relu(self.conv2(x))
            return self.head(x.mean((1, 2)))

    loss, params = _nnx(draw, Net(nnx.Rngs(KEY)), cross_entropy)
    kinds = {
        "['conv1']['kernel'].value": "Conv",
        "['conv1']['bias'].value": "PerExample",
        "['norm']['scale'].value": "PerExample",
        "['conv2']['kernel'].value": "Conv",
        "['head']['kernel'].value": "Outer",
    }
    batch = (draw.normal(EXAMPLES, 9, 8, 3), draw.whole(6, EXAMPLES))
    return loss, params, batch, kinds


@model
def nnx_transformer(draw):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            # it computes in the dtype that its params are made in
            self.embed = nnx.Embed(7, 6, param_dtype=jnp.float64, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
            self.up = nnx.Linear(6, 8, rngs=rngs)
            self.down = nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
            x = x + self.down(nnx.gelu(self.up(x)))
            return self.embed.attend(x)

    loss, params = _nnx(draw, Net(nnx.Rngs(KEY)), cross_entropy)
    parts = ("query", "key", "value", "out")
    kinds = {f"['attention']['{part}']['kernel'].value": "Outer" for part in parts}
    kinds |= {
        "['embed']['embedding'].value": "Sum(Outer, Scatter)",
        "['norm']['scale'].value": "PerExample",
        "['up']['kernel'].value": "Outer",
        "['down']['bias'].value": "PerExample",
    }
    batch = (draw.whole(7, EXAMPLES, 5), draw.whole(7, EXAMPLES, 5))
    return loss, params, batch, kinds


# Equinox, whose models take one example


def _equinox(draw, net, score):
    """The loss `score(outputs, target)` of a net, and its params."""
    import equinox as eqx

    params, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, x, target):
        net = eqx.combine(params, static)
        return score(net(x), target)

    return loss, moved(params, draw)


@model
def equinox_mlp(draw):
    import equinox as eqx

    net = eqx.nn.MLP(4, 3, 6, 2, activation=jax.nn.gelu, key=jax.random.key(KEY))
    loss, params = _equinox(draw, net, distance)
    kinds = {f".layers[{i}].weight": "Outer" for i in range(3)}
    kinds |= {f".layers[{i}].bias": "PerExample" for i in range(3)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 3))
    return loss, params, batch, kinds


@model
def equinox_cnn(draw):
    import equinox as eqx

    keys = jax.random.split(jax.random.key(KEY), 4)
    layers = [
        eqx.nn.Conv2d(3, 4, (3, 2), padding=1, key=keys[0]),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.AvgPool2d(2, 2),
        eqx.nn.Conv2d(4, 6, (2, 3), stride=(2, 1), groups=2, key=keys[1]),
        eqx.nn.Lambda(jax.nn.silu),
        eqx.nn.ConvTranspose2d(6, 5, (2, 3), stride=2, key=keys[2]),
        eqx.nn.Lambda(lambda x: jnp.tanh(x).mean((1, 2))),
        eqx.nn.Linear(5, 7, key=keys[3]),
    ]
    loss, params = _equinox(draw, eqx.nn.Sequential(layers), cross_entropy)
    kinds = {
        ".layers[0].weight": "Conv",
        ".layers[1].weight": "PerExample",
        ".layers[4].weight": "Conv",
        ".layers[6].weight": "Conv",
        ".layers[8].weight": "Outer",
        ".layers[8].bias": "PerExample",
    }
    batch = (draw.normal(EXAMPLES, 3, 9, 8), draw.whole(7, EXAMPLES))
    return loss, params, batch, kinds


@model
def equinox_transformer(draw):
    import equinox as eqx

    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        norm1: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        norm2: eqx.nn.RMSNorm
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.embedding = eqx.nn.Embedding(7, 6, key=keys[0])
            self.norm1 = eqx.nn.LayerNorm(6)
            self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[1])
            self.norm2 = eqx.nn.RMSNorm(6)
            self.mlp = eqx.nn.MLP(6, 6, 8, 1, key=keys[2])
            self.head = eqx.nn.Linear(6, 7, use_bias=False, key=keys[3])

        def __call__(self, tokens):
            x = jax.vmap(self.embedding)(tokens)
            h = jax.vmap(self.norm1)(x)
            mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
            x = x + self.attention(h, h, h, mask=mask)
            h = jax.vmap(self.norm2)(x)
            x = x + jax.vmap(self.mlp)(h)
            return jax.vmap(self.head)(x)

    loss, params = _equinox(draw, Net(jax.random.key(KEY)), cross_entropy)
    parts = ("query", "key", "value", "output")
    kinds = {f".attention.{part}_proj.weight": "Outer" for part in parts}
    kinds |= {
        ".embedding.weight": "Scatter",
        ".norm1.weight": "PerExample",
        ".norm2.weight": "PerExample",
        ".mlp.layers[0].weight": "Outer",
        ".mlp.layers[0].bias": "PerExample",
        ".head.weight": "Outer",
    }
    batch = (draw.whole(7, EXAMPLES, 5), draw.whole(7, EXAMPLES, 5))
    return loss, params, batch, kinds


def _equinox_recurrent(draw, cell, first_state, output):
    import equinox as eqx

    class Net(eqx.Module):
        cell: eqx.Module
        head: eqx.nn.Linear

        def __call__(self, xs):
            def step(state, x):
                return self.cell(x, state), None

            state, _ = lax.scan(step, first_state, xs)
            return self.head(output(state))

    head = eqx.nn.Linear(3, 6, key=jax.random.key(KEY + 1))
    loss, params = _equinox(draw, Net(cell, head), distance)
    kinds = {
        ".cell.weight_ih": "Outer",
        ".cell.weight_hh": "Outer",
        ".cell.bias": "PerExample",
        ".head.weight": "Outer",
    }
    batch = (draw.normal(EXAMPLES, 7, 4), draw.normal(EXAMPLES, 6))
    return loss, params, batch, kinds


@model
def equinox_gru(draw):
    import equinox as eqx

    cell = eqx.nn.GRUCell(4, 3, key=jax.random.key(KEY))
    return _equinox_recurrent(draw, cell, jnp.zeros(3), lambda state: state)


@model
def equinox_lstm(draw):
    import equinox as eqx

    cell = eqx.nn.LSTMCell(4, 3, key=jax.random.key(KEY))
    return _equinox_recurrent(draw, cell, (jnp.zeros(3), jnp.zeros(3)), lambda state: state[0])


@model
def equinox_stacked_layers(draw):
    """Layers made by `filter_vmap`, and called in a scan, each under `filter_checkpoint`."""
    import equinox as eqx

    class Net(eqx.Module):
        layers: eqx.nn.MLP

        def __init__(self, key):
            def make(key):
                return eqx.nn.MLP(4, 4, 6, 1, key=key)

            self.layers = eqx.filter_vmap(make)(jax.random.split(key, 3))

        def __call__(self, x):
            own, static = eqx.partition(self.layers, eqx.is_array)

            @eqx.filter_checkpoint
            def step(x, own):
                layer = eqx.combine(own, static)
                return x + jnp.tanh(layer(x)), None

            x, _ = lax.scan(step, x, own)
            return x

    loss, params = _equinox(draw, Net(jax.random.key(KEY)), distance)
    kinds = {f".layers.layers[{i}].weight": "Stacked(Outer)" for i in range(2)}
    kinds |= {f".layers.layers[{i}].bias": "Stacked(PerExample)" for i in range(2)}
    batch = (draw.normal(EXAMPLES, 4), draw.normal(EXAMPLES, 4))
    return loss, params, batch, kinds


# Haiku


def _haiku(draw, forward, x, score):
    """The loss `score(outputs, target)` of a function of batches `x`, and its params."""
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(forward))
    params = moved(net.init(jax.random.key(KEY), x[:1]), draw)

    def loss(params, x, target):
        outputs = net.apply(params, x[None])
        return score(outputs[0], target)

    return loss, params


@model
def haiku_mlp(draw):
    import haiku as hk

    def forward(x):
        x = hk.nets.MLP([7, 6], activate_final=True)(x)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(3, name="head")(x)

    x = draw.normal(EXAMPLES, 4)
    loss, params = _haiku(draw, forward, x, distance)
    kinds = {
        "['mlp/~/linear_0']['w']": "Outer",
        "['mlp/~/linear_0']['b']": "PerExample",
        "['mlp/~/linear_1']['w']": "Outer",
        "['layer_norm']['scale']": "PerExample",
        "['layer_norm']['offset']": "PerExample",
        "['head']['w']": "Outer",
    }
    return loss, params, (x, draw.normal(EXAMPLES, 3)), kinds


@model
def haiku_cnn(draw):
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(4, (3, 2), stride=(2, 1), name="first")(x))
        x = jax.nn.relu(hk.DepthwiseConv2D(2, (2, 3), name="depthwise")(x))
        x = hk.max_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = hk.Conv2DTranspose(5, (2, 3), stride=2, name="transposed")(x)
        return hk.Linear(6, name="head")(jnp.tanh(x).mean((1, 2)))

    x = draw.normal(EXAMPLES, 9, 8, 3)
    loss, params = _haiku(draw, forward, x, cross_entropy)
    kinds = {f"['{layer}']['w']": "Conv" for layer in ("first", "depthwise", "transposed")}
    kinds |= {"['first']['b']": "PerExample", "['head']['w']": "Outer"}
    return loss, params, (x, draw.whole(6, EXAMPLES)), kinds


@model
def haiku_lstm(draw):
    import haiku as hk

    def forward(x):
        cell = hk.LSTM(3, name="cell")
        outputs, _ = hk.dynamic_unroll(cell, x, cell.initial_state(len(x)), time_major=False)
        return hk.Linear(5, name="head")(outputs)

    x = draw.normal(EXAMPLES, 7, 4)
    loss, params = _haiku(draw, forward, x, distance)
    kinds = {
        "['cell/linear']['w']": "Outer",
        "['cell/linear']['b']": "PerExample",
        "['head']['w']": "Outer",
    }
    return loss, params, (x, draw.normal(EXAMPLES, 7, 5)), kinds


@model
def haiku_transformer(draw):
    """Layers under `hk.experimental.layer_stack`."""
    import haiku as hk

    def block(x):
        init = hk.initializers.VarianceScaling(1.0)
        attend = hk.MultiHeadAttention(2, 3, w_init=init, model_size=6, name="attention")
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        h = hk.RMSNorm(-1, name="norm")(x)
        x = x + attend(h, h, h, mask=mask)
        return x + hk.nets.MLP([8, 6], activation=jax.nn.gelu, name="mlp")(x)

    def forward(tokens):
        x = hk.Embed(7, 6, name="embed")(tokens)
        x = hk.experimental.layer_stack(3)(block)(x)
        return hk.Linear(7, name="head")(x)

    tokens = draw.whole(7, EXAMPLES, 5)
    loss, params = _haiku(draw, forward, tokens, cross_entropy)
    layers = "__layer_stack_no_per_layer"
    parts = ("attention/query", "attention/key", "attention/value", "attention/linear")
    kinds = {f"['{layers}/{part}']['w']": "Stacked(Outer)" for part in parts}
    kinds |= {"['embed']['embeddings']": "Scatter", "['head']['w']": "Outer"}
    return loss, params, (tokens, draw.whole(7, EXAMPLES, 5)), kinds


# Plain JAX: a GPT


def _gpt_layer(params, x):
    """Attention and an MLP, as nanoGPT has them."""
    length, width = x.shape
    h = layer_norm(params["norm1"], x)
    q, k, v = jnp.split(dense(params["qkv"], h), 3, axis=1)
    heads = (length, 2, width // 2)
    y = attention(q.reshape(heads), k.reshape(heads), v.reshape(heads))
    x = x + dense(params["out"], y.reshape(length, width))
    h = jax.nn.gelu(dense(params["up"], layer_norm(params["norm2"], x)))
    return x + dense(params["down"], h)


def _gpt_layer_params(draw):
    return {
        "norm1": norm_params(draw, 6),
        "qkv": dense_params(draw, 6, 18),
        "out": dense_params(draw, 6, 6),
        "norm2": norm_params(draw, 6),
        "up": dense_params(draw, 6, 24),
        "down": dense_params(draw, 24, 6),
    }


GPT_LAYER = {
    **{f"['{name}']['W']": "Outer" for name in ("qkv", "out", "up", "down")},
    **{f"['{name}']['b']": "PerExample" for name in ("qkv", "out", "up", "down")},
    **{f"['{name}']['scale']": "PerExample" for name in ("norm1", "norm2")},
    **{f"['{name}']['bias']": "PerExample" for name in ("norm1", "norm2")},
}


def _gpt(draw, *, tied=False, stacked=False, remat=False):
    """Of 2 layers, 11 tokens, and at most 8 positions."""
    layer = jax.checkpoint(_gpt_layer) if remat else _gpt_layer

    def loss(params, tokens, labels):
        x = params["wte"][tokens] + params["wpe"][jnp.arange(len(tokens))]
        if stacked:
            x, _ = lax.scan(lambda x, own: (layer(own, x), None), x, params["layers"])
        else:
            for own in params["layers"]:
                x = layer(own, x)
        x = layer_norm(params["norm"], x)
        head = params["wte"].T if tied else params["head"]
        return cross_entropy(x @ head, labels) / len(labels)

    layers = [_gpt_layer_params(draw) for _ in range(2)]
    params = {
        "wte": draw.normal(11, 6),
        "wpe": draw.normal(8, 6),
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if stacked else layers,
        "norm": norm_params(draw, 6),
    }
    kinds = {"['wte']": "Sum(Outer, Scatter)", "['wpe']": "Scatter"}
    if not tied:
        params["head"] = draw.weight(6, 11)
        kinds |= {"['wte']": "Scatter", "['head']": "Outer"}
    if stacked:
        kinds |= {f"['layers']{leaf}": f"Stacked({kind})" for leaf, kind in GPT_LAYER.items()}
    else:
        kinds |= {f"['layers'][{i}]{leaf}": GPT_LAYER[leaf] for i in range(2) for leaf in GPT_LAYER}
    batch = (draw.whole(11, EXAMPLES, 7), draw.whole(11, EXAMPLES, 7))
    return loss, params, batch, kinds


plain_model = functools.partial(model, standard=False)


@plain_model
def gpt(draw):
    return _gpt(draw)


@plain_model
def gpt_tied(draw):
    return _gpt(draw, tied=True)


@plain_model
def gpt_stacked(draw):
    return _gpt(draw, stacked=True)


@plain_model
def gpt_tied_and_stacked_with_remat(draw):
    return _gpt(draw, tied=True, stacked=True, remat=True)


@plain_model
def mixer(draw):
    """An MLP over positions, then one over features, as in MLP-Mixer."""

    def loss(params, x, label):
        h = layer_norm(params["norm"], x).T
        h = jax.nn.gelu(dense(params["positions_up"], h))
        x = x + dense(params["positions_down"], h).T
        h = jax.nn.gelu(dense(params["features_up"], x))
        x = x + dense(params["features_down"], h)
        return cross_entropy(add(x.mean(0) @ params["head"], params["b"]), label)

    params = {
        "norm": norm_params(draw, 6),
        "positions_up": dense_params(draw, 7, 9),
        "positions_down": dense_params(draw, 9, 7),
        "features_up": dense_params(draw, 6, 8),
        "features_down": dense_params(draw, 8, 6),
        "head": draw.weight(6, 3),
        "b": draw.normal(3),
    }
    names = ("positions_up", "positions_down", "features_up", "features_down")
    kinds = {f"['{name}']['W']": "Outer" for name in names}
    kinds |= {"['head']": "Outer", "['positions_up']['b']": "PerExample"}
    return loss, params, (draw.normal(EXAMPLES, 7, 6), draw.whole(3, EXAMPLES)), kinds
