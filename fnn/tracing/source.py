"""A source from any loss, whatever library its model is of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fnn import _validate
from fnn.factors import Factor, Zero
from fnn.per_example.check_source import COUPLED, loss_of_one
from fnn.per_example.report import report_factors
from fnn.tracing import control as control
from fnn.tracing import products as products
from fnn.tracing.assemble import assemble, finish
from fnn.tracing.terms import Shared
from fnn.tracing.walk import TERMS, VALUE, Scope, evaluate
from fnn.types import Array, Params, Source

Fallback = Literal["warn", "raise", "allow"]


def as_source(
    loss_fn: Callable[..., Array], *, batched: bool = False, fallback: Fallback = "warn"
) -> Source:
    """A source from the loss of one example of any model, for all of `fnn.per_example`.

    The gradient of the loss is traced, and its jaxpr is read backwards from the gradients to the
    products that make them. Their operands are kept in place of the gradients. Custom derivatives,
    `remat` and `stop_gradient` count as in `jax.grad`, since it is the derivative that is read.

    Args:
        loss_fn: `(params, *example) -> scalar`; or, if `batched`, `(params, *batch) -> [batch]`,
            which is asked for batches of one (`fnn.per_example.check_batched` tells whether that is
            the same).
        batched: whether `loss_fn` needs a batch axis.
        fallback: what happens where the gradient of a matrix has to be written out for every
            example: "warn", "raise" or "allow". `fnn.per_example.report` says where and why. It
            costs memory, never correctness.

    Returns:
        A source `(params, *batch) -> (values [batch], tree of factors)`. A batch is any trees of
        arrays `[batch, ...]`. Leaves of `params` that hold whole numbers have gradient 0.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, the loss is not one real number
            for each example, arrays of the batch differ in length, or a parameter is complex.

    >>> import fnn
    >>> def loss(params, x, y):
    ...     return jnp.sum((jnp.tanh(x @ params["w"]) - y) ** 2)
    >>> params = {"w": jnp.ones((3, 2)), "unused": jnp.ones(2)}
    >>> source = as_source(loss)
    >>> fnn.per_example.norms(source)(params, jnp.zeros((5, 3)), jnp.ones((5, 2)))
    Array([0., 0., 0., 0., 0.], dtype=float32)
    >>> print(fnn.per_example.report(source, params, jnp.zeros((5, 3)), jnp.ones((5, 2))))
    ['unused']  Zero
    ['w']       Outer
    """
    _validate.is_function("loss_fn", loss_fn, "(params, *example) -> scalar")
    _validate.one_of("fallback", fallback, ("warn", "raise", "allow"))
    loss = loss_of_one(loss_fn, batched)

    @jax.jit
    def read(params, batch):
        return read_gradients(loss, params, batch)[:2]

    def any_source(params, *batch):
        check_arguments(params, batch)
        values, factors = read(params, batch)
        if fallback != "allow":
            _tell(report_factors(factors), fallback)
        return values, factors

    return any_source


def _tell(report, fallback):
    """Warns or raises where a gradient is written out."""
    lines = [f"`params{path}`: {text}" for path, text in report.items() if "written" in text]
    if not lines:
        return
    text = (
        "as_source writes the gradient of every example out, at batch x parameter of memory, for "
        f"{'; '.join(lines)}. The numbers are right. Accept it with `fallback='allow'`."
    )
    if fallback == "raise":
        raise ValueError(text)
    warnings.warn(text, stacklevel=4)


def read_gradients(
    loss: Callable[..., Array], params: Params, batch: tuple[Any, ...], inputs: bool = False
) -> tuple[Array, Any, Any]:
    """The losses, the factors of the params, and the gradients of the inputs.

    Args:
        loss: `(params, *example) -> scalar`.
        params: a tree.
        batch: trees of arrays `[batch, ...]`.
        inputs: whether gradients of `batch[0]` are wanted.

    Returns:
        `[batch]`; a tree like `params`; a tree like `batch[0]`, None for what is no real number.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    numbers = _vary_like(_real_leaves(params), batch)
    first: Any = batch[0]
    given = _real_leaves(first) if inputs else []

    def gradients(numbers, given, example):
        def value(numbers, given):
            x, *rest = example
            return loss(_with_real(params, numbers), _with_real(x, given), *rest)

        return jax.value_and_grad(value, (0, 1))(numbers, given)

    arguments = numbers, _of_one(given), _of_one(batch)
    closed = _trace(gradients, *arguments)
    leaves = jax.tree.leaves(arguments)
    scope = Scope(closed.jaxpr, [i >= len(numbers) for i in range(len(leaves))])
    kinds = [VALUE, *[TERMS] * len(numbers), *[VALUE] * len(given)]

    def read(given, batch):
        args = [*numbers, *given, *jax.tree.leaves(batch)]
        value, *found = evaluate(scope, kinds, closed.consts, args)
        terms = found[: len(numbers)]
        factors = [assemble(t, p.shape, p.dtype) for t, p in zip(terms, numbers, strict=True)]
        return factors, (value, found[len(numbers) :])

    factors, (values, dx) = _over_examples(read, given, batch)

    def zero(leaf):
        return Zero(jnp.zeros(rows), jnp.shape(leaf), jnp.result_type(leaf))

    empty = jax.tree.map(lambda a: a if _is_real(a) else None, first)
    return values, _with_real(params, factors, zero), _with_real(empty, dx)


