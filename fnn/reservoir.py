"""Reservoirs: features or states of a random net that stays as it was drawn, and a linear readout
by ridge regression in closed form.

`ridge` and `NormalEquations` find the readout. Features may be the outputs of any net that was not
trained (`fnn.rules.extreme_learning`), or the states of an echo-state network: samples are rows, so

    s_t = (1 - leak) s_{t-1} + leak tanh(s_{t-1} w + u_t w_in + b)

Products are taken at JAX's highest precision: a readout tells states apart that differ little.

Source: Jaeger (2001), GMD report 148; with leak Jaeger, Lukosevicius, Popovici, Siewert (2007),
doi:10.1016/j.neunet.2007.04.016; lecture 003 (reservoir computing).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fnn import _validate
from fnn._ridge import NormalEquations as NormalEquations
from fnn._ridge import check_rows
from fnn._ridge import ridge as ridge
from fnn.factors.rows import centred
from fnn.nets.layers import Dense
from fnn.types import Array, ArrayLike, Key, at_least_float32


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
    """An echo-state network as pure functions.

    All but `init` get their settings from the reservoir's arrays: they are the same functions for
    every network, so that `jax.jit` of them compiles once per shape. `vmap` them for several
    series, starts or reservoirs.

    Attributes:
        name: what tables call it.
        init: `(key) -> Reservoir`.
        step: `(reservoir, state [units], u [inputs]) -> state`: the formula above.
        states: `(reservoir, inputs [time, inputs], initial=None, *, warm_up=0) -> [time - warm_up,
            units]`: the state after every input, from `initial [units]` (0 if None), but for the
            first `warm_up` ones, which still remember it.
        forecast: `(reservoir, readout, state [units], steps) -> [steps, inputs]`: runs free. The
            readout, trained to tell the next input from the state, is the next input; the first row
            is what it tells from `state`.
    """

    name: str
    init: Callable[[Key], Reservoir]
    step: Callable[[Reservoir, Array, Array], Array]
    states: Callable[..., Array]
    forecast: Callable[[Reservoir, Dense, Array, int], Array]


def echo_state(
    inputs: int,
    units: int,
    *,
    spectral_radius: float = 0.9,
    leak: float = 1.0,
    input_scaling: float = 1.0,
    density: float = 0.1,
    bias_scaling: float = 0.2,
) -> EchoState:
    """An echo-state network: a random recurrent net, which is never trained.

    Args:
        inputs: numbers that enter at a time, at least 1. Standardise them: `input_scaling` is meant
            for numbers of size 1.
        units: at least 1.
        spectral_radius: the largest modulus of an eigenvalue of `w`, at least 0: the larger, the
            longer states remember. Above 1, with `leak` 1, no input and no bias, the state 0 is
            unstable: what a state is may then depend on `initial` for ever, a warm-up does not make
            it forget, and states may go round by themselves or be chaotic, unless strong inputs
            hold them. Below 1 is the rule of thumb and no proof either (Yildiz, Jaeger, Kiebel
            2012); for that the largest singular value must be below 1.
        leak: above 0, at most 1; the smaller, the slower states move.
        input_scaling: `w_in` is uniform in -+ this; at least 0. Small: tanh is nearly linear;
            large: it saturates.
        density: what share of the units a unit hears, above 0, at most 1: the same number for all
            units, at least one.
        bias_scaling: `b` is uniform in -+ this; at least 0. Without biases states change sign with
            the inputs, so that a readout of them is an odd function of the inputs but for its
            intercept.

    Returns:
        An `EchoState`. Its `init` finds the eigenvalues on the host in float64, outside of `jit`:
        some seconds for 1,000 units.

    Raises:
        TypeError, ValueError: a setting is out of its range; at the call, shapes or dtypes do not
            fit, or `warm_up` leaves no state.

    Source: Jaeger (2001), GMD report 148; Jaeger et al. (2007), doi:10.1016/j.neunet.2007.04.016;
    Yildiz, Jaeger, Kiebel (2012), doi:10.1016/j.neunet.2012.07.005.

    >>> net = echo_state(1, 20, leak=0.5)
    >>> reservoir, series = net.init(jax.random.key(0)), jnp.sin(jnp.arange(101.0))[:, None]
    >>> states = net.states(reservoir, series[:-1], warm_up=50)
    >>> readout = ridge(states, series[51:], 1e-3)
    >>> net.forecast(reservoir, readout, states[-1], 30).shape
    (30, 1)
    """
    _validate.positive("inputs", inputs, whole=True)
    _validate.positive("units", units, whole=True)
    for name, value in (
        ("spectral_radius", spectral_radius),
        ("input_scaling", input_scaling),
        ("bias_scaling", bias_scaling),
    ):
        _validate.not_negative(name, value)
    for name, value in (("leak", leak), ("density", density)):
        _validate.positive(name, value)
        if value > 1:
            raise ValueError(f"`{name}` must be above 0 and at most 1, got {value!r}.")

    def init(key: Key) -> Reservoir:
        _validate.is_key("key", key)
        if isinstance(key, Tracer):
            raise TypeError(
                "`init` of an echo-state network finds eigenvalues on the host and cannot be traced. Call it outside of `jax.jit`. Several "
                "reservoirs at once? `jax.tree.map(lambda *a: jnp.stack(a), *[net.init(key) for key in keys])`."
            )
        keys, shapes = (
            jax.random.split(key, 4),
            ((units, units), (units, units), (inputs, units), (units,)),
        )
        order, w, w_in, b = (
            jax.random.uniform(k, shape, minval=-1.0) for k, shape in zip(keys, shapes, strict=True)
        )
        # every unit hears as many others: so there is a ring of units somewhere, and the radius is
        # above 0
        heard = np.argsort(np.argsort(order, axis=0), axis=0) < max(1, round(density * units))
        wide = np.where(heard, np.asarray(w, np.float64), 0.0)
        scaled = wide * (spectral_radius / np.abs(np.linalg.eigvals(wide)).max())
        return Reservoir(
            jnp.asarray(scaled, w.dtype),
            w_in * input_scaling,
            b * bias_scaling,
            jnp.full((), leak, w.dtype),
        )

    return EchoState(f"echo_state({inputs}, {units})", init, _step, _states, _forecast)


class Diagnostics(NamedTuple):
    """How rich states are."""

    # []: singular values above rounding: how many directions a readout could use at all
    rank: Array
    # []: how many directions share the variance, from 1 to the number of units
    effective_rank: Array
    # []: share of the numbers that are beyond +-0.95, where tanh is flatter than 0.1
    saturation: Array


def diagnose(states: Array) -> Diagnostics:
    """Rank and saturation of reservoir states, or of any features in -1 ... 1.

    Args:
        states: `[time, units]`, at least two rows. They are centred first: what is constant is the
            intercept's.

    Returns:
        `Diagnostics`. `rank` counts singular values above `max(time, units) * eps * largest`, as
        `np.linalg.matrix_rank`; it depends on the dtype. `effective_rank` is `exp(-sum p ln p)`,
        `p` the singular values over their sum; both are 0 for constant states. With a leak below 1
        states are running means of tanh, and `saturation` is at most the share of saturated units.

    Source: Roy, Vetterli (2007), "The effective rank", EUSIPCO.

    >>> [number.item() for number in diagnose(jnp.array([[0.5, 0.0], [-0.5, 0.0], [0.99, 0.0]]))][::2]
    [1, 0.1666666716337204]
    """
    check_rows("states", states, None)
    if states.shape[0] < 2:
        raise ValueError(
            "`states` has one row: its rank is undefined. Pass the states of a whole series, [time, units]."
        )
    return _diagnosed(states)


@jax.jit
def _diagnosed(states: Array) -> Diagnostics:
    s = at_least_float32(states)
    saturation = (jnp.abs(s) > 0.95).astype(s.dtype).mean()
    _, s = centred(s, jnp.full(len(s), 1 / len(s), s.dtype))
    values = jnp.linalg.svd(s, compute_uv=False)
    p = values / jnp.where(values[0] > 0, values.sum(), jnp.ones_like(values[0]))
    entropy = jax.scipy.special.entr(p).sum()
    effective = jnp.where(values[0] > 0, jnp.exp(entropy), jnp.zeros_like(entropy))
    rank = (values > max(s.shape) * float(jnp.finfo(s.dtype).eps) * values[0]).sum(dtype=jnp.int32)
    return Diagnostics(rank, effective, saturation)


def _step(reservoir: Reservoir, state: Array, u: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return _moved(reservoir, state, u @ reservoir.w_in + reservoir.b)


def _states(
    reservoir: Reservoir, inputs: ArrayLike, initial: ArrayLike | None = None, *, warm_up: int = 0
) -> Array:
    _check_reservoir(reservoir)
    check_rows("inputs", inputs, len(reservoir.w_in))
    _validate.same_dtype("inputs", inputs, "w", reservoir.w)
    if (
        isinstance(warm_up, bool)
        or not isinstance(warm_up, (int, np.integer))
        or not 0 <= warm_up < len(inputs)
    ):
        raise ValueError(
            f"`warm_up` must be a whole number in 0 ... {len(inputs) - 1} for {len(inputs)} inputs, got {warm_up!r}."
        )
    start = (
        jnp.zeros_like(reservoir.b) if initial is None else _state("initial", initial, reservoir)
    )
    return _driven(reservoir, inputs, start)[warm_up:]


@jax.jit
def _driven(reservoir: Reservoir, inputs: Array, start: Array) -> Array:
    """The state after every input."""

    def body(state: Array, z: Array) -> tuple[Array, Array]:
        state = _moved(reservoir, state, z)
        return state, state

    with jax.default_matmul_precision("highest"):
        z = inputs @ reservoir.w_in
        return lax.scan(body, start, z + jnp.broadcast_to(reservoir.b, z.shape))[1]


def _forecast(reservoir: Reservoir, readout: Dense, state: ArrayLike, steps: int) -> Array:
    _check_reservoir(reservoir)
    _validate.positive("steps", steps, whole=True)
    expected = reservoir.w_in.shape[::-1]
    if not isinstance(readout, Dense) or readout.w.shape != expected:
        came = (
            f"w of shape {readout.w.shape}"
            if isinstance(readout, Dense)
            else type(readout).__name__
        )
        raise ValueError(
            f"`readout` must be a Dense with w of shape {expected}, [units, inputs], since it tells the next input; got {came}."
        )
    return _free(reservoir, readout, _state("state", state, reservoir), int(steps))


@functools.partial(jax.jit, static_argnums=3)
def _free(reservoir: Reservoir, readout: Dense, state: Array, steps: int) -> Array:
    """What the readout tells, step by step, while it is the input."""

    def body(state: Array, _: None) -> tuple[Array, Array]:
        u = state @ readout.w if readout.b is None else state @ readout.w + readout.b
        return _step(reservoir, state, u), u

    with jax.default_matmul_precision("highest"):
        return lax.scan(body, state, None, length=steps)[1]


def _moved(reservoir: Reservoir, state: Array, driven: Array) -> Array:
    return (1 - reservoir.leak) * state + reservoir.leak * jnp.tanh(state @ reservoir.w + driven)


def _check_reservoir(reservoir: Any) -> None:
    if not isinstance(reservoir, Reservoir):
        raise TypeError(
            f"`reservoir` must be a Reservoir, got {type(reservoir).__name__}. Draw one: `echo_state(inputs, units).init(key)`."
        )
    if reservoir.w.ndim != 2:
        raise ValueError(
            f"`w` must be [units, units], got shape {reservoir.w.shape}. Several reservoirs? `jax.vmap` over them."
        )


def _state(name: str, value: Any, reservoir: Reservoir) -> Array:
    _validate.is_float(name, value)
    _validate.same_dtype(name, value, "w", reservoir.w)
    if value.shape != reservoir.b.shape:
        raise ValueError(
            f"`{name}` must be one state, {reservoir.b.shape}, got shape {tuple(value.shape)}. Of several? `states[-1]`."
        )
    return jnp.asarray(value)
