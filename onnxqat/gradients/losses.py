"""The gradient of SoftmaxCrossEntropyLoss.

With the weight c of each position (the weight of its class, or 0 if its label is ignored)::

    dx = (softmax(x) - onehot(label)) * c * dy                reduction sum or none
    dx = (softmax(x) - onehot(label)) * c / sum(c) * dy       reduction mean

(the derivative of the definition in https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from onnxqat.gradients.backward import Backward

__all__ = ["LOSSES"]

Found = dict[int, str]
TINY = 1e-30  # avoids a division by 0 if all labels are ignored


def _cross_entropy(b: Backward) -> Found:
    labels = b.input(1)
    log_p = b.output(1) if b.has("SoftmaxCrossEntropyLoss") else b.op("LogSoftmax", b.x, axis=1)
    integers = b.op("Cast", labels, to=TensorProto.INT64, like=labels)
    counted = None
    if (ignored := b.attribute("ignore_index")) is not None:
        skipped = b.op("Equal", integers, np.array(ignored, np.int64))
        integers = b.op("Where", skipped, np.array(0, np.int64), integers)
        counted = b.op("Cast", b.op("Not", skipped), to=TensorProto.FLOAT)
    if b.input(2):
        weights = b.op("Gather", b.input(2), integers)
        counted = weights if counted is None else b.op("Mul", weights, counted)
    classes = b.op("Gather", b.lengths(b.x), np.array(1, np.int64))
    ends = np.array([0, 1], np.float32)
    right = b.op("OneHot", integers, classes, ends, axis=1)
    away = b.op("Sub", b.op("Exp", log_p), right)
    return {0: b.op("Mul", away, _factor(b, counted), like=b.x)}


def _factor(b: Backward, counted: str | None) -> str:
    """Return the factor of each position, with an axis of length 1 for the classes."""
    factor = b.dy
    if b.attribute("reduction", "mean") == "mean":
        if counted is None:
            size = _count(b, b.input(1))
        else:
            size = b.op("Max", b.op("ReduceSum", counted, keepdims=0), TINY)
        factor = b.op("Div", factor, size)
    elif b.attribute("reduction") == "none":
        factor = b.unsqueeze(factor, [1])
    if counted is None:
        return factor
    return b.op("Mul", b.unsqueeze(counted, [1]), factor)


def _count(b: Backward, name: str) -> str:
    """Return the number of elements as a float32: a constant if it is known, or else from Size.

    Size computes on the CPU, so its result would have to be copied to a GPU in every step.
    """
    fixed = b.fixed(name)
    if fixed is not None:
        return b.constant(float(math.prod(fixed)))
    return b.op("Cast", b.op("Size", name), to=TensorProto.FLOAT)


LOSSES: dict[str, Callable[[Backward], Found]] = {"SoftmaxCrossEntropyLoss": _cross_entropy}
