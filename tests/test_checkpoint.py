"""Checkpoints: what comes back is what went in, or an error that names the file."""

import fcntl
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import fnn
from fnn import checkpoint
from fnn.checkpoint import CheckpointError, files, restore, restore_params, save, steps

NET = fnn.mlp((4, 3, 2))


def everything():
    """A leaf of every kind and dtype, with sizes of no and one element."""
    rng = np.random.default_rng(0)
    dtypes = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8, jnp.bool_)
    return {
        "arrays": tuple(
            jnp.asarray(rng.normal(size=(3, 2)) * 10).astype(dtype) for dtype in dtypes
        ),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.5),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "numbers": (True, 2**62, 0.1),
        "numpy": np.asfortranarray(rng.normal(size=(3, 4))),
        "strided": rng.normal(size=(6, 4))[::2, ::-1],
        "big endian": np.arange(6, dtype=">f4").reshape(2, 3),
        "number": np.int8(-3),
        "flag": np.bool_(True),
        "train": optax.adam(1e-3).init(NET.init(jax.random.key(0))),
        "nothing": (),
    }


def raw(leaf):
    """A leaf's type, dtype, shape and bytes."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), raw(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return (
        isinstance(leaf, jax.Array),
        None if isinstance(leaf, jax.Array) else type(leaf),
        array.dtype,
        array.shape,
        array.tobytes(),
    )


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        raw(u) == raw(v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_what_comes_back_is_what_went_in(tmp_path, wide):
    with jax.enable_x64(wide):
        tree = everything()
        path = save(tmp_path, tree, step=3, metadata={"rate": 0.1, "note": "é"})
        for folder in (tmp_path, path, str(tmp_path)):
            assert same(restore(folder, like=tree), tree)
        part = {name: tree[name] for name in ("arrays", "empty", "key", "keys", "train")}
        save(tmp_path, part, step=4)
        assert same(restore(tmp_path, like=jax.eval_shape(lambda: part)), part)
    assert checkpoint.manifest(tmp_path, step=3).metadata == {"rate": 0.1, "note": "é"}
    assert steps(tmp_path) == [3, 4]


def test_other_programs_can_check_and_read_it(tmp_path):
    tree = NET.init(jax.random.key(0))
    path = save(tmp_path, tree)
    assert sorted(p.name for p in path.iterdir()) == [
        "SHA256SUMS",
        "arrays.safetensors",
        "manifest.json",
    ]
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"],
            cwd=path,
            check=True,
            capture_output=True,
        )
    found, leaves = (
        load_file(path / "arrays.safetensors"),
        json.loads((path / "manifest.json").read_text())["leaves"],
    )
    assert [leaf["path"] for leaf in leaves] == ["[0][0].w", "[0][0].b", "[1].w", "[1].b"]
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        np.testing.assert_array_equal(found[str(i)], leaf)


def test_arrays_go_where_those_of_like_are(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    save(tmp_path, jnp.ones(3))
    for sharding in (
        jax.sharding.NamedSharding(mesh, jax.P("data")),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    ):
        assert restore(tmp_path, like=jax.device_put(jnp.zeros(3), sharding)).sharding == sharding


# Damage


def damaged(path, rng, flips):
    """`(file, bytes)` with one bit flipped or with an end cut off, over all files."""
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        # 8 bytes: the header's length
        bits = {
            *range(72),
            8 * len(content) - 1,
            *rng.integers(0, 8 * len(content), flips).tolist(),
        }
        for spot, bit in sorted(divmod(bit, 8) for bit in bits):
            yield file, content[:spot] + bytes([content[spot] ^ (1 << bit)]) + content[spot + 1 :]
        for kept in {0, 1, 8, len(content) // 2, len(content) - 1}:
            yield file, content[:kept]
        yield file, content + b"\n"


def test_not_one_bit_or_byte_may_be_wrong(tmp_path):
    """1,000 flips and more, spread over the header, the arrays, the manifest and the sums."""
    tree, count = {"w": jnp.arange(40.0), "key": jax.random.key(1), "n": 3}, 0
    path = save(tmp_path, tree)
    for file, content in damaged(path, np.random.default_rng(0), 340):
        good = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            restore(tmp_path, like=tree)
        assert caught.value.path.parent == path
        assert caught.value.path.name in ("arrays.safetensors", "manifest.json", "SHA256SUMS")
        assert file.name in str(caught.value)
        file.write_bytes(good)
        count += 1
    assert count >= 1000
    assert same(restore(tmp_path, like=tree), tree)


@pytest.mark.parametrize("name", ["arrays.safetensors", "manifest.json", "SHA256SUMS"])
def test_a_file_that_is_gone_is_named_and_the_older_whole_one_offered(tmp_path, name):
    for step in (1, 2, 3):
        path = save(tmp_path, jnp.full(2, step), step=step)
    (path / name).unlink()
    (tmp_path / "step-000000000002" / "arrays.safetensors").write_bytes(b"")
    with pytest.raises(
        CheckpointError,
        match=rf"{name}.* An older one is whole: restore\('.*step-000000000001', ...\)",
    ):
        restore(tmp_path, like=jnp.zeros(2, int))
    assert restore(tmp_path / "step-000000000001", like=jnp.zeros(2, int)).tolist() == [1, 1]


def rewritten(path, change):
    """A manifest that somebody wrote by hand, with sums that fit."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    (path / "manifest.json").write_text(json.dumps(content))
    (path / "SHA256SUMS").write_text(files._sum(path / "manifest.json"))


