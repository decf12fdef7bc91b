"""Can a small net that sees three characters make up names?

    python -m experiments names

A character-level MLP (Bengio, Ducharme, Vincent, Jauvin 2003): an embedding of the last three
characters, a hidden layer of tanh, and a logit for each of 27 characters; `.` stands before a name
and ends it. It trains on the first names of the US census that the package `names` carries
(`--census last` takes the surnames), or on any text file with a name a line by `--file`. 80 % of
the distinct names train the net, 10 % are for validation and 10 % for the test.

Expect a validation loss of 2.11 nats per character, from 3.30 at the start (ln 27), where counting
pairs of characters gives 2.35, and names such as Merghionne and Chelee; surnames 2.26 against 2.56.
The vowels, not marked in any way, gather in the embedding. Started at a scale of 1 the net comes to
1.99, but the vowels gather less. Takes about 6 seconds, 17 with the surnames.

Source: lecture 002 (generating names and spells).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn.initializers import normal
from names import FILES
from sklearn.decomposition import PCA

import fnn
from experiments._run import (
    COLOURS,
    check_positive,
    figure,
    folder,
    print_table,
    progress,
    save_metrics,
)
from fnn import _validate
from fnn.factors import total

CENSUS = {"first": ("first:female", "first:male"), "last": ("last",)}
CHARACTERS = "." + string.ascii_lowercase
VOWELS = "aeiou"
CONTEXT = 3
LONGEST = 20  # where made-up names are cut off


@dataclass(frozen=True)
class Config:
    file: Path | None = None
    """Text file with a name a line; the census if left out. Names with other characters than a to z
    are left out and counted."""
    census: str = "first"
    """Names of the census: first (5,163) or last (88,799)."""
    embedding: int = 10
    """How many numbers stand for a character, at least 2."""
    embedding_scale: float = 0.1
    """Standard deviation of those numbers at the start. 1 learns faster, but leaves more noise
    between the characters."""
    hidden: int = 200
    """Hidden units."""
    learning_rate: float = 5e-3
    """Adam's step size at the start; it falls to 0 along a cosine."""
    epochs: int = 20
    """Passes over the training characters."""
    batch_size: int = 256
    """Characters per step."""
    samples: int = 20
    """How many names to make up."""
    seed: int = 0
    """Of the split, the parameters, the shuffles and the samples."""
    out: Path | None = None
    """Run folder; runs/names if not given."""


TINY = Config(embedding=4, hidden=16, epochs=2, samples=5)


class Result(NamedTuple):
    """Losses are in nats per character."""

    names: tuple[int, ...]  # in train, validation and test
    left_out: int
    start: float  # validation loss before training
    train_loss: np.ndarray  # [epochs]: the mean of each epoch, during it
    validation_loss: np.ndarray  # [epochs]: after it
    losses: tuple[float, ...]  # train, validation and test, after training
    bigram: tuple[float, ...]  # the same of the bigram model
    embedding: np.ndarray  # [characters, features]
    samples: tuple[str, ...]
    known: int  # how many of the samples are names of the data


def run(config: Config, advance: Callable[[str], Any] = lambda text: None) -> Result:
    """Trains the net and makes up names. `advance(text)` is called after every epoch."""
    check(config)
    names, left_out = read_names(config.file, config.census)
    parts = split(names, config.seed)
    train, validation, _ = data = tuple(map(examples, parts))
    net = make_net(config)
    init_key, fit_key, sample_key = jax.random.split(fnn.key(config.seed), 3)
    params = jax.jit(net.init)(init_key)
    rule = fnn.rules.backprop(net, fnn.losses.softmax_cross_entropy_with_integer_labels)
    start = fnn.evaluate(rule, params, validation)["loss"]
    steps = config.epochs * -(-len(train[1]) // config.batch_size)
    params, history = fnn.fit(
        rule,
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps)),
        params,
        train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        key=fit_key,
        validation=validation,
        callback=lambda epoch, metrics: advance(f"{metrics['loss']:.4f}"),
    )
    losses = tuple(
        fnn.evaluate(rule, params, part, batch_size=min(len(part[1]), 50_000))["loss"]
        for part in data
    )
    counts, bigram = tuple(map(len, parts)), bigram_losses(train, data)
    curves = np.asarray(history.loss), np.asarray(history.validation["loss"])
    samples = make_up(net, params, config.samples, sample_key)
    return Result(
        counts,
        left_out,
        start,
        *curves,
        losses,
        bigram,
        np.asarray(params[0].w),
        samples,
        sum(s in set(names) for s in samples),
    )


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    fnn.key(config.seed)
    _validate.one_of("census", config.census, CENSUS)
    check_positive(config, "embedding", "hidden", "epochs", "batch_size", "samples", whole=True)
    check_positive(config, "learning_rate", "embedding_scale")
    if config.embedding < 2:
        raise ValueError(
            "`embedding` must be at least 2, since the picture shows it in the plane, got "
            f"{config.embedding}."
        )


