"""Interchange: PyTorch's nets and exported programs give the outputs of the net, and no array is
lost, turned or misplaced."""

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
    from_flat,
    load_torch_state_dict,
    to_flat,
    to_torch_state_dict,
)
from fnn.nets.activations import ACTIVATIONS
from fnn.nets.layers import Dense

KEY = jax.random.key(0)
NET = fnn.mlp((3, 4, 2))
relu = fnn.activations.relu


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
    names = ("b.fc", "a.fc")
    out = to_torch_state_dict(params, names)
    assert list(out) == ["b.fc.weight", "b.fc.bias", "a.fc.weight", "a.fc.bias"]
    assert same(load_torch_state_dict(out, params, names), params)
    assert not same(load_torch_state_dict(out, params, names[::-1]), params)


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
        state_dict = to_torch_state_dict(drawn(NET))
        params = load_torch_state_dict(state_dict, drawn(NET, dtype=narrow))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(narrow)}


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


# PyTorch's convolutions, by NumPy


def torch_conv(state_dict, name, x, stride, padding, groups=1):
    """`torch.nn.Conv2d` as its page defines it, `x` [batch, channels, height, width]."""
    weight, bias = (
        state_dict[f"{name}.weight"],
        state_dict[f"{name}.bias"],
    )  # [out, in, h, w], [out]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    channels, of_group, height, width = weight.shape
    rows = (x.shape[2] - height) // stride + 1
    columns = (x.shape[3] - width) // stride + 1
    y = np.zeros((len(x), channels, rows, columns))
    for c, i, j in np.ndindex(channels, rows, columns):
        first = c // (channels // groups) * of_group
        top, left = i * stride, j * stride
        part = x[:, first : first + of_group, top : top + height, left : left + width]
        y[:, c, i, j] = (part * weight[c]).sum((1, 2, 3)) + bias[c]
    return y


def torch_cnn(state_dict, names, x):
    """What a `torch.nn.Sequential` computes: two of Conv2d and Tanh, Flatten, Linear."""
    x = np.tanh(torch_conv(state_dict, names[0], x, stride=2, padding=1))
    x = np.tanh(torch_conv(state_dict, names[1], x, stride=1, padding=0, groups=2))
    x = x.reshape(len(x), -1)
    return x @ state_dict[f"{names[2]}.weight"].T + state_dict[f"{names[2]}.bias"]


CNN = fnn.serial(
    fnn.conv(3, 4, (3, 3), strides=2, padding=((1, 1), (1, 1))),
    fnn.activations.tanh,
    fnn.conv(4, 6, (2, 3), padding="VALID", groups=2),
    fnn.activations.tanh,
    fnn.flatten(),
    fnn.dense(6 * 3 * 1, 5),
)


@pytest.mark.parametrize("names", [None, ("c1", "c2", "fc")])
def test_pytorch_computes_the_same_with_convolutions_both_ways(x64, names):
    params = drawn(CNN, dtype=np.float64)
    x = np.random.default_rng(3).normal(size=(2, 8, 6, 3))  # 4 by 3 behind the first, then 3 by 1
    channels_first = x.transpose(0, 3, 1, 2)
    state_dict = to_torch_state_dict(params, names, flattened=(3, 1))
    modules = ("0", "2", "5") if names is None else names
    shapes = [state_dict[f"{name}.weight"].shape for name in modules]
    assert shapes == [(4, 3, 3, 3), (6, 2, 2, 3), (5, 18)]
    close(CNN.apply(params, x), torch_cnn(state_dict, modules, channels_first), 1e-12)
    assert same(load_torch_state_dict(state_dict, params, names, flattened=(3, 1)), params)
    rng = np.random.default_rng(2)
    theirs = {name: rng.normal(size=a.shape) for name, a in state_dict.items()}
    params = load_torch_state_dict(theirs, params, names, flattened=(3, 1))
    close(CNN.apply(params, x), torch_cnn(theirs, modules, channels_first), 1e-12)


