"""What runs are there, how far are they, and which learned best?

    python -m experiments runs
    python -m experiments runs --names train-001 train-004

Lists the run folders that `train` made, newest last: their data, rule and optimiser, the epochs
that are done, and the test loss and accuracy after the last of them (means over the seeds that have
begun); draws their test losses over each other. A run that was stopped says how to go on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments._run import COLOURS, figure, folder, plain_numbers, print_table, save_metrics
from experiments._runs import CONFIG, read_metrics


@dataclass(frozen=True)
class Config:
    """Which runs."""

    folder: Path = Path("runs")
    """Where the run folders are."""
    names: tuple[str, ...] = ()
    """Of run folders; all if left out."""
    out: Path | None = None
    """For the picture and metrics.json; runs/comparison if left out."""


TINY = Config()


class Run(NamedTuple):
    """One run."""

    name: str
    dataset: str
    rule: str
    optimizer: str
    learning_rate: float
    epochs: int  # of every seed, in the end
    done: int  # epochs, of all seeds
    of: int  # epochs, of all seeds, in the end
    loss: np.ndarray  # [epochs], test loss, the mean over the seeds that have begun
    accuracy: float | None  # after the last of these


def check(config: Config) -> None:
    """Raises a ValueError that names the first run that is not there."""
    there = sorted(file.parent.name for file in config.folder.glob(f"*/{CONFIG}"))
    for name in config.names:
        if name not in there:
            raise ValueError(
                f"`names` must be runs in {config.folder}: {', '.join(there) or 'there are none'}; "
                f"got {name!r}."
            )


def run(config: Config) -> list[Run]:
    """Reads the runs, oldest first."""
    check(config)
    files = sorted(
        config.folder.glob(f"*/{CONFIG}"),
        key=lambda file: (file.stat().st_mtime_ns, file.parent.name),
    )
    return [
        _read(file.parent) for file in files if not config.names or file.parent.name in config.names
    ]


def _read(path: Path) -> Run:
    flags: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))["config"]
    lines = read_metrics(path)
    curves = []
    for name in ("validation_loss", "validation_accuracy"):
        of_seeds = [
            [_number(m[name]) for m in lines if m["seed"] == seed and name in m]
            for seed in flags["seeds"]
        ]
        curves.append(
            [float(np.mean(values)) for values in zip(*filter(None, of_seeds), strict=False)]
        )
    loss, accuracy = curves
    asked = {
        name: flags[name] for name in ("dataset", "rule", "optimizer", "learning_rate", "epochs")
    }
    of = flags["epochs"] * len(flags["seeds"])
    return Run(
        path.name,
        **asked,
        done=len(lines),
        of=of,
        loss=np.array(loss),
        accuracy=accuracy[-1] if accuracy else None,
    )


def _number(value: float | None) -> float:
    """What JSON has as null was not finite."""
    return float("nan") if value is None else value


def main(config: Config) -> None:
    runs = run(config)
    rows = []
    for r in runs:
        reached = (
            f"{r.loss[-1]:.4f}" if len(r.loss) else "-",
            "-" if r.accuracy is None else f"{r.accuracy:.4f}",
        )
        rows.append(
            (
                r.name,
                r.dataset,
                r.rule,
                f"{r.optimizer} {r.learning_rate:g}",
                f"{r.done} of {r.of}",
                *reached,
            )
        )
    print_table(
        f"Runs in {config.folder}",
        ("run", "data", "rule", "optimizer", "epochs", "test loss", "accuracy"),
        rows,
    )
    if not runs:
        print("There are none. Make one: python -m experiments train")
    for r in runs:
        if r.done < r.of:
            print(
                f"{r.name} can go on: python -m experiments train --resume {config.folder / r.name}"
            )
    path = folder("comparison", config.out)
    draw(path / "runs.png", runs)
    print(f"Saved {save_metrics(path, config, runs)} and {path / 'runs.png'}")


def draw(path: Path, runs: list[Run]) -> None:
    """The test losses of all runs."""
    shown = [r for r in runs if len(r.loss)]
    best = min(shown, key=lambda r: r.loss[-1], default=None)
    title = (
        f"{len(shown)} runs: the test loss of {best.name} is the least, {best.loss[-1]:.3f}"
        if best
        else "No run has an epoch yet"
    )
    with figure(path, title) as (_, axis):
        for i, r in enumerate(shown):
            epochs = np.arange(1, len(r.loss) + 1)
            style = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
            axis.plot(
                epochs,
                r.loss,
                style,
                color=COLOURS[i % len(COLOURS)],
                label=f"{r.name}: {r.dataset}, {r.rule}, {r.optimizer}",
                marker="o" if len(epochs) == 1 else None,
            )
        axis.set(xlabel="epoch", ylabel="test loss, mean over seeds")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if shown:
            axis.set(yscale="log")
            plain_numbers(axis.yaxis)
            axis.legend(fontsize=8)
