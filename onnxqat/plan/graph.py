"""Indexes of a float graph, shared by the steps of planning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import onnx_graphsurgeon as gs

from onnxqat.errors import PlanError
from onnxqat.nodes import weight_index
from onnxqat.overrides import Override
from onnxqat.plan.attention import Attention, find_attention
from onnxqat.plan.patterns import find_patterns
from onnxqat.plan.types import Edge

__all__ = ["GraphIndex", "Unit"]


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of the graph that a chip runs as one op: a node, or the nodes of a pattern.

    Attributes
    ----------
    kind : str
        Op type, or the name of the pattern.
    nodes : tuple of Node
        In the order of the graph; the last node writes the outputs of the unit.
    """

    kind: str
    nodes: tuple[gs.Node, ...]

    @property
    def name(self) -> str:
        """The name of the unit, which is that of its last node."""
        return str(self.nodes[-1].name)

    @property
    def outputs(self) -> list[gs.Tensor]:
        """The outputs of the unit."""
        return list(self.nodes[-1].outputs)

    @cached_property
    def inner(self) -> frozenset[str]:
        """Names of the tensors between the nodes of a pattern."""
        return frozenset(t.name for node in self.nodes[:-1] for t in node.outputs)

    def inputs(self) -> list[tuple[gs.Node, int, gs.Tensor]]:
        """Return the inputs of the unit, each as node, index of its input, and tensor."""
        return [
            (node, i, tensor)
            for node in self.nodes
            for i, tensor in enumerate(node.inputs)
            if tensor.name not in self.inner
        ]


@dataclass
class GraphIndex:
    """Nodes by name, units, and the readers of each tensor.

    Attributes
    ----------
    patterns : collection of str
        The patterns that become one unit.

    Raises
    ------
    PlanError
        Node names are not unique.
    """

    graph: gs.Graph
    patterns: Collection[str] = ()
    nodes: dict[str, gs.Node] = field(default_factory=dict)
    readers: dict[str, list[Edge]] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    unit_of: dict[str, Unit] = field(default_factory=dict)

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
        self._make_units()

    @cached_property
    def attention(self) -> list[Attention]:
        """The attention blocks, see `onnxqat.plan.attention`."""
        return find_attention(self.graph.nodes, self.readers)

    @cached_property
    def heads(self) -> dict[str, int]:
        """The number of heads of each product that gives queries, keys or values, by node name."""
        return {p.name: block.heads for block in self.attention for p in block.projections}

    def _make_units(self) -> None:
        found = find_patterns(self.graph, self.readers, self.patterns)
        patterns = [Unit(kind, nodes) for kind, nodes in found]
        self.unit_of = {node.name: unit for unit in patterns for node in unit.nodes}
        for node in self.graph.nodes:
            unit = self.unit_of.setdefault(node.name, Unit(node.op, (node,)))
            if unit.nodes[0] is node:
                self.units.append(unit)

    def weighted(self) -> list[gs.Node]:
        """Return the nodes with a constant weight, in order."""
        return [node for node in self.graph.nodes if weight_index(node) is not None]

    def selected(self, override: Override) -> list[str]:
        """Return the names of the nodes that an override's node selector matches."""
        if override.kind in ("first", "last"):
            return sorted(self.ends(override.kind))
        if override.kind == "between":
            return self._between(*override.tensors)
        attribute = "op" if override.kind == "op" else "name"
        return [n.name for n in self.graph.nodes if override.matches(getattr(n, attribute))]

    def ends(self, position: Literal["first", "last"]) -> frozenset[str]:
        """Return the names of the first or the last weighted nodes.

        A weighted node is first if there is a path to it from a graph input over nodes without
        weights, and last if there is such a path from it to a graph output.
        """
        return self._first if position == "first" else self._last

    @cached_property
    def _first(self) -> frozenset[str]:
        return self._reached(forward=True)

    @cached_property
    def _last(self) -> frozenset[str]:
        return self._reached(forward=False)

    def _reached(self, *, forward: bool) -> frozenset[str]:
        names = {n.name for n in self.weighted()}
        found, seen = set(), set()
        frontier = list(self.graph.inputs if forward else self.graph.outputs)
        while frontier:
            tensor = frontier.pop()
            for node in tensor.outputs if forward else tensor.inputs:
                if node.name in seen:
                    continue
                seen.add(node.name)
                if node.name in names:
                    found.add(node.name)
                else:
                    frontier += node.outputs if forward else node.inputs
        return frozenset(found)

    def _between(self, start: str, end: str) -> list[str]:
        """Return the nodes on the paths from tensor ``start`` to tensor ``end``."""
        tensors = self.graph.tensors()
        if start not in tensors or end not in tensors:
            return []
        after, frontier = set(), [tensors[start]]
        while frontier:
            for node in frontier.pop().outputs:
                if node.name not in after:
                    after.add(node.name)
                    frontier += node.outputs
        before: set[str] = set()
        frontier = [tensors[end]]
        while frontier:
            for node in frontier.pop().inputs:
                if node.name in after and node.name not in before:
                    before.add(node.name)
                    frontier += node.inputs
        return [node.name for node in self.graph.nodes if node.name in before]
