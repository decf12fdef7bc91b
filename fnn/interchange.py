"""Parameters in and out of other libraries, and whole nets as programs that run without this one.

Every tree of parameters is also a flat dict with dotted names, `{"0.0.w": ..., "0.0.b": ..., "1.w":
...}`. PyTorch, Flax and Equinox have other names, and all but Flax store a dense layer's weight as
`[out, in]`; the tables are in `fnn._layouts`. None of them is imported.

Only arrays are carried, one layer after the other: to build a net of the same layers is up to you.
Mind the epsilon of norms: Flax's is 1e-6, as here; PyTorch's and Equinox's `LayerNorm` have 1e-5
(`fnn.layer_norm(features, epsilon=1e-5)`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np

from fnn import _layouts, _validate
from fnn._layouts import EQUINOX, FLAX, TORCH, fitted, named, read, write
from fnn.nets.combinators import check_net
from fnn.types import Array, Layer, Params

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_flat(params: Params) -> dict[str, Any]:
    """The leaves by dotted names.

    Places in tuples are numbers, fields of NamedTuples and keys of dicts are names.

    Args:
        params: any tree of arrays.

    Returns:
        `{name: leaf}` in the tree's order; the leaves are the same arrays.

    Raises:
        TypeError: a leaf is no array. ValueError: two leaves have one name (a key of a dict has a
            dot).

    >>> import fnn
    >>> params = fnn.mlp((3, 4, 2)).init(jax.random.key(0))
    >>> {name: leaf.shape for name, leaf in to_flat(params).items()}
    {'0.0.w': (3, 4), '0.0.b': (4,), '1.w': (4, 2), '1.b': (2,)}
    """
    return _layouts.flat("params", params)


def from_flat(flat: Mapping[str, Any], like: Params) -> Params:
    """The tree that `to_flat` was given.

    Args:
        flat: `{name: array}`, in any order.
        like: a tree of the same names, shapes and dtypes; its leaves may be
            `jax.ShapeDtypeStruct`s.

    Returns:
        A tree like `like`.

    Raises:
        TypeError, ValueError: `flat` is no dict of arrays; names are missing or left over, or
            shapes or dtypes differ: all are listed.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> params = net.init(jax.random.key(0))
    >>> like = jax.eval_shape(net.init, jax.random.key(0))
    >>> from_flat(to_flat(params), like)[1].w is params[1].w
    True
    """
    found = fitted("flat", _mapping("flat", flat), _layouts.flat("like", like), cast=False)
    return jax.tree.unflatten(jax.tree.structure(like), list(found.values()))


def to_torch_state_dict(
    params: Params, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """A PyTorch state dict of NumPy arrays.

    `module.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})`.

    Args:
        params: of a net of `dense`, `layer_norm`, `rms_norm` and `embedding`; layers that `repeat`
            stacked must be made single ones first.
        names: one for each layer with parameters, in the tree's order, `("fc1", "fc2")`. If None,
            the places in a `torch.nn.Sequential` that has a module for each layer here, activations
            included: "0", "2", "4", ... for `fnn.mlp`.

    Returns:
        `{"0.weight": [out, in], "0.bias": [out], ...}`: copies, C-contiguous, in the dtypes of
        `params`; bfloat16, which `torch.from_numpy` does not take, as float32, which holds the same
        numbers.

    Raises:
        TypeError, ValueError: a leaf belongs to no such layer or is stacked (it is named), or
            `names` are not as many as the layers.

    >>> import fnn
    >>> params = fnn.mlp((3, 4, 2)).init(jax.random.key(0))
    >>> {name: a.shape for name, a in to_torch_state_dict(params).items()}
    {'0.weight': (4, 3), '0.bias': (4,), '2.weight': (2, 4), '2.bias': (2,)}
    """
    arrays = {
        name: np.array(leaf, order="C")
        for name, leaf in write("params", params, TORCH, names).items()
    }
    # "V": not NumPy's own
    return {name: a.astype(np.float32) if a.dtype.kind == "V" else a for name, a in arrays.items()}


def load_torch_state_dict(
    state_dict: Mapping[str, Any], like: Params, names: Sequence[str] | None = None
) -> Params:
    """Params from a PyTorch state dict.

    Args:
        state_dict: `{"name.weight": [out, in], "name.bias": [out], ...}` of tensors or arrays.
        like: the params to fill, or `jax.ShapeDtypeStruct`s like them.
        names: the module of each layer, in the tree's order; if None, the modules as they come in
            `state_dict`, which is the order in which they were registered.

    Returns:
        A tree like `like`, in its dtypes; copies.

    Raises:
        TypeError, ValueError: entries are missing or left over (all are named), a shape differs, or
            `like` has a leaf of no known layer.

    >>> import jax.numpy as jnp
    >>> from fnn.nets.layers import Dense
    >>> state_dict = {"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)}
    >>> load_torch_state_dict(state_dict, like=Dense(w=jnp.zeros((3, 2)), b=jnp.zeros(2))).w.shape
    (3, 2)
    """
    found = {name: _numpy(value) for name, value in _mapping("state_dict", state_dict).items()}
    return read("state_dict", found, like, TORCH, names)


def to_flax(params: Params, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The variables of a Flax linen module.

    For nnx: `nnx.replace_by_pure_dict(state, to_flax(params, names)["params"])`, then
    `nnx.update(model, state)`.

    Args:
        params: as for `to_torch_state_dict`.
        names: one for each layer with parameters, in the tree's order; dots nest,
            `("encoder.Dense_0", "layers.2")`. If None, those that linen gives: "Dense_0",
            "Dense_1", ..., "LayerNorm_0", "RMSNorm_0", "Embed_0", each kind counted by itself.

    Returns:
        `{"params": {"Dense_0": {"kernel": [in, out], "bias": [out]}, "LayerNorm_0": {"scale": ...,
        "bias": ...}, ...}}`.

    Raises:
        TypeError, ValueError: as `to_torch_state_dict`.

    >>> import jax.numpy as jnp
    >>> from fnn.nets.layers import Dense
    >>> to_flax(Dense(w=jnp.ones((3, 2)), b=None))["params"]["Dense_0"]["kernel"].shape
    (3, 2)
    """
    variables: dict[str, Any] = {"params": {}}
    for name, leaf in write("params", params, FLAX, names).items():
        *path, field = name.split(".")
        inner = variables["params"]
        for part in path:
            inner = inner.setdefault(part, {})
        inner[field] = leaf
    return variables


def from_flax(variables: Any, like: Params, names: Sequence[str] | None = None) -> Params:
    """Params from the variables of a Flax linen module.

    It takes the state of an nnx module too: `nnx.state(model, nnx.Param)`.

    Args:
        variables: `{"params": {"Dense_0": {"kernel": [in, out], "bias": [out]}, ...}}`, or what is
            in "params"; nested at will.
        like: the params to fill, or `jax.ShapeDtypeStruct`s like them.
        names: the module of each layer, in the tree's order, as in `to_flax`. If None, the modules
            of each kind in the order of the numbers in their names, Dense_10 after Dense_2; the
            rest of their names must then be the same, for Flax keeps no other order.

    Returns:
        A tree like `like`, in its dtypes.

    Raises:
        TypeError, ValueError: as `load_torch_state_dict`, or the names tell no order.

    >>> import jax.numpy as jnp
    >>> from fnn.nets.layers import Dense
    >>> params = Dense(w=jnp.ones((3, 2)), b=jnp.zeros(2))
    >>> from_flax(to_flax(params), like=params).w.shape
    (3, 2)
    """
    found = {
        name.removeprefix("params.").removesuffix(".value"): leaf
        for name, leaf in _layouts.flat("variables", variables).items()
    }
    return read("variables", found, like, FLAX, names)


def to_equinox(params: Params, model: Any, names: Sequence[str] | None = None) -> Any:
    """An Equinox model with other parameters.

    Args:
        params: as for `to_torch_state_dict`.
        model: an `eqx.nn.MLP`, or any module of `Linear`, `LayerNorm`, `RMSNorm` and `Embedding`.
        names: as for `from_equinox`.

    Returns:
        The model with the params in the place of its arrays, in its dtypes; nothing else is
        changed.

    Raises:
        TypeError, ValueError: as `load_torch_state_dict`.

    >>> from fnn.nets.layers import Dense
    >>> # in the place of an eqx.nn.Linear(3, 2)
    >>> model = {"bias": np.zeros(2), "weight": np.zeros((2, 3))}
    >>> to_equinox(Dense(w=np.ones((3, 2)), b=np.ones(2)), model)["weight"].shape
    (2, 3)
    """
    arrays = _arrays(model)
    names = (
        _layouts.in_order("model", arrays, _layouts.layers("params", params))
        if names is None
        else names
    )
    found = fitted("params", write("params", params, EQUINOX, names), arrays, axes=EQUINOX.axes)
    return jax.tree.unflatten(
        jax.tree.structure(model), [found.get(name, leaf) for name, leaf in named(model)]
    )


def from_equinox(model: Any, like: Params, names: Sequence[str] | None = None) -> Params:
    """Params from an Equinox model.

    Args:
        model: an `eqx.nn.MLP`, or any module of `Linear`, `LayerNorm`, `RMSNorm` and `Embedding`.
        like: the params to fill, or `jax.ShapeDtypeStruct`s like them.
        names: the module of each layer, in the tree's order, `("layers.0", "layers.1")`; if None,
            the modules in the order of the model's fields.

    Returns:
        A tree like `like`, in its dtypes.

    Raises:
        TypeError, ValueError: as `load_torch_state_dict`.

    >>> from fnn.nets.layers import Dense
    >>> # in the place of an eqx.nn.Linear(3, 2)
    >>> model = {"bias": np.zeros(2), "weight": np.zeros((2, 3))}
    >>> from_equinox(model, like=Dense(w=np.ones((3, 2)), b=np.ones(2))).w.shape
    (3, 2)
    """
    return read("model", _arrays(model), like, EQUINOX, names)


def export(
    net: Layer, params: Params, x: Any, *, platforms: Sequence[str] = ("cpu", "cuda", "tpu")
) -> jax.export.Exported:
    """`net.apply` as a program that runs without fnn.

    It runs on any of the platforms, for any batch size and any params of these shapes.

        blob = export(net, params, x).serialize()           # bytes; needs the package flatbuffers
        serve = jax.jit(jax.export.deserialize(blob).call)  # elsewhere: jax alone
        y = serve(flat, x)                                  # flat = to_flat(params)

    Args:
        net: any layer.
        params: arrays or `jax.ShapeDtypeStruct`s; only their names, shapes and dtypes matter.
        x: `[batch, ...]`, an array or a `jax.ShapeDtypeStruct`; of its shape all but the first axis
            matters.
        platforms: out of "cpu", "cuda", "rocm", "tpu"; none of them need be here.

    Returns:
        The program `(flat, x [batch, ...]) -> y [batch, ...]`. It takes the params as the dict that
        `to_flat` gives: a file of new params is served by the same program, and a dict needs no
        class of fnn's.

    Raises:
        TypeError, ValueError: `net` is no layer, `x` has no batch axis or does not fit, or a
            platform is unknown.

    Source: https://docs.jax.dev/en/latest/export/export.html (how long a program stays readable:
    its section on compatibility).

    >>> import fnn
    >>> net, x = fnn.mlp((3, 4, 2)), np.ones((5, 3), np.float32)
    >>> params = net.init(jax.random.key(0))
    >>> export(net, params, x).call(to_flat(params), x).shape
    (5, 2)
    """
    check_net(net)
    _validate.is_array("x", x)
    if not x.shape:
        raise ValueError(
            "`x` must be [batch, ...], got a single number. "
            "One example? Give it a batch axis: `x[None]`."
        )
    if (
        not isinstance(platforms, (tuple, list))
        or not platforms
        or not set(platforms) <= set(PLATFORMS)
    ):
        raise ValueError(
            f"`platforms` must be a tuple out of {PLATFORMS}, got {platforms!r}. "
            "A GPU is 'cuda' or 'rocm'."
        )
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in to_flat(params).items()
    }
    structure = jax.tree.structure(params)

    def apply(flat: dict[str, Array], x: Array) -> Array:
        return net.apply(jax.tree.unflatten(structure, [flat[name] for name in like]), x)

    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    return jax.export.export(jax.jit(apply), platforms=tuple(platforms))(like, x)


def _mapping(argument: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        mend = " A module? Pass `module.state_dict()`." if hasattr(value, "state_dict") else ""
        raise TypeError(
            f"`{argument}` must be a dict of names and arrays, got {type(value).__name__}.{mend}"
        )
    return value


def _numpy(value: Any) -> Any:
    """A PyTorch tensor as a NumPy array, and anything else as it is.

    NumPy has no bfloat16, so it makes float32 of that.
    """
    if not hasattr(value, "detach"):
        return value
    value = value.detach().cpu()
    return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()


def _arrays(model: Any) -> dict[str, Any]:
    """The arrays of an Equinox model by dotted names, without its functions and numbers."""
    return {name: leaf for name, leaf in named(model) if hasattr(leaf, "dtype")}
