"""Gradients of pooling.

================  ================================================================================
MaxPool           dy goes to the place of each maximum, whose index the forward pass returns; a
                  place that is the maximum of several windows gets the sum
AveragePool       each value gets the sum of dy / count over the windows that contain it: a
                  depthwise ConvTranspose with ones
================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxqat.gradients.backward import Backward
from onnxqat.runtime import open_session

__all__ = ["POOLING"]

Found = dict[int, str]
Array = NDArray[Any]
IR_VERSION = 8


def _max_pool(b: Backward) -> Found:
    if b.attribute("storage_order", 0):
        raise b.unsupported("storage_order = 1")
    indices = b.output(1)
    if b.has("MaxPoolGrad") and b.fixed(b.x) is not None:
        kept = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
        attributes = {a.name: helper.get_attribute_value(a) for a in b.node.attribute}
        attributes = {name: value for name, value in attributes.items() if name in kept}
        dx = b.op("MaxPoolGrad", b.dy, indices, like=b.x, **attributes)
        return {0: b.typed(dx, b.x)}
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    size = b.reshape(b.op("Size", b.x), [1])
    empty = b.op("ConstantOfShape", size, value=value)
    places, values = b.reshape(indices, [-1]), b.reshape(b.dy, [-1])
    flat = b.op("ScatterElements", empty, places, values, reduction="add")
    return {0: b.shaped_like(flat, b.x)}


def _average_pool(b: Backward) -> Found:
    kernel = list(b.attribute("kernel_shape"))
    rank = len(kernel)
    strides, dilations = (b.attribute(name, [1] * rank) for name in ("strides", "dilations"))
    pads = list(b.attribute("pads", [0] * (2 * rank)))
    if b.attribute("auto_pad", "NOTSET") == "VALID":
        pads = [0] * (2 * rank)
    shape = b.fixed(b.x)
    if shape is None or b.fixed(b.y) is None:
        raise b.unknown(f"the shape of '{b.x}'")
    spread, extra = b.dy, []
    for axis in range(rank):
        shares, out = _shares(b, axis, shape[2 + axis])
        along = [1] * (rank + 2)
        along[2 + axis] = -1
        spread = b.op("Mul", spread, shares.reshape(along))
        reach = (out - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        extra.append(shape[2 + axis] + pads[axis] + pads[axis + rank] - reach)
    ones = np.ones([shape[1], 1, *kernel], np.float32)
    # with ceil_mode the last window may extend beyond the pads, so more is cropped
    ends = [p - min(0, e) for p, e in zip(pads[rank:], extra, strict=True)]
    dx = b.op(
        "ConvTranspose", spread, ones, like=b.x, group=shape[1], kernel_shape=kernel,
        strides=list(strides), dilations=list(dilations), pads=[*pads[:rank], *ends],
        output_padding=[max(0, e) for e in extra],
    )  # fmt: skip
    return {0: dx}


def _shares(b: Backward, axis: int, length: int) -> tuple[Array, int]:
    """Return 1 / count along one axis, as counted by the runtime, and the number of windows.

    The count of a window is a product over the axes. Runtimes differ in whether they count pads and
    positions beyond them, so the node itself is run on ones: its result is (values in the window) /
    count.
    """
    rank = len(b.attribute("kernel_shape"))
    attributes: dict[str, Any] = {
        "ceil_mode": b.attribute("ceil_mode", 0),
        "count_include_pad": b.attribute("count_include_pad", 0),
        "kernel_shape": [b.attribute("kernel_shape")[axis]],
        "strides": [b.attribute("strides", [1] * rank)[axis]],
    }
    if b.attribute("dilations"):
        attributes["dilations"] = [b.attribute("dilations")[axis]]
    if b.attribute("auto_pad", "NOTSET") == "NOTSET":
        pads = b.attribute("pads", [0] * (2 * rank))
        attributes["pads"] = [pads[axis], pads[axis + rank]]
    else:
        attributes["auto_pad"] = b.attribute("auto_pad")
    # column i holds the share of input i in each window: 0 or 1 / count
    columns = np.eye(length, dtype=np.float32)[:, None, :]
    node = helper.make_node("AveragePool", ["x"], ["y"], **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "axis",
        [value("x", TensorProto.FLOAT, columns.shape)],
        [value("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", b.scope.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    y = open_session(model, optimization="none", threads=1).run(None, {"x": columns})[0]
    shares: Array = y.max(axis=(0, 1))
    return shares, len(shares)


POOLING: dict[str, Callable[[Backward], Found]] = {
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
}
