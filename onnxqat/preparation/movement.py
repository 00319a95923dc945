"""Evaluate operators on constants that only move, repeat or select values.

Each function takes the node and its inputs (None for an absent optional one), and returns the
output, a list of outputs, or None if the node must stay. Repeated values are returned as views
without memory of their own, so that the caller can check a result's size before it is allocated.
Where numpy has no such view, `onnxqat.preparation.budget.check_growth` checks the size first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.preparation.budget import check_growth
from onnxqat.preparation.editing import constant_values

__all__ = ["MOVEMENT"]

Array = NDArray[Any]


def _transpose(node: gs.Node, inputs: list[Array]) -> Array:
    return np.transpose(inputs[0], node.attrs.get("perm"))


def _reshape(node: gs.Node, inputs: list[Array]) -> Array:
    data, shape = inputs
    sizes = [int(size) for size in shape]
    if not node.attrs.get("allowzero", 0):
        sizes = [data.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return data.reshape(sizes)


def _flatten(node: gs.Node, inputs: list[Array]) -> Array:
    axis, shape = node.attrs.get("axis", 1), inputs[0].shape
    return inputs[0].reshape(math.prod(shape[:axis]), math.prod(shape[axis:]))


def _squeeze(_: gs.Node, inputs: list[Array]) -> Array:
    axes = tuple(int(axis) for axis in inputs[1]) if len(inputs) > 1 else None
    return np.squeeze(inputs[0], axes)


def _unsqueeze(_: gs.Node, inputs: list[Array]) -> Array:
    return np.expand_dims(inputs[0], tuple(int(axis) for axis in inputs[1]))


def _concat(node: gs.Node, inputs: list[Array]) -> Array:
    check_growth(sum(values.nbytes for values in inputs), inputs)
    return np.concatenate(inputs, node.attrs["axis"])


def _gather(node: gs.Node, inputs: list[Array]) -> Array:
    data, indices = inputs
    axis = node.attrs.get("axis", 0)
    check_growth(data.nbytes // max(data.shape[axis], 1) * indices.size, inputs)
    return np.take(data, indices, axis)


def _slice(_: gs.Node, inputs: list[Array]) -> Array:
    data, starts, ends = inputs[:3]
    axes, steps = [*inputs[3:], None, None][:2]
    chosen = range(starts.size) if axes is None else axes.tolist()
    strides = [1] * starts.size if steps is None else steps.tolist()
    key = [slice(None)] * data.ndim
    for axis, start, end, step in zip(chosen, starts.tolist(), ends.tolist(), strides, strict=True):
        # clamped as in https://onnx.ai/onnx/operators/onnx__Slice.html
        size, back = data.shape[axis], step < 0
        first = min(max(start + size * (start < 0), 0), size - back)
        last = min(max(end + size * (end < 0), -1 if back else 0), size - back)
        key[axis] = slice(first, None if last < 0 else last, step)
    return data[tuple(key)]


def _shape(node: gs.Node, inputs: list[Array]) -> Array:
    return np.array(inputs[0].shape, np.int64)[node.attrs.get("start", 0) : node.attrs.get("end")]


def _split(node: gs.Node, inputs: list[Array]) -> list[Array] | None:
    if len(inputs) < 2:
        return None
    ends = np.cumsum(inputs[1])
    axis = node.attrs.get("axis", 0)
    if ends[-1] != inputs[0].shape[axis]:
        return None
    return np.split(inputs[0], ends[:-1], axis)


def _expand(_: gs.Node, inputs: list[Array]) -> Array:
    data, sizes = inputs
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(sizes.tolist())))


def _tile(_: gs.Node, inputs: list[Array]) -> Array | None:
    data, repeats = inputs
    if repeats.size != data.ndim:
        return None
    check_growth(data.nbytes * math.prod(repeats.tolist()), inputs)
    return np.tile(data, repeats)


def _constant_of_shape(node: gs.Node, inputs: list[Array]) -> Array | None:
    value = np.zeros(1, np.float32)
    if "value" in node.attrs:
        stored = constant_values(node.attrs["value"])
        if stored is None:
            return None
        value = stored
    return np.broadcast_to(value.reshape(()), tuple(inputs[0].tolist()))


def _where(_: gs.Node, inputs: list[Array]) -> Array:
    shape = np.broadcast_shapes(*(values.shape for values in inputs))
    check_growth(math.prod(shape) * inputs[1].itemsize, inputs)
    return np.where(*inputs)


MOVEMENT: dict[str, Any] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
