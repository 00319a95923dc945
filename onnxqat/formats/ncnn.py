"""ncnn's calibration table, for ``ncnn2int8``.

::

    conv1_param_0 83.2 91.7 ...         127 / absmax of each channel, which is 1 / scale
    conv1 46.1                          1 / scale of its input

Each layer has one line of each kind, by the name of its node (OpenPPL/ppq
``ppq/parser/ncnn_exporter.py``). ncnn2int8 (Tencent/ncnn ``tools/quantize/ncnn2int8.cpp``) reads
names of at most 255 bytes, reads numbers by ``%f`` into float32, and stops at an empty line. A
grouped convolution has one scale for each group: the largest of the group's channels. The other
channels of the group therefore get a coarser grid on the chip than in training.

Numbers are written with all digits of a float64, so that the float32 scale is recovered bit for
bit; ncnn itself multiplies by the float32 nearest to 1 / scale. PPQ writes ``%f``, six decimals.
Format-checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
_WEIGHT = "_param_"  # ncnn2int8 takes every name that contains this for a weight's


def _layers(graph: gs.Graph, plan: QuantPlan) -> Iterator[tuple[gs.Node, QuantPoint, QuantPoint]]:
    """Yield the nodes that ncnn quantizes, with the points of their input and weight."""
    edges = edges_of(plan)
    for node in graph.nodes:
        x, weight = (edges.get((node.name, i)) for i in (0, 1))
        if node.op in _LAYERS and x is not None and weight is not None and weight.role == "weight":
            yield node, x, weight


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    for node, x, weight in _layers(graph, plan):
        yield Key(node.name, x.parameters)
        yield Key(f"{node.name}{_WEIGHT}0", weight.parameters)


def _misread(name: str) -> str | None:
    if _WEIGHT in name.removesuffix(f"{_WEIGHT}0"):
        return f"has '{_WEIGHT}', which marks a weight"
    return misread(name, longest=255)


def _write(source: Calibrated) -> Written:
    require_symmetric(source, _TITLE, weight_bits=range(2, 9))
    layers = list(_layers(source.graph, source.plan))
    inputs, weights = [], []
    for node, x, weight in layers:
        scales = _for_groups(node, source.params(weight).scale.astype(np.float64))
        weights.append(f"{node.name}{_WEIGHT}0 {' '.join(_decimal(1 / s) for s in scales)}\n")
        inputs.append(f"{node.name} {_decimal(1 / float(source.params(x).scale))}\n")
    covered = {p.parameters for _, x, weight in layers for p in (x, weight)}
    others = source.others(covered, "activation", "weight")
    return Written(
        files={"table": "".join(weights + inputs)}, left_out=others | source.left_out("biases")
    )


def _decimal(value: float) -> str:
    return np.format_float_positional(value, unique=True, trim="0")


def _count(node: gs.Node) -> int:
    """Return how many weight scales ncnn takes for a node."""
    group = int(node.attrs.get("group", 1))
    return group if group > 1 else output_channels(node, node.inputs[1].shape) or 1


def _for_groups(node: gs.Node, scales: NDArray[Any]) -> NDArray[Any]:
    """Return the scales that ncnn takes: one for each group, or each output channel."""
    count = _count(node)
    return np.broadcast_to(scales, count) if scales.ndim == 0 else scales.reshape(count, -1).max(1)


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, lines = Found(table.name, graph), rows(table, range(1, 2**20))
    points = {p.parameters: p.tensor for p in plan.grid_points()}
    for node, x, weight in _layers(graph, plan):
        for point, name in ((weight, f"{node.name}{_WEIGHT}0"), (x, node.name)):
            numbers = lines.pop(name, None)
            if numbers is None:
                found.missing.append(name)
                points.pop(point.parameters, None)
                continue
            points.pop(point.parameters, None)
            with np.errstate(divide="ignore"):
                scales = np.float64(1) / np.asarray(numbers)
            scales = _for_channels(node, point, scales)
            found.put(point, scales, signed=True, name=name)
    found.unsaid += points.values()
    found.unused += lines
    return found


def _for_channels(node: gs.Node, point: QuantPoint, scales: NDArray[Any]) -> NDArray[Any]:
    """Repeat each group's scale for its channels; return one scale for a per-tensor point."""
    if point.role == "weight" and scales.size == _count(node):
        if point.spec.axis is None:
            return scales[:1] if (scales == scales[0]).all() else scales
        channels = node.inputs[1].shape[point.spec.axis]
        return np.repeat(scales, channels // scales.size)
    return scales


NCNN = Format(
    summary="calibration table of ncnn2int8",
    files={"table": "ncnn.table"},
    writer=_write,
    read=_read,
    keys=_keys,
    misread=_misread,
)
