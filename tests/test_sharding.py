"""On a mesh of eight devices everything is what it is on one, and the devices send each other what
the plan says and no more."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TOLERANCE, error, wide
from jax import lax
from jax.sharding import PartitionSpec as P

import fnn
from fnn import losses, per_example, rules, sharding, training
from fnn.nets.layers import Dense
from fnn.sharding import PLANS

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices: JAX_NUM_CPU_DEVICES=8"
)
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
DTYPES = ("float32", "float64")
MAX_NORM = 2.5
LABELS = losses.softmax_cross_entropy_with_integer_labels


def block(width):
    return fnn.residual(
        fnn.serial(
            fnn.rms_norm(width),
            fnn.dense(width, 2 * width),
            fnn.activations.gelu,
            fnn.dense(2 * width, width),
        )
    )


# a pair of layers for tensor parallelism, and one without a partner
MLP = fnn.mlp((12, 16, 8, 6), "tanh")
NETS = {
    "uneven": fnn.mlp((5, 7, 3)),
    "one layer": fnn.mlp((12, 8)),
    "one unit": fnn.mlp((3, 1, 1), "sigmoid"),
    "repeat": fnn.serial(
        fnn.dense(12, 16, bias_init=None),
        fnn.layer_norm(16),
        fnn.repeat(block(16), 3),
        fnn.dense(16, 6),
    ),
    "embedding": fnn.serial(fnn.embedding(16, 8), fnn.mlp((8, 16, 8))),
}


def mesh_of(shape):
    return sharding.make_mesh(data=shape[0], model=shape[1])


def params_of(net, dtype="float64"):
    """Parameters of which none is 0 or 1."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0))
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / math.sqrt(max(leaf.shape))).astype(dtype),
        shapes,
    )


def batch_of(net, params, loss, rows=13):
    """`(x, targets)`, floating-point where the net takes such."""
    rng = np.random.default_rng(2)
    first = jax.tree.leaves(params)[0]
    words = type(params[0]).__name__ == "Embedding"
    x = (
        rng.integers(0, first.shape[0], (rows, 3)).astype(np.int32)
        if words
        else rng.normal(size=(rows, first.shape[0])).astype(first.dtype)
    )
    outputs = jax.eval_shape(net.apply, params, x).shape
    if loss is LABELS:
        return x, rng.integers(0, outputs[-1], outputs[:-1]).astype(np.int32)
    return x, rng.normal(size=outputs).astype(first.dtype)


@functools.cache  # compiled once for one device
def everything(net, loss):
    """Gradients by hand and by `jax.grad`, norms, and the clipped gradient, in one program."""
    source, manual, automatic = (
        fnn.source(net, loss),
        fnn.value_and_grad(net, loss),
        jax.value_and_grad(fnn.mean_loss(net, loss)),
    )

    def found(params, x, targets, weights=None):
        clipped = per_example.clipped_gradient(source, MAX_NORM)(
            params, x, targets, weights=weights
        )
        norms = per_example.norms(source)(params, x, targets)
        gradients = manual(params, x, targets, weights), automatic(params, x, targets, weights)
        return {
            "manual": gradients[0],
            "automatic": gradients[1],
            "norms": norms,
            "clipped": clipped.gradient,
        }

    return jax.jit(found)