def test_rows_of_a_flattened_image_are_put_in_order():
    """Every weight says which channel, row and column it belongs to, in either order."""
    net = fnn.serial(fnn.conv(1, 2, (1, 1)), fnn.flatten(), fnn.dense(2 * 3 * 4, 1))
    params = drawn(net)
    here = np.arange(24, dtype=np.float32).reshape(3, 4, 2)  # [height, width, channels]
    params = (*params[:2], Dense(jnp.asarray(here.reshape(24, 1)), params[2].b))
    out = to_torch_state_dict(params, flattened=(3, 4))
    np.testing.assert_array_equal(out["2.weight"].reshape(2, 3, 4), here.transpose(2, 0, 1))
    assert same(load_torch_state_dict(out, params, flattened=(3, 4)), params)


def test_a_dense_layer_behind_a_mean_over_space_needs_no_size():
    net = fnn.serial(fnn.conv(2, 4, (3,)), fnn.mean_pool((5,)), fnn.flatten(), fnn.mlp((4, 6, 3)))
    state_dict = to_torch_state_dict(drawn(net))
    assert state_dict["0.weight"].shape == (4, 2, 3)  # Conv1d: [out, in, length]
    np.testing.assert_array_equal(state_dict["0.weight"][1, 0], drawn(net)[0].w[:, 0, 1])
    assert same(load_torch_state_dict(state_dict, drawn(net)), drawn(net))


LABELS = np.arange(21).reshape(7, 3) % 7


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
FLAT, STATE = to_flat(PARAMS), to_torch_state_dict(PARAMS)
X = rows(5, 3)
MEND = "Of another net? Of another dtype? Cast it. Stored the other way round? Pass the `.T`."
SINGLE = (
    "which is no single dense layer, convolution, norm or embedding. Stacked by `fnn.repeat`? Take "
    "it apart: `tuple(jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(n))`."
)
CONV = fnn.serial(fnn.conv(1, 2, (1, 1)), fnn.flatten(), fnn.dense(24, 1))
FLATTENED = (
    "`params.2` takes 24 numbers after a convolution with 2 channels. PyTorch flattens images "
    "channels first: pass their size, `flattened=(height, width)`; got "
)


