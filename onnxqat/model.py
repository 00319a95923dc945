"""Read and write ONNX files as `onnx_graphsurgeon.Graph`; no other module converts between them.

graphsurgeon loses the model's metadata_props and doc string, doc strings of nodes, values and
initializers, node metadata, quantization annotations, initializers that no node reads, denotations,
and parts of functions. It also writes an initializer into the subgraphs that read it. A `Model`
keeps these parts beside the graph and restores them when it is written, so that everything that no
stage has changed is written as it was read. Parts that can be neither kept nor restored (attributes
of rare types, empty list attributes) are refused.

Functions are restored completely; stages must not edit their bodies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnxqat import native
from onnxqat.errors import ModelError, OnnxQatError
from onnxqat.external import read_external_data, write_external_data
from onnxqat.files import atomic_output, check_readable
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.preserve import all_nodes, restore, stored_tensors, without_weights
from onnxqat.validate import check_data, validate
from onnxqat.versions import MAX_IR_VERSION, MAX_OPSET, readable_opset

__all__ = [
    "Model",
    "constant",
    "exported",
    "from_proto",
    "load_model",
    "weights_left_out",
    "write_model",
]

MAX_PROTOBUF_BYTES = 2**31 - 1
MAX_INLINE_ELEMENTS = 256  # larger initializers are stored outside of a model above 2 GB
MAX_REASON = 200  # characters quoted from another library's message

# graphsurgeon logs to stdout, where commands write their JSON.
G_LOGGER.severity = G_LOGGER.CRITICAL


@dataclass(kw_only=True, eq=False, repr=False)
class Model:
    """A graph, its metadata, and the rest of its ONNX file.

    Attributes
    ----------
    graph : onnx_graphsurgeon.Graph
        Nodes and tensors.
    metadata : dict of str to str
        The file's ``metadata_props``.
    rest : onnx.ModelProto
        The file without weights, from which the parts that graphsurgeon loses are restored.
    name : str
        The file name, for messages.
    """

    graph: gs.Graph
    metadata: dict[str, str]
    rest: onnx.ModelProto
    name: str

    def copy(self) -> Model:
        """Return a model whose graph can be changed without changing this one."""
        source, graph = self.graph, self.graph.copy()
        # Graph.copy loses these, and shares a list that it extends on export
        graph.producer_name, graph.producer_version = source.producer_name, source.producer_version
        graph.import_domains = _copy_opsets(source.import_domains)
        originals = source.tensors()
        for name, tensor in graph.tensors().items():
            if isinstance(tensor, gs.Variable):
                tensor.type = originals[name].type
        _share_constants(graph)
        return Model(graph=graph, metadata=dict(self.metadata), rest=self.rest, name=self.name)

    def __repr__(self) -> str:
        return f"Model('{self.name}', {len(self.graph.nodes)} nodes, opset {self.graph.opset})"

    def to_proto(self) -> onnx.ModelProto:
        """Return the model as an independent protobuf message."""
        proto = exported(self.graph, self.name)
        for key, value in self.metadata.items():
            proto.metadata_props.add(key=key, value=value)
        restore(proto, self.rest)
        return proto

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the model, completely or not at all.

        The weights of a model above 2 GB are written to ``<name>.<hash>.data`` beside it.

        Raises
        ------
        OnnxQatError
            The file exists and ``force`` is not set, or it cannot be written.
        """
        with atomic_output(path, force=force) as temporary:
            write_model(self, temporary)


def _copy_opsets(opsets: Iterable[onnx.OperatorSetIdProto]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(opset.domain, opset.version) for opset in opsets]


def _share_constants(graph: gs.Graph) -> None:
    """Make subgraphs read the graph's own constants instead of the copies made by Graph.copy."""
    constants = {n: t for n, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    for subgraph in graph.subgraphs(recursive=True) if constants else ():
        for node in subgraph.nodes:
            for index, tensor in enumerate(node.inputs):
                if isinstance(tensor, gs.Constant):
                    node.inputs[index] = constants.get(tensor.name, tensor)


def load_model(path: str | Path) -> Model:
    """Read an ONNX file, with its external data.

    Raises
    ------
    ModelError
        The file is missing or not an ONNX file, `onnxqat.versions` cannot make its opset readable,
        its external data lie outside of the model's folder, or a tensor's data do not fit its
        shape.
    """
    check_readable(path, ModelError)
    path = Path(path)
    try:
        # the format is given, because onnx would otherwise choose it by the file's suffix
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file. Give the exported .onnx.") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX file, or an empty graph. Give the exported .onnx.")
    validate(proto, str(path))
    mapped = read_external_data(proto, path)
    for tensor in stored_tensors(proto):
        if tensor.name not in mapped:
            check_data(tensor, str(path))
    model = _wrapped(proto, path.name)
    tensors = model.graph.tensors() if mapped else {}
    for name, values in mapped.items():
        tensors[name].values = values
    return model


def from_proto(proto: onnx.ModelProto, *, name: str = "model") -> Model:
    """Return the `Model` of a message in memory, which is not changed; see `load_model`."""
    validate(proto, name)
    return _wrapped(proto, name)


