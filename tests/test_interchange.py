"""Interchange: nets of other libraries and exported programs give the outputs of the net, and no
array is lost, turned or misplaced."""

import contextlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import error, wide

import fnn
from fnn.interchange import (
    export,
    from_equinox,
    from_flat,
    from_flax,
    load_torch_state_dict,
    to_equinox,
    to_flat,
    to_flax,
    to_torch_state_dict,
)
from fnn.nets.activations import ACTIVATIONS
from fnn.nets.layers import Dense, Embedding, Norm

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

KEY = jax.random.key(0)
NET = fnn.mlp((3, 4, 2))
relu = fnn.activations.relu


@contextlib.contextmanager
def as_users_run():
    """JAX's own promotion, for the other libraries."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def shapes_of(net):
    return jax.eval_shape(net.init, KEY)


def drawn(net, seed=0, dtype=np.float32):
    """Params that are all different: no bias is 0 and no scale 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0]), dtype),
        shapes_of(net),
    )


def rows(batch, features, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(batch, features)).astype(dtype)


def same(a, b):
    """Whether two trees are the same bit for bit."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (u.dtype, u.shape) == (v.dtype, v.shape)
        and np.asarray(u).tobytes() == np.asarray(v).tobytes()
        for u, v in leaves
    )


def close(ours, theirs, bound=1e-6):
    assert ours.shape == theirs.shape
    # all units dead: nothing would be seen
    assert len(ours) == 1 or np.ptp(wide(theirs)[0], axis=0).max() > 0
    assert error(wide(ours), wide(theirs)) <= bound


EVERYTHING = fnn.serial(
    fnn.embedding(7, 4),
    fnn.residual(fnn.serial(fnn.layer_norm(4), fnn.dense(4, 4), fnn.activations.tanh)),
    fnn.rms_norm(4),
    fnn.iterate(fnn.serial(fnn.dense(4, 4, bias_init=None), relu), 2),
    fnn.dense(4, 3),
)
DEEP = fnn.mlp((3,) + (6,) * 12)  # Dense_10 and Dense_11 come after Dense_2
FAMILY = {
    "dense": fnn.dense(3, 2),
    "one unit": fnn.mlp((1, 1)),
    "mlp": fnn.mlp((3, 5, 4, 2)),
    "no bias": fnn.mlp((3, 5, 2), bias_init=None),
    "deep": DEEP,
    "everything": EVERYTHING,
    "no params": fnn.serial(relu),
}
FORMATS = {
    "flat": (to_flat, from_flat),
    "torch": (to_torch_state_dict, load_torch_state_dict),
    "flax": (to_flax, from_flax),
}


# Round trips


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, jnp.bfloat16], ids=lambda d: np.dtype(d).name
)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILY)
def test_what_goes_out_comes_back_bit_for_bit(name, form, dtype):
    params = drawn(FAMILY[name], dtype=dtype)
    out, back = FORMATS[form]
    for like in (params, jax.eval_shape(lambda: params)):
        assert same(back(out(params), like), params)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.lists(st.integers(1, 4), min_size=2, max_size=14),
    st.booleans(),
    st.sampled_from(sorted(FORMATS)),
    st.integers(0, 2**32 - 1),
)
def test_nets_of_any_size_go_out_and_come_back(sizes, bias, form, seed):
    net = fnn.mlp(sizes, bias_init=jax.nn.initializers.zeros if bias else None)
    params, (out, back) = drawn(net, seed), FORMATS[form]
    assert same(back(out(params), shapes_of(net)), params)


def test_names_that_are_given_go_both_ways():
    params = drawn(fnn.mlp((3, 3, 3)))
    for form, names in (("torch", ("b.fc", "a.fc")), ("flax", ("b.fc", "a.fc"))):
        out, back = FORMATS[form]
        assert same(back(out(params, names), params, names), params)
        assert not same(back(out(params, names), params, names[::-1]), params)
    assert to_flax(params, ("b.fc", "a.fc"))["params"]["b"]["fc"]["kernel"] is params[0][0].w


def test_trees_of_any_kind_have_flat_names():
    tree = {
        "a": (jnp.zeros(2), [jnp.ones(3, jnp.int32)]),
        "b": {"c": KEY},
        "net": drawn(fnn.repeat(fnn.dense(3, 3), 2)),
        "none": (),
    }
    flat = to_flat(tree)
    assert list(flat) == ["a.0", "a.1.0", "b.c", "net.w", "net.b"]
    back = from_flat(dict(reversed(flat.items())), tree)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    assert same(
        jax.jit(lambda flat: from_flat(flat, drawn(DEEP)))(to_flat(drawn(DEEP))), drawn(DEEP)
    )


def test_what_comes_in_has_the_dtypes_of_like_and_shares_no_memory():
    state_dict = {
        "weight": np.ones((2, 3)),
        "bias": np.frombuffer(bytearray(4096 + 64), np.float32),
    }
    aligned = -state_dict["bias"].ctypes.data % 64 // 4  # what JAX would use as it is
    state_dict["bias"] = state_dict["bias"][aligned : aligned + 2]
    for back, given in (
        (load_torch_state_dict, state_dict),
        (from_flat, {"w": np.ones((3, 2), np.float32), "b": state_dict["bias"]}),
    ):
        params = back(given, shapes_of(fnn.dense(3, 2)))
        state_dict["bias"][:] = 5
        assert isinstance(params.b, jax.Array)
        assert params.w.dtype == params.b.dtype == np.float32
        assert params.b.tolist() == [0, 0]
        state_dict["bias"][:] = 0
    with jax.enable_x64(True):
        params = load_torch_state_dict(state_dict, drawn(fnn.dense(3, 2), dtype=np.float64))
        assert params.b.dtype == np.float64
    for narrow in (jnp.bfloat16, np.float16):
        params = from_flax(to_flax(drawn(NET)), drawn(NET, dtype=narrow))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(narrow)}
        with as_users_run():
            model = to_equinox(drawn(NET), eqx.nn.MLP(3, 2, 4, 1, dtype=narrow, key=KEY))
        assert same(from_equinox(model, params), params)


# PyTorch's layout, by NumPy


def torch_forward(state_dict, names, x):
    """What a `torch.nn.Sequential` of Linear and Tanh computes."""
    for i, name in enumerate(names):
        x = x @ state_dict[f"{name}.weight"].T + state_dict[f"{name}.bias"]
        x = np.tanh(x) if i < len(names) - 1 else x
    return x


@pytest.mark.parametrize(
    "sizes", [(3, 2), (1, 1), (1, 1, 1), (5, 4, 4, 3), (7, 1, 6), (6,) * 13], ids=str
)
def test_pytorch_computes_the_same_both_ways(x64, sizes):
    net, x = fnn.mlp(sizes, "tanh"), rows(6, sizes[0], np.float64)
    params = drawn(net, dtype=np.float64)
    state_dict = to_torch_state_dict(params)
    names = [str(2 * i) for i in range(len(sizes) - 1)]
    assert list(state_dict) == [f"{name}.{field}" for name in names for field in ("weight", "bias")]
    close(net.apply(params, x), torch_forward(state_dict, names, x), 1e-12)
    rng = np.random.default_rng(2)
    theirs = {name: rng.normal(size=a.shape) for name, a in state_dict.items()}
    close(
        net.apply(load_torch_state_dict(theirs, params), x), torch_forward(theirs, names, x), 1e-12
    )


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_pytorch_gets_arrays_that_it_takes(dtype):
    for name, a in to_torch_state_dict(drawn(EVERYTHING, dtype=dtype)).items():
        assert a.flags.c_contiguous, name
        assert a.flags.writeable, name
        assert a.dtype == (np.float32 if dtype == jnp.bfloat16 else dtype), name


def test_modules_are_numbered_as_in_a_sequential_of_every_layer():
    state_dict = to_torch_state_dict(drawn(EVERYTHING))
    shapes = {name: a.shape for name, a in state_dict.items()}
    assert shapes == {
        "0.weight": (7, 4),  # Embedding, [size, features] there too
        "1.weight": (4,),  # LayerNorm
        "1.bias": (4,),
        "2.weight": (4, 4),  # Linear; 3 is Tanh
        "2.bias": (4,),
        "4.weight": (4,),  # RMSNorm
        "5.weight": (4, 4),  # Linear without a bias; 6 is ReLU
        "7.weight": (3, 4),
        "7.bias": (3,),
    }
    np.testing.assert_array_equal(state_dict["2.weight"], np.asarray(drawn(EVERYTHING)[1][1].w).T)


class Tensor:
    """As much of a PyTorch tensor as is asked for.

    It cannot become an array before it is detached, on the CPU, and no bfloat16.
    """

    def __init__(self, array, dtype="torch.float32", done=()):
        self.array, self.dtype, self.done = array, dtype, done

    def detach(self):
        return Tensor(self.array, self.dtype, (*self.done, "detach"))

    def cpu(self):
        return Tensor(self.array, self.dtype, (*self.done, "cpu"))

    def float(self):
        return Tensor(self.array, "torch.float32", self.done)

    def numpy(self):
        assert self.done == ("detach", "cpu")
        assert self.dtype == "torch.float32"
        return self.array


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_tensors_are_taken(dtype):
    params = drawn(fnn.mlp((3, 4, 2)))
    tensors = {name: Tensor(a, dtype) for name, a in to_torch_state_dict(params).items()}
    assert same(load_torch_state_dict(tensors, params), params)


# Flax


class Linen(nn.Module):
    sizes: tuple[int, ...]
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[1:-1]:
            x = nn.relu(nn.Dense(size, use_bias=self.use_bias)(x))
        return nn.Dense(self.sizes[-1], use_bias=self.use_bias)(x)


class LinenEverything(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 4)(x)
        x = x + nn.tanh(nn.Dense(4)(nn.LayerNorm()(x)))
        x = nn.RMSNorm()(x)
        tied = nn.Dense(4, use_bias=False)
        x = nn.relu(tied(nn.relu(tied(x))))
        return nn.Dense(3)(x)


LABELS = np.arange(21).reshape(7, 3) % 7
MODELS = [
    (Linen((3, 5, 2)), fnn.mlp((3, 5, 2)), rows(6, 3)),
    (Linen((1, 1)), fnn.mlp((1, 1)), rows(6, 1)),
    (Linen((3, 5, 2), use_bias=False), fnn.mlp((3, 5, 2), bias_init=None), rows(6, 3)),
    (Linen((3,) + (6,) * 12), DEEP, rows(6, 3)),
    (LinenEverything(), EVERYTHING, LABELS),
    (nn.Dense(4), fnn.dense(3, 4), rows(6, 3)),
]


@pytest.mark.parametrize(
    ("model", "net", "x"), MODELS, ids=["mlp", "one unit", "no bias", "deep", "everything", "dense"]
)
def test_linen_computes_the_same_both_ways(model, net, x):
    with as_users_run():
        variables = jax.jit(model.init)(jax.random.key(3), x)
    # no bias is 0
    theirs = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEY, a.shape), variables)
    forward = jax.jit(model.apply)
    params = from_flax(theirs, shapes_of(net))
    with as_users_run():
        close(net.apply(params, x), forward(theirs, x))
    params = drawn(net)
    out = to_flax(params, ("",) if isinstance(model, nn.Dense) else None)
    with as_users_run():
        assert jax.tree.structure(out) == jax.tree.structure(variables)
        close(net.apply(params, x), forward(out, x))
    assert same(from_flax(out["params"], params), params)  # without the collection's name


def test_a_linen_sequential_numbers_its_layers():
    model, net, x = (
        nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]),
        fnn.mlp((3, 4, 2)),
        rows(5, 3),
    )
    params, names = drawn(net), ("layers_0", "layers_2")
    with as_users_run():
        close(net.apply(params, x), model.apply(to_flax(params, names), x))
    assert same(from_flax(to_flax(params, names), params), params)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(11)])

    def __call__(self, x):
        x = self.norm(self.first(x))
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


def test_nnx_computes_the_same_both_ways():
    net = fnn.serial(
        fnn.dense(3, 4),
        fnn.layer_norm(4),
        *[fnn.serial(fnn.dense(4, 4), fnn.activations.tanh)] * 11,
    )
    names = ("first", "norm", *(f"layers.{i}" for i in range(11)))
    x = rows(5, 3)
    with as_users_run():
        model = Nnx(nnx.Rngs(0))
        theirs, state = model(x), nnx.state(model, nnx.Param)
    for form in (state, nnx.to_pure_dict(state)):
        close(net.apply(from_flax(form, shapes_of(net), names), x), theirs)
    params = drawn(net)
    with as_users_run():
        nnx.replace_by_pure_dict(state, to_flax(params, names)["params"])
        nnx.update(model, state)
        close(net.apply(params, x), model(x))


# Equinox


def eqx_sequential(key):
    keys = jax.random.split(key, 6)
    return eqx.nn.Sequential(
        [
            eqx.nn.Embedding(7, 4, key=keys[0]),
            eqx.nn.LayerNorm(4, eps=1e-6),
            eqx.nn.Linear(4, 4, key=keys[1]),
            eqx.nn.Lambda(jax.nn.tanh),
            eqx.nn.Dropout(0.5, inference=True),
            eqx.nn.RMSNorm(4, eps=1e-6, use_bias=False),
            eqx.nn.Linear(4, 3, use_bias=False, key=keys[2]),
        ]
    )


SEQUENTIAL = fnn.serial(
    fnn.embedding(7, 4),
    fnn.layer_norm(4),
    fnn.dense(4, 4),
    fnn.activations.tanh,
    fnn.rms_norm(4),
    fnn.dense(4, 3, bias_init=None),
)
EQUINOX = {
    "mlp": (lambda key: eqx.nn.MLP(3, 2, 5, 2, key=key), fnn.mlp((3, 5, 5, 2)), rows(6, 3)),
    "one unit": (lambda key: eqx.nn.MLP(1, 1, 1, 0, key=key), fnn.mlp((1, 1)), rows(6, 1)),
    "no bias": (
        lambda key: eqx.nn.MLP(3, 2, 4, 1, use_bias=False, use_final_bias=False, key=key),
        fnn.mlp((3, 4, 2), bias_init=None),
        rows(6, 3),
    ),
    "deep": (lambda key: eqx.nn.MLP(3, 6, 6, 11, key=key), DEEP, rows(6, 3)),
    "sequential": (eqx_sequential, SEQUENTIAL, LABELS[:, 0]),
    "linear": (lambda key: eqx.nn.Linear(3, 2, key=key), fnn.dense(3, 2), rows(6, 3)),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox_computes_the_same_both_ways(name):
    make, net, x = EQUINOX[name]
    with as_users_run():
        model = make(jax.random.key(3))
        forward = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
        close(net.apply(from_equinox(model, shapes_of(net)), x), forward(model, x))
        params = drawn(net)
        changed = to_equinox(params, model)
        close(net.apply(params, x), forward(changed, x))
    assert jax.tree.structure(changed) == jax.tree.structure(model)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(model), strict=True)
        if not eqx.is_array(b)
    )
    assert same(from_equinox(changed, params), params)


class Backwards(eqx.Module):
    """Its fields are not in the order in which they are used."""

    last: eqx.nn.Linear
    first: eqx.nn.Linear

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x)))


def test_names_put_an_equinox_model_in_order():
    net, x = fnn.mlp((3, 3, 3)), rows(5, 3)
    model = Backwards(*(eqx.nn.Linear(3, 3, key=key) for key in jax.random.split(KEY)))
    names = ("first", "last")
    close(net.apply(from_equinox(model, shapes_of(net), names), x), jax.vmap(model)(x))
    assert (
        error(wide(net.apply(from_equinox(model, shapes_of(net)), x)), wide(jax.vmap(model)(x)))
        > 0.1
    )
    params = drawn(net)
    close(net.apply(params, x), jax.vmap(to_equinox(params, model, names))(x))


# Exported programs


def check_program(net, x, blob=None):
    """One program for all batch sizes and, given as a dict, for any params."""
    blob = export(net, shapes_of(net), x).serialize() if blob is None else blob
    program = jax.export.deserialize(blob)
    assert program.platforms == ("cpu", "cuda", "tpu")
    call, apply = jax.jit(program.call), jax.jit(net.apply)
    for seed, batch in enumerate((1, 7, 300)):
        params, some = drawn(net, seed), np.resize(x, (batch, *x.shape[1:]))
        close(call(to_flat(params), some), apply(params, some))


@pytest.mark.parametrize(
    "activation", [*ACTIVATIONS, fnn.activations.softmax], ids=lambda a: a.name
)
def test_one_program_serves_every_batch_size_for_every_activation(activation):
    check_program(fnn.serial(fnn.dense(3, 4), activation), rows(11, 3))


PROGRAMS = {
    "everything": (EVERYTHING, LABELS),
    "everything, one label": (EVERYTHING, LABELS[:, 0]),
    "repeat": (
        fnn.serial(fnn.repeat(fnn.residual(fnn.serial(fnn.dense(3, 3), relu)), 4), fnn.dense(3, 2)),
        rows(11, 3),
    ),
    "positions": (fnn.mlp((3, 4, 2)), rows(20, 3).reshape(10, 2, 3)),
    "dense": (fnn.dense(1, 1), rows(11, 1)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_program_serves_every_batch_size_for_every_layer(name):
    check_program(*PROGRAMS[name])


def test_a_program_in_float64_has_the_outputs_of_the_net(x64):
    net, x = fnn.mlp((3, 4, 2), "gelu"), rows(7, 3, np.float64)
    params = drawn(net, dtype=np.float64)
    y = export(net, params, jax.ShapeDtypeStruct((1, 3), np.float64), platforms=("cpu",)).call(
        to_flat(params), x
    )
    assert y.dtype == np.float64
    close(y, net.apply(params, x), 1e-12)


SERVER = """
import sys
import jax.export
import numpy as np
program = jax.export.deserialize(open("net.bin", "rb").read())
with np.load("params.npz") as params:
    flat = dict(params)
