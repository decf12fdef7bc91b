"""Convolution and pooling over one or two axes of space, and `flatten`.

An image is `[batch, *space, channels]`, channels last as in Flax; `space` is `(length,)` or
`(height, width)`. A window slides over the axes of space. Backward passes are written by hand: a
convolution carries `dz` to `dx` by the transposed convolution, a pool gives it back to the numbers
of each window. `conv_transpose` is the transposed convolution as a layer.

Source: Dumoulin, Visin (2016), arXiv:1603.07285, for the arithmetic of sizes and paddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import he_normal, zeros

from fnn import _validate
from fnn.factors import Conv, PerExample, Window, total, widen
from fnn.factors.base import sum_leaves
from fnn.nets.layers import Initializer, as_rows, check_params, draw_param, sum_positions
from fnn.types import Layer, by_recipe, storable

Padding = Literal["SAME", "VALID"] | tuple[tuple[int, int], ...]


@storable
class Kernel(NamedTuple):
    """Parameters of `conv` and `conv_transpose`, or their gradients."""

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
    slides = _window("kernel_size", kernel_size, strides, padding, dilation)
    name = f"conv({in_channels}, {out_channels}, {slides.sizes})"

    def product(w, x):
        _check_fit(name, slides, x)
        return _convolve(slides, groups, w, x)

    def back(w, x, dz):
        w = _turn(w, groups)
        return _spread(slides, groups, w, dz, x.shape[1:-1])

    def window(x, dz):
        return _conv_window(slides, groups, x.shape[1:-1], dz.shape[1:-1])

    channels = in_channels, out_channels, groups
    inits = kernel_init, bias_init
    maps = product, back, window
    return _kernel_layer(name, slides, channels, inits, maps)


@by_recipe
def conv_transpose(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...],
    *,
    strides: int | tuple[int, ...] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    output_size: int | tuple[int, ...] | None = None,
    kernel_init: Initializer = he_normal(),
    bias_init: Initializer | None = zeros,
) -> Layer[Kernel]:
    """Transposed convolution: from the outputs of a `conv` to images of the size of its inputs.

    Every number of `x` is multiplied by the kernel, and the products are added up, `strides` apart.
    With "SAME" and "VALID" it is `flax.linen.ConvTranspose`: the convolution of `x`, with
    `strides - 1` zeros between its numbers, with a kernel that is not flipped. So it is the
    transpose of a `conv` with the flipped kernel.

    Args:
        in_channels: channels of `x`, at least 1.
        out_channels: channels of the output, at least 1.
        kernel_size: as for `conv`.
        strides: of that `conv`: how far apart the numbers of `x` lie in the output.
        padding: of that `conv`; so pairs cut the output.
        dilation: as for `conv`.
        groups: as for `conv`.
        output_size: along each axis of space; a `conv` with strides gives the same size for several
            sizes of images. None: `size * stride` for "SAME", else `size * stride +
            max(span - stride, 0)` less the padding, where `span` is that of the window.
        kernel_init: `(key, (*kernel_size, in_channels / groups, out_channels)) -> w`.
        bias_init: `(key, (out_channels,)) -> b`; None for a layer without a bias.

    Returns:
        A layer from `[batch, *space, in_channels]` to `[batch, *output_size, out_channels]` with
        `params = Kernel(w=[*kernel_size, in_channels / groups, out_channels], b=[out_channels])`.

    Raises:
        TypeError, ValueError: an argument is invalid; at the call, `x` or `params` do not fit.

    Source: Dumoulin, Visin (2016), arXiv:1603.07285, chapter 4.

    >>> layer = conv_transpose(8, 1, (3, 3), strides=2)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones((5, 14, 14, 8))).shape
    (5, 28, 28, 1)
    """
    slides = _window("kernel_size", kernel_size, strides, padding, dilation)
    name = f"conv_transpose({in_channels}, {out_channels}, {slides.sizes})"
    if output_size is not None:
        output_size = _for_axes("output_size", output_size, len(slides.sizes))

    def product(w, x):
        space = output_size
        if space is None:
            space = slides.image_size(x.shape[1:-1])
        _check_output(name, slides, x, space)
        return _spread(slides, groups, w, x, space)

    def back(w, x, dz):
        w = _turn(w, groups)
        return _convolve(slides, groups, w, dz)

    def window(x, dz):
        return _spread_window(slides, groups, dz.shape[1:-1], x.shape[1:-1])

    channels = in_channels, out_channels, groups
    inits = kernel_init, bias_init
    maps = product, back, window
    return _kernel_layer(name, slides, channels, inits, maps)


def opposite(
    layer: Layer,
    kernel_init: Initializer,
    output_size: tuple[int, ...] | None = None,
) -> Layer[Kernel] | None:
    """The `conv_transpose` from the outputs of a `conv` to its inputs, or the reverse.

    Args:
        layer: any layer.
        kernel_init: of the layer that is returned.
        output_size: of a `conv_transpose`.

    Returns:
        A layer with a kernel of its own; None if `layer` is neither.

    >>> opposite(conv(1, 8, (3, 3)), he_normal()).name
    'conv_transpose(8, 1, (3, 3))'
    """
    kind = layer.recipe[:1]
    if kind == ("conv",):
        make = partial(conv_transpose, output_size=output_size)
    elif kind == ("conv_transpose",):
        make = conv
    else:
        return None
    inputs, outputs, size, strides, padding, dilation, groups, *_ = layer.recipe[1:]
    return make(
        outputs,
        inputs,
        size,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        kernel_init=kernel_init,
    )


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
        _check_fit(name, slides, x)
        firsts = []
        axes = slides.axes(x.shape[1:-1])
        for axis in reversed(axes):  # a row after the other, then the rows
            parts = _parts(y, axis, -jnp.inf)
            y, first = _first_max(parts)
            firsts.append(first)
        return y, (x, firsts)

    def backward(params, residuals, dy, reduce=total):
        x, firsts = residuals
        dx = widen(dy)
        axes = slides.axes(x.shape[1:-1])
        for axis, first in zip(axes, reversed(firsts), strict=True):
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
        _check_fit(name, slides, x)
        y = widen(x)
        for axis in slides.axes(x.shape[1:-1]):
            y = sum_leaves(_parts(y, axis, 0))
        return (y / count).astype(x.dtype), x

    def backward(params, x, dy, reduce=total):
        dx = widen(dy) / count
        axes = slides.axes(x.shape[1:-1])
        for axis in reversed(axes):
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


def _kernel_layer(name, slides, channels, inits, maps):
    """A layer with a kernel and a bias.

    `channels` are those of `x` and of the output, and their groups; `inits` are those of `w` and
    `b`; `maps` are `(w, x) -> z`, `(w, x, dz) -> dx` and `(x, dz) -> Window` of the gradient of w.
    """
    in_channels, out_channels, groups = channels
    kernel_init, bias_init = inits
    product, back, window = maps
    _validate.positive("in_channels", in_channels, whole=True)
    _validate.positive("out_channels", out_channels, whole=True)
    _check_groups(groups, in_channels, out_channels)
    _validate.is_function("kernel_init", kernel_init, "(key, shape) -> array")
    if bias_init is not None:
        _validate.is_function("bias_init", bias_init, "(key, shape) -> array, or None")
    w_shape = *slides.sizes, in_channels // groups, out_channels
    b_shape = None if bias_init is None else (out_channels,)
    shapes = Kernel(w_shape, b_shape)

    def init(key):
        _validate.is_key("key", key)
        w_key, b_key = jax.random.split(key)
        w = draw_param("kernel_init", kernel_init, w_key, w_shape)
        b = draw_param("bias_init", bias_init, b_key, b_shape)
        return Kernel(w, b)

    def forward(params, x):
        x = _check_image(name, x, slides, in_channels)
        check_params(name, shapes, params)
        _validate.same_dtype("x", x, "w", params.w)
        z = product(params.w, x)
        if params.b is not None:
            z = z + as_rows(params.b, z)
        return z, x

    def backward(params, x, dz, reduce=total):
        # dw is a convolution of x with dz, dx the transposed map of dz
        bias = PerExample(sum_positions(dz))
        weight = Conv(x[:, None], dz[:, None], window(x, dz))
        b = None if params.b is None else reduce(bias)
        dx = back(params.w, x, dz)
        return Kernel(reduce(weight), b), dx

    return Layer(name, init, forward, backward)


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

    def image_size(self, positions: Sequence[int]) -> tuple[int, ...]:
        """The size of an image that has so many windows along each axis."""
        found = []
        for i, count in enumerate(positions):
            stride = self.strides[i]
            size = count * stride
            if self.padding != "SAME":
                size += max(self.spans[i] - stride, 0)
            if not isinstance(self.padding, str):
                size -= sum(self.padding[i])
            found.append(size)
        return tuple(found)

    def axes(self, space: Sequence[int]) -> list[Along]:
        """The axes of space of an image of this size, with the window along each."""
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


def _turn(w, groups):
    """The kernel of the transpose: turned round, and with inputs and outputs exchanged."""
    *sizes, inputs, outputs = w.shape
    per_group = outputs // groups
    w = jnp.flip(w, range(len(sizes)))
    w = w.reshape(*sizes, inputs, groups, per_group)
    w = w.swapaxes(-3, -1)
    return w.reshape(*sizes, per_group, groups * inputs)


def _spread(slides, groups, w, x, space):
    """The convolution of `x`, with strides as gaps, that gives an image of size `space`.

    With a kernel that is turned it is the transposed convolution: a number of `x` goes to all that
    its window sees.
    """
    axes = len(slides.sizes)
    return lax.conv_general_dilated(
        x,
        w,
        (1,) * axes,
        _spread_pads(slides, space, x.shape[1:-1]),
        lhs_dilation=slides.strides,
        rhs_dilation=slides.dilation,
        dimension_numbers=_numbers(axes),
        feature_group_count=groups,
    )


def _spread_pads(slides, space, positions):
    """Zeros around numbers that lie strides apart.

    They make position p of the image meet number q at the offset o of the turned kernel, where
    p + before = q * stride + o.
    """
    pads = []
    columns = space, positions, slides.spans, slides.strides, slides.pads(space)
    for length, count, span, stride, (before, _) in zip(*columns, strict=True):
        first = span - 1 - before
        last = length + before - (count - 1) * stride - 1
        pads.append((first, last))
    return tuple(pads)


def _conv_window(slides, groups, space, positions):
    """How the gradient of the kernel of `conv` is a convolution of `x` with `dz`.

    Strides and dilation change places: the positions of `dz` lie strides apart, and the offsets of
    the window are the outputs.
    """
    pads = []
    columns = space, positions, slides.spans, slides.strides, slides.pads(space)
    for length, count, span, stride, (before, _) in zip(*columns, strict=True):
        read = (count - 1) * stride + span
        pads.append((before, read - before - length))
    ones = (1,) * len(slides.sizes)
    return _kernel_window(slides, groups, tuple(pads), ones, slides.strides)


def _spread_window(slides, groups, space, positions):
    """The same for `conv_transpose`, where the numbers of `x` lie strides apart."""
    pads = _spread_pads(slides, space, positions)
    ones = (1,) * len(slides.sizes)
    return _kernel_window(slides, groups, pads, slides.strides, ones)


def _kernel_window(slides, groups, pads, gaps, steps):
    """The convolution of `x`, with gaps, with `dz`, with steps, that gives a kernel."""
    axes = len(slides.sizes)
    images = axes + 1, 0, *range(1, axes + 1)
    kernel = axes, axes + 1, *range(axes)
    return Window(slides.dilation, pads, gaps, steps, (images, images, kernel), groups)


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
    """`x` as an array; raises unless it is a batch of images."""
    _validate.is_float("x", x)
    x = jnp.asarray(x)
    axes = len(slides.sizes)
    form = "length" if axes == 1 else "height, width"
    expected = f"[batch, {form}, {channels or 'channels'}]"
    if x.ndim != axes + 2 or channels not in (None, x.shape[-1]):
        mend = _image_mend(x.shape, axes, channels)
        raise ValueError(f"{name}: `x` has shape {x.shape}, expected {expected}.{mend}")
    return x


def _check_fit(name, slides, x):
    """Raises unless the window fits into the images."""
    for along in slides.axes(x.shape[1:-1]):
        if along.positions < 1:
            padded = along.before + along.length + along.after
            raise ValueError(
                f"{name}: `x` has shape {x.shape}, but the window spans {along.window} along axis "
                f"{along.axis}, which has {padded} with its padding. Pass larger images, or "
                'padding="SAME".'
            )


def _check_output(name, slides, x, space):
    """Raises unless a `conv` of images of size `space` has outputs of the size of `x`."""
    positions = tuple(along.positions for along in slides.axes(space))
    if min(space) < 1 or positions != x.shape[1:-1]:
        raise ValueError(
            f"{name}: `x` has shape {x.shape}, but images of size {space} give a convolution with "
            f"these strides and this padding outputs of size {positions}. Pass another "
            "`output_size`, or less padding."
        )


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
