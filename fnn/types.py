"""The three things everything else is made of.

`Layer`, `Loss` and `Rule`, each a static bundle of pure functions.

Shapes are written `[batch, ...]`; samples are rows. A pytree of parameters is nested tuples and
NamedTuples of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Array = jax.Array
ArrayLike = jax.Array | np.ndarray  # what public functions take; they return JAX's
Key = jax.Array  # a scalar key array from `jax.random.key`
Params = PyTree  # nested tuples and NamedTuples of arrays; `()` where a layer has none
Residuals = PyTree  # what `forward` keeps for `backward`
State = PyTree  # what a rule carries from step to step


def at_least_float32(a: Any) -> Any:
    """The array in float32 if it was narrower: what norms and means accumulate in."""
    return a.astype(jnp.float32) if jnp.finfo(a.dtype).bits < 32 else a


@dataclass(frozen=True)
class Layer:
    """A differentiable function with parameters, and its backward pass, as three pure functions.

    `backward` may use `params` only to carry `dy` to `dx`; local gradients come from `residuals`.
    That is what lets a rule put other arrays in their place (feedback alignment) or call one
    block's `backward` with its own `dy`.

    Attributes:
        name: what errors and tables call it.
        init: `(key) -> params`.
        forward: `(params, x) -> (y, residuals)`.
        backward: `(params, residuals, dy, reduce=total) -> (grads, dx)`; `reduce` is applied to
            every gradient factor.
        layers: what a combinator chains, in order; empty for a primitive.
    """

    name: str
    init: Callable[[Key], Params]
    forward: Callable[[Params, Any], tuple[Any, Residuals]]
    backward: Callable[..., tuple[PyTree, Any]]
    layers: tuple[Layer, ...] = ()

    def apply(self, params: Params, x: Any) -> Any:
        """The outputs alone: `forward` without its residuals.

        Args:
            params: what `init` returned, or a tree like it.
            x: `[..., features]`; leading axes are free.

        Returns:
            `[..., outputs]`.
        """
        return self.forward(params, x)[0]

    def __repr__(self) -> str:
        return self.name


def no_check(outputs: Any, targets: Any) -> None:
    """The default `Loss.check`: every value is allowed."""


@dataclass(frozen=True)
class Loss:
    """A loss per example, and its gradient with respect to the outputs, written by hand.

    Attributes:
        name: optax's name where optax has the loss.
        value: `(outputs [batch, ...], targets) -> [batch]`.
        grad: `(outputs, targets) -> like outputs`: the gradient of each example's own value (no
            1/batch in it).
        check: `(outputs, targets) -> None`, raises where the *values* of concrete targets cannot be
            meant (labels out of range, one-hot rows that do not sum to one). `outputs` may be a
            `jax.ShapeDtypeStruct`. Called where data enters (`fit`, `evaluate`), never while
            tracing.
        correct: `(outputs, targets) -> [batch]` of bool for accuracy; None where accuracy means
            nothing (regression).
        with_parameters: what a call with keywords returns: `huber_loss(delta=2.0)`.
    """

    name: str
    value: Callable[[Any, Any], Any]
    grad: Callable[[Any, Any], Any]
    check: Callable[[Any, Any], None] = no_check
    correct: Callable[[Any, Any], Any] | None = None
    with_parameters: Callable[..., Loss] | None = None

    def __call__(self, *args: Any, **parameters: Any) -> Loss:
        """The same loss with other parameters, `huber_loss(delta=2.0)`.

        For its values call `.value(outputs, targets)`.
        """
        if args or self.with_parameters is None:
            hint = "" if args else f" {self.name} has no parameters."
            raise TypeError(
                f"A Loss is called with keyword parameters only.{hint} Its values are `{self.name}.value(outputs, targets)`."
            )
        return self.with_parameters(**parameters)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Rule:
    """A way to assign credit: backprop, or what stands in its place in the same training loop.

    Attributes:
        name: what tables call it.
        init: `(key, params) -> state`; `()` where the rule needs none.
        value_and_grad: `(params, state, x, targets, weights=None) -> (value, grads, state)`: the
            weighted mean of the loss over the batch, and what the optimiser is given. `weights` is
            `[batch]`; weight 0 means padding.
        predict: `(params, x) -> outputs`.
        loss: what `value` measures; `fit` checks targets by it and `evaluate` reports it.
    """

    name: str
    init: Callable[[Key, Params], State]
    value_and_grad: Callable[..., tuple[Any, PyTree, State]]
    predict: Callable[[Params, Any], Any]
    loss: Loss

    def __repr__(self) -> str:
        return self.name
