"""Checks of derivatives: a gradient by hand against independent means, array by array.

`compare_gradients` holds the gradient of a net against `jax.grad`, in the dtype that it is given.
`check_layer` and `check_loss` test one layer or one loss in float64 by three means: `jax.vjp`; the
adjoint identity <J t, c> = <t, J^T c> for random directions t, with J t by central differences (no
automatic differentiation in it); and central differences coordinate by coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Shaped

from fnn import _validate
from fnn.backprop import forward_pass, mean_loss, output_error, value_and_grad
from fnn.factors import is_factor, keep, materialise, scale_rows, total
from fnn.types import Array, ArrayLike, Key, Layer, Loss, Params

TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 5e-3}
"""Relative error up to which a gradient by hand agrees with `jax.grad`, by dtype."""
STEPS = np.cbrt(2.2e-16) * np.array([1 / 256, 1 / 4, 16])
"""Steps of central differences, relative to the size of a coordinate."""
NOTHING = "nothing was tested: the gradient is 0 here (`x` is 0, or at a kink?), or there is none"


class Gradient(NamedTuple):
    """A gradient; the path of an array begins with the name of its field."""

    params: Any = ()
    dx: Any = ()  # with respect to the input of a layer, or to the outputs for a loss
    all: Any = ()  # its products with directions


class LeafComparison(NamedTuple):
    """One array of a gradient, held against the right one."""

    path: str  # "params[0].w"
    hint: str  # how it differs, and the likely slip; "" where both agree
    shape: tuple[int, ...] = ()
    against: str = ""  # what says the right one: "jax.grad"
    relative_error: float = np.nan  # |ours - right| / |right|, Euclidean norms
    exact: bool = False  # all numbers are equal
    # relative errors (by hand, jax.grad) to the gradient in float64, where that decides
    against_float64: tuple[float, float] | None = None


class Cost(NamedTuple):
    """What a compiled function costs, by XLA's own analysis."""

    flops: float
    bytes_accessed: float
    temporary_bytes: int


class GradientReport(NamedTuple):
    """What `compare_gradients` found; `print` it for a table."""

    leaves: list[LeafComparison]
    value_difference: float  # |loss by hand - loss by JAX|
    manual: Cost
    automatic: Cost
    tolerance: float  # greatest relative error of arrays that agree
    passed: bool

    def __str__(self) -> str:
        """A row for every array, and the compiled cost."""
        return (
            f"{_table('gradient by hand', self)}\n"
            "relative error: |by hand - jax.grad| / |jax.grad|. Both agree up to "
            f"{self.tolerance:.0e},\nor where the one by hand is at most twice as far from the "
            "gradient in float64.\n"
            f"The losses differ by {self.value_difference:.1e}.\n"
            f"by hand:  {self.manual}\njax.grad: {self.automatic}"
        )


class CheckReport(NamedTuple):
    """What `check_layer` or `check_loss` found; `print` it for a table."""

    subject: str
    leaves: list[LeafComparison]
    kinks: int = 0  # coordinates at a kink, where the gradient jumps; they are not counted

    @property
    def passed(self) -> bool:
        """Whether everything was tested, and agrees."""
        return not any(leaf.hint for leaf in self.leaves)

    def __str__(self) -> str:
        """A row for every array and what it is held against."""
        note = f"\n{self.kinks} numbers are at a kink: they are not counted." if self.kinks else ""
        return _table(self.subject, self) + note


