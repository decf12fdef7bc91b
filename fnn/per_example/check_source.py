"""A check that a source has a gradient of each example, before its statistics are trusted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fnn.factors import is_factor
from fnn.per_example.norms import check_is_source
from fnn.types import Params, Source


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
        leaves = jax.tree.leaves(factors, is_leaf=is_factor)
        return [values, *(jnp.sqrt(f.squared_norm()) for f in leaves)]

    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = ["loss", *(f"gradient norm at params{jax.tree_util.keystr(p)}" for p in paths)]
    together = answers(*batch)
    row = np.arange(count)
    for rows in (row[: count // 2], row[-(count // 2) :], row[::2], row[1::2]):
        part = answers(*jax.tree.map(lambda a, rows=rows: jnp.asarray(a)[rows], batch))
        for name, whole, own in zip(names, together, part, strict=True):
            _check_same(name, whole[rows], own, rows)


def _check_shapes(source: Source, params: Params, batch: Any, count: int) -> None:
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
    if structure != expected or not all(is_factor(f) for f in factors):
        raise TypeError(
            "`source`: factors must be a tree like `params` with a factor for every array, "
            f"{expected}, got {structure}."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, p), f in zip(leaves, factors, strict=True):
        shape = jax.eval_shape(lambda f: f.materialise(), f).shape
        if shape != (count, *p.shape):
            raise ValueError(
                f"`source`: the factor at `params{jax.tree_util.keystr(path)}` is of gradients "
                f"{shape}, expected {(count, *p.shape)}: [batch, *parameter shape]."
            )


def _check_same(
    name: str, whole: Float[Any, " rows"], part: Float[Any, " rows"], rows: np.ndarray
) -> None:
    """Raises unless the answers for the same examples agree; a coupling leaves a larger gap."""
    tolerance = float(jnp.finfo(whole.dtype).eps) ** 0.5
    whole, part = (np.asarray(a).astype(np.float64) for a in (whole, part))
    size = np.abs(whole[np.isfinite(whole)]).max(initial=0)
    same = np.isclose(whole, part, rtol=0, atol=tolerance * size, equal_nan=True)
    if same.all():
        return
    i = int(np.argmin(same))
    raise ValueError(
        f"`source` couples the examples: the {name} of example {rows[i]} is {whole[i]:.6g} in the "
        f"batch but {part[i]:.6g} in part of it. Per-example statistics mean nothing there. Batch "
        "normalisation? Use `layer_norm`. A loss over pairs? Make each pair an example."
    )
