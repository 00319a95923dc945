"""Divide the channels of a network by scales, by changing its constants."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import bias_index
from onnxqat.repair.channels import Network
from onnxqat.repair.editor import Editor, bias_of
from onnxqat.repair.layers import Layer

__all__ = ["scale_channels"]

Floats = NDArray[np.float64]


def scale_channels(graph: gs.Graph, network: Network, scales: Floats) -> tuple[str, ...]:
    """Scale weights, biases and added constants; return the names of the changed layers.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The graph; it is changed.
    network : Network
        The channels of the graph.
    scales : array of shape (channel numbers,), float64
        The divisor of each channel.
    """
    editor = Editor(graph)
    changed = []
    for layer in network.layers:
        if np.any(scales[layer.inputs] != 1) or np.any(scales[layer.outputs] != 1):
            _scale_layer(layer, scales, editor)
            changed.append(str(layer.node.name))
    for norm, ids in network.norms:
        for position in norm.constants if np.any(scales[ids] != 1) else ():
            values = norm.node.inputs[position].values.astype(np.float64)
            editor.replace(norm.node, position, values / scales[ids], "scaled")
    for shift in network.shifts:
        if np.any(scales[shift.ids] != 1):
            values = shift.node.inputs[shift.position].values.astype(np.float64)
            scaled = values / scales[shift.ids]
            shape = values.shape if scaled.size == values.size else scaled.shape
            editor.replace(shift.node, shift.position, scaled.reshape(shape), "added")
    return tuple(changed)


def _scale_layer(layer: Layer, scales: Floats, editor: Editor) -> None:
    """Apply W -> W * s_in / s_out and b -> b / s_out, in float64, rounded once."""
    node, inputs, outputs = layer.node, scales[layer.inputs], scales[layer.outputs]
    weight = node.inputs[1].values
    factors = inputs[:, None, :, None] / outputs[:, :, None, None]
    matrix = layer.matrix(weight.astype(np.float64)) * factors
    editor.replace(node, 1, layer.stored(matrix, weight.shape), "weight")
    bias, index = bias_of(node), bias_index(node)
    if bias is not None and index is not None:
        scaled = bias.values.astype(np.float64) / outputs.reshape(-1)
        editor.replace(node, index, scaled, "bias")
