"""How other libraries name and store the parameters of a layer.

What `fnn.interchange` reads and writes by.

A tree of another library is here a flat dict `{"module.field": array}`. For each library one table
says what the fields are called and how the weight of a dense layer is stored, and two functions say
which module is which layer's, where the user does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from fnn import _validate
from fnn.nets.layers import Dense, Embedding, Norm
from fnn.types import Array, Params

RANKS = {Dense: (2, 1), Norm: (1, 1), Embedding: (2,)}


class Module(NamedTuple):
    """A layer with parameters in a tree of fnn's."""

    path: str  # dotted
    node: Any  # Dense, Norm or Embedding
    kind: str  # Flax's name for it
    place: int  # among all layers, also those without parameters


class Library(NamedTuple):
    """A library's conventions."""

    # what it calls the fields of a Dense, a Norm and an Embedding
    fields: dict[type, tuple[str, ...]]
    axes: str  # of a dense layer's weight
    names: Callable[[list[Module]], list[str]]  # the modules that are written
    # (argument, names of all arrays, layers) -> the module of each
    order: Callable[[str, Iterable[str], list[Module]], list[str]]


class Slot(NamedTuple):
    """A leaf and where it goes."""

    name: str  # "module.field"
    leaf: Any
    turned: bool  # stored transposed there


def write(
    argument: str, params: Params, library: Library, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The leaves under a library's names, as it stores them."""
    modules = layers(argument, params)
    names = library.names(modules) if names is None else checked(names, modules)
    return {
        slot.name: slot.leaf.T if slot.turned else slot.leaf
        for slot in _slots(modules, library, names)
    }


def read(
    argument: str,
    found: Mapping[str, Any],
    like: Params,
    library: Library,
    names: Sequence[str] | None = None,
) -> Params:
    """A tree like `like` from arrays under a library's names."""
    known = {field for fields in library.fields.values() for field in fields}
    strange = [name for name in found if name.rpartition(".")[2] not in known]
    if strange:
        mend = "A batch norm? Fold it into the layer before it."
        raise ValueError(
            f"`{argument}` has what dense layers, layer_norm, rms_norm and embedding have not: "
            f"{listed(strange)}. {mend}"
        )
    modules = layers("like", like)
    slots = _slots(
        modules,
        library,
        library.order(argument, found, modules) if names is None else checked(names, modules),
    )
    wanted = {
        s.name: jax.ShapeDtypeStruct(s.leaf.shape[::-1] if s.turned else s.leaf.shape, s.leaf.dtype)
        for s in slots
    }
    arrays = fitted(argument, found, wanted, axes=library.axes)
    return jax.tree.unflatten(
        jax.tree.structure(like), [arrays[s.name].T if s.turned else arrays[s.name] for s in slots]
    )


def fitted(
    argument: str,
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    *,
    axes: str = "[in, out]",
    cast: bool = True,
) -> dict[str, Array]:
    """The arrays of `found` in the dtypes of `wanted`.

    It compares all names, shapes and dtypes first. With `cast` it lets one float dtype stand for
    another.
    """
    for name, value in found.items():
        _validate.is_array(f"{argument}[{name!r}]", value)
    both = [(name, found[name], leaf) for name, leaf in wanted.items() if name in found]
    wrong = [(name, a, leaf) for name, a, leaf in both if not _fits(a, leaf, cast)]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "left over": [name for name in found if name not in wanted],
        "different": [
            f"{name} is {_validate.describe(a)}, expected {_validate.describe(leaf)}"
            for name, a, leaf in wrong
        ],
    }
    if any(problems.values()):
        mend = "Parameters of another net?"
        if any(a.shape != leaf.shape == a.shape[::-1] for _, a, leaf in wrong):
            mend = f"Stored the other way round? Weights are {axes} here: pass `.T`."
        elif len(wrong) == sum(map(len, problems.values())) and all(
            a.shape == leaf.shape for _, a, leaf in wrong
        ):
            mend = "Cast it first, by `.astype`."
        raise ValueError(
            f"`{argument}` does not fit: "
            f"{'; '.join(f'{what}: {listed(v)}' for what, v in problems.items() if v)}. {mend}"
        )
    return {name: _own(a, dtype(leaf)) for name, a, leaf in both}


def _fits(a: Any, leaf: Any, cast: bool) -> bool:
    floats = all(jnp.issubdtype(each.dtype, jnp.floating) for each in (a, leaf))
    return a.shape == leaf.shape and (a.dtype == dtype(leaf) or (cast and floats))


def named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree with dotted names."""
    return [
        (keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    ]


def flat(argument: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree, all arrays, by their dotted names, all different."""
    found: dict[str, Any] = {}
    for name, leaf in named(tree):
        _validate.is_array(f"{argument}.{name}", leaf)
        if name in found:
            raise ValueError(
                f"`{argument}` has two leaves of the name {name!r}. "
                "A key of a dict with a dot in it? Rename it."
            )
        found[name] = leaf
    return found


