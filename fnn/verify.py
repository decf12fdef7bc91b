"""Checks of derivatives: a gradient by hand against independent means, array by array.

`compare_gradients` holds the gradient of a net against `jax.grad`, in the dtype that it is given.
`check_layer` and `check_loss` test one layer or one loss in float64 by two means: `jax.vjp`, and
the adjoint identity <J t, c> = <t, J^T c> for random directions t, with J t by central differences
(no automatic differentiation in it).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Float, Shaped

from fnn import _validate
from fnn.backprop import check_is_loss, forward_pass, mean_loss, output_error, value_and_grad
from fnn.factors import is_factor, keep, materialise, scale_rows, total
from fnn.types import ArrayLike, Key, Layer, Loss, Params

TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 5e-3}
"""Relative error up to which a gradient by hand agrees with `jax.grad`, by dtype."""
STEPS = (1e-6, 3e-5, 1e-3)
"""Steps of central differences, relative to each number; of a 0, to the largest of its array."""
NOTHING = "nothing was tested: the gradient is 0 here (`x` is 0, or at a kink?), or there is none"


class Gradient(NamedTuple):
    """A gradient; the path of an array begins with the name of its field."""

    params: Any
    dx: Any = ()  # with respect to the input of a layer, or to the outputs for a loss


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
    manual: Cost
    automatic: Cost
    tolerance: float  # greatest relative error of arrays that agree
    passed: bool

    def __str__(self) -> str:
        """A row for every array, and the compiled cost."""
        table = _table("gradient by hand", self)
        return (
            f"{table}\n"
            f"Both agree up to {self.tolerance:.0e}, or where the one by hand is at most twice as "
            "far from the gradient in float64.\n"
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
        return _agree(self.leaves)

    def __str__(self) -> str:
        """A row for every array and what it is held against."""
        table = _table(self.subject, self)
        if not self.kinks:
            return table
        return f"{table}\n{self.kinks} numbers are at a kink: they are not counted."


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
    by_hand = value_and_grad(net, loss)
    by_jax = jax.value_and_grad(mean_loss(net, loss))
    batch = params, x, targets, weights
    dtypes = _float_dtypes(params)
    if not dtypes:
        raise ValueError("`params` hold no array: there is no gradient to compare.")
    if tolerance is None:
        tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    manual, manual_cost = _compiled(by_hand, *batch)
    automatic, automatic_cost = _compiled(by_jax, *batch)
    leaves = _compare("jax.grad", manual, automatic, tolerance, len(x))
    if not _agree(leaves):
        with jax.enable_x64(True):
            truth, _ = _compiled(by_jax, *_as_float64(batch))
        ours = _compare("", manual, truth, 0.0)
        others = _compare("", automatic, truth, 0.0)
        leaves = list(map(_decide, leaves, ours, others))
    return GradientReport(leaves, manual_cost, automatic_cost, tolerance, _agree(leaves))


def check_layer(
    layer: Layer, x: Shaped[ArrayLike, "batch ..."], *, key: Key, params: Params = None
) -> CheckReport:
    """Tests the `backward` of a layer, with respect to its params and its input, in float64.

    It tests the gradient of every array by two means, and that `backward` returns what `reduce`
    makes of its factors: each example has the gradient that it has alone. It cannot see whether
    `backward` takes local gradients from `params`, which rules replace; they must come from
    `forward`.

    Args:
        layer: any layer, yours for instance.
        x: an input, `[batch, ...]`, best with several rows. A coordinate at a kink, where the
            gradient jumps, is not counted.
        key: for the random directions, and for `params` if they are None.
        params: where to test; None draws them by `layer.init`.

    Returns:
        A report that prints as a table: for every array its error, and the likely slip. It does not
        pass where nothing was tested, as where the gradient is 0.

    Raises:
        TypeError, ValueError: `layer` is no Layer, `x` does not fit it, or `backward` takes no
            `reduce`.

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
        if params is None:
            params = layer.init(key)
        params = _as_float64(params)
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
        outputs: `[batch, ...]`, best with several rows.
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
    check_is_loss(loss)
    _validate.is_float("outputs", outputs)
    _validate.is_array("targets", targets)
    _validate.is_key("key", key)

    def forward(params, y, *targets):
        return forward_pass(lambda y: (y, ()), loss, y, *targets)[2], (y, *targets)

    def backward(params, residuals, dy, reduce=total):
        error = output_error(loss, *residuals)
        return (), scale_rows(error, dy)

    layer = Layer(loss.name, lambda key: (), forward, backward)
    with jax.enable_x64(True):
        return _check(layer, (), key, *_as_float64((outputs, targets)))


