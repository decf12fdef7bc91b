"""Backprop from a net and a loss.

`loss.grad` starts it, the `backward` of the net carries it, a reducer says what is kept. Lecture
004 eqs 21-28 with samples as rows. The 1/m of its dW and db enters once, here, with the example
weights: `dy = loss.grad(outputs, targets) * weights / sum(weights)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from fnn import _validate
from fnn.factors import keep, scale_rows, shares, widen
from fnn.factors.base import per_row
from fnn.nets.combinators import check_net
from fnn.types import Array, ArrayLike, Layer, Loss, P, ValueAndGrad


def value_and_grad(net: Layer[P], loss: Loss) -> ValueAndGrad[P]:
    """The mean loss and its gradient, by the hand-written backward passes.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A pure function `(params, x, targets, weights=None) -> (value, grads)` for `jax.jit`. `x` is
        `[batch, ...]`; `weights` is `[batch]`, not negative: the value is
        `sum(weights * loss) / sum(weights)`. Weight 0 is padding: the row counts for nothing,
        whatever it holds. Means accumulate in float32 at least. `grads` is a tree like `params`.

    Raises:
        TypeError, ValueError: an argument is no net or no loss; at the call, shapes or dtypes do
            not fit.

    Source: lecture 004 eqs 21-28; 003 for the mean (empirical risk).

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 4, 2))
    >>> params = net.init(jax.random.key(0))
    >>> f = jax.jit(value_and_grad(net, losses.l2_loss))
    >>> value, grads = f(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> jax.tree.map(jnp.shape, grads)
    ((Dense(w=(3, 4), b=(4,)), ()), Dense(w=(4, 2), b=(2,)))
    """
    check_net_and_loss(net, loss)

    def manual_value_and_grad(params, x, targets, weights=None):
        forward = forward_with(net, params)
        outputs, residuals, values = forward_pass(forward, loss, x, targets, weights)
        dy = output_error(loss, outputs, targets)
        grads, _ = net.backward(params, residuals, share_rows(dy, weights))
        return weighted_mean(values, weights), grads

    return manual_value_and_grad


def source(net: Layer, loss: Loss) -> Callable[..., tuple[Float[Array, " batch"], Any]]:
    """The loss of every example, and its gradient as factors: a *source* for `fnn.per_example`.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        A pure function `(params, x, targets, *, reduce=keep) -> (values [batch], factors)`: a tree
        like `params` with a factor for every array. The factors are those of the loss of each
        example; no 1/batch is in them. Another reducer of `fnn.factors` is applied within the
        backward pass.

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 2))
    >>> f = source(net, losses.l2_loss)
    >>> values, tree = f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> tree[-1].w.a.shape, tree[-1].w.dz.shape
    ((5, 3), (5, 2))
    """
    check_net_and_loss(net, loss)

    def net_source(params, x, targets, *, reduce=keep):
        forward = forward_with(net, params)
        outputs, residuals, values = forward_pass(forward, loss, x, targets)
        dy = output_error(loss, outputs, targets)
        factors, _ = net.backward(params, residuals, dy, reduce)
        return values, factors

    return net_source


def with_manual_vjp(net: Layer[P]) -> Callable[[P, Any], Any]:
    """`net.apply` with the hand-written backward as its derivative, for use in a `jax.grad`.

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

    def forward(params, x):
        y, residuals = net.forward(params, x)
        return y, (params, residuals)

    def backward(kept, dy):
        params, residuals = kept
        return net.backward(params, residuals, dy)

    apply.defvjp(forward, backward)

    def outputs(params, x):
        x = jax.tree.map(jnp.asarray, x)
        return apply(params, x)

    return outputs


def mean_loss(net: Layer[P], loss: Loss) -> Callable[..., Float[Array, ""]]:
    """The scalar whose gradient `value_and_grad` is, for `jax.grad`.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.

    Returns:
        `(params, x, targets, weights=None) -> value`.

    >>> from fnn import losses, mlp
    >>> net = mlp((3, 2))
    >>> f = mean_loss(net, losses.l2_loss)
    >>> f(net.init(jax.random.key(0)), jnp.zeros((5, 3)), jnp.ones((5, 2)))
    Array(1., dtype=float32)
    """
    check_net_and_loss(net, loss)

    def value(params, x, targets, weights=None):
        forward = forward_with(net, params)
        _, _, values = forward_pass(forward, loss, x, targets, weights)
        return weighted_mean(values, weights)

    return value


def check_net_and_loss(net: Layer, loss: Loss) -> None:
    """Raises a TypeError unless the two are a `Layer` and a `Loss`."""
    check_net(net)
    check_is_loss(loss)


def check_is_loss(loss: Any) -> None:
    """Raises a TypeError unless it is a `Loss`."""
    if isinstance(loss, Loss):
        return
    mend = "Use one of `fnn.losses`; by name: `fnn.losses.get(name)`."
    if callable(loss):
        mend = (
            "A function? Wrap it: `fnn.Loss(name, value, grad)`, with `value(outputs, targets)` of "
            "shape [batch] and `grad` like the outputs; or `fnn.losses.from_function(value)`, "
            "whose gradient is by JAX."
        )
    raise TypeError(f"`loss` must be a Loss, got {loss!r:.80}. {mend}")