FORGED = [
    (lambda content: content.update(format=1), "must be of format 2, which this fnn reads"),
    (
        lambda content: content.update(sha256="0" * 64),
        "its SHA-256 is not the one in manifest.json",
    ),
    (lambda content: content["leaves"].pop(), r"only in `like`: \['w'\]"),
]


@pytest.mark.parametrize(("change", "message"), FORGED, ids=[message[:20] for _, message in FORGED])
def test_a_manifest_of_another_format_or_other_arrays_is_refused(tmp_path, change, message):
    tree = {"b": jnp.zeros(2), "w": jnp.ones(3)}
    rewritten(save(tmp_path, tree), change)
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, like=tree)


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "other"])
def test_sums_of_files_elsewhere_are_refused(tmp_path, name):
    path = save(tmp_path, jnp.zeros(2))
    (path / "SHA256SUMS").write_text(
        (path / "SHA256SUMS").read_text().replace("manifest.json", name)
    )
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: its SHA-256 is not the one in SHA256SUMS"
    ):
        restore(tmp_path, like=jnp.zeros(2))


OTHERS = [
    ({"w": jnp.zeros(3)}, r"only in the checkpoint: \['b'\]"),
    ({"w": jnp.zeros(3), "b": jnp.zeros(2), "c": 0}, r"only in `like`: \['c'\]"),
    (
        {"w": jnp.zeros(4), "b": jnp.zeros(2)},
        r"leaf \['w'\] is float32\[3\], but `like` has float32\[4\]",
    ),
    (
        {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2)},
        r"leaf \['w'\] is float32\[3\], but `like` has bfloat16\[3\]",
    ),
    (
        {"w": jnp.zeros(3), "b": 2.0},
        r"leaf \['b'\] is float32\[2\], but `like` has 2.0 \(float\)",
    ),
    (
        {"w": jnp.zeros(3), "b": jax.random.key(0)},
        r"leaf \['b'\] is float32\[2\], but `like` has key<fry>\[\]",
    ),
    ({"w": jnp.zeros(3), "b": "two"}, r"`like` has 'two' \(str\)"),
]


