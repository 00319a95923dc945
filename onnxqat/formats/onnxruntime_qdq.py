"""The Q/DQ model that onnxruntime runs with integer kernels.

Weights become integer initializers followed by DequantizeLinear. Biases become int32 initializers
followed by DequantizeLinear with scale ``s_x * s_w`` and zero_point 0, as onnxruntime's selectors
require (``onnxruntime/core/optimizer/qdq_transformer/selectors_actions``, release 1.19.2).
Activations keep their pairs. The file is about a quarter of the size of the float model.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import FormatError
from onnxqat.model import Model, constant
from onnxqat.nodes import along_channels, bias_channels, biased_node, runs_along
from onnxqat.pairs import dequantized_name, node_name, node_names, scale_name, zero_point_name
from onnxqat.plan import QuantPoint
from onnxqat.preparation.editing import remove_nodes
from onnxqat.qparams import FloatArray, QuantParams, quantize
from onnxqat.quantized import QuantizedModel, without_notes
from onnxqat.snap import snap_weights

__all__ = ["bias_scale", "integer_model", "quantize_bias"]


def bias_scale(x: QuantParams, w: QuantParams, size: int) -> FloatArray:
    """Return the scale of a bias of ``size`` elements: s_x * s_w in float32, () or (N,).

    In a grouped ConvTranspose, channels at the same position in their groups share a weight scale,
    so the scales are repeated for each group. A bias of one element gets a scale for each of the N
    channels that read it.
    """
    scale: FloatArray = np.asarray(x.scale * w.scale, np.float32)
    return np.tile(scale, max(size // scale.size, 1)) if scale.ndim else scale


def quantize_bias(bias: FloatArray, scale: FloatArray, name: str) -> NDArray[np.int32]:
    """Return ``round(bias / scale)`` as int32, same shape, ties to even.

    Raises
    ------
    FormatError
        A value does not fit into int32.
    """
    levels = np.rint(np.asarray(bias, np.float64) / scale)
    limits = np.iinfo(np.int32)
    if levels.size and (levels.min() < limits.min or levels.max() > limits.max):
        raise FormatError(
            f"Bias '{name}': bias / (s_x * s_w) reaches {np.abs(levels).max():.3g}, beyond int32. "
            "The weights of this layer are almost zero; calibrate again."
        )
    return levels.astype(np.int32)


def integer_model(
    model: QuantizedModel, *, biases: bool = True, float_weights: Set[str] = frozenset()
) -> Model:
    """Return a calibrated or fine-tuned Q/DQ model with integer weights and biases.

    Parameters
    ----------
    biases : bool
        Convert the biases that the plan quantizes to integers; otherwise all stay float.
    float_weights : set of str
        Weights that stay float, rounded to their grid, without Q/DQ.

    Raises
    ------
    PlanError
        The model is not calibrated.
    FormatError
        A bias does not fit into int32.
    """
    model.check_calibrated()
    plan, params = model.plan, model.params
    result = model.qdq()
    graph = result.graph
    nodes = {n.name: n for n in graph.nodes}
    tensors = graph.tensors()
    points = {p.tensor: p for p in plan.grid_points()}
    removed: set[str] = set()
    for point in points.values():
        if point.tensor in float_weights:
            removed |= _store_floats(point, nodes)
        elif point.role == "weight":
            removed |= _store_integers(point, params[point.parameters], nodes, tensors)
    for bias in plan.points if biases else ():
        if bias.derived_from is not None:
            x, w = (params[points[name].parameters] for name in bias.derived_from)
            _store_bias(bias, x, w, nodes, tensors, graph)
    remove_nodes(graph, [node for node in graph.nodes if node.name in removed])
    result.metadata = without_notes(result.metadata)
    snapped = (points[name] for name in points if name in float_weights)
    snap_weights(graph, ((p, params[p.parameters]) for p in snapped))
    return result


def _store_integers(
    point: QuantPoint,
    params: QuantParams,
    nodes: dict[str, gs.Node],
    tensors: dict[str, gs.Tensor],
) -> set[str]:
    """Feed a weight's DequantizeLinear with integers; return the names of nodes to remove."""
    integers = quantize(tensors[point.tensor].values, params, point.spec)
    dequantize = nodes[node_name(point.tensor, "DequantizeLinear")]
    dequantize.inputs[0] = constant(f"{point.tensor}/integers", integers)
    return ({*node_names(point.tensor)} - {dequantize.name}) & nodes.keys()


def _store_floats(point: QuantPoint, nodes: dict[str, gs.Node]) -> set[str]:
    """Connect a weight directly to its consumers; return the names of its pair, to be removed."""
    pair = {*node_names(point.tensor)} & nodes.keys()
    weight = nodes[node_name(point.tensor, "QuantizeLinear")].inputs[0]
    for edge in point.consumers:
        nodes[edge.node].inputs[edge.index] = weight
    return pair


def _store_bias(
    bias: QuantPoint,
    x: QuantParams,
    w: QuantParams,
    nodes: dict[str, gs.Node],
    tensors: dict[str, gs.Tensor],
    graph: gs.Graph,
) -> None:
    values: Any = tensors[bias.tensor].values
    edge = bias.consumers[0]
    name = f"{edge.node}/bias"  # by node, since nodes with different scales may share one bias
    reader = nodes[edge.node]
    weighted = biased_node(reader, edge.index)
    _, weight = bias.derived_from or ("", "")
    channels = bias_channels(weighted, tensors[weight].values.shape) if weighted else None
    if channels is None or not runs_along(values.shape, channels):
        return  # an earlier version of onnxqat wrote the file; the bias stays float
    values = along_channels(values, channels)  # the only shape that every kernel takes
    scale = bias_scale(x, w, channels)
    integers = constant(f"{name}/integers", quantize_bias(values, scale, bias.tensor))
    zero_point = constant(zero_point_name(name), np.zeros(scale.shape, np.int32))
    output = gs.Variable(dequantized_name(name), np.float32, values.shape)
    attributes = {"axis": 0} if scale.ndim else {}
    inputs = [integers, constant(scale_name(name), scale), zero_point]
    title = node_name(name, "DequantizeLinear")
    node = gs.Node("DequantizeLinear", title, attributes, inputs, [output])
    graph.nodes.insert(_position(graph, reader), node)
    reader.inputs[edge.index] = output


def _position(graph: gs.Graph, node: gs.Node) -> int:
    return next(i for i, n in enumerate(graph.nodes) if n is node)
