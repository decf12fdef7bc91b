"""What every experiment shares.

The run folder, `metrics.json`, tables, a progress bar and the style of pictures.

An experiment is one module with
    a docstring      the question; the command; what to expect; how long it takes
    Config           a frozen dataclass, a docstring under every field (the command line's help);
    has `out: Path | None = None`
    TINY             a `Config` that runs in a second or two, for the tests
    check(config)    raises an error that names the first flag that is invalid; called before
    `folder` and by `run`
    run(config)      pure: returns the numbers, and prints and writes nothing
    main(config)     makes `folder(name, config.out)`, runs, prints a table, saves a picture and
    `metrics.json` there
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fnn
from fnn import _validate

# Okabe and Ito (2008), distinct for every kind of colour vision; yellow, too pale for a line on
# white, is left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "font.size": 11,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def folder(name: str, out: Path | None = None) -> Path:
    """The run folder, made if need be: `out`, or `runs/<name>` under the current folder.

    Raises:
        OSError: it cannot be made, or not be written to.
    """
    path = Path("runs") / name if out is None else Path(out)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(
            f"The run folder {path} cannot be written to. Give another one: `--out FOLDER`."
        )
    return path


def check_positive(config: Any, *names: str, whole: bool = False) -> None:
    """Raises a TypeError or ValueError that names the first of these flags that is not above 0.

    Of a tuple, the entry.

    >>> from types import SimpleNamespace
    >>> check_positive(SimpleNamespace(sizes=(8, 0)), "sizes", whole=True)
    Traceback (most recent call last):
    ValueError: `sizes[1]` must be a whole number above 0, got 0.
    """
    for name in names:
        value = getattr(config, name)
        entries = (
            {f"{name}[{i}]": entry for i, entry in enumerate(value)}
            if isinstance(value, tuple)
            else {name: value}
        )
        for label, entry in entries.items():
            _validate.positive(label, entry, whole=whole)


def check_not_negative(config: Any, *names: str) -> None:
    """Raises a ValueError that names the first of these flags that is not a finite number from 0
    on."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(
                f"`{name}` must be a finite number from 0 on, got {getattr(config, name)}."
            )


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises a TypeError or ValueError unless there are seeds, each once, that `fnn.key` takes."""
    if not seeds:
        raise ValueError("`seeds` is empty: give one at least, `--seeds 0`.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"`seeds` has repeats, {seeds}: a seed gives the same net twice. Give each once."
        )
    for seed in seeds:
        fnn.key(seed)


def save_metrics(path: Path, config: Any, results: Any) -> Path:
    """Writes `metrics.json`: the config, the results and the versions that gave them.

    Args:
        path: the run folder.
        config: the experiment's config, a dataclass.
        results: nested mappings, sequences, NamedTuples, dataclasses, arrays and numbers. A number
            that is not finite becomes null, since JSON has none.

    Returns:
        The file's path. It appears whole or not at all.
    """
    content = {"config": jsonable(config), "results": jsonable(results), "versions": versions()}
    file, part = path / "metrics.json", path / "metrics.json.part"
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, file)
    return file


def jsonable(value: Any) -> Any:
    """`value` in terms of dict, list, str, int, float, bool and None.

    >>> jsonable({"loss": np.array([1.5, np.nan]), "out": Path("runs/train")})
    {'loss': [1.5, None], 'out': 'runs/train'}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays, and the scalars of NumPy and JAX
        return jsonable(np.asarray(value).tolist())
    if dataclasses.is_dataclass(value):
        return {
            field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, fnn.History):
            del fields["state"]  # for a training that goes on, no result
        return jsonable(fields)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [jsonable(item) for item in value]
    return str(value)


def versions() -> dict[str, str]:
    """The versions of Python and the libraries that numbers depend on, and the kind of device."""
    libraries = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "optax", "numpy", "scikit-learn")
    }
    return {
        "python": platform.python_version(),
        **libraries,
        "device": jax.devices()[0].device_kind,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column is flush left, the others, numbers, flush right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        # as it is: [0].w and "fnn[privacy]" are no markup
        table.add_row(*(Text(str(cell)) for cell in row))
    # a file or a pipe has room for every column
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def mean_std(values: Sequence[float], digits: int = 4) -> str:
    """The mean and, from two values on, the sample standard deviation.

    >>> mean_std([1.0, 2.0, 3.0], digits=2)
    '2.00 ± 1.00'
    """
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that goes when it is done; nothing where that is no terminal.

    Args:
        total: how many steps there are.
        label: what the bar is called.

    Yields:
        `advance(text)`, to be called after every step with what shall stand beside the bar.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total, text="")
        yield lambda text="": bar.update(task, advance=1, text=text)


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis (`axes.xaxis` or `.yaxis`) that has its data by 0.1, 0.2, 0.5, 1
    and not by powers of ten."""
    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def image(
    axis: Any, pixels: np.ndarray, cmap: str = "gray_r", low: float = 0, high: float = 1
) -> None:
    """Shows a square image, `[pixels]`, on an Axes without ticks."""
    side = math.isqrt(len(pixels))
    axis.imshow(np.reshape(pixels, (side, side)), cmap=cmap, vmin=low, vmax=high)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


@contextlib.contextmanager
def figure(
    path: Path, title: str, columns: int = 1, size: tuple[float, float] = (7.0, 4.0), rows: int = 1
) -> Iterator[tuple[Figure, Any]]:
    """A picture, saved to `path` at 150 dots an inch when the block ends without an error.

    Args:
        path: a .png (or .svg, .pdf) file.
        title: the sentence that the picture shows; wrapped to its width.
        columns: how many axes stand side by side.
        size: width and height in inches.
        rows: how many rows of axes there are.

    Yields:
        `(figure, axes)`: one Axes, or an array of them.
    """
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=size, dpi=150, layout="constrained")
        axes = fig.subplots(rows, columns)
        yield fig, axes
        fig.suptitle(textwrap.fill(title, int(size[0] * 11)), x=0.01, ha="left", fontsize=12)
        fig.savefig(path)
