"""Plans: trees like the params with a `PartitionSpec` for every array.

- `replicated`: every device has all parameters. Gradients are summed over "data".
- `tensor_parallel`: in f(x w_1) w_2 it splits w_1 by columns and w_2 by rows, which splits the
  hidden layer. Only f(x w_1) w_2, and its like in the backward pass, are summed over "model".
  Shoeybi et al. (2019), arXiv:1909.08053.
- `fully_sharded`: every parameter is split over "data", and the optimiser state follows.
  Rajbhandari et al. (2020), arXiv:1910.02054 (ZeRO). XLA may split products in the place of
  gathering weights; `gathered` leaves it no choice.

A plan is edited like any tree: `(*plan[:-1], plan[-1]._replace(w=P("data", "model")))`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fnn import _validate
from fnn.nets.layers import Dense
from fnn.sharding.mesh import DATA, MODEL, check_mesh, size_of
from fnn.types import Params

Plan = Any  # a tree like the params, with a PartitionSpec for every array


def replicated(mesh: Mesh, params: Params) -> Plan:
    """The plan by which every device has everything.

    Args:
        mesh: of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec()`.

    >>> from fnn.sharding import make_mesh
    >>> replicated(make_mesh(data=1), (jnp.ones((4, 2)),))
    (P(),)
    """
    check_mesh(mesh)
    _validate.is_params(params)
    return jax.tree.map(lambda leaf: P(), params)


def tensor_parallel(mesh: Mesh, params: Params) -> Plan:
    """The plan that splits dense layers two by two over "model".

    It splits the first of each pair by columns and the second by rows.

    Two `Dense` that follow each other in the tree are such a pair where the outputs of the first
    are as many as the inputs of the second, the mesh axis divides them, and `repeat` has stacked
    both alike. All else is replicated: a dense layer without a partner, norms, embeddings. A pair
    that does not follow each other in the net itself is as right, but takes more communication:
    edit the plan.

    Args:
        mesh: of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec`s.

    Source: Shoeybi et al. (2019), arXiv:1909.08053, section 3.

    >>> from fnn.sharding import make_mesh
    >>> params = Dense(jnp.ones((3, 4)), jnp.ones(4)), Dense(jnp.ones((4, 2)), None)
    >>> tensor_parallel(make_mesh(data=1), params)
    (Dense(w=P(None, 'model'), b=P('model',)), Dense(w=P('model',), b=None))
    """
    size = size_of(mesh, MODEL)
    nodes, tree = jax.tree.flatten(params, is_leaf=lambda node: isinstance(node, Dense))
    specs = [replicated(mesh, node) for node in nodes]
    dense = [i for i, node in enumerate(nodes) if isinstance(node, Dense)]
    while len(dense) > 1:
        first, second = dense[:2]
        paired = _are_paired(nodes[first], nodes[second], size)
        if paired:
            layers = (None,) * (nodes[first].w.ndim - 2)  # the axes of `repeat`
            specs[first] = Dense(
                P(*layers, None, MODEL), None if nodes[first].b is None else P(*layers, MODEL)
            )
            specs[second] = specs[second]._replace(w=P(*layers, MODEL))
        dense = dense[2 if paired else 1 :]
    return jax.tree.unflatten(tree, specs)


def fully_sharded(mesh: Mesh, params: Params) -> Plan:
    """The plan that splits every array over "data".

    It splits the longer of those of the last two axes that the mesh axis divides. It replicates
    arrays without one. It never splits the axes of `repeat`, whose scan takes layer by layer.

    Args:
        mesh: of `make_mesh`.
        params: a tree of arrays, or of their shapes by `jax.eval_shape`.

    Returns:
        A tree like `params` of `PartitionSpec`s.

    Source: Rajbhandari et al. (2020), arXiv:1910.02054.

    >>> from fnn.sharding import make_mesh
    >>> fully_sharded(make_mesh(data=1), (jnp.ones((2, 4)),))
    (P(None, 'data'),)
    """
    size = size_of(mesh, DATA)
    _validate.is_params(params)

    def spec(leaf: Any) -> P:
        axes = [a for a in range(max(leaf.ndim - 2, 0), leaf.ndim) if leaf.shape[a] % size == 0]
        return P(*(None,) * max(axes, key=lambda a: leaf.shape[a]), DATA) if axes else P()

    return jax.tree.map(spec, params)


PLANS = (replicated, tensor_parallel, fully_sharded)
"""Every plan there is by name: the tests run over this tuple."""


def follow(plan: Plan, params: Params, tree: Any) -> Plan:
    """A plan for an optimiser's state, a rule's state or a whole `TrainState`.

    What belongs to a parameter lies where it lies.

    An array belongs to the parameter whose path its own path ends with, if the two have one shape:
    Adam's `[0].mu[1].w` to `[1].w`, also where `optax.masked` leaves others out. Keys, counts and
    arrays of other shapes are replicated.

    Args:
        plan: of `params`.
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
    known = {path: (spec, leaf.shape) for path, leaf, spec in planned(params, plan)}

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        ends = (path[i:] for i in range(len(path) + 1))
        found, shape = next((known[end] for end in ends if end in known), (P(), ()))
        return found if jnp.shape(leaf) == shape else P()

    return jax.tree.map_with_path(spec, tree)


def shardings(mesh: Mesh, plan: Plan) -> Any:
    """A plan as JAX's `NamedSharding`s, for `out_shardings` of `jax.jit` and the like.

    Parameters that are too many for one device are drawn where they belong, by a plan from
    `jax.eval_shape(net.init, key)`: `jax.jit(net.init, out_shardings=shardings(mesh, plan))(key)`.

    >>> from fnn.sharding import make_mesh
    >>> shardings(make_mesh(data=1), (P("data"),))[0].spec
    P('data',)
    """
    check_mesh(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), plan)


def planned(params: Params, plan: Plan) -> list[tuple[tuple[Any, ...], Any, P]]:
    """Path, array and spec of every leaf; raises where the plan has not one for each."""
    _validate.is_params(params)
    arrays, specs = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, plan))
    mend = "Edit one of `fnn.sharding.replicated(mesh, params)`."
    for path in [path for path in arrays if path not in specs]:
        raise ValueError(
            f"`plan` has no PartitionSpec for `params{jax.tree_util.keystr(path)}`. {mend}"
        )
    for path in [path for path in specs if path not in arrays]:
        raise ValueError(
            f"`plan{jax.tree_util.keystr(path)}` stands for no array of `params`. {mend}"
        )
    if jax.tree.structure(params) != jax.tree.structure(plan):
        raise ValueError(
            f"`plan` must be a tree like `params`, {jax.tree.structure(params)}, "
            f"got {jax.tree.structure(plan)}. {mend}"
        )
    for path, spec in specs.items():
        if not isinstance(spec, P):
            at = f"`plan{jax.tree_util.keystr(path)}`"
            raise TypeError(
                f"{at} must be a PartitionSpec, got {spec!r:.80}. Replicated is `PartitionSpec()`."
            )
    return [(path, leaf, specs[path]) for path, leaf in arrays.items()]


def _are_paired(first: Dense, second: Dense, size: int) -> bool:
    """Whether two dense layers make a pair that can be split into `size` parts.

    The second takes as many features as the first puts out, and `repeat` has stacked both alike.
    """
    return (
        first.w.shape[:-2] == second.w.shape[:-2]
        and first.w.shape[-1] == second.w.shape[-2]
        and first.w.shape[-1] % size == 0
    )
