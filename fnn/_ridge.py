"""Ridge regression in closed form, at once or batch by batch.

What `fnn.reservoir` and `fnn.rules.extreme_learning` have in common.

Of targets T on features X, both less their (weighted) means; the intercept b is not penalised:

    minimise  sum_i weight_i |t_i - x_i w - b|^2 + penalty |w|^2:    (C + penalty I) w = P,    b =
    mean T - mean X w

with C = X^T X and P = X^T T. Those of several batches are merged with their means. Sums of raw
squares are never formed: of numbers far from 0 they keep nothing.

    n = n_1 + n_2,    d = mean_2 - mean_1,    mean = mean_1 + d n_2 / n,    C = C_1 + C_2 + d^T d
    n_1 n_2 / n,    and so for P

Source: Hoerl, Kennard (1970), doi:10.1080/00401706.1970.10488634; merging: Chan, Golub, LeVeque
(1983), doi:10.1080/00031305.1983.10483115.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.scipy.linalg import cho_solve

from fnn import _validate
from fnn.factors.rows import centred, per_row, times_row
from fnn.nets.layers import Dense
from fnn.types import Array, ArrayLike, at_least_float32


def ridge(
    features: ArrayLike,
    targets: ArrayLike,
    penalty: Any,
    *,
    intercept: bool = True,
    weights: ArrayLike | None = None,
) -> Dense:
    """The linear readout that minimises `sum(weights * |t - x w - b|^2) + penalty |w|^2`, as
    scikit-learn's `Ridge(alpha=penalty)`.

    Args:
        features: `[examples, features]`.
        targets: `[examples, outputs]`, in the dtype of the features.
        penalty: at least 0; a traced or JAX scalar may be mapped over. Squared errors are summed,
            not averaged: it does not grow with the number of examples.
        intercept: False for a readout through 0, whose `b` is None.
        weights: `[examples]`, not negative; 0 is padding, whatever it holds.

    Returns:
        `Dense(w=[features, outputs], b=[outputs])` in the dtype of the features, for `features @ w
        + b`. Solved by Cholesky in float32 at least.

    Raises:
        TypeError, ValueError: shapes, dtypes or the penalty cannot be meant; the equations have no
            unique solution (fewer examples than features, features that depend on each other) and
            there is no penalty, or one lost in rounding. Under `jit` such a readout is NaN instead.

    Source: Hoerl, Kennard (1970), doi:10.1080/00401706.1970.10488634.

    >>> x = jnp.arange(5.0)[:, None]
    >>> ridge(x, 2 * x + 1, 0.0)
    Dense(w=Array([[2.]], dtype=float32), b=Array([1.], dtype=float32))
    """
    solution = _of_batch(features, targets, weights).solve(penalty, intercept=intercept)
    return jax.tree.map(lambda a: a.astype(_validate.canonical_dtype(features)), solution)


class NormalEquations(NamedTuple):
    """What ridge regression has to know of the examples seen so far.

    A pytree, to carry through a scan or to merge across devices.

    >>> equations = NormalEquations.start(1, 1)
    >>> for x in jnp.arange(6.0).reshape(3, 2, 1):
    ...     equations = equations.add(x, 2 * x + 1)
    >>> equations.solve(0.0).w.round(5)
    Array([[2.]], dtype=float32)
    """

    weight: Array  # []: the sum of the examples' weights
    mean: Array  # [features]
    target_mean: Array  # [outputs]
    moments: Array  # [features, features]: sum of weight (x - mean)^T (x - mean)
    products: Array  # [features, outputs]: sum of weight (x - mean)^T (t - target_mean)

    @staticmethod
    def start(features: int, outputs: int, dtype: Any = float) -> NormalEquations:
        """Those of no example; float32 at least."""
        _validate.positive("features", features, whole=True)
        _validate.positive("outputs", outputs, whole=True)
        wide = at_least_float32(jnp.zeros((), dtype)).dtype
        shapes = (), (features,), (outputs,), (features, features), (features, outputs)
        return NormalEquations(*(jnp.zeros(shape, wide) for shape in shapes))

    def add(
        self, features: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None
    ) -> NormalEquations:
        """With a batch more: `features [batch, features]`, `targets [batch, outputs]`, `weights
        [batch]` as for `ridge`."""
        return self.merge(_of_batch(features, targets, weights))

    def merge(self, other: NormalEquations) -> NormalEquations:
        """Those of the examples of both, in either order."""
        for ours, theirs in zip(self, other, strict=True):
            if ours.shape != theirs.shape:
                size = tuple(
                    f"{e.products.shape[0]} features and {e.products.shape[1]} outputs"
                    for e in (self, other)
                )
                raise ValueError(
                    f"These equations are for {size[0]}, but what is added has {size[1]}. Begin with `start` for its sizes."
                )
            _validate.same_dtype("features", theirs, "moments", ours)
        return _merged(self, other)

    def solve(self, penalty: Any, *, intercept: bool = True) -> Dense:
        """The readout of all examples so far, as `ridge` of them at once."""
        _check_penalty(penalty)
        none = not isinstance(penalty, Tracer) and bool(penalty == 0)
        readout = _solution(self, jnp.asarray(penalty, self.moments.dtype), intercept, none)
        if not isinstance(readout.w, Tracer) and not bool(jnp.isfinite(readout.w).all()):
            _explain(_about(self, intercept)[0], penalty)
        return readout


@jax.jit
def _sums(x: Array, t: Array, weights: Array | None) -> NormalEquations:
    """Those of one batch."""
    x, t = at_least_float32(x), at_least_float32(t)
    w = jnp.ones(len(x), x.dtype) if weights is None else weights.astype(x.dtype)
    x, t = (jnp.where(per_row(w != 0, a), a, jnp.zeros_like(a)) for a in (x, t))
    whole = w.sum()
    share = w / jnp.where(whole > 0, whole, jnp.ones_like(whole))
    with jax.default_matmul_precision("highest"):
        (mean, x), (target_mean, t) = centred(x, share), centred(t, share)
        x, t = (times_row(a, jnp.sqrt(w)) for a in (x, t))
        return NormalEquations(whole, mean, target_mean, x.T @ x, x.T @ t)


@jax.jit
def _merged(one: NormalEquations, other: NormalEquations) -> NormalEquations:
    weight = one.weight + other.weight
    share = other.weight / jnp.where(weight > 0, weight, jnp.ones_like(weight))
    d, e, between = other.mean - one.mean, other.target_mean - one.target_mean, one.weight * share
    return NormalEquations(
        weight,
        one.mean + d * share,
        one.target_mean + e * share,
        one.moments + other.moments + jnp.outer(d, d) * between,
        one.products + other.products + jnp.outer(d, e) * between,
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _solution(equations: NormalEquations, penalty: Array, intercept: bool, none: bool) -> Dense:
    """The readout; NaN where there is none that is unique. `none` says that there is no penalty."""
    moments, products = _about(equations, intercept)
    with jax.default_matmul_precision("highest"):
        w = cho_solve(
            (
                jnp.linalg.cholesky(moments + penalty * jnp.eye(len(moments), dtype=moments.dtype)),
                True,
            ),
            products,
        )
        if none:  # rounding may hide it from Cholesky that the equations are singular
            w = jnp.where(_rank(moments) == len(moments), w, jnp.full_like(w, jnp.nan))
        return Dense(w, equations.target_mean - equations.mean @ w if intercept else None)


def _about(equations: NormalEquations, intercept: bool) -> tuple[Array, Array]:
    """Moments and products about the means; about 0 where there is no intercept."""
    weight, mean, target_mean, moments, products = equations
    if intercept:
        return moments, products
    return moments + jnp.outer(mean, mean) * weight, products + jnp.outer(
        mean, target_mean
    ) * weight


def _rank(moments: Array) -> Array:
    """The rank of co-moments to rounding, whatever the features' scales."""
    size = jnp.sqrt(jnp.diag(moments))
    unit = jnp.where(
        size > 0, 1 / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size)
    )
    values = jnp.linalg.eigvalsh(moments * jnp.outer(unit, unit))
    return (values > len(moments) * float(jnp.finfo(moments.dtype).eps) * values[-1]).sum()


