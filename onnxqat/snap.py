"""Weights on their grid in a float graph, for the readers that the chip gives integers.

A constant may have readers that stay float: other nodes, subgraphs, a bias, the graph's outputs.
They keep its values, in a constant of their own; the name stays with the quantized readers, since
tables know it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.model import constant
from onnxqat.pairs import float_name
from onnxqat.plan import Edge, QuantPoint
from onnxqat.preparation.editing import tensor_names, unique_name
from onnxqat.qparams import QuantParams, fake_quantize

__all__ = ["snap_weights"]


def snap_weights(graph: gs.Graph, weights: Iterable[tuple[QuantPoint, QuantParams]]) -> None:
    """Put weights on their grid, ``round(w / s) * s``, for the consumers of their points.

    What is an output as well stays as it is: its values are asked for under its name.
    """
    tensors, taken = graph.tensors(), tensor_names(graph)
    parts = (graph, *graph.subgraphs(recursive=True))
    outputs = {tensor.name for part in parts for tensor in part.outputs}
    here = {id(node) for node in graph.nodes}
    for point, params in weights:
        weight, consumers = tensors[point.tensor], set(point.consumers)
        if point.tensor in outputs:
            continue
        own = None
        for node in list({id(n): n for n in weight.outputs}.values()):
            for index, tensor in enumerate(node.inputs):
                quantized = id(node) in here and Edge(node.name, index) in consumers
                if tensor is weight and not quantized:
                    name = float_name(point.tensor)
                    own = own or constant(unique_name(name, taken), np.array(weight.values))
                    node.inputs[index] = own
        snapped = fake_quantize(weight.values, params, point.spec)
        weight.values = np.asarray(snapped)  # of a scalar, arithmetic makes no array
