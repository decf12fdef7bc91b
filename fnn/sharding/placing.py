"""Onto the mesh: params, state and batches."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fnn import _validate
from fnn.sharding.mesh import DATA, check_mesh, size_of
from fnn.sharding.plans import Plan, planned, replicated, shardings
from fnn.types import Array, Params


def place(mesh: Mesh, params: Params, plan: Plan | None = None) -> Params:
    """The same arrays, laid out on the mesh.

    Args:
        mesh: of `make_mesh`.
        params: a tree of JAX's or NumPy's arrays: parameters, or a whole `TrainState`. With several
            processes each has the same.
        plan: a tree like it with a `PartitionSpec` for every array; None replicates them all.

    Returns:
        A tree like `params` of `jax.Array`s.

    Raises:
        TypeError, ValueError: the plan is not one of `params`, names an axis that the mesh has not,
            or splits what that does not divide.

    >>> import jax.numpy as jnp
    >>> from fnn.sharding import make_mesh
    >>> place(make_mesh(data=1), (jnp.ones((4, 2)),), (P("data"),))[0].sharding.spec
    P('data',)
    """
    check_mesh(mesh)
    plan = replicated(mesh, params) if plan is None else plan
    for path, leaf, spec in planned(params, plan):
        _check_spec(mesh, jax.tree_util.keystr(path), leaf, spec)
    return jax.tree.map(_put, params, shardings(mesh, plan))


def place_batch(mesh: Mesh, batch: tuple[Any, ...]) -> tuple[Array, Array, Array | None]:
    """A batch split over "data".

    Rows of weight 0 fill it up where the mesh axis does not divide it.

    Args:
        mesh: of `make_mesh`.
        batch: `(x, targets)` or `(x, targets, weights)`, arrays `[rows, ...]`. With several
            processes each passes the rows for its own devices, and all pass as many.

    Returns:
        `(x, targets, weights)`. Weights are None where none are given and none needed; with several
        processes they never are.

    Raises:
        TypeError, ValueError: not a tuple of arrays of one length, or no row.

    >>> import jax.numpy as jnp
    >>> from fnn.sharding import make_mesh
    >>> x, targets, weights = place_batch(make_mesh(data=1), (jnp.ones((3, 2)), jnp.ones(3)))
    >>> x.shape, x.sharding.spec, weights
    ((3, 2), P('data',), None)
    """
    size, rows = size_of(mesh, DATA), _check_batch(batch)
    here = mesh.local_mesh.shape[DATA]  # how many of the parts lie in this process
    missing = -rows % here
    x, targets, weights = (*batch, None)[:3]
    if missing or jax.process_count() > 1:
        x, targets, weights = padded((x, targets, weights), rows + missing)
    sharding, total = NamedSharding(mesh, P(DATA)), (rows + missing) // here * size

    def split(part: Any) -> Array:
        return jax.make_array_from_process_local_data(sharding, part, (total, *part.shape[1:]))

    return split(x), split(targets), None if weights is None else split(weights)


def padded(batch: tuple[Any, Any, Any], batch_size: int) -> tuple[Any, Any, Any]:
    """A batch filled up to `batch_size` by copies of its first row with weight 0.

    >>> padded((np.array([[5.0], [6.0]]), np.array([1, 2]), None), 3)[1:]
    (array([1, 2, 1]), array([1., 1., 0.], dtype=float32))
    """
    x, targets, weights = batch
    missing = batch_size - x.shape[0]
    if missing < 0:
        raise ValueError(
            f"A batch has {x.shape[0]} examples, more than `batch_size` {batch_size}. "
            f"Pass `batch_size={x.shape[0]}`."
        )
    weights = np.ones(x.shape[0], np.float32) if weights is None else weights
    if not missing:
        return x, targets, weights
    rows = np.concatenate([np.arange(x.shape[0]), np.zeros(missing, int)])
    return (
        x[rows],
        targets[rows],
        np.where(np.arange(batch_size) < x.shape[0], np.asarray(weights)[rows], 0).astype(
            weights.dtype
        ),
    )


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """`jax.device_put`, also where the mesh spans processes.

    There it takes keys too, and arrays that lie on a device of their own.
    """
    if sharding.is_fully_addressable or not (
        isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    ):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf)
        )
    return jax.device_put(np.asarray(leaf), sharding)


def _check_batch(batch: Any) -> int:
    """Raises unless `batch` is a tuple of arrays with a row for every example; returns how many."""
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        came = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else type(batch).__name__
        raise TypeError(
            f"`batch` must be a tuple (x, targets) or (x, targets, weights), got {came}."
        )
    for name, part in zip(("x", "targets", "weights"), batch, strict=False):
        _validate.is_array(name, part)
        if part.ndim < 1 or part.shape[0] != batch[0].shape[0]:
            shapes = " and ".join(str(tuple(a.shape)) for a in (part, batch[0]))
            raise ValueError(
                f"`{name}` must have a row for each of `x`; their shapes are {shapes}. "
                "One example? Pass `x[None]`."
            )
        if part.shape[0] == 0:
            raise ValueError(
                f"`{name}` is empty, shape {tuple(part.shape)}; expected at least one row."
            )
    return batch[0].shape[0]


def _check_spec(mesh: Mesh, path: str, leaf: Any, spec: P) -> None:
    """Raises unless an array can be split so."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"`params{path}` is a shape and no array. "
            "Draw them: `jax.jit(net.init, out_shardings=shardings(mesh, plan))(key)`."
        )
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"`plan{path}` is {spec}, for {len(spec)} axes, "
            f"but `params{path}` has shape {tuple(leaf.shape)}."
        )
    for axis, names in enumerate(spec):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        unknown = next((name for name in names if name not in mesh.shape), None)
        if unknown is not None:
            raise ValueError(
                f"`plan{path}` is {spec}, but `mesh` has no axis {unknown!r}. "
                f"Its axes: {', '.join(mesh.axis_names)}."
            )
        parts = math.prod(mesh.shape[name] for name in names)
        if leaf.shape[axis] % parts:
            split = (
                f"axis {axis} of `params{path}`, shape {tuple(leaf.shape)}, "
                f"does not divide into {parts} parts"
            )
            raise ValueError(
                f"`plan{path}` is {spec}, but {split}. Leave it whole: put None in its place."
            )
