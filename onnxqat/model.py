"""The only door between ONNX files and `onnx_graphsurgeon.Graph`.

graphsurgeon drops what it has no field for: the model's metadata_props and doc string, doc
strings of nodes, values and initializers, node metadata, quantization annotations,
initializers that no node reads, denotations, and half of what a function says. It also writes
an initializer into the subgraphs that read it. A `Model` carries these beside the graph and puts
them back when it is written, so that whatever no stage touched comes out as it went in. What can
be neither held nor put back (attributes of rare types, empty list attributes) is refused.

Functions are put back whole: no stage may edit the body of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from onnxqat.errors import ModelError
from onnxqat.external import read_external_data, write_external_data
from onnxqat.files import atomic_output
from onnxqat.preserve import all_nodes, restore, stored_tensors, subgraphs, without_weights
from onnxqat.versions import MAX_IR_VERSION, MAX_OPSET, readable_opset

__all__ = [
    "Model",
    "constant",
    "from_proto",
    "load_model",
    "save_model",
    "to_proto",
    "weights_left_out",
    "write_model",
]

MAX_PROTOBUF_BYTES = 2**31 - 1
MAX_INLINE_ELEMENTS = 256  # of an initializer that stays in the model file where others leave it
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
        source, graph = self.graph, self.graph.copy()
        # Graph.copy forgets these, and shares the list that it extends when it exports
        graph.producer_name, graph.producer_version = source.producer_name, source.producer_version
        graph.import_domains = _copy_opsets(source.import_domains)
        originals = source.tensors()
        for name, tensor in graph.tensors().items():
            if isinstance(tensor, gs.Variable):
                tensor.type = originals[name].type
        _share_constants(graph)
        return Model(graph=graph, metadata=dict(self.metadata), rest=self.rest, name=self.name)


def _copy_opsets(opsets: Iterable[onnx.OperatorSetIdProto]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(opset.domain, opset.version) for opset in opsets]


def _share_constants(graph: gs.Graph) -> None:
    """Let subgraphs read the graph's own constants again, where Graph.copy gave them copies."""
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
        Missing or not an ONNX file, an opset that `onnxqat.versions` cannot make readable,
        external data outside of the model's folder, or a tensor whose data is not of its shape.
    """
    path = Path(path)
    try:
        # named, because onnx would choose the format by the file's suffix
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file.") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file. Give the exported .onnx.") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX file, or an empty graph. Give the exported .onnx.")
    _check_depth(proto.graph, str(path))
    _fill_empty_constants(proto)
    mapped = read_external_data(proto, path)
    for tensor in stored_tensors(proto):
        if tensor.name not in mapped:
            _check_data(tensor, str(path))
    model = from_proto(proto, name=path.name)
    tensors = model.graph.tensors() if mapped else {}
    for name, values in mapped.items():
        tensors[name].values = values
    return model


def from_proto(proto: onnx.ModelProto, *, name: str = "model") -> Model:
    """Wrap a model that is already in memory; see `load_model`."""
    opset = readable_opset(proto, name)
    _check_depth(proto.graph, name)
    _check_held(proto, name)
    rest = without_weights(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        graph = gs.import_onnx(proto)
    except Exception as error:  # graphsurgeon raises whatever a malformed file provokes
        raise ModelError(f"{name}: malformed ONNX graph ({error}).") from error
    graph.import_domains = _copy_opsets(proto.opset_import)
    _set_versions(graph, rest, opset)
    return Model(graph=graph, metadata=metadata, rest=rest, name=name)


def _check_data(tensor: onnx.TensorProto, name: str) -> None:
    """Refuse a tensor that cannot be read, which graphsurgeon would only find when it is used."""
    try:
        onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{name}: tensor '{tensor.name}' of shape {list(tensor.dims)} and data type "
            f"{tensor.data_type} cannot be read ({error}). Export again, with the weights."
        ) from error


_EMPTY_LISTS = {"value_ints": onnx.TensorProto.INT64, "value_floats": onnx.TensorProto.FLOAT}


def _fill_empty_constants(proto: onnx.ModelProto) -> None:
    """Let Constant nodes with an empty list, which PyTorch writes, hold an empty tensor."""
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            kind = _EMPTY_LISTS.get(attribute.name)
            if kind and not (attribute.ints or attribute.floats or attribute.ref_attr_name):
                empty = onnx.helper.make_tensor(node.output[0], kind, [0], [])
                attribute.CopyFrom(onnx.helper.make_attribute("value", empty))


def _set_versions(graph: gs.Graph, rest: onnx.ModelProto, opset: int) -> None:
    """Stamp the versions that the model is read as."""
    graph.opset = opset
    graph.ir_version = min(graph.ir_version, MAX_IR_VERSION)
    for holder in (graph.import_domains, *(f.opset_import for f in rest.functions)):
        for entry in holder:
            if entry.domain in ("", "ai.onnx"):
                entry.version = min(entry.version, MAX_OPSET)


def _check_depth(graph: onnx.GraphProto, name: str, depth: int = 0) -> None:
    if depth > MAX_SUBGRAPH_DEPTH:
        raise ModelError(f"{name}: subgraphs nest deeper than {MAX_SUBGRAPH_DEPTH} levels.")
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in subgraphs(attribute):
                _check_depth(subgraph, name, depth + 1)


_SINGLE_ATTRIBUTES = (
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.INT,
    onnx.AttributeProto.STRING,
    onnx.AttributeProto.TENSOR,
    onnx.AttributeProto.GRAPH,
)
_LIST_ATTRIBUTES = (
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.STRINGS,
)


def _check_held(proto: onnx.ModelProto, name: str) -> None:
    """Refuse what graphsurgeon would drop (rare types) or could not write (an empty list)."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type", "sequence_type", "sparse_tensor_type"):
            raise ModelError(f"{name}: value '{value.name}' has the unsupported type '{kind}'.")
    for node in all_nodes(proto.graph.node, *(f.node for f in proto.functions)):
        for attribute in node.attribute:
            where = f"{name}: attribute '{attribute.name}' of node '{node.name or node.op_type}'"
            if attribute.type not in (*_SINGLE_ATTRIBUTES, *_LIST_ATTRIBUTES):
                kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                raise ModelError(f"{where} has the unsupported type '{kind}'. Export without it.")
            if attribute.type in _LIST_ATTRIBUTES and not (
                attribute.ref_attr_name or attribute.floats or attribute.ints or attribute.strings
            ):
                raise ModelError(f"{where} is an empty list. Leave it out of the export.")


