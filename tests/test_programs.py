"""The compiled programs of the statistics: size, memory, and JAX's transformations of them."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import fnn
from fnn import per_example as pe

LABELS = fnn.losses.softmax_cross_entropy_with_integer_labels
SQUARES = fnn.losses.l2_loss
STATISTICS = {
    "norms": pe.norms,
    "clipped": lambda source: pe.clipped_gradient(source, 1.0),
    "per_layer": lambda source: pe.clipped_gradient(source, 1.0, per_layer=True),
    "weighted": pe.weighted_gradient,
    "moments": pe.moments,
    "noise_scale": pe.noise_scale,
    "gram": pe.gram,
    "gradients": pe.gradients,
}
LIMITS = {"norms": 2.0, "clipped": 2.5, "per_layer": 3.0, "moments": 4.0, "noise_scale": 3.0}


def by_jax(net, loss):
    return jax.value_and_grad(fnn.mean_loss(net, loss))


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def labels(batch):
    return shape(batch, dtype=jnp.int32)


def shapes_of(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def lowered(f, *args):
    return jax.jit(f).lower(*args).as_text()


def operations(f, *args):
    """The lines of the lowered text that define a value."""
    return sum(bool(re.match(r"\s*%[^=]*= ", line)) for line in lowered(f, *args).splitlines())


@pytest.mark.parametrize("depth", [4, 16, 64])
def test_programs_are_a_few_times_as_large_as_that_of_jax_grad(depth):
    net = fnn.mlp((64,) * (depth + 1))
    args = shapes_of(net), shape(32, 64), labels(32)
    whole = operations(by_jax(net, LABELS), *args)
    source = fnn.source(net, LABELS)
    for name, limit in LIMITS.items():
        ratio = operations(STATISTICS[name](source), *args) / whole
        assert ratio <= limit, f"{name}: {ratio:.2f}"


def test_programs_with_positions_are_a_few_times_as_large():
    limits = {"norms": 4.5, "clipped": 3.5, "per_layer": 4.0, "moments": 2.0, "noise_scale": 4.0}
    net = fnn.mlp((64,) * 17)
    args = shapes_of(net), shape(32, 16, 64), shape(32, 16, 64)
    whole = operations(by_jax(net, SQUARES), *args)
    source = fnn.source(net, SQUARES)
    for name, limit in limits.items():
        ratio = operations(STATISTICS[name](source), *args) / whole
        assert ratio <= limit, f"{name}: {ratio:.2f}"


STACKED = fnn.serial(
    fnn.dense(5, 6),
    fnn.activations.tanh,
    fnn.repeat(fnn.residual(fnn.serial(fnn.layer_norm(6), fnn.dense(6, 6))), 2),
    fnn.dense(6, 4),
)
TIED = fnn.serial(
    fnn.iterate(fnn.residual(fnn.serial(fnn.dense(5, 5), fnn.activations.softplus)), 3),
    fnn.dense(5, 4),
)
TABLE = fnn.serial(fnn.embedding(7, 5), fnn.dense(5, 4))
NETS = {
    "one position": (STACKED, (8, 5), jnp.float32, (8, 4)),
    "positions": (TIED, (8, 3, 5), jnp.float32, (8, 3, 4)),
    "embedding": (TABLE, (8, 3), jnp.int32, (8, 3, 4)),
}


def batch_of(name):
    net, x_shape, dtype, t_shape = NETS[name]
    keys = jax.random.split(jax.random.key(3), 2)
    x = 3 * jax.random.normal(keys[0], x_shape)
    x = (jnp.abs(x) % 7).astype(dtype) if dtype == jnp.int32 else x
    return net, net.init(jax.random.key(0)), x, jax.random.normal(keys[1], t_shape)


@functools.cache
def compiled(name, net):
    """A statistic of a net of NETS, which several tests compare with."""
    return jax.jit(STATISTICS[name](fnn.source(NETS[net][0], SQUARES)))


def assert_close(ours, expected):
    def close(a, b):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))

    jax.tree.map(close, ours, expected)


def each(test):
    test = pytest.mark.parametrize("net", NETS)(test)
    return pytest.mark.parametrize("name", STATISTICS)(test)


@each
def test_no_program_has_a_cond(name, net):
    """Under `vmap` both branches of a `cond` run."""
    net, params, x, targets = batch_of(net)
    text = lowered(STATISTICS[name](fnn.source(net, SQUARES)), params, x, targets)
    assert not re.findall(r"stablehlo\.(?:case|if)\b", text)


VARIES = [(name, "data") for name in STATISTICS]
VARIES += [
    (name, other) for name in ("norms", "clipped", "moments") for other in ("params", "targets")
]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("name", "varies"), VARIES)
def test_shard_map_with_its_default_checks(name, net, varies):
    """Whatever varies over the devices, the loops carry arrays that vary as their results do."""
    whole = compiled(name, net)
    net, params, x, targets = batch_of(net)
    f = STATISTICS[name](fnn.source(net, SQUARES))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    here, everywhere = PartitionSpec("data"), PartitionSpec()

    def with_axis(params, x, targets):
        return jax.tree.map(jnp.atleast_1d, f(params, x, targets))

    specs = {
        "data": (everywhere, here, here),
        "params": (here, everywhere, everywhere),
        "targets": (everywhere, everywhere, here),
    }
    sharded = jax.shard_map(with_axis, mesh=mesh, in_specs=specs[varies], out_specs=here)
    ours = jax.jit(sharded)(params, x, targets)
    expected = jax.tree.map(np.atleast_1d, whole(params, x, targets))
    assert_close(jax.tree.leaves(ours), jax.tree.leaves(expected))


@each
def test_vmap_over_nets(name, net):
    f = compiled(name, net)
    _, params, x, targets = batch_of(net)
    other = jax.tree.map(lambda p: 0.5 * p, params)
    both = jax.tree.map(lambda *p: jnp.stack(p), params, other)
    ours = jax.jit(jax.vmap(f, (0, None, None)))(both, x, targets)
    one_by_one = [f(p, x, targets) for p in (params, other)]
    assert_close(ours, jax.tree.map(lambda *a: jnp.stack(a), *one_by_one))


@pytest.mark.parametrize(
    "case", ["norms squared_norm 2", "clipped exact_total 2", "moments moments 1"]
)
def test_under_vmap_the_exact_way_runs_only_where_it_is_needed(case):
    name, method, positions = case.split()
    rng = np.random.default_rng(0)
    a, dz = rng.normal(size=(2, 3, 32, int(positions), 16))  # 3 nets, 32 examples
    rounds = []

    def watched(self, *args):
        jax.debug.callback(lambda: rounds.append(1))
        return getattr(fnn.factors.Outer, method)(self, *args)

    outer = fnn.factors.factor(type("Watched", (fnn.factors.Outer,), {method: watched}))

    def source(params, a, dz):
        return jnp.zeros(len(a)), outer(a, dz)

    f = jax.jit(jax.vmap(STATISTICS[name](source), (None, 0, 0)))
    if positions == "1":
        a, dz = a[:, :, 0], dz[:, :, 0]
        alike = np.broadcast_to(a[:, :1], a.shape), np.broadcast_to(dz[:, :1], dz.shape)
    else:
        one, other = a[:, :, :1], dz[:, :, :1]
        alike = np.concatenate([one, one], 2), np.concatenate([other, -other], 2)
    for batch, runs in [((a, dz), False), (alike, True)]:
        jax.block_until_ready(f(jnp.zeros((16, 16)), *map(jnp.float32, batch)))
        jax.effects_barrier()
        assert bool(rounds) == runs


@each
def test_reverse_mode_is_forward_mode(name, net):
    net, params, x, targets = batch_of(net)
    f = STATISTICS[name](fnn.source(net, SQUARES))

    def scalar(step):
        moved = jax.tree.map(lambda p: p + step * jnp.cos(p), params)
        leaves = jax.tree.leaves(f(moved, x, targets))
        return sum((a**2).mean() for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))

    @jax.jit
    def both(step):
        return jax.grad(scalar)(step), jax.jvp(scalar, (step,), (1.0,))[1]

    backwards, forwards = both(0.0)
    np.testing.assert_allclose(backwards, forwards, rtol=1e-3, atol=1e-6)
    assert abs(forwards) > 1e-9


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["clipped", "moments"])
def test_second_derivatives_are_those_of_the_first(x64, name, net):
    net, *args = batch_of(net)
    params, x, targets = jax.tree.map(
        lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tuple(args)
    )
    f = STATISTICS[name](fnn.source(net, SQUARES))

    def scalar(step):
        moved = jax.tree.map(lambda p: p + step * jnp.cos(p), params)
        leaves = jax.tree.leaves(f(moved, x, targets))
        return sum((a**2).mean() for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))

    @jax.jit
    def both(step):
        """The slope, and its derivative."""
        return jax.jvp(jax.grad(scalar), (step,), (1.0,))

    by_difference = (both(1e-5)[0] - both(-1e-5)[0]) / 2e-5
    np.testing.assert_allclose(both(0.0)[1], by_difference, rtol=1e-5)


def test_reverse_mode_where_the_gradient_of_an_example_is_0():
    net = fnn.mlp((4, 3))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    t = net.apply(params, x).at[1:].add(1.0)  # the first example is fitted exactly
    source = fnn.source(net, SQUARES)
    for name in ("norms", "clipped", "per_layer", "moments", "noise_scale"):
        f = STATISTICS[name](source)

        def scalar(params, f=f):
            leaves = jax.tree.leaves(f(params, x, t))
            return sum((a**2).sum() for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))

        slopes = jax.jit(jax.grad(scalar))(params)
        assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes)), name


@each
def test_debug_nans_finds_none(name, net):
    net, params, x, targets = batch_of(net)
    f = STATISTICS[name](fnn.source(net, SQUARES))
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(f)(params, x, targets))
        jax.block_until_ready(f(params, x, targets))  # it looks at every operation, jit at results


@each
def test_export_with_a_symbolic_batch(name, net):
    net, params, x, targets = batch_of(net)
    f = STATISTICS[name](fnn.source(net, SQUARES))
    (batch,) = jax.export.symbolic_shape("batch")
    args = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in (x, targets)]
    exported = jax.export.export(jax.jit(f))(shapes_of(net), *args)
    stored = jax.export.deserialize(exported.serialize())
    ours = stored.call(params, x[:3], targets[:3])
    assert_close(ours, jax.jit(f)(params, x[:3], targets[:3]))


def tokens(size, features, batch, positions):
    args = shape(batch, positions, dtype=jnp.int32), shape(batch, positions, features)
    return fnn.embedding(size, features), SQUARES, *args


def rows_of(sizes, batch):
    return fnn.mlp(sizes), LABELS, shape(batch, sizes[0]), labels(batch)


ROWS = shape(8, 16, 1024)
LARGE = {
    "784-512-512-10": rows_of((784, 512, 512, 10), 128),
    "64-32-10": rows_of((64, 32, 10), 128),
    "5 x 256": rows_of((256,) * 6, 128),
    "embedding 5000 x 64": tokens(5000, 64, 32, 32),
    "embedding 50257 x 768": tokens(50257, 768, 8, 128),
    "1024-1024-1024": (fnn.mlp((1024,) * 3), SQUARES, ROWS, ROWS),
}


def memory(f, *args):
    """Bytes of temporary arrays, and of these and the result."""
    found = jax.jit(f).lower(*args).compile().memory_analysis()
    return found.temp_size_in_bytes, found.temp_size_in_bytes + found.output_size_in_bytes


def measure(name):
    net, loss, *batch = LARGE[name]
    args = shapes_of(net), *batch
    source = fnn.source(net, loss)
    return {
        "jax.grad": memory(by_jax(net, loss), *args),
        "norms": memory(pe.norms(source), *args),
        "clipped": memory(pe.clipped_gradient(source, 1.0), *args),
        "moments": memory(pe.moments(source), *args),
    }


@pytest.fixture(scope="module")
def memories():
    """By net, of programs that are compiled as users compile them: without conftest.py's flags."""
    program = [sys.executable, __file__]
    root = str(pathlib.Path(__file__).parents[1])
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": root}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the figures are those of a CPU")
def test_statistics_need_about_the_memory_of_jax_grad(memories):
    for name, found in memories.items():
        temporary, whole = found["jax.grad"]
        assert found["norms"][0] <= 1.05 * temporary, name
        assert found["clipped"][0] <= 1.7 * temporary, name
        assert found["moments"][1] <= 4 * whole, name


