"""The factor of a convolution's kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.factors.base import OneByOne, SquaredNorm, factor, scale_rows, scan
from fnn.factors.outer import Outer
from fnn.types import Array


@dataclass(frozen=True)
class Window:
    """How the gradient of a kernel is a convolution: the arguments of `lax.conv_general_dilated`.

    Attributes:
        strides: `window_strides`, the steps between the offsets of the kernel's window.
        padding: zeros before and after `x` along every axis of space; negative ones cut it.
        lhs_dilation: steps between the numbers of `x`, with zeros in between.
        rhs_dilation: steps between the numbers of `dz`.
        numbers: the axes of `x`, of `dz` and of the kernel, as in `lax.ConvDimensionNumbers`.
        groups: `batch_group_count`, the groups of channels that do not meet.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    groups: int


@factor
class Conv(OneByOne):
    """Per example the convolution of `x` with `dz`: of a convolution's kernel.

    It is the convolution by which JAX itself has the gradient of a kernel. Its batch is the
    channels of `x`, its output features are those of `dz`, and it sums over the feature axis of
    both, which is 1 long for one example and one use.

    Every offset of the window multiplies `dz` by the part of `x` that it meets: the numbers of the
    kernel there are an `Outer`, whose T positions are those of `dz`. No array holds the patches
    of a batch.

    Source: Dumoulin, Visin (2016), arXiv:1603.07285, for the convolution; Rochette, Manoel, Tramel
    (2019), arXiv:1912.06015, for that of every example.

    >>> numbers = (3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1)
    >>> window = Window((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), numbers, 1)
    >>> Conv(jnp.ones((8, 1, 5, 5, 2)), jnp.ones((8, 1, 3, 3, 4)), window).total().shape
    (3, 3, 2, 4)
    """

    x: Array  # [batch, *shape of the left operand]
    dz: Array  # [batch, *shape of the right operand]
    window: Window = field(metadata={"static": True})

    def total(self) -> Array:
        lhs, rhs, _ = self.window.numbers
        x = _merge(self.x, 1 + lhs[1])
        dz = _merge(self.dz, 1 + rhs[1])
        return _convolve(x, dz, self.window)

    def scaled(self, weights) -> Conv:
        dz = scale_rows(self.dz, weights)
        x = self.x.astype(dz.dtype)
        return Conv(x, dz, self.window)

    def materialise(self) -> Array:
        gradients = self._at_offsets(Outer.materialise)  # [offsets, groups, batch, in, out]
        by_example = jnp.moveaxis(gradients, 2, 0)
        return jax.vmap(self._arrange)(by_example).astype(self.dz.dtype)

    def merged(self) -> Conv:
        lhs, rhs, _ = self.window.numbers
        x = _merge(self.x, 2 + lhs[1])
        dz = _merge(self.dz, 2 + rhs[1])
        return Conv(x, dz, self.window)

    def squared_norm(self) -> Array:
        squares = self._at_offsets(Outer.squared_norm)  # [offsets, groups, batch]
        return squares.sum((0, 1))

    def fast_squared_norm(self) -> SquaredNorm:
        x, dz = self._operands()
        if not self._through_gram():
            return SquaredNorm(self.squared_norm(), parts=self._parts(x, dz))

        def add(near, start):
            return near + _gram(self._meet(x, start)), None

        far = _gram(dz)
        near, _ = scan(add, jnp.zeros_like(far), self._starts())
        terms = near * far  # [batch, groups, T, T]
        size = jnp.abs(terms).sum((1, 2, 3))
        parts = jnp.diagonal(terms, axis1=2, axis2=3).sum((1, 2))
        return SquaredNorm(terms.sum((1, 2, 3)), size, parts)

    def inner(self, other) -> Array:
        if self._layout != other._layout:
            return super().inner(other)
        x, dz = self._operands()
        y, dw = other._operands()

        def at(starts):
            start, other_start = starts
            f = Outer(self._meet(x, start), dz)
            g = Outer(other._meet(y, other_start), dw)
            return jax.vmap(Outer.inner, in_axes=1)(f, g).sum(0)

        return lax.map(at, (self._starts(), other._starts())).sum(0)

    def exact_total(self, weights) -> Array:
        return self._arrange(self._at_offsets(lambda f: f.exact_total(weights)))

    def moments(self, shares) -> tuple[Array, Array]:
        mean, variance = self._at_offsets(lambda f: f.moments(shares))
        return self._arrange(mean), self._arrange(variance)

    def examples(self) -> tuple[Any, Callable[[Any], Array]]:
        def gradient(rows):  # not by `total`: XLA's convolutions are slow in a loop (CPU)
            batch_of_one = jax.tree.map(lambda a: a[None], rows)
            return batch_of_one.materialise()[0]

        return self, gradient

    def _at_offsets(self, answer):
        """`answer(Outer)` at every offset of the window, `[offsets, groups, ...]`."""
        x, dz = self._operands()

        def at(start):
            outer = Outer(self._meet(x, start), dz)
            return jax.vmap(answer, in_axes=1)(outer)

        return lax.map(at, self._starts())

    def _parts(self, x, dz):
        """`[batch]`: the squared norms of what an example adds up, one product a position."""
        squares = (x * x).sum(2)  # [batch, groups, n, *space]
        near = lax.reduce_window(
            squares,
            squares.dtype.type(0),
            lax.add,
            (1, 1, 1, *self._sizes),
            (1, 1, 1, *self.window.rhs_dilation),
            "VALID",
            window_dilation=(1, 1, 1, *self.window.strides),
        )
        far = (dz * dz).sum(3)  # [batch, groups, T]
        return (near.reshape(far.shape) * far).sum((1, 2))

    def _operands(self):
        """`[batch, groups, in, n, *space]` with all zeros put in, and `[batch, groups, T, out]`."""
        wide = self.wide()
        lhs, (channels, *positions), _ = self.window.numbers
        x = wide.x.transpose(0, *(1 + axis for axis in lhs))
        x = lax.pad(x, jnp.zeros((), x.dtype), self._pads())
        dz = wide.dz.transpose(0, *(1 + axis for axis in positions), 1 + channels)
        dz = _split(lax.collapse(dz, 1, -1), 2, self.window.groups)
        return _split(x, 1, self.window.groups), jnp.moveaxis(dz, 2, 1)

    def _pads(self):
        """The zeros before, after and between for `[batch, channels, n, *space]`.

        Those after end with the last that the window reads.
        """
        w = self.window
        lhs, rhs, _ = w.numbers
        pads = [(0, 0, 0)] * 3
        for i, size in enumerate(self._sizes):
            before, _ = w.padding[i]
            numbers = self.x.shape[1 + lhs[2 + i]]
            positions = self.dz.shape[1 + rhs[2 + i]]
            last = (size - 1) * w.strides[i] + (positions - 1) * w.rhs_dilation[i]
            after = last - before - (numbers - 1) * w.lhs_dilation[i]
            pads.append((before, after, w.lhs_dilation[i] - 1))
        return pads

    def _starts(self):
        """Where `dz` meets `x` first, `[offsets, space]`."""
        offsets = list(np.ndindex(*self._sizes))
        return jnp.asarray(np.array(offsets) * np.array(self.window.strides))

    def _meet(self, x, start):
        """The part of `x [batch, groups, in, n, *space]` that `dz` meets, as `[.., T, in]`."""
        _, rhs, _ = self.window.numbers
        steps = self.window.rhs_dilation
        counts = [self.dz.shape[1 + axis] for axis in rhs[2:]]
        sizes = [(count - 1) * step + 1 for count, step in zip(counts, steps, strict=True)]
        starts = [0, 0, 0, 0, *start]
        part = lax.dynamic_slice(x, starts, [*x.shape[:4], *sizes])
        part = lax.slice(part, [0] * part.ndim, part.shape, [1, 1, 1, 1, *steps])
        return jnp.swapaxes(lax.collapse(part, 3), 2, 3)

    def _arrange(self, g):
        """`[offsets, groups, in, out]` as the kernel has it."""
        _, _, (inputs, outputs, *space) = self.window.numbers
        g = jnp.swapaxes(g, 1, 2)
        g = g.reshape(*self._sizes, g.shape[1], -1)
        return g.transpose(np.argsort([*space, inputs, outputs]))

    def _through_gram(self):
        """Whether T x T matrices are cheaper than the gradients, as for `Outer`."""
        _, rhs, _ = self.window.numbers
        shape = self.dz.shape[1:]
        positions = math.prod(shape[axis] for axis in rhs[1:])
        outputs = shape[rhs[0]] // self.window.groups
        inputs = math.prod(self.shape) // shape[rhs[0]]
        return positions * (inputs + outputs) <= 1.2 * inputs * outputs

    @property
    def _sizes(self):
        """Those of the window."""
        _, _, (_, _, *space) = self.window.numbers
        shape = self.shape
        return tuple(shape[axis] for axis in space)

    @property
    def _layout(self):
        """How the numbers lie in the kernel."""
        return self.shape, self.window.numbers[2], self.window.groups


def _convolve(x, dz, window):
    """The gradient of a kernel."""
    return lax.conv_general_dilated(
        x,
        dz,
        window.strides,
        window.padding,
        lhs_dilation=window.lhs_dilation,
        rhs_dilation=window.rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(*window.numbers),
        batch_group_count=window.groups,
    )


def _merge(a, axis):
    """The first axis merged into another one."""
    a = jnp.moveaxis(a, 0, axis - 1)
    return lax.collapse(a, axis - 1, axis + 1)


def _split(a, axis, groups):
    """An axis as two, the groups in front."""
    size = a.shape[axis] // groups
    return a.reshape(*a.shape[:axis], groups, size, *a.shape[axis + 1 :])


def _gram(a):
    """Inner products of the positions of every example, `[batch, groups, T, T]`."""
    return jnp.einsum("bgti,bgsi->bgts", a, a, precision="highest")