@pytest.mark.parametrize(("like", "message"), OTHERS, ids=[message[:30] for _, message in OTHERS])
def test_another_tree_is_refused_and_the_difference_told(tmp_path, like, message):
    save(tmp_path, {"w": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path, like=like)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(
        CheckpointError, match="nowhere: no checkpoint is there; steps that are: none"
    ):
        restore(tmp_path / "nowhere", like=())
    save(tmp_path, 1, step=5)
    with pytest.raises(
        CheckpointError, match="no checkpoint of step 4 is there; steps that are: 5"
    ):
        restore(tmp_path, like=0, step=4)


# Writing


def test_whatever_stops_a_save_leaves_the_older_ones_whole_and_nothing_else(tmp_path, monkeypatch):
    """Every call that touches the disk fails in turn."""
    save(tmp_path, jnp.ones(3), step=1)
    calls = [
        (files, "save_file"),
        (files, "_sum"),
        (files, "_flush"),
        (Path, "rename"),
        (Path, "write_bytes"),
    ]
    for place, name in calls:
        with monkeypatch.context() as patch:
            patch.setattr(
                place, name, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, jnp.zeros(3), step=2)
        assert [p.name for p in tmp_path.iterdir()] == ["step-000000000001"]
        assert restore(tmp_path, like=jnp.zeros(3)).tolist() == [1, 1, 1]


def test_a_step_is_replaced_and_what_a_killed_save_left_goes(tmp_path):
    (tmp_path / ".unfinished-12345678").mkdir()
    (tmp_path / ".unfinished-12345678" / "arrays.safetensors").write_bytes(b"half")
    for value in (1.0, 2.0):
        save(tmp_path, jnp.full(2, value))
    save(tmp_path, jnp.full(2, 3.0), step=1)
    assert sorted(os.listdir(tmp_path)) == ["step-000000000000", "step-000000000001"]
    assert restore(tmp_path, like=jnp.zeros(2), step=0).tolist() == [2, 2]


BAD = [
    (
        lambda p: save(p, {"a": "text"}),
        TypeError,
        r"`tree\['a'\]` must be an array of a known dtype, a key or a number, got 'text' \(str\)",
    ),
    (
        lambda p: save(p, [np.array(["x"])]),
        TypeError,
        r"`tree\[0\]` must be an array of a known dtype, .* got <U1\[1\]",
    ),
    (
        lambda p: save(p, [np.ones(2, complex)]),
        TypeError,
        r"`tree\[0\]` must be an array of a known dtype, .* got complex128.* Dtypes: bool, int8",
    ),
    (
        lambda p: save(p, {"n": 2**63}),
        ValueError,
        r"`tree\['n'\]` must fit into 64 bits, got 9223372036854775808",
    ),
    (
        lambda p: save(p, 1, step=-1),
        ValueError,
        "`step` must be a finite number, at least 0, got -1",
    ),
    (lambda p: save(p, 1, step=1.5), ValueError, "`step` must be a whole number, got 1.5"),
    (
        lambda p: save(p, 1, metadata={"net": NET}),
        TypeError,
        "`metadata` must be what JSON can hold",
    ),
    (
        lambda p: save(p, 1, metadata={"loss": float("nan")}),
        TypeError,
        "`metadata` must be what JSON can hold",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[message[:40] for *_, message in BAD]
)
def test_what_cannot_be_saved_is_an_error_and_leaves_nothing(tmp_path, call, kind, message):
    with pytest.raises(kind, match=message):
        call(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The parameters alone


def test_params_come_back_without_a_like(tmp_path):
    nets = (
        fnn.serial(fnn.dense(4, 3), fnn.activations.relu, fnn.layer_norm(3)),
        fnn.serial(fnn.embedding(5, 4), fnn.repeat(fnn.dense(4, 4), 2)),
    )
    tree = [net.init(jax.random.key(0)) for net in nets]
    tree.append({"b": (None, [jnp.ones(2)]), "a": (), "key": jax.random.key(3)})
    save(tmp_path, tree)
    assert same(restore_params(tmp_path), tree)


def test_every_type_of_the_nets_params_is_known():
    modules = [module for name, module in sys.modules.items() if name.startswith("fnn.nets.")]
    found = {
        name
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type) and hasattr(kind, "_fields")
    }
    assert found <= set(files.NODES)


def test_params_of_another_library_need_a_like(tmp_path):
    tree = optax.adam(1e-3).init({"w": jnp.ones(2)})
    save(tmp_path, tree)
    with pytest.raises(CheckpointError, match="ScaleByAdamState, which is none of fnn's"):
        restore_params(tmp_path)
    with pytest.raises(CheckpointError, match="names no best epoch"):
        restore_params(tmp_path, best=True)


def test_damage_is_seen_when_params_are_read(tmp_path):
    path = save(tmp_path, jnp.arange(40.0)) / "arrays.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"arrays\.safetensors: its SHA-256 is not the one"):
        restore_params(tmp_path)


# What went wrong once


def test_numbers_of_64_bits_are_never_narrowed(tmp_path):
    with jax.enable_x64(True):
        tree = {"n": jnp.asarray(2**40 + 7)}
        like = jax.eval_shape(lambda: tree)
        save(tmp_path, tree)
    for read in (lambda: restore(tmp_path, like), lambda: restore_params(tmp_path)):
        with pytest.raises(CheckpointError, match=r"leaf \['n'\] is int64, .*jax_enable_x64"):
            read()


def test_an_error_survives_a_process_pool():
    error = CheckpointError(Path("run"), "is damaged.")
    error.params = (np.ones(2),)
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.path, back.reason) == ("run: is damaged.", error.path, error.reason)
    assert same(back.params, error.params)
    stopped = pickle.loads(pickle.dumps(checkpoint.Stopped("SIGTERM: stopped")))
    assert stopped.code == "SIGTERM: stopped"


def test_a_home_folder_is_found_and_a_remote_one_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save("~/run", jnp.ones(2), step=3)
    assert steps(tmp_path / "run") == steps("~/run") == [3]
    assert restore("~/run", like=jnp.zeros(2)).tolist() == [1, 1]
    for call in (
        lambda: save("gs://bucket/run", 1),
        lambda: steps("s3://bucket/run"),
        lambda: checkpoint.Checkpointer("gs://bucket/run"),
    ):
        with pytest.raises(ValueError, match=r"must be a local folder, got '.*Install .*gcsfuse"):
            call()
    assert os.listdir(tmp_path) == ["run"]


READER = """
import re, sys, jax
from fnn.checkpoint import restore
like = [jax.ShapeDtypeStruct((1000, 1000), "float32") for _ in range(25)]
like += [jax.ShapeDtypeStruct((25, 1000, 1000), "float32")]
jax.block_until_ready(jax.numpy.zeros(3))
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = kilobytes("VmRSS")
jax.block_until_ready(restore(sys.argv[1], like))
print((kilobytes("VmHWM") - before) * 1024 / 2e8)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks by /proc")
def test_the_peak_of_restore_is_at_most_twice_the_tree(tmp_path):
    many = [np.ones((1000, 1000), np.float32)] * 25
    save(tmp_path, [*many, np.ones((25, 1000, 1000), np.float32)])
    command = [sys.executable, "-c", READER, str(tmp_path)]
    peak = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert 1 < peak < 2.2


def test_the_difference_of_large_trees_is_told_at_once(tmp_path):
    save(tmp_path, {str(i): i for i in range(20_000)})
    begun = time.process_time()
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: \['0'\].*like`: \['x0'\]"):
        restore(tmp_path, like={f"x{i}": i for i in range(20_000)})
    assert time.process_time() - begun < 5  # 15 and more where every path is looked up in a list


def test_it_saves_under_the_rules_of_windows(tmp_path, monkeypatch):
    """No `fcntl`; no descriptor of a folder, and no flush of a file that is read-only."""
    descriptor_of, flush = os.open, os.fsync

    def opened(path, *args, **kwargs):
        assert not os.path.isdir(path)
        return descriptor_of(path, *args, **kwargs)

    def flushed(file):
        number = file if isinstance(file, int) else file.fileno()
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        flush(number)

    with monkeypatch.context() as patch:
        patch.setattr(files, "fcntl", None, raising=False)
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", flushed)
        # rmtree uses descriptors of folders here, and none on Windows
        patch.setattr(shutil, "rmtree", lambda path, *args, **kwargs: remove(path))
        for step in (1, 1, 2):
            save(tmp_path, jnp.full(2, step), step=step)
    assert steps(tmp_path) == [1, 2]
    assert restore(tmp_path, like=jnp.zeros(2, int)).tolist() == [2, 2]


def remove(folder):
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        os.remove(os.path.join(folder, name))
    if os.path.isdir(folder):
        os.rmdir(folder)


def test_a_kill_between_the_two_renames_leaves_the_newest(tmp_path, monkeypatch):
    save(tmp_path, jnp.full(2, 1.0), step=1)
    save(tmp_path, jnp.full(2, 9.0), step=9)
    rename = Path.rename
    with monkeypatch.context() as patch:

        def once(self, target):
            if self.name.startswith(".unfinished-"):
                raise KeyboardInterrupt
            return rename(self, target)

        patch.setattr(Path, "rename", once)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, jnp.full(2, 9.5), step=9)
    assert steps(tmp_path) == [1, 9]
    assert restore(tmp_path, like=jnp.zeros(2)).tolist() == [9, 9]
    assert checkpoint.manifest(tmp_path, step=9).step == 9
    save(tmp_path, jnp.full(2, 10.0), step=10)
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:012d}" for step in (1, 9, 10)]


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of files' sizes")
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    save(tmp_path, jnp.ones(2), step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="step-000000000002: cannot be written"):
            save(tmp_path, jnp.ones(10_000), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["step-000000000001"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written"):
        save(tmp_path / "file", 1)


def test_two_writers_of_one_folder_are_refused(tmp_path):
    with (
        files.alone(tmp_path),
        pytest.raises(CheckpointError, match="another process saves its run here, or a `fit`"),
    ):
        save(tmp_path, 1)
    save(tmp_path, 1)
