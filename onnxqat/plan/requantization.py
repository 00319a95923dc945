"""Tensors that are read at two scales: the op that needs another scale requantizes its input.

An op with ``parameters = "align_to_output"`` reads all inputs at the scale of its output. A tensor
that only this op reads takes that scale. A tensor that others read too, or that a node with
``passthrough`` writes, keeps its own parameters and is requantized for the op. This is what
``QuantAlignmentPass`` with ``force_overlap = False`` of esp-ppq 1.3.12 does
(``esp_ppq/quantization/optim/refine.py``).

The requantized tensor has a point of its own in the group of the output. In the graph of a
quantized model, an Identity of the same name writes it::

    t -> Q -> DQ -> t/dequantized -+-> Conv
                                   +-> Identity -> t/requantized/add -> Q -> DQ -> add
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxqat.nodes import is_constant, is_op
from onnxqat.plan.graph import GraphIndex
from onnxqat.plan.types import REQUANTIZED, Edge
from onnxqat.preparation.editing import remove_nodes, replace_input
from onnxqat.rules import OpRule

__all__ = [
    "is_requantization",
    "remove_requantizations",
    "requantized_edges",
    "without_requantizations",
]


def requantized_edges(index: GraphIndex, ops: Mapping[str, OpRule]) -> dict[Edge, str]:
    """Return the inputs that are requantized for their node, and the names of these tensors.

    Parameters
    ----------
    ops : mapping of str to OpRule
        The table of each quantized unit, by name.
    """
    return {
        Edge(node.name, i): f"{tensor.name}{REQUANTIZED}{unit.name}"
        for unit in index.units
        if unit.name in ops and ops[unit.name].parameters == "align_to_output"
        for node, i, tensor in unit.inputs()
        if not is_constant(tensor) and _keeps_its_parameters(index, ops, tensor)
    }


def _keeps_its_parameters(index: GraphIndex, ops: Mapping[str, OpRule], tensor: gs.Tensor) -> bool:
    """Return whether a tensor cannot take the parameters of one reader's output."""
    writer = tensor.inputs[0] if tensor.inputs else None
    written = [tensor] if writer is None else writer.outputs
    edges = {e for t in written for e in index.readers.get(t.name, ()) if e.node}
    units = {e: index.unit_of[e.node] for e in edges}
    # the nodes of a pattern are one reader
    readers = {unit.name if len(unit.nodes) > 1 else edge for edge, unit in units.items()}
    table = None if writer is None else ops.get(index.unit_of[writer.name].name)
    return len(readers) > 1 or (table is not None and table.parameters == "passthrough")


def is_requantization(node: gs.Node) -> bool:
    """Return whether a node stands for a requantization; the prepared graph has no such nodes."""
    return is_op(node, "Identity") and REQUANTIZED in node.name


def remove_requantizations(graph: gs.Graph) -> None:
    """Remove the nodes that stand for requantizations from a float graph."""
    found = [node for node in graph.nodes if is_requantization(node)]
    for node in found:
        replace_input(node.outputs[0], node.inputs[0])
    remove_nodes(graph, found)


def without_requantizations(graph: gs.Graph) -> gs.Graph:
    """Return the graph without such nodes; the same object if it has none."""
    if not any(map(is_requantization, graph.nodes)):
        return graph
    result = graph.copy()
    remove_requantizations(result)
    return result
