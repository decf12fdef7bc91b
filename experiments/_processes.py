"""Training by several processes at once: who this one is, and what all of them must agree on."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# seconds without a sign of life after which a process is held for dead, and the others end too
HEARTBEAT = 10


def start() -> None:
    """Joins the other processes; before anything else of JAX is used.

    The coordinator's address, how many processes there are, and which this is, come from the
    variables JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID; where none
    of them is set, from SLURM, Open MPI, Kubernetes or a TPU pod, as JAX finds out.

    Raises:
        ValueError: only some of the variables are set, or not to whole numbers; or none is, and JAX
            finds no cluster.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise ValueError(
            f"`distributed`: {', '.join(given)} is set, but not {missing}. Set all three; or none, "
            "on a cluster."
        )
    if not given:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"`distributed`: JAX finds no cluster here ({error}). Set {', '.join(VARIABLES)} "
                "for each process."
            ) from None
        return
    address, count, rank = (given[name] for name in VARIABLES)
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            f"`distributed`: JAX_PROCESS_ID must be in 0 ... JAX_NUM_PROCESSES - 1, got {rank} and "
            f"{count}."
        )
    jax.distributed.initialize(address, int(count), int(rank), heartbeat_timeout_seconds=HEARTBEAT)


def leads() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def same_path(path: Path | None) -> Path:
    """The path that the leading process has."""
    if jax.process_count() == 1 and path is not None:
        return path
    text = np.zeros(4096, np.uint8)
    encoded = os.fsencode(path or "")
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(text))
    return Path(os.fsdecode(told[told > 0].tobytes()))
