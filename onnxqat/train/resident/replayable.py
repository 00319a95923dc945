"""Which training graphs onnxruntime can replay as a CUDA graph without reading wrong memory.

Some kernels upload an array of pointers or lengths from host memory that onnxruntime then reuses,
although a CUDA graph reads it again in each replay. onnxruntime keeps that memory since its pull
request 32121 (https://github.com/microsoft/onnxruntime/pull/32121, which lists these kernels).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxqat import native

__all__ = ["obstacle"]

Shapes = Mapping[str, tuple[int, ...]]

MOST_PARTS = 32  # the most inputs of a Concat or outputs of a Split that need no such array
NEVER = frozenset(("GRU", "LSTM", "NonMaxSuppression", "RNN", "ScatterND"))
PRODUCTS = frozenset(("FusedMatMul", "MatMul"))


def obstacle(model: onnx.ModelProto) -> str | None:
    """Return why a graph must not be replayed; None if it can be.

    Parameters
    ----------
    model : onnx.ModelProto
        The graph; its inputs have fixed shapes.
    """
    graph = native.infer_shapes(model).graph
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    # onnx infers no shapes behind a FusedMatMul. Only gradients are there: their products have the
    # batches of the forward pass, and their Concats join equal parts, or other Concats.
    kinds: dict[str, object] = {
        node.output[0]: f"of {len(node.input)} parts"
        for node in graph.node
        if node.op_type == "Concat"
    }
    kinds |= shapes
    for node in graph.node:
        if (reason := _reason(node, shapes, kinds)) is not None:
            return f"node '{node.name or node.output[0]}' ({node.op_type}) {reason}"
    return None


def _reason(node: onnx.NodeProto, shapes: Shapes, kinds: Mapping[str, object]) -> str | None:
    if node.op_type in NEVER:
        return "cannot be replayed"
    if node.op_type in ("Concat", "Split"):
        parts = node.input if node.op_type == "Concat" else node.output
        if len(parts) > MOST_PARTS:
            return f"has more than {MOST_PARTS} parts"
        if len({kinds[name] for name in parts if name in kinds}) > 1:
            return "has parts of different shapes"
    if node.op_type in PRODUCTS:
        left, right = (shapes.get(name) for name in node.input[:2])
        if left and right and not _strided(left[:-2], right[:-2]):
            return "multiplies batches of different shapes"
    return None


def _strided(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether batches of matrices are equally spaced in memory on both sides."""
    return left == right or all(n == 1 for n in left) or all(n == 1 for n in right)
