"""Put the nodes that stand for requantizations into a float graph, see `plan.requantization`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxqat.model import Model
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["with_requantizations"]


def with_requantizations(floats: Model, plan: QuantPlan) -> Model:
    """Return a float model with an Identity for each tensor that the plan requantizes.

    Parameters
    ----------
    floats : Model
        The prepared float model; it is not changed.
    plan : QuantPlan
        The plan of the model.

    Returns
    -------
    Model
        The same object if nothing is missing.
    """
    there = {node.name for node in floats.graph.nodes}
    missing = {name: of for name, of in plan.requantized().items() if name not in there}
    if not missing:
        return floats
    result = floats.copy()
    _add(result.graph, missing, {p.tensor: p for p in plan.grid_points() if p.tensor in missing})
    return result


def _add(graph: gs.Graph, sources: Mapping[str, str], points: Mapping[str, QuantPoint]) -> None:
    """Add the node of each point before its reader; ``sources`` names the tensors they read."""
    tensors = graph.tensors()
    pending: dict[str, list[str]] = {}
    for name, point in points.items():
        pending.setdefault(point.consumers[0].node, []).append(name)
    nodes: list[gs.Node] = []
    for node in list(graph.nodes):
        for name in pending.get(node.name, ()):
            source = tensors.get(sources[name])
            edges = points[name].consumers  # all are inputs of this node
            if any(
                e.index >= len(node.inputs) or node.inputs[e.index] is not source for e in edges
            ):
                continue  # another model: whoever needs the tensor reports it
            target = gs.Variable(name, source.dtype, source.shape)
            nodes.append(gs.Node("Identity", name, {}, [source], [target]))
            for edge in edges:
                node.inputs[edge.index] = target
        nodes.append(node)
    graph.nodes.clear()
    graph.nodes.extend(nodes)
