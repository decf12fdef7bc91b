"""Checks of derivatives.

A net's manual gradient against `jax.grad`, and any layer or loss by three independent means.

`compare_gradients` measures in the dtype that it is given. `check_layer` and `check_loss` compute
in float64: the adjoint identity <J t, c> = <t, J^T c> with J t by a central difference (no
automatic differentiation in it), `jax.vjp`, and central differences coordinate by coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fnn import _validate
from fnn.backprop import mean_loss, value_and_grad
from fnn.types import Array, ArrayLike, Key, Layer, Loss, Params

TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 5e-3}
"""Norm-wise relative error at which manual and automatic gradient count as equal, by dtype."""


class LeafComparison(NamedTuple):
    """One array of the gradient, manual against automatic."""

    path: str
    shape: tuple[int, ...]
    max_difference: float  # greatest |manual - automatic|
    relative_error: float  # |manual - automatic| / |automatic|, Euclidean norms
    cosine: float  # 1 where both are zero
    exact: bool  # equal to the bit
    # relative errors (manual, automatic) to the float64 gradient, where asked
    against_float64: tuple[float, float] | None


class Cost(NamedTuple):
    """What a compiled function costs, by XLA's own analysis."""

    flops: float
    bytes_accessed: float
    temporary_bytes: int


class GradientReport(NamedTuple):
    """What `compare_gradients` found; `print` it for a table."""

    leaves: tuple[LeafComparison, ...]
    relative_error: float  # over all leaves
    cosine: float
    value_difference: float  # |manual loss - automatic loss|
    manual: Cost
    automatic: Cost
    tolerance: float
    passed: bool

    def __str__(self) -> str:
        wide = max([len(leaf.path) for leaf in self.leaves] + [4])
        lines = [
            f"{'leaf':<{wide}}  {'shape':<14}{'max |m - a|':>12}{'rel. error':>12}{'cosine':>12}  exact"
        ]
        for leaf in self.leaves:
            truth = leaf.against_float64
            note = (
                ""
                if truth is None
                else f"   against float64: manual {truth[0]:.1e}, automatic {truth[1]:.1e}"
            )
            lines.append(
                f"{leaf.path:<{wide}}  {leaf.shape!s:<14}{leaf.max_difference:>12.2e}{leaf.relative_error:>12.2e}"
                f"{leaf.cosine:>12.8f}  {'yes' if leaf.exact else 'no'}{note}"
            )
        lines.append(
            f"{'all':<{wide}}  {'':<14}{'':>12}{self.relative_error:>12.2e}{self.cosine:>12.8f}"
        )
        lines.append(
            f"{'compiled cost':<22}{'flops':>14}{'bytes accessed':>16}{'temporary bytes':>17}"
        )
        for name, cost in (("manual", self.manual), ("automatic", self.automatic)):
            lines.append(
                f"{name:<22}{cost.flops:>14,.0f}{cost.bytes_accessed:>16,.0f}{cost.temporary_bytes:>17,}"
            )
        verdict = "agree" if self.passed else "DIFFER"
        lines.append(
            f"manual and automatic {verdict} (tolerance {self.tolerance:.0e}); losses differ by {self.value_difference:.1e}"
        )
        return "\n".join(lines)


