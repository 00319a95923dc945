"""Turn Constant nodes into initializers.

::

    Constant<value> -> w ; Conv(x, w)     =>     initializer w ; Conv(x, w)

The initializer gets the name of the node's output. A Constant stays if it holds strings or a type
that numpy lacks, if its output is a graph output (many readers expect a node there), or if a
subgraph reads its output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxqat.errors import ModelError
from onnxqat.nodes import is_op
from onnxqat.preparation.editing import constant_values, dtype_of, pinned_names, remove_nodes

__all__ = ["lift_constants", "read_typed_weights", "refuse_sparse"]

# https://onnx.ai/onnx/operators/onnx__Constant.html
_VALUE_DTYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def lift_constants(graph: gs.Graph) -> int:
    """Replace Constant nodes by initializers; return their number."""
    pinned = pinned_names(graph)
    lifted = []
    for node in graph.nodes:
        if not is_op(node, "Constant") or node.outputs[0].name in pinned:
            continue
        values = _value(node)
        if values is not None:
            node.outputs[0].to_constant(values)
            lifted.append(node)
    return remove_nodes(graph, lifted)


def refuse_sparse(graph: gs.Graph, where: str) -> None:
    """Refuse sparse initializers, which onnxqat can neither quantize nor train.

    Raises
    ------
    ModelError
        The graph has a sparse initializer.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
            message = f"{where}: initializer '{tensor.name}' is sparse. Export it dense."
            raise ModelError(message)


def read_typed_weights(graph: gs.Graph) -> None:
    """Load the initializers that the file stores in typed fields instead of raw bytes.

    graphsurgeon writes an initializer as raw bytes once its values have been read. Reading all of
    them makes the written file independent of which weights a pass happened to read.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues):
            stored = tensor._values.tensor
            typed = isinstance(stored, onnx.TensorProto) and not stored.HasField("raw_data")
            kind = dtype_of(tensor)
            # graphsurgeon has no raw form for strings, and writes 4-bit types wrongly
            if typed and kind is not None and kind.isbuiltin == 1 and kind.kind in "fiub":
                tensor.values = tensor.values


def _value(node: gs.Node) -> NDArray[Any] | None:
    if "value" in node.attrs:
        return constant_values(node.attrs["value"])
    for name, dtype in _VALUE_DTYPES.items():
        if name in node.attrs:
            return np.asarray(node.attrs[name], dtype)
    return None
