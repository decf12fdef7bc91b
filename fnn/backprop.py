"""Backprop from a net and a loss.

`loss.grad` starts it, the net's own `backward` carries it, a reducer says what is kept.

Lecture 004 eqs 21-28 with samples as rows. The 1/m of its dW and db enters once, here, with the
example weights: `dy = loss.grad(outputs, targets) * weights / sum(weights)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.factors import keep
from fnn.factors.rows import times_row
from fnn.nets.combinators import check_net
from fnn.types import Array, ArrayLike, Layer, Loss, Params, at_least_float32


def value_and_grad(net: Layer, loss: Loss) -> Callable[..., tuple[Array, Params]]:
    """The mean loss and its gradient, by the hand-written backward passes.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A pure function `(params, x, targets, weights=None) -> (value, grads)` for `jax.jit`. `x` is
        `[batch, ...]`; `weights` is `[batch]`, not negative: the value is `sum(weights * loss) /
        sum(weights)`, so weight 0 is padding (all zero: the value and the gradient are 0). Means
        accumulate in float32 at least. `grads` is a tree like `params`.

    Raises:
        TypeError, ValueError: net or loss are something else; at the call, shapes or dtypes do not
            fit.

    Source: lecture 004 eqs 21-28; 003 for the mean (empirical risk).

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 4, 2))
    >>> params = net.init(jax.random.key(0))
    >>> value, grads = jax.jit(value_and_grad(net, losses.l2_loss))(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> jax.tree.map(jnp.shape, grads)
    ((Dense(w=(3, 4), b=(4,)), ()), Dense(w=(4, 2), b=(2,)))
    """
    check_net_and_loss(net, loss)

    def manual_value_and_grad(
        params: Params, x: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
    ) -> tuple[Array, Params]:
        outputs, residuals, values = forward_pass(partial(net.forward, params), loss, x, targets)
        dy = weighed(output_error(loss, outputs, targets), weights)
        return weighted_mean(values, weights), net.backward(params, residuals, dy)[0]

    return manual_value_and_grad


def source(net: Layer, loss: Loss) -> Callable[..., tuple[Array, Any]]:
    """Every example's loss, and its gradient as factors: the first *source* for `fnn.per_example`.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A pure function `(params, x, targets, *, reduce=keep) -> (values [batch], factors)`: a tree
        like `params` with a factor for every array. The factors are those of each example's own
        loss; no 1/batch is in them. With another reducer of `fnn.factors` its results stand in
        their place, taken within the backward pass.

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 2))
    >>> f = source(net, losses.l2_loss)
    >>> values, tree = f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> tree[-1].w.a.shape, tree[-1].w.dz.shape
    ((5, 3), (5, 2))
    """
    check_net_and_loss(net, loss)

    def net_source(
        params: Params, x: ArrayLike, targets: ArrayLike, *, reduce: Any = keep
    ) -> tuple[Array, Any]:
        outputs, residuals, values = forward_pass(partial(net.forward, params), loss, x, targets)
        return values, net.backward(
            params, residuals, output_error(loss, outputs, targets), reduce
        )[0]

    return net_source


def with_manual_vjp(net: Layer) -> Callable[[Params, Array], Array]:
    """`net.apply` with the hand-written backward as its derivative, for use inside somebody's
    `jax.grad`.

    Args:
        net: any layer.

    Returns:
        A function `(params, x) -> outputs`. Reverse mode only: `jax.jvp` of it raises, as of any
        `jax.custom_vjp`.

    >>> from fnn import mlp
    >>> net = mlp((3, 2))
    >>> f = with_manual_vjp(net)
    >>> jax.grad(lambda p: f(p, jnp.ones((1, 3))).sum())(net.init(jax.random.key(0)))[-1].b
    Array([1., 1.], dtype=float32)
    """
    check_net(net)
    apply = jax.custom_vjp(net.apply)

    def forward(params: Params, x: Array) -> tuple[Array, Any]:
        y, residuals = net.forward(params, x)
        return y, (params, residuals)

    def backward(kept: tuple[Params, Any], dy: Array) -> tuple[Params, Array]:
        params, residuals = kept
        return net.backward(params, residuals, dy)

    apply.defvjp(forward, backward)
    return apply


def mean_loss(net: Layer, loss: Loss) -> Callable[..., Array]:
    """The scalar whose gradient `value_and_grad` is, `(params, x, targets, weights=None) -> value`,
    for `jax.grad`.

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 2))
    >>> mean_loss(net, losses.l2_loss)(net.init(jax.random.key(0)), jnp.zeros((5, 3)), jnp.ones((5, 2)))
    Array(1., dtype=float32)
    """
    check_net_and_loss(net, loss)

    def value(
        params: Params, x: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
    ) -> Array:
        _, _, values = forward_pass(partial(net.forward, params), loss, x, targets)
        return weighted_mean(values, weights)

    return value


def check_net_and_loss(net: Any, loss: Any) -> None:
    """Raises a TypeError unless the two are a `Layer` and a `Loss`."""
    check_net(net)
    if not isinstance(loss, Loss):
        raise TypeError(
            f"`loss` must be a Loss, got {loss!r}. Use one of `fnn.losses`; by name: `fnn.losses.get(name)`."
        )


def output_error(loss: Loss, outputs: Array, targets: ArrayLike) -> Array:
    """`loss.grad`, the error of each example at the outputs, checked to have their shape."""
    dy = loss.grad(outputs, jnp.asarray(targets))
    if jnp.shape(dy) != outputs.shape:
        raise ValueError(
            f"{loss.name}: `grad` must return an array like the outputs, shape {outputs.shape}, got {jnp.shape(dy)}."
        )
    return dy


def forward_pass(
    forward: Callable[[Array], tuple[Array, Any]], loss: Loss, x: ArrayLike, targets: ArrayLike
) -> tuple[Array, Any, Array]:
    """Outputs and residuals of `forward(x)`, and the loss of every example; shapes are checked."""
    _validate.is_array("x", x)
    _validate.is_array("targets", targets)
    if x.ndim < 1 or targets.ndim < 1:
        raise ValueError(
            f"`x` {tuple(x.shape)} and `targets` {tuple(targets.shape)} must have a batch axis. "
            "One example? Pass `x[None]`, `targets[None]`."
        )
    if x.shape[0] != targets.shape[0]:
        raise ValueError(
            f"`x` has {x.shape[0]} rows but `targets` has {targets.shape[0]}. One example? Pass `x[None]`, `targets[None]`."
        )
    if x.shape[0] == 0:
        raise ValueError(
            f"`x` is an empty batch, shape {tuple(x.shape)}: the mean loss of no example is undefined."
        )
    outputs, residuals = forward(jnp.asarray(x))
    if outputs.ndim < 1 or outputs.shape[0] != x.shape[0]:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}; expected [batch, features]. One example? Pass `x[None]`."
        )
    values = loss.value(outputs, jnp.asarray(targets))
    if jnp.shape(values) != x.shape[:1]:
        raise ValueError(
            f"{loss.name}: `value` must return one number per example, shape {x.shape[:1]}, got {jnp.shape(values)}. Sum over the outputs."
        )
    return outputs, residuals, values


def weighted_mean(values: Array, weights: ArrayLike | None = None) -> Array:
    """The mean over the first axis, `sum(weights * values) / sum(weights)`.

    The one place where a batch is averaged.

    Args:
        values: `[batch, ...]`.
        weights: `[batch]`, not negative; None weighs all alike. All zero gives 0.

    Returns:
        `[...]` in the dtype of `values`, accumulated in float32 at least.

    Raises:
        TypeError, ValueError: `weights` is no array, or not one per example.

    >>> weighted_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0]))
    Array(2., dtype=float32)
    """
    return weighed(at_least_float32(values), weights).sum(0).astype(values.dtype)


def weighed(a: Array, weights: ArrayLike | None = None) -> Array:
    """Each row `[batch, ...]` times what its example counts for in the mean.

    1/batch, or `weights / sum(weights)`.
    """
    if weights is None:
        return a * (1.0 / a.shape[0])
    _validate.is_array("weights", weights)
    if weights.shape != a.shape[:1]:
        raise ValueError(
            f"`weights` has shape {tuple(weights.shape)}, expected {tuple(a.shape[:1])}: one per example."
        )
    w = jnp.asarray(weights).astype(at_least_float32(a).dtype)
    whole = w.sum()
    share = w / jnp.where(whole > 0, whole, jnp.ones_like(whole))
    return times_row(a, share)
