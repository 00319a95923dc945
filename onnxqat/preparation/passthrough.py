"""Remove nodes that only pass on their input: Identity, and some forms of Cast and Dropout.

===========  ==================================================================
Identity     always
Cast         to the type that the input has
Dropout      ``training_mode`` absent or constantly false, mask not used
             (https://onnx.ai/onnx/operators/onnx__Dropout.html)
===========  ==================================================================

1. The output is an inner value: make its consumers read the input instead. ::

       x -> Identity -> y -> Relu     =>     x -> Relu

2. The output is a graph output and the input is an inner value: make the producer write the
   output, and other consumers of the input read the output. ::

       Conv -> x -> Identity -> y (output)     =>     Conv -> y (output)

A node stays if it connects a graph input, an initializer or a graph output with a graph output,
because both names must stay; if a subgraph reads its output; and, in case 2, if a subgraph reads
its input.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnxqat.nodes import is_op
from onnxqat.preparation.editing import pinned_names, remove_nodes, replace_input, scalar

__all__ = ["remove_passthroughs"]


def remove_passthroughs(graph: gs.Graph) -> int:
    """Remove nodes that only pass on their input; return their number."""
    pinned = pinned_names(graph)
    outputs = {tensor.name for tensor in graph.outputs}
    removed = []
    for node in graph.nodes:
        if not _passes_through(node, pinned):
            continue
        source, target = node.inputs[0], node.outputs[0]
        if target.name not in pinned:
            replace_input(target, source)
        elif target.name in outputs and source.inputs and source.name not in pinned:
            _let_producer_write(source, target)
        else:
            continue
        # disconnect it now, so that the next node does not find it
        node.inputs.clear()
        node.outputs.clear()
        removed.append(node)
    return remove_nodes(graph, removed)


def _passes_through(node: gs.Node, pinned: set[str]) -> bool:
    if is_op(node, "Identity"):
        return True
    if is_op(node, "Cast"):
        source, target = node.inputs[0].dtype, node.attrs["to"]
        return source is not None and dtype_to_onnx(source) == target
    if not is_op(node, "Dropout"):
        return False
    mask = node.outputs[1] if len(node.outputs) > 1 else gs.Variable.empty()
    mode = node.inputs[2] if len(node.inputs) > 2 else gs.Variable.empty()
    active = (bool(mode.name) and scalar(mode) is None) or bool(scalar(mode))
    return not active and not mask.outputs and mask.name not in pinned


def _let_producer_write(source: gs.Tensor, target: gs.Tensor) -> None:
    producer = source.inputs[0]
    index = next(i for i, tensor in enumerate(producer.outputs) if tensor is source)
    replace_input(source, target)
    producer.outputs[index] = target
