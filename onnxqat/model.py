"""The only door between ONNX files and `onnx_graphsurgeon.Graph`.

graphsurgeon drops what it has no field for: the model's metadata_props and doc string, doc
strings of nodes, values and initializers, node metadata, quantization annotations, and
initializers that no node reads. A `Model` carries these beside the graph and puts them back
when it is written, so that whatever no stage touched comes out as it went in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx_graphsurgeon.logger import G_LOGGER

from onnxqat.errors import ModelError
from onnxqat.files import atomic_output

__all__ = ["Model", "constant", "from_proto", "load_model", "save_model", "to_proto"]

# onnxruntime-training 1.19.2 reads IR <= 10 and opset <= 21; per-axis Q/DQ needs opset 13.
MAX_IR_VERSION = 10
MIN_OPSET, MAX_OPSET = 13, 21
MAX_PROTOBUF_BYTES = 2**31 - 1
MAX_SUBGRAPH_DEPTH = 32

# graphsurgeon reports on stdout, where commands put their JSON.
G_LOGGER.severity = G_LOGGER.CRITICAL


@dataclass(kw_only=True, eq=False)
class Model:
    """A graph, its metadata, and the rest of its file.

    Attributes
    ----------
    graph : onnx_graphsurgeon.Graph
        Nodes and tensors.
    metadata : dict of str to str
        The file's ``metadata_props``.
    rest : onnx.ModelProto
        The file without weights: the source of what graphsurgeon has no field for.
    name : str
        File name, for messages.
    """

    graph: gs.Graph
    metadata: dict[str, str]
    rest: onnx.ModelProto = field(repr=False)
    name: str

    def copy(self) -> Model:
        """Return a model whose graph can be changed without changing this one."""
        return Model(
            graph=self.graph.copy(), metadata=dict(self.metadata), rest=self.rest, name=self.name
        )


def load_model(path: str | Path) -> Model:
    """Read an ONNX file, with its external data.

    Raises
    ------
    ModelError
        Missing or not an ONNX file, an opset or IR version outside what onnxruntime-training
        reads, or external data outside of the model's folder.
    """
    path = Path(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file.") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file. Give the exported .onnx.") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX file, or an empty graph. Give the exported .onnx.")
    _load_external_data(proto, path)
    return from_proto(proto, name=path.name)


def _load_external_data(proto: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        target = (folder / location).resolve()
        if not location or not target.is_relative_to(folder):
            message = (
                f"{path}: initializer '{tensor.name}' keeps its data at '{location}', outside of "
                "the model's folder. Move the file beside the model."
            )
            raise ModelError(message)
        if not target.is_file():
            raise ModelError(f"{path}: external data file '{location}' is missing.")
    try:
        onnx.load_external_data_for_model(proto, str(folder))
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path}: external data cannot be read ({error}).") from error


def from_proto(proto: onnx.ModelProto, *, name: str = "model") -> Model:
    """Wrap a model that is already in memory; see `load_model`."""
    _check_versions(proto, name)
    _check_depth(proto.graph, name)
    rest = onnx.ModelProto()
    rest.CopyFrom(_without_weights(proto))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        graph = gs.import_onnx(proto)
    except Exception as error:  # graphsurgeon raises whatever a malformed file provokes
        raise ModelError(f"{name}: malformed ONNX graph ({error}).") from error
    return Model(graph=graph, metadata=metadata, rest=rest, name=name)


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    rest = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name not in ("graph", "functions"):
            single = onnx.ModelProto()
            if descriptor.is_repeated:
                getattr(rest, descriptor.name).extend(value)
            else:
                setattr(single, descriptor.name, value)
                rest.MergeFrom(single)
    graph, source = rest.graph, proto.graph
    graph.doc_string = source.doc_string
    graph.quantization_annotation.extend(source.quantization_annotation)
    graph.metadata_props.extend(source.metadata_props)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(v for v in source.value_info if v.doc_string or v.metadata_props)
    for node in source.node:
        if node.doc_string or node.metadata_props or node.overload:
            kept = graph.node.add(doc_string=node.doc_string, overload=node.overload)
            kept.output.extend(node.output)
            kept.metadata_props.extend(node.metadata_props)
    read = {name for node in _all_nodes(source) for name in node.input}
    read |= {value.name for value in source.output}
    for tensor in source.initializer:
        if tensor.name not in read:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.doc_string or tensor.metadata_props:
            kept = graph.initializer.add(name=tensor.name, doc_string=tensor.doc_string)
            kept.metadata_props.extend(tensor.metadata_props)
    return rest


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (
                *((attribute.g,) if attribute.HasField("g") else ()),
                *attribute.graphs,
            ):
                yield from _all_nodes(subgraph)


def _check_depth(graph: onnx.GraphProto, name: str, depth: int = 0) -> None:
    if depth > MAX_SUBGRAPH_DEPTH:
        raise ModelError(f"{name}: subgraphs nest deeper than {MAX_SUBGRAPH_DEPTH} levels.")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _check_depth(attribute.g, name, depth + 1)
            for subgraph in attribute.graphs:
                _check_depth(subgraph, name, depth + 1)


def _check_versions(proto: onnx.ModelProto, name: str) -> None:
    if proto.ir_version > MAX_IR_VERSION:
        raise ModelError(
            f"{name}: IR version {proto.ir_version} is newer than {MAX_IR_VERSION}, the newest "
            f"that onnxruntime-training 1.19.2 reads. Export with opset {MAX_OPSET} or lower."
        )
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise ModelError(f"{name}: imports no version of the default ONNX opset.")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelError(
            f"{name}: opset {opset} is outside of {MIN_OPSET} to {MAX_OPSET}. Export again within "
            "it, or convert with onnx.version_converter and compare the outputs."
        )


def to_proto(model: Model) -> onnx.ModelProto:
    """Return the model as a protobuf message that shares nothing with ``model``."""
    proto: onnx.ModelProto = gs.export_onnx(model.graph)
    rest = model.rest
    for name in ("doc_string", "domain", "model_version"):
        if rest.HasField(name):
            setattr(proto, name, getattr(rest, name))
    proto.training_info.extend(rest.training_info)
    for key, value in model.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    _restore_graph(proto.graph, rest.graph)
    return proto


def _restore_graph(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    _restore_doc_string(graph, rest)
    graph.metadata_props.extend(rest.metadata_props)
    _restore_nodes(graph, rest)
    values = {v.name: v for v in (*rest.input, *rest.output, *rest.value_info)}
    for value in (*graph.input, *graph.output, *graph.value_info):
        source = values.get(value.name, onnx.ValueInfoProto())
        _restore_doc_string(value, source)
        if source.metadata_props:
            value.metadata_props.extend(source.metadata_props)
    _restore_initializers(graph, rest)
    names = {v.name for v in (*graph.input, *graph.output, *graph.value_info, *graph.initializer)}
    names |= {output for node in graph.node for output in node.output}
    graph.quantization_annotation.extend(
        a for a in rest.quantization_annotation if a.tensor_name in names
    )


def _restore_doc_string(target: Any, source: Any) -> None:
    target.ClearField("doc_string")  # graphsurgeon writes an empty one
    if source.doc_string:
        target.doc_string = source.doc_string


def _restore_nodes(graph: onnx.GraphProto, rest: onnx.GraphProto) -> None:
    kept = {tuple(node.output): node for node in rest.node}
    for node in graph.node if kept else ():
        source = kept.get(tuple(node.output))
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
            present[source.name].metadata_props.extend(source.metadata_props)
        elif source.data_type and source.name not in names:
            graph.initializer.add().CopyFrom(source)
    # graphsurgeon takes initializers for constants and leaves them out of the inputs
    initializers = {tensor.name for tensor in graph.initializer}
    listed = {value.name for value in graph.input}
    graph.input.extend(v for v in rest.input if v.name in initializers and v.name not in listed)


def save_model(model: Model, path: str | Path, *, force: bool = False) -> None:
    """Write the model, whole or not at all; above 2 GB its weights go to ``<name>.data``.

    Raises
    ------
    OnnxQatError
        The file exists and ``force`` is not set, or it cannot be written.
    """
    path = Path(path)
    proto = to_proto(model)
    with atomic_output(path, force=force) as temporary:
        weights = sum(len(t.raw_data) for t in proto.graph.initializer)
        if weights > MAX_PROTOBUF_BYTES - 2**24:
            onnx.save(
                proto,
                str(temporary),
                save_as_external_data=True,
                location=f"{path.name}.data",
                size_threshold=1024,
            )
        else:
            temporary.write_bytes(proto.SerializeToString(deterministic=True))


def constant(name: str, values: NDArray[Any]) -> gs.Constant:
    """Return an initializer; a shape-() array stays of shape ()."""
    return gs.Constant(name, np.ascontiguousarray(values).reshape(values.shape))
