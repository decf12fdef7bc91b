"""Checkpoints of a run that goes on.

Saved in the background, the newest and the best kept, a last one where a signal says stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fnn import _validate
from fnn.checkpoint.layout import PREFIX, UNFINISHED, CheckpointError, every, number
from fnn.checkpoint.reading import manifest
from fnn.checkpoint.writing import Leaf, leaves_of, tidy, to_json, write

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

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

    Raises:
        TypeError, ValueError: a setting is invalid.

    >>> Checkpointer("runs/one", best="validation_accuracy").keep
    3
    """

    folder: str | os.PathLike[str]
    every: int = 1
    seconds: float | None = 600.0
    keep: int = 3
    best: str | None = None
    mode: str | None = None
    wait: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises a TypeError or a ValueError where a setting is invalid."""
        if not isinstance(self.folder, (str, os.PathLike)):
            raise TypeError(f"`folder` must be a path, got {self.folder!r}.")
        _validate.positive("every", self.every, whole=True)
        _validate.positive("keep", self.keep, whole=True)
        if self.seconds is not None:
            _validate.positive("seconds", self.seconds)
        if self.mode is not None:
            _validate.one_of("mode", self.mode, ("min", "max"))
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"`metadata` must be a dict, got {self.metadata!r:.80}.")
        to_json(dict(self.metadata))


class Stopped(SystemExit):
    """`fit` was told to stop by SIGTERM or Ctrl-C, and all is saved.

    Where nobody catches it, its message ends the process with code 1.
    """


class Saver(NamedTuple):
    """What `fit` needs of a `Checkpointer` while it runs."""

    # (tree, step, metadata): in the background, after the one before
    save: Callable[[Any, int, dict[str, Any]], None]
    due: Callable[[], bool]  # whether it is time for a checkpoint within an epoch
    # whether the one before is still being written; raises its error where it failed
    busy: Callable[[], bool]
    told: Callable[[], int]  # the signal that told the process to stop; 0 if none did


@contextlib.contextmanager
def saving(settings: Checkpointer) -> Iterator[Saver]:
    """A folder that is this process's alone, a thread that saves into it, and ears for signals.

    All is written when the block ends.

    Of several processes of one training only the first writes.
    """
    # wherever the process goes
    home, writes = Path(settings.folder).absolute(), jax.process_index() == 0
    with _alone(home) if writes else contextlib.nullcontext(), _stop_signals() as told:
        with _background() as (submit, busy):
            save_soon, due = _saver(settings, home, writes, submit)
            yield Saver(save_soon, due, busy, told)
        if told():  # while the last checkpoint was written
            raise Stopped(
                f"{signal.Signals(told()).name}: stopped after the last epoch; "
                f"all is saved in {settings.folder}."
            )


def _saver(settings: Checkpointer, home: Path, writes: bool, submit: Callable[..., None]) -> Any:
    """`save` and `due` of a `Saver`."""
    last = time.monotonic()

    def save_soon(tree: Any, step: int, metadata: dict[str, Any]) -> None:
        nonlocal last
        last = time.monotonic()
        if writes:
            submit(
                _write_and_prune,
                settings,
                home,
                leaves_of(tree),
                step,
                {**metadata, "metadata": dict(settings.metadata)},
            )

    def due() -> bool:
        return settings.seconds is not None and time.monotonic() - last >= settings.seconds

    return save_soon, due


def _write_and_prune(
    settings: Checkpointer, home: Path, leaves: list[Leaf], step: int, metadata: dict[str, Any]
) -> None:
    write(home, leaves, step, metadata)
    kept = {*every(home)[-settings.keep :], *_best(settings, home)}
    for path in set(every(home)) - kept:
        # at once: a half-removed checkpoint is none
        path.rename(path.with_name(path.name.replace(PREFIX, UNFINISHED)))
    tidy(home)


def sign(settings: Checkpointer) -> int:
    """1 where the best value of the metric is the least, -1 where it is the greatest."""
    return (
        -1
        if (settings.mode or ("max" if (settings.best or "").endswith("accuracy") else "min"))
        == "max"
        else 1
    )


def _best(settings: Checkpointer, home: Path) -> list[Path]:
    """The checkpoint that is best by the metric, the oldest of equals; none without a metric."""
    if settings.best is None:
        return []
    found = []
    for path in every(home):
        value = _metrics(path).get(settings.best)
        if value is not None and math.isfinite(value):
            found.append((sign(settings) * value, number(path), path))
    return [min(found)[-1]] if found else []


def _metrics(path: Path) -> dict[str, Any]:
    try:
        return manifest(path).metadata.get("metrics", {})
    except CheckpointError:  # damaged: it stays until it is among the old ones
        return {}


@contextlib.contextmanager
def _background() -> Iterator[tuple[Callable[..., None], Callable[[], bool]]]:
    """`submit(function, *arguments)`.

    Calls it in another thread, after the one before, whose errors come here; and whether it is
    busy.
    """
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1, "fnn-checkpoint", _step_aside) as pool:

        def submit(function: Callable[..., None], *arguments: Any) -> None:
            while pending:
                pending.pop().result()
            pending.append(pool.submit(function, *arguments))

        def busy() -> bool:
            if pending and pending[0].done():
                pending.pop().result()
            return bool(pending)

        try:
            yield submit, busy
        finally:
            while pending:
                pending.pop().result()


def _step_aside() -> None:
    """This thread takes the time that the training leaves.

    Where the system has no priorities of threads, its share.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


