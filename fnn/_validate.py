"""Checks of arguments: by shape and dtype while tracing, by value where data enters.

Each error says what came and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def said(leaf: Any) -> str:
    """A leaf in a message: its dtype and shape."""
    return (
        f"{leaf.dtype}{list(leaf.shape)}"
        if hasattr(leaf, "dtype")
        else f"{leaf!r:.40} ({type(leaf).__name__})"
    )


def is_array(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` is a JAX or NumPy array (or a tracer, or a shape) of
    numbers."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(
            f"`{name}` must be an array, got {type(value).__name__}. Convert it: `jnp.asarray({name})`."
        )
    if getattr(value.dtype, "kind", "V") in "USO":
        raise TypeError(
            f"`{name}` must hold numbers, got {value.dtype}. Text? Convert it: `{name}.astype(float)`."
        )
    if getattr(value.dtype, "kind", "V") in "mM":
        raise TypeError(
            f"`{name}` must hold numbers, got {value.dtype}. Dates? Subtract a day and divide by a unit of time first."
        )


def is_float(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` is an array of floating-point numbers."""
    is_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must hold floating-point numbers, got {value.dtype}. Convert it: `{name}.astype(jnp.float32)`."
        )


def canonical_dtype(value: Any) -> Any:
    """The dtype `value` has inside JAX (a NumPy float64 array is float32 there unless x64 is on)."""
    return jax.dtypes.canonicalize_dtype(value.dtype)


def same_dtype(name: str, value: Any, other_name: str, other: Any) -> None:
    """Raises a TypeError unless both arrays have one dtype: `fnn` never promotes in silence."""
    got, expected = canonical_dtype(value), canonical_dtype(other)
    if got != expected:
        raise TypeError(
            f"`{name}` is {got} but `{other_name}` is {expected}; mixtures are not promoted. "
            f"Cast one: `{name}.astype({other_name}.dtype)`, or the params by `jax.tree.map(lambda p: p.astype({name}.dtype), params)`."
        )


def positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Raises unless `value` is a finite number above zero (a whole one, where `whole`)."""
    kinds = (int, np.integer) if whole else (int, float, np.number)
    expected = f"`{name}` must be a {'whole' if whole else 'finite'} number above 0"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{expected}, got {value!r} ({type(value).__name__}).")
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{expected}, got {value!r}.")


def not_negative(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number, at least zero."""
    expected = f"`{name}` must be a finite number, at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{expected}, got {value!r:.80} ({type(value).__name__}).")
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{expected}, got {value!r}.")


def is_function(name: str, value: Any, signature: str) -> None:
    """Raises a TypeError unless `value` can be called; `signature` says how it will be."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function {signature}, got {value!r:.80}.")


def hashable(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` can be a key: compiled functions are kept by it."""
    try:
        hash(value)
    except TypeError as error:
        mend = "Make it of functions and numbers, no arrays or lists."
        raise TypeError(
            f"`{name}` must be hashable, since compiled functions are kept by it: {error}. {mend}"
        ) from None


def key(seed: int) -> jax.Array:
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
            f"`seed` must be in 0 ... 2**32 - 1, got {seed}; JAX keeps 32 bits, so it would equal seed {seed % 2**32}."
        )
    return jax.random.key(seed)


def is_key(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` is one typed PRNG key."""
    if not (hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"`{name}` must be a key from `jax.random.key(seed)`, got {value!r:.80}.")
    if value.shape != ():
        raise ValueError(
            f"`{name}` must be one key, got {value.size} of shape {value.shape}. Pass one of them: `{name}[0]`."
        )


def one_of(kind: str, name: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError that offers the nearest choice unless `name` is one of `choices`."""
    choices = list(choices)
    if name not in choices:
        near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5) or [
            c for c in choices if c.startswith(str(name))
        ]
        mend = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"Unknown {kind} {name!r}. {mend}Known: {', '.join(choices) or 'none'}.")


def finite(name: str, value: Any) -> None:
    """Raises a ValueError that names the first row and column unless every number of a concrete
    array is finite."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite inside JAX
        inside_jax = jnp.asarray(value)
    if bool(jnp.isfinite(inside_jax).all()):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(inside_jax)))
    row, rest = int(bad[0][0]) if bad[0].size else 0, tuple(int(i) for i in bad[0][1:])
    where = f"row {row}" + (f", column {rest[0] if len(rest) == 1 else rest}" if rest else "")
    number, count = (
        np.asarray(value)[tuple(bad[0])],
        f"{len(bad)} non-finite of {value.size} in {inside_jax.dtype}",
    )
    raise ValueError(
        f"`{name}` has {number} at {where} ({count}). Remove or impute such rows first."
    )


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Puts `place` in front of a TypeError or ValueError that does not yet name it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if place not in str(error):
            error.args = (f"{place}: {error}",)
        raise
