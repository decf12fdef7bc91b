"""What does every experiment show? All pictures on one page.

    python -m experiments gallery

Runs every experiment with its own settings, two at a time, each in a process of its own, and writes
its picture, its metrics and what it printed into a folder of its own, beside `index.html` (no
network needed) and a contact sheet. What an earlier run left in these folders goes. `benchmark` is
left out, since it needs the machine to itself, and `runs`, which shows what you have trained.
Nothing is downloaded: an experiment that would download has settings of its own for this page,
`GALLERY`. Takes five to eight minutes on two cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import math
import multiprocessing
import os
import shlex
import shutil
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.image import imread

from experiments.__main__ import discover
from experiments._run import figure, folder, print_table, progress, save_metrics
from fnn import _validate

LEFT_OUT = ("benchmark", "gallery", "runs")
# what experiments leave in their folders
WRITTEN = (".png", ".svg", ".json", ".jsonl", ".txt", ".part", "checkpoints", "tensorboard")


@dataclass(frozen=True)
class Config:
    """Which experiments."""

    names: tuple[str, ...] = ()
    """Of experiments; all but benchmark if not given."""
    jobs: int = 2
    """Processes at a time."""
    tiny: bool = False
    """Every experiment with the settings of its test: seconds, and pictures of nothing."""
    out: Path | None = None
    """Run folder; runs/gallery if not given."""


TINY = Config(names=("wide-net-saturation",), tiny=True)


class Shown(NamedTuple):
    """One experiment on the page."""

    name: str
    question: str
    command: str
    seconds: float
    pictures: tuple[str, ...]
    printed: str
    metrics: bool  # whether there are any
    error: str


class Result(NamedTuple):
    """What stands on the page."""

    shown: list[Shown]


def run(config: Config) -> dict[str, str]:
    """The experiments to run, with their questions."""
    check(config)
    known = discover()
    return {
        name: known[name] for name in config.names or known if config.names or name not in LEFT_OUT
    }


def check(config: Config) -> None:
    """Raises a TypeError or ValueError that names the first flag that is invalid."""
    _validate.positive("jobs", config.jobs, whole=True)
    for name in config.names:
        _validate.one_of("experiment", name, [known for known in discover() if known != "gallery"])


def main(config: Config) -> None:
    todo, path = run(config), folder("gallery", config.out)
    shown = []
    with progress(len(todo), "experiments") as advance, ThreadPoolExecutor(config.jobs) as threads:
        waiting = {threads.submit(apart, one, name, path / name, config): name for name in todo}
        for done in as_completed(waiting):
            name = waiting[done]
            shown.append(collect(name, todo[name], path / name, config, *done.result()))
            advance(name)
    shown.sort(key=lambda s: list(todo).index(s.name))
    rows = [
        (s.name, f"{s.seconds:.1f}", s.error.splitlines()[-1] if s.error else s.question)
        for s in shown
    ]
    print_table("Gallery", ("experiment", "seconds", "question"), rows)
    (path / "index.html").write_text(page(shown), encoding="utf-8")
    draw(path / "gallery.png", path, shown)
    save_metrics(path, config, Result([s._replace(printed="") for s in shown]))
    print(f"page, pictures and metrics in {path}: open {path / 'index.html'}")
    if failed := [s.name for s in shown if s.error]:
        raise ValueError(
            f"{len(failed)} of {len(shown)} experiments ended with an error: {', '.join(failed)}. "
            "See output.txt in the folder of each."
        )


def apart(function: Callable[..., str], *arguments: Any) -> tuple[float, str]:
    """Calls a function, which returns its error or "", in a process of its own.

    The seconds it took, and the error.
    """
    start = time.perf_counter()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            error = pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        error = "Its process was killed, perhaps for want of memory."
    return time.perf_counter() - start, error


def one(name: str, out: Path, config: Config) -> str:
    """Runs one experiment in a folder cleared of an earlier run, what it prints in `output.txt`.

    Its error if there was one.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in out.iterdir():
        if file.name in WRITTEN:
            shutil.rmtree(file)
        elif file.suffix in WRITTEN:
            file.unlink()
    error = ""
    with open(out / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        os.environ["COLUMNS"] = "140"  # of the tables
        try:
            module, settings = settings_of(name, config)
            module.main(dataclasses.replace(settings, out=out))
        except Exception:
            error = traceback.format_exc()
            file.write(error)
    return error


def settings_of(name: str, config: Config) -> tuple[Any, Any]:
    """An experiment's module, and the `Config` that the page runs it with."""
    module: Any = importlib.import_module(f"experiments.{name.replace('-', '_')}")
    return module, module.TINY if config.tiny else getattr(module, "GALLERY", module.Config())


def collect(
    name: str, question: str, out: Path, config: Config, seconds: float, error: str
) -> Shown:
    """What one experiment left in its folder."""
    pictures = tuple(sorted(file.name for file in out.glob("*.png")))
    printed = (
        (out / "output.txt").read_text(encoding="utf-8") if (out / "output.txt").exists() else ""
    )
    return Shown(
        name,
        question,
        command(name, config),
        seconds,
        pictures,
        printed,
        (out / "metrics.json").exists(),
        error,
    )


def command(name: str, config: Config) -> str:
    """The command that draws what the page shows.

    The flags are those settings that are not the experiment's own.
    """
    words = ["python -m experiments", name]
    with contextlib.suppress(Exception):  # of an import: the page says so already
        module, settings = settings_of(name, config)
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if value != getattr(module.Config(), field.name):
                values = () if value is True else value if isinstance(value, tuple) else (value,)
                words += [
                    f"--{field.name.replace('_', '-')}",
                    *(shlex.quote(str(v)) for v in values),
                ]
    return " ".join(words)


def page(shown: list[Shown]) -> str:
    """The page: for every experiment its question, command, picture and what it printed."""
    parts = []
    for s in shown:
        pictures = "".join(
            f'<a href="{s.name}/{p}"><img src="{s.name}/{p}" alt="{html.escape(s.question)}"></a>'
            for p in s.pictures
        )
        failed = f"<pre>{html.escape(s.error)}</pre>" if s.error else ""
        numbers = f' · <a href="{s.name}/metrics.json">its numbers</a>' if s.metrics else ""
        parts.append(
            f'<section id="{s.name}"><h2>{html.escape(s.question)}</h2>'
            f"<p><code>{html.escape(s.command)}</code> ({s.seconds:.0f} s){numbers}</p>"
            f"{failed}{pictures}"
            "<details><summary>what it printed</summary>"
            f"<pre>{html.escape(s.printed)}</pre></details></section>"
        )
    index = "".join(f'<li><a href="#{s.name}">{s.name}</a></li>' for s in shown)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        "<title>fnn: the experiments</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}h2{margin-top:3rem}"
        "ul{columns:3;padding-left:1.2rem}pre{overflow-x:auto;font-size:12px}</style>"
        f"<h1>fnn: the experiments</h1><ul>{index}</ul>"
        '<p><a href="gallery.png">All pictures on one sheet</a></p>'
        f"{''.join(parts)}</html>\n"
    )


def draw(file: Path, path: Path, shown: list[Shown]) -> None:
    """A contact sheet: the first picture of every experiment."""
    there = [s for s in shown if s.pictures]
    columns = min(4, max(1, len(there)))
    rows = max(1, math.ceil(len(there) / columns))
    with figure(
        file,
        f"{len(there)} of {len(shown)} experiments drew a picture",
        size=(3.4 * columns, 2.2 * rows + 0.5),
    ) as (fig, axes):
        axes.remove()
        for i, s in enumerate(there):
            panel = fig.add_subplot(rows, columns, i + 1)
            panel.imshow(imread(path / s.name / s.pictures[0]))
            panel.set_title(s.name, fontsize=8)
            panel.axis("off")
