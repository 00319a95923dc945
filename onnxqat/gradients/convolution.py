"""Gradients of convolutions, in several forms that compute the same sums.

With ``y[n, m, o] = b[m] + sum over c, t of w[m, c, t] * x[n, c, o * stride + t * dilation - pad]``
(t: taps of the kernel, o: output positions)::

    dx = the adjoint of the map x -> y: a ConvTranspose of dy with the same weight, or, without
         strides, a Conv of dy with the weight flipped and its filters and channels exchanged
    dw[m, c, t] = sum over n, o of dy[n, m, o] * x[n, c, o * stride + t * dilation - pad]
    db[m] = sum over n, o of dy[n, m, o]

(Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285, section 4.) The forms of dw:

===========  =====================================================================================
kernel       ConvGrad of a training build: dx, dw and db, sample by sample
small maps   see `onnxqat.gradients.small_maps`
rows         for a 1x1 kernel without strides and pads: one matrix product per sample, summed
im2col       one product of dy with a matrix whose rows are the values that each tap reads
             (Chellapilla et al. 2006, "High performance convolutional neural networks for document
             processing", section 3)
taps         one product per tap, if the im2col matrix would be large or lengths are unknown
depthwise    for each tap, the sum of dy times the values that the tap reads
bands        depthwise, where arithmetic is cheap: for each row of the kernel one product of what
             it reads with dy, over samples and rows. It holds the sums for every pair of columns;
             those of a tap are added up from its diagonals
===========  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqat.gradients.backward import CONTRIB, Array, Backward
from onnxqat.gradients.small_maps import Geometry, gains, products

__all__ = ["CONVOLUTIONS", "convolution"]

Found = dict[int, str]
# Milliseconds of CPU time for dx and dw of 8 samples with 3x3 kernels, on Zen 3 with two threads.
# First number: ConvGrad (in a plain runtime ConvTranspose and im2col); second: dx as a Conv.
#
#                             training build     plain
#   64 channels, 56x56 map        127   64     132  114
#   128 channels, 28x28 map        91   64     121   98
#   256 channels, 14x14 map       105   97     112   88
#   144 depthwise, 56x56 map       31   24      88   81
#   384 depthwise, 14x14 map       14    5      15   13
#
# ConvGrad also copies the values that each tap reads (im2col) on a single thread.
MANY_POSITIONS = 196  # from this size on, dx is a Conv unless the convolution is depthwise
FEW_POSITIONS = 196  # below this size, depthwise products by rows are slower than by values
MOST_COLUMNS = 1 << 26  # the most elements of the im2col matrix: 256 MB
MOST_BAND_COLUMNS = 512  # from which on the superfluous multiplications of bands would weigh
MOST_JOINED = 32  # inputs of a Concat that a graph of CUDA may hold


@dataclass(frozen=True, kw_only=True)
class _Conv:
    """A convolution, and the nodes and properties that its gradient needs."""

    b: Backward
    dy: str
    x: str
    w: str
    kernel: list[int]
    group: int
    strides: list[int]
    pads: list[int]
    dilations: list[int]

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "pads": self.pads,
            "dilations": self.dilations,
        }

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def space(self) -> list[int]:
        """The spatial axes."""
        return list(range(2, 2 + self.rank))

    @property
    def taps(self) -> list[tuple[int, ...]]:
        return list(np.ndindex(*self.kernel))

    @property
    def is_plain(self) -> bool:
        """Whether each output position reads only the input at the same position."""
        ones = {*self.kernel, *self.strides}
        return ones == {1} and not any(self.pads)

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has its own filter and gives one output channel."""
        return self.group > 1 and self.filters() == (1, 1)

    @property
    def gains_by_conv(self) -> bool:
        """Whether dx can be computed by a Conv, and that is faster."""
        dy = self.b.fixed(self.dy)
        if dy is None or self.b.fixed(self.x) is None or max(self.strides) > 1 or self.is_plain:
            return False
        if any(pad > reach for pad, reach in zip(self.pads, 2 * self.reach, strict=True)):
            return False
        return self.is_depthwise or (self.group == 1 and math.prod(dy[2:]) >= MANY_POSITIONS)

    @property
    def reach(self) -> list[int]:
        """The extent of the dilated kernel beyond its first tap, along each spatial axis."""
        return [(k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True)]

    def filters(self) -> tuple[int, int]:
        """Return the number of filters and of input channels of a group."""
        shape = self.b.fixed(self.w)
        if shape is None:
            raise self.b.unknown(f"the shape of '{self.w}'")
        return shape[0] // self.group, shape[1]

    def geometry(self) -> Geometry | None:
        """Return all shapes, or None if a length is unknown."""
        shapes = [self.b.fixed(name) for name in (self.x, self.w, self.dy)]
        if any(shape is None for shape in shapes):
            return None
        x, w, dy = (shape or [] for shape in shapes)
        others = (self.group, self.strides, self.pads, self.dilations)
        return Geometry(x, w, dy, *others)


