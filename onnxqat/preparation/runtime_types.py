"""Take the types and shapes of values behind onnxruntime's own ops from an onnxruntime session.

A model that onnxruntime has optimized contains its own fused ops (FusedConv, BiasGelu,
SkipLayerNormalization), which onnx's shape inference does not know, so that values behind them have
no type. A session of the graph, with its large weights turned into inputs, gives the type and shape
of each value.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat.errors import ModelError
from onnxqat.model import weights_left_out
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.runtime import open_session

__all__ = ["read_runtime_types"]

RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc")
MAX_ELEMENTS = 1024  # the largest initializer whose values may determine a shape
# The types of outputs, by the names that a session uses.
TYPES = {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
TYPES |= {name: name for bits in (8, 16, 32, 64) for name in (f"int{bits}", f"uint{bits}")}


def read_runtime_types(graph: gs.Graph) -> int:
    """Fill in types and shapes that only onnxruntime can infer; return the number of values."""
    if not any(map(_is_of_the_runtime, graph.nodes)):
        return 0
    unknown = {
        tensor.name: tensor
        for node in graph.nodes
        for tensor in node.outputs
        if tensor.name and tensor.dtype is None
    }
    if not unknown:
        return 0
    try:
        session = open_session(_skeleton(graph, set(unknown)), optimization="none", threads=1)
    except ModelError:
        return 0  # a model that does not run is reported by the stage that runs it
    found = {value.name: value for value in session.get_outputs()}
    return sum(_fill_in(unknown[name], found[name]) for name in unknown.keys() & found.keys())


def _is_of_the_runtime(node: gs.Node) -> bool:
    """Return whether onnxruntime defines an op, including those in ONNX's domain."""
    return node.domain in RUNTIME_DOMAINS or not onnx.defs.has(node.op)


def _skeleton(graph: gs.Graph, wanted: set[str]) -> onnx.ModelProto:
    """Return a model of the nodes that onnxruntime may know, with the wanted values as outputs."""
    with weights_left_out(graph, MAX_ELEMENTS) as left_out:
        proto: onnx.ModelProto = gs.export_onnx(graph)
    body = proto.graph
    kept = [tensor for tensor in body.initializer if tensor.name not in left_out]
    body.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in body.initializer
        if tensor.name in left_out
    )
    known = {"", *(value.name for value in body.input), *(tensor.name for tensor in kept)}
    nodes = []
    for node in body.node:
        if node.domain in (*ONNX_DOMAINS, *RUNTIME_DOMAINS) and known.issuperset(node.input):
            nodes.append(node)
            known.update(node.output)
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            body.name,
            list(body.input),
            [onnx.ValueInfoProto(name=name) for name in sorted(wanted & known)],
            kept,
        ),
        opset_imports=list(proto.opset_import),
        ir_version=proto.ir_version,
    )


def _fill_in(tensor: gs.Variable, found: object) -> int:
    """Set the type and shape from a session's output; an unknown rank looks like a scalar's."""
    kind = TYPES.get(str(found.type).removeprefix("tensor(").removesuffix(")"))  # type: ignore[attr-defined]
    if kind is None:
        return 0
    tensor.dtype = np.dtype(kind)
    shape = list(found.shape)  # type: ignore[attr-defined]
    if tensor.shape is None and shape:
        tensor.shape = [size if isinstance(size, int) else None for size in shape]
    return 1
