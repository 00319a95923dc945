"""Put the weights of a float graph on their grid, for the nodes that the chip runs in integers.

A constant can also have readers that stay float: other nodes, subgraphs, a bias, the graph's
outputs. These get a copy with the original values. The name stays with the quantized readers,
because calibration tables use it.
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

    A weight that is also a graph output is not changed: the output must keep its values and name.
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
        weight.values = np.asarray(snapped)  # arithmetic on a scalar gives no array