def _conv(b: Backward) -> Found:
    wanted = [i in b.wanted for i in range(3)]
    return convolution(b, [b.dy, b.x, b.input(1)], b.attribute, wanted)


def convolution(
    b: Backward, inputs: Sequence[str], attribute: Callable[[str, Any], Any], wanted: Sequence[bool]
) -> Found:
    """Return the wanted gradients of a convolution's input, weight and bias.

    Parameters
    ----------
    b : Backward
        Adds the nodes.
    inputs : sequence of str
        Upstream gradient, input and weight.
    attribute : callable
        Returns an attribute of the convolution by its name, or a default.
    wanted : sequence of bool
        Whether the gradients of input, weight and bias are needed.
    """
    shape = b.fixed(inputs[2])
    kernel = list(attribute("kernel_shape", None) or (shape or [])[2:])
    if not kernel:
        raise b.unknown("its kernel_shape")
    ones, mode = [1] * len(kernel), attribute("auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID"):
        raise b.unknown(f"the pads of auto_pad {mode}")
    pads = None if mode == "VALID" else attribute("pads", None)
    conv = _Conv(
        b=b,
        dy=inputs[0],
        x=inputs[1],
        w=inputs[2],
        kernel=kernel,
        group=attribute("group", 1),
        strides=list(attribute("strides", ones)),
        pads=list(pads or [0] * (2 * len(kernel))),
        dilations=list(attribute("dilations", ones)),
    )
    geometry = conv.geometry()
    if geometry is not None and not b.scope.wide and gains(geometry):
        return products(b, geometry, inputs, wanted)
    found = {}
    if wanted[0] and conv.gains_by_conv:
        found[0], wanted = _of_input_by_conv(conv), [False, *wanted[1:]]
    if b.has("ConvGrad") and any(wanted):
        likes = [conv.x if wanted[0] else None, conv.w if wanted[1] else None]
        likes.append("" if wanted[2] else None)
        made = b.ops(f"{CONTRIB}.ConvGrad", *inputs, likes=likes, **conv.attributes)
        return found | {i: name for i, name in enumerate(made) if name}
    if wanted[0]:
        found[0] = _of_input(conv)
    if wanted[1]:
        found[1] = _of_weight(conv)
    if wanted[2]:
        found[2] = b.reduce("ReduceSum", conv.dy, [0, *conv.space], keepdims=False)
    return found


def _of_input_by_conv(conv: _Conv) -> str:
    """Return dx of a convolution without strides: a Conv of dy with the flipped weight."""
    b, axes = conv.b, np.array(conv.space, np.int64)
    back = np.full(conv.rank, -1, np.int64)
    w = b.op("Slice", conv.w, back, np.full(conv.rank, np.iinfo(np.int32).min), axes, back)
    if not conv.is_depthwise:
        w = b.op("Transpose", w, perm=[1, 0, *conv.space])
    pads = [reach - pad for reach, pad in zip(2 * conv.reach, conv.pads, strict=True)]
    return b.op("Conv", conv.dy, w, like=conv.x, **conv.attributes | {"pads": pads})


def _of_input(conv: _Conv) -> str:
    """Return dx, which is 0 at positions that no tap reads."""
    b, x, dy = conv.b, conv.b.fixed(conv.x), conv.b.fixed(conv.dy)
    if x is not None and dy is not None:
        rest = [
            x[2 + i]
            + conv.pads[i]
            + conv.pads[i + conv.rank]
            - (dy[2 + i] - 1) * conv.strides[i]
            - (conv.kernel[i] - 1) * conv.dilations[i]
            - 1
            for i in range(conv.rank)
        ]
        attributes = conv.attributes | {"output_padding": rest}
        return b.op("ConvTranspose", conv.dy, conv.w, like=conv.x, **attributes)
    longest = [s - 1 for s in conv.strides]
    dx = b.op("ConvTranspose", conv.dy, conv.w, **conv.attributes | {"output_padding": longest})
    if not any(longest):
        return dx
    axes = np.array(conv.space, np.int64)
    ends = b.op("Gather", b.op("Shape", conv.x), axes)
    return b.op("Slice", dx, np.zeros(conv.rank, np.int64), ends, axes, like=conv.x)


