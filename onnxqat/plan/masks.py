"""Find masks: additions that drown values on purpose, which no 8-bit grid can hold.

A transformer adds a mask to the scores before Softmax: 0 where it may look, -1e4, -inf or the
smallest float where it may not. On one grid with the mask every score would be rounded away
(measured: perplexity 4.2 with the masks left float, 53 with the masks quantized).

*Data* is what comes from a float graph input, an 8-bit one behind a Cast, a table that is looked
up, or a weighted op. A float tensor that is none of it was computed from shapes, indices and
constants.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.plan.operators import WEIGHTED_OPS, is_constant, is_float

__all__ = ["find_masks"]

MASKING_OPS = ("Add", "Sub", "Where")
MOVING_OPS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice")
SMALLEST_MASK = -50.0  # exp(-50) of a score is nothing


def find_masks(graph: gs.Graph) -> tuple[dict[str, str], frozenset[str]]:
    """Return why each node that adds a mask, or moves what it wrote, stays float.

    Returns
    -------
    reasons : dict of str to str
        By name of the node.
    tensors : frozenset of str
        What these nodes write; they get no point.
    """
    data = _data_tensors(graph)
    reasons: dict[str, str] = {}
    masked: set[str] = set()
    for node in graph.nodes:
        reason = None
        if node.op in MASKING_OPS:
            reason = _masking_reason(node, data)
        elif node.op in MOVING_OPS and node.inputs[0].name in masked:
            reason = f"moves '{node.inputs[0].name}', to which a mask was added"
        if reason is not None:
            reasons[node.name] = reason
            masked.update(t.name for t in node.outputs)
    return reasons, frozenset(masked)


def _data_tensors(graph: gs.Graph) -> set[str]:
    data = {t.name for t in graph.inputs if is_float(t)}
    bytes_in = {
        t.name for t in graph.inputs if t.dtype is not None and np.dtype(t.dtype).itemsize == 1
    }
    for node in graph.nodes:
        looked_up = node.op == "Gather" and is_constant(node.inputs[0]) and is_float(node.inputs[0])
        pixels = node.op == "Cast" and node.inputs[0].name in bytes_in
        known = any(t.name in data for t in node.inputs)
        if known or looked_up or pixels or node.op in WEIGHTED_OPS:
            data.update(t.name for t in node.outputs if is_float(t))
    return data


def _masking_reason(node: gs.Node, data: set[str]) -> str | None:
    if not any(t.name in data for t in node.inputs):
        return None
    for tensor in node.inputs:
        if is_constant(tensor) and is_float(tensor) and _is_mask(tensor):
            return f"adds the constant mask '{tensor.name}'"
        if not is_constant(tensor) and is_float(tensor) and tensor.name not in data:
            return f"adds the mask '{tensor.name}', computed from no data"
    return None


def _is_mask(tensor: gs.Tensor) -> bool:
    """Return whether a constant holds nothing but 0 and one very negative value."""
    values = np.asarray(tensor.values)
    if values.size == 0 or not values.min() <= SMALLEST_MASK:
        return False
    return bool(np.all((values == 0) | (values == values.min())))
