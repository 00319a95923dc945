"""Gradients of ops that consist of a linear map for each axis, such as Resize and Pad.

``y = M_k ... M_2 x + constant``, with a matrix M of shape (out, in) for each axis that changes; dx
is dy times each of these matrices. The matrices are not computed from the formulas of the many
coordinate modes, which runtimes interpret differently. Instead, onnxruntime runs the node itself on
the columns of an identity matrix, one axis at a time, which gives M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.preparation.editing import constant_values
from onnxqat.runtime import open_session
from onnxqat.train.lowering.gradient import Gradient, Refusal, static_shape

__all__ = ["cumsum", "pad", "resize"]

Array = NDArray[Any]
IR_VERSION = 8


def resize(node: gs.Node, opset: int) -> Gradient:
    """Return the gradient of a Resize with any modes."""
    shape, out = static_shape(node.inputs[0], "input"), static_shape(node.outputs[0], "output")
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refusal("it keeps the aspect ratio; export it with fixed sizes or scales")
    inputs = [*node.inputs, *[gs.Variable.empty()] * (4 - len(node.inputs))]
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refusal("it resizes a region (tf_crop_and_resize)")
    scales = constant_values(inputs[2])
    if inputs[2].name and scales is None:
        raise Refusal("its scales are computed; export the model with fixed sizes")
    axes = [a % len(shape) for a in node.attrs.get("axes", range(len(shape)))]
    if 0 in axes and shape[0] != out[0]:
        raise Refusal("it resizes the first axis")
    attributes = {k: v for k, v in node.attrs.items() if k != "axes"}
    matrices = {}
    for position, axis in enumerate(axes):
        if axis == 0 or (shape[axis] == out[axis] and (scales is None or scales[position] == 1)):
            continue
        given = None if scales is None else float(scales[position])
        matrices[axis] = _resize_matrix(attributes, shape[axis], out[axis], given, opset)
    return _gradient(("x", "roi", "scales", "sizes"), matrices, len(shape))


def _resize_matrix(
    attributes: Mapping[str, Any], length: int, out: int, scale: float | None, opset: int
) -> Array:
    """Return the matrix of a Resize along one axis, of shape (out, length)."""
    if scale is None:
        sizes = {"sizes": np.array([1, length, out, 1], np.int64)}
        names = ["x", "", "", "sizes"]
    else:
        sizes = {"scales": np.array([1, 1, scale, 1], np.float32)}
        names = ["x", "", "scales"]
    node = helper.make_node("Resize", names, ["y"], **attributes)
    columns = np.eye(length, dtype=np.float32).reshape(1, length, length, 1)
    return _run(node, columns, sizes, opset).reshape(length, -1).T


def pad(node: gs.Node, opset: int) -> Gradient:
    """Return the gradient of a Pad; for constant mode, dy without the padding."""
    shape = static_shape(node.inputs[0], "input")
    pads = constant_values(node.inputs[1])
    axes: Array | None = np.arange(len(shape))
    if len(node.inputs) > 3 and node.inputs[3].name:
        axes = constant_values(node.inputs[3])
    if pads is None or axes is None:
        raise Refusal("its pads are not constant")
    inputs = ("x", "pads", "value", "axes")
    attributes = {"mode": node.attrs.get("mode", "constant")}
    if attributes["mode"] == "constant":
        text = "back = Neg(pads) dx = Pad(dy, back, zero, axes)"
        return Gradient(inputs=inputs, text=text, constants={"axes": axes.astype(np.int64)})
    matrices = {}
    for i, axis in enumerate(np.mod(axes, len(shape)).tolist()):
        begin, end = int(pads[i]), int(pads[i + len(axes)])
        if not begin and not end:
            continue
        if axis == 0:
            raise Refusal("it pads the first axis")
        inner = helper.make_node("Pad", ["x", "pads"], ["y"], **attributes)
        columns = np.eye(shape[axis], dtype=np.float32)
        around = {"pads": np.array([0, begin, 0, end], np.int64)}
        matrices[axis] = _run(inner, columns, around, opset).T
    return _gradient(inputs, matrices, len(shape))


def goes_backwards(node: gs.Node) -> bool:
    """Return whether a Slice can have a negative step."""
    if len(node.inputs) < 5 or not node.inputs[4].name:
        return False
    steps = constant_values(node.inputs[4])
    return steps is None or bool((steps < 0).any())


def backward_slice(node: gs.Node, opset: int) -> Gradient:
    """Return the gradient of a Slice with negative steps."""
    shape = static_shape(node.inputs[0], "input")
    bounds = [constant_values(t) for t in node.inputs[1:5] if t.name]
    if len(bounds) < 4 or any(values is None for values in bounds):
        raise Refusal("its starts, ends, axes or steps are not constant")
    matrices = {}
    for start, end, axis, step in zip(*(b.tolist() for b in bounds if b is not None), strict=True):
        length = shape[axis % len(shape)]
        if length < 0:
            raise Refusal("it slices the first axis")
        inner = helper.make_node("Slice", ["x", "start", "end", "axis", "step"], ["y"])
        given = {"start": start, "end": end, "axis": 1, "step": step}
        vectors = {name: np.array([value], np.int64) for name, value in given.items()}
        columns = np.eye(length, dtype=np.float32)
        matrices[axis % len(shape)] = _run(inner, columns, vectors, opset).T
    return _gradient(("x", "starts", "ends", "axes", "steps"), matrices, len(shape))


def cumsum(node: gs.Node) -> Gradient:
    """Return the gradient of a CumSum: the sum from the other end."""
    attributes = f"exclusive = {node.attrs.get('exclusive', 0)}"
    attributes += f", reverse = {1 - node.attrs.get('reverse', 0)}"
    return Gradient(inputs=("x", "axis"), text=f"dx = CumSum<{attributes}>(dy, axis)")


def _run(node: Any, x: Array, constants: Mapping[str, Array], opset: int) -> Array:
    """Return the output of the node for ``x``, computed by onnxruntime."""
    graph = helper.make_graph(
        [node],
        "axis",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    y: Array = open_session(model, optimization="none", threads=1).run(None, {"x": x})[0]
    return y


def _gradient(inputs: tuple[str, ...], matrices: Mapping[int, Array], rank: int) -> Gradient:
    """Return dx = dy times the matrix of each axis."""
    factors = {axis: _repeats(matrix) for axis, matrix in matrices.items()}
    if rank > 2 and min(factors, default=0) > 1 and all(factors.values()):
        return _pooled(inputs, [factors.get(axis, 1) for axis in range(2, rank)])
    lines, current = [], "dy"
    constants: dict[str, Array] = {}
    for axis, matrix in matrices.items():
        made = f"d{axis}"
        if axis == rank - 1:
            lines.append(f"{made} = MatMul({current}, m{axis})")
            constants[f"m{axis}"] = np.ascontiguousarray(matrix)
        elif axis == rank - 2:
            lines.append(f"{made} = MatMul(m{axis}, {current})")
            constants[f"m{axis}"] = np.ascontiguousarray(matrix.T)
        else:  # move the axis to the second last place, over which a MatMul from the left sums
            order = [i for i in range(rank) if i != axis]
            order.insert(rank - 2, axis)
            lines.append(
                f"a{axis} = Transpose<perm = {order}>({current}) "
                f"b{axis} = MatMul(m{axis}, a{axis}) "
                f"{made} = Transpose<perm = {np.argsort(order).tolist()}>(b{axis})"
            )
            constants[f"m{axis}"] = np.ascontiguousarray(matrix.T)
        current = made
    lines.append(f"dx = Identity({current})")
    return Gradient(inputs=inputs, text=" ".join(lines), constants=constants)


def _repeats(matrix: Array) -> int:
    """Return how many times a matrix repeats each value, or 0 if it is not a repetition."""
    factor, rest = divmod(matrix.shape[0], matrix.shape[1])
    repeating = np.repeat(np.eye(matrix.shape[1], dtype=np.float32), factor, axis=0)
    return factor if rest == 0 and np.array_equal(matrix, repeating) else 0


def _pooled(inputs: tuple[str, ...], factors: list[int]) -> Gradient:
    """Return sums over the copies of each value, by a kernel that is 5 times faster than MatMul."""
    text = f"""mean = AveragePool<kernel_shape = {factors}, strides = {factors}>(dy)
    dx = Mul(mean, copies)"""
    return Gradient(inputs=inputs, text=text, constants={"copies": float(math.prod(factors))})
