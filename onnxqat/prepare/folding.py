"""Compute at once what only rearranges or converts an initializer.

::

    initializer v -> Transpose -> w ; MatMul(x, w)     =>     initializer w ; MatMul(x, w)

Transpose, Reshape, Flatten, Squeeze, Unsqueeze move values; Cast converts between float types,
between integer types, and from integers or booleans to float types, where the result is exact or
rounded once, the same in numpy and every runtime. Left as they are: casts from float to integer,
which runtimes saturate differently, and those to float16 that onnxruntime rounds twice, by way
of float32. The result has the name of the node's output, which must not be a graph output or
read in a subgraph. A node that cannot be evaluated is left for the runtime to complain of.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.prepare.editing import constant_values, is_op, pinned_names, remove_nodes

__all__ = ["fold_constants"]

Array = NDArray[Any]


def fold_constants(graph: gs.Graph) -> int:
    """Replace the operators above by their results; return how many."""
    pinned = pinned_names(graph)
    folded = []
    for node in graph.nodes:
        if not is_op(node, *_EVALUATORS) or node.outputs[0].name in pinned:
            continue
        inputs = [constant_values(tensor) for tensor in node.inputs]
        present = [values for values in inputs if values is not None]
        if not present or len(present) != len(inputs):
            continue
        try:
            result = _EVALUATORS[node.op](node, present)
        except (ValueError, IndexError):
            continue
        if result is not None:
            node.outputs[0].to_constant(np.ascontiguousarray(result).reshape(result.shape))
            folded.append(node)
    return remove_nodes(graph, folded)


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


def _cast(node: gs.Node, inputs: list[Array]) -> Array | None:
    try:
        target = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    except KeyError:
        return None
    source = inputs[0].dtype
    between_integers = source.kind in "iub" and target.kind in "iu"
    rounds_once = target.itemsize > 2 or source == np.float32 or source.itemsize <= 2
    if not between_integers and not (target.kind == "f" and rounds_once):
        return None
    with np.errstate(over="ignore"):  # float32 above float16's range is infinite there
        return inputs[0].astype(target)


_EVALUATORS = {
    "Cast": _cast,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