def _of_weight(conv: _Conv) -> str:
    b = conv.b
    filters, channels = conv.filters()
    if conv.is_depthwise:
        return _bands(conv) if _takes_bands(conv) else _depthwise(conv)
    if conv.group == 1 and conv.is_plain:
        rows = [b.reshape(v, [0, n, -1]) for v, n in ((conv.dy, filters), (conv.x, channels))]
        each = b.product(*rows, trans_b=True)
        return b.shaped_like(b.reduce("ReduceSum", each, [0], keepdims=False), conv.w)
    dy = b.fixed(conv.dy)
    if dy is not None:
        size = len(conv.taps) * conv.group * channels * dy[0] * math.prod(dy[2:])
        if size <= MOST_COLUMNS:
            return _im2col(conv)
    return _by_tap(conv)


def _depthwise(conv: _Conv) -> str:
    """Return dw of a depthwise convolution, from products of rows or of single values."""
    b, read, dy = conv.b, _reader(conv, conv.x), conv.b.fixed(conv.dy)
    samples = 0 if dy is None else dy[0]
    by_row = dy is None or math.prod(dy[2:]) >= FEW_POSITIONS
    shape = [samples, conv.group, 1, -1] if by_row else [samples, conv.group, -1]
    upstream, columns = b.reshape(conv.dy, shape), []
    for tap in conv.taps:
        values = b.reshape(read(tap), shape)
        if by_row:
            total = b.reduce("ReduceSum", b.product(upstream, values, trans_b=True), [0])
        else:
            total = b.reduce("ReduceSum", b.op("Mul", values, upstream), [0, 2])
        columns.append(b.reshape(total, [conv.group, 1, 1]))
    return b.shaped_like(_joined(conv, columns, axis=2), conv.w)


def _takes_bands(conv: _Conv) -> bool:
    """Whether dw of a depthwise convolution is summed from products of rows with all columns.

    That is as many multiplications as the map has columns times those that are needed, and a third
    of the passes over memory.
    """
    x, dy = conv.b.fixed(conv.x), conv.b.fixed(conv.dy)
    if not conv.b.scope.wide or conv.rank != 2 or x is None or dy is None:
        return False
    return len(conv.taps) > 1 and dy[3] <= MOST_BAND_COLUMNS


def _bands(conv: _Conv) -> str:
    b, dy, x = conv.b, conv.b.fixed(conv.dy) or [], conv.b.fixed(conv.x) or []
    rows, columns = dy[2:]
    (high, wide), (down, across), (apart, aside) = conv.kernel, conv.strides, conv.dilations
    padded = conv.x
    if any(conv.pads):
        begins, ends = conv.pads[:2], conv.pads[2:]
        padded = b.op("Pad", padded, np.array([0, 0, *begins, 0, 0, *ends], np.int64))
    width = x[3] + conv.pads[1] + conv.pads[3]
    exchange = [1, 0, 2, 3]  # the samples behind the channels
    padded = b.op("Transpose", padded, perm=exchange)
    upstream = b.reshape(b.op("Transpose", conv.dy, perm=exchange), [conv.group, -1, columns])
    products = []
    for row in range(high):
        start = row * apart
        bounds = ([start], [start + (rows - 1) * down + 1], [2], [down])
        read = b.op("Slice", padded, *(np.array(one, np.int64) for one in bounds))
        band = b.product(b.reshape(read, [conv.group, -1, width]), upstream, trans_a=True)
        products.append(b.reshape(band, [conv.group, -1]))
    at = np.arange(columns)
    diagonals = [
        row * width * columns + (at * across + column * aside) * columns + at
        for row in range(high)
        for column in range(wide)
    ]
    terms = b.op("Gather", _joined(conv, products, axis=1), np.array(diagonals), axis=1)
    return b.shaped_like(b.reduce("ReduceSum", terms, [2], keepdims=False), conv.w)


