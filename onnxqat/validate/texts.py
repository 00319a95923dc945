"""Check that the strings of a model file are text: UTF-8 without NUL characters.

Depending on its version, protobuf returns a string that is not UTF-8 as bytes, or raises when the
string is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxqat.errors import ModelError
from onnxqat.preserve import subgraphs

__all__ = ["check_texts"]

Strings = Iterator[tuple[str, Iterable[str | bytes]]]


def check_texts(proto: onnx.ModelProto, where: str) -> None:
    """Refuse names, documentation and metadata that are not text.

    Raises
    ------
    ModelError
        A string is not text; the message says where it was found.
    """
    strings = _of_model(proto)
    what = "the model"
    try:
        for what, values in strings:
            for value in values:
                if isinstance(value, bytes):
                    raise ModelError(
                        f"{where}: {what} contains {value[:60]!r}, which is not UTF-8. Rename it."
                    )
                if "\0" in value:
                    raise ModelError(f"{where}: {what} contains a NUL: {value[:60]!r}. Rename it.")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{where}: a string after {what} contains {error.object[:60]!r}, which is not UTF-8. "
            "Rename it."
        ) from error


def _of_model(proto: onnx.ModelProto) -> Strings:
    yield "the model", (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
    yield "the metadata", (text for entry in proto.metadata_props for text in _pair(entry))
    yield "an imported opset", (entry.domain for entry in proto.opset_import)
    yield from _of_graph(proto.graph, "the graph")
    for number, function in enumerate(proto.functions):
        what = f"function number {number}"
        names = (function.name, function.domain, function.overload, function.doc_string)
        yield what, (*names, *function.input, *function.output, *function.attribute)
        yield what, (entry.domain for entry in function.opset_import)
        yield what, (text for entry in function.metadata_props for text in _pair(entry))
        yield from _of_nodes(function.node, what)
        for attribute in function.attribute_proto:
            yield from _of_attribute(attribute, what)


def _of_graph(graph: onnx.GraphProto, what: str) -> Strings:
    yield what, (graph.name, graph.doc_string)
    yield what, (text for entry in graph.metadata_props for text in _pair(entry))
    for kind, values in (("an input", graph.input), ("an output", graph.output)):
        yield from ((f"{kind} of {what}", _of_value(value)) for value in values)
    yield from ((f"a value of {what}", _of_value(value)) for value in graph.value_info)
    for tensor in graph.initializer:
        yield f"an initializer of {what}", (tensor.name, tensor.doc_string)
        entries = (*tensor.external_data, *tensor.metadata_props)
        yield f"initializer '{tensor.name!s}'", (text for e in entries for text in _pair(e))
    yield f"an initializer of {what}", (t.values.name for t in graph.sparse_initializer)
    for annotation in graph.quantization_annotation:
        yield "a quantization annotation", (annotation.tensor_name,)
    yield from _of_nodes(graph.node, what)


def _of_value(value: onnx.ValueInfoProto) -> Iterator[str | bytes]:
    yield value.name
    yield value.doc_string
    yield value.type.denotation
    for size in value.type.tensor_type.shape.dim:
        yield size.dim_param
        yield size.denotation
    for entry in value.metadata_props:
        yield from _pair(entry)


def _of_nodes(nodes: Iterable[onnx.NodeProto], what: str) -> Strings:
    for number, node in enumerate(nodes):
        place = f"node number {number} of {what}"
        yield place, (node.name, node.op_type, node.domain, node.overload, node.doc_string)
        yield place, (*node.input, *node.output)
        yield place, (text for entry in node.metadata_props for text in _pair(entry))
        for attribute in node.attribute:
            yield from _of_attribute(attribute, place)
            for graph in subgraphs(attribute):
                yield from _of_graph(graph, f"a subgraph of {place}")


def _of_attribute(attribute: onnx.AttributeProto, place: str) -> Strings:
    yield f"an attribute of {place}", (attribute.name, attribute.ref_attr_name)
    for text in (attribute.s, *attribute.strings):
        text.decode()  # ONNX stores bytes here; graphsurgeon reads them as text
    yield f"an attribute of {place}", (attribute.doc_string, attribute.t.name)


def _pair(entry: onnx.StringStringEntryProto) -> tuple[str | bytes, str | bytes]:
    return entry.key, entry.value
