"""What a source keeps for every parameter."""

from __future__ import annotations

from typing import Any

import jax

from fnn.factors import PerExample, View, is_factor
from fnn.per_example.norms import check_is_source
from fnn.types import Params, Source


class Report(dict):
    """What is kept for every parameter, by its path; prints as a table."""

    def __str__(self) -> str:
        """A line for every parameter."""
        width = max(map(len, self), default=0)
        return "\n".join(f"{path:{width}}  {text}" for path, text in self.items())


def report(source: Source, params: Params, *batch: Any) -> Report:
    """The kind of factor that a source keeps for every parameter; computes no array.

    Args:
        source: `(params, *batch) -> (values, factors)`.
        params: a tree of arrays, or of `jax.ShapeDtypeStruct`.
        *batch: as of the source.

    Returns:
        `{path: text}`, which prints as a table. `Outer` is a product of two arrays, `Scatter` rows
        of a table, `Conv` a convolution, `Stacked(...)` layers, `Sum(...)` several of them, `Same`
        what all examples share, `Mapped(...)` one behind a linear map, whose norms take one example
        after the other. `PerExample written out at ...` takes batch x parameter of memory.

    >>> import fnn
    >>> net = fnn.mlp((3, 2))
    >>> source = fnn.source(net, fnn.losses.l2_loss)
    >>> params = net.init(jax.random.key(0))
    >>> x, targets = jax.numpy.ones((5, 3)), jax.numpy.ones((5, 2))
    >>> print(report(source, params, x, targets))
    [0].w  Outer
    [0].b  PerExample
    """
    check_is_source(source)
    _, factors = jax.eval_shape(source, params, *batch)
    return report_factors(factors)


def report_factors(factors: Any) -> Report:
    """The same of a tree of factors."""
    leaves = jax.tree_util.tree_leaves_with_path(factors, is_leaf=is_factor)
    return Report({jax.tree_util.keystr(path): _describe(f) for path, f in leaves})


def _describe(factor):
    if isinstance(factor, View):
        return _describe(factor.of)
    name = type(factor).__name__
    if isinstance(factor, PerExample) and factor.why:
        name += f" written out at {factor.why}"
    inner = []
    for value in vars(factor).values():
        parts = value if isinstance(value, tuple) else (value,)
        inner += [_describe(part) for part in parts if is_factor(part)]
    return f"{name}({', '.join(inner)})" if inner else name
