"""What does every experiment show? All pictures on one page.

    python -m experiments gallery

Runs every experiment with its own settings, two at a time, each in a process of its own, and writes its picture, its metrics and what it
printed into a folder of its own, beside `index.html` (no network needed) and a contact sheet. `benchmark` is left out: it needs the machine
to itself. Nothing is downloaded: an experiment that would download has settings of its own for this page, `GALLERY`. Takes about five
minutes on two cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import math
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.image import imread

from experiments.__main__ import discover
from experiments._run import figure, folder, print_table, progress, save_metrics
from fnn import _check

LEFT_OUT = ("benchmark", "gallery")


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


TINY = Config(names=("linear-collapse", "zero-initialisation"), tiny=True)


class Shown(NamedTuple):
    """One experiment on the page."""

    name: str
    question: str
    seconds: float
    pictures: tuple[str, ...]
    error: str


class Result(NamedTuple):
    """What stands on the page."""

    shown: list[Shown]


def run(config: Config) -> dict[str, str]:
    """The experiments to run, with their questions."""
    _check.positive("jobs", config.jobs, whole=True)
    known = {name: question for name, question in discover().items() if name != "gallery"}
    for name in config.names:
        _check.one_of("experiment", name, known)
    return {name: known[name] for name in config.names or known if config.names or name not in LEFT_OUT}


def main(config: Config) -> None:
    todo, path = run(config), folder("gallery", config.out)
    shown, environment = [], multiprocessing.get_context("spawn")
    with progress(len(todo), "experiments") as advance, ProcessPoolExecutor(config.jobs, environment, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(one, name, path / name, config): name for name in todo}
        for done in as_completed(waiting):
            seconds, error = done.result()
            name = waiting[done]
            pictures = tuple(sorted(file.name for file in (path / name).glob("*.png")))
            shown.append(Shown(name, todo[name], seconds, pictures, error))
            advance(name)
    shown.sort(key=lambda s: list(todo).index(s.name))
    rows = [(s.name, f"{s.seconds:.1f}", s.error.splitlines()[-1] if s.error else s.question) for s in shown]
    print_table("Gallery", ("experiment", "seconds", "question"), rows)
    (path / "index.html").write_text(page(shown), encoding="utf-8")
    draw(path / "gallery.png", path, shown)
    save_metrics(path, config, Result(shown))
    print(f"page, pictures and metrics in {path}: open {path / 'index.html'}")
    if failed := [s.name for s in shown if s.error]:
        raise ValueError(
            f"{len(failed)} of {len(shown)} experiments ended with an error: {', '.join(failed)}. See output.txt in the folder of each."
        )


def one(name: str, out: Path, config: Config) -> tuple[float, str]:
    """Runs one experiment, what it prints in `output.txt`; the seconds it took, and its error if there was one."""
    out.mkdir(parents=True, exist_ok=True)
    start, error = time.perf_counter(), ""
    with open(out / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        os.environ["COLUMNS"] = "140"  # of the tables
        try:
            module: Any = importlib.import_module(f"experiments.{name.replace('-', '_')}")
            settings = module.TINY if config.tiny else getattr(module, "GALLERY", module.Config())
            module.main(dataclasses.replace(settings, out=out))
        except Exception:
            error = traceback.format_exc()
            file.write(error)
    return time.perf_counter() - start, error


def page(shown: list[Shown]) -> str:
    """The page: for every experiment its question, command, picture and what it printed."""
    parts = []
    for s in shown:
        pictures = "".join(f'<a href="{s.name}/{p}"><img src="{s.name}/{p}" alt="{html.escape(s.question)}"></a>' for p in s.pictures)
        failed = f"<pre>{html.escape(s.error)}</pre>" if s.error else ""
        parts.append(
            f'<section id="{s.name}"><h2>{html.escape(s.question)}</h2>'
            f"<p><code>python -m experiments {s.name}</code> ({s.seconds:.0f} s) · "
            f'<a href="{s.name}/output.txt">what it printed</a> · <a href="{s.name}/metrics.json">its numbers</a></p>'
            f"{failed}{pictures}</section>"
        )
    index = "".join(f'<li><a href="#{s.name}">{s.name}</a></li>' for s in shown)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>fnn: the experiments</title><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}h2{margin-top:3rem}"
        "ul{columns:3;padding-left:1.2rem}</style>"
        f"<h1>fnn: the experiments</h1><ul>{index}</ul>{''.join(parts)}</html>\n"
    )


def draw(file: Path, path: Path, shown: list[Shown]) -> None:
    """A contact sheet: the first picture of every experiment."""
    there = [s for s in shown if s.pictures]
    columns = min(4, max(1, len(there)))
    rows = max(1, math.ceil(len(there) / columns))
    with figure(file, f"{len(there)} of {len(shown)} experiments drew a picture", size=(3.4 * columns, 2.2 * rows + 0.5)) as (fig, axes):
        axes.remove()
        for i, s in enumerate(there):
            panel = fig.add_subplot(rows, columns, i + 1)
            panel.imshow(imread(path / s.name / s.pictures[0]))
            panel.set_title(s.name, fontsize=8)
            panel.axis("off")
