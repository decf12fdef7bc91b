"""The files of a checkpoint: `save`, `restore`, `restore_params`, `manifest`, `steps`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import default_registry, keystr, tree_leaves_with_path
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fnn import _validate
from fnn.nets.blocks import Blocks
from fnn.nets.convolution import Along, Kernel
from fnn.nets.layers import Dense, Embedding, Norm

try:
    import fcntl
except ImportError:  # Windows, where a folder can be neither locked nor flushed
    fcntl: Any = None

FORMAT = 2
ARRAYS, MANIFEST, SUMS = "arrays.safetensors", "manifest.json", "SHA256SUMS"
PREFIX, UNFINISHED, REPLACED = "step-", ".unfinished-", ".replaced-"
# The dtypes that a manifest knows, and how the file stores those that are not NumPy's.
NUMBERS = {"Python bool": "bool", "Python int": "int64", "Python float": "float64"}
KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
)
STORED = NUMBERS | dict.fromkeys(KEYS, "uint32") | {name: name for name in DTYPES}
Folder = str | os.PathLike[str]
# What `restore_params` makes of a list of children.
NODES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "NoneType": lambda children: None,
    **{own.__name__: own._make for own in (Dense, Norm, Embedding, Kernel, Along, Blocks)},
}


class CheckpointError(ValueError):
    """A checkpoint is damaged, is of another tree, is not there, or cannot be written.

    Attributes:
        path: the file or folder.
        reason: the message without it.
        params: where a save of `fit` failed, the parameters at that time.
        history: where a save of `fit` failed, its history up to that time.

    >>> str(CheckpointError(Path("run"), "no checkpoint is there."))
    'run: no checkpoint is there.'
    """

    params: Any = None
    history: Any = None

    def __init__(self, path: Path, reason: str) -> None:
        """Keeps the path and the reason."""
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """The path, then the reason."""
        return f"{self.path}: {self.reason}"


class Manifest(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    metadata: dict[str, Any]
    leaves: list[dict[str, Any]]  # path, dtype and shape of each, in the order of the tree
    tree: Any  # the structure, with the numbers of the leaves
    sha256: str  # of the arrays, as `sha256sum` prints it


def save(
    folder: Folder, tree: Any, *, step: int = 0, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes a checkpoint. A crash leaves earlier checkpoints intact, and no part of this one.

    Args:
        folder: holds the checkpoints of one run, a folder for each step; made if it is not there.
        tree: a pytree of arrays, keys from `jax.random.key`, and Python's bool, int and float.
        step: a number of at least 0; a checkpoint of the same step is replaced.
        metadata: whatever JSON can hold, such as the configuration.

    Returns:
        The checkpoint's own folder.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names the leaf.
        CheckpointError: the disk is full, the folder is read-only, or another training saves there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, {"w": jnp.ones(3)}, step=7)
    ...     path.name, restore(folder, like={"w": jnp.zeros(3)})
    ('step-000000000007', {'w': Array([1., 1., 1.], dtype=float32)})
    """
    home = local(folder)
    _validate.not_negative("step", step)
    if int(step) != step:
        raise ValueError(f"`step` must be a whole number, got {step!r}.")
    content = prepare(tree, int(step), metadata or {})
    with alone(home):
        return write(home, *content)


