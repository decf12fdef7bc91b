"""Data sets and IDX files.

Right shapes, same seed same split, and a clear error for everything that can be wrong with a file.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import random
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from experiments import _data, _idx
from experiments._data import load

SMALL = [name for name in _data.LOADERS if name not in _idx.REMOTES]
SHA256 = {
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "train10k-images-idx3-ubyte.gz": (
        "36707bfd63bcc1baf911512db8f40af1940d9fc513cb862f99741a994da05181"
    ),
    "train10k-labels-idx1-ubyte.gz": (
        "ddb336c35d26d6499f325832214cfd852954d037817de7f291d8e80ad0912b32"
    ),
}
load_once = functools.cache(load)


def idx_bytes(array: np.ndarray) -> bytes:
    """An array as an IDX file."""
    code = {np.dtype(dtype).newbyteorder("="): code for code, dtype in _idx.DTYPES.items()}[
        array.dtype
    ]
    return (
        bytes([0, 0, code, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def small_set() -> dict[str, np.ndarray]:
    """A set of 6 train and 4 test images of 3 x 2 pixels, by official file names without .gz."""
    pixels = np.arange(60, dtype=np.uint8).reshape(10, 3, 2)
    labels = np.arange(10, dtype=np.uint8) % 3
    arrays = pixels[:6], labels[:6], pixels[6:], labels[6:]
    return dict(zip((name.removesuffix(".gz") for name in _idx.FILES), arrays, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the four gzipped files of `small_set`."""
    for name, array in small_set().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    return tmp_path


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The address of a loopback server of `folder`, which counts its requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/", requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def right_hashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned hashes become those of `folder`'s files."""
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in _idx.FILES}
    monkeypatch.setitem(_idx.REMOTES, "mnist", _idx.Remote(_idx.REMOTES["mnist"].url, md5))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("dtype", list(_idx.DTYPES.values()))
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3)])
def test_idx_round_trip(tmp_path, dtype, shape, pack):
    array = np.arange(np.prod(shape)).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
    path = tmp_path / "file"
    path.write_bytes(pack(idx_bytes(array)))
    read = _idx.read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


WHOLE = idx_bytes(np.arange(200, dtype=np.uint8).reshape(10, 20))
BAD_FILES = {
    "magic": (b"\x01" + WHOLE[1:], r"expected an IDX file.*got the bytes 01 00 08 02"),
    "dtype code": (b"\0\0\x07" + WHOLE[3:], r"dtype code out of 0x08.*got the bytes 00 00 07 02"),
    "empty": (b"", r"got the bytes \(none\)"),
    "cut in the magic": (WHOLE[:3], "expected an IDX file"),
    "cut in the header": (WHOLE[:9], "header of 12 bytes for 2 axes, got 9"),
    "cut in the values": (WHOLE[:-1], r"expected 200 bytes for shape \(10, 20\) of uint8, got 199"),
    "too long": (WHOLE + b"\0", "expected 200 bytes.*got 201"),
    "axes that no memory holds": (b"\0\0\x0e\x04" + b"\xff" * 16, "bytes for shape.*got 0"),
    "gzip cut off": (
        gzip.compress(WHOLE)[:-20],
        "expected a whole gzip file, got a damaged or cut-off one",
    ),
    "gzip header alone": (gzip.compress(WHOLE)[:5], "expected a whole gzip file"),
    "gzip of bad values": (gzip.compress(WHOLE[:-1]), "expected 200 bytes.*got 199"),
    "gzip checksum": (gzip.compress(WHOLE)[:-8] + bytes(8), "damaged or cut-off.*CRC"),
    "web page": (b"<!DOCTYPE html>", "Is it another file under this name"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_idx_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)train-images-idx3-ubyte.gz: .*{message}"):
        _idx.read_idx(path)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_gzip_file_cut_off_anywhere_is_a_value_error(tmp_path, cut):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(50, dtype=np.uint8)))[:-cut])
    with pytest.raises(ValueError, match=r"file\.gz"):
        _idx.read_idx(path)


