"""Convolution and pooling over one or two axes of space, and `flatten`.

An image is `[batch, *space, channels]`, channels last as in Flax; `space` is `(length,)` or
`(height, width)`. A window slides over the axes of space. Backward passes are written by hand: a
convolution carries `dz` to `dx` by the transposed convolution, a pool gives it back to the numbers
of each window.

Source: Dumoulin, Visin (2016), arXiv:1603.07285, for the arithmetic of sizes and paddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import he_normal, zeros
from jaxtyping import Float

from fnn import _validate
from fnn.factors import Conv, PerExample, Window, total, widen
from fnn.factors.base import sum_leaves
from fnn.nets.layers import Initializer, as_rows, check_params, draw_param, sum_positions
from fnn.types import Array, Layer, by_recipe, storable

Padding = Literal["SAME", "VALID"] | tuple[tuple[int, int], ...]


@storable
class Kernel(NamedTuple):
    """Parameters of `conv`, or their gradients."""

    w: Any  # [*window, in / groups, out]
    b: Any  # [out]; None without a bias


@by_recipe
def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...],
    *,
    strides: int | tuple[int, ...] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer[Kernel]:
    """Convolution, `z[p] = b + sum over offsets o of x[p * strides + o * dilation] @ w[o]`.

    It is `flax.linen.Conv`: the kernel is not flipped.

    Args:
        in_channels: channels of `x`, at least 1.
        out_channels: channels of the output, at least 1.
        kernel_size: of the window, `(width,)` or `(height, width)`; its length is the number of
            axes of space.
        strides: steps of the window, one number or one for each axis of space.
        padding: zeros around `x`. "SAME" gives an output of size `ceil(size / stride)`, "VALID"
            pads nothing; or `((before, after), ...)` for each axis of space.
        dilation: steps between the numbers of the window, one number or one for each axis.
        groups: of channels: output channels of a group see its input channels only. Both numbers
            of channels are multiples of it. `groups=in_channels` is a depthwise convolution.
        kernel_init: `(key, (*kernel_size, in_channels / groups, out_channels)) -> w`.
        bias_init: `(key, (out_channels,)) -> b`; None for a layer without a bias.

    Returns:
        A layer from `[batch, *space, in_channels]` to `[batch, *space, out_channels]` with
        `params = Kernel(w=[*kernel_size, in_channels / groups, out_channels], b=[out_channels])`.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, `x` or `params` do not fit.

    Source: LeCun et al. (1989), "Backpropagation applied to handwritten zip code recognition".

    >>> layer = conv(1, 8, (3, 3), strides=2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 28, 28, 1))).shape
    (5, 14, 14, 8)
    """
    _validate.positive("in_channels", in_channels, whole=True)
    _validate.positive("out_channels", out_channels, whole=True)
    slides = _window("kernel_size", kernel_size, strides, padding, dilation)
    _check_groups(groups, in_channels, out_channels)
    _validate.is_function("kernel_init", kernel_init, "(key, shape) -> array")
    if bias_init is not None:
        _validate.is_function("bias_init", bias_init, "(key, shape) -> array, or None")
    name = f"conv({in_channels}, {out_channels}, {slides.sizes})"
    w_shape = *slides.sizes, in_channels // groups, out_channels
    shapes = Kernel(w_shape, None if bias_init is None else (out_channels,))

    def init(key):
        _validate.is_key("key", key)
        w_key, b_key = jax.random.split(key)
        w = draw_param("kernel_init", kernel_init, w_key, shapes.w)
        return Kernel(w, draw_param("bias_init", bias_init, b_key, shapes.b))

    def forward(params, x):
        x = _check_image(name, x, slides, in_channels)
        check_params(name, shapes, params)
        _validate.same_dtype("x", x, "w", params.w)
        z = _convolve(slides, groups, params.w, x)
        if params.b is not None:
            z = z + as_rows(params.b, z)
        return z, x

    def backward(params, x, dz, reduce=total):
        # dw is the convolution of x with dz, dx the transposed convolution of dz with w
        space = x.shape[1:-1]
        bias = PerExample(sum_positions(dz))
        window = _kernel_window(slides, groups, space, dz.shape[1:-1])
        weight = Conv(x[:, None], dz[:, None], window)
        b = None if params.b is None else reduce(bias)
        return Kernel(reduce(weight), b), _transpose(slides, groups, params.w, dz, space)

    return Layer(name, init, forward, backward)


@by_recipe
def max_pool(
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
) -> Layer[tuple[()]]:
    """The largest number of every window, channel by channel.

    The gradient goes to the first of the largest numbers in a window, as in `jax.grad`. A window
    with NaN gives NaN, and its gradient goes to one of its numbers.

    Args:
        window: its size, `(width,)` or `(height, width)`.
        strides: steps of the window, one number or one for each axis of space. None: those of its
            size, so that windows do not overlap. (Flax's None is 1.)
        padding: as for `conv`; what is padded is never the largest. Pairs are smaller than the
            window.

    Returns:
        A layer from `[batch, *space, channels]` to `[batch, *space, channels]`, `params = ()`.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, `x` does not fit.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> max_pool((2, 2)).apply((), x).reshape(2, 2)
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    slides = _pool_window(window, strides, padding)
    name = f"max_pool({slides.sizes})"

    def forward(params, x):
        _no_weights(name, params)
        y = x = _check_image(name, x, slides)
        firsts = []
        for axis in reversed(slides.axes(x)):  # a row after the other, then the rows
            parts = _parts(y, axis, -jnp.inf)
            y, first = _first_max(parts)
            firsts.append(first)
        return y, (x, firsts)

    def backward(params, residuals, dy, reduce=total):
        x, firsts = residuals
        dx = widen(dy)
        for axis, first in zip(slides.axes(x), reversed(firsts), strict=True):
            parts = [jnp.where(first == i, dx, 0) for i in range(axis.window)]
            dx = _put_back(parts, axis)
        return (), dx.astype(dy.dtype)

    return Layer(name, _no_params, forward, backward)


@by_recipe
def mean_pool(
    window: tuple[int, ...],
    strides: int | tuple[int, ...] | None = None,
    padding: Padding = "VALID",
) -> Layer[tuple[()]]:
    """The mean of every window, channel by channel.

    Padding counts as zeros, as in Flax's `avg_pool`: a sum is divided by the size of the window.

    Args:
        window: its size, `(width,)` or `(height, width)`.
        strides: as for `max_pool`.
        padding: as for `conv`.

    Returns:
        A layer from `[batch, *space, channels]` to `[batch, *space, channels]`, `params = ()`.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, `x` does not fit.

    >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    >>> mean_pool((2, 2)).apply((), x).reshape(2, 2)
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    slides = _pool_window(window, strides, padding)
    name = f"mean_pool({slides.sizes})"
    count = math.prod(slides.sizes)

    def forward(params, x):
        _no_weights(name, params)
        x = _check_image(name, x, slides)
        y = widen(x)
        for axis in slides.axes(x):
            y = sum_leaves(_parts(y, axis, 0))
        return (y / count).astype(x.dtype), x

    def backward(params, x, dy, reduce=total):
        dx = widen(dy) / count
        for axis in reversed(slides.axes(x)):
            dx = _put_back([dx] * axis.window, axis)
        return (), dx.astype(dy.dtype)

    return Layer(name, _no_params, forward, backward)


@by_recipe
def flatten() -> Layer[tuple[()]]:
    """All numbers of an example in a row: what comes between `conv` and `dense`.

    Returns:
        A layer from `[batch, ...]` to `[batch, numbers]`, the last axis fastest, `params = ()`.

    Raises:
        TypeError, ValueError: at the call, `x` does not fit.

    >>> flatten().apply((), jnp.ones((5, 7, 7, 32))).shape
    (5, 1568)
    """
    name = "flatten"

    def forward(params, x):
        _no_weights(name, params)
        _validate.is_float("x", x)
        x = jnp.asarray(x)
        if x.ndim < 2:
            mend = "One example? Pass `x[None]`."
            raise ValueError(f"{name}: `x` has shape {x.shape}, expected [batch, ...]. {mend}")
        return lax.collapse(x, 1), x

    def backward(params, x, dy, reduce=total):
        return (), dy.reshape(x.shape)

    return Layer(name, _no_params, forward, backward)


class Along(NamedTuple):
    """How a window slides along one axis of an array."""

    axis: int
    length: int  # of the axis
    window: int
    stride: int
    before: int  # padding
    after: int

    @property
    def positions(self) -> int:
        """How many windows there are."""
        return (self.before + self.length + self.after - self.window) // self.stride + 1


@dataclass(frozen=True)
class Slides:
    """How a window slides over the axes of space; every field has a number for each axis."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """From the first number of a window to its last, gaps included."""
        pairs = zip(self.sizes, self.dilation, strict=True)
        return tuple((size - 1) * step + 1 for size, step in pairs)

    def pads(self, space: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros before and after every axis of an image of this size."""
        if not isinstance(self.padding, str):
            return self.padding
        return tuple(lax.padtype_to_pads(space, self.spans, self.strides, self.padding))

    def axes(self, x: Float[Array, "batch *space channels"]) -> list[Along]:
        """The axes of space of an image, with the window along each."""
        space = x.shape[1:-1]
        columns = space, self.spans, self.strides, self.pads(space)
        found = []
        for i, (length, span, stride, (before, after)) in enumerate(zip(*columns, strict=True), 1):
            found.append(Along(i, length, span, stride, before, after))
        return found


def _convolve(slides, groups, w, x):
    """The sum of products at every position of the window."""
    axes = len(slides.sizes)
    return lax.conv_general_dilated(
        x,
        w,
        slides.strides,
        slides.pads(x.shape[1:-1]),
        rhs_dilation=slides.dilation,
        dimension_numbers=_numbers(axes),
        feature_group_count=groups,
    )


def _transpose(slides, groups, w, dz, space):
    """The transposed convolution: a number of `dz` goes back to all that its window has seen.

    It is the convolution of `dz`, with strides as gaps, with the kernel turned round. The padding
    is what makes position p of `x` meet `dz[q]` at the offset o, where p + before = q * stride + o.
    """
    axes = len(slides.sizes)
    *sizes, inputs, outputs = w.shape
    w = jnp.flip(w, range(axes))
    w = w.reshape(*sizes, inputs, groups, outputs // groups)
    w = w.swapaxes(-3, -1).reshape(*sizes, outputs // groups, groups * inputs)
    pads = []
    columns = space, dz.shape[1:-1], slides.spans, slides.strides, slides.pads(space)
    for length, positions, span, stride, (before, _) in zip(*columns, strict=True):
        first = span - 1 - before
        last = length + before - (positions - 1) * stride - 1
        pads.append((first, last))
    return lax.conv_general_dilated(
        dz,
        w,
        (1,) * axes,
        pads,
        lhs_dilation=slides.strides,
        rhs_dilation=slides.dilation,
        dimension_numbers=_numbers(axes),
        feature_group_count=groups,
    )


def _kernel_window(slides, groups, space, positions):
    """How the gradient of the kernel is a convolution of `x` with `dz`.

    Strides and dilation change places: the positions of `dz` lie strides apart, and the offsets of
    the window are the outputs.
    """
    axes = len(slides.sizes)
    pads = []
    columns = space, positions, slides.spans, slides.strides, slides.pads(space)
    for length, count, span, stride, (before, _) in zip(*columns, strict=True):
        read = (count - 1) * stride + span
        pads.append((before, read - before - length))
    images = axes + 1, 0, *range(1, axes + 1)
    kernel = axes, axes + 1, *range(axes)
    ones = (1,) * axes
    return Window(
        slides.dilation, tuple(pads), ones, slides.strides, (images, images, kernel), groups
    )


def _numbers(axes):
    """The axes of images, kernel and outputs, channels last."""
    images = 0, axes + 1, *range(1, axes + 1)
    kernel = axes + 1, axes, *range(axes)
    return lax.ConvDimensionNumbers(images, kernel, images)


def _parts(x, along, fill):
    """The numbers at every offset of a window along an axis, `[..., positions, ...]` each."""
    pads = [(0, 0, 0)] * x.ndim
    pads[along.axis] = (along.before, along.after, 0)
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), pads)
    extent = (along.positions - 1) * along.stride + 1
    parts = []
    for offset in range(along.window):
        part = lax.slice_in_dim(padded, offset, offset + extent, along.stride, along.axis)
        parts.append(part)
    return parts


def _put_back(parts, along):
    """What undoes `_parts`: every number goes back to where it was, and what meets is added."""
    extent = (along.positions - 1) * along.stride + 1
    spread = []
    for offset, part in enumerate(parts):
        first = offset - along.before
        pads = [(0, 0, 0)] * part.ndim
        pads[along.axis] = (first, along.length - first - extent, along.stride - 1)
        spread.append(lax.pad(part, jnp.zeros((), part.dtype), pads))
    return sum_leaves(spread)


def _first_max(parts):
    """The largest of arrays, and the place of the first that is the largest."""
    largest = parts[0]
    first = jnp.zeros(largest.shape, jnp.int32)
    for i, part in enumerate(parts[1:], 1):
        first = jnp.where(part > largest, i, first)
        largest = jnp.maximum(largest, part)
    return largest, first


def _no_params(key):
    return ()


def _no_weights(name, params):
    """Raises unless `params` is `()`."""
    if jax.tree.leaves(params):
        came = type(params).__name__
        raise ValueError(
            f"{name} has no parameters: its params are `()`, got {came}. Params of another net?"
        )


def _window(name, sizes, strides, padding, dilation):
    """The arguments of a window, checked."""
    if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 2:
        raise ValueError(
            f"`{name}` must be a tuple with a number for each axis of space, (width,) or (height, "
            f"width), got {sizes!r}."
        )
    axes = len(sizes)
    sizes = _for_axes(name, sizes, axes)
    strides = _for_axes("strides", strides, axes)
    dilation = _for_axes("dilation", dilation, axes)
    return Slides(sizes, strides, _check_padding(padding, axes), dilation)


def _pool_window(window, strides, padding):
    """The arguments of a pool, checked."""
    slides = _window("window", window, window if strides is None else strides, padding, 1)
    if not isinstance(slides.padding, str):
        for size, pair in zip(slides.sizes, slides.padding, strict=True):
            if max(pair) >= size:
                raise ValueError(
                    f"`padding` must be smaller than `window` {slides.sizes}, so that no window "
                    f"holds padding alone, got {padding!r}."
                )
    return slides


def _for_axes(name, value, axes):
    """A whole number above 0 for each axis, from one or several."""
    values = value if isinstance(value, tuple) else (value,) * axes
    if len(values) != axes:
        raise ValueError(
            f"`{name}` must be one whole number, or a tuple of {axes}, one for each axis of space, "
            f"got {value!r}."
        )
    for i, number in enumerate(values):
        _validate.positive(f"{name}[{i}]", number, whole=True)
    return tuple(map(int, values))


def _check_padding(padding, axes):
    """The padding, checked: a name, or a pair for each axis of space."""
    if isinstance(padding, str):
        _validate.one_of("padding", padding, ("SAME", "VALID"))
        return padding
    if not isinstance(padding, tuple) or len(padding) != axes or not all(map(_is_pair, padding)):
        raise ValueError(
            f'`padding` must be "SAME", "VALID" or a tuple of {axes} pairs of whole numbers, at '
            f"least 0, one pair (before, after) for each axis of space, got {padding!r}."
        )
    return padding


def _is_pair(pair):
    """Whether it is two whole numbers, at least 0."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in pair)
    return whole and min(pair) >= 0


def _check_groups(groups, in_channels, out_channels):
    """Raises unless the channels go into groups."""
    _validate.positive("groups", groups, whole=True)
    if in_channels % groups or out_channels % groups:
        raise ValueError(
            f"`groups` is {groups}, but in_channels = {in_channels} and out_channels = "
            f"{out_channels} are not both multiples of it."
        )


def _check_image(name, x, slides, channels=None):
    """`x` as an array; raises unless it is a batch of images that the window fits into."""
    _validate.is_float("x", x)
    x = jnp.asarray(x)
    axes = len(slides.sizes)
    form = "length" if axes == 1 else "height, width"
    expected = f"[batch, {form}, {channels or 'channels'}]"
    if x.ndim != axes + 2 or channels not in (None, x.shape[-1]):
        mend = _image_mend(x.shape, axes, channels)
        raise ValueError(f"{name}: `x` has shape {x.shape}, expected {expected}.{mend}")
    for along in slides.axes(x):
        if along.positions < 1:
            padded = along.before + along.length + along.after
            raise ValueError(
                f"{name}: `x` has shape {x.shape}, but the window spans {along.window} along axis "
                f"{along.axis}, which has {padded} with its padding. Pass larger images, or "
                'padding="SAME".'
            )
    return x


def _image_mend(shape, axes, channels):
    """What is likely wrong with the shape of images."""
    if len(shape) == axes + 1 and channels in (None, shape[-1]):
        return " One image? Pass `x[None]`."
    if len(shape) == axes + 1 and channels == 1:
        return " Without an axis of channels? Pass `x[..., None]`."
    if len(shape) == axes + 2 and shape[1] == channels:
        return " Channels first? Pass `jnp.moveaxis(x, 1, -1)`."
    if len(shape) == 2:
        return " Flat rows? Reshape them: `x.reshape(batch, height, width, channels)`."
    return ""