def layers(argument: str, params: Params) -> list[Module]:
    """The layers with parameters, in the tree's order; an array anywhere else is an error."""
    found: list[Module] = []
    for place, (path, node) in enumerate(
        named(params, is_leaf=lambda p: type(p) in RANKS or (type(p) is tuple and not p))
    ):
        if type(node) is tuple:
            continue
        at = f"{argument}.{path}" if path else argument
        if type(node) not in RANKS:
            raise ValueError(
                f"`{at}` is {_validate.describe(node)} outside a dense layer, norm or embedding: "
                "other libraries have no place for it."
            )
        _check_leaves(at, node)
        kind = {Dense: "Dense", Embedding: "Embed"}.get(type(node)) or (
            "RMSNorm" if node.bias is None else "LayerNorm"
        )
        found.append(Module(path, node, kind, place))
    return found


def checked(names: Any, modules: list[Module]) -> list[str]:
    """The names that the user gave."""
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`names` must be a tuple of text, one for each layer, got {names!r}.")
    if len(names) != len(modules) or len(set(names)) != len(names):
        paths = listed([module.path for module in modules])
        raise ValueError(
            f"`names` must be {len(modules)} different ones, for the layers {paths}; "
            f"got {', '.join(names)}."
        )
    return list(names)


def dtype(leaf: Any) -> Any:
    """The dtype of a leaf inside JAX; a key has its own."""
    return jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)


def listed(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_leaves(at: str, node: Any) -> None:
    leaves = zip(node._fields, node, RANKS[type(node)], strict=True)
    for field, leaf, rank in [
        each for each in leaves if each[1] is not None or each[0] not in ("b", "bias")
    ]:
        _validate.is_float(f"{at}.{field}", leaf)
        if len(leaf.shape) != rank:
            mend = (
                "Stacked by `fnn.repeat`? Other libraries have single layers: "
                "`fnn.serial(*[layer] * n)`, whose params are "
                "`tuple(jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(n))`."
            )
            raise ValueError(
                f"`{at}.{field}` is {_validate.describe(leaf)}, "
                f"expected {rank} {'axis' if rank == 1 else 'axes'}. {mend}"
            )


def _own(a: Any, dtype: Any) -> Array:
    """A JAX array that shares no memory with another library's, which may write to it."""
    if isinstance(a, jax.Array):
        return a if a.dtype == dtype else a.astype(dtype)
    return jnp.asarray(np.array(a).astype(dtype))


def _slots(modules: list[Module], library: Library, names: Iterable[str]) -> list[Slot]:
    """A slot for every leaf, in the tree's order."""
    slots = []
    for module, name in zip(modules, names, strict=True):
        for i, (field, leaf) in enumerate(
            zip(library.fields[type(module.node)], module.node, strict=True)
        ):
            turned = library.axes == "[out, in]" and type(module.node) is Dense and i == 0
            if leaf is not None:
                slots.append(Slot(f"{name}.{field}" if name else field, leaf, turned))
    return slots


def _places(modules: list[Module]) -> list[str]:
    return [str(module.place) for module in modules]


def _counted(modules: list[Module]) -> list[str]:
    """Each kind counted by itself, as linen does."""
    kinds = [module.kind for module in modules]
    return [f"{kind}_{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)]


def in_order(argument: str, found: Iterable[str], modules: list[Module]) -> list[str]:
    """The modules as they come."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    _same_number(argument, "", names, modules)
    return names


def _by_number(argument: str, found: Iterable[str], modules: list[Module]) -> list[str]:
    """For each layer the next module of its kind by the numbers in their names.

    Flax's dicts keep no other order.
    """
    fields: dict[str, set[str]] = {}
    for name in found:
        fields.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    names = sorted(
        fields,
        key=lambda name: [
            int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))
        ],
    )
    queues = {}
    for kind in dict.fromkeys(module.kind for module in modules):
        theirs = [name for name in names if _flax_kind(fields[name]) == kind]
        _same_number(
            argument, f"{kind} ", theirs, [module for module in modules if module.kind == kind]
        )
        if len({re.sub(r"\d+", "", name) for name in theirs}) > 1:
            raise ValueError(
                f"`{argument}`: the names {listed(theirs)} do not tell their order. "
                "Pass `names`, in the order of the layers."
            )
        queues[kind] = iter(theirs)
    return [next(queues[module.kind]) for module in modules]


def _flax_kind(fields: set[str]) -> str:
    if fields & {"kernel", "embedding"}:
        return "Dense" if "kernel" in fields else "Embed"
    return "LayerNorm" if fields == {"scale", "bias"} else "RMSNorm"


def _same_number(argument: str, kind: str, names: list[str], modules: list[Module]) -> None:
    def counted(what: str, each: list[str]) -> str:
        return (
            f"{len(each)} {kind}{what}{'s' * (len(each) != 1)} "
            f"({listed([name or 'no name' for name in each]) or 'none'})"
        )

    if len(names) != len(modules):
        theirs, ours = (
            counted("module", names),
            counted("layer", [module.path for module in modules]),
        )
        raise ValueError(f"`{argument}` has {theirs}, but the net has {ours} with parameters.")


_WEIGHT_AND_BIAS = {Dense: ("weight", "bias"), Norm: ("weight", "bias"), Embedding: ("weight",)}
TORCH = EQUINOX = Library(_WEIGHT_AND_BIAS, "[out, in]", _places, in_order)
FLAX = Library(
    {Dense: ("kernel", "bias"), Norm: ("scale", "bias"), Embedding: ("embedding",)},
    "[in, out]",
    _counted,
    _by_number,
)
