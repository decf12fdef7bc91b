"""What a training needs of a mesh.

Its state where the plan says, before and after every step, and its batches over "data".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fnn.sharding.mesh import DATA, size_of
from fnn.sharding.placing import place
from fnn.sharding.plans import Plan, follow, replicated, shardings
from fnn.types import Params


class Placement(NamedTuple):
    """A mesh, and where every array of a training's state lies on it.

    Hashable, so that compiled functions are kept by it.
    """

    mesh: Mesh
    structure: Any  # of the state
    leaves: tuple[NamedSharding, ...]

    def out(self, others: int) -> tuple[Any, ...]:
        """`out_shardings` of a function that returns the state and so many other things.

        Every device has the whole of those others.
        """
        return jax.tree.unflatten(self.structure, self.leaves), *[
            NamedSharding(self.mesh, P())
        ] * others


def placed_state(
    mesh: Mesh, plan: Plan | None, params: Params, state: Any
) -> tuple[Any, Placement]:
    """A training's state on the mesh, by the plan of its params."""
    everything = follow(replicated(mesh, params) if plan is None else plan, params, state)
    leaves, structure = jax.tree.flatten(shardings(mesh, everything))
    return place(mesh, state, everything), Placement(mesh, structure, tuple(leaves))


def placed_order(mesh: Mesh, rows: Any, present: Any) -> tuple[Any, Any]:
    """The batches of an epoch, `[steps, batch]` each, split over "data".

    Filled up where that does not divide them.
    """
    missing = -rows.shape[1] % size_of(mesh, DATA)
    if missing:
        present = np.ones(rows.shape, np.float32) if present is None else present
        rows, present = (np.pad(a, ((0, 0), (0, missing))) for a in (rows, present))
    return place(mesh, (rows, present), (P(None, DATA), None if present is None else P(None, DATA)))
