"""Control over what devices send each other.

Parameters gathered by name, and a data-parallel gradient by `jax.shard_map`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fnn import _validate
from fnn.factors import widen
from fnn.sharding.mesh import DATA, check_mesh, size_of
from fnn.sharding.plans import Plan, replicated, shardings
from fnn.types import Array, ArrayLike, Params


def gathered(
    mesh: Mesh, function: Callable[..., Any], plan: Plan | None = None
) -> Callable[..., Any]:
    """`function` with its params gathered before it sees them.

    What ZeRO does with parameters that are `fully_sharded`.

    Every array is gathered whole, a stack of `repeat` too, and gradients are summed over "data".
    Without it XLA may gather activations and split products, which is as right but often slower.

    Args:
        mesh: of `make_mesh`.
        function: `(params, ...) -> anything`, such as `fnn.value_and_grad(net, loss)` or a rule's
            `value_and_grad`.
        plan: where the params lie while they are in use; None for all of them everywhere.

    Returns:
        A function like it, for `jax.jit`.

    Source: Rajbhandari et al. (2020), arXiv:1910.02054.

    >>> from fnn.sharding import make_mesh
    >>> jax.jit(gathered(make_mesh(data=1), lambda params: 2 * params))(jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """
    check_mesh(mesh)
    _validate.is_function("function", function, "(params, ...) -> anything")

    def with_gathered(params: Params, *rest: Any, **named: Any) -> Any:
        in_use = replicated(mesh, params) if plan is None else plan
        return function(
            lax.with_sharding_constraint(params, shardings(mesh, in_use)), *rest, **named
        )

    return with_gathered


def data_parallel(
    mesh: Mesh,
    function: Callable[..., tuple[Array, Params]],
    *,
    all_reduce: Callable[[Params], Params] | None = None,
) -> Callable[..., tuple[Array, Params]]:
    """A gradient for which every device takes its own rows.

    Over "data" the devices send each other only what `psum` and `all_reduce` take here.

        w_d = sum of the weights of device d,    share_d = w_d / psum(w_d)
        value = psum(share_d value_d),           grads = all_reduce(share_d grads_d)

    A device whose rows all have weight 0 counts nothing, whatever `function` makes of them.

    Args:
        mesh: of `make_mesh`.
        function: `(params, x, targets[, weights]) -> (value, grads)`, weighted means over the rows
            given: `fnn.value_and_grad(net, loss)`, or `jax.value_and_grad(fnn.mean_loss(net,
            loss))`.
        all_reduce: `(grads) -> grads`, the sum over the axis "data" of what every device has, in
            float32 at least; called inside `jax.shard_map`. It must return the same on every
            device, which JAX does not check. `lax.psum`, if None. (XLA's CPU, jaxlib 0.10.2, aborts
            at sums in bfloat16 where "model" has more than one part.)

    Returns:
        A function `(params, x, targets, weights=None) -> (value, grads)` for `jax.jit`, of the
        whole batch. Params split over "model" stay so, and what that takes is sent besides.

    Raises:
        TypeError, ValueError: `function` is none; at the call, the mesh axis does not divide the
            rows.

    >>> import fnn
    >>> net, mesh = fnn.mlp((3, 2)), fnn.sharding.make_mesh()
    >>> gradient = data_parallel(mesh, fnn.value_and_grad(net, fnn.losses.l2_loss))
    >>> batch = fnn.sharding.place_batch(mesh, (jnp.ones((5, 3)), jnp.ones((5, 2))))
    >>> value, grads = jax.jit(gradient)(net.init(jax.random.key(0)), *batch)
    """
    size = size_of(mesh, DATA)
    _validate.is_function("function", function, "(params, x, targets[, weights]) -> (value, grads)")
    add = functools.partial(lax.psum, axis_name=DATA) if all_reduce is None else all_reduce
    _validate.is_function("all_reduce", add, "(grads) -> grads")

    def of_rows(params: Params, rows: tuple[ArrayLike, ...]) -> tuple[Array, Params]:
        value, grads = function(params, *rows)
        share = _share(rows[2:], value)
        total = add(jax.tree.map(lambda g: _times(g, share), grads))
        return lax.psum(_times(value, share), DATA).astype(value.dtype), jax.tree.map(
            lambda s, g: s.astype(g.dtype), total, grads
        )

    # Without JAX's check of what varies over devices, `function` may hold any loop, and a
    # `jax.grad` in it does not sum over devices.
    # Other axes are left to the compiler, but not beside an axis "data" of one part, which XLA
    # (jaxlib 0.10.2) cannot do.
    manual = {name for name, parts in mesh.shape.items() if name == DATA or 1 in (parts, size)}
    spread = jax.shard_map(
        of_rows,
        mesh=mesh,
        in_specs=(P(), P(DATA)),
        out_specs=P(),
        axis_names=manual,
        check_vma=False,
    )
    spread = jax.jit(spread)  # not every mesh is for eager calls

    def of_batch(
        params: Params, x: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
    ) -> tuple[Array, Params]:
        if x.shape[0] % size:
            mend = "Fill it up: `fnn.sharding.place_batch(mesh, (x, targets))`."
            raise ValueError(
                f"`x` has {x.shape[0]} rows, "
                f"which the {size} parts of the mesh axis {DATA!r} do not divide. {mend}"
            )
        return spread(params, (x, targets) if weights is None else (x, targets, weights))

    return of_batch


def _share(weights: tuple[ArrayLike, ...], value: Array) -> Array:
    """What the rows of this device count for in the mean over all, in float32 at least."""
    dtype = widen(value).dtype
    if not weights:
        return jnp.full((), 1 / lax.axis_size(DATA), dtype)
    own = jnp.asarray(weights[0]).astype(dtype).sum()
    whole = lax.psum(own, DATA)
    return own / jnp.where(whole > 0, whole, jnp.ones_like(whole))


def _times(a: Array, share: Array) -> Array:
    """`a * share` in float32 at least; 0 where the share is 0, whatever `a` holds."""
    wide = widen(a)
    return jnp.where(share > 0, wide * share.astype(wide.dtype), jnp.zeros_like(wide))
