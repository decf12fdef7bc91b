"""Elementwise activations, each with its derivative written by hand, and softmax.

The forward functions are `jax.nn`'s. A derivative gets input and output, `derivative(x, y)`, and
uses whichever is cheaper or more accurate; at a kink it takes the value that `jax.grad` takes.
Narrow dtypes are computed in float32. An activation is a `Layer` without parameters; a call
changes its settings: `leaky_relu(negative_slope=0.2)`. To add one, write one `elementwise(...)`
entry and put its name into `Name`: the tests run over `ACTIVATIONS`.

Sources: lectures 000 (threshold, sigmoid, ReLU, softplus), 002 (tanh), 003 (leaky ReLU); the others
in `jax.nn`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn
from jax.lax import erfc, logistic
from jax.numpy import exp, where

from fnn import _validate
from fnn.factors import total, widen
from fnn.types import Layer, by_recipe


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Elementwise(Layer[tuple[()]]):
    """A layer without parameters, `y = fn(x)`; a call with keywords changes its settings."""

    with_settings: Callable[..., Elementwise]

    def __call__(self, *args: Any, **settings: Any) -> Elementwise:
        """The same activation with other settings."""
        if args:
            raise TypeError(
                f"{self.name} is called with keyword settings only. "
                f"Its outputs are `{self.name}.apply((), x)`."
            )
        return self.with_settings(**settings)


@by_recipe
def elementwise(
    name: str,
    fn: Callable,
    derivative: Callable,
    **settings: Any,
) -> Elementwise:
    """An activation from a function of one number and its derivative.

    Both compute in float32 where `x` is narrower.

    Args:
        name: what tables and `mlp(activation=name)` call it.
        fn: `(x, **settings) -> y`, elementwise.
        derivative: `(x, y, **settings) -> dy/dx`, elementwise, from input and output; numbers or
            bools.
        **settings: the numbers that both take, with their defaults.

    Returns:
        A layer with `params = ()`; `layer(setting=value)` is the same with another setting.

    Source: lecture 001, dE/dx = dE/dy (.) f'(x), the Hadamard product.

    >>> cube = elementwise("cube", lambda x: x**3, lambda x, y: 3 * x**2)
    >>> y, residuals = cube.forward((), jnp.array([2.0]))
    >>> cube.backward((), residuals, jnp.array([1.0]))[1]
    Array([12.], dtype=float32)
    """

    def forward(params, x):
        x = _enter(name, params, x)
        wide = widen(x)
        y = fn(wide, **settings)
        return y.astype(x.dtype), (wide, y)

    def backward(params, residuals, dy, reduce=total):
        x, y = residuals
        slope = jnp.asarray(derivative(x, y, **settings), x.dtype)
        return (), (widen(dy) * slope).astype(dy.dtype)

    def with_settings(**new):
        for setting, number in new.items():
            _validate.one_of(f"setting of {name}", setting, settings)
            is_number = isinstance(number, (int, float, np.number))
            if not is_number or not np.isfinite(number):
                raise ValueError(f"`{setting}` of {name} must be a finite number, got {number!r}.")
        changed = dict(settings)
        for setting, number in new.items():
            changed[setting] = np.asarray(number).item()  # Python's numbers promote nothing
        label = ", ".join(f"{setting}={number}" for setting, number in changed.items())
        kind = name.split("(")[0]
        return elementwise(f"{kind}({label})", fn, derivative, **changed)

    return Elementwise(name, _no_params, forward, backward, with_settings=with_settings)


def _no_params(key):
    return ()


def _enter(name, params, x):
    """`x` as an array; raises unless it holds floating-point numbers and `params` is `()`."""
    _validate.is_float("x", x)
    if jax.tree.leaves(params):
        raise ValueError(
            f"{name} has no parameters: its params are `()`, got {type(params).__name__}. "
            "Are these the params of another net?"
        )
    return jnp.asarray(x)


@functools.lru_cache(maxsize=256)
def is_flat(activation: Layer) -> bool:
    """Whether the derivative is 0 all over [-10, 10], so that no gradient passes.

    >>> is_flat(step), is_flat(relu)
    (True, False)
    """
    with jax.ensure_compile_time_eval():
        x = jnp.linspace(-10, 10, 101)
        _, residuals = activation.forward((), x)
        _, slope = activation.backward((), residuals, jnp.ones(101))
        return not slope.any()


def _sigmoid_slope(x):
    """s(x) s(-x) for the sigmoid s, from the exponential that does not overflow."""
    e = exp(-abs(x))
    return e / (1 + e) ** 2


def _ramp(x, end, inside):
    """0 up to `-end`, 1 from `end`, and `inside` between."""
    below = x <= -end
    upper = where(x >= end, 1, inside)
    return where(below, 0, upper)


def _celu_derivative(x, y, alpha):
    # Also in second derivatives, `jax.nn.elu` takes the branch of x < 0 at 0.
    return exp(where(x > 0, 0, x / alpha))


def _elu_derivative(x, y, alpha):
    return where(x > 0, 1, alpha * _celu_derivative(x, y, 1))


def _selu_derivative(x, y):
    alpha = 1.6732632423543772
    return 1.0507009873554805 * _elu_derivative(x, y, alpha)


def _gelu_derivative(x, y, approximate):
    x = x.clip(-40, 40)  # beyond, the derivative is 0 or 1, and powers of x overflow
    if not approximate:  # y = x P(x), y' = P(x) + x p(x): the normal distribution and its density
        below = 0.5 * erfc(-x * 0.7071067811865476)
        return below + x * 0.3989422804014327 * exp(-0.5 * x**2)
    # y = x s(v), v = sqrt(8/pi) (x + 0.044715 x^3)
    c = 1.5957691216057308
    cubic = 0.044715 * x**2
    v = c * x * (1 + cubic)
    return logistic(v) * (1 + c * x * (1 + 3 * cubic) * logistic(-v))


def _silu_derivative(x, y):
    return logistic(x) * (1 + x * logistic(-x))


def _mish_derivative(x, y):
    # y = x tanh(p), p' = s(x), tanh'(p) = 4 s(2p) s(-2p)
    p = nn.softplus(x)
    return jnp.tanh(p) + x * logistic(x) * (4 * _sigmoid_slope(2 * p))


def _squareplus_derivative(x, y, b):
    return logistic(2 * jnp.arcsinh(x / b**0.5))


def _hard_sigmoid_derivative(x, y):
    return where(abs(x) < 3, 1 / 6, 0)


def _hard_silu_derivative(x, y):
    return _ramp(x, 3, (2 * x + 3) / 6)


def _sparse_plus_derivative(x, y):
    return _ramp(x, 1, (x + 1) / 2)


def _sparse_sigmoid_derivative(x, y):
    # At -1 and 1 it is 1/4, the mean of both sides.
    return (1 + jnp.sign(1 - abs(x))) / 4


identity = elementwise("identity", lambda x: x, lambda x, y: 1)
# The threshold neuron of lecture 000. Backprop learns nothing through it.
step = elementwise("step", lambda x: where(x >= 0, 1, -1), lambda x, y: 0)
sigmoid = elementwise("sigmoid", logistic, lambda x, y: _sigmoid_slope(x))
tanh = elementwise("tanh", jnp.tanh, lambda x, y: 4 * _sigmoid_slope(2 * x))
relu = elementwise("relu", nn.relu, lambda x, y: y > 0)
leaky_relu = elementwise(
    "leaky_relu",
    nn.leaky_relu,
    lambda x, y, negative_slope: where(x >= 0, 1, negative_slope),
    negative_slope=0.01,
)
relu6 = elementwise("relu6", nn.relu6, lambda x, y: (x > 0) & (x < 6))
elu = elementwise("elu", nn.elu, _elu_derivative, alpha=1.0)
celu = elementwise("celu", nn.celu, _celu_derivative, alpha=1.0)
selu = elementwise("selu", nn.selu, _selu_derivative)
gelu = elementwise("gelu", nn.gelu, _gelu_derivative, approximate=True)
silu = elementwise("silu", nn.silu, _silu_derivative)
swish = silu
mish = elementwise("mish", nn.mish, _mish_derivative)
softplus = elementwise("softplus", nn.softplus, lambda x, y: logistic(x))
log_sigmoid = elementwise("log_sigmoid", nn.log_sigmoid, lambda x, y: logistic(-x))
soft_sign = elementwise("soft_sign", nn.soft_sign, lambda x, y: 1 / (1 + abs(x)) ** 2)
squareplus = elementwise("squareplus", nn.squareplus, _squareplus_derivative, b=4.0)
hard_tanh = elementwise("hard_tanh", nn.hard_tanh, lambda x, y: abs(x) <= 1)
hard_sigmoid = elementwise("hard_sigmoid", nn.hard_sigmoid, _hard_sigmoid_derivative)
hard_silu = elementwise("hard_silu", nn.hard_silu, _hard_silu_derivative)
hard_swish = hard_silu
sparse_plus = elementwise("sparse_plus", nn.sparse_plus, _sparse_plus_derivative)
sparse_sigmoid = elementwise("sparse_sigmoid", nn.sparse_sigmoid, _sparse_sigmoid_derivative)


def _softmax_forward(params, x):
    x = _enter("softmax", params, x)
    y = nn.softmax(widen(x), axis=-1)
    return y.astype(x.dtype), y


def _softmax_backward(params, y, dy, reduce=total):
    # dy_j/dx_k = y_j (1[j = k] - y_k), so dx = y (.) (dy - <dy, y>). A constant in dy has no
    # effect: without dy at the largest y, dy - <dy, y> does not cancel there.
    wide = widen(dy)
    top = y == y.max(-1, keepdims=True)
    wide = wide - wide.max(-1, keepdims=True, where=top, initial=-jnp.inf)
    mean = (wide * y).sum(-1, keepdims=True)
    dx = y * (wide - mean)
    return (), dx.astype(dy.dtype)


# e^{x_j} / sum_k e^{x_k} over the last axis: the posterior of lecture 000's and 002's Bayes
# derivation.
softmax = Layer("softmax", _no_params, _softmax_forward, _softmax_backward)

# A literal, for completion by a type checker.
Name = Literal[
    "identity",
    "step",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "relu6",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "swish",
    "mish",
    "softplus",
    "log_sigmoid",
    "soft_sign",
    "squareplus",
    "hard_tanh",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "sparse_plus",
    "sparse_sigmoid",
    "softmax",
]


def get(activation: Name | str | Layer[Any]) -> Layer[Any]:
    """The activation of that name; a layer is returned as it is.

    Args:
        activation: a name out of `Name`, or a layer.

    Returns:
        A layer.

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
            f"`activation` must be a name or a Layer, got {activation!r}. "
            "A function? Make it a layer: `elementwise(name, fn, derivative)`."
        )
    _validate.one_of("activation", activation, get_args(Name))
    return globals()[activation]


# Every activation once, though two have a second name.
ACTIVATIONS = tuple(dict.fromkeys(map(get, get_args(Name))))
