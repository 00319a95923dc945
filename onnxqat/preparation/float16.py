"""Widen a float16 model to float32 for all stages, and narrow the result to float16 again.

The stages work on a float32 model, including its inputs and outputs: onnxruntime computes float16
on a CPU with casts around every node and has no float16 gradients, and 8-bit scales can be too
small for float16. `widen_float16` converts types and weights, and turns Casts to float16 into Casts
to float32, which are then removed. The metadata keep the names of the float16 tensors, and
`narrow_to_float16` makes these float16 again, with a Cast wherever float32 and float16 meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnxqat.errors import ModelError
from onnxqat.model import Model, constant
from onnxqat.nodes import is_op
from onnxqat.operators import WEIGHTED
from onnxqat.preparation.editing import constant_values, dtype_of, tensor_names, unique_name
from onnxqat.preparation.order import sort_nodes
from onnxqat.preparation.shapes import infer_shapes

__all__ = [
    "FLOAT16_KEY",
    "narrow_to_float16",
    "note_float16",
    "refuse_other_floats",
    "widen_float16",
]

FLOAT16_KEY = "onnxqat.float16"
Kind: TypeAlias = np.dtype[Any]
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
OTHER_FLOATS = {
    int(onnx.TensorProto.DOUBLE): "float64",
    int(onnx.TensorProto.BFLOAT16): "bfloat16",
}


class Float16Names(msgspec.Struct, frozen=True):
    """The names of the tensors that were float16 in a model.

    Attributes
    ----------
    tensors : set of str
        Values and initializers.
    outputs : set of str
        Graph outputs that a Cast at the end of the model converted from float16 to float32.
    """

    tensors: set[str]
    outputs: set[str]


def widen_float16(graph: gs.Graph, where: str) -> Float16Names:
    """Convert all float16 tensors to float32; return their names.

    Raises
    ------
    ModelError
        The model is float16 and has subgraphs.
    """
    if not any(
        dtype_of(tensor) == FLOAT16 for tensor in (*graph.inputs, *graph.tensors().values())
    ):
        return Float16Names(set(), set())
    sort_nodes(graph)
    infer_shapes(graph)  # files seldom state the types of inner values
    halves = {name for name, tensor in graph.tensors().items() if dtype_of(tensor) == FLOAT16}
    if next(iter(graph.subgraphs()), None) is not None:
        raise ModelError(f"{where}: is float16 and contains If, Loop or Scan. Export as float32.")
    for node in graph.nodes:
        for key in ("to", "dtype"):
            if node.attrs.get(key) == onnx.TensorProto.FLOAT16:
                node.attrs[key] = onnx.TensorProto.FLOAT
                halves |= {tensor.name for tensor in node.outputs}
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant) and dtype_of(value) == FLOAT16:
            node.attrs["value"] = constant(value.name, _values(value).astype(FLOAT32))
            halves |= {tensor.name for tensor in node.outputs}
    outputs = {t.name for t in graph.outputs if t.dtype == FLOAT32 and _is_cast_from(t, FLOAT16)}
    for tensor in (*graph.tensors().values(), *graph.inputs, *graph.outputs):
        if isinstance(tensor, gs.Variable) and tensor.dtype == FLOAT16:
            tensor.dtype = FLOAT32
        elif isinstance(tensor, gs.Constant) and dtype_of(tensor) == FLOAT16:
            _set(tensor, _values(tensor).astype(FLOAT32))
    return Float16Names(halves | outputs, outputs)


def _is_cast_from(tensor: gs.Tensor, kind: Kind) -> bool:
    producer = tensor.inputs[0] if tensor.inputs else None
    return producer is not None and is_op(producer, "Cast") and producer.inputs[0].dtype == kind


def _values(tensor: gs.Constant) -> NDArray[Any]:
    values = constant_values(tensor)
    if values is None:
        raise ModelError(f"Initializer '{tensor.name}' cannot be read. Export it dense.")
    return values


def _set(tensor: gs.Constant, values: NDArray[Any]) -> None:
    tensor.values = values
    tensor._export_dtype = None  # Graph.copy pins the type that the constant had


def refuse_other_floats(graph: gs.Graph, where: str) -> None:
    """Refuse float64 and bfloat16 weights, which onnxqat can neither quantize nor train.

    Raises
    ------
    ModelError
        The graph has such a weight.
    """
    for node in graph.nodes:
        for tensor in node.inputs[:2] if is_op(node, *WEIGHTED) else ():
            kind = dtype_to_onnx(tensor.dtype) if isinstance(tensor, gs.Constant) else 0
            if kind in OTHER_FLOATS:
                raise ModelError(
                    f"{where}: weight '{tensor.name}' of node '{node.name}' is "
                    f"{OTHER_FLOATS[kind]}. Export as float32 or float16."
                )


def note_float16(model: Model, names: Float16Names) -> None:
    """Store in the metadata the names that were float16 and that the prepared model still has."""
    left = Float16Names(names.tensors & tensor_names(model.graph), names.outputs)
    if left.tensors:
        model.metadata[FLOAT16_KEY] = msgspec.json.encode(left, order="deterministic").decode()


def narrow_to_float16(model: Model, note: str) -> Model:
    """Return a copy of a float model whose former float16 tensors are float16 again.

    Parameters
    ----------
    model : Model
        A stripped model, in float32.
    note : str
        The metadata entry `FLOAT16_KEY` of the model before it was stripped.
    """
    try:
        names = msgspec.json.decode(note, type=Float16Names)
    except msgspec.MsgspecError as error:
        message = (
            f"{model.name}: '{FLOAT16_KEY}' cannot be read ({error}). Run 'onnxqat insert' again."
        )
        raise ModelError(message) from error
    result = model.copy()
    _Narrower(result.graph, names.tensors).run()
    for index, tensor in enumerate(result.graph.outputs):
        if tensor.name in names.outputs and tensor.inputs:
            _cast_output(result.graph, index)
    return result


def _cast_output(graph: gs.Graph, index: int) -> None:
    """Make a graph output float32 by a Cast at its end."""
    half = graph.outputs[index]
    full = gs.Variable(half.name, FLOAT32, half.shape)
    half.name = unique_name(f"{half.name}/float16", tensor_names(graph))
    to = {"to": onnx.TensorProto.FLOAT}
    graph.nodes.append(gs.Node("Cast", f"{full.name}/Cast", to, [half], [full]))
    graph.outputs[index] = full


class _Narrower:
    """Builds the node list with Casts in one pass."""

    def __init__(self, graph: gs.Graph, halves: set[str]) -> None:
        self.graph = graph
        self.halves = halves
        self.taken = tensor_names(graph)
        self.constants: dict[str, Kind] = {}  # the type that their first reader needs
        self.made: dict[tuple[str, Kind], gs.Tensor] = {}

    def run(self) -> None:
        nodes: list[gs.Node] = []
        for node in self.graph.nodes:
            for index, kind in self._kinds(node).items():
                tensor = node.inputs[index]
                if tensor.dtype == FLOAT32 and self._present(tensor, kind) != kind:
                    node.inputs[index] = self._converted(tensor, kind, nodes)
            if is_op(node, "Cast") and node.outputs[0].name in self.halves:
                node.attrs["to"] = onnx.TensorProto.FLOAT16
            nodes.append(node)
        self.graph.nodes = nodes
        for tensor in (*self.graph.tensors().values(), *self.graph.inputs, *self.graph.outputs):
            if _is_constant(tensor):
                if self.constants.get(tensor.name) == FLOAT16:
                    _set(tensor, _halved(tensor))
            elif tensor.name in self.halves:
                tensor.dtype = FLOAT16

    def _present(self, tensor: gs.Tensor, wanted: Kind) -> Kind:
        """Return the type a tensor will have; the first reader of a constant decides its type."""
        if _is_constant(tensor):
            return self.constants.setdefault(tensor.name, wanted)
        return self._kind(tensor)

    def _kind(self, tensor: gs.Tensor) -> Kind:
        return FLOAT16 if tensor.name in self.halves else FLOAT32

    def _kinds(self, node: gs.Node) -> dict[int, Kind]:
        """Return the type that each float input must have, by its index.

        Inputs and outputs of one type variable (https://onnx.ai/onnx/operators) have the same type:
        that of the output, or else of a computed input, or else of the constant.
        """
        inputs, outputs = _type_variables(node, self.graph.opset)
        written = zip(outputs, node.outputs, strict=True)
        read = sorted(zip(inputs, node.inputs, strict=True), key=lambda pair: _is_constant(pair[1]))
        decided: dict[str, Kind] = {}
        for variable, tensor in (*written, *read):
            if tensor.name:
                decided.setdefault(variable, self._kind(tensor))
        return {i: decided[v] for i, v in enumerate(inputs) if v in decided and v.isalnum()}

    def _converted(self, tensor: gs.Tensor, kind: Kind, nodes: list[gs.Node]) -> gs.Tensor:
        key = (tensor.name, kind)
        if key not in self.made:
            name = unique_name(f"{tensor.name}/{kind.name}", self.taken)
            if _is_constant(tensor):
                self.made[key] = constant(
                    name, _halved(tensor) if kind == FLOAT16 else tensor.values
                )
            else:
                self.made[key] = gs.Variable(name, kind, tensor.shape)
                to = onnx.helper.np_dtype_to_tensor_dtype(kind)
                outputs = [self.made[key]]
                nodes.append(gs.Node("Cast", f"{name}/Cast", {"to": to}, [tensor], outputs))
        return self.made[key]


def _halved(tensor: gs.Constant) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # values beyond float16's range become infinite
        return _values(tensor).astype(FLOAT16)


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def _type_variables(node: gs.Node, opset: int) -> tuple[list[str], list[str]]:
    """Return the type variable of each input and output; unknown operators have a single one."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        return ["T"] * len(node.inputs), ["T"] * len(node.outputs)
    return (
        list(_of_each(schema.inputs, len(node.inputs))),
        list(_of_each(schema.outputs, len(node.outputs))),
    )


def _of_each(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> Iterator[str]:
    for index in range(count):
        yield parameters[min(index, len(parameters) - 1)].type_str
