"""What a training measures: `History` for its caller, and the pieces of it while the training goes on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn._types import Array


class History(NamedTuple):
    """What `fit` measured. From `fit_many` every array has a leading axis of nets."""

    loss: Array  # [epochs]: the mean over the epoch's examples, each taken before its step
    step_loss: Array  # [steps]: the loss of every batch
    validation: dict[str, Array]  # [epochs] each: what `evaluate` gives after every epoch; {} without validation data
    records: Any = ()  # a tree of [records, ...]: what `record` gave


class Log(NamedTuple):
    """What was measured so far, in pieces on the host; the lists grow."""

    loss: list[np.ndarray]  # one number for each finished epoch
    validation: list[dict[str, float]]  # of each finished epoch
    step_loss: list[np.ndarray]  # [steps] each; those of the epoch at hand are the last `len(counts)`
    counts: list[np.ndarray]  # [steps] each, of the epoch at hand: what each batch weighs in its mean
    records: list[Any]  # trees of [records, ...]


def empty() -> Log:
    """Nothing yet."""
    return Log([], [], [], [], [])


def steps_at_hand(log: Log) -> int:
    """How many steps of the epoch at hand are done."""
    return sum(map(len, log.counts))


def all_steps(log: Log) -> int:
    """How many steps are done in all."""
    return sum(map(len, log.step_loss))


def add(log: Log, losses: np.ndarray, counts: np.ndarray, records: Any) -> None:
    """Some more steps of the epoch at hand; `records` is None where nothing was recorded."""
    log.step_loss.append(losses)
    log.counts.append(counts)
    if records is not None:
        log.records.append(records)


def end_epoch(log: Log) -> None:
    """Closes the epoch at hand: its loss is the mean over examples."""
    losses, counts = (np.concatenate(pieces) for pieces in (log.step_loss[-len(log.counts) :], log.counts))
    total = counts.sum(dtype=np.float64)
    log.loss.append(np.asarray((losses * (counts / (total or 1))).sum(dtype=np.float64), losses.dtype))
    log.counts.clear()


def to_tree(log: Log) -> dict[str, Any]:
    """The log as arrays, for a checkpoint."""
    validation = {name: np.array([m[name] for m in log.validation]) for name in (log.validation[0] if log.validation else ())}
    joined = {name: np.concatenate(getattr(log, name) or [np.zeros(0, np.float32)]) for name in ("step_loss", "counts")}
    return {"loss": np.array(log.loss), "validation": validation, **joined, "records": jax.tree.leaves(_joined(log.records))}


def from_tree(tree: dict[str, Any], records: Any) -> Log:
    """The log that `to_tree` was given; `records` has the structure of what is recorded."""
    log, k = empty(), len(tree["counts"])
    log.loss.extend(tree["loss"])
    log.validation.extend({name: float(values[e]) for name, values in tree["validation"].items()} for e in range(len(tree["loss"])))
    done = len(tree["step_loss"]) - k
    log.step_loss.extend(piece for piece in (tree["step_loss"][:done], tree["step_loss"][done:]) if len(piece))
    log.counts.extend([tree["counts"]] if k else [])
    log.records.extend([jax.tree.unflatten(jax.tree.structure(records), tree["records"])] if tree["records"] else [])
    return log


def history(log: Log) -> History:
    """The log as `fit` returns it."""
    tree = to_tree(log)
    measured = tree["loss"], tree["step_loss"], tree["validation"], _joined(log.records)
    loss, step_loss, validation, records = jax.tree.map(jnp.asarray, measured)
    return History(loss, step_loss, validation, records)


def _joined(records: list[Any]) -> Any:
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *records) if records else ()