def test_images_are_scaled_and_flat(folder):
    data = load("mnist", data_dir=folder)
    assert data.x_train.shape == (6, 6)
    assert data.t_test.shape == (4,)
    np.testing.assert_array_equal(
        data.x_test, np.arange(36, 60, dtype=np.float32).reshape(4, 6) / np.float32(255)
    )


def test_files_may_be_plain_and_partial(folder):
    for path in list(folder.iterdir()):
        path.with_name(path.name.replace("train-", "train6-").removesuffix(".gz")).write_bytes(
            gzip.decompress(path.read_bytes())
        )
        path.unlink()
    assert load("fashion-mnist", data_dir=folder).x_train.shape == (6, 6)


def test_the_official_file_is_preferred(folder):
    (folder / "train3-images-idx3-ubyte.gz").write_bytes(b"not read")
    assert len(load("mnist", data_dir=folder).x_train) == 6


def test_several_partial_files_are_ambiguous(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    for name in ("train3-labels-idx1-ubyte.gz", "train5-labels-idx1-ubyte"):
        (folder / name).write_bytes(path.read_bytes())
    path.unlink()
    with pytest.raises(ValueError, match=r"several files.*train3.*train5.*Keep one"):
        load("mnist", data_dir=folder)


def test_images_and_labels_of_different_counts_are_an_error(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match=r"has 6 images but .* has 5 labels"):
        load("mnist", data_dir=folder)


@pytest.mark.parametrize(
    "array",
    [np.zeros((6, 2), np.uint8), np.zeros(6, np.float32), np.zeros(0, np.uint8)],
    ids=["axes", "dtype", "empty"],
)
def test_labels_must_be_one_axis_of_bytes(folder, array):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match="expected 1 axes of uint8, none empty, got shape"):
        load("mnist", data_dir=folder)


def test_train_and_test_images_must_be_of_one_size(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes(np.zeros((4, 5, 5), np.uint8)))
    with pytest.raises(
        ValueError, match=r"train images are \(3, 2\) pixels but test images are \(5, 5\)"
    ):
        load("mnist", data_dir=folder)


def test_a_missing_file_or_folder_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no t10k labels there, such as t10k-labels-idx1-ubyte\.gz"
    ):
        load("mnist", data_dir=folder)
    with pytest.raises(FileNotFoundError, match="`data_dir` must be a folder"):
        load("mnist", data_dir=folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such file"):
        _idx.read_idx(folder / "nowhere")


@pytest.mark.usefixtures("right_hashes")
def test_a_download_is_kept_and_not_fetched_twice(server, tmp_path):
    url, requests = server
    kept = _idx.download("mnist", url=url, cache=tmp_path / "cache")
    assert load("mnist", data_dir=kept).x_train.shape == (6, 6)
    assert len(requests) == 4
    assert _idx.download("mnist", url=url, cache=tmp_path / "cache") == kept
    assert len(requests) == 4


@pytest.mark.usefixtures("right_hashes")
def test_a_kept_file_that_rotted_is_fetched_again(server, tmp_path):
    url, requests = server
    kept = _idx.download("mnist", url=url, cache=tmp_path / "cache")
    (kept / _idx.FILES[1]).write_bytes(b"rot")
    _idx.download("mnist", url=url, cache=tmp_path / "cache")
    assert requests[4:] == [f"/{_idx.FILES[1]}"]
    assert load("mnist", data_dir=kept).x_train.shape == (6, 6)


@pytest.mark.usefixtures("right_hashes")
def test_load_downloads_from_the_address_in_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FNN_DATA_URL", server[0])
    monkeypatch.setattr(_idx.pooch, "os_cache", lambda project: tmp_path / "cache")
    assert load("mnist").x_test.shape == (4, 6)


def test_other_bytes_than_those_pinned_are_an_error_and_not_kept(server, tmp_path):
    with pytest.raises(
        ValueError, match=r"train-images.*is not the file expected, md5 f68b3c2d.*--data-dir"
    ):
        _idx.download("mnist", url=server[0], cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "mnist").iterdir()) == []