def _check(layer, params, key, x, *targets) -> CheckReport:
    """Tests the `backward` of a layer at one point, in float64; `forward` may take targets too."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    point, unravel = ravel_pytree(Gradient(params, x if floating else ()))
    if 0 in (x.size, point.size):
        return CheckReport(layer.name, [LeafComparison("all", NOTHING)])

    @jax.jit
    def product(point):
        at = unravel(point)
        inputs = at.dx if floating else x
        y, _ = layer.forward(at.params, inputs, *targets)
        return jnp.vdot(y, dy)

    @partial(jax.jit, static_argnums=0)
    def pull(reduce, dy, *inputs):
        _, residuals = layer.forward(params, *inputs)
        with _validate.inside("`backward(params, residuals, dy, reduce)`"):
            grads, dx = layer.backward(params, residuals, dy, reduce)
            if floating and dx is None:
                raise TypeError("returned None for `dx`, the gradient of `x`.")
        return Gradient(grads, dx if floating else ())

    rng = np.random.default_rng(int(jax.random.bits(key)))
    y = jax.jit(lambda *inputs: layer.forward(params, *inputs)[0])(x, *targets)
    dy = rng.normal(size=y.shape)
    gradient = jax.jit(jax.grad(product))
    right = gradient(point)
    sizes = _sizes(unravel(point))
    kinks = _find_kinks(gradient, right, point, sizes, rng)
    if kinks.all():
        return CheckReport(layer.name, [LeafComparison("all", NOTHING)], kinks.size)
    ours = pull(total, dy, x, *targets)
    hand, _ = ravel_pytree(ours)
    floor = float(np.linalg.norm(right))
    compare = partial(_compare, tolerance=1e-12, batch=len(x), floor=floor, zero=NOTHING)
    if hand.size != right.size:
        return CheckReport(layer.name, compare("jax.vjp", ours, unravel(right)))
    right = jnp.where(kinks, hand, right)
    leaves = compare("jax.vjp", ours, unravel(right))
    directions = rng.normal(size=(4, point.size)) * np.where(kinks, 0, sizes)
    size = np.vdot(abs(y), abs(dy))
    leaves.append(_check_slopes(product, size, point, directions, directions @ hand))
    leaves += _check_examples(compare, pull, dy, x, *targets)
    return CheckReport(layer.name, leaves, int(kinks.sum()))


def _sizes(tree):
    """The size of every coordinate, in one vector; the largest of its array where it is 0.

    An array of zeros, such as a new bias, says nothing about the size of a step: it does not move.
    """

    def fill(a):
        sizes = np.abs(a)
        return np.where(sizes > 0, sizes, sizes.max(initial=0))

    return ravel_pytree(jax.tree.map(fill, tree))[0]


def _find_kinks(gradient, right, point, sizes, rng):
    """Which coordinates of the gradient jump at a point."""
    scale = np.where(sizes > 0, 1e-12 * sizes, 1e-30)
    shift = scale * rng.normal(size=point.size)
    jumps = abs(_difference(gradient, point, shift))
    return jumps > 1e-8 * abs(right).max()


def _difference(function, point, shift):
    """How a function differs between the two sides of a point."""
    above = function(point + shift)
    below = function(point - shift)
    return above - below


def _check_slopes(product, size, point, directions, slopes) -> LeafComparison:
    """Holds <t, J^T c> against <J t, c> by central differences with the best step."""
    errors = []
    for step in STEPS:
        changes = [_difference(product, point, step * t) for t in directions]
        found = np.array(changes) / (2 * step)
        error = _relative_error(found, slopes, 1e-6 * size)
        errors.append(error)
    least = min(errors)
    slip = "see jax.vjp above; where that agrees, a derivative within `forward` is wrong"
    hint = "" if least <= 1e-6 else slip
    return LeafComparison("all", hint, (), "adjoint identity", least)


def _check_examples(compare, pull, *batch) -> list[LeafComparison]:
    """Tests that each of up to 4 examples has the gradient that it has alone."""
    few = [np.concatenate([a, a])[:4] for a in batch]
    rows = [np.split(a, len(a)) for a in few]
    # one by one: XLA for the CPU (jaxlib 0.10.2) aborts at some products under `vmap`
    ones = map(partial(pull, total), *rows)
    alone = jax.tree.map(lambda *arrays: np.stack(arrays), *ones)
    dx = jax.tree.map(lambda a: a[:, 0], alone.dx)
    alone = alone._replace(dx=dx)

    def write_out(f):
        return materialise(f) if is_factor(f) else f  # an array did not go through `reduce`

    @jax.jit
    def write_all_out(*batch):
        factors = pull(keep, *batch)  # what statistics ask for
        gradients = jax.tree.map(write_out, factors.params, is_leaf=is_factor)
        return factors._replace(params=gradients)

    try:
        found = write_all_out(*few)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"`backward` must return what `reduce` returns, unchanged ({error}). Scale, transpose "
            "or add arrays before: `reduce(Outer(x, 0.5 * dz))`."
        ) from error
    slip = "is the example coupled with others, or what `reduce` returns changed afterwards?"
    return compare("examples alone", found, alone, slip=slip)


@np.errstate(all="ignore")
def _compare(
    against,
    ours: Gradient,
    right: Gradient,
    tolerance,
    batch=1,
    floor=0.0,
    zero="",
    slip="no multiple of the right one: a missing transpose or term, or two arrays swapped?",
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
    arrays = _named(ours)
    rights = _named(right)
    if list(arrays) != list(rights):
        raise ValueError(f"The gradient must be like the params, {[*rights]}, got {[*arrays]}.")
    leaves = []
    for path, a in arrays.items():
        b = rights[path]
        error = _relative_error(a, b, floor)
        hint = "" if b.any() else zero
        if not error <= tolerance:
            hint = _likely_slip(a, b, batch) or slip
        leaves.append(LeafComparison(path, hint, a.shape, against, error, error == 0))
    return leaves


def _agree(leaves) -> bool:
    """Whether no array has a hint."""
    return not any(leaf.hint for leaf in leaves)


def _relative_error(ours, right, floor=0.0) -> float:
    if ours.shape != right.shape:
        return np.inf
    size = max(np.linalg.norm(right), floor, 1e-300)
    difference = np.linalg.norm(ours - right)
    return float(difference / size)


def _likely_slip(ours, right, batch) -> str:
    """How a wrong array differs from the right one; "" where no usual slip fits."""
    if ours.shape != right.shape:
        return f"shape {ours.shape}, expected {right.shape}: {_shape_slip(ours, right, batch)}"
    if not np.isfinite(ours).all():
        return "NaN or infinity"
    factor = np.vdot(right, ours) / np.vdot(right, right)
    if not _relative_error(ours, factor * right) < 1e-6:  # NaN where the right one is 0
        transposed = _relative_error(ours, right.T) < 1e-6
        return "the transpose of the right one" if transposed else ""
    slip = "a wrong constant?"
    if abs(factor - 1) < 1e-3:
        slip = "computed in a narrower dtype?"
    elif factor < 0:
        slip = "a wrong sign?"
    elif abs(factor * batch - 1) < 1e-6:
        slip = f"divided by the batch of {batch}?"
    return f"{factor:.6g} x the right one: {slip}"


def _shape_slip(ours, right, batch) -> str:
    if ours.shape == right.shape[::-1]:
        return "two arrays swapped?"
    if ours.shape[1:] == right.shape and len(ours) != batch:
        return "sum over the positions first: `reduce(PerExample(dy.sum(1)))`"
    return "sum over the batch (axis 0) by `reduce`: `reduce(PerExample(dy))`"


def _decide(leaf, manual, automatic) -> LeafComparison:
    """Drops the hint where the gradient by hand is about as near to that in float64."""
    error = manual.relative_error
    other = automatic.relative_error
    hint = "" if error <= 2 * other else leaf.hint
    return leaf._replace(hint=hint, against_float64=(error, other))


def _named(tree) -> dict[str, np.ndarray]:
    """The arrays by path, in NumPy's float64."""
    arrays = {}
    for path, leaf in tree_leaves_with_path(tree):
        name = keystr(path)[1:]
        arrays[name] = np.asarray(leaf, float)
    return arrays


