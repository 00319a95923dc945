"""Gradients of convolutions with small feature maps, as products of matrices over the whole batch.

onnxruntime's ConvGrad loops over the samples and multiplies matrices with as many columns as the
map has positions: where these are few, most of the time goes into reading and writing the weight
again for every sample. Here the samples lie behind each other (the innermost axis), and each
gradient is one product (the im2col method: Chellapilla et al. 2006, "High performance
convolutional neural networks for document processing", section 3)::

    columns[(ci, tap), (position, n)] = x[n, ci, where the tap lies at the position], 0 in the pads
    dw = dy @ columns^T
    dx = scatter @ (w^T @ dy)        scatter[where, (tap, position)] = 1
    db = sum of dy over samples and positions

``scatter`` is a product too: its matrix is small because the map is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["batch_convolutions"]

# Where the products are faster, by the processor time of both on Zen 5 with AVX-512. Milliseconds
# of ConvGrad and of the products, 32 samples, 3x3 kernels:
#
#   512 channels, 1x1 map     14.0   2.4      960 channels, depthwise, 1x1 map   4.8  0.5
#   256 channels, 2x2 map      7.2   1.7      576 channels, depthwise, 2x2 map   4.2  0.4
#   128 channels, 4x4 map      2.9   1.9      192 channels, depthwise, 4x4 map   1.9  0.4
#   512 channels, 7x7 map *     58    33      960 channels, depthwise, 7x7 map * 3.9  7.9
#    64 channels, 8x8 map      2.4   2.9      (* 8 samples)
#
# The last row of each column stays with ConvGrad. With 4 samples or fewer some of the others lose.
OUT_POSITIONS, IN_POSITIONS, SAMPLES = 49, 64, 8
OUT_POSITIONS_OF_FEW_FILTERS, FEW_FILTERS = 16, 16  # filters of a group
SCATTER_ELEMENTS = 1 << 17  # 512 KB: of a large kernel the matrix would not stay in the cache

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """Shapes and attributes of one convolution; spatial ones of any rank."""

    x: list[int]
    w: list[int]
    dy: list[int]
    group: int
    strides: list[int]
    pads: list[int]
    dilations: list[int]

    def sources(self) -> Array:
        """Return which input position each tap reads at each output position.

        Returns
        -------
        int64 array of shape (taps, output positions)
            The number of positions where the tap lies in the pads.
        """
        taps, outputs = (np.indices(a[2:]).reshape(len(a) - 2, -1) for a in (self.w, self.dy))
        flat = np.zeros((taps.shape[1], outputs.shape[1]), np.int64)
        outside = np.zeros(flat.shape, bool)
        for axis, length in enumerate(self.x[2:]):
            at = taps[axis][:, None] * self.dilations[axis] - self.pads[axis]
            at = at + outputs[axis] * self.strides[axis]
            flat = flat * length + at
            outside |= (at < 0) | (at >= length)
        flat[outside] = math.prod(self.x[2:])
        return flat


@dataclass(kw_only=True)
class _Emitter:
    """Collects nodes and constants whose names begin with ``prefix``."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, values: Any) -> str:
        name = f"{self.prefix}/{name}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node; an output that begins with ``>`` is a tensor of the graph."""
        domain, _, op_type = op_type.rpartition(".")
        name = output[1:] if output.startswith(">") else f"{self.prefix}/{output}"
        made = helper.make_node(op_type, inputs, [name], name=name, domain=domain, **attributes)
        self.nodes.append(made)
        return name

    def reshape(self, tensor: str, shape: list[int], output: str) -> str:
        """Add a Reshape; see `node`."""
        sizes = self.constant(f"{output.strip('>')}/shape", np.array(shape, np.int64))
        return self.node("Reshape", [tensor, sizes], output)


def batch_convolutions(model: onnx.ModelProto) -> None:
    """Replace, in place, each ConvGrad that is slower than products of matrices.

    Parameters
    ----------
    model : onnx.ModelProto
        With shapes; a node whose shapes are not known stays.
    """
    shapes = dict(_shapes(model.graph))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        geometry = _geometry(node, shapes) if node.op_type == "ConvGrad" else None
        if geometry is None or not _gains(geometry):
            nodes.append(node)
            continue
        # a tensor's name is unique, a node's need not be
        emitter = _Emitter(prefix=f"{next(filter(None, node.output))}/batched")
        _emit(emitter, geometry, list(node.input), [*node.output, "", ""][:3])
        nodes += emitter.nodes
        model.graph.initializer.extend(emitter.constants)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _shapes(graph: onnx.GraphProto) -> Iterator[tuple[str, list[int]]]:
    values: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    for value in values:
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT and kind.HasField("shape"):
            yield value.name, [d.dim_value for d in kind.shape.dim]
    for tensor in graph.initializer:
        yield tensor.name, list(tensor.dims)


