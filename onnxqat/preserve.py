"""Keep the parts of a file that graphsurgeon loses, and restore them when the model is written.

They are the model's doc string, doc strings and metadata of nodes, values and initializers,
quantization annotations, initializers that no node reads, denotations, and functions.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Iterator
from typing import Any

import onnx

__all__ = [
    "all_nodes",
    "copy_fields",
    "replace_messages",
    "restore",
    "stored_tensors",
    "subgraphs",
    "without_weights",
]


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the parts of a model that `restore` needs: everything except nodes and weights."""
    rest = onnx.ModelProto()
    copy_fields(proto, rest, but="graph")
    graph, source = rest.graph, proto.graph
    graph.doc_string = source.doc_string
    graph.quantization_annotation.extend(source.quantization_annotation)
    graph.metadata_props.extend(source.metadata_props)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(
        v
        for v in source.value_info
        if v.doc_string or v.metadata_props or not v.type.HasField("tensor_type")
    )
    for node in all_nodes(source.node):
        if node.doc_string or node.metadata_props or node.overload:
            kept = graph.node.add(op_type=node.op_type, name=node.name)
            kept.doc_string, kept.overload = node.doc_string, node.overload
            kept.output.extend(node.output)
            kept.metadata_props.extend(node.metadata_props)
    _keep_initializers(graph, source)
    return rest


def copy_fields(source: Any, target: Any, *, but: str) -> None:
    """Copy the scalar fields of a message, except for the field ``but``."""
    for descriptor, value in source.ListFields():
        if descriptor.name == but:
            continue
        # not by the descriptor, which differs between protobuf versions
        if isinstance(value, int | float | str | bytes):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).extend(value)


def _keep_initializers(rest: onnx.GraphProto, source: onnx.GraphProto) -> None:
    """Keep initializers that no node reads; of the others, keep the fields graphsurgeon loses.

    An entry without data also records that the initializer belongs to the outermost graph.
    """
    here = {name for node in source.node for name in node.input}
    here |= {value.name for value in source.output}
    everywhere = here | {name for node in all_nodes(source.node) for name in node.input}
    for tensor in source.initializer:
        if tensor.name not in everywhere:
            rest.initializer.add().CopyFrom(tensor)
        elif tensor.doc_string or tensor.metadata_props or tensor.name not in here:
            kept = rest.initializer.add(name=tensor.name, doc_string=tensor.doc_string)
            kept.metadata_props.extend(tensor.metadata_props)
    rest.sparse_initializer.extend(
        t for t in source.sparse_initializer if t.values.name not in everywhere
    )


