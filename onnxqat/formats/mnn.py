"""MNN's compression parameters: the JSON form of its ``MNN_compression.proto``.

::

    {"version": "0.0.0", "algo": [{"type": "QUANTIZE", "quantParams": {"layer": [
      {"input": [{"name": "x", "bits": 8, "scales": [0.02], "zeroPoint": 0,
                  "clampMin": -128, "clampMax": 127}],
       "weight": [{"name": "w1", "bits": 8, "scales": [0.01, 0.02],
                   "clampMin": -127, "clampMax": 127}],
       "output": [{"name": "r1", "bits": 8, "scales": [0.05], "zeroPoint": 0,
                   "clampMin": -128, "clampMax": 127}]}]}}]}

The converter's option ``--compressionParamsFile`` takes the file (alibaba/MNN
``tools/converter/source/compression/MNN_compression.proto``, read by
``tools/converter/source/common/CommonUtils.cpp`` and ``FullQuantAndCoding.cpp``). A layer is a
convolution or a matrix product. The converter looks a layer up by the name of its output. For a
convolution that it fuses with a Relu or Clip, this is the output of the Relu or Clip. Entries with
the same grids are written under both names, and the converter ignores the name that it does not
find. A layer needs all three grids. Other nodes run in float and are listed as left out: other ops,
grouped convolutions (the converter splits them), and matrix products that it fuses with the next
op (it invents a name for the result).

Activations must be int8 with zero_point 0. MNN 3.6.1 accepts other zero points, but loses them when
an op that is not a layer reads the tensor (measured: an addition 128 levels off), and it computes
wrong results with fewer bits. Weights have 2 to 8 bits and one scale for each output channel.
Biases stay float.

Checked with MNN 3.6.1 (``scripts/check_mnn.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, edges_of, refuse
from onnxqat.formats.json_table import numbers, read_json, write_json
from onnxqat.nodes import output_channels
from onnxqat.operators import MATRIX_PRODUCTS
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, quantized_range

__all__ = ["MNN"]

_FUSED = ("Relu", "Clip")
_SCALED = ("Add", "Sub", "Mul", "Div")  # fused if one operand is a constant
_VERSION = "0.0.0"


class _Grid(msgspec.Struct, rename="camel"):
    """The parameters of one tensor; the defaults are those of the .proto file."""

    name: str
    scales: list[float]
    bits: int = 8
    zero_point: int = 0
    clamp_min: int = -128
    clamp_max: int = 127


class _Layer(msgspec.Struct):
    input: list[_Grid] = []
    weight: list[_Grid] = []
    output: list[_Grid] = []


class _Quantization(msgspec.Struct):
    layer: list[_Layer] = []


class _Algorithm(msgspec.Struct, rename="camel"):
    quant_params: _Quantization = msgspec.field(default_factory=_Quantization)


class _Pipeline(msgspec.Struct):
    version: str
    algo: list[_Algorithm] = []


@dataclass(frozen=True)
class _Written:
    """A layer that can be written: its node, its three points, and its possible names."""

    node: gs.Node
    points: dict[str, QuantPoint]  # input, weight, output
    names: tuple[str, ...]

    @property
    def channels(self) -> int:
        return output_channels(self.node, self.node.inputs[1].shape) or 1


def _layers(graph: gs.Graph, plan: QuantPlan) -> Iterator[_Written]:
    """Yield the layers whose three grids the plan has."""
    edges = edges_of(plan)
    outputs = {p.tensor: p for p in plan.grid_points() if p.role == "activation"}
    nodes = {node.name: node for node in graph.nodes}
    chains = {chain[0]: chain for chain in plan.chains}
    for node in graph.nodes:
        chain = [nodes[name] for name in chains.get(node.name, (node.name,))]
        names = tuple(n.outputs[0].name for n in chain)
        points = {
            "input": edges.get((node.name, 0)),
            "weight": edges.get((node.name, 1)),
            "output": outputs.get(names[-1]),
        }
        found = {place: point for place, point in points.items() if point is not None}
        roles = [found[place].role for place in ("input", "weight") if place in found]
        if len(found) == 3 and roles == ["activation", "weight"] and _is_layer(node, chain):
            yield _Written(node, found, names)


def _is_layer(node: gs.Node, chain: list[gs.Node]) -> bool:
    """Return whether the converter keeps the chain as one layer with the same output."""
    if any(_is_fused(reader) for reader in chain[-1].outputs[0].outputs):
        return False
    if node.op != "Conv":
        return node.op in MATRIX_PRODUCTS and len(chain) == 1
    groups, (channels, inner, *kernel) = node.attrs.get("group", 1), node.inputs[1].shape
    whole = groups == 1 or (inner == 1 and groups == channels)
    return whole and len(kernel) == 2 and all(n.op in _FUSED for n in chain[1:])


def _is_fused(node: gs.Node) -> bool:
    constant = any(isinstance(t, gs.Constant) for t in node.inputs)
    return node.op in _FUSED or (node.op in _SCALED and constant)


def _write(source: Calibrated) -> Written:
    refuse(
        _problems(source),
        "MNN has int8 activations and signed symmetric weights of at most 8 bits",
    )
    layers = list(_layers(source.graph, source.plan))
    if not layers:
        raise FormatError(
            "An MNN table needs the input, weight and output of a layer quantized; no layer of the "
            "model has all three. Insert with a rule that quantizes outputs."
        )
    entries = []
    for layer in layers:
        grids = {
            place: _grid(point, source.params(point), layer.channels if place == "weight" else 1)
            for place, point in layer.points.items()
        }
        for name in layer.names:
            output = grids["output"] | {"name": name}
            entries.append({p: [grid] for p, grid in (grids | {"output": output}).items()})
    covered = {point.parameters for layer in layers for point in layer.points.values()}
    parameters = {"roundMode": "ROUND_AWAY_FROM_ZERO", "layer": entries}
    document = {"version": _VERSION, "algo": [{"type": "QUANTIZE", "quantParams": parameters}]}
    return Written(
        files={"table": write_json(document)},
        left_out=_float_ops(source, layers)
        | source.others(covered, "activation", "weight")
        | source.left_out("biases"),
    )


def _problems(source: Calibrated) -> Iterator[str]:
    for layer in _layers(source.graph, source.plan):
        for point in layer.points.values():
            params = source.params(point)
            if point.spec.bits > 8 or (point.role == "activation" and point.spec.bits < 8):
                yield f"'{point.tensor}' has {point.spec.bits} bits"
            elif not params.signed or np.any(params.zero_point):
                yield f"'{point.tensor}' has unsigned integers or a zero_point other than 0"


def _grid(point: QuantPoint, params: QuantParams, count: int) -> dict[str, Any]:
    low, high = quantized_range(point.spec, signed=True)
    zero = {} if point.role == "weight" else {"zeroPoint": 0}
    scales = numbers(np.broadcast_to(params.scale.astype(np.float64), (count,)))
    limits = {"clampMin": low, "clampMax": high}
    return {"name": point.tensor, "bits": point.spec.bits, "scales": scales, **zero, **limits}


def _float_ops(source: Calibrated, layers: list[_Written]) -> dict[str, tuple[str, ...]]:
    """Return the nodes that read quantized tensors and do not belong to a layer."""
    written = {layer.node.name for layer in layers}
    readers = {node for node, _ in edges_of(source.plan)} - written
    names = tuple(node.name for node in source.graph.nodes if node.name in readers)
    return {"ops that MNN runs in float": names} if names else {}


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    entries: dict[str, _Layer] = {}
    for algorithm in read_json(table, _Pipeline).algo:
        for entry in algorithm.quant_params.layer:
            if len(entry.output) != 1 or entry.output[0].name in entries:
                raise FormatError(
                    f"{table.name}: a layer has no output, or two layers have the same output. "
                    "Write the table again."
                )
            entries[entry.output[0].name] = entry
    found = Found(table.name, graph)
    lacking = {p.parameters: p.tensor for p in plan.grid_points()}
    for layer in _layers(graph, plan):
        named = [entries.pop(name) for name in layer.names if name in entries]
        for place, point in layer.points.items():
            lacking.pop(point.parameters, None)
            for entry in named:
                _put(found, layer, place, getattr(entry, place))
        found.missing += () if named else [layer.names[-1]]
    found.unsaid += lacking.values()
    found.unused += entries
    return found


def _put(found: Found, layer: _Written, place: str, grids: list[_Grid]) -> None:
    """Add the parameters of a layer's input, weight or output from a table entry."""
    point, name = layer.points[place], layer.names[-1]
    (grid,) = grids if len(grids) == 1 else (None,)
    if grid is None or grid.bits != point.spec.bits:
        raise FormatError(
            f"{found.source}: '{name}' has no {place} of {point.spec.bits} bits. Are --rules and "
            "--set those that the table was made with?"
        )
    limits = (grid.clamp_min, grid.clamp_max)
    if limits != quantized_range(point.spec, signed=True):
        raise FormatError(
            f"{found.source}: '{name}' has the range [{limits[0]}, {limits[1]}] for its {place}; "
            "the plan has another. Are --rules and --set those that the table was made with?"
        )
    scales = np.asarray(grid.scales)
    if point.spec.axis is None and scales.size == layer.channels and (scales == scales[0]).all():
        scales = scales[:1]
    found.put(point, scales, grid.zero_point, signed=True, name=name)


MNN = Format(
    summary="compression parameters for MNN's converter",
    files={"table": "mnn.json"},
    writer=_write,
    read=_read,
)
