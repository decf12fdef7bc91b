"""What a source is asked before its numbers are trusted.

How they will be computed, and whether its examples are apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.factors import Method, is_factor
from fnn.per_example.norms import Source, is_source
from fnn.types import Array, Params

QUESTIONS = {
    "total": "gradient",
    "norm": "norms, clipping",
    "moments": "moments",
    "gram": "Gram matrix",
}


class Explanation(NamedTuple):
    """How every question will be answered; `print` it for a table.

    Attributes:
        leaves: path of the parameter, kind of its factor, shape of the parameter, and a `Method`
            (name, flops, bytes) for each of `total`, `norm`, `moments` and `gram`.
    """

    leaves: tuple[tuple[str, str, tuple[int, ...], dict[str, Method]], ...]

    def __str__(self) -> str:
        named = [(f"{path}  {kind} {shape}", methods) for path, kind, shape, methods in self.leaves]
        wide = max(len(name) for name, _ in named) + 4
        methods = max(len(m.name) for _, found in named for m in found.values()) + 2
        lines = []
        for question, title in QUESTIONS.items():
            lines.append(f"{title:<{wide}}{'method':<{methods}}{'flops':>14}{'bytes':>14}")
            of = [(name, found[question]) for name, found in named]
            of.append(("all", Method("", sum(m.flops for _, m in of), sum(m.bytes for _, m in of))))
            lines += [
                f"  {name:<{wide - 2}}{m.name:<{methods}}{m.flops:>14,.0f}{m.bytes:>14,.0f}"
                for name, m in of
            ]
        return "\n".join(lines)


def explain(source: Source, params: Params, *batch: Any) -> Explanation:
    """Which method answers each question for each parameter, and its predicted flops and bytes.

    Computes no array.

    The flops and bytes are those of the answer alone, from shapes; the forward and the backward
    pass come on top.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        params: of the source's net, or their shapes.
        *batch: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
        An explanation that prints as a table.

    >>> import fnn
    >>> net = fnn.mlp((784, 10))
    >>> source = fnn.source(net, fnn.losses.l2_loss)
    >>> shapes = jnp.zeros((128, 784)), jnp.zeros((128, 10))
    >>> explain(source, net.init(jax.random.key(0)), *shapes).leaves[0][3]["norm"]
    Method(name='|a| |dz|', flops=203264, bytes=406528)
    """
    is_source(source)
    _, factors = jax.eval_shape(source, params, *batch)
    shapes = jax.tree.leaves(params)
    leaves = jax.tree_util.tree_leaves_with_path(factors, is_leaf=is_factor)
    if not leaves:
        raise ValueError("`params` hold no parameter: there is nothing to explain.")
    return Explanation(
        tuple(
            (jax.tree_util.keystr(path), type(f).__name__, tuple(p.shape), f.methods())
            for (path, f), p in zip(leaves, shapes, strict=True)
        )
    )


def check_source(source: Source, params: Params, *batch: Any) -> None:
    """Raises unless a source can be asked per-example questions.

    Its factors fit `params`, and no example depends on the others.

    A loss over pairs, or a layer such as batch normalisation, couples the examples: then there is
    no gradient *of* an example, and clipping it bounds nothing. A finite probe: losses and gradient
    norms in the batch are held against those in its first and its last half, and in every other
    row.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        params: where to test.
        *batch: arrays of at least 2 examples, that are not all alike.

    Raises:
        TypeError, ValueError: what the source returns does not fit; some example's loss or gradient
            changes when others leave.

    >>> import fnn
    >>> loss = fnn.Loss("centred", lambda y, t: ((y - y.mean(0)[None]) ** 2).sum(-1), lambda y, t: 2 * (y - y.mean(0)[None]))
    >>> net = fnn.mlp((3, 2))
    >>> batch = jax.random.normal(jax.random.key(1), (4, 3)), jnp.zeros((4, 2))
    >>> check_source(fnn.source(net, loss), net.init(jax.random.key(0)), *batch)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: `source` couples the examples: the loss of example 0 is ... in the batch but ... in
        half of it. ...
    """
    is_source(source)
    rows = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or min(rows) < 2:
        raise ValueError(
            f"The arrays of the batch must have one length of at least 2, got {sorted(rows)} rows: half of it is the probe."
        )
    count = rows.pop()
    _check_factors(source, params, batch, count)

    @jax.jit
    def answers(*batch: Any) -> tuple[Array, list[Array]]:
        values, factors = source(params, *batch)
        return values, [f.norm() for f in jax.tree.leaves(factors, is_leaf=is_factor)]

    names = [
        "loss",
        *(
            f"gradient norm at params{jax.tree_util.keystr(path)}"
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ),
    ]
    together = answers(*batch)
    for rows in (
        np.arange(count)[: count // 2],
        np.arange(count)[-(count // 2) :],
        np.arange(0, count, 2),
        np.arange(1, count, 2),
    ):
        apart = answers(*jax.tree.map(lambda a, rows=rows: jnp.asarray(a)[rows], batch))
        for name, whole, part in zip(
            names, jax.tree.leaves(together), jax.tree.leaves(apart), strict=True
        ):
            _check_same(
                name,
                np.asarray(whole)[rows],
                np.asarray(part),
                rows,
                float(jnp.finfo(whole.dtype).eps),
            )


def _check_factors(source: Source, params: Params, batch: Any, count: int) -> None:
    result = jax.eval_shape(source, params, *batch)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"`source` must return (values, factors), got {type(result).__name__}.")
    values, factors = result
    if getattr(values, "shape", None) != (count,):
        raise ValueError(
            f"`source`: values must be one number per example, ({count},), got {getattr(values, 'shape', values)}."
        )
    expected = jax.tree.structure(params)
    found = jax.tree.structure(factors, is_leaf=is_factor)
    if found != expected or not all(
        is_factor(f) for f in jax.tree.leaves(factors, is_leaf=is_factor)
    ):
        raise TypeError(
            f"`source`: factors must be a tree like `params` with a factor for every array, {expected}, got {found}."
        )
    for (path, p), f in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(factors, is_leaf=is_factor),
        strict=True,
    ):
        shape = jax.eval_shape(lambda f: f.materialise(), f).shape
        if shape != (count, *p.shape):
            at = f"params{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"`source`: the factor at `{at}` is of gradients {shape}, expected {(count, *p.shape)}: [batch, *parameter shape]."
            )


def _check_same(
    name: str, whole: np.ndarray, part: np.ndarray, rows: np.ndarray, eps: float
) -> None:
    """Raises unless the answers for the same examples agree to far more than a coupling would
    leave."""
    whole, part = whole.astype(np.float64), part.astype(np.float64)
    size = np.abs(np.where(np.isfinite(whole), whole, 0)).max()
    same = (
        (np.abs(whole - part) <= eps**0.5 * size)
        | (np.isnan(whole) & np.isnan(part))
        | (whole == part)
    )
    if not same.all():
        i = int(np.argmin(same))
        came = f"the {name} of example {rows[i]} is {whole[i]:.6g} in the batch but {part[i]:.6g} in half of it"
        mend = (
            "Batch normalisation? Use `layer_norm`. A loss over pairs? Make each pair an example."
        )
        raise ValueError(
            f"`source` couples the examples: {came}. Per-example statistics mean nothing there. {mend}"
        )
