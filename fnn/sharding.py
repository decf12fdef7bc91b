"""Placement on a mesh of devices: where parameters, optimiser state and batches lie.

A mesh has the axes "data", over which a batch is split, and "model", over which weights are split.
A plan is a tree like the params with a `PartitionSpec` for every array. Print it, edit it:
`(*plan[:-1], plan[-1]._replace(w=P("data", "model")))`. What lies on a mesh runs there under
`jax.jit`. With several processes, every process calls these functions alike.

    mesh = make_mesh(model=2)
    plan = tensor_parallel(mesh, params)
    where = follow(plan, params, state)  # of a `TrainState` of `fnn.training`
    # XLA may move the state unless `out_shardings` says where it stays
    step = jax.jit(step, out_shardings=(shardings(mesh, where), None))
    state, value = step(place(mesh, state, where), *place_batch(mesh, (x, targets)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr
from jaxtyping import Shaped

from fnn import _validate
from fnn.nets.layers import Dense
from fnn.types import Array, ArrayLike, Params

DATA = "data"
MODEL = "model"
Plan = Any  # a tree like the params, with a PartitionSpec for every array
Rows = Shaped[Array, "all_rows ..."]


def make_mesh(
    *, data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes "data" and "model", both of JAX's type Auto.

    Args:
        data: the number of devices that share a batch; None for all devices, divided by `model`.
        model: the number of devices that share the weights.
        devices: `jax.devices()`, if None; the mesh takes the first `data * model` of them.

    Returns:
        A `jax.sharding.Mesh` of shape `[data, model]`.

    Raises:
        TypeError, ValueError: a size is not a whole number above 0, or the devices are too few or,
            where `data` is None, not divided by `model`.

    >>> make_mesh(data=1).axis_names
    ('data', 'model')
    """
    found = jax.devices() if devices is None else devices
    _validate.positive("model", model, whole=True)
    every = data is None
    if every:
        data = max(len(found) // model, 1)
    _validate.positive("data", data, whole=True)
    count = data * model
    if count > len(found) or (every and count < len(found)):
        raise ValueError(
            f"`data` x `model` is {data} x {model} = {count}, but there are {len(found)} devices. "
            "Pass sizes that fit, or try them on a CPU: "
            f"set JAX_NUM_CPU_DEVICES={count} in the environment before Python starts."
        )
    kinds = AxisType.Auto, AxisType.Auto
    return jax.make_mesh((data, model), (DATA, MODEL), kinds, devices=found[:count])


def replicated(mesh: Mesh, params: Params) -> Plan:
    """The plan that puts every array on every device.

    A step sums gradients over "data".

    Args:
        mesh: a mesh of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec()`.

    Raises:
        TypeError, ValueError: `mesh` is no mesh of type Auto, or a leaf is no array.

    >>> replicated(make_mesh(data=1), (jnp.ones((4, 2)),))
    (P(),)
    """
    check_mesh(mesh)
    _validate.is_params(params)
    return jax.tree.map(lambda leaf: P(), params)


def tensor_parallel(mesh: Mesh, params: Params) -> Plan:
    """The plan that splits pairs of dense layers over "model".

    In f(x w_1) w_2 it splits w_1 by columns and w_2 by rows. Only f(x w_1) w_2, and its like in the
    backward pass, are then summed over "model".

    Two `Dense` make a pair if no other `Dense` lies between them in the tree, the second takes as
    many features as the first returns, the mesh axis divides that number, and `repeat` has stacked
    both alike. All other arrays are replicated. A pair that does not follow each other in the net
    gives the same results with more communication: edit the plan.

    Args:
        mesh: a mesh of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec`s.

    Raises:
        TypeError, ValueError: as `replicated`, or the mesh has no axis "model".

    Source: Shoeybi et al. (2019), arXiv:1909.08053, section 3.

    >>> params = Dense(jnp.ones((3, 4)), jnp.ones(4)), Dense(jnp.ones((4, 2)), None)
    >>> tensor_parallel(make_mesh(data=1), params)
    (Dense(w=P(None, 'model'), b=P('model',)), Dense(w=P('model',), b=None))
    """
    check_mesh(mesh, MODEL)
    nodes, tree = jax.tree.flatten(params, is_leaf=_is_dense)
    specs = tree.flatten_up_to(replicated(mesh, params))
    first = None  # the place of a dense layer that has no partner yet
    for i, node in enumerate(nodes):
        if not _is_dense(node):
            continue
        if first is None or not _is_pair(nodes[first], node, mesh.shape[MODEL]):
            first = i
            continue
        stack = [None] * (node.w.ndim - 2)  # the axes of `repeat`
        bias = None if nodes[first].b is None else P(*stack, MODEL)
        specs[first] = Dense(P(*stack, None, MODEL), bias)
        specs[i] = Dense(P(*stack, MODEL), specs[i].b)
        first = None
    return jax.tree.unflatten(tree, specs)


def fully_sharded(mesh: Mesh, params: Params) -> Plan:
    """The plan that splits every array over "data".

    Of the last two axes it splits the longest that the mesh axis divides. It replicates arrays
    without one. It never splits the axes of `repeat`, whose scan takes layer after layer. XLA
    gathers weights or splits products, whichever it finds cheaper.

    Args:
        mesh: a mesh of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec`s.

    Raises:
        TypeError, ValueError: as `replicated`, or the mesh has no axis "data".

    Source: Rajbhandari et al. (2020), arXiv:1910.02054 (ZeRO).

    >>> fully_sharded(make_mesh(data=1), (jnp.ones((2, 4)),))
    (P(None, 'data'),)
    """
    check_mesh(mesh, DATA)
    _validate.is_params(params)
    size = mesh.shape[DATA]

    def split(leaf: Any) -> P:
        last = range(max(leaf.ndim - 2, 0), leaf.ndim)
        axes = [axis for axis in last if leaf.shape[axis] % size == 0]
        if not axes:
            return P()
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return P(*[None] * longest, DATA)

    return jax.tree.map(split, params)


PLANS = (replicated, tensor_parallel, fully_sharded)
"""Every plan by name. The tests run over this tuple."""


def follow(plan: Plan, params: Params, tree: Any) -> Plan:
    """A plan for an optimiser's state, a rule's state or a whole `TrainState`.

    An array that belongs to a parameter lies where the parameter lies. It belongs to the parameter
    whose path ends its own path, if both have one shape: Adam's `[0].mu[1].w` belongs to `[1].w`,
    also where `optax.masked` leaves others out. All other arrays are replicated.

    Args:
        plan: a plan of `params`.
        params: a tree of arrays, or of their shapes.
        tree: a tree of arrays, or of their shapes.

    Returns:
        A tree like `tree` of `PartitionSpec`s.

    Raises:
        TypeError, ValueError: the plan is not one of `params`.

    >>> import optax
    >>> params = (jnp.ones((4, 2)),)
    >>> follow((P("data"),), params, optax.adam(0.1).init(params))[0]
    ScaleByAdamState(count=P(), mu=(P('data',),), nu=(P('data',),))
    """
    known = {path: (leaf.shape, spec) for path, leaf, spec in _rows(params, plan)}

    def spec_of(path: tuple[Any, ...], leaf: Any) -> P:
        for start in range(len(path) + 1):  # the longest end comes first
            if path[start:] in known:
                shape, spec = known[path[start:]]
                return spec if jnp.shape(leaf) == shape else P()
        return P()

    return jax.tree.map_with_path(spec_of, tree)


def shardings(mesh: Mesh, plan: Plan) -> Any:
    """A plan as JAX's `NamedSharding`s, such as for `out_shardings` of `jax.jit`.

    Params that are too large for one device are drawn where they belong, by a plan of
    `jax.eval_shape(net.init, key)`: `jax.jit(net.init, out_shardings=shardings(mesh, plan))(key)`.

    Args:
        mesh: a mesh of `make_mesh`.
        plan: a tree of `PartitionSpec`s.

    Returns:
        A tree like `plan` of `NamedSharding`s.

    Raises:
        TypeError, ValueError: `mesh` is no mesh of type Auto.

    >>> shardings(make_mesh(data=1), (P("data"),))[0].spec
    P('data',)
    """
    check_mesh(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), plan)