def compare_gradients(
    net: Layer,
    loss: Loss,
    params: Params,
    x: Shaped[ArrayLike, "batch ..."],
    targets: Shaped[ArrayLike, "batch ..."],
    *,
    weights: Shaped[ArrayLike, " batch"] | None = None,
    tolerance: float | None = None,
) -> GradientReport:
    """Holds the hand-written gradient of the mean loss against `jax.grad`, leaf by leaf.

    Args:
        net: any layer.
        loss: any loss that takes its outputs.
        params: a tree of floating-point arrays.
        x: `[batch, ...]`.
        targets: `[batch, ...]`.
        weights: `[batch]`, as for `value_and_grad`.
        tolerance: greatest relative error of a leaf; by default `TOLERANCES` of the params' dtype.

    Returns:
        A report that prints as a table. It passes where every leaf is within the tolerance, or else
        no farther from the gradient in float64 than twice `jax.grad` itself is (cancellation makes
        both differ there).

    Raises:
        TypeError, ValueError: as `value_and_grad`; `params` hold no array, or whole numbers.

    >>> import fnn
    >>> net, loss = fnn.mlp((3, 4, 2), "tanh"), fnn.losses.l2_loss
    >>> x = jnp.linspace(-1, 1, 15).reshape(5, 3)
    >>> report = compare_gradients(net, loss, net.init(jax.random.key(0)), x, jnp.ones((5, 2)))
    >>> report.passed, [leaf.path for leaf in report.leaves][:2]
    (True, ['params[0][0].w', 'params[0][0].b'])
    """
    functions = value_and_grad(net, loss), jax.value_and_grad(mean_loss(net, loss))
    dtypes = _float_dtypes(params)
    if not dtypes:
        raise ValueError("`params` hold no array: there is no gradient to compare.")
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    batch = (params, x, targets) if weights is None else (params, x, targets, weights)
    (value, manual), manual_cost = _compiled(functions[0], *batch)
    (reference, automatic), automatic_cost = _compiled(functions[1], *batch)
    leaves = _compare("jax.grad", manual, automatic, tolerance, x.shape[0])
    if any(leaf.hint for leaf in leaves) and "float64" not in dtypes:
        with jax.enable_x64(True):
            truth = Gradient(jax.jit(functions[1])(*_as_float64(batch))[1])
        both = (_compare("", gradient, truth, 0.0) for gradient in (manual, automatic))
        leaves = list(map(_decide, leaves, *both))
    passed = not any(leaf.hint for leaf in leaves)
    difference = abs(float(value) - float(reference))
    return GradientReport(leaves, difference, manual_cost, automatic_cost, tolerance, passed)