def to_proto(model: Model) -> onnx.ModelProto:
    """Return the model as a protobuf message that shares nothing with ``model``."""
    proto: onnx.ModelProto = gs.export_onnx(model.graph)
    for key, value in model.metadata.items():
        proto.metadata_props.add(key=key, value=value)
    restore(proto, model.rest)
    return proto


@contextmanager
def weights_left_out(graph: gs.Graph, size: int) -> Iterator[dict[str, gs.Constant]]:
    """Let the initializers of more than ``size`` elements be exported without their data.

    Yields them by name. Within the block nothing may read the values of the graph's constants.
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


def save_model(model: Model, path: str | Path, *, force: bool = False) -> None:
    """Write the model, whole or not at all; above 2 GB its weights go to ``<name>.<hash>.data``.

    Raises
    ------
    OnnxQatError
        The file exists and ``force`` is not set, or it cannot be written.
    """
    with atomic_output(path, force=force) as temporary:
        write_model(model, temporary)


def write_model(model: Model, path: Path) -> None:
    """Write the model where no one reads yet; see `save_model`."""
    weights = {n: t for n, t in model.graph.tensors().items() if _is_plain(t)}
    size = sum(tensor._values.nbytes for tensor in weights.values())
    if size > MAX_PROTOBUF_BYTES - 2**24:
        with weights_left_out(model.graph, MAX_INLINE_ELEMENTS) as left_out:
            proto = to_proto(model)
        values = ((name, tensor.values) for name, tensor in left_out.items())
        write_external_data(proto, values, path)
    else:
        proto = to_proto(model)
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
    """Return an initializer; a shape-() array stays of shape ()."""
    return gs.Constant(name, np.ascontiguousarray(values).reshape(values.shape))