def place(mesh: Mesh, params: Params, plan: Plan | None = None) -> Params:
    """The same arrays, laid out on the mesh.

    Args:
        mesh: a mesh of `make_mesh`.
        params: a tree of arrays: parameters, or a whole `TrainState`. With several processes, every
            process has the same.
        plan: a tree like `params` with a `PartitionSpec` for every array; None replicates all.

    Returns:
        A tree like `params` of `jax.Array`s.

    Raises:
        TypeError, ValueError: the plan is not one of `params`, it names an axis that the mesh does
            not have, or it splits an axis that the mesh does not divide.

    >>> place(make_mesh(data=1), (jnp.ones((4, 2)),), (P("data"),))[0].sharding.spec
    P('data',)
    """
    check_mesh(mesh)
    if plan is None:
        plan = replicated(mesh, params)
    for path, leaf, spec in _rows(params, plan):
        _check_spec(mesh, keystr(path), leaf.shape, spec)
    return jax.tree.map(_put, params, shardings(mesh, plan))


def place_batch(
    mesh: Mesh, batch: tuple[Shaped[ArrayLike, "rows ..."], ...]
) -> tuple[Rows, Rows, Rows | None]:
    """A batch split over "data".

    Where the mesh axis does not divide the rows, copies of the first row with weight 0 fill it up.

    Args:
        mesh: a mesh of `make_mesh`.
        batch: `(x, targets)` or `(x, targets, weights)`, arrays `[rows, ...]`. With several
            processes, each passes the rows for its own devices, all the same number.

    Returns:
        `(x, targets, weights)`. Weights are None where the batch has none and needs none; several
        processes always need them.

    Raises:
        TypeError, ValueError: `batch` is no tuple of arrays with one number of rows, above 0.

    >>> x, targets, weights = place_batch(make_mesh(data=1), (jnp.ones((3, 2)), jnp.ones(3)))
    >>> x.shape, x.sharding.spec, weights
    ((3, 2), P('data',), None)
    """
    check_mesh(mesh, DATA)
    _check_batch(batch)
    here = mesh.local_mesh.shape[DATA]  # the parts that lie in this process
    rows = batch[0].shape[0]
    per_part = math.ceil(rows / here)
    x, targets, weights = (*batch, None)[:3]
    if rows % here or jax.process_count() > 1:
        x, targets, weights = padded((x, targets, weights), per_part * here)
    sharding = NamedSharding(mesh, P(DATA))

    def split(part: Any) -> Array:
        shape = per_part * mesh.shape[DATA], *part.shape[1:]
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return split(x), split(targets), None if weights is None else split(weights)


