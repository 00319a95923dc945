"""Cut a graph into blocks.

A block is a range of nodes in graph order. Its inputs are the tensors that it reads from earlier
nodes, and its outputs are the tensors that later nodes read. A cut is possible where each tensor
that crosses it has one row per sample. Among the possible cuts, the best has, in this order,

1. the fewest layers beyond twice the limit,
2. the fewest additional tensors that cross a cut (beyond one): residual blocks stay whole, and the
   branches of a detector are cut where few run side by side,
3. the fewest layers beyond the limit,
4. the fewest blocks,
5. blocks of equal size.

Between two layers there are several possible places, for example before and behind an activation
function. The last one is used, so that a block ends behind the Relu of its last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxqat.model import Model
from onnxqat.nodes import weight_index
from onnxqat.preparation.editing import names_in_subgraphs

__all__ = ["Block", "cut"]

Cost = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A range of the nodes of a graph.

    Attributes
    ----------
    inputs : tuple of str
        The tensors that the block reads: inputs of the model, and outputs of earlier blocks.
    outputs : tuple of str
        The tensors of the block that later blocks read, or that are outputs of the model.
    nodes, layers : tuple of str
        Names of the nodes, and of the nodes with a weight.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


def cut(model: Model, shapes: Mapping[str, tuple[int | str, ...]], limit: int) -> tuple[Block, ...]:
    """Return the blocks of a float model, in order; each node is in exactly one block.

    Parameters
    ----------
    model : Model
        A prepared model, whose nodes are sorted and have names.
    shapes : mapping of str to tuple
        The tensors that may cross a cut, see `onnxqat.train.lowering.sample_shapes`.
    limit : int
        The most layers with a weight in a block if the graph can be cut there at one tensor; twice
        as many if several tensors run side by side.
    """
    stretch = _Stretches(model.graph)
    places = [-1, *_places(stretch, shapes), len(stretch.nodes) - 1]
    best: list[tuple[Cost, int]] = [
        ((0, 0, 0, 0, 0), -1)
    ]  # for each place: the best cost up to it, and the previous cut
    for end in range(1, len(places)):
        crossing = max(len(stretch.crossing(places[end])) - 1, 0)
        found = []
        for start in range(end):
            layers = stretch.layers_between(places[start], places[end])
            excess = max(layers - 2 * limit, 0), max(layers - limit, 0)
            cost = excess[0], crossing, excess[1], 1, layers**2
            total = tuple(a + b for a, b in zip(best[start][0], cost, strict=True))
            found.append((total, start))
        best.append(min(found))
    ends = []
    place = len(places) - 1
    while place > 0:
        ends.append(places[place])
        place = best[place][1]
    ends.reverse()
    return tuple(stretch.block(a, b) for a, b in zip([-1, *ends[:-1]], ends, strict=True))


def _places(stretch: _Stretches, shapes: Mapping[str, tuple[int | str, ...]]) -> Iterator[int]:
    """Yield the nodes behind which to cut: between two layers, the last of the best places."""
    best: tuple[int, int] | None = None  # the number of crossing tensors, and the place
    for place, node in enumerate(stretch.nodes[:-1]):
        if weight_index(node) is not None and best is not None:
            yield best[1]
            best = None
        crossing = stretch.crossing(place)
        seen_layer = stretch.layers_between(-1, place) > 0
        possible = crossing and all(name in shapes for name in crossing)
        if seen_layer and possible and (best is None or len(crossing) <= best[0]):
            best = len(crossing), place
    if best is not None and stretch.layers_between(best[1], len(stretch.nodes) - 1):
        yield best[1]


class _Stretches:
    """The writers and readers of the tensors of a graph, by the positions of the nodes."""

    def __init__(self, graph: gs.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.outputs = [tensor.name for tensor in graph.outputs]
        self.made = {tensor.name: -1 for tensor in graph.inputs}
        self.last: dict[str, int] = {}  # the position of the last reader of each tensor
        self.reads: list[list[str]] = []
        self._layers = [0]
        for position, node in enumerate(self.nodes):
            names = [t.name for t in node.inputs if not isinstance(t, gs.Constant)]
            names += sorted(names_in_subgraphs([node]))
            self.reads.append([name for name in names if name in self.made])
            self.last.update(dict.fromkeys(self.reads[-1], position))
            self.made.update({t.name: position for t in node.outputs if t.name})
            self._layers.append(self._layers[-1] + (weight_index(node) is not None))
        self._crossing = self._count_crossing()

    def _count_crossing(self) -> list[list[str]]:
        """Return the tensors that cross behind each node: computed before it, and read later."""
        found: list[list[str]] = [[] for _ in self.nodes]
        for name, made in self.made.items():
            if made >= 0:
                for position in range(made, self.last.get(name, made)):
                    found[position].append(name)
        return found

    def crossing(self, position: int) -> list[str]:
        """Return the computed tensors that are read behind a node."""
        return self._crossing[position]

    def layers_between(self, before: int, last: int) -> int:
        """Return the number of layers behind node ``before``, up to ``last``."""
        return self._layers[last + 1] - self._layers[before + 1]

    def block(self, before: int, last: int) -> Block:
        """Return the block of the nodes behind ``before``, up to ``last``."""
        nodes: Sequence[gs.Node] = self.nodes[before + 1 : last + 1]
        reads = (name for names in self.reads[before + 1 : last + 1] for name in names)
        made = [t.name for node in nodes for t in node.outputs if t.name]
        return Block(
            inputs=tuple(dict.fromkeys(n for n in reads if self.made[n] <= before)),
            outputs=tuple(n for n in made if self.last.get(n, -1) > last or n in self.outputs),
            nodes=tuple(node.name for node in nodes),
            layers=tuple(node.name for node in nodes if weight_index(node) is not None),
        )
