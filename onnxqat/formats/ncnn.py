"""ncnn's calibration table, for ``ncnn2int8``.

::

    conv1_param_0 83.2 91.7 ...         127 / absmax of each channel, which is 1 / scale
    lstm1_param_0 71.3 64.2 ...         the same for each row of W
    lstm1_param_1 88.0 90.5 ...         and of R
    conv1 46.1                          1 / scale of its input

Each layer has one line of each kind, by the name of its node (OpenPPL/ppq
``ppq/parser/ncnn_exporter.py``); recurrent layers have no line of their input. ncnn2int8
(Tencent/ncnn ``tools/quantize/ncnn2int8.cpp``) reads names of at most 255 bytes, reads numbers by
``%f`` into float32, and stops at an empty line. A grouped convolution has one scale for each group:
the largest of the group's channels. The other channels of the group therefore get a coarser grid on
the chip than in training. The rows of a recurrent layer are in ncnn's order of the gates
(``tools/onnx/onnx2ncnn.cpp``), and those of the second direction follow those of the first.

Numbers are written with all digits of a float64, so that the float32 scale is recovered bit for
bit; ncnn itself multiplies by the float32 nearest to 1 / scale. PPQ writes ``%f``, six decimals.
Proof: format only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.formats.format import Calibrated, Format, Found, Key, Table, Written, edges_of
from onnxqat.formats.text_table import misread, rows
from onnxqat.formats.thresholds import require_symmetric
from onnxqat.nodes import output_channels
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["NCNN"]

_TITLE = "An ncnn table"
_LAYERS = {"Conv": "Convolution", "Gemm": "InnerProduct"}
# By recurrent layer, where ncnn's gates stand among those of ONNX: IFOG of iofc, RUN of zrh.
_GATES = {"GRU": (1, 0, 2), "LSTM": (0, 2, 1, 3), "RNN": (0,)}
_WEIGHT = "_param_"  # ncnn2int8 takes every name that contains this for a weight's


class _Line(NamedTuple):
    """What a line of the table is about."""

    name: str
    node: gs.Node
    point: QuantPoint


def _lines(graph: gs.Graph, plan: QuantPlan) -> Iterator[_Line]:
    """Yield the lines of the nodes that ncnn quantizes."""
    edges = edges_of(plan)
    for node in graph.nodes:
        x = edges.get((node.name, 0)) if node.op in _LAYERS else None
        places = (1, 2) if node.op in _GATES else (1,) if x else ()
        weights = [edges.get((node.name, i)) for i in places]
        quantized = [p for p in weights if p is not None and p.role == "weight"]
        if len(quantized) < len(places):
            continue
        for i, weight in enumerate(quantized):
            yield _Line(f"{node.name}{_WEIGHT}{i}", node, weight)
        if x is not None:
            yield _Line(node.name, node, x)


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    return (Key(line.name, line.point.parameters) for line in _lines(graph, plan))


def _misread(name: str) -> str | None:
    if _WEIGHT in re.sub(f"{_WEIGHT}[01]$", "", name):
        return f"has '{_WEIGHT}', which marks a weight"
    return misread(name, longest=255)


def _write(source: Calibrated) -> Written:
    require_symmetric(source, _TITLE, weight_bits=range(2, 9))
    lines = list(_lines(source.graph, source.plan))
    inputs, weights = [], []
    for name, node, point in lines:
        scales = source.params(point).scale.astype(np.float64)
        if point.role == "weight":
            numbers = " ".join(_decimal(1 / s) for s in _as_in_ncnn(node, scales))
            weights.append(f"{name} {numbers}\n")
        else:
            inputs.append(f"{name} {_decimal(1 / float(scales))}\n")
    covered = {line.point.parameters for line in lines}
    others = source.others(covered, "activation", "weight")
    return Written(
        files={"table": "".join(weights + inputs)}, left_out=others | source.left_out("biases")
    )


def _decimal(value: float) -> str:
    return np.format_float_positional(value, unique=True, trim="0")


def _count(node: gs.Node) -> int:
    """Return how many scales ncnn takes for a weight of a node."""
    shape = node.inputs[1].shape
    if node.op in _GATES:
        return int(shape[0] * shape[1])
    group = int(node.attrs.get("group", 1))
    return group if group > 1 else output_channels(node, shape) or 1


def _as_in_ncnn(node: gs.Node, scales: NDArray[Any]) -> NDArray[Any]:
    """Return the scales of a weight as ncnn takes them."""
    count = _count(node)
    if node.op in _GATES:
        directions, each = node.inputs[1].shape[:2]
        gates = np.broadcast_to(scales, each).reshape(len(_GATES[node.op]), -1)
        return np.tile(gates[list(_GATES[node.op])].reshape(-1), directions)
    return np.broadcast_to(scales, count) if scales.ndim == 0 else scales.reshape(count, -1).max(1)


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, lines = Found(table.name, graph), rows(table, range(1, 2**20))
    points = {p.parameters: p.tensor for p in plan.grid_points()}
    for name, node, point in _lines(graph, plan):
        numbers = lines.pop(name, None)
        points.pop(point.parameters, None)
        if numbers is None:
            found.missing.append(name)
            continue
        with np.errstate(divide="ignore"):
            scales = np.float64(1) / np.asarray(numbers)
        if point.role == "weight":
            scales = _as_here(node, point, scales)
        found.put(point, scales, signed=True, name=name)
    found.unsaid += points.values()
    found.unused += lines
    return found


def _as_here(node: gs.Node, point: QuantPoint, scales: NDArray[Any]) -> NDArray[Any]:
    """Return ncnn's scales in the order of the weight's channels; one of a per-tensor grid.

    They stay as they are where the plan has no place for them, which `Found.put` refuses.
    """
    axis, shape = point.spec.axis, node.inputs[1].shape
    if scales.size != _count(node):
        return scales
    if axis is None:
        return scales[:1] if (scales == scales[0]).all() else scales
    if node.op in _GATES:
        each = scales.reshape(shape[0], len(_GATES[node.op]), -1)
        alike = (each == each[0]).all()  # in both directions
        return each[0, np.argsort(_GATES[node.op])].reshape(-1) if alike else scales
    return np.repeat(scales, shape[axis] // scales.size)


NCNN = Format(
    summary="calibration table of ncnn2int8",
    files={"table": "ncnn.table"},
    writer=_write,
    read=_read,
    keys=_keys,
    misread=_misread,
)
