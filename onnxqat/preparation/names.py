"""Give every node of the outermost graph a unique name.

Unique names stay. If several nodes have the same name, the first keeps it and the others become
``name_1``, ``name_2``. A node without a name is named after its operator and its first output,
because these do not depend on its place in the file. Numbers whose name is taken are skipped.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.preparation.editing import unique_name

__all__ = ["name_nodes"]


def name_nodes(graph: gs.Graph) -> int:
    """Make the names of the nodes unique and non-empty; return the number of changed names."""
    taken = {node.name for node in graph.nodes}
    seen = {""}
    changed = 0
    for node in graph.nodes:
        if node.name in seen:
            first_output = next((t.name for t in node.outputs if t.name), "")
            wanted = node.name or f"{node.op}_{first_output}"
            node.name = unique_name(wanted, taken)
            changed += 1
        seen.add(node.name)
    return changed
