"""How `fit` goes on from a checkpoint, and what it puts into one.

A checkpoint of a training holds the state of parameters, optimiser and rule, the key, and all that
was measured, up to a step of an epoch: what follows is computed from these alone, so that a
training that was stopped gives, bit for bit, what one that was not gives.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import jax
import numpy as np

from fnn import checkpoint
from fnn._processes import greatest, on_host
from fnn.checkpoint import Checkpointer, CheckpointError, Stopped
from fnn.checkpoint.layout import MANIFEST, find
from fnn.checkpoint.running import Saver, saving, sign
from fnn.training import history
from fnn.training.epoch import TrainState
from fnn.training.history import Log
from fnn.types import Key

Keep = Callable[..., None]  # (state, log, metrics=None, last=False, ended=False)


class Begun(NamedTuple):
    """Where a training stands."""

    state: TrainState
    log: Log
    ended: bool  # its callback has stopped it
    keep: Keep  # keeps where it is


def saver_of(checkpointer: Checkpointer | None) -> contextlib.AbstractContextManager[Saver | None]:
    """What saves while the block lasts; None where nothing is saved.

    Raises:
        TypeError: `checkpointer` is none.
    """
    if checkpointer is None:
        return contextlib.nullcontext()
    if not isinstance(checkpointer, Checkpointer):
        raise TypeError(
            f"`checkpoint` must be a `fnn.checkpoint.Checkpointer`, got {checkpointer!r:.80}. "
            "Pass `Checkpointer(folder)`."
        )
    return saving(checkpointer)


def begin(
    checkpointer: Checkpointer | None,
    saver: Saver | None,
    state: TrainState,
    key: Key,
    settings: dict[str, Any],
    epochs: int,
) -> Begun:
    """Where a training goes on.

    A function that is done, and no block, so that nothing holds the first state while others
    follow.

    Args:
        checkpointer: None for a training without checkpoints.
        saver: its `saver_of`.
        state: that before the first step, as it was then.
        key: `fit`'s.
        settings: what must be as it was, by name.
        epochs: `fit`'s.

    Returns:
        `(state, log, ended, keep)`. `keep(state, log)` after some steps saves where it is time;
        `keep(state, log, metrics, last, ended)` after an epoch saves every so many epochs. Both
        save, and raise `Stopped`, where the process was told to stop.

    Raises:
        CheckpointError: what is there is damaged, or is of another training.
    """
    if checkpointer is None or saver is None:
        return Begun(state, Log(), False, lambda *args, **kwargs: None)
    newest = max(checkpoint.steps(checkpointer.folder), default=-1)
    if greatest(newest) != [newest]:
        raise CheckpointError(
            Path(checkpointer.folder),
            "another process sees a newer checkpoint: all must share the folder.",
        )
    keep = _keep(checkpointer, saver, key, settings, newest)
    if newest < 0:
        return Begun(state, Log(), False, keep)
    return Begun(*_restored(checkpointer, state, key, settings, epochs), keep)


def _keep(
    checkpointer: Checkpointer, saver: Saver, key: Key, settings: dict[str, Any], saved: int
) -> Keep:
    """The function that `begin` returns; `saved` is the step of the newest checkpoint."""

    def keep(
        state: TrainState,
        log: Log,
        metrics: dict[str, float] | None = None,
        last: bool = False,
        ended: bool = False,
    ) -> None:
        nonlocal saved
        step, epochs = log.steps, len(log.loss)
        # of all processes, which must do the same
        told, is_time, busy = greatest(saver.told(), saver.due(), saver.busy())
        must = told or last or ended or (metrics is not None and _is_best(checkpointer, log))
        due = is_time if metrics is None else epochs % checkpointer.every == 0
        if (must or (due and (checkpointer.wait or not busy))) and (
            step > saved or metrics is not None
        ):
            numbers = {
                name: value if math.isfinite(value) else None
                for name, value in (metrics or {}).items()
            }
            tree = on_host({"state": state, "key": key, "log": history.to_tree(log)})
            position = {"epoch": epochs, "step_in_epoch": log.at_hand, "ended": ended}
            position |= {
                "measures": [*tree["log"]["validation"]],
                "recorded": len(tree["log"]["records"]),
            }
            saver.save(tree, step, {**position, "metrics": numbers, "settings": settings})
            saved = step
        if told:
            raise Stopped(
                f"{Signals(told).name}: stopped in epoch {epochs} after {log.at_hand} steps of it; "
                f"all is saved in {checkpointer.folder}. The same call goes on from there."
            )

    return keep


def _is_best(checkpointer: Checkpointer, log: Log) -> bool:
    """Whether the epoch that has ended is the best so far by the metric that counts."""
    if checkpointer.best is None:
        return False
    name = checkpointer.best.removeprefix("validation_")
    values = [
        sign(checkpointer) * v
        for v in (log.loss if name == checkpointer.best else [m[name] for m in log.validation])
    ]
    return bool(
        values[-1]
        < min((value for value in values[:-1] if not math.isnan(value)), default=math.inf)
    )


def _restored(
    checkpointer: Checkpointer, state: TrainState, key: Key, settings: dict[str, Any], epochs: int
) -> tuple[TrainState, Log, bool]:
    """Where the newest checkpoint of a run is, if it is of this training."""
    folder = Path(checkpointer.folder)
    path, metadata = find(folder, None), checkpoint.manifest(folder).metadata
    before = metadata.get("settings", {})
    for name in settings.keys() & before.keys() if before else settings:
        if before.get(name) != settings[name]:
            raise _of_another(path, f"`{name}` was {before.get(name)!r} and is {settings[name]!r}")
    done, more = metadata["epoch"], metadata["step_in_epoch"]
    if done + (more > 0) > epochs:
        raise CheckpointError(
            path,
            f"is of {done} epochs and {more} steps, but `epochs` is {epochs}. "
            "Pass more epochs, or another folder.",
        )
    names, leaves = dict.fromkeys(metadata["measures"], ...), [...] * metadata["recorded"]
    log = {"loss": ..., "validation": names, "step_loss": ..., "counts": ..., "records": leaves}
    tree = checkpoint.restore(folder, like={"state": state, "key": key, "log": log})
    if not np.array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(key)):
        raise _of_another(path, "its key was another one")
    return tree["state"], history.from_tree(tree["log"]), metadata["ended"]


def _of_another(path: Path, difference: str) -> CheckpointError:
    return CheckpointError(
        path / MANIFEST,
        f"is of another training: {difference}. Pass what it was begun with, or another folder.",
    )
