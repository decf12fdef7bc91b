"""What `fit` needs to save: `Checkpointer`, saves in the background, and signals that stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from fnn import _validate
from fnn.checkpoint import files
from fnn.checkpoint.files import Folder

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Checkpointer:
    """When `fit` saves, where, and what is kept.

    Attributes:
        folder: of this run alone; made if it is not there.
        every: epochs from one checkpoint to the next; the last epoch is saved in any case.
        seconds: a checkpoint within an epoch too, when so much time has passed since the last; None
            for none.
        keep: how many of the newest checkpoints stay.
        best: a metric of `fit`'s callback (`loss`, `validation_loss`, `validation_accuracy`); the
            best epoch is saved, and stays.
        mode: "min" or "max": what the best is; if None, "max" for an accuracy and "min" else.
        wait: whether training waits where a checkpoint is due while another is still being written;
            else it is left out, unless it is the best or the last.
        metadata: whatever JSON can hold, such as the configuration; every manifest has it.
        on_change: what `fit` does with a checkpoint of other settings: "refuse" raises a
            `CheckpointError`, "warn" goes on from it with a warning.

    Raises:
        TypeError, ValueError: a setting is invalid.

    >>> Checkpointer("runs/one", best="validation_accuracy").keep
    3
    """

    folder: Folder
    every: int = 1
    seconds: float | None = 600.0
    keep: int = 3
    best: str | None = None
    mode: str | None = None
    wait: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    on_change: str = "refuse"

    def __post_init__(self) -> None:
        """Raises a TypeError or a ValueError where a setting is invalid."""
        if not isinstance(self.folder, (str, os.PathLike)):
            raise TypeError(f"`folder` must be a path, got {self.folder!r}.")
        files.local(self.folder)
        _validate.positive("every", self.every, whole=True)
        _validate.positive("keep", self.keep, whole=True)
        if self.seconds is not None:
            _validate.positive("seconds", self.seconds)
        if self.mode is not None:
            _validate.one_of("mode", self.mode, ("min", "max"))
        _validate.one_of("on_change", self.on_change, ("refuse", "warn"))
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"`metadata` must be a dict, got {self.metadata!r:.80}.")
        files.to_json(dict(self.metadata))


class Stopped(SystemExit):
    """`fit` was told to stop by SIGTERM or Ctrl-C, and all is saved.

    Where nobody catches it, its message ends the process with code 1.
    """


class Saver:
    """Saves in the background while `fit` runs, one checkpoint after the other.

    Of several processes of one training only the first writes.

    Attributes:
        stop_signal: gives the number of the signal that came; 0 if none did.
    """

    def __init__(
        self, settings: Checkpointer, pool: ThreadPoolExecutor, stop_signal: Callable[[], int]
    ) -> None:
        """Begins the time to the first checkpoint within an epoch."""
        self.stop_signal = stop_signal
        self._settings = settings
        self._pool = pool
        self._home = files.local(settings.folder).absolute()  # wherever the process goes
        self._pending: Future[None] | None = None
        self._last = time.monotonic()

    def save(self, tree: Any, step: int, metadata: dict[str, Any]) -> None:
        """Saves a tree, after the save before; raises its error."""
        self.wait()
        self._last = time.monotonic()
        if jax.process_index() == 0:
            metadata = {**metadata, "metadata": dict(self._settings.metadata)}
            content = files.prepare(tree, step, metadata)
            keep = self._settings.keep
            self._pending = self._pool.submit(_write_and_prune, self._home, keep, *content)

    def wait(self) -> None:
        """Waits for the last save; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def due(self) -> bool:
        """Whether it is time for a checkpoint within an epoch."""
        seconds = self._settings.seconds
        return seconds is not None and time.monotonic() - self._last >= seconds

    def busy(self) -> bool:
        """Whether the last save goes on; raises its error where it failed."""
        if self._pending is not None and self._pending.done():
            self.wait()
        return self._pending is not None


@contextlib.contextmanager
def saving(settings: Checkpointer) -> Iterator[Saver]:
    """Locks the folder, and yields what saves into it; the last save ends with the block."""
    lock = contextlib.nullcontext()
    if jax.process_index() == 0:
        lock = files.alone(files.local(settings.folder).absolute())
    with lock, _stop_signals() as stop_signal:
        with ThreadPoolExecutor(1, "fnn-checkpoint") as pool:
            saver = Saver(settings, pool, stop_signal)
            try:
                yield saver
            finally:
                saver.wait()
        if stop_signal():  # during the last save
            name = signal.Signals(stop_signal()).name
            stop = "stopped after the last epoch; all is saved in"
            raise Stopped(f"{name}: {stop} {settings.folder}.")


def _write_and_prune(home: Path, keep: int, content: dict[str, Any], arrays: list[Any]) -> None:
    files.write(home, content, arrays)
    there = files.checkpoints(home)
    with files.naming(home, "written"):
        for step in [*there][:-keep]:
            if step != content["metadata"]["best_step"]:
                # at once: a half-removed checkpoint is none
                there[step].rename(home / f"{files.UNFINISHED}{there[step].name}")
        files.tidy(home)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the signal that came, or 0; a second one is Python's own."""
    came = [0]
    process = os.getpid()
    before = {}

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def handle(number: int, frame: Any) -> None:
        restore()
        if os.getpid() != process:  # in a worker that was forked, such as a loader's
            return os.kill(os.getpid(), number)
        came[0] = number
        text = "finishing the step and saving; once more to exit at once."
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, f"{signal.Signals(number).name}: {text}\n".encode())

    # only the main thread may ask for signals
    heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    for each in heard:
        if signal.getsignal(each) is not signal.SIG_IGN:
            before[each] = signal.signal(each, handle)
    try:
        yield lambda: came[0]
    finally:
        restore()