def test_a_file_that_the_server_lacks_is_a_connection_error(server, folder, tmp_path):
    (folder / _idx.FILES[0]).unlink()
    with pytest.raises(ConnectionError, match=r"Cannot download http://127.*404.*--data-dir"):
        _idx.download("mnist", url=server[0], cache=tmp_path / "cache")


def test_an_unreachable_server_is_a_connection_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # bound but not listening: connections are refused, and nobody else gets the port
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(
            ConnectionError, match=rf"Cannot download {url}/train-images.*--data-dir FOLDER"
        ):
            _idx.download("fashion-mnist", url=url, cache=tmp_path)


def test_an_address_without_a_scheme_is_a_connection_error(tmp_path):
    with pytest.raises(ConnectionError, match=r"Cannot download example/train.*FNN_DATA_URL"):
        _idx.download("mnist", url="example", cache=tmp_path)


def test_real_files_are_the_official_ones(shared_data):
    for name, digest in SHA256.items():
        assert hashlib.sha256((shared_data / "mnist" / name).read_bytes()).hexdigest() == digest


def test_real_mnist_loads(shared_data):
    data = load("mnist", data_dir=shared_data / "mnist")
    assert data.x_train.shape == data.x_test.shape == (10_000, 784)
    assert data.x_train.dtype == np.float32
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    assert data.classes == data.outputs == 10
    assert data.t_train[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.t_test[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_set_has_the_right_shapes_and_dtypes(name):
    data = load_once(name)
    assert data.name == name
    assert data.description
    for x, t in ((data.x_train, data.t_train), (data.x_test, data.t_test)):
        assert x.dtype == np.float32
        assert x.shape == (len(t), data.features)
        assert np.isfinite(x).all()
        assert np.isfinite(t).all()
        if data.classes:
            assert t.dtype == np.int32
            assert t.ndim == 1
            assert set(t) == set(range(data.classes))
        else:
            assert t.dtype == np.float32
            assert t.shape == (len(x), data.outputs)
    share = len(data.x_test) / (len(data.x_train) + len(data.x_test))
    assert share == pytest.approx(0.2, abs=2e-3)


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("diabetes", "mnist1d")])
def test_classes_have_the_same_share_of_train_and_test(name):
    data = load_once(name)
    shares = [np.bincount(t, minlength=data.classes) / len(t) for t in (data.t_train, data.t_test)]
    np.testing.assert_allclose(*shares, atol=1 / len(data.t_test))


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_the_set(name):
    data, again, other = load_once(name), load(name), load(name, seed=1)
    for array, same in zip(data[1:5], again[1:5], strict=True):
        np.testing.assert_array_equal(array, same)
    # which is published with its split
    assert np.array_equal(data.x_train, other.x_train) == (name == "mnist1d")


def test_mnist1d_leaves_the_global_generators_alone():
    random.seed(7)
    state, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    load("mnist1d")
    assert random.getstate() == state
    np.testing.assert_array_equal(np.random.get_state()[1], legacy[1])  # noqa: NPY002


@pytest.mark.parametrize("name", ["breast-cancer", "diabetes"])
def test_tables_are_standardised_by_the_train_set(name):
    data = load_once(name)
    np.testing.assert_allclose(data.x_train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(data.x_train.std(0), 1, atol=1e-4)
    assert abs(data.x_test.mean(0)).max() > 1e-2


def test_a_constant_column_becomes_zero():
    train, test = _data._standardised(np.full((4, 1), 3.0), np.full((2, 1), 3.0))
    assert not train.any()
    assert not test.any()


def test_an_unknown_set_offers_the_nearest():
    with pytest.raises(
        ValueError, match=r"Unknown dataset 'digit'. Did you mean 'digits'\?.*fashion-mnist"
    ):
        load("digit")


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_seed_out_of_range_is_an_error(seed, error):
    with pytest.raises(error, match="`seed` must be"):
        load("digits", seed=seed)