def forward_with(net: Layer[P], params: P) -> Callable:
    """`x -> (outputs, residuals)`."""
    return lambda x: net.forward(params, x)


def forward_pass(
    forward: Callable,
    loss: Loss,
    x: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
) -> tuple[Any, Any, Float[Array, " batch"]]:
    """Checks a batch where it enters, and runs `forward` on it.

    Args:
        forward: `(x) -> (outputs [batch, ...], residuals)`.
        loss: takes the outputs.
        x: `[batch, ...]`.
        targets: `[batch, ...]`.
        weights: `[batch]`; rows of weight 0 become copies of one that counts.

    Returns:
        Outputs and residuals, and the loss of every example.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit.
    """
    x, targets = _enter(x, targets, weights)
    outputs, residuals = forward(x)
    rows = targets.shape[:1]
    if outputs.shape[:1] != rows:
        raise ValueError(
            f"`x` has shape {_shapes(x)}; expected [batch, features]. One example? Pass `x[None]`."
        )
    values = loss.value(outputs, targets)
    if jnp.shape(values) != rows:
        raise ValueError(
            f"{loss.name}: `value` must return one number per example, shape {rows}, got "
            f"{jnp.shape(values)}. Sum over the outputs."
        )
    return outputs, residuals, values


def _enter(x, targets, weights):
    """`x` and `targets` as arrays; rows of weight 0 are copies of one that counts."""
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        _validate.is_array("x", leaf if hasattr(leaf, "dtype") else x)
        _validate.fits("x", leaf)
    _validate.is_array("targets", targets)
    _validate.fits("targets", targets)
    shapes = f"`x` {_shapes(x)} and `targets` {tuple(targets.shape)}"
    mend = "One example? Pass `x[None]`, `targets[None]`."
    if any(a.ndim < 1 for a in (*leaves, targets)):
        raise ValueError(f"{shapes} must have a batch axis. {mend}")
    if any(a.shape[0] != targets.shape[0] for a in leaves):
        raise ValueError(f"{shapes} must have as many rows. {mend}")
    if targets.shape[0] == 0:
        raise ValueError(f"{shapes} are an empty batch: a mean over no example is undefined.")
    if weights is not None:
        _validate.per_example("weights", weights, targets.shape[0])
    filled = jax.tree.map(lambda leaf: fill_rows(leaf, weights), x)
    return filled, fill_rows(targets, weights)


def _shapes(x):
    """The shape of an input, or the shapes of a tree."""
    return jax.tree.map(lambda a: tuple(a.shape), x)


def output_error(loss: Loss, outputs: Array, targets: ArrayLike) -> Array:
    """`loss.grad`, the error of each example at the outputs `[batch, ...]`."""
    dy = loss.grad(outputs, jnp.asarray(targets))
    if jnp.shape(dy) != outputs.shape:
        raise ValueError(
            f"{loss.name}: `grad` must return an array like the outputs, shape {outputs.shape}, "
            f"got {jnp.shape(dy)}."
        )
    return dy


def weighted_mean(
    values: Float[Array, "batch *rest"], weights: ArrayLike | None = None
) -> Float[Array, "*rest"]:
    """The mean over the first axis, `sum(weights * values) / sum(weights)`.

    It is the one place where a batch is averaged.

    Args:
        values: `[batch, ...]`.
        weights: `[batch]`, not negative; None counts all alike. All zero gives 0.

    Returns:
        `[...]` in the dtype of `values`, accumulated in float32 at least.

    Raises:
        TypeError, ValueError: `weights` is no array, or not one per example.

    >>> weighted_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0]))
    Array(2., dtype=float32)
    """
    parts = share_rows(widen(values), weights)
    return parts.sum(0).astype(values.dtype)


def share_rows(
    a: Float[Array, "batch *rest"], weights: ArrayLike | None = None
) -> Float[Array, "batch *rest"]:
    """Each row times what its example counts for in the mean.

    Args:
        a: `[batch, ...]`.
        weights: `[batch]`, not negative; None counts all alike. A row of weight 0 becomes 0,
            whatever it holds.

    Returns:
        Like `a`: the rows times `weights / sum(weights)`, or 1 / batch.
    """
    if weights is None:
        return a * (1.0 / a.shape[0])
    _validate.per_example("weights", weights, a.shape[0])
    wide = jnp.asarray(weights).astype(widen(a).dtype)
    scaled = scale_rows(a, shares(wide))
    return scaled.astype(a.dtype)


def fill_rows(a: Any, weights: Any) -> Shaped[Array, "batch ..."]:
    """The array with a row that counts in the place of those of weight 0; zeros where none counts.

    So no NaN in them spreads. Zeros would not do: a layer may divide by them.

    >>> fill_rows(jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0]))
    Array([[1.],
           [1.]], dtype=float32)
    """
    a = jnp.asarray(a)
    if weights is None or jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return a
    present = jnp.asarray(weights) != 0
    row = a[jnp.argmax(present)]
    row = jnp.where(present.any(), row, jnp.zeros_like(row))
    rows = jnp.broadcast_to(row, a.shape)
    return jnp.where(per_row(present, a), a, rows)
