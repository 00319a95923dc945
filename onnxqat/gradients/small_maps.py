"""Gradients of convolutions with small feature maps, as matrix products over the whole batch.

onnxruntime's ConvGrad loops over the samples and multiplies matrices with one column for each
position of the map. If there are few positions, it spends most of its time reading and writing the
weight again for each sample. Here the samples are the innermost axis, and each gradient is a single
product (the im2col method: Chellapilla et al. 2006, "High performance convolutional neural networks
for document processing", section 3)::

    columns[(ci, tap), (position, n)] = x[n, ci, input position of the tap], 0 in the pads
    dw = dy @ columns^T
    dx = scatter @ (w^T @ dy)        scatter[input position, (tap, position)] = 1
    db = sum of dy over samples and positions

The matrix ``scatter`` is small because the map is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxqat.gradients.backward import Backward

__all__ = ["Geometry", "gains", "products"]

# Milliseconds of CPU time of ConvGrad (first number) and of the matrix products (second), on Zen 5
# with AVX-512, 32 samples, 3x3 kernels:
#
#   512 channels, 1x1 map     14.0   2.4      960 channels, depthwise, 1x1 map   4.8  0.5
#   256 channels, 2x2 map      7.2   1.7      576 channels, depthwise, 2x2 map   4.2  0.4
#   128 channels, 4x4 map      2.9   1.9      192 channels, depthwise, 4x4 map   1.9  0.4
#   512 channels, 7x7 map *     58    33      960 channels, depthwise, 7x7 map * 3.9  7.9
#    64 channels, 8x8 map      2.4   2.9      (* 8 samples)
#
# The last row of each column uses ConvGrad. With 4 samples or fewer, ConvGrad is also faster for
# some of the other rows.
OUT_POSITIONS, IN_POSITIONS, SAMPLES = 49, 64, 8
OUT_POSITIONS_OF_FEW_FILTERS, FEW_FILTERS = 16, 16  # filters per group
SCATTER_ELEMENTS = 1 << 17  # 512 KB: larger matrices would not stay in the cache

Array = NDArray[Any]


class Geometry(NamedTuple):
    """Shapes and attributes of one convolution, with any number of spatial axes."""

    x: list[int]
    w: list[int]
    dy: list[int]
    group: int
    strides: list[int]
    pads: list[int]
    dilations: list[int]

    def sources(self) -> Array:
        """Return the input position that each tap reads at each output position.

        Returns
        -------
        int64 array of shape (taps, output positions)
            Input positions; where a tap lies in the pads, the total number of input positions.
        """
        taps, outputs = (np.indices(a[2:]).reshape(len(a) - 2, -1) for a in (self.w, self.dy))
        flat = np.zeros((taps.shape[1], outputs.shape[1]), np.int64)
        outside = np.zeros(flat.shape, bool)
        for axis, length in enumerate(self.x[2:]):
            at = taps[axis][:, None] * self.dilations[axis] - self.pads[axis]
            at = at + outputs[axis] * self.strides[axis]
            flat = flat * length + at
            outside |= (at < 0) | (at >= length)
        flat[outside] = math.prod(self.x[2:])
        return flat


def gains(geometry: Geometry) -> bool:
    """Return whether matrix products are faster than ConvGrad."""
    taps, out, into = (math.prod(a[2:]) for a in (geometry.w, geometry.dy, geometry.x))
    filters = geometry.w[0] // geometry.group
    limit = OUT_POSITIONS if filters > FEW_FILTERS else OUT_POSITIONS_OF_FEW_FILTERS
    small = out <= limit and into <= IN_POSITIONS and taps * out * into <= SCATTER_ELEMENTS
    return small and geometry.x[0] >= SAMPLES


def products(
    b: Backward, geometry: Geometry, inputs: Sequence[str], wanted: Sequence[bool]
) -> dict[int, str]:
    """Return the wanted gradients of input, weight and bias.

    Parameters
    ----------
    b : Backward
        Adds the nodes.
    geometry : Geometry
        Shape and attributes of the convolution.
    inputs : sequence of str
        Upstream gradient, input and weight.
    wanted : sequence of bool
        Whether the gradients of input, weight and bias are needed.
    """
    dy, x, w = inputs
    group, rank = geometry.group, len(geometry.x)
    filters, channels = geometry.w[0] // group, geometry.w[1]
    sources, found = geometry.sources(), {}
    moved = b.op("Transpose", dy, perm=[*range(1, rank), 0])
    rows = b.reshape(moved, [group, filters, -1])
    if wanted[0]:
        found[0] = _of_input(b, geometry, rows, w, sources)
    if wanted[1]:
        gathered = _gather(b, geometry, x, sources)
        columns = b.reshape(gathered, [group, channels * len(sources), -1])
        found[1] = b.reshape(b.product(rows, columns, trans_b=True), geometry.w, like=w)
    if wanted[2]:
        found[2] = b.reshape(b.reduce("ReduceSum", rows, [2], keepdims=False), [-1])
    return found


def _of_input(b: Backward, geometry: Geometry, rows: str, w: str, sources: Array) -> str:
    group, rank = geometry.group, len(geometry.x)
    filters, channels = geometry.w[0] // group, geometry.w[1]
    spread = b.product(b.reshape(w, [group, filters, -1]), rows, trans_a=True)
    spread = b.reshape(spread, [group * channels, sources.size, geometry.x[0]])
    into = math.prod(geometry.x[2:])
    if not _is_identity(sources, into):
        scatter = np.arange(into)[:, None] == sources.reshape(-1)
        spread = b.op("MatMul", scatter.astype(np.float32), spread)
    shaped = b.reshape(spread, [*geometry.x[1:], geometry.x[0]])
    return b.op("Transpose", shaped, perm=[rank - 1, *range(rank - 1)])


def _gather(b: Backward, geometry: Geometry, x: str, sources: Array) -> str:
    """Add nodes that turn x into shape (channels, taps, output positions, samples)."""
    moved = b.op("Transpose", x, perm=[*range(1, len(geometry.x)), 0])
    into = math.prod(geometry.x[2:])
    if _is_identity(sources, into):
        return moved
    positions = b.reshape(moved, [geometry.x[1], into, geometry.x[0]])
    if (sources == into).any():
        positions = b.op("Pad", positions, np.array([0, 0, 0, 0, 1, 0], np.int64))
    return b.op("Gather", positions, sources, axis=1)


def _is_identity(sources: Array, positions: int) -> bool:
    return sources.size == positions and bool((sources.reshape(-1) == np.arange(positions)).all())
