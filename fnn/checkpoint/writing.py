"""Writing a checkpoint, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fnn import _validate
from fnn.checkpoint.layout import (
    ARRAYS,
    DTYPES,
    FORMAT,
    MANIFEST,
    NUMBERS,
    PREFIX,
    REPLACED,
    SUMS,
    UNFINISHED,
)


def save(
    folder: str | os.PathLike[str],
    tree: Any,
    *,
    step: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint; whoever is killed meanwhile leaves none, and the older ones whole.

    Args:
        folder: holds the checkpoints of one run, a folder for each step; made if it is not there.
        tree: a pytree of arrays, keys from `jax.random.key`, and Python's bool, int and float.
        step: a number of at least 0; a checkpoint of the same step is replaced.
        metadata: whatever JSON can hold, such as the configuration.

    Returns:
        The checkpoint's own folder.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names the leaf.
        OSError: the disk.

    >>> import tempfile
    >>> from fnn.checkpoint import restore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, {"w": jnp.ones(3)}, step=7)
    ...     path.name, restore(folder, like={"w": jnp.zeros(3)})
    ('step-000000000007', {'w': Array([1., 1., 1.], dtype=float32)})
    """
    _validate.not_negative("step", step)
    if int(step) != step:
        raise ValueError(f"`step` must be a whole number, got {step!r}.")
    return write(folder, leaves_of(tree), int(step), metadata or {})


class Leaf(NamedTuple):
    """A leaf of a tree."""

    path: str
    kind: str  # "array", "key:" and its implementation, or the name of Python's type
    array: Any  # of JAX or NumPy: its numbers, or a key's bits


def leaves_of(tree: Any) -> list[Leaf]:
    """The leaves, checked.

    What JAX computes for it is sent to the devices here; `write` only waits, so that it may be
    another thread's.
    """
    return [
        _leaf(jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def write(
    folder: str | os.PathLike[str], leaves: list[Leaf], step: int, metadata: Mapping[str, Any]
) -> Path:
    """Writes the leaves of a tree, as `save` does."""
    arrays = {
        str(i): np.require(leaf.array, leaf.array.dtype.newbyteorder("="), "C")
        for i, leaf in enumerate(leaves)
    }
    described = [
        _described(leaf, array) for leaf, array in zip(leaves, arrays.values(), strict=True)
    ]
    manifest = {
        "format": FORMAT,
        "step": step,
        "metadata": dict(metadata),
        "versions": _versions(),
        "topology": _topology(),
    }
    to_json(manifest)  # before anything is written
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    tidy(home)
    made, final = home / f"{UNFINISHED}{secrets.token_hex(4)}", home / f"{PREFIX}{step:012d}"
    made.mkdir()
    try:
        save_file(arrays, made / ARRAYS)
        text = to_json({**manifest, "header": _header_sha256(made / ARRAYS), "leaves": described})
        (made / MANIFEST).write_text(text, encoding="utf-8")
        (made / SUMS).write_text(sums(text), encoding="ascii")
        for name in (ARRAYS, MANIFEST, SUMS, "."):
            _flush(made / name)
        if final.exists():
            final.rename(home / f"{REPLACED}{final.name}")
        made.rename(final)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    _flush(home)
    tidy(home)
    return final


def tidy(home: Path) -> None:
    """Removes what a killed process left half done, and puts back what it had not replaced yet."""
    for old in home.glob(f"{REPLACED}*"):
        final = home / old.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for old in home.glob(f"{UNFINISHED}*"):
        shutil.rmtree(old)


def _leaf(path: str, leaf: Any) -> Leaf:
    name = type(leaf).__name__
    if NUMBERS.get(name) is type(leaf):
        if name == "int" and not -(2**63) <= leaf < 2**63:
            raise ValueError(f"`tree{path}` must fit into 64 bits, got {leaf}.")
        return Leaf(
            path,
            name,
            np.asarray(leaf, {"bool": np.bool_, "int": np.int64, "float": np.float64}[name]),
        )
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Leaf(path, f"key:{jax.random.key_impl(leaf)}", jax.random.key_data(leaf))
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(
            f"`tree{path}` must be an array, a key or a number, got {leaf!r:.80} ({name}). "
            "Put it into `metadata`."
        )
    if leaf.dtype.name not in DTYPES:
        raise TypeError(
            f"`tree{path}` has the dtype {leaf.dtype}, which safetensors has no name for. "
            f"Known: {', '.join(DTYPES)}."
        )
    return Leaf(path, "array", leaf)


def _described(leaf: Leaf, array: np.ndarray) -> dict[str, Any]:
    """What the manifest says of a leaf."""
    digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
    return {
        "path": leaf.path,
        "kind": leaf.kind,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "sha256": digest,
    }


def to_json(content: dict[str, Any]) -> str:
    """JSON, or an error that says what cannot be."""
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must be what JSON can hold: {error}.") from None


@functools.cache
def _versions() -> dict[str, str]:
    found = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "optax", "numpy", "safetensors")
    }
    return {"python": platform.python_version(), **found}


def _topology() -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def sums(manifest: str) -> str:
    """The line of `sha256sum manifest.json`."""
    return f"{hashlib.sha256(manifest.encode()).hexdigest()}  {MANIFEST}\n"


def _header_sha256(file: Path) -> str:
    """Of what stands before the arrays in a safetensors file.

    The header's length in 8 bytes, and the header.
    """
    with file.open("rb") as opened:
        length = opened.read(8)
        return hashlib.sha256(length + opened.read(int.from_bytes(length, "little"))).hexdigest()


def _flush(path: Path) -> None:
    """What was written is on the disk, not on its way."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
