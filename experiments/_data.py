"""Data sets by name, split into train and test: `load("digits")`.

A new set is one function of the seed and the data folder, and one entry in `LOADERS`, at the end.
`seed` draws or splits; the sets that come split (mnist, fashion-mnist, mnist1d) are the same for
every seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

import fnn
from experiments import _idx
from fnn import _validate


class Dataset(NamedTuple):
    """A data set in NumPy arrays; samples are rows."""

    name: str
    x_train: np.ndarray  # [train, features] float32
    t_train: np.ndarray  # [train] int32 labels, or [train, 1] float32
    x_test: np.ndarray  # [test, features] float32
    t_test: np.ndarray  # [test] int32, or [test, 1] float32
    classes: int  # 0 for regression
    loss: fnn.Loss
    description: str

    @property
    def features(self) -> int:
        """Inputs of a net for these data."""
        return self.x_train.shape[1]

    @property
    def outputs(self) -> int:
        """Outputs of a net for these data: a logit per class, or one number."""
        return self.classes or self.t_train.shape[1]


def load(name: str, *, seed: int = 0, data_dir: Path | None = None) -> Dataset:
    """A data set by name.

    Args:
        name: a key of `LOADERS`.
        seed: of the draw and of the split, 0 ... 2**32 - 1.
        data_dir: for mnist and fashion-mnist, a folder with their IDX files; if None they are
            downloaded. Others do not read it.

    Returns:
        The set; two calls with the same arguments give the same arrays.

    Raises:
        TypeError, ValueError: an unknown name (offers the nearest), a seed out of range, damaged
            files.
        FileNotFoundError, ConnectionError: files that are not there, or cannot be downloaded.

    >>> load("digits").x_train.shape
    (1437, 64)
    """
    _validate.one_of("dataset", name, LOADERS)
    fnn.key(seed)
    return LOADERS[name](seed, data_dir)


def digits(seed: int, data_dir: Path | None) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, scaled to 0 ... 1; 20 % held out."""
    x, t = datasets.load_digits(return_X_y=True)
    return _classification("digits", seed, x / 16, t, "handwritten digits, 8 x 8 pixels")


def moons(seed: int, data_dir: Path | None) -> Dataset:
    """1,000 points on two half circles that reach into each other; 20 % held out."""
    x, t = datasets.make_moons(1000, noise=0.2, random_state=seed)
    return _classification("moons", seed, x, t, "two half circles in the plane")


def spirals(seed: int, data_dir: Path | None) -> Dataset:
    """1,000 noisy points on two arms of a spiral, one and a half turns each; 20 % held out."""
    rng = np.random.default_rng(seed)
    t = np.arange(1000) % 2
    # uniform along the area, so that the outer turns are not thin
    radius = np.sqrt(rng.uniform(0.01, 1, 1000))
    angle = 3 * np.pi * radius + np.pi * t  # the second arm is the first one turned by half a turn
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + rng.normal(
        0, 0.03, (1000, 2)
    )
    return _classification("spirals", seed, x, t, "two arms of a spiral in the plane")


def flower(seed: int, data_dir: Path | None) -> Dataset:
    """400 points on the rose r = 4 sin(4 theta), one half of theta for each class, with noise.

    20 % held out.
    """
    rng = np.random.default_rng(seed)
    t = np.repeat([0, 1], 200)
    theta = np.linspace(0, 2 * np.pi, 400, endpoint=False) + rng.normal(0, 0.2, 400)
    r = 4 * np.sin(4 * theta) + rng.normal(0, 0.2, 400)
    x = r[:, None] * np.stack([np.sin(theta), np.cos(theta)], axis=1)
    return _classification("flower", seed, x, t, "petals of the rose r = 4 sin(4 theta)")


def breast_cancer(seed: int, data_dir: Path | None) -> Dataset:
    """569 tumours, benign or malignant, 30 standardised features; 20 % held out."""
    x, t = datasets.load_breast_cancer(return_X_y=True)
    return _classification(
        "breast-cancer",
        seed,
        x,
        t,
        "tumours, benign or malignant, by 30 features",
        standardise=True,
    )