def _as_float64(tree):
    """Every floating-point array in float64, within `jax.enable_x64(True)`."""

    def widen(a):
        floating = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.asarray(a, float if floating else None)

    return jax.tree.map(widen, tree)


def _float_dtypes(params) -> set[str]:
    """The dtypes of the params; raises a TypeError unless all are arrays of floating point."""
    dtypes = set()
    for path, leaf in tree_leaves_with_path(params):
        _validate.is_float(f"params{keystr(path)}", leaf)
        dtype = _validate.canonical_dtype(leaf)
        dtypes.add(str(dtype))
    return dtypes


def _compiled(function, *args) -> tuple[Gradient, Cost]:
    """The gradient, and the compiled cost."""
    compiled = jax.jit(function).lower(*args).compile()
    costs = compiled.cost_analysis() or {}
    flops = costs.get("flops", np.nan)
    accessed = costs.get("bytes accessed", np.nan)
    temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    _, grads = compiled(*args)
    return Gradient(grads), Cost(flops, accessed, temporary)


def _table(title, report) -> str:
    """A title and a line for every comparison."""
    verdict = "passed" if report.passed else "FAILED"
    lines = [
        f"{title}: {verdict}",
        "array                shape          against              relative error",
    ]
    for leaf in report.leaves:
        lines.append(
            f"{leaf.path:<20} {leaf.shape!s:<14} {leaf.against:<20} "
            f"{leaf.relative_error:<8.1e} {leaf.hint or 'agrees'}"
        )
    return "\n".join(lines)