def not_two(argument, came):
    return (
        "PyTorch's modules must be 2, one for each of the layers with params "
        f"['{argument}.0.0', '{argument}.1'], got {came}. A batch norm? Fold it into the layer "
        "before it."
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
        lambda: from_flat([1], PARAMS),
        TypeError,
        "`flat` must be a dict of names and arrays, got list.",
    ),
    (
        lambda: from_flat(without(FLAT, "0.0.w") | {"x": X, "1.b": X[0]}, PARAMS),
        ValueError,
        "`flat` does not fit: x is left over; 0.0.w is missing, expected float32[3, 4]; "
        f"1.b is float32[3], expected float32[2]. {MEND}",
    ),
    (
        lambda: from_flat({}, drawn(DEEP)),
        ValueError,
        "`flat` does not fit: "
        + "; ".join(
            f"{i}.0.w is missing, expected float32[{3 if i == 0 else 6}, 6]; "
            f"{i}.0.b is missing, expected float32[6]"
            for i in range(4)
        )
        + f"; 16 more. {MEND}",
    ),
    (
        lambda: from_flat(FLAT | {"1.w": PARAMS[1].w.astype(jnp.bfloat16)}, PARAMS),
        ValueError,
        "`flat` does not fit: 1.w is bfloat16[4, 2], expected float32[4, 2]. " + MEND,
    ),
    (
        lambda: from_flat(FLAT | {"1.w": PARAMS[1].w.T}, PARAMS),
        ValueError,
        "`flat` does not fit: 1.w is float32[2, 4], expected float32[4, 2]. " + MEND,
    ),
    (
        lambda: from_flat(FLAT | {"1.w": 3.0}, PARAMS),
        TypeError,
        "`flat['1.w']` must be an array, got float. Convert it: `jnp.asarray(flat['1.w'])`.",
    ),
    (
        lambda: to_torch_state_dict((PARAMS, drawn(fnn.repeat(fnn.dense(3, 3), 2)))),
        ValueError,
        f"`params.1` has shape Dense(w=(2, 3, 3), b=(2, 3)), {SINGLE}",
    ),
    (
        lambda: to_torch_state_dict(drawn(fnn.repeat(fnn.conv(3, 3, (2, 2)), 2))),
        ValueError,
        f"`params` has shape Kernel(w=(2, 2, 2, 3, 3), b=(2, 3)), {SINGLE}",
    ),
    (
        lambda: load_torch_state_dict(STATE, (PARAMS, drawn(fnn.repeat(fnn.rms_norm(3), 2)))),
        ValueError,
        f"`like.1` has shape Norm(scale=(2, 3), bias=None), {SINGLE}",
    ),
    (
        lambda: to_torch_state_dict((PARAMS, {"table": X})),
        ValueError,
        f"`params.1.table` has shape (5, 3), {SINGLE}",
    ),
    (
        lambda: to_torch_state_dict(PARAMS, "fc"),
        ValueError,
        not_two("params", "'fc'"),
    ),
    (
        lambda: to_torch_state_dict(PARAMS, ("fc",)),
        ValueError,
        not_two("params", "('fc',)"),
    ),
    (
        lambda: to_torch_state_dict(PARAMS, ("fc", "fc")),
        ValueError,
        not_two("params", "('fc', 'fc')"),
    ),
    (
        lambda: to_torch_state_dict(drawn(CONV)),
        ValueError,
        f"{FLATTENED}None.",
    ),
    (
        lambda: to_torch_state_dict(drawn(CONV), flattened=(4, 4)),
        ValueError,
        f"{FLATTENED}(4, 4).",
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
        "`state_dict` does not fit: 0.weight is float32[3, 4], expected float32[4, 3]. " + MEND,
    ),
    (
        lambda: load_torch_state_dict(without(STATE, "0.bias"), PARAMS),
        ValueError,
        "`state_dict` does not fit: 0.bias is missing, expected float32[4]. " + MEND,
    ),
    (
        lambda: load_torch_state_dict(STATE, shapes_of(fnn.mlp((3, 4, 2), bias_init=None))),
        ValueError,
        "`state_dict` does not fit: 0.bias is left over; 2.bias is left over. " + MEND,
    ),
    (
        lambda: load_torch_state_dict(
            STATE | {"1.weight": X[0], "1.bias": X[0], "1.running_mean": X[0]}, PARAMS
        ),
        ValueError,
        not_two("like", "['0', '2', '1']"),
    ),
    (
        lambda: load_torch_state_dict({"weight": X}, PARAMS),
        ValueError,
        not_two("like", "['']"),
    ),
    (
        lambda: load_torch_state_dict(STATE | {"0.bias": np.ones(4, int)}, PARAMS),
        ValueError,
        "`state_dict` does not fit: 0.bias is int64[4], expected float32[4]. " + MEND,
    ),
    (
        lambda: load_torch_state_dict(STATE, PARAMS, ("0", "3")),
        ValueError,
        "`state_dict` does not fit: 2.weight is left over; 2.bias is left over; "
        "3.weight is missing, expected float32[2, 4]; 3.bias is missing, expected float32[2]. "
        + MEND,
    ),
    (
        lambda: export(PARAMS, PARAMS, X),
        TypeError,
        f"`net` must be a Layer, got {PARAMS!r:.80}. Make one: `fnn.mlp((3, 5, 2))`.",
    ),
    (
        lambda: export(NET, PARAMS, np.float32(1)),
        ValueError,
        "`x` must be [batch, ...], got a single number. Pass `x[None]`.",
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