def compare_gradients(
    net: Layer,
    loss: Loss,
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    tolerance: float | None = None,
) -> GradientReport:
    """Holds the hand-written gradient of the mean loss against `jax.grad`, leaf by leaf.

    Args:
        net, loss: as for `value_and_grad`.
        params, x, targets, weights: as its function takes them.
        tolerance: greatest relative error of a leaf; by default `TOLERANCES` of the params' dtype.

    Returns:
        A report that prints as a table. It passes where every leaf is within the tolerance, or else
        no farther from the gradient in float64 than twice `jax.grad` itself is (cancellation makes
        both differ there).

    Raises:
        TypeError, ValueError: as `value_and_grad`; `params` without any array.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2), "tanh")
    >>> x = jnp.linspace(-1, 1, 15).reshape(5, 3)
    >>> report = compare_gradients(net, fnn.losses.l2_loss, net.init(jax.random.key(0)), x, jnp.ones((5, 2)))
    >>> report.passed, [leaf.path for leaf in report.leaves][:2]
    (True, ['[0][0].w', '[0][0].b'])
    """
    manual_function, automatic_function = (
        value_and_grad(net, loss),
        jax.value_and_grad(mean_loss(net, loss)),
    )
    batch = (x, targets) if weights is None else (x, targets, weights)
    (manual_value, manual), manual_cost = _compiled(manual_function, params, *batch)
    (automatic_value, automatic), automatic_cost = _compiled(automatic_function, params, *batch)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(manual)]
    if not paths:
        raise ValueError("`params` hold no array: there is no gradient to compare.")
    if tolerance is None:
        tolerance = max(TOLERANCES[str(leaf.dtype)] for leaf in jax.tree.leaves(params))
    pairs = list(zip(jax.tree.leaves(manual), jax.tree.leaves(automatic), strict=True))
    leaves = [_compare_leaf(path, m, a) for path, (m, a) in zip(paths, pairs, strict=True)]
    failed = [i for i, leaf in enumerate(leaves) if not leaf.relative_error <= tolerance]
    if failed and all(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(params)):
        truth = _float64_gradient(automatic_function, params, *batch)
        for i in failed:
            errors = tuple(_relative_error(_wide(g), truth[i]) for g in pairs[i])
            leaves[i] = leaves[i]._replace(against_float64=errors)
    flat_m, flat_a = (np.concatenate([_wide(pair[k]).ravel() for pair in pairs]) for k in (0, 1))
    return GradientReport(
        leaves=tuple(leaves),
        relative_error=_relative_error(flat_m, flat_a),
        cosine=_cosine(flat_m, flat_a),
        value_difference=abs(float(manual_value) - float(automatic_value)),
        manual=manual_cost,
        automatic=automatic_cost,
        tolerance=tolerance,
        passed=all(_leaf_passes(leaf, tolerance) for leaf in leaves),
    )


class Check(NamedTuple):
    """One test of a derivative."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class CheckReport(NamedTuple):
    """What `check_layer` or `check_loss` found; `print` it for a table."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.subject:<34}{'rel. error':>12}{'tolerance':>12}"]
        lines += [
            f"{c.name:<34}{c.error:>12.2e}{c.tolerance:>12.0e}  {'passed' if c.passed else 'FAILED'}"
            for c in self.checks
        ]
        return "\n".join(lines)