def _geometry(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> _Geometry | None:
    """Return None where a length is not known."""
    dy, x, w = (shapes.get(name, []) for name in node.input)
    if not all(shape and all(shape) for shape in (dy, x, w)):
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    ones = [1] * (len(w) - 2)
    return _Geometry(
        x=x,
        w=w,
        dy=dy,
        group=attributes.get("group", 1),
        strides=list(attributes.get("strides", ones)),
        pads=list(attributes.get("pads", [0] * (2 * len(ones)))),
        dilations=list(attributes.get("dilations", ones)),
    )


def _gains(geometry: _Geometry) -> bool:
    """Return whether products of matrices are faster."""
    taps, out, into = (math.prod(a[2:]) for a in (geometry.w, geometry.dy, geometry.x))
    filters = geometry.w[0] // geometry.group
    limit = OUT_POSITIONS if filters > FEW_FILTERS else OUT_POSITIONS_OF_FEW_FILTERS
    small = out <= limit and into <= IN_POSITIONS and taps * out * into <= SCATTER_ELEMENTS
    return small and geometry.x[0] >= SAMPLES


def _emit(emit: _Emitter, geometry: _Geometry, inputs: list[str], outputs: list[str]) -> None:
    """Add the nodes of the outputs that have a name."""
    (dy, x, w), (dx, dw, db) = inputs, outputs
    samples, group = geometry.x[0], geometry.group
    filters, channels = geometry.w[0] // group, geometry.w[1]
    rank = len(geometry.x)
    sources = geometry.sources()
    moved = emit.node("Transpose", [dy], "dy_moved", perm=[*range(1, rank), 0])
    rows = emit.reshape(moved, [group, filters, -1], "dy_rows")
    if dw:
        gathered = _gather(emit, geometry, x, sources)
        columns = emit.reshape(gathered, [group, channels * len(sources), -1], "columns")
        product = emit.node("com.microsoft.FusedMatMul", [rows, columns], "dw_rows", transB=1)
        emit.reshape(product, geometry.w, f">{dw}")
    if dx:
        taps = emit.reshape(w, [group, filters, -1], "w_rows")
        spread = emit.node("com.microsoft.FusedMatMul", [taps, rows], "dx_columns", transA=1)
        spread = emit.reshape(spread, [group * channels, sources.size, samples], "dx_taps")
        into = math.prod(geometry.x[2:])
        if not _is_identity(sources, into):
            scatter = np.arange(into)[:, None] == sources.reshape(-1)
            matrix = emit.constant("scatter", scatter.astype(np.float32))
            spread = emit.node("MatMul", [matrix, spread], "dx_positions")
        shaped = emit.reshape(spread, [*geometry.x[1:], samples], "dx_moved")
        emit.node("Transpose", [shaped], f">{dx}", perm=[rank - 1, *range(rank - 1)])
    if db:
        axes = emit.constant("db_axes", np.array([2], np.int64))
        total = emit.node("ReduceSum", [rows, axes], "db_groups", keepdims=0)
        emit.reshape(total, [-1], f">{db}")


def _gather(emit: _Emitter, geometry: _Geometry, x: str, sources: Array) -> str:
    """Add what makes (channels, taps, output positions, samples) of x."""
    moved = emit.node("Transpose", [x], "x_moved", perm=[*range(1, len(geometry.x)), 0])
    into = math.prod(geometry.x[2:])
    if _is_identity(sources, into):
        return moved
    positions = emit.reshape(moved, [geometry.x[1], into, geometry.x[0]], "x_positions")
    if (sources == into).any():
        pads = emit.constant("pads", np.array([0, 0, 0, 0, 1, 0], np.int64))
        positions = emit.node("Pad", [positions, pads], "x_padded")
    indices = emit.constant("sources", sources)
    return emit.node("Gather", [positions, indices], "x_taps", axis=1)


def _is_identity(sources: Array, positions: int) -> bool:
    return sources.size == positions and bool((sources.reshape(-1) == np.arange(positions)).all())
