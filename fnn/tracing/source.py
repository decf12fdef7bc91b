"""A source from any loss, whatever library its model is of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fnn import _validate
from fnn.factors import Zero
from fnn.per_example.report import report_factors
from fnn.tracing import control as control
from fnn.tracing import products as products
from fnn.tracing.assemble import assemble, finish
from fnn.tracing.terms import Shared
from fnn.tracing.walk import TERMS, VALUE, Scope, evaluate
from fnn.types import Array, Params, Source

Fallback = Literal["warn", "raise", "allow"]

COUPLED = (
    "The gradient of one example needs the loss of one example. Batch normalisation in training "
    "mode, new batch statistics and other auxiliary outputs couple examples or are no loss: use "
    "the running averages, a GroupNorm or a LayerNorm, and return the loss alone."
)


def as_source(
    loss_fn: Callable[..., Array], *, batched: bool = False, fallback: Fallback = "warn"
) -> Source:
    """A source from the loss of one example of any model, for all of `fnn.per_example`.

    The gradient of the loss is traced, and its jaxpr is read backwards from the gradients to the
    products that make them. Their operands are kept in place of the gradients. Custom derivatives,
    `remat` and `stop_gradient` count as in `jax.grad`, since it is the derivative that is read.

    Args:
        loss_fn: `(params, *example) -> scalar`; or, if `batched`, `(params, *batch) -> [batch]`,
            which is asked for batches of one (`check_batched` tells whether that is the same).
        batched: whether `loss_fn` needs a batch axis.
        fallback: what happens where a gradient of two axes or more has to be written out for every
            example: "warn", "raise" or "allow". `fnn.per_example.report` says where and why. It
            costs memory, never correctness.

    Returns:
        A source `(params, *batch) -> (values [batch], tree of factors)`; a batch is any trees of
        arrays `[batch, ...]`. Leaves of `params` that hold whole numbers have gradient 0.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, the loss is not one real number
            per example, arrays of the batch differ in length, a parameter is complex.

    Source: Goodfellow (2015), arXiv:1510.01799, for what a factor is good for.

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
    loss = _loss_of_one(loss_fn, batched)

    def any_source(params, *batch):
        values, factors, _ = read_gradients(loss, params, batch)
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


def _loss_of_one(loss_fn, batched):
    """The loss of one example, checked."""

    def loss(params, *example):
        if not batched:
            value = loss_fn(params, *example)
            _check_loss(value, (), "`loss_fn(params, *example)` must return one real number")
            return value
        batch = jax.tree.map(lambda a: a[None], example)
        values = loss_fn(params, *batch)
        _check_loss(values, (1,), "`loss_fn` of a batch of one must return an array (1,)")
        return values[0]

    return loss


def _check_loss(value, shape, expected):
    leaves = jax.tree.leaves(value)
    is_array = len(leaves) == 1 and leaves[0] is value
    is_real = is_array and jnp.issubdtype(jnp.result_type(value), jnp.floating)
    if is_real and jnp.shape(value) == shape:
        return
    came = ", ".join(str(jax.typeof(leaf)) for leaf in leaves)
    raise TypeError(f"{expected}, got {came} ({type(value).__name__}). {COUPLED}")


