"""Attach a loss that the user defines in an ONNX file.

The inputs of the file have the names of the values that they read, see `Values.find`; its only
output is one float32 number. The file is prepared like a model, at the opset of the training form.
Then its nodes are added behind those of the form, with a prefix before their names. Nodes are
lowered as in the model; a node without a gradient is refused by name.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxqat.choices import nearest
from onnxqat.errors import TrainingError
from onnxqat.model import Model
from onnxqat.nodes import may_be_float32
from onnxqat.preparation import prepare
from onnxqat.train.form_builder import reaching
from onnxqat.train.losses.terms import Loss
from onnxqat.train.losses.values import TENSOR, Value, Values, fits
from onnxqat.train.lowering import CustomOp, Refusal, lower
from onnxqat.versions import changed_node, default_opset

__all__ = ["attach", "tensor_read"]

# This op does not occur in models, so lowering does not know it: the gradient of its first input
# reads its second output.
WITH_LOG_PROB = "SoftmaxCrossEntropyLoss"
READABLE = {
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.UINT8),
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
}


def tensor_read(loss: Loss, model: Model) -> str:
    """Return a tensor of ``model`` that the loss reads; the first output if that is unclear."""
    outputs = [tensor.name for tensor in model.graph.outputs]
    term = loss.terms[0]
    names = [term.output or outputs[0]]
    if term.is_file:
        graph = loss.graphs[term.kind].graph
        read = reaching(graph) if graph.outputs else set()
        names = [t.name for t in graph.inputs if t.name in read]
    found = (n for n in names if n in outputs or n.startswith(TENSOR))
    return next((n if n in outputs else n.removeprefix(TENSOR) for n in found), outputs[0])


def attach(model: onnx.ModelProto, values: Values, loss: Model, prefix: str) -> str:
    """Add the nodes of a loss file to ``model`` and return the name of the result.

    Raises
    ------
    TrainingError
        An input is not provided, or has another type or shape; the output is not one number; a node
        has no gradient; or the opset does not fit the model.
    ModelError
        The file cannot be prepared.
    """
    loss = loss.copy()
    _check_written(loss)
    sources = _sources(loss, values)
    opset = default_opset(model.opset_import) or 0
    prepared = prepare(loss, opset=opset)
    graph = prepared.graph
    _match_opset(prepared, opset)
    _check_result(graph, prepared.name)
    learned = {name for name, value in sources.items() if value.learned}
    if not any(tensor.name in learned for node in graph.nodes for tensor in node.inputs):
        raise TrainingError(
            f"{loss.name}: reads no float output of the model, so nothing can be learned. "
            f"{nearest('', values.outputs)}"
        )
    ops = _lower(graph, learned, prepared.name)
    for node in graph.nodes:
        node.name = f"{prefix}{node.name}"
    for name, tensor in graph.tensors().items():
        if name:  # an absent input has no name
            tensor.name = sources[name].name if name in sources else f"{prefix}{name}"
    _merge(model, gs.export_onnx(graph), ops)
    return str(graph.outputs[0].name)


def _sources(loss: Model, values: Values) -> dict[str, Value]:
    """Return the value that each input of a loss reads, and set the input's type and shape."""
    sources: dict[str, Value] = {}
    kinds = {v.name: v.type.tensor_type.elem_type for v in loss.to_proto().graph.input}
    for tensor in loss.graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor not in loss.graph.inputs:
            tensor.shape = None  # inferred again from the values that the inputs read
    for tensor in loss.graph.inputs:
        where = f"{loss.name}: input '{tensor.name}'"
        kind = kinds[tensor.name]
        if kind not in READABLE:
            raise TrainingError(
                f"{where} has the unsupported type {TensorProto.DataType.Name(kind)}. "
                "Make it FLOAT or INT64."
            )
        source = values.find(tensor.name, kind)
        if source is None:
            raise TrainingError(
                f"{where} is neither an output of the model, nor teacher/OUTPUT, nor an array of "
                "the data. "
                f"{nearest(tensor.name, values.names())}"
            )
        _check_fit(where, kind, tensor, source)
        tensor.shape = list(source.shape)
        sources[tensor.name] = source
    return sources


def _check_fit(where: str, kind: int, tensor: gs.Variable, source: Value) -> None:
    """Refuse an input whose type or shape differs from the value that it reads."""
    name = TensorProto.DataType.Name
    if source.elem_type != kind:
        raise TrainingError(
            f"{where} is {name(kind)}, but it reads a value of type {name(source.elem_type)}. "
            "Change its type."
        )
    if tensor.shape is not None and not fits(source.shape, tuple(tensor.shape)):
        raise TrainingError(
            f"{where} has shape {list(tensor.shape)}, but it reads a value of shape "
            f"{list(source.shape)}. Export it for that shape."
        )