def _wrapped(proto: onnx.ModelProto, name: str) -> Model:
    """Validate a model, and return it as a graph and the rest of the file."""
    opset = readable_opset(proto, name)
    proto = _filled(proto)
    rest = without_weights(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        graph = gs.import_onnx(_typed(proto, name))
    except OnnxQatError:
        raise
    except Exception as error:  # graphsurgeon raises any type of error for malformed files
        raise ModelError(
            f"{name}: malformed ONNX graph ({_one_line(error)}). Export it again."
        ) from error
    graph.import_domains = _copy_opsets(proto.opset_import)
    _set_versions(graph, rest, opset)
    _forget_impossible_lengths(graph)
    return Model(graph=graph, metadata=metadata, rest=rest, name=name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " ..."


_EMPTY_LISTS = {"value_ints": onnx.TensorProto.INT64, "value_floats": onnx.TensorProto.FLOAT}


def _filled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Give Constant nodes with an empty list, as PyTorch writes them, an empty tensor instead."""
    if not any(True for _ in _empty_lists(proto)):
        return proto
    filled = onnx.ModelProto()
    filled.CopyFrom(proto)
    for node, attribute in _empty_lists(filled):
        kind = _EMPTY_LISTS[attribute.name]
        empty = onnx.helper.make_tensor(node.output[0], kind, [0], [])
        attribute.CopyFrom(onnx.helper.make_attribute("value", empty))
    return filled


def _empty_lists(
    proto: onnx.ModelProto,
) -> Iterator[tuple[onnx.NodeProto, onnx.AttributeProto]]:
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name in _EMPTY_LISTS and not (
                attribute.ints or attribute.floats or attribute.ref_attr_name
            ):
                yield node, attribute


def _typed(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model with a type for each output, without which graphsurgeon cannot write it."""
    bare = [value.name for value in proto.graph.output if not _has_type(value)]
    if not bare:
        return proto
    typed = onnx.ModelProto()
    typed.CopyFrom(proto)
    try:
        inferred = {value.name: value for value in native.infer_shapes(proto).graph.output}
    except native.NativeError as error:
        raise ModelError(
            f"{name}: shapes cannot be inferred ({error}). Export it again."
        ) from error
    for value in typed.graph.output:
        if value.name in bare:
            if not _has_type(inferred[value.name]):
                raise ModelError(
                    f"{name}: output '{value.name}' has no type, and ONNX cannot infer it. "
                    "Export it with its type."
                )
            value.type.CopyFrom(inferred[value.name].type)
    return typed


def _has_type(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.WhichOneof("value")
    return kind is not None and (kind != "tensor_type" or value.type.tensor_type.elem_type != 0)


def _forget_impossible_lengths(graph: gs.Graph) -> None:
    """Make negative lengths, which old exporters write for dynamic ones, unknown lengths."""
    for tensor in (*graph.tensors().values(), *graph.inputs, *graph.outputs):
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            sizes = list(tensor.shape)
            if any(isinstance(size, int) and size < 0 for size in sizes):
                tensor.shape = [
                    None if isinstance(size, int) and size < 0 else size for size in sizes
                ]


def _set_versions(graph: gs.Graph, rest: onnx.ModelProto, opset: int) -> None:
    """Set the versions as which the model is read."""
    graph.opset = opset
    graph.ir_version = min(graph.ir_version, MAX_IR_VERSION)
    for holder in (graph.import_domains, *(f.opset_import for f in rest.functions)):
        for entry in holder:
            if entry.domain in ONNX_DOMAINS:
                entry.version = min(entry.version, MAX_OPSET)


def exported(graph: gs.Graph, name: str) -> onnx.ModelProto:
    """Return a graph as a message, without the rest of its file.

    Raises
    ------
    ModelError
        graphsurgeon cannot write it.
    """
    try:
        return gs.export_onnx(graph)  # type: ignore[no-any-return]
    except Exception as error:  # graphsurgeon can raise any type of error
        raise ModelError(
            f"{name}: graph '{graph.name}' cannot be written ({_one_line(error)}). Export it again."
        ) from error


@contextmanager
def weights_left_out(graph: gs.Graph, size: int) -> Iterator[dict[str, gs.Constant]]:
    """Export initializers of more than ``size`` elements without their data inside the block.

    Yields these initializers by name. The block must not read the values of the graph's constants.
    """
    plain = {name: tensor for name, tensor in graph.tensors().items() if _is_plain(tensor)}
    large = {name: tensor for name, tensor in plain.items() if math.prod(tensor.shape) > size}
    stored = {name: tensor._values for name, tensor in large.items()}
    try:
        for name, tensor in large.items():
            kind = dtype_to_onnx(tensor.dtype)
            empty = onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape)
            tensor._values = LazyValues(empty)
        yield large
    finally:
        for name, tensor in large.items():
            tensor._values = stored[name]


def write_model(model: Model, path: Path) -> None:
    """Write the model to a temporary path; see `Model.save`."""
    weights = {n: t for n, t in model.graph.tensors().items() if _is_plain(t)}
    size = sum(tensor._values.nbytes for tensor in weights.values())
    if size > MAX_PROTOBUF_BYTES - 2**24:
        with weights_left_out(model.graph, MAX_INLINE_ELEMENTS) as left_out:
            proto = model.to_proto()
        values = ((name, tensor.values) for name, tensor in left_out.items())
        write_external_data(proto, values, path)
    else:
        proto = model.to_proto()
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _is_plain(tensor: gs.Tensor) -> bool:
    """Whether a tensor is an initializer of a type that numpy knows."""
    return (
        isinstance(tensor, gs.Constant)
        and not isinstance(tensor._values, SparseValues)
        and isinstance(tensor.dtype, np.dtype)
        and tensor.dtype.isbuiltin == 1
    )


def constant(name: str, values: NDArray[Any]) -> gs.Constant:
    """Return an initializer; an array of shape () keeps its shape."""
    return gs.Constant(name, np.ascontiguousarray(values).reshape(values.shape))