def diabetes(seed: int, data_dir: Path | None) -> Dataset:
    """442 patients, progression after one year from 10 features, both standardised by the train
    set; 20 % held out."""
    x, t = datasets.load_diabetes(return_X_y=True)
    x_train, x_test, t_train, t_test = train_test_split(
        x, np.reshape(t, (-1, 1)), test_size=0.2, random_state=seed
    )
    (x_train, x_test), (t_train, t_test) = (
        _standardised(x_train, x_test),
        _standardised(t_train, t_test),
    )
    x_train, t_train, x_test, t_test = (
        a.astype(np.float32) for a in (x_train, t_train, x_test, t_test)
    )
    description = "progression of diabetes in a year by 10 features, in standard deviations"
    return Dataset("diabetes", x_train, t_train, x_test, t_test, 0, fnn.losses.l2_loss, description)


def mnist1d(seed: int, data_dir: Path | None) -> Dataset:
    """MNIST-1D: 5,000 noisy curves of 40 numbers in 10 classes, drawn by its package with the
    published seed and split."""
    from mnist1d.data import get_dataset_args, make_dataset  # here, since it brings pyplot along

    # the package seeds both global generators
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return _of_classes(
        "mnist1d",
        (made["x"], made["y"], made["x_test"], made["y_test"]),
        "digits as noisy curves of 40 numbers",
    )


def mnist(seed: int, data_dir: Path | None) -> Dataset:
    """MNIST: handwritten digits of 28 x 28 pixels, scaled to 0 ... 1."""
    return _images("mnist", data_dir, "handwritten digits, 28 x 28 pixels")


def fashion_mnist(seed: int, data_dir: Path | None) -> Dataset:
    """Fashion-MNIST: pieces of clothing in 28 x 28 pixels, scaled to 0 ... 1."""
    return _images("fashion-mnist", data_dir, "pieces of clothing, 28 x 28 pixels")


def _images(name: str, data_dir: Path | None, description: str) -> Dataset:
    folder = _idx.download(name) if data_dir is None else Path(data_dir)
    (x_train, t_train), (x_test, t_test) = (
        _idx.read_images(folder, "train"),
        _idx.read_images(folder, "t10k"),
    )
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{folder}: train images are {x_train.shape[1:]} pixels but test images are "
            f"{x_test.shape[1:]}."
        )
    x_train, x_test = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (x_train, x_test))
    return _of_classes(name, (x_train, t_train, x_test, t_test), description)


def _classification(
    name: str, seed: int, x: Any, t: Any, description: str, standardise: bool = False
) -> Dataset:
    """A split in which every class has the same share of train and test."""
    x_train, x_test, t_train, t_test = train_test_split(
        x, t, test_size=0.2, random_state=seed, stratify=t
    )
    if standardise:
        x_train, x_test = _standardised(x_train, x_test)
    return _of_classes(name, (x_train, t_train, x_test, t_test), description)


def _of_classes(name: str, split: tuple[Any, ...], description: str) -> Dataset:
    x_train, t_train, x_test, t_test = split
    x_train, x_test = x_train.astype(np.float32), x_test.astype(np.float32)
    t_train, t_test = t_train.astype(np.int32), t_test.astype(np.int32)
    classes = int(t_train.max()) + 1
    loss = fnn.losses.softmax_cross_entropy_with_integer_labels
    return Dataset(name, x_train, t_train, x_test, t_test, classes, loss, description)


def _standardised(train: Any, test: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean and the standard deviation of the train columns.

    A constant column becomes zero.
    """
    mean, std = train.mean(0), train.std(0)
    std = np.where(std > 0, std, 1)
    return (train - mean) / std, (test - mean) / std


LOADERS: dict[str, Callable[[int, Path | None], Dataset]] = {
    "digits": digits,
    "moons": moons,
    "spirals": spirals,
    "flower": flower,
    "breast-cancer": breast_cancer,
    "diabetes": diabetes,
    "mnist1d": mnist1d,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}
"""Every data set's loader, `(seed, data_dir) -> Dataset`, by the name that `load` knows it."""
