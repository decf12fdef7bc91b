"""What a training measures: `History` for its caller, and a `Log` while it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.types import Array


class History(NamedTuple):
    """What `fit` measured. From `fit_many` every array has a leading axis of nets."""

    loss: Array  # [epochs]: the mean over the epoch's examples, each taken before its step
    step_loss: Array  # [steps]: the loss of every batch
    # [epochs] each: what `evaluate` gives after every epoch; {} without validation data
    validation: dict[str, Array]
    records: Any = ()  # a tree of [records, ...]: what `record` gave
    state: Any = None  # the `TrainState` at the end, for `fit(..., state=)`


@dataclass
class Log:
    """What was measured so far, in pieces on the host; it grows.

    Many nets have an axis after that of steps or records.
    """

    loss: list[np.ndarray] = field(default_factory=list)  # of each finished epoch
    validation: list[dict[str, Any]] = field(default_factory=list)  # of each finished epoch
    # [steps] each; those of the current epoch are the last `len(counts)`
    step_loss: list[np.ndarray] = field(default_factory=list)
    # [steps] each, of the current epoch: what each batch weighs in its mean
    counts: list[np.ndarray] = field(default_factory=list)
    # the leaves of trees of [records, ...]
    records: list[list[np.ndarray]] = field(default_factory=list)
    structure: Any = None  # of these trees, once there was one
    steps: int = 0  # in all
    at_hand: int = 0  # steps of the current epoch


class Length(NamedTuple):
    """How long a training is: one of both is given."""

    epochs: int | None
    steps: int | None

    def __str__(self) -> str:
        """As in a sentence."""
        if self.steps is not None:
            return f"`steps` is {self.steps}"
        return f"`epochs` is {self.epochs}"

    def left(self, log: Log) -> int | None:
        """How many steps are left; None where only epochs count."""
        return None if self.steps is None else self.steps - log.steps

    def is_passed(self, log: Log) -> bool:
        """Whether the log has more than that."""
        if self.steps is not None:
            return log.steps > self.steps
        return self.epochs is not None and len(log.loss) + (log.at_hand > 0) > self.epochs

    def is_over(self, log: Log) -> bool:
        """Whether nothing is left."""
        if self.steps is not None:
            return log.steps >= self.steps
        return self.epochs is not None and len(log.loss) >= self.epochs


def add(log: Log, losses: np.ndarray, counts: np.ndarray, records: Any) -> None:
    """Adds some steps of the current epoch; `records` is None where nothing was recorded."""
    log.step_loss.append(losses)
    log.counts.append(counts)
    log.steps += len(losses)
    log.at_hand += len(losses)
    if records is not None:
        leaves, structure = jax.tree.flatten(records)
        shapes = [a.shape[1:] for a in leaves]
        if log.records and [a.shape[1:] for a in log.records[-1]] != shapes:
            raise ValueError(
                "`record` returns other arrays than it did before in this run, of shapes "
                f"{shapes}. Pass the function that the run began with, or another folder."
            )
        log.structure = structure
        log.records.append(leaves)


def end_epoch(log: Log) -> None:
    """Closes the current epoch: its loss is the mean over examples."""
    losses = np.concatenate(log.step_loss[-len(log.counts) :])
    counts = np.concatenate(log.counts).astype(np.float64)
    total = counts.sum(0)
    shares = counts / np.where(total > 0, total, 1)
    mean = (losses * shares).sum(0, dtype=np.float64)
    log.loss.append(np.asarray(mean, losses.dtype))
    log.counts.clear()
    log.at_hand = 0


def to_tree(log: Log) -> dict[str, Any]:
    """The log as arrays, for a checkpoint."""
    names = log.validation[0] if log.validation else ()
    validation = {name: np.array([m[name] for m in log.validation]) for name in names}
    nothing = [np.zeros(0, np.float32)]
    return {
        "loss": np.array(log.loss),
        "validation": validation,
        "step_loss": np.concatenate(log.step_loss or nothing),
        "counts": np.concatenate(log.counts or nothing),
        "records": [np.concatenate(pieces) for pieces in zip(*log.records, strict=True)],
    }


def from_tree(tree: dict[str, Any]) -> Log:
    """The log that `to_tree` was given, but for the structure of what is recorded."""
    log = Log()
    log.loss.extend(tree["loss"])
    for e in range(len(tree["loss"])):
        row = {name: float(values[e]) for name, values in tree["validation"].items()}
        log.validation.append(row)
    log.steps = len(tree["step_loss"])
    log.at_hand = len(tree["counts"])
    done = log.steps - log.at_hand
    for piece in (tree["step_loss"][:done], tree["step_loss"][done:]):
        if len(piece):
            log.step_loss.append(piece)
    if log.at_hand:
        log.counts.append(tree["counts"])
    if tree["records"]:
        log.records.append(tree["records"])
    return log


def history(log: Log, state: Any = None, *, nets: bool = False) -> History:
    """The log as `fit` returns it.

    Args:
        log: of the training.
        state: at its end.
        nets: whether arrays have an axis of nets, which comes first then.
    """
    tree = to_tree(log)
    records = ()
    if log.records and log.structure is not None:
        records = jax.tree.unflatten(log.structure, tree["records"])
    measured = History(tree["loss"], tree["step_loss"], tree["validation"], records)

    def finish(array):
        return jnp.asarray(np.moveaxis(array, 1, 0) if nets else array)

    return jax.tree.map(finish, measured)._replace(state=state)
