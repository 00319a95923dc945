"""Evaluate arithmetic operators on constants with the same bits as onnxruntime.

- Integers and booleans: in numpy, exactly.
- float32 addition, subtraction, multiplication and division (which IEEE 754 rounds correctly),
  and float32 operators that do not round: in numpy.
- float32 square roots, powers and other functions, whose last bit differs between libraries: by
  onnxruntime, one node at a time.

An evaluator returns None, and the node stays, for sums of floats, float64 and float16, division by
an integer zero, casts that overflow an integer, and casts from float64 to float16 (onnxruntime
rounds twice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from onnxqat.preparation.budget import check_growth
from onnxqat.runtime import open_session

__all__ = ["ARITHMETIC"]

Array = NDArray[Any]
Evaluator = Callable[[gs.Node, list[Array]], Array | None]


def _is_exact(values: Array) -> bool:
    return values.dtype.kind in "iub" or values.dtype == np.float32


def _elementwise(function: Callable[..., Array | None]) -> Evaluator:
    """Return an evaluator that broadcasts its inputs and keeps their type."""

    def evaluate(_: gs.Node, inputs: list[Array]) -> Array | None:
        shape = np.broadcast_shapes(*(values.shape for values in inputs))
        itemsize = max(values.itemsize for values in inputs)
        check_growth(math.prod(shape) * itemsize, inputs)
        return function(*inputs) if all(map(_is_exact, inputs)) else None

    return evaluate


def _divide(a: Array, b: Array) -> Array | None:
    """Divide integers and round towards zero, as in C."""
    if a.dtype.kind == "f":
        return np.asarray(np.divide(a, b))
    if not np.all(b):
        return None
    quotient = np.floor_divide(a, b)
    return np.asarray(quotient + ((quotient < 0) & (quotient * b != a)), a.dtype)


def _extreme(function: Callable[[Array, Array], Array]) -> Callable[..., Array | None]:
    def reduce(*inputs: Array) -> Array | None:
        if any(np.isnan(values).any() for values in inputs):
            return None
        result = inputs[0]
        for values in inputs[1:]:
            result = function(result, values)
        return result

    return reduce


def _modulo(node: gs.Node, inputs: list[Array]) -> Array | None:
    a, b = inputs
    if a.dtype.kind not in "iu" or not np.all(b):
        return None
    return np.asarray(np.fmod(a, b) if node.attrs.get("fmod", 0) else np.mod(a, b))


def _cast(node: gs.Node, inputs: list[Array]) -> Array | None:
    target = np.dtype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    values = inputs[0]
    source = values.dtype
    if target.isbuiltin != 1 or target.kind not in "fiub" or "saturate" in node.attrs:
        return None
    if target.kind == "b":
        return np.not_equal(values, 0)
    if source.kind == "f" and target.kind in "iu":
        return _truncated(values, target)
    rounds_once = target.itemsize > 2 or source == np.float32 or source.itemsize <= 2
    if target.kind == "f" and not rounds_once:
        return None
    return values.astype(target)


def _truncated(values: Array, target: np.dtype[Any]) -> Array | None:
    """Return floats truncated to integers, or None if one does not fit the type."""
    info = np.iinfo(target)
    whole = np.trunc(values.astype(np.float64))
    if not np.all((whole >= float(info.min)) & (whole < float(info.max))):
        return None
    return whole.astype(target)


def _range(_: gs.Node, inputs: list[Array]) -> Array | None:
    start, limit, delta = (values.reshape(())[()] for values in inputs)
    # runtimes compute a Range of floats by adding delta repeatedly
    if inputs[0].dtype.kind not in "iu":
        return None
    check_growth((int(limit) - int(start)) // int(delta) * inputs[0].itemsize, inputs)
    return np.asarray(np.arange(int(start), int(limit), int(delta)), inputs[0].dtype)


def _size(_: gs.Node, inputs: list[Array]) -> Array:
    return np.array(inputs[0].size, np.int64)


def _reduction(function: Callable[..., Array]) -> Evaluator:
    """Return an evaluator that reduces the axes of input 1 or the attribute (default: all axes)."""

    def evaluate(node: gs.Node, inputs: list[Array]) -> Array | None:
        data = inputs[0]
        axes = inputs[1].tolist() if len(inputs) > 1 else node.attrs.get("axes")
        if data.dtype.kind not in "iu" or not data.size or axes == []:
            return None
        keepdims = bool(node.attrs.get("keepdims", 1))
        return np.asarray(function(data, axis=axes and tuple(axes), keepdims=keepdims), data.dtype)

    return evaluate


def _dequantize(node: gs.Node, inputs: list[Array]) -> Array | None:
    """Return (q - zero_point) * scale, rounded once (onnx__DequantizeLinear.html)."""
    quantized, scale = inputs[:2]
    if scale.dtype != np.float32 or node.attrs.get("block_size", 0) or scale.ndim > 1:
        return None
    shape = [1] * quantized.ndim
    if scale.ndim and scale.size > 1:
        shape[node.attrs.get("axis", 1)] = scale.size
    zero_point = inputs[2].astype(np.int32) if len(inputs) > 2 else np.zeros(1, np.int32)
    levels = quantized.astype(np.int32) - zero_point.reshape(shape if zero_point.size > 1 else ())
    return levels.astype(np.float32) * scale.reshape(shape if scale.size > 1 else ())


def _by_runtime(node: gs.Node, inputs: list[Array]) -> Array | None:
    """Run one node with float32 inputs and output in onnxruntime."""
    shape = np.broadcast_shapes(*(values.shape for values in inputs))
    check_growth(math.prod(shape) * 4, inputs)
    if any(values.dtype != np.float32 for values in inputs):
        return None
    float32 = onnx.TensorProto.FLOAT
    feeds = {f"i{k}": values for k, values in enumerate(inputs)}
    graph = helper.make_graph(
        [helper.make_node(node.op, list(feeds), ["y"])],
        "g",
        [helper.make_tensor_value_info(n, float32, v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("y", float32, None)],
    )
    opsets = [helper.make_opsetid("", 17)]  # these operators are the same in all opsets read here
    model = helper.make_model(graph, ir_version=8, opset_imports=opsets)
    outputs = open_session(model, optimization="none", threads=1).run(None, feeds)
    return np.asarray(outputs[0])


ARITHMETIC: dict[str, Any] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "And": _elementwise(np.logical_and),
    "Cast": _cast,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(np.equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Max": _elementwise(_extreme(np.maximum)),
    "Min": _elementwise(_extreme(np.minimum)),
    "Mod": _modulo,
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Not": _elementwise(np.logical_not),
    "Or": _elementwise(np.logical_or),
    "Range": _range,
    "ReduceMax": _reduction(np.max),
    "ReduceMin": _reduction(np.min),
    "ReduceProd": _reduction(np.prod),
    "ReduceSum": _reduction(np.sum),
    "Size": _size,
    "Sub": _elementwise(np.subtract),
    **dict.fromkeys(
        ("Ceil", "Cos", "Exp", "Floor", "Log", "Pow", "Reciprocal", "Round", "Sin", "Sqrt", "Tanh"),
        _by_runtime,
    ),
}