_IN_CHILDREN: list[Callable[[], None]] = []  # what a child that is forked meanwhile must undo


def _undo_in_child() -> None:
    while _IN_CHILDREN:
        _IN_CHILDREN.pop()()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_undo_in_child)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the signal's number, once one came.

    A second one ends the process at once, whatever it is at.
    """
    came: list[int] = []
    # only the main thread may ask for signals
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ear, came), name="fnn-signals", daemon=True)
    listener.start()
    # told at once, and not when XLA returns
    wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    heard = [each for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    handlers = {each: signal.signal(each, lambda *_: None) for each in heard}

    def restore(wakeup: int = wakeup) -> None:
        for each, handler in handlers.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)

    def in_child() -> None:
        restore(-1)
        ear.close()
        mouth.close()

    _IN_CHILDREN.append(in_child)
    try:
        yield lambda: came[0] if came else 0
    finally:
        _IN_CHILDREN.remove(in_child)
        restore()
        mouth.shutdown(socket.SHUT_RDWR)  # what a child has of it does not keep it open
        mouth.close()
        listener.join()
        ear.close()


def _listen(ear: socket.socket, came: list[int]) -> None:
    """Takes down the signals that C's handler tells; exits at the second."""
    while number := ear.recv(1):
        if number[0] in SIGNALS and came:
            os._exit(128 + number[0])
        if number[0] in SIGNALS:
            came.append(number[0])
            with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
                name = signal.Signals(number[0]).name
                print(
                    f"{name}: finishing the step and saving; once more to exit at once.",
                    file=sys.stderr,
                    flush=True,
                )


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Makes the folder, locks it where the system can, and clears it.

    The lock goes with the process, however it ends.
    """
    home.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(home)
    if descriptor is None:
        tidy(home)
        yield
        return

    def close() -> None:
        os.close(descriptor)

    _IN_CHILDREN.append(close)
    try:
        tidy(home)
        yield
    finally:
        _IN_CHILDREN.remove(close)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        close()


def _locked(home: Path) -> int | None:
    """A descriptor of the folder that no other process can have.

    None where the system has no such locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(home, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            home, "another process saves its run here. Wait for it, or choose another folder."
        ) from None
    except OSError:  # some file systems of networks
        os.close(descriptor)
        return None
    return descriptor
