"""Give every node of the outermost graph a name of its own.

A name that is unique stays. Of several nodes with one name the first keeps it, the others get
``name_1``, ``name_2``; a node without a name is called after its operator and first output,
which does not depend on its place in the file. A number is skipped where the result is taken.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.preparation.editing import unique_name

__all__ = ["name_nodes"]


def name_nodes(graph: gs.Graph) -> int:
    """Make the names of the nodes unique and non-empty; return how many were changed."""
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
