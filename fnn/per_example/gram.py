"""Inner products of gradients: Gram matrices, influence, and the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fnn import _validate
from fnn.factors import is_factor, keep
from fnn.factors.base import inner, sum_leaves
from fnn.nets.combinators import check_net
from fnn.per_example.norms import ask, check_is_source
from fnn.types import Array, Layer, Source

Outputs = Literal["full", "trace", "diagonal"]


def inner_products(
    source: Source, other_source: Source | None = None
) -> Callable[..., Float[Array, "a b"]]:
    """Inner products between the gradients of two batches, `G[i, j] = <g_i, g'_j>`.

    No gradient is formed. A negative one is a conflict: a step down the gradient of one example
    raises the loss of the other. With `lr` the step size at each of several checkpoints,
    `sum(lr * inner_products(source)(params, train, test) for params in checkpoints)` are the TracIn
    scores: how much training on i has lowered the loss of j.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        other_source: of the second batch, where its loss is another one; `source`, if None. Both
            are of the same params.

    Returns:
        A function `(params, batch_a, batch_b) -> [examples of a, examples of b]`, float32 at least;
        a batch is a tuple such as `(x, targets)`.

    Raises:
        TypeError: a batch is no tuple.

    Source: Pruthi, Liu, Kale, Sundararajan (2020), arXiv:2002.08484 (TracIn).

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = inner_products(fnn.source(net, fnn.losses.l2_loss))
    >>> batch = jnp.ones((5, 3)), jnp.zeros((5, 2))
    >>> f(net.init(jax.random.key(0)), batch, (jnp.ones((4, 3)), jnp.ones((4, 2)))).shape
    (5, 4)
    """
    second = source if other_source is None else other_source
    check_is_source(source)
    check_is_source(second)

    def products(params, batch_a, batch_b):
        for name, batch in (("batch_a", batch_a), ("batch_b", batch_b)):
            if not isinstance(batch, tuple):
                came = type(batch).__name__
                raise TypeError(f"`{name}` must be a tuple such as (x, targets), got {came}.")
        _, factors = ask(source, keep, params, *batch_a)
        _, others = ask(second, keep, params, *batch_b)
        return _inner(factors, others)

    return products


def gram(source: Source) -> Callable[..., Float[Array, "batch batch"]]:
    """The Gram matrix of the gradients, `G[i, j] = <g_i, g_j>`.

    It is the empirical neural tangent kernel of the loss; `ntk` is that of the outputs.

    Args:
        source: `(params, *batch) -> (values, factors)`.

    Returns:
        A function `(params, *batch) -> [batch, batch]`, float32 at least; symmetric, positive
        semi-definite to rounding. Its diagonal are the squared norms;
        `G / (n[:, None] * n[None, :])` with `n = sqrt(diagonal)` are the cosines.

    Source: Jacot, Gabriel, Hongler (2018), arXiv:1806.07572.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> f = gram(fnn.source(net, fnn.losses.l2_loss))
    >>> f(net.init(jax.random.key(0)), jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5, 5)
    """
    check_is_source(source)

    def products(params, *batch):
        _, factors = ask(source, keep, params, *batch)
        return _inner(factors, factors)

    return products


def ntk(net: Layer, outputs: Outputs = "full") -> Callable[..., Float[Array, "a b *outputs"]]:
    """The empirical neural tangent kernel of the outputs, `K = J(x_a) J(x_b)^T`.

    J is the Jacobian of the outputs with respect to the params; it is never formed. One backward
    pass an output gives its factors.

    Args:
        net: any layer.
        outputs: `"full"`, every pair of outputs; `"diagonal"`, every output with itself; or
            `"trace"`, the sum of the diagonal.

    Returns:
        A function `(params, x_a [a, ...], x_b [b, ...]) -> kernel`: `[a, b, outputs, outputs]`,
        `[a, b, outputs]` or `[a, b]`, float32 at least. Outputs of several axes count as one.

    Raises:
        TypeError, ValueError: `net` is no Layer; `outputs` is unknown.

    Source: Jacot, Gabriel, Hongler (2018), arXiv:1806.07572; Novak, Sohl-Dickstein, Schoenholz
    (2022), arXiv:2206.08720 (structured derivatives).

    >>> import fnn
    >>> net = fnn.dense(3, 2)
    >>> x = jnp.ones((4, 3))
    >>> ntk(net)(net.init(jax.random.key(0)), x, x)[0, 0]  # |x|^2 + 1 for the bias
    Array([[4., 0.],
           [0., 4.]], dtype=float32)
    """
    check_net(net)
    _validate.one_of("outputs", outputs, ("full", "trace", "diagonal"))

    def kernel(params, x_a, x_b):
        first = _jacobian(net, params, x_a)
        second = _jacobian(net, params, x_b)
        if outputs == "full":
            with_all = jax.vmap(_inner, in_axes=(None, 0))
            products = jax.vmap(with_all, in_axes=(0, None))(first, second)
            return jnp.transpose(products, (2, 3, 0, 1))
        diagonal = jax.vmap(_inner)(first, second)  # [outputs, a, b]
        if outputs == "trace":
            return diagonal.sum(0)
        return jnp.moveaxis(diagonal, 0, 2)

    return kernel


def _jacobian(net: Layer, params, x):
    """The factors of the gradient of every output, arrays `[outputs, batch, ...]`."""
    _validate.is_array("x", x)
    y, residuals = net.forward(params, jnp.asarray(x))
    size = y[0].size
    one_hot = jnp.eye(size, dtype=bool).reshape(size, 1, *y.shape[1:])

    def of_output(which):
        ones = jnp.ones_like(y)
        dy = jnp.where(which, ones, 0)
        factors, _ = net.backward(params, residuals, dy, keep)
        return factors

    return jax.vmap(of_output)(one_hot)


def _inner(factors, others):
    """The inner products of whole gradients."""
    products = jax.tree.map(inner, factors, others, is_leaf=is_factor)
    return sum_leaves(products)
