"""Fill in the types and shapes that onnx's shape inference finds.

Only missing types and lengths are filled in; the file's own stay, including the names of dynamic
dimensions. Names that the inference invents for new dimensions are dropped. Initializers of more
than 1024 elements are passed to the inference without their values, so that a model of any size
fits in one protobuf message. Values inside subgraphs are not changed.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat import native
from onnxqat.errors import ModelError
from onnxqat.model import exported, weights_left_out

__all__ = ["infer_shapes", "reliable_shapes"]

# Larger initializers are weights; smaller ones may be shapes, whose values matter.
MAX_ELEMENTS = 1024

Dimension = int | str | None


def infer_shapes(graph: gs.Graph) -> int:
    """Fill in types and shapes; return the number of changed values.

    Raises
    ------
    ModelError
        onnx refuses the graph, for example because a node has too few inputs.
    """
    inferred = _inferred(_skeleton(graph))
    names = _dimension_names(graph)
    tensors = graph.tensors()
    changed = 0
    for value in (*inferred.value_info, *inferred.output):
        tensor = tensors.get(value.name)
        if isinstance(tensor, gs.Variable) and value.type.HasField("tensor_type"):
            changed += _fill_in(tensor, value.type.tensor_type, names)
    return changed


def reliable_shapes(graph: gs.Graph, names: Container[str]) -> dict[str, list[int | None]]:
    """Return the shapes of some values; lengths not determined by graph inputs are None."""
    proto = _skeleton(graph)
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = _inferred(proto)
    return {
        value.name: [int(d.dim_value) if d.HasField("dim_value") else None for d in shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.name in names and value.type.tensor_type.HasField("shape")
        for shape in [value.type.tensor_type.shape]
    }


def _inferred(proto: onnx.ModelProto) -> onnx.GraphProto:
    try:
        return native.infer_shapes(proto).graph
    except native.NativeError as error:
        raise ModelError(f"Shapes cannot be inferred ({error}). Export the model again.") from error


def _skeleton(graph: gs.Graph) -> onnx.ModelProto:
    with weights_left_out(graph, MAX_ELEMENTS):
        return exported(graph, graph.name)


def _dimension_names(graph: gs.Graph) -> set[str]:
    return {
        dimension
        for tensor in graph.tensors().values()
        for dimension in (tensor.shape or ())
        if isinstance(dimension, str)
    }


def _fill_in(tensor: gs.Variable, found: onnx.TypeProto.Tensor, names: set[str]) -> bool:
    changed = False
    if tensor.dtype is None and found.elem_type:
        tensor.dtype = _numpy_dtype(found.elem_type)
        changed = True
    if found.HasField("shape"):
        shape = _merge(tensor.shape, [_dimension(d, names) for d in found.shape.dim])
        changed |= tensor.shape is None or shape != list(tensor.shape)
        tensor.shape = shape
    return changed


def _numpy_dtype(elem_type: int) -> np.dtype | int:
    dtype: np.dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    # graphsurgeon keeps a type that numpy lacks as onnx's number
    return dtype if dtype.kind in "fiubcO" else elem_type


def _dimension(dimension: onnx.TensorShapeProto.Dimension, names: set[str]) -> Dimension:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return dimension.dim_param if dimension.dim_param in names else None


def _merge(known: Sequence[Dimension] | None, found: list[Dimension]) -> list[Dimension]:
    if known is None:
        return found
    if len(known) != len(found):
        return list(known)
    return [f if k is None else k for k, f in zip(known, found, strict=True)]
