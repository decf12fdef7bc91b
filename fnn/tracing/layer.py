"""A layer from any function of params and one example."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import _validate
from fnn.factors import is_factor, total
from fnn.tracing.rewire import rewire
from fnn.tracing.source import read_gradients
from fnn.types import Layer


def as_layer(
    apply: Callable[..., Any],
    init: Callable[..., Any] | None = None,
    *,
    batched: bool = False,
    name: str | None = None,
) -> Layer[Any]:
    """A layer from any JAX function, such as the `apply` of a Flax or Haiku model.

    Its `backward` reads the gradient of the function. What carries the error back may be another
    tree than the params, so that every rule that takes a layer takes this one: wherever a parameter
    meets something that depends on `x`, the error goes through the same entry of that tree.

    Args:
        apply: `(params, x) -> y`, of one example: `x` is a tree of arrays (`fnn.fit` takes one
            array), `y` an array.
        init: `(key) -> params`; None for a layer whose params come from elsewhere.
        batched: whether `apply` needs a batch axis; it is then asked for batches of one.
        name: for errors and tables; that of `apply`, if None.

    Returns:
        A layer on trees `x` of arrays `[batch, ...]`. The gradient of a leaf of `x` that holds no
        real numbers is None.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, the params are of another model,
            or `apply` returns no array.

    >>> def apply(params, x):
    ...     return jnp.tanh(params["w"] * x)
    >>> layer = as_layer(apply, lambda key: {"w": jax.random.normal(key, (3,))})
    >>> layer.apply({"w": jnp.zeros(3)}, jnp.ones((5, 3))).shape
    (5, 3)
    """
    _validate.is_function("apply", apply, "(params, x) -> y")
    if init is not None:
        _validate.is_function("init", init, "(key) -> params")
    label = name or getattr(apply, "__name__", type(apply).__name__)
    of_one = functools.partial(_call_batched if batched else _call, label, apply)

    @functools.cache
    def shapes():
        key = jax.eval_shape(jax.random.key, 0)
        return jax.eval_shape(draw, key)

    def draw(key):
        if init is None:
            raise TypeError(f"{label} has no `init`. Pass one: `as_layer(apply, init)`.")
        _validate.is_key("key", key)
        return init(key)

    def forward(params, x):
        if init is not None:
            _check_params(label, shapes(), params)
        x = jax.tree.map(jnp.asarray, x)
        return jax.vmap(of_one, (None, 0))(params, x), (params, x)

    def backward(carriers, residuals, dy, reduce=total):
        params, x = residuals
        factors, dx = _gradients(of_one, params, carriers, x, dy)
        return jax.tree.map(reduce, factors, is_leaf=is_factor), dx

    return Layer(label, draw, forward, backward)


def _gradients(of_one, params, carriers, x, dy):
    """The factors of the params, and `dx`, which comes through the carriers."""
    run = of_one
    own = jax.tree.leaves(params)
    others = jax.tree.leaves(carriers)
    if len(own) != len(others) or not all(map(operator.is_, own, others)):
        through_carriers = rewire(of_one)

        def run(params, x):
            return through_carriers(params, carriers, x)

    def along(params, x, dy):
        return (run(params, x) * dy).sum()

    _, factors, dx = read_gradients(along, params, (x, dy), inputs=True)
    return factors, dx


def _call_batched(name, apply, params, x):
    rows = jax.tree.map(lambda a: a[None], x)
    y = apply(params, rows)
    if jnp.shape(y)[:1] != (1,):
        raise ValueError(
            f"{name}: `apply` of a batch of one must return an array [1, ...], got {jnp.shape(y)}. "
            "Does it take one example? Leave out `batched=True`."
        )
    return y[0]


def _call(name, apply, params, x):
    try:
        y = apply(params, x)
    except Exception as error:
        shapes = jax.tree.map(jnp.shape, x)
        error.add_note(
            f"{name}: `apply` got one example, of shape {shapes}. Does it need a batch axis? Say "
            "`batched=True`."
        )
        raise
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
        came = y.dtype if hasattr(y, "dtype") else type(y).__name__
        raise TypeError(
            f"{name}: `apply` must return an array of real numbers, got {came}. New state or other "
            "outputs? Return the array that the loss takes."
        )
    return jnp.asarray(y)


def _check_params(name, shapes, params):
    """Raises unless params are like those of `init`."""
    expected = _leaves(shapes)
    came = _leaves(params)
    for path in sorted(expected | came):
        if expected.get(path) != came.get(path):
            raise ValueError(
                f"{name}: `params{path}` must be {expected.get(path, 'absent')}, got "
                f"{came.get(path, 'nothing')}. Params of another model?"
            )


def _leaves(tree):
    """The shape of every leaf by its path, with the types of the containers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[jax.tree_util.keystr(path)] = f"an array {jnp.shape(leaf)}"
    return found