def check_layer(
    layer: Layer, x: Shaped[ArrayLike, "batch ..."], *, key: Key, params: Params = None
) -> CheckReport:
    """Tests the `backward` of a layer, with respect to its params and its input, in float64.

    It tests the gradient of every array by three means, and that `backward` hands its factors to
    `reduce`: their total is the gradient, and each example has the gradient that it has alone.

    Args:
        layer: any layer, yours for instance.
        x: an input, `[batch, ...]`, with several rows. A coordinate at a kink, where the gradient
            jumps, is not counted.
        key: for the random directions, and for `params` if they are None.
        params: where to test; None draws them by `layer.init`.

    Returns:
        A report that prints as a table: for every array its error by each means, and the likely
        slip. It does not pass where nothing was tested, as where the gradient is 0.

    Raises:
        TypeError, ValueError: `layer` is no Layer, or `x` does not fit it.

    >>> import fnn
    >>> x = jnp.array([[0.3, -2.0]])
    >>> check_layer(fnn.activations.tanh, x, key=jax.random.key(0)).passed
    True
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"`layer` must be a Layer, got {layer!r}.")
    _validate.is_array("x", x)
    _validate.is_key("key", key)
    with jax.enable_x64(True):
        params = _as_float64(layer.init(key) if params is None else params)
        _float_dtypes(params)
        return _check(layer, params, key, _as_float64(x))


def check_loss(
    loss: Loss,
    outputs: Float[ArrayLike, "batch ..."],
    targets: Shaped[ArrayLike, "batch ..."],
    *,
    key: Key,
) -> CheckReport:
    """Tests the `grad` of a loss against its `value`, in float64.

    Args:
        loss: any loss, yours for instance.
        outputs: `[batch, ...]`, with several rows.
        targets: what the loss takes.
        key: for the random directions.

    Returns:
        A report as that of `check_layer`.

    Raises:
        TypeError, ValueError: `loss` is no Loss, `value` is not `[batch]`, or the arrays do not
            fit.

    >>> import fnn
    >>> outputs, targets = jnp.array([[0.3, -2.0]]), jnp.zeros((1, 2))
    >>> check_loss(fnn.losses.l2_loss, outputs, targets, key=jax.random.key(0)).passed
    True
    """
    if not isinstance(loss, Loss):
        raise TypeError(f"`loss` must be a Loss, got {loss!r}.")
    _validate.is_float("outputs", outputs)
    _validate.is_array("targets", targets)
    _validate.is_key("key", key)

    def forward(params, y, t=targets):
        return forward_pass(lambda x: (x, ()), loss, y, t)[2], (y, t)

    def backward(params, residuals, dy, reduce=total):
        return (), scale_rows(output_error(loss, *residuals), dy)

    layer = Layer(loss.name, lambda key: (), forward, backward)
    with jax.enable_x64(True):
        return _check(layer, (), key, *_as_float64((outputs, targets)))


def _check(layer: Layer, params: Params, key: Key, x: Array, *targets: Array) -> CheckReport:
    """Tests the `backward` of a layer at one point, in float64; `forward` may take targets too."""
    untested = CheckReport(layer.name, [LeafComparison("all", NOTHING)])
    if not x.size:
        return untested
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    flat, unravel = ravel_pytree(Gradient(params, x if floating else ()))
    sizes = ravel_pytree(_sizes(unravel(flat)))[0]

    @jax.jit
    def apply(z):  # z: the change of every coordinate, relative to its size
        at = unravel(flat + sizes * z)
        return layer.forward(at.params, at.dx if floating else x, *targets)[0]

    @partial(jax.jit, static_argnames="reduce")
    def pull(dy, x, *targets, reduce=()):
        residuals = layer.forward(params, x, *targets)[1]
        grads, dx = layer.backward(params, residuals, dy, *reduce)
        return Gradient(grads, dx if floating else ())

    # a stream of its own, though the key may have the seed of the data
    rng = np.random.default_rng([7, *np.asarray(jax.random.key_data(key))])
    y = apply(0 * sizes)
    dy = rng.normal(size=y.shape).astype(y.dtype)
    ours = pull(dy, x, *targets)
    gradient = jax.jit(lambda z: jax.vjp(apply, z)[1](dy)[0])
    right = gradient(0 * sizes)
    scale = float(np.linalg.norm(y) * np.linalg.norm(dy))  # rounding is relative to it
    if jnp.abs(right).max(initial=0) <= 1e-12 * scale:
        return untested
    compare = partial(_compare, "jax.vjp", tolerance=1e-12, batch=len(x), zero=NOTHING)
    leaves = compare(ours, unravel(right / sizes))
    if [leaf.shape for leaf in leaves] != [a.shape for a in jax.tree.leaves(unravel(flat))]:
        return CheckReport(layer.name, leaves)
    hand = sizes * ravel_pytree(ours)[0]
    rounding, kinks = _uncertain(gradient, right, scale, rng)
    hand = jnp.where(jnp.abs(hand - right) <= rounding, right, hand)
    leaves = compare(unravel(hand / sizes), unravel(right / sizes))
    leaves += _check_slopes(apply, dy, hand, kinks, 2e-15 * scale, rng)
    leaves += _check_factors(pull, dy, x, *targets)
    return CheckReport(layer.name, leaves, int(kinks.sum()))


def _uncertain(
    gradient: Callable[[Array], Array], right: Array, scale: float, rng: Any
) -> tuple[Array, Array]:
    """How far each number of a gradient can be off, and whether it is at a kink."""
    shift = 1e-12 * rng.normal(size=right.shape)
    # rounding, some 1e-16, changes a gradient by less than this; at a kink it jumps
    jump, size = jnp.abs(gradient(shift) - gradient(-shift)), jnp.abs(right).max()
    return 10 * jump + 1e-14 * (size + scale), jump > 1e-8 * size


def _check_slopes(
    apply: Callable[..., Array], dy: Any, hand: Array, kinks: Array, rounding: float, rng: Any
) -> list[LeafComparison]:
    """Holds <t, J^T c> against <J t, c> by central differences, in directions without a kink."""
    smooth, index = np.where(kinks, 0.0, 1.0), np.arange(hand.size)

    def misfit(t):  # of the best step, beyond rounding
        slopes = np.array([np.vdot(dy, apply(h * t) - apply(-h * t)) / (2 * h) for h in STEPS])
        gaps = slopes - np.vdot(t, hand)
        return min(gaps - np.clip(gaps, -rounding / STEPS, rounding / STEPS), key=abs)

    def compare(against, slopes, misfits):
        slip = "see jax.vjp; does that agree, and `forward` have a wrong derivative of its own?"
        pair = Gradient(all=slopes), Gradient(all=slopes + misfits)
        return _compare(against, *pair, 1e-6, slip=slip)

    random = smooth * rng.normal(size=(4, hand.size))
    some = np.argsort(rng.random(hand.size) + (np.asarray(hand) == 0))[:64]
    errors = np.array([misfit(smooth * (index == i)) for i in some])
    return [
        *compare("adjoint identity", random @ hand, np.array([misfit(t) for t in random])),
        *compare("central differences", hand[some], errors),
    ]


def _check_factors(pull: Callable[..., Gradient], *batch: Any) -> list[LeafComparison]:
    """Tests the factors that `backward` hands to `reduce`, on up to 4 examples."""
    batch = tuple(jnp.concatenate([a, a])[:4] for a in batch)
    mend = "Hand every factor to `reduce`, its fourth argument: `reduce(PerExample(dy))`."
    try:
        kept = pull(*batch, reduce=(keep,))
    except TypeError as error:
        return [LeafComparison("backward", f"fails with `reduce`: {error}. {mend}")]
    factors = jax.tree_util.tree_leaves_with_path(Gradient(kept.params), is_leaf=is_factor)
    others = [jax.tree_util.keystr(path)[1:] for path, leaf in factors if not is_factor(leaf)]
    if others:
        return [LeafComparison(path, f"`backward` ignores `reduce`. {mend}") for path in others]
    # in a loop: XLA for the CPU (jaxlib 0.10.2) aborts at some products under `vmap`
    ones = [pull(*(a[i : i + 1] for a in batch)) for i in range(len(batch[0]))]
    alone = jax.tree.map(lambda *arrays: jnp.stack(arrays), *ones)
    alone = alone._replace(dx=jax.tree.map(lambda a: a[:, 0], alone.dx))
    sums, whole = Gradient(total.tree(kept.params)), Gradient(pull(*batch).params)
    parts = kept._replace(params=materialise.tree(kept.params))
    floor = 1e-6 * float(jnp.linalg.norm(ravel_pytree(whole)[0]))  # below it is rounding
    coupled = "its examples are coupled, or a factor has no batch axis"
    return [
        *_compare("sum of factors", sums, whole, 1e-9, floor=floor),
        *_compare("examples alone", parts, alone, 1e-9, floor=floor, slip=coupled),
    ]


@np.errstate(all="ignore")
def _compare(
    against: str,
    ours: Gradient,
    right: Gradient,
    tolerance: float,
    batch: int = 1,
    floor: float = 0.0,
    zero: str = "",
    slip: str = "no multiple of the right one: a missing transpose?",
) -> list[LeafComparison]:
    """Holds every array of a gradient against the right one.

    Args:
        against: what says the right one.
        ours: the gradient that is tested.
        right: the right one.
        tolerance: greatest relative error of arrays that agree.
        batch: the number of examples, for the hint.
        floor: least norm that an error is relative to.
        zero: the hint where the right one is 0.
        slip: the hint where no other fits.
    """
    arrays, rights = _named(ours), _named(right)
    if list(arrays) != list(rights):
        raise ValueError(f"The gradient must be like the params, {[*rights]}, got {[*arrays]}.")
    leaves = []
    for path, a in arrays.items():
        error, exact = _relative_error(a, rights[path], floor), np.array_equal(a, rights[path])
        hint = "" if rights[path].any() else zero
        if not error <= tolerance:
            hint = _likely_slip(path, a, rights, batch) or slip
        leaves.append(LeafComparison(path, hint, a.shape, against, error, exact))
    return leaves


def _relative_error(ours: np.ndarray, right: np.ndarray, floor: float = 0.0) -> float:
    if ours.shape != right.shape:
        return np.inf
    difference = np.linalg.norm(ours - right)
    return float(difference / np.maximum(np.linalg.norm(right), floor)) if difference else 0.0


def _likely_slip(path: str, ours: np.ndarray, rights: dict[str, np.ndarray], batch: int) -> str:
    """How a wrong array differs from the right one; "" where no usual slip fits."""
    right = rights[path]
    if ours.shape != right.shape:
        return f"shape {ours.shape}, expected {right.shape}: not summed over the batch, axis 0?"
    if not np.isfinite(ours).all():
        return "NaN or infinity"
    factor = np.vdot(right, ours) / np.vdot(right, right)
    averaged = f": divided by the batch of {batch}? `backward` gets the gradient of the sum"
    slips = {-1.0: ": a wrong sign?", round(1 / batch, 6): averaged, 1.0: ": nearly right"}
    slip = f"{factor:.4g} x automatic{slips.get(round(factor, 6), '')}"
    arrays = {slip: factor * right, "the transpose of the right one": right.T}
    arrays |= {f"that of {other}: two arrays swapped?": array for other, array in rights.items()}
    near = (slip for slip, array in arrays.items() if _relative_error(ours, array) < 1e-6)
    return next(near, "")


def _decide(
    leaf: LeafComparison, manual: LeafComparison, automatic: LeafComparison
) -> LeafComparison:
    """Drops the hint where the gradient by hand is about as near to that in float64."""
    errors = manual.relative_error, automatic.relative_error
    hint = "" if errors[0] <= 2 * errors[1] else leaf.hint
    return leaf._replace(hint=hint, against_float64=errors)


def _named(tree: Any) -> dict[str, np.ndarray]:
    """The arrays by path, in NumPy's float64."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path)[1:]: np.asarray(a).astype(float) for path, a in leaves}


