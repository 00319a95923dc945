"""Check a model file once, when it is loaded, so that the stages need not.

The following are refused, in one line that names the tensor or the node: names that are not text,
or that appear twice; values that no node writes; cycles; types, shapes and attributes that ONNX
does not define or that an operator does not accept; and windows, groups and ranks that crash the
process of onnxruntime 1.19.2 (found by running single operators and corrupting their inputs and
attributes one by one). Other mistakes are left to shape inference and to the runtime.

Functions of the file are checked like the graph. Operators of other domains, and operators that
onnx does not know, get only the checks that need no schema.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from onnxqat.errors import ModelError
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.preserve import subgraphs
from onnxqat.validate.calls import check_calls
from onnxqat.validate.schemas import ATTRIBUTE_LISTS, ATTRIBUTE_SINGLES, Shape, check_node, label
from onnxqat.validate.texts import check_texts

__all__ = ["check_data", "validate"]

MAX_SUBGRAPH_DEPTH = 32
MAX_ELEMENTS = 2**40  # per value: no machine holds more, and smaller products stay exact
KINDS = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
INTEGERS = frozenset(
    getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)
)
MAX_SMALL = 1024  # elements; the values of larger constants are not checked
TYPES = (None, "tensor_type", "sequence_type", "sparse_tensor_type")
# Operators that keep the shape of their first input. Shapes are followed through them, so that a
# wrong rank is found behind them too.
KEEPING = frozenset({
    *("Cast", "Clip", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear"),
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "LRN"),
    *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu"),
    *("Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"),
    *("Abs", "Ceil", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round", "Sign", "Sqrt"),
    *("Cos", "Sin", "Hardmax", "LogSoftmax", "Softmax"),
})  # fmt: skip


def validate(proto: onnx.ModelProto, where: str) -> None:
    """Refuse a model that the stages cannot process.

    Parameters
    ----------
    proto : onnx.ModelProto
        The model; it is not changed. Its external data need not be loaded yet.
    where : str
        The beginning of each message, such as the file's path.

    Raises
    ------
    ModelError
        The model breaks one of the rules in the module's docstring.
    """
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        _check_depth(nodes, where)
    check_texts(proto, where)
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    _check_types(proto.graph, where)
    _Validator(where, opsets).check_graph(proto.graph, ChainMap())
    for function in proto.functions:
        own = {entry.domain: entry.version for entry in function.opset_import}
        inside = f"{where}: function '{function.domain}.{function.name}'"
        validator = _Validator(inside, own or opsets, in_function=True)
        values: dict[str, Shape] = dict.fromkeys(function.input)
        validator.check_nodes(function.node, function.output, values, ChainMap())
    check_calls(proto, where)


def check_data(tensor: TensorProto, where: str) -> None:
    """Refuse a tensor that cannot be read; graphsurgeon would fail only when it is used."""
    try:
        onnx.numpy_helper.to_array(tensor)
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: tensor '{tensor.name}' of shape {list(tensor.dims)} and data type "
            f"{tensor.data_type} cannot be read ({error}). Export again, with the weights."
        ) from error


def _check_types(graph: GraphProto, where: str) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        kind = value.type.WhichOneof("value") or "tensor_type"
        typed = kind != "tensor_type" or value.type.tensor_type.elem_type
        if value.name not in weights and not typed:
            raise ModelError(f"{where}: input '{value.name}' has no type. Export it with a type.")


def _check_depth(nodes: Iterable[NodeProto], where: str, depth: int = 0) -> None:
    if depth > MAX_SUBGRAPH_DEPTH:
        raise ModelError(f"{where}: subgraphs nest deeper than {MAX_SUBGRAPH_DEPTH} levels.")
    for node in nodes:
        for attribute in node.attribute:
            for subgraph in subgraphs(attribute):
                _check_depth(subgraph.node, where, depth + 1)


class _Validator:
    """Checks one graph or one function, with its subgraphs."""

    def __init__(self, where: str, opsets: Mapping[str, int], *, in_function: bool = False) -> None:
        self.where = where
        self.opset = opsets.get("", opsets.get("ai.onnx", 0))
        self.in_function = in_function
        self.integers: dict[str, TensorProto] = {}  # small integer constants: possible divisors

    def check_graph(self, graph: GraphProto, outer: ChainMap[str, Shape]) -> set[str]:
        """Check a graph; return the values of ``outer`` that its nodes read."""
        values: dict[str, Shape] = {}
        for tensor in graph.initializer:
            self._tensor(tensor)
            if tensor.name in values:
                raise self._error(f"initializer '{tensor.name}' is defined twice. Export again.")
            values[tensor.name] = tuple(tensor.dims)
            self._note_integers(tensor.name, tensor)
        values |= {sparse.values.name: None for sparse in graph.sparse_initializer}
        named = set()
        for value in graph.input:
            if not value.name or value.name in named:
                raise self._error(f"input '{value.name}' is defined twice, or has no name.")
            named.add(value.name)
            values.setdefault(value.name, _known_shape(value))
        for what, listed in (
            ("input", graph.input),
            ("output", graph.output),
            ("value", graph.value_info),
        ):
            for value in listed:
                self._value(value, what)
        outputs = [value.name for value in graph.output]
        return self.check_nodes(graph.node, outputs, values, outer)

    def check_nodes(
        self,
        nodes: Sequence[NodeProto],
        outputs: Iterable[str],
        values: dict[str, Shape],
        outer: ChainMap[str, Shape],
    ) -> set[str]:
        """Check the nodes of a graph; ``values`` are its inputs and initializers.

        Returns the values of ``outer`` that the nodes and outputs read.
        """
        writers = self._writers(nodes, values)
        scope = outer.new_child({**dict.fromkeys(writers), **values})
        reads = [self._node(node, scope) for node in nodes]
        for output in outputs:
            if output not in scope:
                raise self._error(f"nothing writes the output '{output}'. Export it again.")
        self._check_order(nodes, writers, reads)
        read = set().union(*reads, outputs)
        return read - scope.maps[0].keys()

    def _error(self, text: str) -> ModelError:
        return ModelError(f"{self.where}: {text}")

    def _tensor(self, tensor: TensorProto) -> None:
        if tensor.data_type not in KINDS:
            raise self._error(
                f"tensor '{tensor.name}' of shape {list(tensor.dims)} has the data type "
                f"{tensor.data_type}, which ONNX does not define. Export again."
            )
        self._sizes(tensor.name, tensor.dims, negative=False)

    def _sizes(self, name: str, sizes: Iterable[int], *, negative: bool) -> None:
        sizes = list(sizes)
        if (min(sizes, default=0) < 0 and not negative) or math.prod(
            max(size, 1) for size in sizes
        ) > MAX_ELEMENTS:
            raise self._error(f"tensor '{name}' has the impossible shape {sizes}.")

    def _value(self, value: ValueInfoProto, what: str) -> None:
        kind = value.type.WhichOneof("value")
        if kind not in TYPES:
            raise self._error(f"{what} '{value.name}' has the unsupported type '{kind}'.")
        tensor = value.type.tensor_type
        if tensor.elem_type not in KINDS | {TensorProto.UNDEFINED}:
            raise self._error(
                f"{what} '{value.name}' has the data type {tensor.elem_type}, which ONNX does not "
                "define. Export again."
            )
        # old exporters write an unknown length as a negative number
        sizes = [size.dim_value for size in tensor.shape.dim if not size.dim_param]
        self._sizes(value.name, sizes, negative=True)

    def _writers(self, nodes: Sequence[NodeProto], values: Mapping[str, Shape]) -> dict[str, int]:
        """Return the index of the node that writes each value; refuse a second writer."""
        writers: dict[str, int] = {}
        for index, node in enumerate(nodes):
            written = [name for name in node.output if name]
            if len(set(written)) < len(written):
                raise self._error(f"{label(node)} writes one value twice. Export it again.")
            for name in written:
                if name in values or writers.setdefault(name, index) != index:
                    text = f"'{name}' is written by more than one node or input."
                    raise self._error(f"{text} Export it again.")
        return writers

    def _node(self, node: NodeProto, scope: ChainMap[str, Shape]) -> set[str]:
        """Check one node; return the names that it and its subgraphs read."""
        read = set(filter(None, node.input))
        for name in read:
            if name not in scope:
                text = f"{label(node)} reads '{name}', which nothing writes. Export it again."
                raise self._error(text)
        names = [attribute.name for attribute in node.attribute]
        if not node.op_type or len(set(names)) < len(names):
            raise self._error(f"{label(node)} has no operator, or has one attribute twice.")
        for attribute in node.attribute:
            self._attribute(node, attribute)
            for graph in subgraphs(attribute):
                read |= self.check_graph(graph, scope)
        if node.domain in ONNX_DOMAINS:
            self._check_division(node)
            check_node(node, self.opset, scope, self.where)
            if node.op_type in KEEPING:
                scope[node.output[0]] = scope[node.input[0]]
        return read

    def _check_division(self, node: NodeProto) -> None:
        """Refuse an integer division by a constant 0, which crashes onnxruntime's process."""
        if node.op_type == "Constant" and node.output:
            self._note_integers(node.output[0], next((a.t for a in node.attribute), TensorProto()))
        divisor = self.integers.get(node.input[1]) if len(node.input) == 2 else None
        if divisor is not None and node.op_type in ("Div", "Mod"):
            check_data(divisor, self.where)
            if not onnx.numpy_helper.to_array(divisor).all():
                raise self._error(
                    f"{label(node)} divides by '{node.input[1]}', which contains a 0."
                )

    def _note_integers(self, name: str, tensor: TensorProto) -> None:
        inside = tensor.data_location != TensorProto.EXTERNAL
        if inside and tensor.data_type in INTEGERS and math.prod(tensor.dims) <= MAX_SMALL:
            self.integers[name] = tensor

    def _attribute(self, node: NodeProto, attribute: AttributeProto) -> None:
        """Refuse an attribute that graphsurgeon drops (rare types) or cannot write (empty list)."""
        where = f"attribute '{attribute.name}' of {label(node)}"
        kind = attribute.type
        if kind not in ATTRIBUTE_SINGLES and kind not in ATTRIBUTE_LISTS:
            name = AttributeProto.AttributeType.Name(kind)
            raise self._error(f"{where} has the unsupported type '{name}'. Export without it.")
        if attribute.ref_attr_name:
            if not self.in_function:
                raise self._error(
                    f"{where} refers to a function's attribute, but is not inside a function."
                )
            return
        filled = node.op_type == "Constant"  # an empty list here is an empty tensor
        if kind in ATTRIBUTE_LISTS and not filled and not getattr(attribute, ATTRIBUTE_LISTS[kind]):
            raise self._error(f"{where} is an empty list. Leave it out of the export.")
        if kind == AttributeProto.TENSOR:
            self._tensor(attribute.t)

    def _check_order(
        self, nodes: Sequence[NodeProto], writers: Mapping[str, int], reads: Sequence[set[str]]
    ) -> None:
        """Refuse a cycle; a file may hold its nodes in any other order."""
        needs = [{writers[name] for name in names if name in writers} for names in reads]
        if all(max(need, default=-1) < index for index, need in enumerate(needs)):
            return
        left = [len(need) for need in needs]
        readers: list[list[int]] = [[] for _ in nodes]
        for index, need in enumerate(needs):
            for other in need:
                readers[other].append(index)
        ready = [index for index, count in enumerate(left) if not count]
        while ready:
            for index in readers[ready.pop()]:
                left[index] -= 1
                if not left[index]:
                    ready.append(index)
        stuck = next((index for index, count in enumerate(left) if count), None)
        if stuck is not None:
            text = f"the graph has a cycle before or through {label(nodes[stuck])}."
            raise self._error(f"{text} Export it again.")


def _known_shape(value: ValueInfoProto) -> Shape:
    """Return the shape of an input; unknown lengths are None."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else None
        for size in tensor.shape.dim
    )
