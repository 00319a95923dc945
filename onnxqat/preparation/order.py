"""Put the nodes in topological order, moving only those that must move.

A node comes after the producers of all values that it or its subgraphs read. Nodes are visited in
the order of the file, and a producer that comes too late is moved to just before its first
consumer. A file that is already in order stays unchanged (graphsurgeon's ``toposort`` would sort
it by depth).
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError
from onnxqat.preparation.editing import names_in_subgraphs

__all__ = ["sort_nodes"]


def sort_nodes(graph: gs.Graph) -> int:
    """Sort the nodes; return how many changed their place.

    Raises
    ------
    ModelError
        The graph has a cycle, or two nodes write one value.
    """
    producers: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for tensor in node.outputs:
            if tensor.name and producers.setdefault(tensor.name, index) != index:
                message = (
                    f"'{tensor.name}' is written by more than one node. Export the model again."
                )
                raise ModelError(message)
    needs = []
    for node in graph.nodes:
        names = {tensor.name: None for tensor in node.inputs}
        names.update(dict.fromkeys(sorted(names_in_subgraphs([node]))))
        needs.append([producers[name] for name in names if name in producers])
    order = _visit(needs, [node.name for node in graph.nodes])
    moved = sum(old != new for new, old in enumerate(order))
    if moved:
        graph.nodes = [graph.nodes[index] for index in order]
    return moved


def _visit(needs: list[list[int]], names: list[str]) -> list[int]:
    """Sort depth-first without recursion, because chains can be longer than Python's stack."""
    order: list[int] = []
    done, open_ = [False] * len(needs), [False] * len(needs)
    for start in range(len(needs)):
        stack = [start]
        while stack:
            index = stack[-1]
            waiting = [need for need in needs[index] if not done[need]]
            if done[index] or not waiting:
                stack.pop()
                if not done[index]:
                    done[index] = True
                    order.append(index)
                continue
            open_[index] = True
            if any(open_[need] for need in waiting):
                message = (
                    f"The graph has a cycle through node '{names[index]}'. Export the model again."
                )
                raise ModelError(message)
            stack.extend(reversed(waiting))
    return order