def _check_written(loss: Model) -> None:
    """Refuse a node that reads a value that nothing writes, which graphsurgeon would accept."""
    inputs = {tensor.name for tensor in loss.graph.inputs}
    read = ((n, t) for n in loss.graph.nodes for t in n.inputs if isinstance(t, gs.Variable))
    for node, tensor in read:
        if tensor.name and not tensor.inputs and tensor.name not in inputs:
            raise TrainingError(
                f"{loss.name}: node '{node.name or node.outputs[0].name}' ({node.op}) reads "
                f"'{tensor.name}', which nothing writes. Export it again."
            )


def _match_opset(loss: Model, opset: int) -> None:
    """Lower the opset of a loss to that of the model, if this changes no node."""
    changed = None
    if loss.graph.opset > opset:
        changed = changed_node(loss.to_proto().graph.node, loss.graph.opset, opset)
    if changed is not None:
        raise TrainingError(
            f"{loss.name}: has opset {loss.graph.opset}, but the model {opset}, and the node "
            f"'{changed.name}' ({changed.op_type}) differs between them. Export it with opset "
            f"{opset}."
        )
    loss.graph.opset = opset


def _check_result(graph: gs.Graph, name: str) -> None:
    if len(graph.outputs) != 1:
        outputs = ", ".join(f"'{t.name}'" for t in graph.outputs)
        raise TrainingError(
            f"{name}: has {len(graph.outputs)} outputs, {outputs}. A loss must have one. Leave the "
            "others out."
        )
    result = graph.outputs[0]
    unknown = next((n for n in graph.nodes if all(t.shape is None for t in n.outputs)), None)
    if result.shape is None and unknown is not None:
        raise TrainingError(
            f"{name}: the output shape of node '{unknown.name}' ({unknown.op}) cannot be inferred. "
            "Check its operator and the shapes of its inputs."
        )
    if result.dtype != np.float32 or result.shape is None or len(result.shape):
        shape = "unknown shape" if result.shape is None else f"shape {result.shape}"
        raise TrainingError(
            f"{name}: its output '{result.name}' is {result.dtype} of {shape}. A loss must be one "
            "float32 number of shape (). Take the mean or the sum over all axes."
        )


def _lower(graph: gs.Graph, learned: set[str], name: str) -> list[CustomOp]:
    """Replace nodes that need another form for their gradient; return the custom ops used."""
    trained, before = set(learned), reaching(graph)
    nodes: list[gs.Node] = []
    used: list[CustomOp] = []
    refused: list[str] = []
    for node in list(graph.nodes):
        indices = [i for i, t in enumerate(node.inputs) if t.name in trained]
        floats = {t.name for t in node.outputs if may_be_float32(t)}
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            refused.append(f"'{node.name}' ({node.op}: a loss cannot contain subgraphs)")
            continue
        if not floats or not indices:
            nodes.append(node)
            continue
        trained |= floats
        try:
            made, ops = _lowered(node, indices, graph.opset, all(n in before for n in floats))
        except Refusal as refusal:
            refused.append(f"'{node.name}' ({node.op}: {refusal})")
            continue
        if all(one is not node for one in made):
            node.inputs.clear()
            node.outputs.clear()
        nodes += made
        used += ops
    if refused:
        raise TrainingError(f"{name}: node {'; '.join(refused)}. Compute the loss without it.")
    graph.nodes.clear()
    graph.nodes.extend(nodes)
    return used


def _lowered(
    node: gs.Node, learned: list[int], opset: int, all_reach_loss: bool
) -> tuple[list[gs.Node], list[CustomOp]]:
    if node.op != WITH_LOG_PROB:
        return lower(node, learned, opset=opset, all_reach_loss=all_reach_loss)
    if learned != [0]:
        raise Refusal("its labels or weights depend on an output of the model")
    if len(node.outputs) == 1:
        node.outputs.append(gs.Variable(f"{node.outputs[0].name}/log_prob", np.float32))
    elif node.outputs[1].outputs:
        raise Refusal("onnxqat has no gradient for its second output; use LogSoftmax")
    return [node], []


def _merge(model: onnx.ModelProto, loss: onnx.ModelProto, ops: list[CustomOp]) -> None:
    model.graph.node.extend(loss.graph.node)
    model.graph.initializer.extend(loss.graph.initializer)
    known = {function.name for function in model.functions}
    for op in ops:
        if op.op_type not in known:
            model.functions.extend([op.forward, op.gradient])
            known.add(op.op_type)
    domains = {node.domain for node in loss.graph.node}
    domains |= {
        opset.domain for op in ops for f in (op.forward, op.gradient) for opset in f.opset_import
    }
    for domain in sorted(domains - {"ai.onnx", *(o.domain for o in model.opset_import)}):
        version = next((o.version for o in loss.opset_import if o.domain == domain), 1)
        model.opset_import.append(helper.make_opsetid(domain, version))
