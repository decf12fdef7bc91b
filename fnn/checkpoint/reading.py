"""Reading a checkpoint, after every byte of it was checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from fnn import _validate
from fnn.checkpoint.layout import (
    ARRAYS,
    FORMAT,
    MANIFEST,
    NUMBERS,
    SUMS,
    CheckpointError,
    Manifest,
    every,
    find,
    number,
)


def restore(folder: str | os.PathLike[str], like: Any, *, step: int | None = None) -> Any:
    """Reads a checkpoint into a tree like another one, after every byte of it was checked.

    Args:
        folder: of a run, or of one checkpoint.
        like: a tree of the same structure, shapes and dtypes; its leaves may be
            `jax.ShapeDtypeStruct`s. What is a `jax.Array` there is put where that one is. A leaf
            `...` stands for an array of any shape and dtype.
        step: which; the newest, if None.

    Returns:
        The tree. Leaves are what they are in `like`: `jax.Array`s, NumPy arrays (for `...` too), or
        Python's numbers.

    Raises:
        CheckpointError: nothing is there, a file is damaged, or the tree is another one; the
            message says what differs, and which older checkpoint is whole.

    >>> import tempfile
    >>> from fnn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, (jax.random.key(3), 5))
    ...     restore(folder, like=(jax.random.key(0), 0))[1]
    5
    """
    path = find(Path(folder), step)
    with _offering_older(path):
        return _rebuilt(path, *_read(path), like)


def manifest(folder: str | os.PathLike[str], *, step: int | None = None) -> Manifest:
    """What a checkpoint says of itself; its arrays are not looked at.

    >>> import tempfile
    >>> from fnn.checkpoint import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(folder, [1.0], step=2, metadata={"epochs": 5})
    ...     manifest(folder).metadata
    {'epochs': 5}
    """
    path = find(Path(folder), step)
    with _offering_older(path):
        return _manifest(path)[0]


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that a run's folder has checkpoints of, oldest first.

    >>> steps("/nowhere")
    []
    """
    return [number(path) for path in every(Path(folder))]


@contextlib.contextmanager
def _offering_older(path: Path) -> Iterator[None]:
    """An error about a checkpoint also says which older one is whole."""
    try:
        yield
    except CheckpointError as error:
        older = next((p for p in reversed(every(path.parent)) if p < path and _is_whole(p)), None)
        if older is None:
            raise
        mend = (
            f"An older one is whole: restore({str(older)!r}, ...); "
            f"or remove {path} to go on from it."
        )
        raise CheckpointError(error.path, f"{error.reason} {mend}") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error}).") from None


def _manifest(path: Path) -> tuple[Manifest, str]:
    """What the manifest says, and the SHA-256 of the arrays' header.

    It is, byte for byte, what was written.
    """
    sums, text = _content(path / SUMS), _content(path / MANIFEST)
    if not re.fullmatch(rb"[0-9a-f]{64}  manifest\.json\n", sums):
        raise CheckpointError(
            path / SUMS,
            f"must have the SHA-256 of {MANIFEST} and nothing else; the file is damaged.",
        )
    if hashlib.sha256(text).hexdigest().encode() != sums[:64]:
        raise CheckpointError(
            path / MANIFEST,
            f"its SHA-256 is not the one in {SUMS}: this file or that one is damaged.",
        )
    try:
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise CheckpointError(
                path / MANIFEST,
                f"its format is {content['format']}; this fnn reads up to {FORMAT}. Update fnn.",
            )
        found = Manifest(
            content["step"],
            content["metadata"],
            content["versions"],
            content["topology"],
            tuple(content["leaves"]),
        )
        return found, content["header"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            path / MANIFEST, f"is none of fnn's ({type(error).__name__}: {error})."
        ) from None


