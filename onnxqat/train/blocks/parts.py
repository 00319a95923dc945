"""A block as a model of its own: cut out of the float graph, with the pairs that it has there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec
import numpy as np

from onnxqat.model import Model
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.plan import Edge, QuantPlan, QuantPoint
from onnxqat.preparation.editing import names_in_subgraphs
from onnxqat.preparation.unused import remove_unused
from onnxqat.qparams import FloatArray
from onnxqat.quantized import QuantizedModel
from onnxqat.train.blocks.cut import Block

__all__ = ["between", "block_model", "quantized_crossings", "values_of"]


def between(
    model: Model,
    inputs: Collection[str],
    outputs: Collection[str],
    shapes: Mapping[str, tuple[int | str, ...]],
) -> Model:
    """Return the part of a float model that computes some tensors from others.

    Parameters
    ----------
    model : Model
        Not changed.
    inputs, outputs : collection of str
        Names of tensors.
    shapes : mapping of str to tuple
        Of what is no input of the model itself, see `onnxqat.train.lowering.sample_shapes`.
    """
    part = model.copy()
    graph, tensors = part.graph, part.graph.tensors()
    batches = {tensor.name: tensor.shape for tensor in graph.inputs}
    for name in (*inputs, *outputs):
        if name not in batches:
            tensors[name].shape = list(shapes[name])
    for name in inputs:
        tensors[name].inputs.clear()
    graph.inputs = [tensors[name] for name in inputs]
    graph.outputs = [tensors[name] for name in outputs]
    remove_unused(graph)
    part.metadata = {}
    return part


def quantized_crossings(model: QuantizedModel, blocks: Iterable[Block]) -> frozenset[str]:
    """Return the outputs of blocks that all who read them outside read behind their pair.

    They cross a cut on their grid, and the pair belongs to the block that computes them. The
    others cross as they are before their pair.
    """
    graph = model.floats.graph
    points = {point.tensor: point for point in model.plan.grid_points()}
    block_of = {node: number for number, block in enumerate(blocks) for node in block.nodes}
    made_in = {t.name: block_of[node.name] for node in graph.nodes for t in node.outputs}
    edges: dict[str, set[Edge]] = {}
    hidden: set[str] = set()  # read in a subgraph, where no pair is
    for node in graph.nodes:
        hidden |= names_in_subgraphs([node])
        for index, tensor in enumerate(node.inputs):
            if made_in.get(tensor.name, block_of[node.name]) != block_of[node.name]:
                edges.setdefault(tensor.name, set()).add(Edge(node.name, index))
    for index, tensor in enumerate(graph.outputs):
        edges.setdefault(tensor.name, set()).add(Edge("", index))
    return frozenset(
        name
        for name, readers in edges.items()
        if name in points and name not in hidden and readers <= set(points[name].consumers)
    )


def block_model(
    model: QuantizedModel,
    block: Block,
    crossings: frozenset[str],
    shapes: Mapping[str, tuple[int | str, ...]],
) -> QuantizedModel:
    """Return a block of a quantized model, with the parameters that it has there.

    Parameters
    ----------
    model : QuantizedModel
        The whole one, as it is at this moment. Not changed; weights are shared.
    crossings : frozenset of str
        See `quantized_crossings`: such an input comes on its grid, such an output leaves on it.
    """
    floats = between(model.floats, block.inputs, block.outputs, shapes)
    nodes = {node.name for node in floats.graph.nodes}
    computed = set(model.floats.graph.tensors()) - {t.name for t in model.floats.graph.inputs}
    arriving = crossings & set(block.inputs) & computed

    def here(point: QuantPoint) -> QuantPoint:
        edges = [edge for edge in point.consumers if edge.node in nodes]
        if point.tensor in arriving:
            edges = []
        if point.tensor in crossings and point.tensor in block.outputs:
            edges.append(Edge("", block.outputs.index(point.tensor)))
        return msgspec.structs.replace(point, consumers=tuple(edges))

    points = tuple(point for point in map(here, model.plan.points) if point.consumers)
    plan: QuantPlan = msgspec.structs.replace(model.plan, points=points)
    params = {p.parameters: model.params[p.parameters] for p in plan.grid_points()}
    return model.with_params(params, state="calibrated", plan=plan, floats=floats)


def values_of(model: QuantizedModel, weights: Iterable[str]) -> dict[str, FloatArray]:
    """Return weights, scales and zero points by the names that they have in a training form."""
    tensors = model.floats.graph.tensors()
    found = {name: np.asarray(tensors[name].values, np.float32) for name in weights}
    for name, params in model.params.items():
        found[scale_name(name)] = params.scale
        found[zero_point_name(name)] = params.zero_point.astype(np.float32)
    return found
