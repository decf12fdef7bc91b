"""What a training measures.

`History` for its caller, and the pieces of it while the training goes on.
"""

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


@dataclass
class Log:
    """What was measured so far, in pieces on the host; it grows."""

    loss: list[np.ndarray] = field(default_factory=list)  # one number for each finished epoch
    validation: list[dict[str, float]] = field(default_factory=list)  # of each finished epoch
    # [steps] each; those of the current epoch are the last `len(counts)`
    step_loss: list[np.ndarray] = field(default_factory=list)
    # [steps] each, of the current epoch: what each batch weighs in its mean
    counts: list[np.ndarray] = field(default_factory=list)
    # the leaves of trees of [records, ...]
    records: list[list[np.ndarray]] = field(default_factory=list)
    structure: Any = None  # of these trees, once there was one
    steps: int = 0  # in all
    at_hand: int = 0  # steps of the current epoch


def add(log: Log, losses: np.ndarray, counts: np.ndarray, records: Any) -> None:
    """Some more steps of the current epoch; `records` is None where nothing was recorded."""
    log.step_loss.append(losses)
    log.counts.append(counts)
    log.steps += len(losses)
    log.at_hand += len(losses)
    if records is not None:
        leaves, log.structure = jax.tree.flatten(records)
        log.records.append(leaves)


def end_epoch(log: Log) -> None:
    """Closes the current epoch: its loss is the mean over examples."""
    losses, counts = (
        np.concatenate(pieces) for pieces in (log.step_loss[-len(log.counts) :], log.counts)
    )
    total = counts.sum(dtype=np.float64)
    log.loss.append(
        np.asarray((losses * (counts / (total or 1))).sum(dtype=np.float64), losses.dtype)
    )
    log.counts.clear()
    log.at_hand = 0


def to_tree(log: Log) -> dict[str, Any]:
    """The log as arrays, for a checkpoint."""
    validation = {
        name: np.array([m[name] for m in log.validation])
        for name in (log.validation[0] if log.validation else ())
    }
    joined = {
        name: np.concatenate(getattr(log, name) or [np.zeros(0, np.float32)])
        for name in ("step_loss", "counts")
    }
    records = [np.concatenate(pieces) for pieces in zip(*log.records, strict=True)]
    return {"loss": np.array(log.loss), "validation": validation, **joined, "records": records}


def from_tree(tree: dict[str, Any]) -> Log:
    """The log that `to_tree` was given, but for the structure of what is recorded."""
    log, k = Log(), len(tree["counts"])
    log.loss.extend(tree["loss"])
    log.validation.extend(
        {name: float(values[e]) for name, values in tree["validation"].items()}
        for e in range(len(tree["loss"]))
    )
    log.steps, log.at_hand = len(tree["step_loss"]), k
    done = log.steps - k
    log.step_loss.extend(
        piece for piece in (tree["step_loss"][:done], tree["step_loss"][done:]) if len(piece)
    )
    log.counts.extend([tree["counts"]] if k else [])
    log.records.extend([tree["records"]] if tree["records"] else [])
    return log


def history(log: Log) -> History:
    """The log as `fit` returns it."""
    tree = to_tree(log)
    records = jax.tree.unflatten(log.structure, tree["records"]) if log.records else ()
    return History(
        *jax.tree.map(jnp.asarray, (tree["loss"], tree["step_loss"], tree["validation"], records))
    )
