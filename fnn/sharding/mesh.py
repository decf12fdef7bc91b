"""The mesh: devices in a grid with the axes "data" and "model"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from fnn import _validate

DATA, MODEL = "data", "model"
MEND = "Make one: `fnn.sharding.make_mesh()`."


def make_mesh(
    *, data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes "data" and "model", both of JAX's type Auto.

    The compiler places what lies between inputs and outputs.

    Args:
        data: over how many devices a batch is split; None for all devices there are, divided by
            `model`.
        model: over how many devices weights are split.
        devices: `jax.devices()`, if None; the first `data * model` of them are used.

    Returns:
        A `jax.sharding.Mesh` of shape `[data, model]`.

    Raises:
        TypeError, ValueError: a size is not a whole number above 0, or there are not so many
            devices.

    >>> make_mesh(data=1).axis_names
    ('data', 'model')
    """
    found = list(jax.devices() if devices is None else devices)
    _validate.positive("model", model, whole=True)
    if data is None:
        if not found or len(found) % model:
            raise ValueError(
                f"`model` is {model}, which does not divide the number of devices, {len(found)}. "
                f"{_more(model)}"
            )
        data = len(found) // model
    _validate.positive("data", data, whole=True)
    if data * model > len(found):
        raise ValueError(
            f"`data` x `model` is {data} x {model} = {data * model}, "
            f"but there are {len(found)} devices. {_more(data * model)}"
        )
    return jax.make_mesh(
        (int(data), int(model)), (DATA, MODEL), (AxisType.Auto,) * 2, devices=found[: data * model]
    )


def _more(count: int) -> str:
    return (
        f"Ask for fewer, or try it on a CPU: set JAX_NUM_CPU_DEVICES={count} in the environment "
        "before Python starts."
    )


def size_of(mesh: Mesh, axis: str) -> int:
    """How many parts an axis of a checked mesh has."""
    check_mesh(mesh)
    if axis not in mesh.shape:
        raise ValueError(
            f"`mesh` must have an axis {axis!r}, "
            f"got {', '.join(map(repr, mesh.axis_names)) or 'none'}. {MEND}"
        )
    return mesh.shape[axis]


def check_mesh(mesh: Any) -> None:
    """Raises unless `mesh` is a mesh of devices whose axes are all Auto.

    The hand-written backward passes name no shardings.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"`mesh` must be a jax.sharding.Mesh, got {type(mesh).__name__}. {MEND}")
    other = next(
        (
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Auto
        ),
        None,
    )
    if other is not None:
        raise ValueError(
            f"`mesh` must have axes of type Auto, but {other!r} is not "
            f"(the default of `jax.make_mesh`). {MEND}"
        )
