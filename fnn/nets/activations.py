"""Elementwise activations, each with its derivative written by hand, and softmax.

`derivative(x, y)` gets input and output, so that it may use whichever is cheaper; at a kink it
takes the value that `jax.nn` takes. The forward functions are `jax.nn`'s. An activation is a
`Layer` without parameters; those with a setting are called to change it:
`leaky_relu(negative_slope=0.2)`. To add one, write one `elementwise(...)` line and put it into
`ACTIVATIONS`: the tests run over that tuple.

Sources: lectures 000 (threshold, sigmoid, ReLU, softplus), 002 (tanh), 003 (leaky ReLU); the others
in `jax.nn`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import _validate
from fnn.factors import total
from fnn.types import Array, Layer, at_least_float32


@dataclass(frozen=True, repr=False)
class Elementwise(Layer):
    """A layer without parameters, `y = fn(x)`.

    A call with keywords gives the same with other settings.
    """

    with_parameters: Callable[..., Layer] = lambda **_: identity

    def __call__(self, *args: Any, **parameters: Any) -> Layer:
        if args:
            raise TypeError(
                f"{self.name} is called with keyword settings only. Its outputs are `{self.name}.apply((), x)`."
            )
        return self.with_parameters(**parameters)


def elementwise(
    name: str, fn: Callable[..., Array], derivative: Callable[..., Array], **settings: Any
) -> Elementwise:
    """An activation from a function of one number and its derivative.

    Args:
        name: what tables and `mlp(activation=name)` call it.
        fn: `(x, **settings) -> y`, elementwise.
        derivative: `(x, y, **settings) -> dy/dx`, elementwise, from input and output.
        **settings: the numbers that both take, with their defaults.

    Returns:
        A layer with `params = ()`; `layer(setting=value)` is the same with another setting.

    >>> cube = elementwise("cube", lambda x: x**3, lambda x, y: 3 * x**2)
    >>> y, residuals = cube.forward((), jnp.array([2.0]))
    >>> cube.backward((), residuals, jnp.array([1.0]))[1]
    Array([12.], dtype=float32)
    """

    _validate.is_function("fn", fn, "(x, **settings) -> y")
    _validate.is_function("derivative", derivative, "(x, y, **settings) -> dy/dx")

    def forward(params: Any, x: Array) -> tuple[Array, tuple[Array, Array]]:
        _validate.is_float("x", x)
        no_params(name, params)
        x = jnp.asarray(x)
        y = fn(x, **settings)
        return y, (x, y)

    def backward(
        params: Any, residuals: tuple[Array, Array], dy: Array, reduce: Any = total
    ) -> tuple[tuple[()], Array]:
        x, y = residuals  # lecture 001: dE/dp = dE/dy (.) f'(p), the Hadamard product
        return (), dy * derivative(x, y, **settings).astype(dy.dtype)

    def with_parameters(**new: Any) -> Elementwise:
        for setting, number in new.items():
            _validate.one_of(f"setting of {name}", setting, settings)
            if not (
                np.ndim(number) == 0
                and np.asarray(number).dtype.kind in "bif"
                and np.isfinite(number)
            ):
                raise ValueError(f"`{setting}` of {name} must be a finite number, got {number!r}.")
        # Python's: they promote nothing
        changed = {
            **settings,
            **{setting: np.asarray(number).item() for setting, number in new.items()},
        }
        label = (
            f"{name.split('(')[0]}({', '.join(f'{k}={v}' for k, v in changed.items())})"
            if new
            else name
        )
        return elementwise(label, fn, derivative, **changed)

    return Elementwise(name, lambda key: (), forward, backward, with_parameters=with_parameters)


@functools.lru_cache(maxsize=256)
def is_flat(activation: Elementwise) -> bool:
    """Whether the derivative is 0 all over [-10, 10], so that no gradient passes.

    >>> is_flat(step), is_flat(relu)
    (True, False)
    """
    with jax.ensure_compile_time_eval():
        x = jnp.linspace(-10, 10, 101)
        slope = activation.backward((), activation.forward((), x)[1], jnp.ones_like(x))[1]
        return not bool(slope.any())


def no_params(name: str, params: Any) -> None:
    """Raises a ValueError unless `params` is `()`, as for every layer without parameters."""
    if not (isinstance(params, tuple) and not params):
        raise ValueError(
            f"{name} has no parameters: its params are `()`, got {type(params).__name__}. Are these the params of another net?"
        )


def _where(condition: Array, x: Array) -> Array:
    """1 where `condition` holds and 0 elsewhere, in the dtype of `x`."""
    return condition.astype(x.dtype)


def _gelu_tanh_derivative(x: Array, y: Array) -> Array:
    # y = x s(2u), s the sigmoid, u = c (x + 0.044715 x^3), c = sqrt(2/pi); y' = s(2u) + 2 x s(2u)
    # s(-2u) u'
    wide, c = at_least_float32(x), 0.7978845608028654
    u, slope = c * (wide + 0.044715 * wide**3), c * (1 + 3 * 0.044715 * wide**2)
    s = lax.logistic(2 * u)
    return s + 2 * wide * s * lax.logistic(-2 * u) * slope


def _gelu_erf_derivative(x: Array, y: Array) -> Array:
    # y = x Phi(x); y' = Phi(x) + x phi(x), the standard normal's distribution and density
    return 0.5 * lax.erfc(-x * 0.7071067811865476) + x * 0.3989422804014327 * jnp.exp(-0.5 * x**2)


def _gelu(x: Array, approximate: bool) -> Array:
    return jax.nn.gelu(x, approximate=approximate)


def _gelu_derivative(x: Array, y: Array, approximate: bool) -> Array:
    return (_gelu_tanh_derivative if approximate else _gelu_erf_derivative)(x, y)


def _mish_derivative(x: Array, y: Array) -> Array:
    t = jnp.tanh(jax.nn.softplus(x))  # y = x t; y' = t + x (1 - t^2) sigma(x)
    return t + x * (1 - t) * (1 + t) * lax.logistic(x)


def _inside(x: Array, low: float, high: float) -> Array:
    """The derivative of `jnp.clip(x, low, high)`.

    1 inside, 0 outside, 1/2 on the bounds (JAX's rule for ties).
    """
    return 0.5 * (_where((x >= low) & (x <= high), x) + _where((x > low) & (x < high), x))


def _hard_sigmoid_derivative(x: Array) -> Array:
    return _where((x > -3) & (x < 3), x) / 6


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

identity = elementwise("identity", lambda x: x, lambda x, y: jnp.ones_like(x))
# The threshold neuron of lecture 000: 1 if x >= 0 else -1. Its derivative is 0 everywhere, so
# backprop learns nothing through it.
step = elementwise(
    "step",
    lambda x: jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x)),
    lambda x, y: jnp.zeros_like(x),
)
sigmoid = elementwise("sigmoid", lax.logistic, lambda x, y: y * (1 - y))
tanh = elementwise("tanh", jnp.tanh, lambda x, y: (1 - y) * (1 + y))
relu = elementwise("relu", jax.nn.relu, lambda x, y: _where(y > 0, y))
leaky_relu = elementwise(
    "leaky_relu",
    jax.nn.leaky_relu,
    lambda x, y, negative_slope: jnp.where(
        x >= 0, jnp.ones_like(x), jnp.full_like(x, negative_slope)
    ),
    negative_slope=0.01,
)
relu6 = elementwise("relu6", jax.nn.relu6, lambda x, y: _where((x > 0) & (x < 6), x))
elu = elementwise(
    "elu",
    jax.nn.elu,
    lambda x, y, alpha: jnp.where(x > 0, jnp.ones_like(x), alpha * jnp.exp(jnp.minimum(x, 0))),
    alpha=1.0,
)
celu = elementwise(
    "celu", jax.nn.celu, lambda x, y, alpha: jnp.exp(jnp.minimum(x, 0) / alpha), alpha=1.0
)
selu = elementwise(
    "selu",
    jax.nn.selu,
    lambda x, y: (
        _SELU_SCALE * jnp.where(x > 0, jnp.ones_like(x), _SELU_ALPHA * jnp.exp(jnp.minimum(x, 0)))
    ),
)
gelu = elementwise("gelu", _gelu, _gelu_derivative, approximate=True)
silu = elementwise("silu", jax.nn.silu, lambda x, y: lax.logistic(x) * (1 + x * lax.logistic(-x)))
swish = silu
mish = elementwise("mish", jax.nn.mish, _mish_derivative)
softplus = elementwise("softplus", jax.nn.softplus, lambda x, y: lax.logistic(x))
log_sigmoid = elementwise("log_sigmoid", jax.nn.log_sigmoid, lambda x, y: lax.logistic(-x))
soft_sign = elementwise("soft_sign", jax.nn.soft_sign, lambda x, y: (1 - jnp.abs(y)) ** 2)
squareplus = elementwise(
    "squareplus", jax.nn.squareplus, lambda x, y, b: 0.5 * (1 + x / jnp.sqrt(x**2 + b)), b=4.0
)
hard_tanh = elementwise("hard_tanh", jax.nn.hard_tanh, lambda x, y: _where((x >= -1) & (x <= 1), x))
hard_sigmoid = elementwise(
    "hard_sigmoid", jax.nn.hard_sigmoid, lambda x, y: _hard_sigmoid_derivative(x)
)
hard_silu = elementwise(
    "hard_silu",
    jax.nn.hard_silu,
    lambda x, y: jax.nn.hard_sigmoid(x) + x * _hard_sigmoid_derivative(x),
)
hard_swish = hard_silu
sparse_plus = elementwise(
    "sparse_plus", jax.nn.sparse_plus, lambda x, y: jnp.clip((x + 1) / 2, 0, 1)
)
sparse_sigmoid = elementwise(
    "sparse_sigmoid", jax.nn.sparse_sigmoid, lambda x, y: 0.5 * _inside(x, -1, 1)
)


def _softmax_forward(params: Any, x: Array) -> tuple[Array, Array]:
    _validate.is_float("x", x)
    no_params("softmax", params)
    y = jax.nn.softmax(jnp.asarray(x), axis=-1)
    return y, y


def _softmax_backward(
    params: Any, y: Array, dy: Array, reduce: Any = total
) -> tuple[tuple[()], Array]:
    # dy_j/dx_k = y_j (1[j = k] - y_k), so dx = y (.) (dy - <dy, y>)
    wide_y, wide_dy = at_least_float32(y), at_least_float32(dy)
    return (), (wide_y * (wide_dy - (wide_dy * wide_y).sum(-1, keepdims=True))).astype(dy.dtype)


# e^{x_j} / sum_k e^{x_k} over the last axis: the posterior of lecture 000's and 002's Bayes
# derivation.
softmax = Layer("softmax", lambda key: (), _softmax_forward, _softmax_backward)

ACTIVATIONS = (
    identity,
    step,
    sigmoid,
    tanh,
    relu,
    leaky_relu,
    relu6,
    elu,
    celu,
    selu,
    gelu,
    silu,
    mish,
    softplus,
    log_sigmoid,
    soft_sign,
    squareplus,
    hard_tanh,
    hard_sigmoid,
    hard_silu,
    sparse_plus,
    sparse_sigmoid,
    softmax,
)
"""Every activation, by the name that `mlp` and `get` know it."""


def get(activation: str | Layer) -> Layer:
    """The activation of that name; a layer is returned as it is.

    Raises:
        ValueError: no activation has this name; offers the nearest.
        TypeError: neither a name nor a layer.

    >>> get("relu") is relu
    True
    """
    if isinstance(activation, Layer):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"`activation` must be a name or a Layer, got {activation!r}. A function? Make it a layer: `elementwise(name, fn, derivative)`."
        )
    known = {a.name: a for a in ACTIVATIONS} | {"swish": swish, "hard_swish": hard_swish}
    _validate.one_of("activation", activation, known)
    return known[activation]
