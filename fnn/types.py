"""What everything else is made of: `Layer`, `Loss`, `Rule`, and the types of functions.

Samples are rows: arrays are `[batch, ...]`. Parameters are a pytree of arrays: nested tuples and
NamedTuples, `()` where a layer has none.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax import export
from jaxtyping import Float, PyTree, Shaped
from jaxtyping import Key as KeyOf

Array = jax.Array
ArrayLike = jax.Array | np.ndarray  # what public functions take; they return JAX's
Abstract = ArrayLike | np.generic | jax.ShapeDtypeStruct  # what has a shape and a dtype
Key = KeyOf[Array, ""]  # one key from `jax.random.key`
Params = Any  # a tree of arrays; `Layer[P]` says which
Residuals = PyTree  # what `forward` keeps for `backward`
State = PyTree  # what a rule carries from step to step
TargetKind = Literal["numbers", "bits", "probabilities", "signs", "one_hot", "labels"]

P = TypeVar("P")  # the params of a layer
T = TypeVar("T")
Q = ParamSpec("Q")


@runtime_checkable
class Forward(Protocol):
    """`(params, x [batch, ...]) -> (y [batch, ...], residuals)`."""

    def __call__(self, params: Any, x: Any, /) -> tuple[Any, Residuals]: ...


@runtime_checkable
class Backward(Protocol):
    """`(params, residuals, dy, reduce=total) -> (grads, dx)`, one result of `reduce` per array."""

    def __call__(self, params: Any, residuals: Any, dy: Any, reduce: Any = ..., /) -> Any: ...


@runtime_checkable
class ValueAndGrad(Protocol[P]):
    """`(params, x, targets, weights=None) -> (value, grads)`, grads like the params."""

    def __call__(
        self,
        params: P,
        x: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike | None = None,
    ) -> tuple[Float[Array, ""], P]: ...


@runtime_checkable
class Source(Protocol):
    """`(params, *batch) -> (values [batch], tree of factors)`: what `fnn.per_example` works on."""

    def __call__(self, params: Any, *batch: Any) -> tuple[Float[Array, " batch"], Any]: ...


@runtime_checkable
class Record(Protocol):
    """`(params, rule_state, x, targets, weights=None) -> tree of arrays`, for `fnn.fit`."""

    def __call__(
        self,
        params: Any,
        state: Any,
        x: Any,
        targets: Any,
        weights: Any = ...,
        /,
    ) -> Any: ...


@dataclass(frozen=True, eq=False, repr=False)
class ByRecipe:
    """A bundle of functions that equals another one made by the same constructor and arguments.

    `jax.jit` then finds the program of a net that is built again.
    """

    name: str
    recipe: tuple[Any, ...] = field(default=(), init=False)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same object, or made from the same recipe."""
        if not isinstance(other, ByRecipe) or not self.recipe:
            return self is other
        return type(self) is type(other) and self.recipe == other.recipe

    def __hash__(self) -> int:
        """The hash of the recipe."""
        return hash(self.recipe) if self.recipe else id(self)

    def __repr__(self) -> str:
        """The name."""
        return self.name


