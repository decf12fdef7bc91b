"""Where the files of a checkpoint are, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
ARRAYS, MANIFEST, SUMS = "arrays.safetensors", "manifest.json", "SHA256SUMS"
PREFIX, UNFINISHED, REPLACED = "step-", ".unfinished-", ".replaced-"
# Python's own; NumPy has types of the same names
NUMBERS = {"bool": bool, "int": int, "float": float}
DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
)


class CheckpointError(ValueError):
    """A checkpoint is damaged, is of another tree, or is not there.

    Attributes:
        path: the file or folder.
        reason: the message without it.
    """

    def __init__(self, path: Path, message: str) -> None:
        """Keeps the path and the reason, and joins them into the message."""
        self.path, self.reason = path, message
        super().__init__(f"{path}: {message}")


class Manifest(NamedTuple):
    """What a checkpoint says of itself."""

    step: int
    metadata: dict[str, Any]
    versions: dict[str, str]
    topology: dict[str, Any]
    # path, kind, shape, dtype and sha256 of each, in the order of the tree
    leaves: tuple[dict[str, Any], ...]


def every(home: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted(
        (
            p
            for p in home.glob(f"{PREFIX}*")
            if p.is_dir() and p.name.removeprefix(PREFIX).isdecimal()
        ),
        key=number,
    )


def find(folder: Path, step: int | None) -> Path:
    """The folder of one checkpoint."""
    if step is None and (folder / MANIFEST).exists():
        return folder
    found = every(folder)
    if step is not None:
        found = [p for p in found if number(p) == step]
    if not found:
        there = ", ".join(map(str, [number(p) for p in every(folder)][-5:])) or "none"
        raise CheckpointError(
            folder,
            f"no checkpoint{'' if step is None else f' of step {step}'} is there; "
            f"steps that are: {there}.",
        )
    return found[-1]


def number(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))
