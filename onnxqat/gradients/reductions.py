"""Gradients of sums and means: dy, or dy / count, for each value that was summed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from onnxqat.gradients.backward import Backward

__all__ = ["REDUCTIONS"]

Found = dict[int, str]


def _mean(b: Backward) -> Found:
    return {0: _spread(b, b.op("Mul", b.dy, _share(b)))}


def _total(b: Backward) -> Found:
    return {0: _spread(b, b.dy)}


def _share(b: Backward) -> str:
    """Return 1 / count, where count is the number of values in each mean."""
    shape, result = b.fixed(b.x), b.fixed(b.y)
    if shape is not None and result is not None:
        return b.constant(math.prod(result) / max(1, math.prod(shape)))
    count = b.op("Div", b.op("Size", b.x), b.op("Size", b.y))
    return b.op("Reciprocal", b.op("Cast", count, to=TensorProto.FLOAT))


def _spread(b: Backward, part: str) -> str:
    """Broadcast the gradient of each result to the values of x that it was reduced from."""
    axes = b.input(1)
    if not axes and b.attribute("axes"):
        axes = b.constant(np.array(b.attribute("axes"), np.int64))
    kept = b.attribute("keepdims", 1) or b.node.op_type == "GlobalAveragePool"
    if axes and not kept:
        part = b.op("Unsqueeze", part, axes)
    return b.op("Expand", part, b.lengths(b.x), like=b.x)


REDUCTIONS: dict[str, Callable[[Backward], Found]] = {
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "ReduceSum": _total,
}