def _over_examples(read: Callable, *batch: Any) -> tuple[list[Factor], Any]:
    """`read`, whose factors hold a `Shared` for what all examples have in common, by `vmap`."""
    places = []

    def of_one(*example):
        factors, others = read(*example)
        parts, tree = jax.tree.flatten(factors, is_leaf=lambda v: isinstance(v, Shared))
        places[:] = [tree, [isinstance(part, Shared) for part in parts]]
        own = [part for part in parts if not isinstance(part, Shared)]
        return own, [part.array for part in parts if isinstance(part, Shared)], others

    own, shared, others = jax.vmap(of_one, out_axes=(0, None, 0))(*batch)
    tree, is_shared = places
    own = iter(own)
    shared = map(Shared, shared)
    parts = [next(shared if common else own) for common in is_shared]
    return [finish(factor) for factor in tree.unflatten(parts)], others


def _of_one(batch):
    """The first example."""
    return jax.tree.map(lambda a: a[0], batch)


def _vary_like(numbers, batch):
    """Numbers that in `shard_map` vary over all axes that the batch does.

    So the gradient of an example is not summed over devices.
    """

    def axes(a):
        kind = jax.typeof(a).manual_axis_type
        return set() if kind is None else set(kind.varying)

    wanted = set().union(*map(axes, jax.tree.leaves(batch)))
    found = []
    for number in numbers:
        more = tuple(wanted - axes(number))
        found.append(lax.pcast(number, more, to="varying") if more else number)
    return found


def _is_real(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _real_leaves(tree):
    """The leaves that hold real numbers, as arrays."""
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if _is_real(leaf)]


def _with_real(tree, new, otherwise=lambda leaf: leaf):
    """A tree with new leaves in the place of those that hold real numbers, as far as they last."""
    left = iter(new)
    return jax.tree.map(lambda leaf: next(left, leaf) if _is_real(leaf) else otherwise(leaf), tree)


def check_arguments(params: Params, batch: tuple[Any, ...]) -> None:
    """Raises unless params hold real or whole numbers, and a batch arrays of one length."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        at = f"params{jax.tree_util.keystr(path)}"
        _validate.is_array(at, leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"`{at}` holds random keys. Pass them with the batch, one per example.")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"`{at}` is complex ({leaf.dtype}); a loss has a gradient in real parameters. "
                "Pass real and imaginary parts."
            )
    lengths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        at = f"batch{jax.tree_util.keystr(path)}"
        _validate.is_array(at, leaf)
        lengths[at] = leaf.shape[0] if leaf.ndim else 0
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        came = ", ".join(f"`{at}` has {rows}" for at, rows in lengths.items())
        raise ValueError(
            f"The arrays of a batch must have one length of at least 1, one row an example: {came}."
            " One key for all? Pass `jax.random.split(key, batch)`."
        )


def _trace(f, *shapes):
    """The jaxpr of a function."""
    try:
        return jax.make_jaxpr(f)(*shapes)
    except NameError as error:
        raise ValueError(f"`loss_fn` sums over an axis of examples ({error}). {COUPLED}") from error