def agrees(net, loss, dtype, plan_of, shapes, rows=13):
    """Asserts that everything on the meshes is what it is on one device; returns the norms."""
    params = params_of(net, dtype)
    batch = batch_of(net, params, loss, rows)
    function = everything(net, loss)
    expected = function(params, *batch)
    for shape in shapes:
        mesh = mesh_of(shape)
        found = function(
            sharding.place(mesh, params, plan_of(mesh, params)), *sharding.place_batch(mesh, batch)
        )
        found["norms"] = found["norms"][:rows]
        for name, value in found.items():
            assert error(wide(value), wide(expected[name])) <= TOLERANCE[dtype], (shape, name)
    return np.asarray(expected["norms"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan_of", PLANS)
def test_gradients_norms_and_clipped_gradients_are_those_of_one_device(dtype, plan_of):
    with jax.enable_x64(dtype == "float64"):
        norms = agrees(MLP, LABELS, dtype, plan_of, MESHES)
    assert norms.min() < MAX_NORM < norms.max()  # some are clipped, some are not


@pytest.mark.parametrize("plan_of", PLANS)
@pytest.mark.parametrize("name", NETS)
def test_so_they_are_for_every_kind_of_net(x64, plan_of, name):
    agrees(
        NETS[name],
        losses.l2_loss,
        "float64",
        plan_of,
        [(4, 2)],
        rows=1 if name == "one unit" else 13,
    )


# a plan of one's own, with both axes
EDITED = ((Dense(P("data", "model"), P("model")), ()), Dense(P("model", "data"), P()))


def without_keys(tree):
    """Keys as their numbers."""
    return jax.tree.map(
        lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
        tree,
    )


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda r: r.__name__)
def test_a_step_of_every_rule_is_that_of_one_device_and_its_state_stays_where_it_was_placed(
    x64, rule
):
    net, mesh, optimizer = fnn.mlp((8, 8, 4), "tanh"), mesh_of((4, 2)), optax.sgd(0.1, momentum=0.9)
    params = jax.tree.map(jnp.asarray, params_of(net))
    batch = (*batch_of(net, params, LABELS, 7), np.array([1, 2, 1, 1, 0.5, 0, 1]))
    made = rule(net, LABELS)
    state = training.init(made, optimizer, params, jax.random.key(5))
    plan = sharding.follow(EDITED, params, state)
    step, there = training.step(made, optimizer), sharding.shardings(mesh, plan)
    # some draw random numbers for every row of the batch
    expected, expected_value = jax.jit(step)(
        state, *(np.asarray(a) for a in sharding.place_batch(mesh, batch))
    )
    found, value = jax.jit(step, out_shardings=(there, None))(
        sharding.place(mesh, state, plan), *sharding.place_batch(mesh, batch)
    )
    assert (
        error(wide((without_keys(found), value)), wide((without_keys(expected), expected_value)))
        <= TOLERANCE["float64"]
    )
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, found) == plan
    assert found.optimizer[0].trace[0][0].w.addressable_shards[0].data.shape == (2, 4)


def sends(function, *args):
    """What the devices of a compiled function send each other.

    `(collective, shape of a result)` for every array.
    """
    text = jax.jit(function).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    lines = re.findall(rf"= (\([^)]*\)|\S+) ({kinds})(?:-start)?\(", text)
    found = [
        (kind, shape) for shapes, kind in lines for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]
    return [(kind, tuple(int(n) for n in shape.split(",") if n)) for kind, shape in found]


WIDE = fnn.mlp((16, 64, 24, 8), "tanh")
SENDING = (
    fnn.value_and_grad(WIDE, losses.l2_loss),
    jax.value_and_grad(fnn.mean_loss(WIDE, losses.l2_loss)),
)


def wide_case(shape, plan_of):
    """Mesh, placed params, placed batch of 8, and the shapes of the split arrays."""
    mesh, params = mesh_of(shape), params_of(WIDE, "float32")
    plan = plan_of(mesh, params)
    batch = sharding.place_batch(mesh, batch_of(WIDE, params, losses.l2_loss, 8))[:2]
    split = [
        leaf.shape
        for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(plan), strict=True)
        if spec != P()
    ]
    return mesh, sharding.place(mesh, params, plan), batch, plan, split


@pytest.mark.parametrize("function", SENDING, ids=["manual", "automatic"])
def test_data_parallel_gradients_are_summed_and_nothing_is_gathered(function):
    _, params, batch, _, _ = wide_case((8, 1), sharding.replicated)
    sent = sends(function, params, *batch)
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert sum(math.prod(shape) for _, shape in sent) == 1 + sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )  # the value, the gradient