def stored_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a file stores: initializers and attributes, at any depth."""
    yield from proto.graph.initializer
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in subgraphs(attribute):
                yield from subgraph.initializer


def subgraphs(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in an attribute."""
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def all_nodes(*lists: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of these lists and of their subgraphs."""
    for nodes in lists:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                yield from all_nodes(*(subgraph.node for subgraph in subgraphs(attribute)))


def restore(proto: onnx.ModelProto, rest: onnx.ModelProto) -> None:
    """Restore in ``proto``, an exported model, the parts that graphsurgeon lost."""
    for name in ("producer_name", "producer_version"):
        if not getattr(proto, name):
            proto.ClearField(name)
    for name in ("doc_string", "domain", "model_version"):
        if rest.HasField(name):
            setattr(proto, name, getattr(rest, name))
    proto.training_info.extend(rest.training_info)
    if [(f.domain, f.name) for f in proto.functions] == [
        (f.domain, f.name) for f in rest.functions
    ]:
        del proto.functions[:]
        proto.functions.extend(rest.functions)
    _restore_graph(proto.graph, rest.graph)


def _restore_graph(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    _restore_doc_string(graph, rest)
    graph.metadata_props.extend(rest.metadata_props)
    scope = ChainMap({tensor.name: tensor for tensor in graph.initializer})
    _restore_scopes(graph, scope, graph, {t.name for t in rest.initializer if not t.data_type})
    _restore_nodes(graph, rest)
    _restore_initializers(graph, rest)
    _restore_values(graph, rest)
    names = {v.name for v in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)}
    names |= {output for node in graph.node for output in node.output}
    graph.quantization_annotation.extend(
        a for a in rest.quantization_annotation if a.tensor_name in names
    )


def _restore_doc_string(target: Any, source: Any) -> None:
    target.ClearField("doc_string")  # graphsurgeon writes an empty one
    if source.doc_string:
        target.doc_string = source.doc_string


def _restore_scopes(
    graph: onnx.GraphProto,
    scope: ChainMap[str, onnx.TensorProto],
    root: onnx.GraphProto,
    hoisted: set[str],
) -> None:
    """Remove from subgraphs the parts of outer scopes that graphsurgeon writes there.

    These are copies of outer initializers, types of outer values, and initializers of ``root``
    that only subgraphs read; the latter (``hoisted``) move back to ``root``.
    """
    for attribute in (a for node in graph.node for a in node.attribute):
        for subgraph in subgraphs(attribute):
            own = []
            for tensor in subgraph.initializer:
                outer = scope.get(tensor.name)
                if outer is None and tensor.name in hoisted:
                    root.initializer.append(tensor)
                    scope.maps[-1][tensor.name] = root.initializer[-1]
                elif outer is None or outer != tensor:
                    own.append(tensor)
            local = {name for node in subgraph.node for name in node.output}
            replace_messages(subgraph.initializer, own)
            replace_messages(
                subgraph.value_info, [v for v in subgraph.value_info if v.name in local]
            )
            if not subgraph.doc_string:
                subgraph.ClearField("doc_string")
            inner = scope.new_child({tensor.name: tensor for tensor in subgraph.initializer})
            _restore_scopes(subgraph, inner, root, hoisted)


def replace_messages(field: Any, messages: Iterable[Any]) -> None:
    """Set the messages of a repeated field, which may already contain some of them."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)


def _restore_nodes(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    """Restore the nodes, found by their outputs, or by name if a stage changed the outputs."""
    by_outputs = {(node.op_type, tuple(node.output)): node for node in rest.node}
    by_name = {(node.op_type, node.name): node for node in rest.node if node.name}
    for node in all_nodes(graph.node) if by_outputs else ():
        source = by_outputs.get((node.op_type, tuple(node.output)))
        source = source or by_name.get((node.op_type, node.name))
        if source is not None:
            _restore_doc_string(node, source)
            if source.overload:
                node.overload = source.overload
            node.metadata_props.extend(source.metadata_props)


def _restore_initializers(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    present = {tensor.name: tensor for tensor in graph.initializer}
    names = {output for node in graph.node for output in node.output}
    for source in rest.initializer:
        if source.name in present:
            _restore_doc_string(present[source.name], source)
            del present[source.name].metadata_props[:]
            present[source.name].metadata_props.extend(source.metadata_props)
        elif source.data_type and source.name not in names:
            graph.initializer.add().CopyFrom(source)
    graph.sparse_initializer.extend(
        t for t in rest.sparse_initializer if t.values.name not in names
    )


def _restore_values(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    # graphsurgeon treats initializers as constants and leaves them out of the inputs
    initializers = {tensor.name for tensor in graph.initializer}
    written = {value.name: value for value in graph.input}
    listed = {value.name for value in rest.input}
    inputs = [written.get(v.name, v) for v in rest.input if v.name in written.keys() | initializers]
    replace_messages(graph.input, [*inputs, *(v for v in graph.input if v.name not in listed)])
    sources = {v.name: v for v in (*rest.value_info, *rest.input, *rest.output)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        source = sources.get(value.name, onnx.ValueInfoProto())
        _restore_doc_string(value, source)
        del value.metadata_props[:]
        value.metadata_props.extend(source.metadata_props)
        if _same_but_for_denotations(value.type, source.type):
            value.type.CopyFrom(source.type)


def _same_but_for_denotations(written: onnx.TypeProto, source: onnx.TypeProto) -> bool:
    if not source.HasField("tensor_type"):  # graphsurgeon loses the shapes inside
        return bool(source.WhichOneof("value") == written.WhichOneof("value"))
    bare = onnx.TypeProto()
    bare.CopyFrom(source)
    bare.ClearField("denotation")
    for dimension in bare.tensor_type.shape.dim:
        dimension.ClearField("denotation")
    return bool(bare == written)