def _read(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest, and the bytes of the leaves by number.

    It checks every byte that it returns, and reads each file once.
    """
    (found, header), content = _manifest(path), _content(path / ARRAYS)
    if hashlib.sha256(content[: 8 + int.from_bytes(content[:8], "little")]).hexdigest() != header:
        raise CheckpointError(
            path / ARRAYS, f"the SHA-256 of its header is not the one in {MANIFEST}."
        )
    try:
        blob = {name: spec["data"] for name, spec in safetensors.deserialize(content)}
    except safetensors.SafetensorError as error:
        raise CheckpointError(path / ARRAYS, f"is no safetensors file ({error}).") from None
    if set(blob) != {str(i) for i in range(len(found.leaves))}:
        raise CheckpointError(path / ARRAYS, f"holds other leaves than {MANIFEST} lists.")
    for i, entry in enumerate(found.leaves):
        if hashlib.sha256(blob[str(i)]).hexdigest() != entry["sha256"]:
            raise CheckpointError(
                path / ARRAYS, f"leaf {entry['path']}: its SHA-256 is not the one in {MANIFEST}."
            )
    return found, blob


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except CheckpointError:
        return False
    return True


def _rebuilt(path: Path, found: Manifest, blob: dict[str, Any], like: Any) -> Any:
    """The tree, after its structure, shapes, dtypes and bytes were compared."""
    wanted = [
        (jax.tree_util.keystr(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(like)
    ]
    here, there = [leaf["path"] for leaf in found.leaves], [p for p, _ in wanted]
    if here != there:
        differ = {
            "only in the checkpoint": [p for p in here if p not in there],
            "only in `like`": [p for p in there if p not in here],
        }
        said = (
            "; ".join(f"{side}: {', '.join(paths[:5])}" for side, paths in differ.items() if paths)
            or "the order differs"
        )
        raise CheckpointError(path / MANIFEST, f"the tree is another one than `like` ({said}).")
    leaves = []
    for i, (entry, (name, leaf)) in enumerate(zip(found.leaves, wanted, strict=True)):
        array = np.frombuffer(blob[str(i)], jnp.dtype(entry["dtype"])).reshape(entry["shape"])
        leaves.append(_as(path, name, entry["kind"], array, leaf))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _as(path: Path, name: str, kind: str, array: np.ndarray, leaf: Any) -> Any:
    """The numbers as what `like` has at that leaf."""
    differs = CheckpointError(
        path / MANIFEST,
        f"leaf {name} is {kind} {array.dtype}{list(array.shape)}, "
        f"but `like` has {_validate.describe(leaf)}.",
    )
    if kind in NUMBERS or type(leaf) in NUMBERS.values():
        if type(leaf) is not NUMBERS.get(kind):
            raise differs
        return NUMBERS[kind](array.item())
    if leaf is ... and kind == "array":
        return array.copy()
    if not hasattr(leaf, "dtype") or kind.startswith("key:") != jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        raise differs
    made = (
        jax.random.wrap_key_data(jnp.asarray(array), impl=kind.removeprefix("key:"))
        if kind != "array"
        else array
    )
    numpy = isinstance(leaf, (np.ndarray, np.generic))
    if (made.shape, made.dtype) != (
        tuple(leaf.shape),
        leaf.dtype.newbyteorder("=") if numpy else leaf.dtype,
    ):
        raise differs
    if numpy:  # a copy, which can be written to; [()] makes a scalar of an array of no axes
        return made.astype(leaf.dtype) if isinstance(leaf, np.ndarray) else made[()]
    # as 0.1 is one: it does not decide on the dtype of what it is multiplied with
    if getattr(leaf, "weak_type", False):
        made = jnp.full(made.shape, leaf.dtype.type(0).item()).at[...].set(made)
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return jnp.asarray(made)
    if leaf.is_fully_addressable or kind == "array":
        return jax.device_put(made, leaf.sharding)
    # on devices of several processes
    return jax.random.wrap_key_data(
        jax.device_put(array, leaf.sharding), impl=kind.removeprefix("key:")
    )