def restore(folder: Folder, like: Any, *, step: int | None = None) -> Any:
    """Reads a checkpoint into a tree like another one, after a check of every byte.

    Args:
        folder: of a run, or of one checkpoint.
        like: a tree of the same structure, shapes and dtypes; its leaves may be
            `jax.ShapeDtypeStruct`s. A leaf is put where the `jax.Array` in `like` is. A leaf
            `...` stands for an array of any shape and dtype.
        step: which; the newest, if None.

    Returns:
        The tree. Leaves are what they are in `like`: `jax.Array`s, NumPy arrays (for `...` too), or
        Python's numbers.

    Raises:
        CheckpointError: nothing is there, a file is damaged, or the tree is another one; the
            message says what differs, and which older checkpoint is whole.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, (jax.random.key(3), 5))
    ...     restore(folder, like=(jax.random.key(0), 0))[1]
    5
    """
    path = find(local(folder), step)
    content = _load_or_offer(path)
    if differs := difference(content, like):
        raise CheckpointError(path / MANIFEST, differs)
    read = _reader(path, content)
    leaves = [read(i, leaf) for i, leaf in enumerate(jax.tree.leaves(like))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def restore_params(folder: Folder, *, best: bool = False) -> Any:
    """Reads the parameters alone, of a checkpoint of `fit` or of `save(folder, params)`.

    They are those that `fit` returns: an average, where the run has `ema`.

    Args:
        folder: of a run, or of one checkpoint.
        best: whether to take the epoch that is best by the metric `best` of the run's
            `Checkpointer`, in place of the newest.

    Returns:
        The parameters: tuples, lists, dicts, None and `fnn`'s own types, such as `Dense`, of
        `jax.Array`s.

    Raises:
        CheckpointError: nothing is there, a file is damaged, or the tree has other types.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, (Dense(w=jnp.ones((1, 1)), b=jnp.zeros(1)), ()))
    ...     restore_params(folder)
    (Dense(w=Array([[1.]], dtype=float32), b=Array([0.], dtype=float32)), ())
    """
    path = find(local(folder), None)
    if best:
        step = manifest(path).metadata.get("best_step")
        if step is None:
            raise CheckpointError(path, "names no best epoch. Train with `Checkpointer(best=...)`.")
        path = find(path.parent, step)
    content = _load_or_offer(path)
    tree = content.tree
    if content.metadata.get("of") == "fit":
        averaged = "result" in tree["keys"]  # what `fit` returns, where it is not what it trains
        for name in ("result",) if averaged else ("state", "params"):
            tree = tree["children"][tree["keys"].index(name)]
    return _rebuild(path, tree, _reader(path, content))


def manifest(folder: Folder, *, step: int | None = None) -> Manifest:
    """What a checkpoint says of itself, without a look at its arrays.

    Args:
        folder: of a run, or of one checkpoint.
        step: which; the newest, if None.

    Returns:
        The manifest.

    Raises:
        CheckpointError: nothing is there, or the manifest is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, [1.0], step=2, metadata={"epochs": 5})
    ...     manifest(folder).metadata
    {'epochs': 5}
    """
    return _load_or_offer(find(local(folder), step), arrays=False)


def steps(folder: Folder) -> list[int]:
    """The steps that a run's folder has checkpoints of, oldest first.

    Args:
        folder: of a run; it need not be there.

    Returns:
        The numbers.

    >>> steps("/nowhere")
    []
    """
    return [*checkpoints(local(folder))]


# Where checkpoints are


def local(folder: Folder) -> Path:
    """The path of a folder; raises a ValueError for that of a remote one."""
    if "://" in str(folder):
        raise ValueError(
            f"`folder` must be a local folder, got {str(folder)!r}. Install what mounts a bucket "
            "as one (gcsfuse for gs://, mountpoint-s3 for s3://) and pass the mounted folder."
        )
    return Path(folder).expanduser()


def checkpoints(home: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder by their step, oldest first.

    A crash while a step is replaced leaves the earlier checkpoint under its hidden name.
    """
    paths = {}
    for path in sorted(home.glob(f"*{PREFIX}*")):  # hidden names come first
        hidden, _, step = path.name.rpartition(PREFIX)
        if hidden in ("", REPLACED) and step.isdecimal():
            paths[int(step)] = path
    return dict(sorted(paths.items()))


def find(home: Path, step: int | None) -> Path:
    """The folder of one checkpoint; of the newest, if `step` is None."""
    if step is None and (home / MANIFEST).exists():
        return home
    there = checkpoints(home)
    wanted = max(there, default=None) if step is None else step
    if wanted in there:
        return there[wanted]
    which = "" if step is None else f" of step {step}"
    last = ", ".join(map(str, [*there][-5:])) or "none"
    raise CheckpointError(home, f"no checkpoint{which} is there; steps that are: {last}.")


# Reading


@contextlib.contextmanager
def naming(path: Path, verb: str) -> Iterator[None]:
    """Turns an error of the disk into one that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be {verb} ({error}).") from error


def _sum(file: Path) -> str:
    """The line of `sha256sum`."""
    with naming(file, "read"), open(file, "rb") as opened:
        return f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n"


def _compare(file: Path, expected: bytes, where: str) -> None:
    """Raises unless the SHA-256 of a file is the expected one."""
    if _sum(file).encode() != expected:
        reason = f"its SHA-256 is not the one in {where}: this file or that one is damaged."
        raise CheckpointError(file, reason)


def _load_manifest(path: Path, arrays: bool = True) -> Manifest:
    """The manifest, after a check of all bytes, or of its own."""
    with naming(path / SUMS, "read"):
        expected = (path / SUMS).read_bytes()
    _compare(path / MANIFEST, expected, SUMS)
    content = json.loads((path / MANIFEST).read_bytes())
    if content.pop("format", None) != FORMAT:
        raise CheckpointError(path / MANIFEST, f"must be of format {FORMAT}, which this fnn reads.")
    if arrays:
        _compare(path / ARRAYS, content["sha256"].encode(), MANIFEST)
    return Manifest(**content)


def _load_or_offer(path: Path, arrays: bool = True) -> Manifest:
    """`_load_manifest`, with an error that says which older checkpoint is whole."""
    try:
        return _load_manifest(path, arrays)
    except CheckpointError as error:
        newer = error
        for older in reversed(checkpoints(path.parent).values()):
            with contextlib.suppress(CheckpointError):
                if older.name[-12:] < path.name[-12:] and _load_manifest(older):
                    mend = f"An older one is whole: restore({str(older)!r}, ...); "
                    mend += f"or remove {path} to go on from it."
                    error = CheckpointError(newer.path, f"{newer.reason} {mend}")
                    break
        raise error from None


def difference(content: Manifest, like: Any) -> str:
    """How the tree of a checkpoint differs from `like`; empty if it does not."""
    wanted = {keystr(path): leaf for path, leaf in tree_leaves_with_path(like)}
    there = {entry["path"]: entry for entry in content.leaves}
    if [*wanted] != [*there]:
        sides = {"the checkpoint": there.keys() - wanted, "`like`": wanted.keys() - there}
        only = [f"only in {side}: {', '.join(sorted(of)[:5])}" for side, of in sides.items() if of]
        return f"the tree is another one than `like` ({'; '.join(only) or 'the order differs'})."
    for path, entry in there.items():
        leaf, dtype = wanted[path], entry["dtype"]
        fits = dtype in DTYPES if leaf is ... else _entry(path, leaf) == entry
        if not fits:
            kept = f"{dtype}{entry['shape']}"
            return f"leaf {path} is {kept}, but `like` has {_validate.describe(leaf)}."
    return ""


def _reader(path: Path, content: Manifest) -> Callable[..., Any]:
    """`read(i, leaf)`: a leaf of the file, as what `leaf` is; a `jax.Array` without it."""
    with open(path / ARRAYS, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    def read(i: int, leaf: Any = None) -> Any:
        dtype = content.leaves[i]["dtype"]
        entry = header[str(i)]
        array = np.empty(entry["shape"], jnp.dtype(STORED[dtype]))
        with open(path / ARRAYS, "rb") as file:
            file.seek(8 + length + entry["data_offsets"][0])
            file.readinto(array.reshape(-1).view(np.uint8).data)
        if dtype in NUMBERS:
            return array.item()
        if leaf is ...:
            return array
        if isinstance(leaf, np.generic):
            return array[()]
        if isinstance(leaf, np.ndarray):
            return array.astype(leaf.dtype, copy=False)  # its byte order
        if _validate.canonical_dtype(array) != array.dtype:
            reason = f"leaf {content.leaves[i]['path']} is {dtype}, but JAX's 64-bit mode is off. "
            reason += "Turn it on: `jax.config.update('jax_enable_x64', True)`."
            raise CheckpointError(path / MANIFEST, reason)
        placed = jax.block_until_ready(_place(array, leaf))  # one leaf at a time is held twice
        return jax.random.wrap_key_data(placed, impl=KEYS[dtype]) if dtype in KEYS else placed

    return read


def _place(array: np.ndarray, leaf: Any) -> jax.Array:
    """The array on the devices of `leaf`."""
    source: Any = array
    if getattr(leaf, "weak_type", False):  # as 0.1 it does not decide on the dtype of a product
        source = jnp.full(array.shape, leaf.dtype.type(0).item()).at[...].set(array)
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(source, leaf.sharding)
    return jax.device_put(source)  # `jnp.asarray` copies once more


def _rebuild(path: Path, node: Any, read: Callable[[int], Any]) -> Any:
    """A tree of known types from its structure."""
    if isinstance(node, int):
        return read(node)
    name = node["type"]
    children = [_rebuild(path, child, read) for child in node["children"]]
    if name == "dict" and node["keys"] is not None:
        return dict(zip(node["keys"], children, strict=True))
    if name not in NODES:
        reason = f"the params have a {name}, which is none of fnn's. Use `restore(folder, like)`."
        raise CheckpointError(path / MANIFEST, reason)
    return NODES[name](children)


# Writing


def prepare(tree: Any, step: int, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The manifest of a tree, and its arrays, for `write`; nothing waits for the devices here."""
    leaves = [(keystr(path), leaf) for path, leaf in tree_leaves_with_path(tree)]
    content = {
        "format": FORMAT,
        "step": step,
        "metadata": dict(metadata),
        "leaves": [_entry(path, leaf) for path, leaf in leaves],
        "tree": _structure(tree, itertools.count()),
    }
    to_json(content)  # before anything is written
    return content, [_array_of(path, leaf) for path, leaf in leaves]


def _entry(path: str, leaf: Any) -> dict[str, Any]:
    """What the manifest says of a leaf."""
    name = f"Python {type(leaf).__name__}"
    if hasattr(leaf, "dtype"):
        name = leaf.dtype.name  # without the byte order
    return {"path": path, "dtype": name, "shape": [*np.shape(leaf)]}


def _array_of(path: str, leaf: Any) -> Any:
    """The array that the file has of a leaf."""
    dtype = _entry(path, leaf)["dtype"]
    if dtype not in STORED:
        raise TypeError(
            f"`tree{path}` must be an array of a known dtype, a key or a number, got "
            f"{_validate.describe(leaf)}. Put text into `metadata`. Dtypes: {', '.join(DTYPES)}."
        )
    if dtype == "Python int" and not -(2**63) <= leaf < 2**63:
        raise ValueError(f"`tree{path}` must fit into 64 bits, got {leaf}.")
    if dtype in NUMBERS:
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if dtype in KEYS else leaf


def _structure(tree: Any, numbers: Iterator[int]) -> Any:
    """The types of the nodes of a tree, and the numbers of its leaves."""
    level = default_registry.flatten_one_level(tree)
    if level is None:
        return next(numbers)
    keys = getattr(tree, "_fields", None)
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        keys = sorted(tree)
    children = [_structure(child, numbers) for child in level[0]]
    return {"type": type(tree).__name__, "keys": keys, "children": children}


def to_json(content: dict[str, Any]) -> bytes:
    """JSON; raises a TypeError that says what JSON cannot hold."""
    try:
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must be what JSON can hold: {error}.") from None


def write(home: Path, content: dict[str, Any], arrays: list[Any]) -> Path:
    """Writes a checkpoint into a folder that is locked."""
    final = home / f"{PREFIX}{content['step']:012d}"
    draft = home / f"{UNFINISHED}{final.name}"
    native = [np.require(array, array.dtype.newbyteorder("="), "C") for array in arrays]
    try:
        with naming(final, "written"):
            draft.mkdir()
            save_file({str(i): array for i, array in enumerate(native)}, draft / ARRAYS)
            text = to_json(content | {"sha256": _sum(draft / ARRAYS)})
            (draft / MANIFEST).write_bytes(text)
            (draft / SUMS).write_bytes(_sum(draft / MANIFEST).encode())
            for name in (ARRAYS, MANIFEST, SUMS, "."):
                _flush(draft / name)
            if final.exists():
                final.rename(home / f"{REPLACED}{final.name}")
            draft.rename(final)
            _flush(home)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    tidy(home)
    return final


def _flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    if not path.is_dir():
        with open(path, "rb+") as file:  # Windows flushes no file that is read-only
            os.fsync(file)
    elif fcntl is not None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def tidy(home: Path) -> None:
    """Removes what a crash left half written, and puts back what it left half replaced."""
    for old in home.glob(f"{REPLACED}*"):
        final = home / old.name.removeprefix(REPLACED)
        old.rename(home / f"{UNFINISHED}{final.name}" if final.exists() else final)
    for old in home.glob(f"{UNFINISHED}*"):
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Makes a folder, keeps other writers out of it, and clears it.

    The lock ends with the process, however it ends.
    """
    with naming(home, "written"):
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=home).cleanup()  # it is not read-only
    descriptor = _lock(home)
    try:
        tidy(home)
        yield
    finally:
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked holds it too
            os.close(descriptor)


def _lock(home: Path) -> int | None:
    """A descriptor that no other writer can have; None where the file system has no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            return None
        reason = "another process saves its run here, or a `fit` of this one. "
        raise CheckpointError(home, f"{reason}Wait for it, or choose another folder.") from None
    return descriptor