def cancelling(rng, kind, batch, positions, inputs, outputs):
    """Examples whose positions cancel, to a random degree: `a`, `dz`."""
    a = rng.normal(size=(batch, positions, inputs))
    dz = rng.normal(size=(batch, positions, outputs))
    degree = 10.0 ** rng.uniform(-6, 0, size=(batch, 1, 1))
    if kind == "pairs":
        a[:, 1::2] = a[:, ::2]
        dz[:, 1::2] = degree * dz[:, 1::2] - dz[:, ::2]
    if kind == "signs":
        a = a[:, :1] + degree * a
        signs = rng.choice([-1, 1], size=(batch, positions, 1))
        dz = signs * dz[:, :1] + degree * dz
    if kind == "mean 0":
        a = a[:, :1] + degree * a
        dz = dz - dz.mean(1, keepdims=True)
    return a.astype(np.float32), dz.astype(np.float32)


@pytest.mark.parametrize("kind", ["pairs", "signs", "mean 0", "none"])
@pytest.mark.parametrize("sizes", [(2, 8, 6), (4, 32, 16), (8, 16, 16)])
def test_the_clip_bound_holds_where_positions_cancel(kind, sizes):
    """On 12,000 batches of one example in all."""
    a, dz = cancelling(np.random.default_rng(sizes[0]), kind, 1000, *sizes)

    def source(w, a, dz):
        return jnp.zeros(len(a)), fnn.factors.Outer(a, dz)

    clip = pe.clipped_gradient(source, 1.0, reduction="sum")
    w = jnp.zeros(sizes[1:])

    def one(batch):
        return clip(w, *batch).gradient

    gradients = jax.jit(lambda *batch: jax.lax.map(one, batch))(a[:, None], dz[:, None])
    by_hand = np.einsum("bti,bto->bio", a.astype(np.float64), dz.astype(np.float64))
    by_hand = np.linalg.norm(by_hand, axis=(1, 2))
    clipped = np.linalg.norm(np.asarray(gradients, np.float64), axis=(1, 2))
    assert clipped.max() <= 1 + 1e-6
    long = by_hand > 1.1
    assert long.any()
    assert clipped[long].min() >= 1 - 1e-6


@pytest.mark.parametrize("features", [3, 64])
@pytest.mark.parametrize("kind", ["Outer", "Scatter"])
def test_the_clip_bound_holds_where_4096_positions_cancel(kind, features):
    rng = np.random.default_rng(features)
    index = rng.integers(0, 4, (1, 4096))
    dy = rng.normal(size=(1, 4096, features))
    for row in range(4):
        own = index == row
        dy[own] -= 0.999 * dy[own].mean(0)

    def source(w, index, dy):
        if kind == "Outer":
            factor = fnn.factors.Outer(jax.nn.one_hot(index, 4), dy)
        else:
            factor = fnn.factors.Scatter(index, dy, 4)
        return jnp.zeros(len(dy)), factor

    clip = jax.jit(pe.clipped_gradient(source, 1e-3, reduction="sum"))
    found = clip(jnp.zeros((4, features)), index, jnp.float32(dy))
    clipped = np.linalg.norm(np.asarray(found.gradient, np.float64))
    assert abs(clipped / 1e-3 - 1) <= 1e-6


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in LARGE}))
