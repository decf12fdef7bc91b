"""The programs of statistics of unmodified models: no array of batch x weight, little memory."""

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import array_shapes

import fnn
from fnn import per_example

KEY = jax.random.key(0)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def flax_mlp():
    """784-512-512-10 at 128."""
    from flax import linen as nn

    net = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(512), nn.relu, nn.Dense(10)])
    batch = jnp.zeros((128, 784)), jnp.zeros(128, int)
    params = net.init(KEY, batch[0][0])
    return lambda p, x, y: cross_entropy(net.apply(p, x), y), params, batch


def flax_cnn():
    """16-32-128 at 64."""
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for channels in (16, 32):
                x = nn.relu(nn.Conv(channels, (3, 3))(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Dense(128)(x.reshape(-1)))
            return nn.Dense(10)(x)

    net = Net()
    batch = jnp.zeros((64, 28, 28, 1)), jnp.zeros(64, int)
    params = net.init(KEY, batch[0][0])
    return lambda p, x, y: cross_entropy(net.apply(p, x), y), params, batch


def haiku_lstm():
    """64 units, 8 steps, at 32."""
    import haiku as hk

    def apply(x):
        core = hk.LSTM(64)
        outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
        return hk.Linear(10)(outputs[-1])

    net = hk.without_apply_rng(hk.transform(apply))
    batch = jnp.zeros((32, 8, 48)), jnp.zeros(32, int)
    params = net.init(KEY, batch[0][0])
    return lambda p, x, y: cross_entropy(net.apply(p, x), y), params, batch


def equinox_attention():
    """4 heads of 16, 12 positions, at 32."""
    import equinox as eqx

    net = eqx.nn.MultiheadAttention(4, 64, key=KEY)
    params, rest = eqx.partition(net, eqx.is_array)

    def loss(params, x, y):
        return ((eqx.combine(params, rest)(x, x, x) - y) ** 2).sum()

    return loss, params, (jnp.zeros((32, 12, 64)), jnp.zeros((32, 12, 64)))


def gpt():
    """2 layers of 96, 4 heads, 64 positions, tied embedding and head, at 16."""
    width, heads, length, tokens = 96, 4, 64, 65

    def norm(x):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def attend(layer, x):
        q, k, v = jnp.split(norm(x) @ layer["qkv"], 3, -1)
        q, k, v = (a.reshape(length, heads, -1) for a in (q, k, v))
        scores = jnp.einsum("thc,shc->hts", q, k) / 6.0
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("hts,shc->thc", jax.nn.softmax(scores), v)
        return mixed.reshape(length, width) @ layer["out"]

    def loss(params, x, y):
        h = params["embed"][x] + params["places"]
        for layer in params["layers"]:
            h = h + attend(layer, h)
            h = h + jax.nn.gelu(norm(h) @ layer["up"]) @ layer["down"]
        return cross_entropy(norm(h) @ params["embed"].T, y).mean()

    shapes = {"qkv": (96, 288), "out": (96, 96), "up": (96, 384), "down": (384, 96)}
    layer = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    params = {"embed": jnp.zeros((tokens, width)), "places": jnp.zeros((length, width))}
    batch = jnp.zeros((16, length), int), jnp.zeros((16, length), int)
    return loss, params | {"layers": [layer] * 2}, batch


MODELS = (flax_mlp, flax_cnn, haiku_lstm, equinox_attention, gpt)


def built(model):
    try:
        return model()
    except ImportError as error:
        pytest.skip(str(error))


def without_ones(*shape):
    return tuple(sorted(n for n in shape if n > 1))


@pytest.mark.parametrize("model", MODELS)
def test_no_array_is_of_batch_times_weight(model, as_users_run):
    with jax.numpy_rank_promotion("allow"):
        loss, params, batch = built(model)
        source = fnn.as_source(loss, fallback="raise")
        statistics = [
            per_example.norms(source),
            lambda *a: per_example.clipped_gradient(source, 1.0)(*a).gradient,
            lambda *a: tuple(per_example.moments(source)(*a)),
        ]
        rows = batch[0].shape[0]
        report = per_example.report(source, params, *batch)
        kinds = zip(report.values(), jax.tree.leaves(params), strict=True)
        weights = {without_ones(rows, *p.shape) for kind, p in kinds if kind != "PerExample"}
        for f in statistics:
            found = set(array_shapes(jax.make_jaxpr(f)(params, *batch).jaxpr))
            assert not {shape for shape in found if without_ones(*shape) in weights}


LIMITS = {flax_mlp: 2.3, flax_cnn: 1.7, gpt: 1.3}


@pytest.mark.parametrize("model", LIMITS)
def test_clipping_takes_little_more_memory_than_the_gradient(model, as_users_run):
    with jax.numpy_rank_promotion("allow"):
        loss, params, batch = built(model)
        clipped = per_example.clipped_gradient(fnn.as_source(loss), 1.0)

        def mean(params, *batch):
            return jax.vmap(loss, (None, 0, 0))(params, *batch).mean()

        sizes = []
        for f in (jax.value_and_grad(mean), lambda *a: clipped(*a).gradient):
            program = jax.jit(f).lower(params, *batch).compile()
            sizes.append(program.memory_analysis().temp_size_in_bytes)
        assert sizes[1] < LIMITS[model] * sizes[0]
