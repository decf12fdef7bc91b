"""IDX files, the format of MNIST and its kin.

Read, found in a folder, and downloaded with a pinned hash.

Format: two zero bytes, a dtype code, the number of axes; the length of every axis as a big-endian
uint32; the values in C order, big-endian. Source: http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import requests

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclass(frozen=True)
class Remote:
    """Where a set lies on the web, and the md5 of its files."""

    url: str
    md5: Mapping[str, str]


FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873 d53e105ee54ea40749a09fcbcd1e9432 "
    "9fb629c4189551a2d022fa330f9573f3 ec29112dd5afa0611ce80d1b7f02629c"
)
_FASHION = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d 25c81989df183df01b3e8a0aad5dffbe "
    "bef4ecab320f06d8554ea6380940ec79 bb300cfdad3c16e7a12a480ee83cd310"
)
REMOTES = {
    "mnist": Remote(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        dict(zip(FILES, _MNIST.split(), strict=True)),
    ),
    "fashion-mnist": Remote(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        dict(zip(FILES, _FASHION.split(), strict=True)),
    ),
}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, plain or gzipped.

    Args:
        path: the file; gzip is told by its first bytes, not by its name.

    Returns:
        The array, in the shape and dtype that the header names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no IDX file, of another length than its header says, or a damaged gzip stream.
    """
    content = _contents(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in DTYPES:
        raise ValueError(
            f"{path}: expected an IDX file, which begins with 0, 0, a dtype code out of "
            f"{', '.join(f'0x{code:02x}' for code in DTYPES)}, got the bytes "
            f"{content[:4].hex(' ') or '(none)'}. Is it another file under this name?"
        )
    axes, dtype = content[3], np.dtype(DTYPES[content[2]])
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"{path}: expected a header of {start} bytes for {axes} axes, got {len(content)} "
            "bytes. The file is cut off."
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    expected, got = dtype.itemsize * int(np.prod(shape, dtype=object)), len(content) - start
    if got != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for shape {shape} of {dtype.name}, got {got}. "
            "Fetch the file again."
        )
    return (
        np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    )


def read_images(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split of an MNIST-like set.

    Args:
        folder: holds the set's IDX files, plain or gzipped.
        split: "train" or "t10k".

    Returns:
        `(images [n, height, width] of uint8, labels [n] of uint8)`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or images and labels do not
            belong together.
    """
    image_file, label_file = _find(folder, split, "images"), _find(folder, split, "labels")
    images, labels = read_idx(image_file), read_idx(label_file)
    for file, array, axes in ((image_file, images, 3), (label_file, labels, 1)):
        if array.ndim != axes or array.dtype != np.uint8 or array.size == 0:
            raise ValueError(
                f"{file}: expected {axes} axes of uint8, none empty, got shape {array.shape} of "
                f"{array.dtype}."
            )
    if len(images) != len(labels):
        raise ValueError(
            f"{image_file} has {len(images)} images but {label_file} has {len(labels)} labels. Are "
            "they of one set?"
        )
    return images, labels


def download(name: str, *, url: str | None = None, cache: Path | None = None) -> Path:
    """Fetches the four files of a set, each once.

    They are checked by their md5 then and at every later call.

    Args:
        name: a key of `REMOTES`.
        url: where the files lie; if None, the environment variable FNN_DATA_URL, or the set's usual
            place.
        cache: where to keep them; if None, the user's cache folder.

    Returns:
        The folder with the files.

    Raises:
        ConnectionError: a file cannot be fetched.
        ValueError: what came is not the file that was expected.
    """
    remote = REMOTES[name]
    base = url or os.environ.get("FNN_DATA_URL") or remote.url
    folder = Path(cache or pooch.os_cache("fnn")) / name
    fetch: Any = pooch.HTTPDownloader()
    for file, md5 in remote.md5.items():
        source = f"{base.rstrip('/')}/{file}"
        try:
            pooch.retrieve(source, f"md5:{md5}", file, folder, downloader=fetch)
        except requests.RequestException as error:
            raise ConnectionError(
                f"Cannot download {source} ({type(error).__name__}: {error}). Fetch the files by "
                "other means and pass their folder: --data-dir FOLDER. Another place to download "
                "from? Set FNN_DATA_URL."
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{source} is not the file expected, md5 {md5}: {error} Pass a folder with the "
                "right files: --data-dir FOLDER."
            ) from None
    return folder


def _contents(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, got a damaged or cut-off one of {len(raw)} bytes "
            f"({error}). Fetch it again."
        ) from None


def _find(folder: Path, split: str, kind: str) -> Path:
    """The file of one split.

    The official name if it is there, else the only one such as `train10k-images-idx3-ubyte.gz`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`data_dir` must be a folder, got {folder}, which is none.")
    pattern = rf"{split}.*{kind}[-.]idx\d-ubyte(\.gz)?"
    found = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    official = [path for path in found if re.match(rf"{split}-{kind}", path.name)]
    if not found:
        raise FileNotFoundError(
            f"{folder}: no {split} {kind} there, such as "
            f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz."
        )
    if len(found) > 1 and not official:
        raise ValueError(
            f"{folder}: several files may be the {split} {kind}: "
            f"{', '.join(path.name for path in found)}. Keep one."
        )
    return (official or found)[0]
