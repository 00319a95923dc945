"""Indexes over a float graph that the steps of planning share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from onnxqat.errors import PlanError
from onnxqat.overrides import Override
from onnxqat.plan.operators import weight_index
from onnxqat.plan.types import Edge

__all__ = ["GraphIndex"]


@dataclass
class GraphIndex:
    """Nodes by name, and who reads each tensor.

    Raises
    ------
    PlanError
        Node names are not unique.
    """

    graph: gs.Graph
    nodes: dict[str, gs.Node] = field(default_factory=dict)
    readers: dict[str, list[Edge]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = Counter(node.name for node in self.graph.nodes)
        twice = next((n for n, count in counts.items() if count > 1 or not n), None)
        if twice is not None:
            raise PlanError(f"Node name '{twice}' is not unique. Prepare the model first.")
        for node in self.graph.nodes:
            self.nodes[node.name] = node
            for i, tensor in enumerate(node.inputs):
                self.readers.setdefault(tensor.name, []).append(Edge(node.name, i))
        for i, tensor in enumerate(self.graph.outputs):
            self.readers.setdefault(tensor.name, []).append(Edge("", i))

    def weighted(self) -> list[gs.Node]:
        """Return the nodes with a constant weight, in order."""
        return [node for node in self.graph.nodes if weight_index(node) is not None]

    def selected(self, override: Override) -> list[str]:
        """Return the names of the nodes that a node selector covers."""
        if override.kind in ("first", "last"):
            return self._ends(first=override.kind == "first")
        attribute = "op" if override.kind == "op" else "name"
        return [n.name for n in self.graph.nodes if override.matches(getattr(n, attribute))]

    def _ends(self, *, first: bool) -> list[str]:
        """Return the weighted nodes that no weighted node precedes (or follows) on some path.

        A weighted node is first when a graph input reaches it over nodes without weights, and
        last when it reaches a graph output so.
        """
        names = {n.name for n in self.weighted()}
        found: list[str] = []
        seen: set[str] = set()
        frontier = list(self.graph.inputs if first else self.graph.outputs)
        while frontier:
            tensor = frontier.pop()
            for node in tensor.outputs if first else tensor.inputs:
                if node.name in seen:
                    continue
                seen.add(node.name)
                if node.name in names:
                    found.append(node.name)
                else:
                    frontier += node.outputs if first else node.inputs
        return found