def _im2col(conv: _Conv) -> str:
    b = conv.b
    filters, channels = conv.filters()
    exchange = [1, 0, *conv.space]  # move the samples behind the channels
    rows = b.reshape(b.op("Transpose", conv.dy, perm=exchange), [conv.group, filters, -1])
    read = _reader(conv, b.op("Transpose", conv.x, perm=exchange))
    columns = [b.reshape(read(tap), [conv.group, channels, -1]) for tap in conv.taps]
    product = b.product(rows, _joined(conv, columns, axis=1), trans_b=True)
    apart = b.reshape(product, [conv.group * filters, len(columns), channels])
    return b.shaped_like(b.op("Transpose", apart, perm=[0, 2, 1]), conv.w)


def _by_tap(conv: _Conv) -> str:
    b, read, dy = conv.b, _reader(conv, conv.x), conv.b.fixed(conv.dy)
    filters, channels = conv.filters()
    samples = 0 if dy is None else dy[0]
    rows = b.reshape(conv.dy, [samples, conv.group, filters, -1])
    columns = []
    for tap in conv.taps:
        values = b.reshape(read(tap), [samples, conv.group, channels, -1])
        each = b.product(rows, values, trans_b=True)
        total = b.reduce("ReduceSum", each, [0], keepdims=False)
        columns.append(b.reshape(total, [conv.group * filters, channels, 1]))
    return b.shaped_like(_joined(conv, columns, axis=2), conv.w)


def _joined(conv: _Conv, parts: list[str], axis: int) -> str:
    count = len(parts)
    if conv.b.scope.wide and count > MOST_JOINED:
        # groups of equal lengths, if possible: others cannot be in a CUDA graph, either
        divisors = [n for n in range(2, MOST_JOINED + 1) if count % n == 0]
        size = next((n for n in reversed(divisors) if count // n <= MOST_JOINED), MOST_JOINED)
        groups = [parts[i : i + size] for i in range(0, count, size)]
        parts = [_joined(conv, group, axis) for group in groups]
    return conv.b.op("Concat", *parts, axis=axis) if len(parts) > 1 else parts[0]


def _reader(conv: _Conv, x: str) -> Callable[[tuple[int, ...]], str]:
    """Return a function that adds the values a tap reads at each output position."""
    if conv.is_plain:
        return lambda _: x
    b, dy = conv.b, conv.b.fixed(conv.dy)
    axes, strides = np.array(conv.space, np.int64), np.array(conv.strides, np.int64)
    dilations = np.array(conv.dilations, np.int64)
    if any(conv.pads):
        sizes = [0, 0, *conv.pads[: conv.rank], 0, 0, *conv.pads[conv.rank :]]
        x = b.op("Pad", x, np.array(sizes, np.int64))
    if dy is not None and max(conv.strides) > 1 and len(conv.taps) > 1:
        return _by_phase(conv, x, dy[2:])
    if dy is None:
        last = b.op("Sub", b.op("Gather", b.op("Shape", conv.dy), axes), np.array(1, np.int64))
        reach: str | Array = b.op("Add", b.op("Mul", last, strides), np.array(1, np.int64))
    else:
        reach = (np.array(dy[2:], np.int64) - 1) * strides + 1

    def read(tap: tuple[int, ...]) -> str:
        start = np.array(tap, np.int64) * dilations
        end = b.op("Add", reach, start) if isinstance(reach, str) else reach + start
        return b.op("Slice", x, start, end, axes, strides)

    return read


def _by_phase(conv: _Conv, x: str, out: list[int]) -> Callable[[tuple[int, ...]], str]:
    """Return the same function for a convolution with strides.

    A Slice with steps copies value by value, which is slow. So the input is split once by the
    remainder of the position modulo the stride; each tap then reads whole rows of one part, by a
    Slice without steps.
    """
    b, axes = conv.b, np.array(conv.space, np.int64)
    strides = np.array(conv.strides, np.int64)
    far = np.full(conv.rank, np.iinfo(np.int32).max, np.int64)
    phases: dict[tuple[int, ...], str] = {}

    def read(tap: tuple[int, ...]) -> str:
        at = np.array(tap, np.int64) * np.array(conv.dilations, np.int64)
        first, phase = at // strides, tuple((at % strides).tolist())
        if phase not in phases:
            phases[phase] = b.op("Slice", x, np.array(phase, np.int64), far, axes, strides)
        return b.op("Slice", phases[phase], first, first + np.array(out, np.int64), axes)

    return read


CONVOLUTIONS: dict[str, Callable[[Backward], Found]] = {"Conv": _conv}
