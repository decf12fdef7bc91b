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
    return (
        np.asarray(multihost_utils.process_allgather(np.array(numbers, np.int32))).max(0).tolist()
    )


def on_host(tree: Any) -> Any:
    """Arrays that span processes as NumPy arrays, whole, in every process; others as they are."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        return np.asarray(
            leaf
            if leaf.is_fully_replicated
            else multihost_utils.process_allgather(leaf, tiled=True)
        )

    return jax.tree.map(whole, tree)
