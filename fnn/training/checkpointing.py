"""How `fit` goes on from a checkpoint, and what it puts into one.

A checkpoint of a training holds the state of parameters, optimiser and rule, the key, and all that
was measured, up to a step of an epoch. What follows is computed from these alone, so a training
that was stopped resumes bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn import checkpoint
from fnn._processes import greatest, on_host
from fnn.checkpoint import Checkpointer, CheckpointError, Stopped
from fnn.checkpoint.files import MANIFEST, difference, find, local
from fnn.checkpoint.running import Saver, saving
from fnn.tracing.jaxprs import all_equations, inner_jaxprs
from fnn.training import history
from fnn.training.epoch import TrainState
from fnn.training.history import Length, Log
from fnn.training.optimizers import update_of
from fnn.types import Key, Rule

SAMPLED_BYTES = 2**22  # of an array, for its fingerprint


class Begun(NamedTuple):
    """Where a training stands."""

    state: TrainState
    log: Log
    ended: bool  # its callback has stopped it
    keep: Callable[..., None] | None  # (state, log, metrics=None, last=False, ended=False)


def saver_of(checkpointer: Checkpointer | None) -> contextlib.AbstractContextManager[Saver | None]:
    """What saves while the block lasts; None where nothing is saved.

    Raises:
        TypeError: `checkpointer` is none.
        CheckpointError: the folder cannot be written, or another training saves there.
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
    length: Length,
    choose: Callable[[TrainState], Any] | None = None,
) -> Begun:
    """Where a training goes on.

    A function that returns, not a block, so that nothing holds the first state while others follow.

    Args:
        checkpointer: None for a training without checkpoints.
        saver: its `saver_of`.
        state: that before the first step, as it was then.
        key: `fit`'s.
        settings: what must be as it was, by name, as JSON has it.
        length: of the training.
        choose: `(state) -> params` that `fit` returns, where these are not the state's.

    Returns:
        `(state, log, ended, keep)`. `keep(state, log)` after some steps saves where it is time;
        `keep(state, log, metrics, last, ended)` after an epoch saves every so many epochs. Both
        save, and raise `Stopped`, where the process was told to stop. Where a save failed they
        raise a `CheckpointError`. `keep` is None for a training without checkpoints.

    Raises:
        CheckpointError: what is there is damaged, or is of another training.
    """
    if checkpointer is None or saver is None:
        return Begun(state, Log(), False, None)
    newest = max(checkpoint.steps(checkpointer.folder), default=-1)
    if greatest(newest) != [newest]:
        raise CheckpointError(
            Path(checkpointer.folder),
            "another process sees a newer checkpoint: all must share the folder.",
        )
    digest = hashlib.sha256(np.asarray(jax.random.key_data(key)).tobytes())
    settings = settings | {"key": digest.hexdigest()[:16]}
    log, metadata = Log(), {}
    if newest >= 0:
        state, log, metadata = _restore(checkpointer, state, settings, length, choose)
    best_step = None
    if metadata.get("best") == [checkpointer.best, checkpointer.mode]:
        best_step = metadata["best_step"]
    keep = _keep(checkpointer, saver, settings, newest, best_step, choose)
    return Begun(state, log, metadata.get("ended", False), keep)