def padded(batch: tuple[Any, Any, Any], batch_size: int) -> tuple[Any, Any, Any]:
    """A batch filled up to `batch_size` by copies of its first row with weight 0.

    Args:
        batch: `(x, targets, weights)`, arrays `[rows, ...]`; x may be a tree, weights None.
        batch_size: at least the number of rows.

    Returns:
        `(x, targets, weights)`, arrays `[batch_size, ...]`.

    Raises:
        ValueError: the batch has more rows.

    >>> padded((np.array([[5.0], [6.0]]), np.array([1, 2]), None), 3)[1:]
    (array([1, 2, 1]), array([1., 1., 0.], dtype=float32))
    """
    x, targets, weights = batch
    rows = targets.shape[0]
    missing = batch_size - rows
    if missing < 0:
        raise ValueError(
            f"A batch has {rows} examples, more than `batch_size` {batch_size}. "
            f"Pass `batch_size={rows}`."
        )
    if weights is None:
        weights = np.ones(rows, np.float32)
    if missing == 0:
        return x, targets, weights
    order = np.pad(np.arange(rows), (0, missing))
    x, targets = jax.tree.map(lambda a: a[order], (x, targets))
    return x, targets, np.pad(np.asarray(weights), (0, missing))


class Placement(NamedTuple):
    """A mesh, and where every array of a training's state lies on it.

    It is hashable: compiled functions are kept by it.
    """

    mesh: Mesh
    structure: Any  # of the state
    leaves: tuple[NamedSharding, ...]

    def out(self, others: int) -> tuple[Any, ...]:
        """`out_shardings` of a function that returns the state and `others` more results.

        Every device has the whole of those results.
        """
        state = jax.tree.unflatten(self.structure, self.leaves)
        return state, *[NamedSharding(self.mesh, P())] * others