def read_gradients(
    loss: Callable[..., Array], params: Params, batch: tuple, inputs: bool = False
) -> tuple[Array, Any, Any]:
    """The losses, the factors of the params, and the gradients of the inputs.

    Args:
        loss: `(params, *example) -> scalar`.
        params: a tree.
        batch: trees of arrays `[batch, ...]`.
        inputs: whether gradients of `batch[0]` are wanted.

    Returns:
        `[batch]`; a tree like `params`; a tree like `batch[0]`, None where it is no real number.
    """
    leaves, structure = jax.tree.flatten(params)
    real = _real_leaves(params)
    numbers = [jnp.asarray(leaves[i]) for i in real]
    batch = jax.tree.map(jnp.asarray, batch)
    rows = _rows(batch)
    first = jax.tree.leaves(batch[0]) if inputs else []
    moving = [i for i, a in enumerate(first) if jnp.issubdtype(a.dtype, jnp.floating)]
    data, whole = jax.tree.flatten(batch)

    def value_and_grads(numbers, given, data):
        def of(numbers, given):
            params = structure.unflatten(_replace(leaves, real, numbers))
            example = whole.unflatten(_replace(data, moving, given))
            return loss(params, *example)

        return jax.value_and_grad(of, (0, 1))(numbers, given)

    shapes = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in data]
    closed = _trace(value_and_grads, numbers, [shapes[i] for i in moving], shapes)
    flags = [False] * len(numbers) + [True] * (len(moving) + len(data))
    scope = Scope(closed.jaxpr, flags)
    kinds = [VALUE, *[TERMS] * len(numbers), *[VALUE] * len(moving)]
    made: list[Any] = []

    def of_one(data):
        args = [*numbers, *(data[i] for i in moving), *data]
        value, *found = evaluate(scope, kinds, closed.consts, args)
        terms = zip(found, numbers, strict=False)
        factors = [assemble(t, p.shape, p.dtype) for t, p in terms]
        parts, tree = jax.tree.flatten(factors, is_leaf=lambda v: isinstance(v, Shared))
        made[:] = [tree, [isinstance(v, Shared) for v in parts]]
        own = [v for v in parts if not isinstance(v, Shared)]
        shared = [v.array for v in parts if isinstance(v, Shared)]
        return value, own, found[len(numbers) :], shared

    values, own, dx, shared = jax.vmap(of_one, out_axes=(0, 0, 0, None))(data)
    tree, is_shared = made
    own = iter(own)
    shared = iter(map(Shared, shared))
    found = tree.unflatten([next(shared) if yes else next(own) for yes in is_shared])
    factors = [finish(f) for f in found]
    none = jnp.zeros(rows)
    zeros = [Zero(none, jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    tree = structure.unflatten(_replace(zeros, real, factors))
    gradients = _replace([None] * len(first), moving, dx)
    return (
        values,
        tree,
        jax.tree.unflatten(jax.tree.structure(batch[0]), gradients) if inputs else None,
    )


def _replace(items, places, new):
    """A list with other items at some places."""
    found = list(items)
    for i, item in zip(places, new, strict=True):
        found[i] = item
    return found


def _real_leaves(params):
    """The places of the leaves that hold real numbers."""
    real = []
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        at = f"params{jax.tree_util.keystr(path)}"
        _validate.is_array(at, leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"`{at}` is complex ({leaf.dtype}); a loss has a gradient in real parameters. "
                "Pass real and imaginary parts."
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            real.append(i)
    return real


def _rows(batch):
    """How many examples there are."""
    lengths = {a.shape[0] if a.ndim else 0 for a in jax.tree.leaves(batch)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"The arrays of a batch must have one length of at least 1, got {sorted(lengths)} rows."
        )
    return lengths.pop()


def _trace(f, *shapes):
    """The jaxpr of a function."""
    try:
        return jax.make_jaxpr(f)(*shapes)
    except NameError as error:
        raise ValueError(f"`loss_fn` sums over an axis of examples ({error}). {COUPLED}") from error


def check_batched(loss_fn: Callable[..., Array], params: Params, *batch: Any) -> None:
    """Raises unless a batched loss gives every example the loss that it has in a batch of one.

    Args:
        loss_fn: `(params, *batch) -> [batch]`.
        params: where to test.
        *batch: arrays of at least 2 examples, not all alike.

    Raises:
        ValueError: the loss of an example changes with the others in its batch.

    >>> def loss(w, x):
    ...     return ((x - x.mean(0)[None]) @ w) ** 2
    >>> x = jnp.array([[1.0], [2.0]])
    >>> check_batched(loss, jnp.ones(1), x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: `loss_fn` couples the examples: example 0 has loss 0.25 in the batch and 0 alone...
    """
    loss = _loss_of_one(loss_fn, True)
    together = np.asarray(loss_fn(params, *batch))
    alone = np.asarray(jax.vmap(lambda *example: loss(params, *example))(*batch))
    size = np.abs(alone).max(initial=0)
    same = np.isclose(together, alone, rtol=1e-3, atol=1e-5 * size, equal_nan=True)
    if same.all():
        return
    i = int(same.argmin())
    raise ValueError(
        f"`loss_fn` couples the examples: example {i} has loss {together[i]:.6g} in the batch and "
        f"{alone[i]:.6g} alone. {COUPLED}"
    )