@pytest.mark.parametrize("function", SENDING, ids=["manual", "automatic"])
def test_tensor_parallel_products_are_summed_once_for_a_pair_of_layers(function):
    _, params, batch, plan, _ = wide_case((1, 8), sharding.tensor_parallel)
    assert plan[0][0].w == P(None, "model")
    # forward; backward, dx of the first layer is not asked for
    assert sends(function, params, *batch) == [("all-reduce", (8, 24))]


def whole(sent, shapes):
    """The all-gathers of an array as large as one of these."""
    smallest = min(math.prod(shape) for shape in shapes if len(shape) > 1)
    return [shape for kind, shape in sent if kind == "all-gather" and math.prod(shape) >= smallest]


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (1, 8)])
def test_tensor_parallel_gathers_no_whole_weight(shape):
    mesh, params, batch, plan, split = wide_case(shape, sharding.tensor_parallel)
    source = fnn.source(WIDE, losses.l2_loss)
    assert len(split) == 3  # w and b by columns, w by rows

    def everything(params, x, targets):
        clipped = per_example.clipped_gradient(source, MAX_NORM)(params, x, targets).gradient
        grads = SENDING[0](params, x, targets)[1], SENDING[1](params, x, targets)[1], clipped
        return [
            lax.with_sharding_constraint(g, sharding.shardings(mesh, plan)) for g in grads
        ], per_example.norms(source)(params, x, targets)

    sent = sends(everything, params, *batch)
    assert ("all-reduce", (8 // shape[0], 24)) in sent
    assert not whole(sent, split)


@pytest.mark.parametrize("function", SENDING, ids=["manual", "automatic"])
def test_fully_sharded_parameters_are_gathered(function):
    _, params, batch, _, split = wide_case((8, 1), sharding.fully_sharded)
    assert len(split) == 6
    assert "all-gather" in {kind for kind, _ in sends(function, params, *batch)}


@pytest.fixture(scope="module")
def recipes():
    """The functions `gathered` and `data_parallel` of docs/scaling.md, whose programs are run."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for name in ("gathered", "data_parallel"):
            names = {}
            exec(next(text for text in programs if f"def {name}" in text), names)
            assert math.isfinite(names["value"])
            found[name] = names[name]
    return found


def test_the_recipe_for_gathered_weights_gathers_every_weight_once(recipes):
    mesh, params, batch, _, split = wide_case((8, 1), sharding.fully_sharded)
    sent = sends(recipes["gathered"](mesh, SENDING[0]), params, *batch)
    assert {kind for kind, _ in sent} == {"all-gather", "all-reduce"}
    assert sorted(shape for kind, shape in sent if kind == "all-gather") == sorted(split)
    # what `whole` looks for
    assert sorted(whole(sent, split)) == sorted(shape for shape in split if len(shape) > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gathered", "data_parallel"])
def test_the_recipes_give_the_gradient_of_one_device(recipes, name, dtype):
    with jax.enable_x64(dtype == "float64"):
        function, params = fnn.value_and_grad(MLP, LABELS), params_of(MLP, dtype)
        # of eight devices the first three have no weight
        weights = np.linspace(0, 2, 16, dtype=dtype) * (np.arange(16) > 5)
        batch = (*batch_of(MLP, params, LABELS, 16), weights)
        expected = jax.jit(function)(params, *batch)
        for shape in MESHES:
            mesh = mesh_of(shape)
            placed = sharding.place(mesh, params, sharding.fully_sharded(mesh, params))
            gradient = jax.jit(recipes[name](mesh, function))
            found = gradient(placed, *sharding.place_batch(mesh, batch))
            assert error(wide(found), wide(expected)) <= TOLERANCE[dtype]


def test_the_recipe_for_a_sum_of_ones_own_sends_the_gradient_alone(recipes):
    mesh, params, batch, _, _ = wide_case((8, 1), sharding.replicated)
    weights = jnp.ones(8)
    sent = sends(recipes["data_parallel"](mesh, SENDING[0]), params, *batch, weights)
    assert {kind for kind, _ in sent} == {"all-reduce"}
    # and the value and the sum of weights
    assert sum(math.prod(shape) for _, shape in sent) == 2 + sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


def test_tensor_parallel_pairs_dense_layers_that_fit():
    def plan_of(*layers, model=4):
        return sharding.tensor_parallel(
            mesh_of((1, model)), jax.eval_shape(fnn.serial(*layers).init, jax.random.key(0))
        )

    columns, rows, whole = (
        Dense(P(None, "model"), P("model")),
        Dense(P("model"), P()),
        Dense(P(), P()),
    )
    tanh = fnn.activations.tanh
    assert plan_of(fnn.dense(6, 8), tanh, fnn.dense(8, 2)) == (columns, (), rows)
    assert plan_of(fnn.dense(6, 8)) == (whole,)  # its outputs would stay split
    # 7 is odd
    assert plan_of(fnn.dense(6, 7), tanh, fnn.dense(7, 8), fnn.dense(8, 3)) == (
        whole,
        (),
        columns,
        rows,
    )
    assert plan_of(*(fnn.dense(8, 8) for _ in range(5))) == (columns, rows, columns, rows, whole)
    assert plan_of(fnn.dense(6, 8, bias_init=None), fnn.dense(8, 2, bias_init=None)) == (
        columns._replace(b=None),
        rows._replace(b=None),
    )
    normed = plan_of(fnn.dense(6, 8), fnn.layer_norm(8), fnn.dense(8, 2))
    assert normed == (columns, jax.tree.map(lambda _: P(), normed[1]), rows)
    stacked = plan_of(fnn.dense(6, 8), fnn.repeat(block(8), 3), fnn.dense(8, 2))
    assert stacked[0] == stacked[2] == whole
    assert stacked[1][1:] == (
        Dense(P(None, None, "model"), P(None, "model")),
        (),
        Dense(P(None, "model"), P()),
    )


def test_fully_sharded_splits_the_longer_of_the_last_two_axes():
    shapes = {
        "long": (8, 16),
        "even": (8, 8),
        "short": (16, 7),
        "none": (7, 9),
        "one": (),
        "stack": (64, 8, 16),
        "bias": (24,),
    }
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    expected = {
        "long": P(None, "data"),
        "even": P("data"),
        "short": P("data"),
        "none": P(),
        "one": P(),
        "bias": P("data"),
    }
    assert sharding.fully_sharded(mesh_of((8, 1)), params) == expected | {
        "stack": P(None, None, "data")
    }


OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
        optax.ema(0.9),
    ),
    "masked": optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    ),
    "multiple steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "partition": optax.partition(
        {"w": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)},
        lambda p: jax.tree.map(lambda a: "w" if a.ndim > 1 else "b", p),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimiser_state_follows_the_parameters_as_optax_knows_them(name):
    params, optimizer = params_of(MLP, "float32"), OPTIMIZERS[name]
    plan = sharding.fully_sharded(mesh_of((2, 1)), params)
    state = jax.eval_shape(optimizer.init, params)
    found = sharding.follow(plan, params, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    expected = optax.tree.map_params(
        optimizer,
        lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
        state,
        plan,
        transform_non_params=lambda leaf: P(),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)
    assert (P() in jax.tree.leaves(found)) == (name != "sgd")  # counts


def test_state_of_other_shapes_is_replicated():
    params = {"w": jnp.ones((256, 128)), "b": jnp.ones(256)}
    plan = {"w": P("data"), "b": P("data")}
    state = optax.scale_by_factored_rms().init(params)
    assert state.v_row["w"].shape == (128,)
    assert set(jax.tree.leaves(sharding.follow(plan, params, state))) == {P(), P("data")}
    # `w` is factored: one number in its place
    assert sharding.follow(plan, params, state).v == {"w": P(), "b": P("data")}
    assert sharding.follow(
        plan, params, {"many": jax.tree.map(lambda a: jnp.stack([a, a]), params)}
    ) == {"many": {"w": P(), "b": P()}}
    assert sharding.follow(
        P("data"), jnp.ones(4), (jnp.ones(4), jnp.ones(3), jax.random.key(0))
    ) == (P("data"), P(), P())
    assert sharding.follow((), (), ((), jnp.ones(3))) == ((), P())
    # the path of the first ends that of the second: the longer end counts
    nested = {"a": jnp.ones(4), "b": {"a": jnp.ones(4)}}
    plan = {"a": P("data"), "b": {"a": P("model")}}
    assert sharding.follow(plan, nested, {"mu": nested})["mu"] == plan


def test_every_device_holds_its_part_alone():
    mesh, params = mesh_of((8, 1)), params_of(WIDE, "float32")
    optimizer = optax.adam(0.1)
    plan = sharding.fully_sharded(mesh, params)
    state = params, optimizer.init(params)
    placed = sharding.place(mesh, state, sharding.follow(plan, params, state))
    held = sum(leaf.addressable_shards[3].data.size for leaf in jax.tree.leaves(placed))
    # and Adam's count
    assert held == 3 * sum(leaf.size for leaf in jax.tree.leaves(params)) // 8 + 1
    drawn = jax.jit(WIDE.init, out_shardings=sharding.shardings(mesh, plan))(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, drawn) == plan
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_is_filled_up_to_a_multiple_of_the_data_axis():
    mesh = mesh_of((4, 2))
    x, targets = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6)
    for given, expected in (((), np.ones(6)), ((np.arange(6, dtype=np.float32),), np.arange(6))):
        for array in (np.asarray, jnp.asarray):
            found = sharding.place_batch(mesh, tuple(array(a) for a in (x, targets, *given)))
            assert [a.shape[0] for a in found] == [8, 8, 8]
            assert {a.sharding.spec for a in found} == {P("data")}
            assert found[0].addressable_shards[0].data.shape == (2, 2)
            np.testing.assert_array_equal(found[0][:6], x)
            np.testing.assert_array_equal(found[1][:6], targets)
            np.testing.assert_array_equal(found[2], [*expected, 0, 0])
    again = sharding.place_batch(mesh, (x[:4], targets[:4]))
    assert again[2] is None
    np.testing.assert_array_equal(again[0], x[:4])
    assert (
        sharding.place_batch(mesh, (x[:4], targets[:4], np.ones(4, np.float32)))[2].tolist()
        == [1] * 4
    )


def test_a_mesh_takes_the_devices_that_it_is_asked_for():
    assert dict(sharding.make_mesh().shape) == {"data": jax.device_count(), "model": 1}
    assert dict(sharding.make_mesh(model=2, devices=jax.devices()[:6]).shape) == {
        "data": 3,
        "model": 2,
    }
    mesh = sharding.make_mesh(data=2, model=2)
    assert mesh.devices.size == 4
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2


X, T, W = np.ones((6, 3), np.float32), np.ones((6, 2), np.float32), np.ones(6, np.float32)
PAIR = (Dense(X, W), ())


def mesh():
    return mesh_of((4, 2))


def planned(plan):
    return lambda: sharding.place(mesh(), PAIR, plan)


BAD = [
    (
        lambda: sharding.make_mesh(data=4, model=4, devices=jax.devices()[:8]),
        ValueError,
        "`data` x `model` is 4 x 4 = 16, but there are 8 devices. Pass sizes that fit, or try them "
        "on a CPU: set JAX_NUM_CPU_DEVICES=16 in the environment before Python starts.",
    ),
    (
        lambda: sharding.make_mesh(model=3, devices=jax.devices()[:8]),
        ValueError,
        "`data` x `model` is 2 x 3 = 6, but there are 8 devices. Pass sizes that fit, or try them "
        "on a CPU: set JAX_NUM_CPU_DEVICES=6 in the environment before Python starts.",
    ),
    (
        lambda: sharding.make_mesh(data=0),
        ValueError,
        "`data` must be a whole number above 0, got 0.",
    ),
    (
        lambda: sharding.make_mesh(model=1.0),
        TypeError,
        "`model` must be a whole number above 0, got 1.0 (float).",
    ),
    (
        lambda: sharding.place(8, PAIR),
        TypeError,
        "`mesh` must be a jax.sharding.Mesh, got int. Make one: `fnn.sharding.make_mesh()`.",
    ),
    (
        lambda: sharding.tensor_parallel(
            jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",)), PAIR
        ),
        ValueError,
        "`mesh` must have an axis 'model', got ('data',). Make one: `fnn.sharding.make_mesh()`.",
    ),
    (
        lambda: sharding.place(
            jax.make_mesh(
                (2,), ("data",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
            ),
            PAIR,
        ),
        ValueError,
        "`mesh` must have axes of type Auto, got (Explicit,) (`jax.make_mesh` makes others unless "
        "told). Make one: `fnn.sharding.make_mesh()`.",
    ),
    (
        lambda: sharding.replicated(mesh(), (X, 2.0)),
        TypeError,
        "Leaves of `params` must be arrays, got float at `params[1]`. Pass what `net.init(key)` "
        "returns.",
    ),
    (
        planned((Dense(P(), None), ())),
        TypeError,
        "`plan[0].b` must be a PartitionSpec, got None. Replicated is `PartitionSpec()`.",
    ),
    (
        planned((Dense(P(), P()), (P(),))),
        ValueError,
        "`plan[1][0]` stands for no array of `params`. Edit one of "
        "`fnn.sharding.replicated(mesh, params)`.",
    ),
    (
        planned((Dense(P(), "data"), ())),
        TypeError,
        "`plan[0].b` must be a PartitionSpec, got 'data'. Replicated is `PartitionSpec()`.",
    ),
    (
        planned((Dense(P(), P(None, "data")), ())),
        ValueError,
        "`plan[0].b` is P(None, 'data'), which does not split `params[0].b`, shape (6,), on a mesh "
        "of {'data': 4, 'model': 2}. To leave an axis whole, put None in its place.",
    ),
    (
        planned((Dense(P("rows"), P()), ())),
        ValueError,
        "`plan[0].w` is P('rows',), which does not split `params[0].w`, shape (6, 3), on a mesh "
        "of {'data': 4, 'model': 2}. To leave an axis whole, put None in its place.",
    ),
    (
        planned((Dense(P(("data", "model")), P()), ())),
        ValueError,
        "`plan[0].w` is P(('data', 'model'),), which does not split `params[0].w`, shape (6, 3), "
        "on a mesh of {'data': 4, 'model': 2}. To leave an axis whole, put None in its place.",
    ),
    (
        lambda: sharding.follow((P(),), (X, T), (X, T)),
        TypeError,
        "`plan[1]` must be a PartitionSpec, got None. Replicated is `PartitionSpec()`.",
    ),
    (
        lambda: sharding.place_batch(mesh(), [X, T]),
        TypeError,
        "`batch` must be a tuple (x, targets) or (x, targets, weights), got list.",
    ),
    (
        lambda: sharding.place_batch(mesh(), (X,)),
        TypeError,
        "`batch` must be a tuple (x, targets) or (x, targets, weights), got tuple.",
    ),
    (
        lambda: sharding.place_batch(mesh(), (X, [1] * 6)),
        TypeError,
        "`targets` must be an array, got list. Convert it: `jnp.asarray(targets)`.",
    ),
    (
        lambda: sharding.place_batch(mesh(), (X, T, W[:5])),
        ValueError,
        "`weights` has shape (5,) and `x` (6, 3); expected one number of rows, above 0. One "
        "example? Pass `x[None]`.",
    ),
    (
        lambda: sharding.place_batch(mesh(), (X[:0], T[:0])),
        ValueError,
        "`x` has shape (0, 3) and `x` (0, 3); expected one number of rows, above 0. One example? "
        "Pass `x[None]`.",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD]
)
def test_what_cannot_be_meant_is_said_by_name(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
