"""A check that a source has a gradient of each example, before its statistics are trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.factors import is_factor, materialise
from fnn.per_example.norms import check_is_source
from fnn.types import Array, Params, Source

COUPLED = (
    "The gradient of one example needs the loss of one example. Batch normalisation in training "
    "mode, new batch statistics and other auxiliary outputs couple examples or are no loss: use "
    "the running averages, a GroupNorm or a LayerNorm, and return the loss alone."
)


def check_source(source: Source, params: Params, *batch: Any) -> None:
    """Raises unless the factors of a source fit `params` and its examples are independent.

    A loss over pairs, or a layer such as batch normalisation, couples the examples: then there is
    no gradient *of* an example, and clipping it bounds nothing. The check compares losses and
    gradient norms in the batch with those in its first and its last half, and in every other row.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        params: where to test.
        *batch: arrays of at least 2 examples, not all alike.

    Raises:
        TypeError, ValueError: what the source returns does not fit; the loss or gradient of an
            example changes when others leave the batch.

    >>> import fnn
    >>> def centred(y, t):
    ...     return y - y.mean(0)[None]
    >>> loss = fnn.Loss("centred", lambda y, t: (centred(y, t) ** 2).sum(-1), centred)
    >>> net = fnn.mlp((3, 2))
    >>> batch = jax.random.normal(jax.random.key(1), (4, 3)), jnp.zeros((4, 2))
    >>> params = net.init(jax.random.key(0))
    >>> check_source(fnn.source(net, loss), params, *batch)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: `source` couples the examples: the loss of example 0 is ... in the batch but ... in
        part of it. ...
    """
    check_is_source(source)
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            "The arrays of the batch must have one length of at least 2, since the check takes "
            f"half of it; got {sorted(counts)} rows."
        )
    count = counts.pop()
    _check_shapes(source, params, batch, count)

    @jax.jit
    def answers(*batch):
        values, factors = source(params, *batch)
        answers = [values]
        for f in jax.tree.leaves(factors, is_leaf=is_factor):
            answers.append(jnp.sqrt(f.squared_norm()))
        return answers

    names = ["loss"]
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names.append(f"gradient norm at params{jax.tree_util.keystr(path)}")
    together = answers(*batch)
    row = np.arange(count)
    half = count // 2
    for rows in (row[:half], row[-half:], row[::2], row[1::2]):
        some = jax.tree.map(lambda a, rows=rows: jnp.asarray(a)[rows], batch)
        part = answers(*some)
        for name, whole, own in zip(names, together, part, strict=True):
            _check_same(name, whole[rows], own, rows)


def _check_shapes(source, params, batch, count):
    """Raises unless a source returns a number per example and a factor per array."""
    result = jax.eval_shape(source, params, *batch)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"`source` must return (values, factors), got {type(result).__name__}.")
    values, tree = result
    came = getattr(values, "shape", values)
    if came != (count,):
        raise ValueError(
            f"`source`: values must be one number per example, ({count},), got {came}."
        )
    factors, structure = jax.tree.flatten(tree, is_leaf=is_factor)
    expected = jax.tree.structure(params)
    all_factors = all(is_factor(f) for f in factors)
    if structure != expected or not all_factors:
        raise TypeError(
            "`source`: factors must be a tree like `params` with a factor for every array, "
            f"{expected}, got {structure}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, p), f in zip(leaves, factors, strict=True):
        shape = jax.eval_shape(materialise, f).shape
        expected = (count, *p.shape)
        if shape != expected:
            raise ValueError(
                f"`source`: the factor at `params{jax.tree_util.keystr(path)}` is of gradients "
                f"{shape}, expected {expected}: [batch, *parameter shape]."
            )


def _check_same(name, whole, part, rows):
    """Raises unless the answers for the same examples agree; a coupling leaves a larger gap."""
    tolerance = float(jnp.finfo(whole.dtype).eps) ** 0.5
    whole = np.asarray(whole).astype(np.float64)
    part = np.asarray(part).astype(np.float64)
    finite = whole[np.isfinite(whole)]
    size = np.abs(finite).max(initial=0)
    gap = tolerance * size
    same = np.isclose(whole, part, rtol=0, atol=gap, equal_nan=True)
    if same.all():
        return
    i = same.argmin()
    raise ValueError(
        f"`source` couples the examples: the {name} of example {rows[i]} is {whole[i]:.6g} in the "
        f"batch but {part[i]:.6g} in part of it. Per-example statistics mean nothing there. Batch "
        "normalisation? Use `layer_norm`. A loss over pairs? Make each pair an example."
    )


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
    loss = loss_of_one(loss_fn, True)
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


def loss_of_one(loss_fn: Callable[..., Array], batched: bool) -> Callable[..., Array]:
    """`(params, *example) -> scalar`, checked; from a loss of batches, where `batched`."""

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
    if not is_array:
        came = f"{type(value).__name__} of {came}"
    mend = COUPLED
    if is_real:
        mend = "Sum it over outputs. A loss of a whole batch? Say `batched=True`."
    if is_real and shape:
        mend = "Return the loss of each example: no mean over the batch."
    raise TypeError(f"{expected}, got {came}. {mend}")
