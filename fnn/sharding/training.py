"""What a training needs of a mesh.

Its state where the plan says, before and after every step, and its batches over "data".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fnn.data import epoch_seeds, shuffled_batches
from fnn.sharding.mesh import DATA, size_of
from fnn.sharding.placing import place
from fnn.sharding.plans import Plan, follow, replicated, shardings
from fnn.types import Key, Params


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


def own_batches(
    data: tuple[Any, ...], batch_size: int, key: Key, epochs: int
) -> Callable[[int], Iterator[tuple[Any, ...]]]:
    """The batches of `fit`, of each of which every process takes its own rows alone.

    Args:
        data: `(x, targets)` or `(x, targets, weights)`, arrays `[examples, ...]` on the host, the
            same in every process; such as `numpy.memmap`, of which only the rows that are taken are
            read.
        batch_size: of `fit`, all processes together.
        key: of `fit`; the order of the examples is then the one in which `fit` goes through arrays.
        epochs: of `fit`.

    Returns:
        A function of the epoch, for `fit`'s `data`, that returns an iterator of `(x, targets,
        weights)`.

    >>> batches = own_batches((np.arange(5.0), np.arange(5)), 2, jax.random.key(0), epochs=1)
    >>> [weights.tolist() for x, targets, weights in batches(0)]
    [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]
    """
    seeds, examples = epoch_seeds(jax.random.split(key)[1], epochs + 1), data[0].shape[0]
    each = -(-batch_size // jax.process_count())
    own = slice(jax.process_index() * each, (jax.process_index() + 1) * each)

    def batches(epoch: int) -> Iterator[tuple[Any, ...]]:
        rows, present = shuffled_batches(seeds[epoch], examples, batch_size)
        present = np.ones(rows.shape, np.float32) if present is None else present
        missing = ((0, 0), (0, each * jax.process_count() - batch_size))
        for r, w in zip(
            np.pad(rows, missing)[:, own], np.pad(present, missing)[:, own], strict=True
        ):
            yield data[0][r], data[1][r], w * data[2][r] if len(data) == 3 else w

    return batches