def _of_batch(
    features: ArrayLike, targets: ArrayLike, weights: ArrayLike | None
) -> NormalEquations:
    check_rows("features", features, None)
    check_rows("targets", targets, None)
    _validate.same_dtype("targets", targets, "features", features)
    if features.shape[0] != targets.shape[0]:
        raise ValueError(
            f"`features` has {features.shape[0]} rows but `targets` has {targets.shape[0]}: one per example."
        )
    if weights is not None:
        _validate.is_array("weights", weights)
        if weights.shape != features.shape[:1]:
            raise ValueError(
                f"`weights` has shape {tuple(weights.shape)}, expected {tuple(features.shape[:1])}: one per example."
            )
    return _sums(features, targets, weights)


def _explain(moments: Array, penalty: Any) -> NoReturn:
    """Says why a readout is not finite."""
    if not bool(jnp.isfinite(moments).all()):
        raise ValueError(
            "The normal equations are not finite: features, targets or weights hold NaN or Inf, or a weight is below 0."
        )
    rank, size = int(_rank(moments)), len(moments)
    if bool(penalty == 0):
        raise ValueError(
            f"The readout is not unique: the {size} features have rank {rank} in {moments.dtype} (fewer examples than features, a constant "
            "feature, or features that depend on each other). Pass a `penalty` above 0."
        )
    largest = float(jnp.diag(moments).max())
    raise ValueError(
        f"`penalty` {float(penalty):.3g} is lost in rounding: the {size} features have rank {rank} in {moments.dtype}, and sums of squares "
        f"up to {largest:.3g}. Pass a larger one, {float(jnp.finfo(moments.dtype).eps) * size * largest:.1g} say, or use float64."
    )


def _check_penalty(penalty: Any) -> None:
    if isinstance(penalty, jax.Array) and penalty.shape != ():
        raise ValueError(
            f"`penalty` must be one number, got shape {penalty.shape}. Several? `jax.vmap` over them."
        )
    if not isinstance(penalty, Tracer):
        _validate.not_negative(
            "penalty", penalty.item() if isinstance(penalty, jax.Array) else penalty
        )


def check_rows(name: str, value: Any, width: int | None) -> None:
    """Raises unless `value` is floating-point, `[rows, columns]` with at least one row, and of that
    many columns if given."""
    _validate.is_float(name, value)
    if value.ndim != 2 or value.shape[0] == 0 or width not in (None, value.shape[1]):
        columns = "columns" if width is None else width
        mend = {
            1: f" One column? Pass `{name}[:, None]`.",
            3: " Several series? `jax.vmap` over them.",
        }.get(value.ndim, "")
        raise ValueError(
            f"`{name}` must be [rows, {columns}] with at least one row, got shape {tuple(value.shape)}.{mend}"
        )
