"""Params in and out by flat names and by PyTorch's, and nets as programs that run without fnn.

A tree of params is also a flat dict with dotted names, `{"0.0.w": ..., "0.0.b": ..., "1.w": ...}`.
A PyTorch state dict has other names and other layouts: a weight is `[out, in, *window]` there and
`[*window, in, out]` here. Models of Flax, Equinox and Haiku need no conversion: `fnn.as_layer`.

Only arrays are carried, one layer after the other: you build the same net on the other side.

- PyTorch's `LayerNorm` has epsilon 1e-5: `fnn.layer_norm(features, epsilon=1e-5)`.
- Its `Conv2d(padding=1)` is `fnn.conv(padding=((1, 1), (1, 1)))`; "SAME" may pad one side alone.
- Images are `[batch, channels, height, width]` there and `[batch, height, width, channels]` here.
- `conv_transpose` is not supported. Its params look like those of `conv`, so no error says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from fnn import _validate
from fnn.nets.combinators import check_net
from fnn.nets.convolution import Kernel
from fnn.nets.layers import Dense, Embedding, Norm
from fnn.types import Abstract, Array, Layer, Params

Size = tuple[int, ...] | None  # of an image, (height, width) or (length,)
# The axes of the first array of a layer. More of them are layers that `repeat` has stacked.
AXES = {Dense: (2,), Norm: (1,), Embedding: (2,), Kernel: (3, 4)}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_flat(params: Params) -> dict[str, Shaped[Abstract, "..."]]:
    """The arrays of a tree by dotted names.

    Places in tuples are numbers; fields of NamedTuples and keys of dicts are names.

    Args:
        params: any tree of arrays; keys of its dicts have no dots.

    Returns:
        `{name: array}` in the tree's order. The arrays are the same objects.

    Raises:
        TypeError: a leaf is no array.

    >>> import fnn
    >>> params = fnn.mlp((3, 4, 2)).init(jax.random.key(0))
    >>> {name: leaf.shape for name, leaf in to_flat(params).items()}
    {'0.0.w': (3, 4), '0.0.b': (4,), '1.w': (4, 2), '1.b': (2,)}
    """
    flat = {_dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for name, leaf in flat.items():
        _validate.is_array(f"params.{name}", leaf)
    return flat


def from_flat(flat: Mapping[str, Shaped[Abstract, "..."]], like: Params) -> Params:
    """The tree that `to_flat` was given.

    Args:
        flat: `{name: array}`, in any order.
        like: a tree of the same names, shapes and dtypes; `jax.ShapeDtypeStruct`s will do.

    Returns:
        A tree like `like`.

    Raises:
        TypeError, ValueError: `flat` is no dict of arrays, or its names, shapes or dtypes are not
            those of `like`.

    >>> import fnn
    >>> net = fnn.mlp((3, 4, 2))
    >>> params = net.init(jax.random.key(0))
    >>> like = jax.eval_shape(net.init, jax.random.key(0))
    >>> from_flat(to_flat(params), like)[1].w is params[1].w
    True
    """
    found = _arrays("flat", flat)
    wanted = to_flat(like)
    _check_fit("flat", found, wanted)
    leaves = [_own(found[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def to_torch_state_dict(
    params: Params,
    names: Sequence[str] | None = None,
    *,
    flattened: Size = None,
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """A PyTorch state dict of NumPy arrays.

    `module.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})`.

    Args:
        params: of a net of `dense`, `conv`, `layer_norm`, `rms_norm` and `embedding`; layers that
            `repeat` has stacked are made single ones first.
        names: a module for each layer with params, in the tree's order, `("fc1", "fc2")`. If None,
            the places in a `torch.nn.Sequential` with a module for each layer here, activations
            included: "0", "2", "4", ... for `fnn.mlp`.
        flattened: the size of the images that `flatten` makes rows of, `(height, width)` or
            `(length,)`, for a net with a `dense` behind it. PyTorch's rows have channels first.

    Returns:
        `{"0.weight": [out, in], "0.bias": [out], ...}`: copies, C-contiguous, in the dtypes of
        `params`. bfloat16 becomes float32, since `torch.from_numpy` does not take it.

    Raises:
        ValueError: an array belongs to no such layer or is stacked, `names` are not one for each
            layer, or `flattened` does not fit.

    >>> import fnn
    >>> params = fnn.mlp((3, 4, 2)).init(jax.random.key(0))
    >>> {name: a.shape for name, a in to_torch_state_dict(params).items()}
    {'0.weight': (4, 3), '0.bias': (4,), '2.weight': (2, 4), '2.bias': (2,)}
    """
    layers = _layers("params", params)
    state_dict = {}
    for entry in _entries(layers, list(layers) if names is None else names, flattened):
        array = np.array(entry.to_torch(entry.leaf), order="C")
        if array.dtype == jnp.bfloat16:
            array = array.astype(np.float32)
        state_dict[entry.name] = array
    return state_dict


def load_torch_state_dict(
    state_dict: Mapping[str, Any],
    like: Params,
    names: Sequence[str] | None = None,
    *,
    flattened: Size = None,
) -> Params:
    """Params from a PyTorch state dict.

    Args:
        state_dict: `{"name.weight": [out, in], "name.bias": [out], ...}` of tensors or arrays.
        like: the params to fill, or `jax.ShapeDtypeStruct`s like them.
        names: the module of each layer, in the tree's order. If None, the modules in the order of
            `state_dict`, in which PyTorch registered them.
        flattened: as for `to_torch_state_dict`.

    Returns:
        A tree like `like`, in its dtypes; copies.

    Raises:
        TypeError, ValueError: as `to_torch_state_dict`, or the names, shapes or dtypes of
            `state_dict` are not those of `like`. Any dtype of floats goes into any other.

    >>> state_dict = {"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)}
    >>> like = Dense(w=jnp.zeros((3, 2)), b=jnp.zeros(2))
    >>> load_torch_state_dict(state_dict, like).w.shape
    (3, 2)
    """
    found = _arrays("state_dict", state_dict)
    if names is None:
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    entries = _entries(_layers("like", like), names, flattened)
    wanted = {e.name: jax.eval_shape(e.to_torch, e.leaf) for e in entries}
    for name in wanted.keys() & found.keys():
        if jnp.issubdtype(found[name].dtype, jnp.floating):
            found[name] = found[name].astype(wanted[name].dtype)
    _check_fit("state_dict", found, wanted)
    leaves = [_own(entry.from_torch(found[entry.name])) for entry in entries]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def export(
    net: Layer,
    params: Params,
    x: Shaped[Abstract, "batch ..."],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> jax.export.Exported:
    """`net.apply` as a program that runs without fnn.

    It runs on any of the platforms, for any batch size and any params of these shapes.

        blob = export(net, params, x).serialize()           # bytes; needs the package flatbuffers
        serve = jax.jit(jax.export.deserialize(blob).call)  # elsewhere: jax alone
        y = serve(flat, x)                                  # flat = to_flat(params)

    Args:
        net: any layer.
        params: arrays or `jax.ShapeDtypeStruct`s; only names, shapes and dtypes matter.
        x: `[batch, ...]`, an array or a `jax.ShapeDtypeStruct`; its first axis may have any length.
        platforms: out of "cpu", "cuda", "rocm", "tpu"; this machine needs none of them.

    Returns:
        The program `(flat, x [batch, ...]) -> y [batch, ...]`. It takes the params as the dict of
        `to_flat`, which needs no class of fnn: one program serves every file of new params.

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
        raise ValueError("`x` must be [batch, ...], got a single number. Pass `x[None]`.")
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(
            f"`platforms` must be a tuple out of {PLATFORMS}, got {platforms!r}. "
            "A GPU is 'cuda' or 'rocm'."
        )
    like = jax.eval_shape(lambda params: params, params)

    def apply(flat: dict[str, Array], x: Array) -> Array:
        return net.apply(from_flat(flat, like), x)

    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    return jax.export.export(jax.jit(apply), platforms=list(platforms))(to_flat(like), x)


class _Entry(NamedTuple):
    """An array and its name in PyTorch."""

    name: str
    leaf: Any
    window: Sequence[int] | None  # of a weight that is [*window, in, out]; None for other arrays

    def to_torch(self, array: Any) -> Any:
        """The array in PyTorch's layout, [out, in, *window]."""
        if self.window is None:
            return array
        outputs = array.shape[-1]
        axes = len(self.window)
        array = array.reshape(*self.window, -1, outputs)
        array = array.transpose(axes + 1, axes, *range(axes))
        return array if self.leaf.ndim > 2 else array.reshape(outputs, -1)

    def from_torch(self, array: Any) -> Any:
        """An array in PyTorch's layout as the net has it."""
        if self.window is None:
            return array
        array = array.reshape(array.shape[0], -1, *self.window)
        array = array.transpose(*range(2, array.ndim), 1, 0)
        return array.reshape(self.leaf.shape)


def _layers(argument: str, params: Params) -> dict[str, tuple[str, Any]]:
    """`{place: (path, node)}` of the layers with params; places count all layers."""

    def is_layer(node: Any) -> bool:
        return type(node) in AXES or (type(node) is tuple and not node)

    layers = {}
    for place, (path, node) in enumerate(jax.tree.leaves_with_path(params, is_leaf=is_layer)):
        if type(node) is tuple:
            continue
        name = f"{argument}.{_dotted(path)}".removesuffix(".")
        if type(node) not in AXES or len(node[0].shape) not in AXES[type(node)]:
            shapes = jax.tree.map(np.shape, node)
            raise ValueError(
                f"`{name}` has shape {shapes}, which is no single dense layer, "
                "convolution, norm or embedding. Stacked by `fnn.repeat`? Take it apart: "
                "`tuple(jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(n))`."
            )
        layers[str(place)] = name, node
    return layers


def _entries(
    layers: dict[str, tuple[str, Any]], names: Sequence[str], flattened: Size
) -> list[_Entry]:
    """Every array of the layers, in the tree's order."""
    if isinstance(names, str) or len(set(names)) != len(layers) or len(names) != len(layers):
        paths = [path for path, _ in layers.values()]
        raise ValueError(
            f"PyTorch's modules must be {len(layers)}, one for each of the layers with params "
            f"{paths}, got {names!r}. A batch norm? Fold it into the layer before it."
        )
    entries = []
    channels = None  # of a convolution that no dense layer has followed yet
    for name, (path, node) in zip(names, layers.values(), strict=True):
        window = None
        if isinstance(node, Kernel):
            *window, _, channels = node.w.shape
        if isinstance(node, Dense):
            window = _window(path, node.w.shape[0], channels, flattened)
            channels = None
        fields = zip(("weight", "bias"), node, (window, None), strict=False)
        for field, leaf, sizes in fields:
            if leaf is not None:
                entries.append(_Entry(f"{name}.{field}".removeprefix("."), leaf, sizes))
    return entries


def _window(path: str, inputs: int, channels: int | None, flattened: Size) -> Sequence[int]:
    """The size of the images that a dense layer takes as rows; () if it takes no images."""
    if channels is None or inputs == channels:
        return ()
    if flattened is None or math.prod(flattened) * channels != inputs:
        raise ValueError(
            f"`{path}` takes {inputs} numbers after a convolution with {channels} channels. "
            "PyTorch flattens images channels first: pass their size, "
            f"`flattened=(height, width)`; got {flattened}."
        )
    return flattened


def _check_fit(argument: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises unless both have the same names, shapes and dtypes."""
    problems = [f"{name} is left over" for name in found if name not in wanted]
    for name, leaf in wanted.items():
        expected = _validate.describe(leaf)
        came = _validate.describe(found[name]) if name in found else "missing"
        if came != expected:
            problems.append(f"{name} is {came}, expected {expected}")
    if problems:
        more = f"; {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"`{argument}` does not fit: {'; '.join(problems[:8])}{more}. "
            "Of another net? Of another dtype? Cast it. Stored the other way round? Pass the `.T`."
        )


def _arrays(argument: str, value: Any) -> dict[str, Any]:
    """A dict of arrays, with PyTorch's tensors as NumPy arrays."""
    if not isinstance(value, Mapping):
        mend = " A module? Pass `module.state_dict()`." if hasattr(value, "state_dict") else ""
        raise TypeError(
            f"`{argument}` must be a dict of names and arrays, got {type(value).__name__}.{mend}"
        )
    arrays = {}
    for name, array in value.items():
        if hasattr(array, "detach"):
            array = array.detach().cpu()
            if "bfloat16" in str(array.dtype):  # NumPy has none
                array = array.float()
            array = array.numpy()
        _validate.is_array(f"{argument}[{name!r}]", array)
        arrays[name] = array
    return arrays


def _own(array: Any) -> Array:
    """A JAX array that shares no memory with another library, which may write to it."""
    return array if isinstance(array, jax.Array) else jnp.array(array)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