def _keep(
    checkpointer: Checkpointer,
    saver: Saver,
    settings: dict[str, Any],
    saved: int,
    best_step: int | None,
    choose: Callable[[TrainState], Any] | None,
) -> Callable[..., None]:
    """The function that `begin` returns; `saved` is the step of the newest checkpoint."""

    def keep(state, log, metrics=None, last=False, ended=False):
        nonlocal saved, best_step
        # of all processes, which must do the same
        stop, due, busy = greatest(saver.stop_signal(), saver.due(), saver.busy())
        final = stop or last or ended
        best = metrics is not None and _is_best(checkpointer, log)
        if best:
            best_step = log.steps
        if metrics is not None:
            due = len(log.loss) % checkpointer.every == 0
        due = due and (checkpointer.wait or not busy)
        if (final or best or due) and (log.steps > saved or metrics is not None):
            saved = log.steps
            tree = {"state": state, "log": history.to_tree(log)}
            if choose is not None:
                tree["result"] = choose(state)
            tree = on_host(tree)
            metadata = {"ended": ended, "settings": settings, "best_step": best_step}
            metadata["best"] = [checkpointer.best, checkpointer.mode]
            saver.save(tree, saved, _position(log, metrics or {}) | metadata)
        if final:
            saver.wait()
        if stop:
            where = f"in epoch {len(log.loss)} after {log.at_hand} steps of it"
            raise Stopped(
                f"{Signals(stop).name}: stopped {where}; all is saved in {checkpointer.folder}. "
                "The same call goes on from there."
            )

    return keep


def _position(log: Log, metrics: dict[str, float]) -> dict[str, Any]:
    """How far a training is, as JSON has it."""
    return {
        "of": "fit",
        "epoch": len(log.loss),
        "step_in_epoch": log.at_hand,
        "measures": [*log.validation[0]] if log.validation else [],
        "recorded": len(log.records[0]) if log.records else 0,
        "metrics": {k: v if math.isfinite(v) else None for k, v in metrics.items()},
    }


def _is_best(checkpointer: Checkpointer, log: Log) -> bool:
    """Whether the epoch that has ended is the best so far by the metric that counts."""
    metric = checkpointer.best
    if metric is None:
        return False
    name = metric.removeprefix("validation_")
    values = log.loss if name == metric else [epoch[name] for epoch in log.validation]
    mode = checkpointer.mode or ("max" if metric.endswith("accuracy") else "min")
    sign = -1 if mode == "max" else 1
    *before, last = [sign * float(value) for value in values]
    return last < min([value for value in before if not math.isnan(value)], default=math.inf)


def _restore(
    checkpointer: Checkpointer,
    state: TrainState,
    settings: dict[str, Any],
    length: Length,
    choose: Callable[[TrainState], Any] | None,
) -> tuple[TrainState, Log, dict[str, Any]]:
    """Where the newest checkpoint of a run is, if it is of this training, and its metadata."""
    path = find(local(checkpointer.folder), None)
    manifest = checkpoint.manifest(path)
    metadata = manifest.metadata
    if metadata.get("of") != "fit":
        raise CheckpointError(path, "is no checkpoint of `fit`. Give each training its own folder.")
    names, leaves = dict.fromkeys(metadata["measures"], ...), [...] * metadata["recorded"]
    parts = {"loss": ..., "validation": names, "step_loss": ..., "counts": ..., "records": leaves}
    like: dict[str, Any] = {"state": state, "log": parts}
    if choose is not None:
        like["result"] = jax.eval_shape(choose, state)
    _check_settings(checkpointer, path, metadata["settings"], settings, difference(manifest, like))
    tree = checkpoint.restore(path, like)
    log = history.from_tree(tree["log"])
    if length.is_passed(log):
        done = f"{len(log.loss)} epochs and {log.at_hand} steps ({log.steps} steps in all)"
        reason = f"is of {done}, but {length}. "
        raise CheckpointError(path, f"{reason}Pass more, or another folder.")
    if metadata["ended"] or length.is_over(log):
        finished = f"{checkpointer.folder}: this run is finished after {log.steps} steps."
        print(f"{finished} Its settings: {metadata['settings']}.", file=sys.stderr)
    return tree["state"], log, metadata


def _check_settings(
    checkpointer: Checkpointer, path: Path, before: dict, settings: dict, differs: str
) -> None:
    """Raises, or warns, where settings changed; `differs` says how the tree did."""
    changed = [  # arrays have more settings than an iterable
        f"`{name}` was {before[name]!r} and is {setting!r}"
        for name, setting in settings.items()
        if before.get(name, setting) != setting
    ]
    if changed and checkpointer.on_change == "warn":
        warnings.warn(f"{path} is of another training: {'; '.join(changed)}.", stacklevel=2)
        changed = []
    if differs:
        changed.append(differs)
    if changed:
        reason = f"is of another training: {'; '.join(changed)}. "
        mend = "Pass what it was begun with, or another folder."
        raise CheckpointError(path / MANIFEST, reason + mend)


