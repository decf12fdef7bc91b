"""Several processes of one training, which must all decide alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def greatest(*numbers: int) -> list[int]:
    """Of each number the greatest that any process has.

    The numbers themselves where there is one process.

    >>> greatest(3, 0)
    [3, 0]
    """
    if jax.process_count() == 1:
        return [int(number) for number in numbers]
    gathered = multihost_utils.process_allgather(np.array(numbers, np.int32))
    return np.asarray(gathered).max(0).tolist()


def on_host(tree: Any) -> Any:
    """Arrays that span processes as NumPy arrays, whole, in every process; others as they are."""
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _whole(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