for n in (1, 7):
    np.save(f"{n}.npy", jax.jit(program.call)(flat, np.load("x.npy")[:n]))
assert not {"fnn", "flax", "equinox", "torch", "optax"} & set(sys.modules)
"""


def test_a_program_is_served_without_fnn(tmp_path):
    params, x = drawn(EVERYTHING), LABELS.astype(np.int32)
    (tmp_path / "net.bin").write_bytes(export(EVERYTHING, params, x).serialize())
    np.savez(tmp_path / "params.npz", **to_flat(params))
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-c", SERVER], cwd=tmp_path, check=True, timeout=120)
    for n in (1, 7):
        close(np.load(tmp_path / f"{n}.npy"), EVERYTHING.apply(params, x[:n]))


# Bad input

PARAMS = drawn(NET)
FLAT, STATE, FLAX = to_flat(PARAMS), to_torch_state_dict(PARAMS), to_flax(PARAMS)["params"]
LONGER = shapes_of(fnn.mlp((3, 4, 3, 2)))
MLP = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
X = rows(5, 3)
ANOTHER = "Parameters of another net?"
STACKED = (
    "Stacked by `fnn.repeat`? Other libraries have single layers: `fnn.serial(*[layer] * n)`, "
    "whose params are `tuple(jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(n))`."
)


class Torch:
    """A module, in the place of its state dict."""

    def state_dict(self):
        return STATE


def without(tree, name):
    return {n: a for n, a in tree.items() if n != name}


BAD = [
    (
        lambda: to_flat((1.0,)),
        TypeError,
        "`params.0` must be an array, got float. Convert it: `jnp.asarray(params.0)`.",
    ),
    (
        lambda: to_flat({"a.b": X, "a": {"b": X}}),
        ValueError,
        "`params` has two leaves of the name 'a.b'. A key of a dict with a dot in it? Rename it.",
    ),
    (
        lambda: from_flat([1], PARAMS),
        TypeError,
        "`flat` must be a dict of names and arrays, got list.",
    ),
    (
        lambda: from_flat(without(FLAT, "0.0.w") | {"x": X, "1.b": X[0]}, PARAMS),
        ValueError,
        "`flat` does not fit: missing: 0.0.w; left over: x; different: 1.b is float32[3], expected "
        f"float32[2]. {ANOTHER}",
    ),
    (
        lambda: from_flat({}, drawn(DEEP)),
        ValueError,
        "`flat` does not fit: missing: 0.0.w, 0.0.b, 1.0.w, 1.0.b, 2.0.w, 2.0.b, 3.0.w, 3.0.b and "
        f"16 more. {ANOTHER}",
    ),
    (
        lambda: from_flat(FLAT | {"1.w": PARAMS[1].w.astype(jnp.bfloat16)}, PARAMS),
        ValueError,
        "`flat` does not fit: different: 1.w is bfloat16[4, 2], expected float32[4, 2]. Cast it "
        "first, by `.astype`.",
    ),
    (
        lambda: from_flat(FLAT | {"1.w": PARAMS[1].w.T}, PARAMS),
        ValueError,
        "`flat` does not fit: different: 1.w is float32[2, 4], expected float32[4, 2]. "
        "Stored the other way round? Weights are [in, out] here: pass `.T`.",
    ),
    (
        lambda: from_flat(FLAT | {"1.w": 3.0}, PARAMS),
        TypeError,
        "`flat['1.w']` must be an array, got float. Convert it: `jnp.asarray(flat['1.w'])`.",
    ),
    (
        lambda: to_torch_state_dict((PARAMS, drawn(fnn.repeat(fnn.dense(3, 3), 2)))),
        ValueError,
        f"`params.1.w` is float32[2, 3, 3], expected 2 axes. {STACKED}",
    ),
    (
        lambda: to_flax(drawn(fnn.repeat(fnn.rms_norm(3), 2))),
        ValueError,
        f"`params.scale` is float32[2, 3], expected 1 axis. {STACKED}",
    ),
    (
        lambda: to_flax((PARAMS, {"table": X})),
        ValueError,
        "`params.1.table` is float32[5, 3] outside a dense layer, norm or embedding: other "
        "libraries have no place for it.",
    ),
    (
        lambda: to_flax((Dense(None, X[0]),)),
        TypeError,
        "`params.0.w` must be an array, got NoneType. Convert it: `jnp.asarray(params.0.w)`.",
    ),
    (
        lambda: to_flax(Embedding(LABELS)),
        TypeError,
        "`params.w` must hold floating-point numbers, got int64. Convert it: "
        "`params.w.astype(jnp.float32)`.",
    ),
    (
        lambda: to_torch_state_dict(PARAMS, "fc"),
        TypeError,
        "`names` must be a tuple of text, one for each layer, got 'fc'.",
    ),
    (
        lambda: to_torch_state_dict(PARAMS, ("fc",)),
        ValueError,
        "`names` must be 2 different ones, for the layers 0.0, 1; got fc.",
    ),
    (
        lambda: to_flax(PARAMS, ("fc", "fc")),
        ValueError,
        "`names` must be 2 different ones, for the layers 0.0, 1; got fc, fc.",
    ),
    (
        lambda: load_torch_state_dict(Torch(), PARAMS),
        TypeError,
        "`state_dict` must be a dict of names and arrays, got Torch. A module? Pass "
        "`module.state_dict()`.",
    ),
    (
        lambda: load_torch_state_dict(STATE | {"0.weight": STATE["0.weight"].T}, PARAMS),
        ValueError,
        "`state_dict` does not fit: different: 0.weight is float32[3, 4], expected float32[4, 3]. "
        "Stored the other way round? Weights are [out, in] here: pass `.T`.",
    ),
    (
        lambda: load_torch_state_dict(without(STATE, "0.bias"), PARAMS),
        ValueError,
        f"`state_dict` does not fit: missing: 0.bias. {ANOTHER}",
    ),
    (
        lambda: load_torch_state_dict(STATE, shapes_of(fnn.mlp((3, 4, 2), bias_init=None))),
        ValueError,
        f"`state_dict` does not fit: left over: 0.bias, 2.bias. {ANOTHER}",
    ),
    (
        lambda: load_torch_state_dict(
            STATE | {"1.running_mean": X, "1.num_batches_tracked": np.ones((), int)}, PARAMS
        ),
        ValueError,
        "`state_dict` has what dense layers, layer_norm, rms_norm and embedding have not: "
        "1.running_mean, 1.num_batches_tracked. A batch norm? Fold it into the layer before it.",
    ),
    (
        lambda: load_torch_state_dict(STATE | {"4.weight": X}, PARAMS),
        ValueError,
        "`state_dict` has 3 modules (0, 2, 4), but the net has 2 layers (0.0, 1) with parameters.",
    ),
    (
        lambda: load_torch_state_dict({"weight": X}, PARAMS),
        ValueError,
        "`state_dict` has 1 module (no name), but the net has 2 layers (0.0, 1) with parameters.",
    ),
    (
        lambda: load_torch_state_dict(STATE | {"0.bias": np.ones(4, int)}, PARAMS),
        ValueError,
        "`state_dict` does not fit: different: 0.bias is int64[4], expected float32[4]. Cast it "
        "first, by `.astype`.",
    ),
    (
        lambda: load_torch_state_dict(STATE, PARAMS, ("0", "3")),
        ValueError,
        "`state_dict` does not fit: missing: 3.weight, 3.bias; left over: 2.weight, 2.bias. "
        f"{ANOTHER}",
    ),
    (
        lambda: from_flax(without(FLAX, "Dense_1"), PARAMS),
        ValueError,
        "`variables` has 1 Dense module (Dense_0), but the net has 2 Dense layers (0.0, 1) with "
        "parameters.",
    ),
    (
        lambda: from_flax({"params": FLAX, "batch_stats": {"BatchNorm_0": {"mean": X}}}, PARAMS),
        ValueError,
        "`variables` has what dense layers, layer_norm, rms_norm and embedding have not: "
        "batch_stats.BatchNorm_0.mean. A batch norm? Fold it into the layer before it.",
    ),
    (
        lambda: from_flax({"b": FLAX["Dense_0"], "a": FLAX["Dense_1"]}, PARAMS),
        ValueError,
        "`variables`: the names a, b do not tell their order. Pass `names`, in the order of the "
        "layers.",
    ),
    (
        lambda: from_flax(FLAX | {"LayerNorm_0": {"scale": X[0], "bias": X[0]}}, PARAMS),
        ValueError,
        f"`variables` does not fit: left over: LayerNorm_0.bias, LayerNorm_0.scale. {ANOTHER}",
    ),
    (
        lambda: from_flax(FLAX | {"Dense_0": 1}, PARAMS),
        TypeError,
        "`variables.Dense_0` must be an array, got int. Convert it: "
        "`jnp.asarray(variables.Dense_0)`.",
    ),
    (
        lambda: from_flax({"Dense_0": {"scale": X[0]}}, Norm(X[0], X[0])),
        ValueError,
        "`variables` has 0 LayerNorm modules (none), but the net has 1 LayerNorm layer (no name) "
        "with parameters.",
    ),
    (
        lambda: from_equinox(MLP, LONGER),
        ValueError,
        "`model` has 2 modules (layers.0, layers.1), but the net has 3 layers (0.0, 1.0, 2) with "
        "parameters.",
    ),
    (
        lambda: to_equinox(LONGER, MLP),
        ValueError,
        "`model` has 2 modules (layers.0, layers.1), but the net has 3 layers (0.0, 1.0, 2) with "
        "parameters.",
    ),
    (
        lambda: to_equinox(drawn(fnn.mlp((3, 4, 2), bias_init=None)), MLP),
        ValueError,
        f"`params` does not fit: missing: layers.0.bias, layers.1.bias. {ANOTHER}",
    ),
    (
        lambda: export(PARAMS, PARAMS, X),
        TypeError,
        f"`net` must be a Layer, got {PARAMS!r:.80}. Make one: `fnn.mlp((3, 5, 2))`.",
    ),
    (
        lambda: export(NET, PARAMS, np.float32(1)),
        ValueError,
        "`x` must be [batch, ...], got a single number. One example? Give it a batch axis: "
        "`x[None]`.",
    ),
    (
        lambda: export(NET, PARAMS, 3),
        TypeError,
        "`x` must be an array, got int. Convert it: `jnp.asarray(x)`.",
    ),
    (
        lambda: export(NET, PARAMS, X[:, :2]),
        ValueError,
        "dense(3, 4): `x` has shape (batch, 2), expected [..., 3]. Samples as columns? Pass `x.T`. "
        "Images? Flatten them to rows.",
    ),
    *(
        (
            lambda platforms=platforms: export(NET, PARAMS, X, platforms=platforms),
            ValueError,
            "`platforms` must be a tuple out of ('cpu', 'cuda', 'rocm', 'tpu'), got "
            f"{platforms!r}. A GPU is 'cuda' or 'rocm'.",
        )
        for platforms in ("cpu", (), ("cpu", "gpu"), None)
    ),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input_says_what_is_wrong(i):
    call, kind, message = BAD[i]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