def check_layer(layer: Layer, x: Any, *, key: Key, params: Params = None) -> CheckReport:
    """Tests a layer's `backward`, with respect to its params and its input, in float64.

    Args:
        layer: any layer, yours for instance.
        x: an input, `[batch, ...]`; keep it away from kinks, where a central difference means
            nothing.
        key: for the random directions, and for `params` if they are None.
        params: where to test; None draws them by `layer.init`.

    Returns:
        A report with three checks, each by an error relative to the gradient's size: the adjoint
        identity, `jax.vjp`, and central differences at up to 64 coordinates.

    Raises:
        TypeError, ValueError: `layer` is no Layer, or `x` does not fit it.

    >>> import fnn
    >>> print(check_layer(fnn.activations.tanh, jnp.array([[0.3, -2.0]]), key=jax.random.key(0)).passed)
    True
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"`layer` must be a Layer, got {layer!r}.")
    _validate.is_array("x", x)
    _validate.is_key("key", key)
    with jax.enable_x64(True):
        params = _as_float64(layer.init(key) if params is None else params)
        x = _as_float64(x)
        whole = not jnp.issubdtype(x.dtype, jnp.floating)
        point = (params,) if whole else (params, x)
        y, residuals = layer.forward(params, x)
        cotangent = jax.random.normal(jax.random.fold_in(key, 1), y.shape, y.dtype)
        grads, dx = layer.backward(params, residuals, cotangent)
        pulled = (grads,) if whole else (grads, dx)
        return _three_checks(
            layer.name,
            lambda p, x=x: layer.apply(p, x),
            point,
            cotangent,
            pulled,
            jax.random.fold_in(key, 2),
        )


def check_loss(loss: Loss, outputs: Any, targets: Any, *, key: Key) -> CheckReport:
    """Tests a loss's `grad` against its `value`, in float64.

    Args:
        loss: any loss, yours for instance.
        outputs: `[batch, ...]`, away from kinks.
        targets: what the loss takes.
        key: for the random directions.

    Returns:
        A report with three checks, as `check_layer`'s.

    Raises:
        TypeError, ValueError: `loss` is no Loss, `value` is not `[batch]`, or the arrays do not
            fit.

    >>> import fnn
    >>> print(check_loss(fnn.losses.l2_loss, jnp.array([[0.3, -2.0]]), jnp.zeros((1, 2)), key=jax.random.key(0)).passed)
    True
    """
    if not isinstance(loss, Loss):
        raise TypeError(f"`loss` must be a Loss, got {loss!r}.")
    _validate.is_float("outputs", outputs)
    _validate.is_array("targets", targets)
    _validate.is_key("key", key)
    with jax.enable_x64(True):
        outputs, targets = _as_float64(outputs), _as_float64(targets)
        values = loss.value(outputs, targets)
        if values.shape != outputs.shape[:1]:
            raise ValueError(
                f"{loss.name}: `value` must return one number per example, shape {outputs.shape[:1]}, got {values.shape}."
            )
        cotangent = jax.random.normal(jax.random.fold_in(key, 1), values.shape, values.dtype)
        pulled = loss.grad(outputs, targets) * cotangent.reshape(-1, *(1,) * (outputs.ndim - 1))
        return _three_checks(
            loss.name,
            lambda y: loss.value(y, targets),
            (outputs,),
            cotangent,
            (pulled,),
            jax.random.fold_in(key, 2),
        )


def _three_checks(
    name: str, f: Callable[..., Array], point: Any, cotangent: Array, pulled: Any, key: Key
) -> CheckReport:
    """Tests that `pulled` is J^T cotangent for the Jacobian J of `f` at `point`."""
    flat, unravel = ravel_pytree(point)
    ours = np.asarray(ravel_pytree(pulled)[0])

    @jax.jit
    def scalar(z: Array) -> Array:  # <f(z), c>
        return (f(*unravel(z)) * cotangent).sum()

    def slope(direction: Array, h: float = 1e-6) -> float:
        return float(scalar(flat + h * direction) - scalar(flat - h * direction)) / (2 * h)

    direction = jax.random.normal(key, flat.shape, flat.dtype)
    left, right = slope(direction), float(ours @ np.asarray(direction))  # <J t, c> and <t, J^T c>
    scale = max(float(np.linalg.norm(ours)), 1e-8)
    _, pullback = jax.vjp(f, *point)
    automatic = np.asarray(ravel_pytree(pullback(cotangent))[0])
    some = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), flat.size))[:64]
    numeric = np.array([slope(jnp.zeros_like(flat).at[i].set(1)) for i in some])
    return CheckReport(
        name,
        (
            Check(
                "adjoint <J t, c> = <t, J'c>",
                abs(left - right) / (scale * float(np.linalg.norm(direction))),
                1e-7,
            ),
            Check(
                "against jax.vjp",
                float(np.linalg.norm(ours - automatic))
                / max(float(np.linalg.norm(automatic)), 1e-8),
                1e-12,
            ),
            Check(
                "against central differences",
                float(np.linalg.norm(ours[some] - numeric)) / scale,
                1e-6,
            ),
        ),
    )


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, Cost]:
    """The function's result and its compiled cost; compiled once."""
    compiled = jax.jit(function).lower(*args).compile()
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    return compiled(*args), Cost(
        analysis.get("flops", float("nan")), analysis.get("bytes accessed", float("nan")), temporary
    )


def _float64_gradient(
    function: Callable[..., Any], params: Params, *batch: ArrayLike
) -> list[np.ndarray]:
    with jax.enable_x64(True):
        return [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(jax.jit(function)(*_as_float64((params, *batch)))[1])
        ]


def _as_float64(tree: Any) -> Any:
    """Every floating-point array in float64; whole numbers as they are.

    Inside `jax.enable_x64(True)`.
    """
    return jax.tree.map(
        lambda a: (
            jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.asarray(a)
        ),
        tree,
    )


def _wide(a: Any) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def _relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    difference, size = float(np.linalg.norm(ours - reference)), float(np.linalg.norm(reference))
    return 0.0 if difference == 0 else difference / size if size else float("inf")


def _cosine(ours: np.ndarray, reference: np.ndarray) -> float:
    sizes = float(np.linalg.norm(ours)) * float(np.linalg.norm(reference))
    return (
        float(np.vdot(ours, reference)) / sizes if sizes else float(np.array_equal(ours, reference))
    )


def _compare_leaf(path: str, manual: Any, automatic: Any) -> LeafComparison:
    exact = np.asarray(manual).tobytes() == np.asarray(automatic).tobytes()
    m, a = _wide(manual), _wide(automatic)
    return LeafComparison(
        path, m.shape, float(np.abs(m - a).max()), _relative_error(m, a), _cosine(m, a), exact, None
    )


def _leaf_passes(leaf: LeafComparison, tolerance: float) -> bool:
    if leaf.relative_error <= tolerance:
        return True
    return (
        leaf.against_float64 is not None and leaf.against_float64[0] <= 2 * leaf.against_float64[1]
    )