def placed_state(
    mesh: Mesh, plan: Plan | None, params: Params, state: Any
) -> tuple[Any, Placement]:
    """A training's state on the mesh, by the plan of its params."""
    if plan is None:
        plan = replicated(mesh, params)
    whole = follow(plan, params, state)
    leaves, structure = jax.tree.flatten(shardings(mesh, whole))
    return place(mesh, state, whole), Placement(mesh, structure, tuple(leaves))


def placed_order(mesh: Mesh, rows: Any, present: Any) -> tuple[Any, Any]:
    """The batches of an epoch, `[steps, batch]` each, split over "data" and filled up."""
    check_mesh(mesh, DATA)
    missing = -rows.shape[1] % mesh.shape[DATA]
    if missing:
        if present is None:
            present = np.ones(rows.shape, np.float32)
        fill = (0, 0), (0, missing)
        rows = np.pad(rows, fill)
        present = np.pad(present, fill)
    batches = rows, present
    return place(mesh, batches, jax.tree.map(lambda leaf: P(None, DATA), batches))


def check_mesh(mesh: Any, *axes: str) -> None:
    """Raises unless `mesh` is a mesh with these axes, all of type Auto.

    The hand-written backward passes name no shardings, which the other types ask for.
    """
    mend = "Make one: `fnn.sharding.make_mesh()`."
    if not isinstance(mesh, Mesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {type(mesh).__name__}. {mend}")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"`mesh` must have axes of type Auto, got {mesh.axis_types} "
            f"(`jax.make_mesh` makes others unless told). {mend}"
        )
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(f"`mesh` must have an axis {axis!r}, got {mesh.axis_names}. {mend}")


def _is_dense(node: Any) -> bool:
    return isinstance(node, Dense)


def _is_pair(first: Dense, second: Dense, size: int) -> bool:
    """Whether two dense layers can be split into `size` parts, by columns and by rows."""
    *stack, _, units = first.w.shape
    return second.w.shape[:-1] == (*stack, units) and units % size == 0


def _rows(params: Params, plan: Plan) -> list[tuple[tuple[Any, ...], Any, P]]:
    """Path, array and spec of every leaf."""
    _validate.is_params(params)
    specs = dict(jax.tree.leaves_with_path(plan))
    rows = []
    for path, leaf in jax.tree.leaves_with_path(params):
        spec = specs.pop(path, None)
        if not isinstance(spec, P):
            raise TypeError(
                f"`plan{keystr(path)}` must be a PartitionSpec, got {spec!r:.80}. "
                "Replicated is `PartitionSpec()`."
            )
        rows.append((path, leaf, spec))
    for path in specs:
        raise ValueError(
            f"`plan{keystr(path)}` stands for no array of `params`. "
            "Edit one of `fnn.sharding.replicated(mesh, params)`."
        )
    return rows


def _check_spec(mesh: Mesh, path: str, shape: tuple[int, ...], spec: P) -> None:
    """Raises unless the mesh can split an array of this shape so."""
    try:
        NamedSharding(mesh, spec).shard_shape(shape)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"`plan{path}` is {spec}, which does not split `params{path}`, shape {tuple(shape)}, "
            f"on a mesh of {dict(mesh.shape)}. To leave an axis whole, put None in its place."
        ) from error


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """`jax.device_put`, also of keys and of arrays on one device where a mesh spans processes."""
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    if sharding.is_fully_addressable or not local:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(np.asarray(leaf), sharding)


def _check_batch(batch: Any) -> None:
    """Raises unless `batch` is a tuple of arrays with a row for every example."""
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise TypeError(
            "`batch` must be a tuple (x, targets) or (x, targets, weights), "
            f"got {type(batch).__name__}."
        )
    for name, part in zip(("x", "targets", "weights"), batch, strict=False):
        _validate.is_array(name, part)
        rows = part.shape[:1]
        if rows in ((), (0,)) or rows != batch[0].shape[:1]:
            raise ValueError(
                f"`{name}` has shape {tuple(part.shape)} and `x` {tuple(batch[0].shape)}; "
                "expected one number of rows, above 0. One example? Pass `x[None]`."
            )