def read_names(file: Path | None, census: str) -> tuple[list[str], int]:
    """The names in lower case, and how many more there were with other characters than a to z."""
    files = [Path(FILES[kind]) for kind in CENSUS[census]] if file is None else [Path(file)]
    lines = [
        line
        for path in files
        for line in path.read_text(encoding="utf-8", errors="replace").lower().splitlines()
        if line.strip()
    ]
    # name, share, ..., rank
    found = (
        [line.strip() for line in lines]
        if file is not None
        else sorted({line.split()[0] for line in lines})
    )
    names = [name for name in found if set(name) <= set(string.ascii_lowercase)]
    if len(set(names)) < 10:
        raise ValueError(
            "`file` must hold at least 10 distinct names of the letters a to z, one a line; "
            f"{file} has {len(set(names))}."
        )
    return names, len(found) - len(names)


def split(names: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Train, validation and test, 80, 10 and 10 % of the distinct names.

    One that occurs twice is in one part only.
    """
    distinct = sorted(set(names))
    place = dict(
        zip(
            distinct,
            np.random.default_rng(seed).permutation(len(distinct)) / len(distinct),
            strict=True,
        )
    )
    train, validation, test = (
        [name for name in names if low <= place[name] < high]
        for low, high in ((0, 0.8), (0.8, 0.9), (0.9, 1))
    )
    return train, validation, test


def examples(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every character of the names, the final `.` included, and the three before it.

    `(x [characters, 3], t [characters])`.
    """
    texts = ["." * CONTEXT + name + "." for name in names]
    rows = [
        [CHARACTERS.index(c) for c in text[i : i + CONTEXT + 1]]
        for text in texts
        for i in range(len(text) - CONTEXT)
    ]
    table = np.array(rows, np.int32)
    return table[:, :CONTEXT], table[:, CONTEXT]


def flatten(positions: int, features: int) -> fnn.Layer:
    """A layer from `[..., positions, features]` to `[..., positions * features]`.

    Its backward pass is the reshape back.
    """

    def forward(params: Any, x: Any) -> tuple[Any, Any]:
        return x.reshape(*x.shape[:-2], positions * features), ()

    def backward(params: Any, residuals: Any, dy: Any, reduce: Any = total) -> tuple[Any, Any]:
        return (), dy.reshape(*dy.shape[:-1], positions, features)

    return fnn.Layer(f"flatten({positions}, {features})", lambda key: (), forward, backward)


def make_net(config: Config) -> fnn.Layer:
    """From three characters to the logits of the next.

    The small last weights make all about equally likely at first.
    """
    return fnn.serial(
        fnn.embedding(len(CHARACTERS), config.embedding, init=normal(config.embedding_scale)),
        flatten(CONTEXT, config.embedding),
        fnn.dense(CONTEXT * config.embedding, config.hidden),
        fnn.activations.tanh,
        fnn.dense(config.hidden, len(CHARACTERS), kernel_init=normal(0.01)),
    )


def bigram_losses(train: Any, data: Sequence[Any]) -> tuple[float, ...]:
    """Of P(next character | last character), counted on `train`, each pair once more than it
    occurs."""
    counts = np.ones((len(CHARACTERS), len(CHARACTERS)))
    np.add.at(counts, (train[0][:, -1], train[1]), 1)
    p = counts / counts.sum(1, keepdims=True)
    return tuple(float(-np.log(p[x[:, -1], t]).mean()) for x, t in data)


def make_up(net: fnn.Layer, params: Any, count: int, key: Any) -> tuple[str, ...]:
    """Names drawn from the net, character by character."""

    def draw(context: Any, key: Any) -> tuple[Any, Any]:
        drawn = jax.random.categorical(key, net.apply(params, context))
        return jnp.concatenate([context[:, 1:], drawn[:, None]], axis=1), drawn

    start = jnp.zeros((count, CONTEXT), jnp.int32)
    _, drawn = jax.lax.scan(draw, start, jax.random.split(key, LONGEST))
    return tuple(
        "".join(CHARACTERS[c] for c in name).partition(".")[0] for name in np.asarray(drawn).T
    )


def vowel_distances(embedding: np.ndarray) -> tuple[float, float]:
    """The mean distance of a vowel to another vowel, and to a consonant."""
    vowel = np.array([c in VOWELS for c in string.ascii_lowercase])
    distance = np.linalg.norm(embedding[1:, None] - embedding[None, 1:], axis=-1)
    return float(distance[np.ix_(vowel, vowel)].sum() / (vowel.sum() * (vowel.sum() - 1))), float(
        distance[np.ix_(vowel, ~vowel)].mean()
    )


def main(config: Config) -> None:
    """Prints the losses and the names, saves `names.png` and `metrics.json`."""
    check(config)
    path = folder("names", config.out)
    with progress(config.epochs, "training") as advance:
        result = run(config, advance)
    rows = [
        (name, *(f"{loss:.4f}" for loss in losses))
        for name, losses in (("net", result.losses), ("bigrams", result.bigram))
    ]
    print(
        "names: "
        + ", ".join(f"{count:,}" for count in (*result.names, result.left_out))
        + " (train, validation, test, left out)"
    )
    print_table(
        "Loss in nats per character",
        ("", "train", "validation", "test"),
        [("start", "", f"{result.start:.4f}", ""), *rows],
    )
    print(", ".join(name.capitalize() for name in result.samples))
    print(f"{result.known} of these {len(result.samples)} are names of the data")
    to_vowels, to_consonants = vowel_distances(result.embedding)
    print(
        f"mean distance of a vowel to another {to_vowels:.2f}, to a consonant {to_consonants:.2f}"
    )
    draw(path / "names.png", result)
    save_metrics(
        path,
        config,
        {**result._asdict(), "vowel_to_vowel": to_vowels, "vowel_to_consonant": to_consonants},
    )
    print(f"picture and metrics in {path}")


def sentence(result: Result) -> str:
    net, bigram, (to_vowels, to_consonants) = (
        result.losses[1],
        result.bigram[1],
        vowel_distances(result.embedding),
    )
    than, closer = (
        ("better" if net < bigram else "no better"),
        ("closer" if to_vowels < to_consonants else "no closer"),
    )
    return (
        f"The net comes to {net:.2f} nats per character of new names, {than} than the bigram "
        f"model's {bigram:.2f}; vowels lie {closer} to each other than to consonants (mean "
        f"distances {to_vowels:.2f} and {to_consonants:.2f})"
    )


def draw(path: Path, result: Result) -> None:
    """Learning curves beside the bigram model's level.

    The letters' embedding on its first two principal components.
    """
    with figure(path, sentence(result), columns=2, size=(10, 4.4)) as (_, (left, right)):
        epochs = np.arange(len(result.train_loss) + 1)
        left.plot(epochs[1:], result.train_loss, label="train, during the epoch")
        left.plot(epochs, [result.start, *result.validation_loss], label="validation, after it")
        left.axhline(
            result.bigram[1],
            color=COLOURS[-1],
            linestyle="--",
            linewidth=1.2,
            label="bigram model, validation",
        )
        left.set(xlabel="epoch", ylabel="loss (nats per character)")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend()
        pca = PCA(2)
        points, shares = (
            pca.fit_transform(result.embedding[1:]),
            100 * pca.explained_variance_ratio_,
        )
        right.plot(*points.T, linestyle="none")  # sets the limits
        for letter, (x, y) in zip(string.ascii_lowercase, points, strict=True):
            colour = COLOURS[1] if letter in VOWELS else COLOURS[0]
            circle = (
                {"boxstyle": "circle,pad=0.15", "facecolor": "none", "edgecolor": colour}
                if letter in VOWELS
                else None
            )
            right.text(x, y, letter, ha="center", va="center", color=colour, bbox=circle)
        right.set(
            xlabel=f"first component ({shares[0]:.0f} % of the variance)",
            ylabel=f"second component ({shares[1]:.0f} %)",
        )
        right.set_title("embedding of the letters; vowels circled", fontsize=11)
