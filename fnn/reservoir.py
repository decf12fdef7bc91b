"""Reservoirs: the states of a fixed random net, and a linear readout by ridge regression.

`ridge` fits the readout to a whole batch, `NormalEquations` to batch after batch. The features are
the states of an echo-state network, or the outputs of any other net without training
(`fnn.rules.extreme_learning`). Samples are rows:

    s_t = (1 - leak) s_{t-1} + leak tanh(s_{t-1} w + u_t w_in + b)
    readout: minimise over w, b:  sum_i weight_i |t_i - s_i w - b|^2 + penalty |w|^2

Products are at JAX's highest precision, since a readout depends on small differences of states.

Source: Jaeger (2001), GMD report 148; with leak Jaeger, Lukosevicius, Popovici, Siewert (2007),
doi:10.1016/j.neunet.2007.04.016; lecture 003 (reservoir computing); Hoerl, Kennard (1970),
doi:10.1080/00401706.1970.10488634 (ridge regression).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.numpy import linalg
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import entr
from jax.scipy.stats import rankdata
from jaxtyping import Float

from fnn import _validate
from fnn.backprop import weighted_mean
from fnn.factors import scale_rows, shares, widen
from fnn.nets.layers import Dense
from fnn.types import Array, ArrayLike, Key

# Relative singular values below 32 eps count as 0, those from squares below sqrt(32 eps). Dependent
# features gave up to 15 eps and sqrt(7 eps) (20,000 examples, 500 features, both dtypes).
ROUNDING = 32

# A readout depends on small differences of states.
_product = functools.partial(jnp.matmul, precision="highest")


def ridge(
    features: Float[ArrayLike, "examples features"],
    targets: Float[ArrayLike, "examples outputs"],
    penalty: Any,
    *,
    intercept: bool = True,
    weights: ArrayLike | None = None,
) -> Dense:
    """The linear readout of least squares with a penalty on its weights.

    It minimises `sum(weights * |t - x w - b|^2) + penalty |w|^2`, as scikit-learn's
    `Ridge(alpha=penalty)`. With X and T centred, this is least squares on [X; sqrt(penalty) I],
    here by a QR decomposition. Normal equations are several times as fast, but square the condition
    number.

    Args:
        features: `[examples, features]`.
        targets: `[examples, outputs]`, in the dtype of the features.
        penalty: at least 0; a JAX scalar may be traced or mapped over. It does not grow with the
            number of examples: squared errors are summed, not averaged.
        intercept: False for a readout through 0, whose `b` is None.
        weights: `[examples]`, not negative. Weight 0 is padding, whatever the row holds.

    Returns:
        `Dense(w=[features, outputs], b=[outputs])` in the dtype of the features, for
        `features @ w + b`. Computed in float32 at least.

    Raises:
        TypeError, ValueError: shapes, dtypes or the penalty are invalid; numbers are not finite;
            the solution is not unique to rounding (fewer examples than features, a constant
            feature, dependent features) and the penalty is 0 or too small. Under `jit` such a
            readout is NaN instead.

    Source: Hoerl, Kennard (1970), doi:10.1080/00401706.1970.10488634.

    >>> x = jnp.arange(5.0)[:, None]
    >>> readout = ridge(x, 2 * x + 1, 0.0)
    >>> readout.w.round(5), readout.b.round(5)
    (Array([[2.]], dtype=float32), Array([1.], dtype=float32))
    """
    _check_batch(features, targets, "features")
    sums = _centre(features, targets, weights)
    count = features.shape[1]
    readout = _readout(sums, count, penalty, intercept, squared=False)
    dtype = _validate.canonical_dtype(features)
    return jax.tree.map(lambda a: a.astype(dtype), readout)


class NormalEquations(NamedTuple):
    """The sums over examples that ridge regression needs, about the means.

    A pytree, to carry through a scan or to merge across devices. `z = [x, t]` is an example with
    its targets.

    Products of features keep only half of the digits: they square the condition number. Where
    features depend on each other, the penalty must be above about `eps` times their sum of squares
    (1e-7 in float32), for `ridge` above `(32 eps)^2` times it (1e-11). Use `ridge` where all
    examples fit into memory.

    Source: merging: Chan, Golub, LeVeque (1983), doi:10.1080/00031305.1983.10483115.

    >>> equations = NormalEquations.start(1, 1)
    >>> for x in jnp.arange(6.0).reshape(3, 2, 1):
    ...     equations = equations.add(x, 2 * x + 1)
    >>> equations.solve(0.0).w.round(5)
    Array([[2.]], dtype=float32)
    """

    weight: Array  # []: the sum of the weights of the examples
    mean: Array  # [features + outputs]: of z
    products: Array  # [features, features + outputs]: sum of weight (x - mean x)^T (z - mean z)

    @staticmethod
    def start(features: int, outputs: int, dtype: Any = float) -> NormalEquations:
        """The sums over no example, in float32 at least."""
        shape = features, features + outputs
        products = widen(jnp.zeros(shape, dtype))
        weight = jnp.zeros((), products.dtype)
        return NormalEquations(weight, products[0], products)

    def add(
        self,
        features: Float[ArrayLike, "batch features"],
        targets: Float[ArrayLike, "batch outputs"],
        weights: ArrayLike | None = None,
    ) -> NormalEquations:
        """The sums with one more batch; arguments are those of `ridge`."""
        _check_batch(features, targets, len(self.products))
        weight, mean, z = _centre(features, targets, weights)
        centred = z[:, : features.shape[1]]
        batch = NormalEquations(weight, mean, _product(centred.T, z))
        return self.merge(batch)

    def merge(self, other: NormalEquations) -> NormalEquations:
        """The sums over the examples of both.

        With n = n_1 + n_2 and d = mean_2 - mean_1:

            mean = mean_1 + d n_2 / n,    C = C_1 + C_2 + d^T d n_1 n_2 / n
        """
        weight = self.weight + other.weight
        share = other.weight / jnp.where(weight > 0, weight, 1)
        d = other.mean - self.mean
        mean = self.mean + d * share
        features = d[: len(self.products)]
        between = self.weight * share * jnp.outer(features, d)
        products = self.products + other.products + between
        return NormalEquations(weight, mean, products)

    def solve(self, penalty: Any, *, intercept: bool = True) -> Dense:
        """The readout of all examples so far; arguments and errors are those of `ridge`."""
        return _readout(self, len(self.products), penalty, intercept, squared=True)


class Reservoir(NamedTuple):
    """The fixed weights of an echo-state network.

    Stacked along a leading axis, several run under `vmap`.
    """

    w: Array  # [units, units]
    w_in: Array  # [inputs, units]
    b: Array  # [units]
    leak: Array  # []


@dataclass(frozen=True)
class EchoState:
    """An echo-state network: a random recurrent net without training.

    `init` draws a `Reservoir`, with eigenvalues of `w`: some seconds for 1,000 units. `states` and
    `forecast` are the same functions for all networks, so `jax.jit` of them compiles once per
    shape. `vmap` them over series, states or reservoirs.

    Args:
        inputs: how many numbers enter at a time, at least 1. Standardise them: `input_scaling`
            expects numbers of size 1.
        units: at least 1.
        spectral_radius: the largest modulus of an eigenvalue of `w`, at least 0; the larger, the
            longer the memory. Above 1 the state 0 is unstable (for leak 1, no input, no bias):
            states may depend on `initial` for ever, oscillate or be chaotic, unless strong inputs
            dominate. Below 1 states usually forget `initial`; that is certain only if the largest
            singular value is below 1 (Yildiz, Jaeger, Kiebel 2012).
        leak: above 0, at most 1; the smaller, the slower states change.
        input_scaling: `w_in` is uniform in -+ this; at least 0. For small values tanh is nearly
            linear, for large ones it saturates.
        density: the share of units that each unit gets input from, at least 0, at most 1. Their
            number is the same for all units, at least one.
        bias_scaling: `b` is uniform in -+ this; at least 0. Without biases states are odd
            functions of the inputs.

    Raises:
        TypeError, ValueError: a setting is out of its range.

    Source: Jaeger (2001), GMD report 148; Jaeger et al. (2007), doi:10.1016/j.neunet.2007.04.016;
    Yildiz, Jaeger, Kiebel (2012), doi:10.1016/j.neunet.2012.07.005.

    >>> net = echo_state(1, 20, leak=0.5)
    >>> reservoir, series = net.init(jax.random.key(0)), jnp.sin(jnp.arange(101.0))[:, None]
    >>> states = net.states(reservoir, series[:-1], warm_up=50)
    >>> readout = ridge(states, series[51:], 1e-3)
    >>> net.forecast(reservoir, readout, states[-1], 30).shape
    (30, 1)
    """

    inputs: int
    units: int
    spectral_radius: float = 0.9
    leak: float = 1.0
    input_scaling: float = 1.0
    density: float = 0.1
    bias_scaling: float = 0.2

    def __post_init__(self) -> None:
        """Checks the settings."""
        _validate.positive("inputs", self.inputs, whole=True)
        _validate.positive("units", self.units, whole=True)
        _validate.positive("leak", self.leak)
        for name, value in vars(self).items():
            _validate.not_negative(name, value)
        if max(self.leak, self.density) > 1:
            raise ValueError(f"`leak` and `density` must be at most 1, got {self}.")

    def init(self, key: Key) -> Reservoir:
        """Draws the weights of a reservoir.

        Args:
            key: from `jax.random.key`.

        Returns:
            A `Reservoir` in JAX's default dtype.
        """
        _validate.is_key("key", key)
        inputs, units = self.inputs, self.units
        shapes = (units, units), (units, units), (inputs, units), (units,)
        draw = functools.partial(jax.random.uniform, minval=-1.0)
        keys = jax.random.split(key, 4)
        order, w, w_in, b = map(draw, keys, shapes)
        # Every unit has as many inputs: so there is a cycle, and the radius is above 0.
        sources = max(1, round(self.density * units))
        ranks = rankdata(order, axis=0)
        w = jnp.where(ranks <= sources, w, 0)
        radii = jnp.abs(linalg.eigvals(w))
        w *= self.spectral_radius / radii.max()
        w_in *= self.input_scaling
        b *= self.bias_scaling
        return Reservoir(w, w_in, b, jnp.asarray(self.leak, w.dtype))

    @staticmethod
    def states(
        reservoir: Reservoir,
        inputs: Float[ArrayLike, "time inputs"],
        initial: Float[ArrayLike, " units"] | None = None,
        *,
        warm_up: int = 0,
    ) -> Float[Array, "rest units"]:
        """The state after every input.

        Args:
            reservoir: what `init` returned.
            inputs: `[time, inputs]`, at least one row.
            initial: `[units]`, the state before the first input; None for 0.
            warm_up: how many of the first states to leave out, since they depend on `initial`.

        Returns:
            `[time - warm_up, units]`.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, or `warm_up` is negative.
        """
        _check_shape("inputs", inputs, f"time {len(reservoir.w_in)}")
        _validate.same_dtype("inputs", inputs, "w", reservoir.w)
        _validate.not_negative("warm_up", warm_up)
        if initial is None:
            initial = jnp.zeros_like(reservoir.b)
        found, _ = _run(reservoir, initial, inputs, None, None)
        return found[warm_up:]

    @staticmethod
    def forecast(
        reservoir: Reservoir,
        readout: Dense,
        state: Float[ArrayLike, " units"],
        steps: int,
    ) -> Float[Array, "steps inputs"]:
        """Runs freely: each output of the readout is the next input.

        Args:
            reservoir: what `init` returned.
            readout: `w` is `[units, inputs]`; it predicts the next input from a state.
            state: `[units]`, the last known state.
            steps: how many.

        Returns:
            `[steps, inputs]`; the first row is the readout of `state`.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit.
        """
        inputs, units = reservoir.w_in.shape
        _check_shape("readout.w", readout.w, f"{units} {inputs}")
        _, outputs = _run(reservoir, state, None, readout, steps)
        return outputs


echo_state = EchoState  # constructors are in lower case


class Diagnostics(NamedTuple):
    """How rich states are."""

    rank: Array  # []: singular values above rounding, directions that a readout can use
    effective_rank: Array  # []: directions that share the variance, 1 ... units
    saturation: Array  # []: share of numbers beyond +-0.95, where tanh' is below 0.1


def diagnose(states: Float[ArrayLike, "time units"]) -> Diagnostics:
    """Rank and saturation of reservoir states, or of any features in -1 ... 1.

    Args:
        states: `[time, units]`. They are centred first: the intercept takes what is constant.

    Returns:
        `Diagnostics`. `rank` counts singular values above `32 eps |states|`; it depends on the
        dtype. `effective_rank` is `exp(-sum p ln p)`, `p` the singular values over their sum. Both
        are 0 for constant states. With a leak below 1 states are running means of tanh, and
        `saturation` is at most the share of saturated units.

    Raises:
        TypeError, ValueError: `states` is no floating-point array `[time, units]`.

    Source: Roy, Vetterli (2007), "The effective rank", EUSIPCO.

    >>> found = diagnose(jnp.array([[0.5, 0.0], [-0.5, 0.0], [0.99, 0.0], [0.99, 0.0]]))
    >>> found.rank.item(), found.saturation.item()
    (1, 0.25)
    """
    _check_shape("states", states, "time units")
    s = widen(jnp.asarray(states))
    centred = s - s.mean(0, keepdims=True)
    values = linalg.svd(centred, compute_uv=False)
    rank = (values > _noise(s) * linalg.norm(s)).sum()
    entropy = entr(shares(values)).sum()
    effective = jnp.where(rank > 0, jnp.exp(entropy), 0)
    saturated = jnp.abs(s) > 0.95
    return Diagnostics(rank, effective, saturated.mean())


def _noise(a):
    """Relative singular values up to this are rounding, in the dtype of an array."""
    return ROUNDING * jnp.finfo(a.dtype).eps


def _readout(sums, features, penalty, intercept, squared):
    """Checks the penalty, solves, and raises where the readout is NaN but not traced.

    `sums` is the weight, the mean, and the products or the rows of z, with that many features.
    """
    if not isinstance(penalty, Tracer):
        penalty = np.asarray(penalty).tolist()
        _validate.not_negative("penalty", penalty)
    readout = _solve(sums, features, penalty, intercept, squared)
    if isinstance(readout.w, Tracer) or not jnp.isnan(readout.w).any():
        return readout
    if not jnp.isfinite(sums[2]).all():
        raise ValueError("Features, targets or weights hold NaN or Inf, or a weight is below 0.")
    raise ValueError(
        f"The readout is not unique in {readout.w.dtype} with `penalty` {penalty:.3g}: fewer "
        f"examples than the {features} features, a constant feature, or features that depend on "
        "each other. Pass a larger `penalty`, or use float64."
    )


@jax.jit(static_argnames=("features", "intercept", "squared"))
def _solve(sums, features, penalty, intercept, squared):
    """The readout from the products or the rows of z; NaN where it is not unique.

    Both give a triangular system R w = v. Its solution is unique if the penalty is large enough, or
    if R has full rank. The rank is that of R with columns of norm 1, so that the scales of features
    do not matter. Rounding is relative to the features before centring: constant ones are found.
    """
    weight, mean, z = sums
    offset = jnp.sqrt(weight) * mean
    # The 1 of a target does not change R and v. It keeps the derivative of QR finite.
    floor = jnp.sqrt(penalty)
    is_feature = jnp.arange(len(mean)) < features
    root = jnp.where(is_feature, floor, 1)
    if squared:  # X^T X + penalty I = R^T R, v = R^-T X^T T
        z += jnp.diag(root**2)[:features]
        if not intercept:
            z += jnp.outer(offset[:features], offset)
        x, t = jnp.split(z, [features], axis=1)
        r = linalg.cholesky(x, upper=True)
        v = solve_triangular(r, t, trans=1)
    else:  # [X; sqrt(penalty) I] = Q R, v = Q^T [T; 0]
        parts = [z, jnp.diag(root)]
        if not intercept:
            parts.append(offset[None])
        rows = jnp.concatenate(parts)
        triangle = linalg.qr(rows, mode="r")
        r, v = jnp.split(triangle[:features], [features], axis=1)
    noise = _noise(z)
    norm = linalg.norm(r, axis=0)
    size = jnp.hypot(norm, offset[:features])  # before centring
    large = floor > noise * size.max()
    tolerance = noise * (size / norm).max()
    if squared:
        tolerance **= 0.5

    def full_rank():
        return linalg.matrix_rank(r / norm[None], tolerance) == features

    unique = lax.cond(large, lambda: large, full_rank)
    w = jnp.where(unique, solve_triangular(r, v), jnp.nan)
    b = None
    if intercept:
        b = mean[features:] - _product(mean[:features], w)
    return Dense(w, b)


@jax.jit
def _centre(features, targets, weights):
    """The sum of the weights, the mean of z, and its centred rows times the root of the weights."""
    z = widen(jnp.concatenate([features, targets], axis=1))
    if weights is None:
        weights = jnp.ones_like(z[:, 0])
    weights = weights.astype(z.dtype)
    mean = weighted_mean(z, weights)
    z = z - mean[None]
    rest = weighted_mean(z, weights)  # the rounding of the mean
    z = scale_rows(z - rest[None], jnp.sqrt(weights))
    return weights.sum(), mean + rest, z


@jax.jit(static_argnames="steps")
def _run(reservoir, state, inputs, readout, steps):
    """All states and inputs. Without `inputs`, the readout of each state is the next input."""
    w, w_in, b, leak = reservoir

    def body(state, u):
        if u is None:
            u = _product(state, readout.w)
            if readout.b is not None:
                u += readout.b
        z = _product(state, w) + _product(u, w_in) + b
        target = jnp.tanh(z)
        state = (1 - leak) * state + leak * target
        return state, (state, u)

    _, found = lax.scan(body, state, inputs, steps)
    return found


def _check_batch(features, targets, width):
    _check_shape("features", features, f"examples {width}")
    _check_shape("targets", targets, f"{features.shape[0]} outputs")
    _validate.same_dtype("targets", targets, "features", features)


def _check_shape(name, value, shape):
    """Raises unless `value` is floating-point, not empty and of this shape (jaxtyping's)."""
    _validate.is_float(name, value)
    expected: Any = Float[Any, shape]
    if value.size == 0 or not isinstance(value, expected):
        raise ValueError(
            f"`{name}` must have axes `{shape}`, not empty, got shape {value.shape}. One column? "
            f"Pass `{name}[:, None]`. Several series or reservoirs? `jax.vmap` over them."
        )