def by_recipe(constructor: Callable[Q, T]) -> Callable[Q, T]:
    """A decorator: what `constructor` returns for equal arguments compares equal.

    >>> import fnn
    >>> fnn.mlp((3, 2)) == fnn.mlp((3, 2)), fnn.mlp((3, 2)) == fnn.mlp((3, 1))
    (True, False)
    """
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def construct(*args: Q.args, **kwargs: Q.kwargs) -> T:
        made = constructor(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        recipe: list[Any] = [constructor.__name__]
        for value in bound.arguments.values():
            if isinstance(value, dict):
                value = tuple(value.items())
            recipe.append(value)
        object.__setattr__(made, "recipe", tuple(recipe))
        return made

    return construct


@dataclass(frozen=True, eq=False, repr=False)
class Layer(ByRecipe, Generic[P]):
    """A differentiable function with parameters, and its backward pass, as three pure functions.

    `backward` may use `params` only to carry `dy` to `dx`; local gradients come from `residuals`.
    That is what lets a rule put other arrays in their place (feedback alignment).

    Attributes:
        name: what errors and tables call it.
        init: `(key) -> params`.
        forward: `(params, x) -> (y, residuals)`.
        backward: `(params, residuals, dy, reduce=total) -> (grads, dx)`; `reduce` is applied to
            every gradient factor.
        layers: what a combinator applies, in order, once for each time.
        split: `(params) -> params of each of layers`, where the layer is nothing but the chain of
            `layers`; else None.
        join: `(params of each of layers) -> params`: undoes `split`.
    """

    init: Callable[[Key], P]
    forward: Forward
    backward: Backward
    layers: tuple[Layer[Any], ...] = ()
    split: Callable[[P], tuple[Any, ...]] | None = None
    join: Callable[[tuple[Any, ...]], P] | None = None

    def apply(self, params: P, x: Any) -> Any:
        """The outputs alone: `forward` without its residuals.

        Args:
            params: what `init` returned, or a tree like it.
            x: `[..., features]`; leading axes are free.

        Returns:
            `[..., outputs]`.
        """
        return self.forward(params, x)[0]


def no_check(
    outputs: Shaped[Abstract, "batch ..."],
    targets: Shaped[ArrayLike, "batch ..."],
) -> None:
    """The default `Loss.check`: every value is valid."""


@dataclass(frozen=True, eq=False, repr=False)
class Loss(ByRecipe):
    """A loss per example, and its gradient with respect to the outputs, written by hand.

    Attributes:
        name: optax's name where optax has the loss.
        value: `(outputs [batch, ...], targets) -> [batch]`.
        grad: `(outputs, targets) -> like outputs`: the gradient of each example's own value (no
            1/batch in it).
        targets: what targets are: "numbers", "bits" (for outputs that are logits),
            "probabilities" (for outputs that are probabilities), "signs" (-1 or 1), "one_hot" (rows
            that sum to 1) or "labels" (whole numbers, one axis less than the outputs).
        check: `(outputs, targets) -> None`; raises where the *values* of concrete targets are
            invalid. `outputs` may be a `jax.ShapeDtypeStruct`. `fit` and `evaluate` call it once,
            never while tracing.
        correct: `(outputs, targets) -> [batch]` of bool for accuracy; None for a regression.
        with_settings: what a call with keywords returns: `huber_loss(delta=2.0)`.
    """

    value: Callable
    grad: Callable
    targets: TargetKind = "numbers"
    check: Callable = no_check
    correct: Callable | None = None
    with_settings: Callable[..., Loss] | None = None

    def __call__(self, *args: Any, **settings: Any) -> Loss:
        """The same loss with other settings: `huber_loss(delta=2.0)`."""
        if args or self.with_settings is None:
            hint = "" if args else f" {self.name} has no settings."
            raise TypeError(
                f"A Loss is called with keyword settings only.{hint} "
                f"Its values are `{self.name}.value(outputs, targets)`."
            )
        return self.with_settings(**settings)


@dataclass(frozen=True, eq=False, repr=False)
class Rule(ByRecipe):
    """A way to assign credit: backprop, or what takes its place in the same training loop.

    Attributes:
        name: what tables call it.
        init: `(key, params) -> state`; `()` where the rule needs none.
        value_and_grad: `(params, state, x, targets, weights=None) -> (value, grads, state)`: the
            weighted mean of the loss over the batch, and what the optimiser gets. `weights` is
            `[batch]`; weight 0 means padding.
        predict: `(params, x) -> outputs`.
        loss: what `value` measures; `fit` checks targets by it and `evaluate` reports it.
    """

    name: str
    init: Callable[[Key, Params], State]
    value_and_grad: Callable[..., tuple[Any, PyTree, State]]
    predict: Callable[[Params, Any], Any]
    loss: Loss


def storable(cls: type[T]) -> type[T]:
    """A decorator: `jax.export` can store programs that take or return this class of results.

    Args:
        cls: a NamedTuple, or a dataclass that is a pytree with static fields of text or numbers.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if issubclass(cls, tuple):
        return export.register_namedtuple_serialization(cls, serialized_name=name)
    return export.register_pytree_node_serialization(
        cls,
        serialized_name=name,
        serialize_auxdata=lambda fields: json.dumps(fields).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )


def key(seed: int) -> Key:
    """`jax.random.key(seed)` for 0 <= seed < 2**32; other seeds would silently repeat one of these.

    Raises:
        TypeError, ValueError: the seed is no whole number, or out of range.

    >>> key(0).shape
    ()
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"`seed` must be a whole number, got {seed!r} ({type(seed).__name__}).")
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"`seed` must be in 0 ... 2**32 - 1, got {seed}; JAX keeps 32 bits, so it would equal "
            f"seed {seed % 2**32}."
        )
    return jax.random.key(seed)
