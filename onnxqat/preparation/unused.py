"""Remove nodes that no graph output needs.

A node is needed if it writes a graph output, or a value that a needed node or its subgraphs read.
Graph inputs always stay, because they are the model's interface. Initializers stay if something
reads them. Subgraphs and functions are not changed.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.preparation.editing import names_in_subgraphs, remove_nodes

__all__ = ["remove_unused"]


def remove_unused(graph: gs.Graph) -> int:
    """Remove unneeded nodes from a sorted graph; return their number."""
    needed = {tensor.name for tensor in graph.outputs}
    unused = []
    for node in reversed(graph.nodes):
        if any(tensor.name in needed for tensor in node.outputs if tensor.name):
            needed.update(tensor.name for tensor in node.inputs)
            needed.update(names_in_subgraphs([node]))
        else:
            unused.append(node)
    return remove_nodes(graph, unused)
