"""Make a block a separate model: a part of the float graph, with its Q/DQ pairs."""

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
        The model; it is not changed.
    inputs, outputs : collection of str
        Names of tensors.
    shapes : mapping of str to tuple
        Shapes of inputs that are not inputs of the model, see
        `onnxqat.train.lowering.sample_shapes`.
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
    """Return the outputs of blocks that all outside readers read behind their Q/DQ pair.

    These cross a cut as quantized values, and their pair belongs to the block that computes them.
    Other outputs cross as float values, before their pair.
    """
    graph = model.floats.graph
    points = {point.tensor: point for point in model.plan.grid_points()}
    block_of = {node: number for number, block in enumerate(blocks) for node in block.nodes}
    made_in = {t.name: block_of[node.name] for node in graph.nodes for t in node.outputs}
    edges: dict[str, set[Edge]] = {}
    hidden: set[str] = set()  # read in a subgraph, which has no pairs
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
    """Return a block of a quantized model as a separate quantized model.

    Parameters
    ----------
    model : QuantizedModel
        The whole model in its current state. It is not changed; weights are shared.
    crossings : frozenset of str
        See `quantized_crossings`: these inputs and outputs of the block are quantized values.
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
    """Return weights, scales and zero points by their names in a training form."""
    tensors = model.floats.graph.tensors()
    found = {name: np.asarray(tensors[name].values, np.float32) for name in weights}
    for name, params in model.params.items():
        found[scale_name(name)] = params.scale
        found[zero_point_name(name)] = params.zero_point.astype(np.float32)
    return found
