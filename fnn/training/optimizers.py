"""What `fit` does with an optimiser: its extra arguments, equal ones, an average of the params."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from types import CellType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fnn.factors import widen
from fnn.types import Params

# where functions are that always do the same
LIBRARIES = (jax.__path__[0], optax.__path__[0])


def update_of(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """`(grads, optimizer_state, params, value, value_fn) -> (updates, optimizer_state)`.

    Line searches, plateaus and Hessians by Hutchinson ask for the last two.
    """
    update = optax.with_extra_args_support(optimizer).update
    taken = inspect.signature(update).parameters
    takes_all = any(own.kind == own.VAR_KEYWORD for own in taken.values())

    def run(grads, optimizer_state, params, value, value_fn):
        extra = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        extra = {name: a for name, a in extra.items() if takes_all or name in taken}
        # several of optax's optimisers do not run under strict promotion
        with jax.numpy_dtype_promotion("standard"), _explain_optimizer():
            return update(grads, optimizer_state, params, **extra)

    return run


@contextmanager
def _explain_optimizer():
    """Adds to an error of an optimiser what `fit` gives it."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        error.add_note(
            "The optimiser raised this. A step gives it the mean gradient, plain params, and "
            "`value`, `grad`, `value_fn` and `obj_fn`. One that wants gradients of examples "
            "(optax.contrib.dpsgd: see `fnn.rules.private_sgd`), other params (optax.lookahead) or "
            "a function for gradients (optax.contrib.sam with `opaque_mode`) needs a loop of its "
            "own."
        )
        raise


class _Unknown(Exception):
    """A value that may change, or read what changes."""


def _describe(value):
    """Equal for functions of optax that do the same: by their code and what they close over.

    Raises:
        _Unknown: it closes over functions of others, which may read global variables, or over
            arrays, dicts and objects, which may change.
    """
    if isinstance(value, (bool, int, float, str, np.generic, type, type(None))):
        return type(value), value
    if isinstance(value, tuple):
        return type(value), tuple(map(_describe, value))
    if isinstance(value, functools.partial):
        named = tuple(value.keywords.items())
        return functools.partial, _describe((value.func, value.args, named))
    function = getattr(value, "__wrapped__", value) if hasattr(value, "lower") else value
    if not inspect.isfunction(function):
        raise _Unknown
    code = function.__code__
    if not code.co_filename.startswith(LIBRARIES):
        raise _Unknown
    # a cell without contents is one of a name that has no value
    full = [cell for cell in function.__closure__ or () if cell != CellType()]
    cells = tuple(cell.cell_contents for cell in full)
    if any(cell is value for cell in cells):
        raise _Unknown
    named = tuple((function.__kwdefaults__ or {}).items())
    return code, _describe((cells, function.__defaults__, named))


class _Known:
    """An optimiser by its description."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.description = _describe(optimizer)

    def __hash__(self) -> int:
        return hash(self.description)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.description == other.description


@functools.lru_cache(maxsize=64)
def _first_equal(known):
    return known.optimizer


def known_optimizer(optimizer: Any) -> Any:
    """The first optimiser that does the same, so that its compiled functions are found again.

    >>> known_optimizer(optax.adam(0.1)) is known_optimizer(optax.adam(0.1))
    True
    """
    try:
        return _first_equal(_Known(optimizer))
    except _Unknown:
        return optimizer


class Average(NamedTuple):
    """The state of `with_average`."""

    optimizer: Any
    params: Params  # their exponential moving average


@functools.lru_cache(maxsize=64)  # so that compiled functions are found again
def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that also keeps an exponential moving average of the params.

    Args:
        optimizer: any.
        decay: what is left of the average after a step, `average = decay average + (1 - decay) p`.
            It begins with the first params, and is kept in float32 at least.

    Returns:
        An optimiser whose state is an `Average`.

    Source: Polyak, Juditsky (1992), doi:10.1137/0330046.

    >>> state = with_average(optax.sgd(0.1), 0.9).init(jnp.ones(2))
    >>> state.params
    Array([1., 1.], dtype=float32)
    """
    inner = optax.with_extra_args_support(optimizer)

    def start(params):
        return Average(inner.init(params), jax.tree.map(lambda p: widen(jnp.asarray(p)), params))

    def update(updates, state, params=None, **extra):
        updates, own = inner.update(updates, state.optimizer, params, **extra)
        if params is None:
            raise ValueError("An average of params needs them: pass `params` to `update`.")
        after = jax.tree.map(widen, optax.apply_updates(params, updates))
        average = optax.incremental_update(after, state.params, 1 - decay)
        return updates, Average(own, average)

    return optax.GradientTransformationExtraArgs(start, update)