# What tells whether a resumed run is the same


def fingerprints(
    rule: Rule, optimizer: optax.GradientTransformation, state: TrainState, batch: tuple[Any, ...]
) -> dict[str, str]:
    """Hashes of the programs of a training's step; equal in every process.

    They change with the net, the loss, the rule, the optimiser, and all numbers in these, such as
    the learning rate and its schedule.

    Args:
        rule: of the training.
        optimizer: of the training.
        state: before the first step.
        batch: `(x, targets)` or `(x, targets, weights)`: arrays, or their shapes and dtypes.

    Returns:
        The hashes of "rule" and "optimizer".

    >>> import fnn
    >>> net, x = fnn.mlp((3, 2)), np.ones((4, 3), np.float32)
    >>> rule = fnn.rules.backprop(net, fnn.losses.l2_loss)
    >>> key, optimizer = jax.random.key(0), optax.sgd(0.1)
    >>> state = fnn.training.init(rule, optimizer, net.init(key), key)
    >>> sorted(fingerprints(rule, optimizer, state, (x, x[:, :2])))
    ['optimizer', 'rule']
    """
    update = update_of(optimizer)

    def updated(grads: Any, optimizer_state: Any, params: Any, value: Any) -> Any:
        return update(grads, optimizer_state, params, value, lambda params, obj_fn=None: value)

    # shapes alone: the place of an array is no part of the program
    params, optimizer_state, rule_state, batch = jax.tree.map(_shape, (*state, batch))
    value, grads, _ = jax.eval_shape(rule.value_and_grad, params, rule_state, *batch)
    scalars = [leaf for leaf in jax.tree.leaves(state.optimizer) if not jnp.ndim(leaf)]
    return {
        "rule": _hash(rule.value_and_grad, params, rule_state, *batch),
        "optimizer": _hash(updated, grads, optimizer_state, params, value, numbers=scalars),
    }


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(array, "weak_type", False)
    return jax.ShapeDtypeStruct(np.shape(array), jnp.result_type(array), weak_type=weak)


def _hash(function: Callable[..., Any], *args: Any, numbers: Iterable[Any] = ()) -> str:
    """Of a function's jaxpr, its constants, and some numbers more."""
    program = jax.make_jaxpr(function)(*args)
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(program)).encode())
    for array in (*_constants(program), *numbers):
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(array) if is_key else array).tobytes())
    return digest.hexdigest()[:16]


def _constants(program: Any) -> Iterator[Any]:
    """The constants of a jaxpr, and of those inside it."""
    yield from program.consts
    for eqn in all_equations(program):
        for inner in inner_jaxprs(eqn):
            yield from getattr(inner, "consts", ())


def data_fingerprint(data: tuple[Any, ...]) -> str:
    """The shapes and dtypes of arrays, and a CRC of rows that are spread over each.

    Args:
        data: arrays `[examples, ...]`, or trees of them.

    Returns:
        One line of text.

    >>> data_fingerprint((np.zeros((5, 2), np.float32), None))
    'float32[5, 2] 0xe9ec3db1'
    """
    return ", ".join(map(_array_fingerprint, jax.tree.leaves(data)))


def _array_fingerprint(array: Any) -> str:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    rows = array.shape[0]
    bytes_of_row = max(1, array.dtype.itemsize * array.size // rows)
    count = min(rows, max(1, SAMPLED_BYTES // bytes_of_row))
    chosen = np.linspace(0, rows - 1, count).astype(int)
    crc = zlib.crc32(np.asarray(array[chosen]).tobytes())
    return f"{array.dtype}{[*array.shape]} {crc:#010x}"