def _sizes(point: Gradient) -> Gradient:
    """The size of every number; of its array where that is 0; of the smallest where all are 0."""
    sizes = jax.tree.map(np.abs, point)
    smallest = min((a.max() for a in jax.tree.leaves(sizes) if a.any()), default=1.0)
    return jax.tree.map(lambda a: np.where(a > 0, a, a.max(initial=0) or smallest), sizes)


def _as_float64(tree: Any) -> Any:
    """Every floating-point array in float64, within `jax.enable_x64(True)`."""

    def widen(a):
        return jnp.asarray(a, float if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    return jax.tree.map(widen, tree)


def _float_dtypes(params: Params) -> set[str]:
    """The dtypes of the params; raises a TypeError unless all are arrays of floating point."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        _validate.is_float(f"params{jax.tree_util.keystr(path)}", leaf)
    return {str(_validate.canonical_dtype(leaf)) for _, leaf in leaves}


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Any, Cost]:
    """The value and gradient, and the compiled cost."""
    compiled = jax.jit(function).lower(*args).compile()
    costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    cost = Cost(costs.get("flops", np.nan), costs.get("bytes accessed", np.nan), temporary)
    value, grads = compiled(*args)
    return (value, Gradient(grads)), cost


def _table(title: str, report: GradientReport | CheckReport) -> str:
    """A title and a line for every comparison."""
    lines = [
        f"{title}: {'passed' if report.passed else 'FAILED'}",
        "array                shape          against              relative error",
    ]
    for leaf in report.leaves:
        place = f"{leaf.path:<20} {leaf.shape!s:<14} {leaf.against:<20}"
        lines.append(f"{place} {leaf.relative_error:<8.1e} {leaf.hint or 'agrees'}")
    return "\n".join(lines)
