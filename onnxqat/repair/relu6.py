"""Put a Relu in the place of a Clip from 0, such as ReLU6, which no scale passes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.nodes import is_op
from onnxqat.preparation.editing import scalar

__all__ = ["replace_relu6"]


def replace_relu6(graph: gs.Graph) -> tuple[str, ...]:
    """Replace each Clip from 0 to a finite number; return their names."""
    replaced = []
    for node in graph.nodes:
        if is_op(node, "Clip") and _cuts_from_zero(node):
            node.op, node.inputs = "Relu", node.inputs[:1]
            replaced.append(str(node.name))
    return tuple(replaced)


def _cuts_from_zero(node: gs.Node) -> bool:
    limits = [scalar(tensor) for tensor in node.inputs[1:3]]
    if len(limits) < 2 or None in limits:
        return False
    return bool(limits[0] == 0 and 0 < limits[1] < np.inf)
