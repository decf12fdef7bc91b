"""Argument errors: each names the argument, what was expected, what came, and the likely mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from fnn.types import Abstract, ArrayLike

# What other libraries hold arrays in: the attribute that tells, and what to pass instead.
CONVERSIONS = (
    ("toarray", "A sparse matrix? Pass `{}.toarray()`."),
    ("detach", "A PyTorch tensor? Pass `{}.detach().cpu().numpy()`."),
    ("to_numpy", "From pandas? Pass `{}.to_numpy(dtype='float32')`, or int32 for labels."),
)


def describe(leaf: Any) -> str:
    """A leaf in a message: its dtype and shape."""
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"{leaf!r:.40} ({type(leaf).__name__})"


def is_array(name: str, value: Shaped[Abstract, "..."]) -> None:
    """Raises a TypeError unless `value` is an array of JAX or NumPy that JAX can hold."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        return
    if not isinstance(value, (np.ndarray, np.generic)):
        mend = _conversion(name, value)
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}. {mend}")
    mend = _numpy_mend(name, value.dtype)
    if mend:
        raise TypeError(f"`{name}` must hold numbers of JAX's kinds, got {value.dtype}. {mend}")


def fits(name: str, value: Shaped[ArrayLike, "..."]) -> None:
    """Raises a ValueError unless JAX holds all whole numbers: in 32 bits, unless x64 is on."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not value.size:
        return
    dtype = canonical_dtype(value)
    bounds = np.iinfo(dtype)
    for number in (value.min(), value.max()):
        if not bounds.min <= int(number) <= bounds.max:
            raise ValueError(f"`{name}` holds {number}, which {dtype} inside JAX does not hold.")


def _conversion(name, value):
    """How to make an array of what is none."""
    for attribute, mend in CONVERSIONS:
        if hasattr(value, attribute):
            return mend.format(name)
    return f"Convert it: `jnp.asarray({name})`."


def _numpy_mend(name, dtype):
    """How to convert a NumPy array that JAX cannot hold; "" where it can."""
    if dtype.kind in "USO":
        return f"Text or objects? Convert them: `{name}.astype(float)`."
    if dtype.kind in "mM":
        return "Dates? Subtract a day and divide by a unit of time first."
    if not dtype.isnative:
        return f"Of another byte order? Convert it: `{name}.astype('{dtype.name}')`."
    wider = dtype.itemsize > np.dtype(float).itemsize
    if wider and dtype in (np.longdouble, np.clongdouble):
        return f"Wider than JAX's numbers? Convert it: `{name}.astype('float64')`."
    return ""


def is_float(name: str, value: Float[Abstract, "..."]) -> None:
    """Raises a TypeError unless `value` is an array of floating-point numbers."""
    is_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        mend = f"Convert it: `{name}.astype(jnp.float32)`."
        raise TypeError(f"`{name}` must hold floating-point numbers, got {value.dtype}. {mend}")


def canonical_dtype(value: Shaped[Abstract, "..."]) -> Any:
    """The dtype of `value` inside JAX: float64 becomes float32 unless x64 is on."""
    return jax.dtypes.canonicalize_dtype(value.dtype)


def same_dtype(
    name: str,
    value: Shaped[Abstract, "..."],
    other_name: str,
    other: Shaped[Abstract, "..."],
) -> None:
    """Raises a TypeError unless both arrays have one dtype: `fnn` never promotes in silence."""
    dtype = canonical_dtype(value)
    expected = canonical_dtype(other)
    if dtype != expected:
        raise TypeError(
            f"`{name}` is {dtype} but `{other_name}` is {expected}; mixtures are not promoted. "
            f"Cast one: `{name}.astype({other_name}.dtype)`, or the params by "
            f"`jax.tree.map(lambda p: p.astype({name}.dtype), params)`."
        )


def per_example(name: str, value: Shaped[ArrayLike, " batch"], examples: Any) -> None:
    """Raises unless `value` is an array with one number per example."""
    is_array(name, value)
    if value.shape != (examples,):
        came = tuple(value.shape)
        raise ValueError(f"`{name}` has shape {came}, expected ({examples},): one per example.")


def positive(name: str, value: Any, *, whole: bool = False) -> None:
    """Raises unless `value` is a finite number above 0 (a whole one, where `whole`)."""
    kind = "finite"
    types = (int, float, np.number)
    if whole:
        kind = "whole"
        types = (int, np.integer)
    expected = f"`{name}` must be a {kind} number above 0"
    if isinstance(value, bool) or not isinstance(value, types):
        raise TypeError(f"{expected}, got {value!r} ({type(value).__name__}).")
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{expected}, got {value!r}.")


def not_negative(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number, at least 0."""
    expected = f"`{name}` must be a finite number, at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{expected}, got {value!r:.80} ({type(value).__name__}).")
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{expected}, got {value!r}.")


def is_function(name: str, value: Any, signature: str) -> None:
    """Raises a TypeError unless `value` can be called; `signature` says how it is called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function {signature}, got {value!r:.80}.")


def hashable(name: str, value: Any) -> None:
    """Raises a TypeError unless `value` can be a key of the cache of compiled functions."""
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be hashable, since compiled functions are kept by it: {error}. "
            "Make it of functions and numbers, no arrays or lists."
        ) from None


def is_key(name: str, value: Any) -> None:
    """Raises unless `value` is one typed PRNG key."""
    is_typed = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not is_typed:
        raise TypeError(f"`{name}` must be a key from `jax.random.key(seed)`, got {value!r:.80}.")
    if value.shape != ():
        raise ValueError(
            f"`{name}` must be one key, got {value.size} of shape {value.shape}. "
            f"Pass one of them: `{name}[0]`."
        )


def one_of(kind: str, name: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError that offers the nearest choice unless `name` is one of `choices`."""
    choices = list(choices)
    if name in choices:
        return
    start = str(name)
    near = difflib.get_close_matches(start, choices, n=1, cutoff=0.5)
    near += [choice for choice in choices if choice.startswith(start)]
    mend = f"Did you mean {near[0]!r}? " if near else ""
    known = ", ".join(choices) or "none"
    raise ValueError(f"Unknown {kind} {name!r}. {mend}Known: {known}.")


def finite(name: str, value: Shaped[ArrayLike, "..."]) -> None:
    """Raises a ValueError with row and column unless every number of an array is finite."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return
    with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite inside JAX
        inside_jax = np.asarray(value).astype(canonical_dtype(value), copy=False)
    finite = np.isfinite(inside_jax)
    if finite.all():
        return
    bad = np.argwhere(~finite)
    place = tuple(bad[0].tolist())
    found = np.asarray(value)[place]
    row, *columns = place or (0,)
    at = f"row {row}"
    if len(columns) == 1:
        at += f", column {columns[0]}"
    elif columns:
        at += f", column {tuple(columns)}"
    raise ValueError(
        f"`{name}` has {found} at {at} ({len(bad)} non-finite of {value.size} in "
        f"{inside_jax.dtype}). Remove or impute such rows first."
    )


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Puts `place` in front of a TypeError or ValueError that does not name it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if place not in str(error):
            error.args = (f"{place}: {error}",)
        raise


def is_params(params: Any) -> None:
    """Raises a TypeError unless all leaves are arrays, or shapes of some."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            at = f"`params{jax.tree_util.keystr(path)}`"
            raise TypeError(
                f"Leaves of `params` must be arrays, got {type(leaf).__name__} at {at}. "
                "Pass what `net.init(key)` returns."
            )
