"""Run folders: a training's `config.json`, `metrics.jsonl`, checkpoints and pictures, so that it
can be found, compared and gone on with.

runs/train-001/config.json            the flags and versions that it began with
               metrics.jsonl          a line for every epoch of every seed, as soon as it is done
               checkpoints/seed-0/    as `fnn.checkpoint` writes them
               tensorboard/seed-0/    event files, where they are asked for
               metrics.json, *.png    at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import _run

CONFIG, METRICS = "config.json", "metrics.jsonl"

Write = Callable[[int, int, dict[str, float]], None]  # (seed, epoch, metrics)


def begin(name: str, config: Any, out: Path | None) -> Path:
    """A folder for a new run, with its config in it.

    `out`, or the first of runs/NAME-001, runs/NAME-002, ... that is not there.

    Raises:
        FileExistsError: `out` holds a run.
        OSError: it cannot be made.
    """
    path = _new(name) if out is None else _run.folder(name, out)
    if (path / CONFIG).exists():
        raise FileExistsError(
            f"{path} holds a run already. Go on with it: --resume {path}. Or choose another "
            "folder: --out FOLDER."
        )
    content = {"experiment": name, "config": _run.jsonable(config), "versions": _run.versions()}
    part = path / f"{CONFIG}.part"
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path / CONFIG)
    return path


def _new(name: str) -> Path:
    """The first of runs/NAME-001, runs/NAME-002, ... that is not there, made.

    No two processes get the same.
    """
    for i in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            path = Path("runs") / f"{name}-{i:03d}"
            path.mkdir(parents=True)
            return path
    raise AssertionError


def config_of(path: Path, kind: type) -> Any:
    """The config, a dataclass, that a run began with.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its config is of another version of the experiment.
    """
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(
            f"`resume` must be a run's folder, got {path}, which has no {CONFIG}. "
            "`python -m experiments runs` lists them."
        )
    flags, hints = (
        json.loads((path / CONFIG).read_text(encoding="utf-8"))["config"],
        typing.get_type_hints(kind),
    )
    if unknown := sorted(set(flags) ^ {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(
            f"{path / CONFIG} is of another version of this experiment: {', '.join(unknown)} "
            "differ. Begin a new run."
        )
    paths = {name for name, hint in hints.items() if hint is Path or Path in typing.get_args(hint)}
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()
    }
    made: Any = {
        name: Path(str(value)) if name in paths and value is not None else value
        for name, value in values.items()
    }
    return kind(**made)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none where there is no file.

    A last line that a killed process half wrote is left out.
    """
    text = (path / METRICS).read_text(encoding="utf-8") if (path / METRICS).exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


@contextlib.contextmanager
def metrics_writer(path: Path, seeds: Sequence[int], tensorboard: bool = False) -> Iterator[Write]:
    """Yields `write(seed, epoch, metrics)`, which adds a line to `metrics.jsonl`, and points to
    event files.

    What an earlier process wrote of epochs that are gone through again is dropped. Seeds are
    trained in the order given.

    Raises:
        ValueError: tensorboardX is missing.
    """
    with contextlib.ExitStack() as stack:
        lines: list[Any] = []  # the file, once it is open
        boards: dict[int, Any] = {}

        def write(seed: int, epoch: int, metrics: dict[str, float]) -> None:
            if not lines:
                earlier = [
                    m
                    for m in read_metrics(path)
                    if (seeds.index(m["seed"]), m["epoch"]) < (seeds.index(seed), epoch)
                ]
                part = path / f"{METRICS}.part"
                part.write_text("".join(json.dumps(m) + "\n" for m in earlier), encoding="utf-8")
                part.replace(path / METRICS)
                lines.append(
                    stack.enter_context(open(path / METRICS, "a", encoding="utf-8", buffering=1))
                )
            lines[0].write(
                json.dumps({"seed": seed, "epoch": epoch, **_run.jsonable(metrics)}) + "\n"
            )
            if tensorboard:
                if seed not in boards:
                    board = _summary_writer()(
                        str(path / "tensorboard" / f"seed-{seed}"), purge_step=epoch
                    )
                    boards[seed] = stack.enter_context(contextlib.closing(board))
                for name, value in metrics.items():
                    boards[seed].add_scalar(name, value, epoch)

        yield write


def check_tensorboard() -> None:
    """Raises a ValueError where tensorboardX is missing."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise ValueError(
            "The package 'tensorboardX' is missing. Install it: pip install -e '.[tensorboard]'."
        ) from None
    return SummaryWriter
