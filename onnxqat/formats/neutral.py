"""onnxqat's own table: the whole plan and all its parameters, exact, for any rule.

::

    {"schema": "onnxqat.table/1", "rule": "my-chip", "overrides": [],
     "points": [{"tensor": "w1", "role": "weight", "consumers": [{"node": "conv1", "index": 1}],
                 "dtype": "int8", "bits": 8, "qmin": -127, "qmax": 127, "axis": 0,
                 "scale": [0.01, 0.02], "zero_point": [0, 0]}],
     "biases": [{"tensor": "b1", "node": "conv1", "index": 2, "dtype": "int32", "axis": 0,
                 "scale": [0.0002, 0.0004]}],
     "float": [{"node": "pool", "op_type": "MaxPool", "reason": "..."}]}

A point is quantized by
``y = (clip(round_half_even(x / scale) + zero_point, qmin, qmax) - zero_point) * scale`` in float32.
``axis`` null means per-tensor, with one scale. ``dtype`` is the ONNX type that holds the integers.
A bias has the scale s_x * s_w in float32 and zero_point 0. A point with ``requantizes`` is the
tensor of that name, quantized a second time for the point's consumers; the tensor's own point does
not list these. The model has no tensor with the point's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.json_table import numbers, read_json, write_json
from onnxqat.formats.onnxruntime_qdq import bias_scale
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, quantized_range, storage_dtype

__all__ = ["NEUTRAL"]

_SCHEMA = "onnxqat.table/1"


class _Point(msgspec.Struct):
    tensor: str
    dtype: Literal["int8", "uint8", "int16", "uint16"]
    bits: int
    qmin: int
    qmax: int
    axis: int | None
    scale: list[float]
    zero_point: list[int]


class _Document(msgspec.Struct):
    schema: Literal["onnxqat.table/1"]
    points: list[_Point]


def _point(
    point: QuantPoint, params: QuantParams, requantized: Mapping[str, str]
) -> dict[str, Any]:
    origin = {"requantizes": requantized[point.tensor]} if point.tensor in requantized else {}
    qmin, qmax = quantized_range(point.spec, signed=params.signed)
    return {
        "tensor": point.tensor,
        **origin,
        "role": point.role,
        "consumers": [
            {"node": e.node, "index": e.index} for e in point.consumers if e.node not in requantized
        ],
        "dtype": params.zero_point.dtype.name,
        "bits": point.spec.bits,
        "qmin": qmin,
        "qmax": qmax,
        "axis": point.spec.axis,
        "scale": numbers(params.scale.astype(np.float64)),
        "zero_point": numbers(params.zero_point),
    }


def _bias(source: Calibrated, point: QuantPoint) -> dict[str, Any]:
    points = {p.tensor: p for p in source.plan.grid_points()}
    x, w = (source.params(points[name]) for name in point.derived_from or ())
    size = source.graph.tensors()[point.tensor].values.size
    scale = bias_scale(x, w, size)
    return {
        "tensor": point.tensor,
        "node": point.consumers[0].node,
        "index": point.consumers[0].index,
        "dtype": "int32",
        "bits": point.spec.bits,
        "axis": 0 if scale.ndim else None,
        "scale": numbers(scale.astype(np.float64)),
    }


def _write(source: Calibrated) -> Written:
    plan, requantized = source.plan, source.plan.requantized()
    document = {
        "schema": _SCHEMA,
        "rule": plan.rule,
        "overrides": list(plan.overrides),
        "points": [_point(p, source.params(p), requantized) for p in plan.grid_points()],
        "biases": [_bias(source, p) for p in plan.points if p.role == "bias"],
        "float": [{"node": s.node, "op_type": s.op_type, "reason": s.reason} for s in plan.skips],
    }
    return Written(files={"table": write_json(document)})


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, points = Found(table.name, graph), read_json(table, _Document).points
    for point, entry in found.entries(plan, points):
        signed = not entry.dtype.startswith("u")
        limits = quantized_range(point.spec, signed=signed)
        wanted = (storage_dtype(point.spec, signed=signed).name, *limits, point.spec.axis)
        if (entry.dtype, entry.qmin, entry.qmax, entry.axis) != wanted:
            raise FormatError(
                f"{table.name}: '{point.tensor}' has dtype, qmin, qmax, axis "
                f"{entry.dtype}, {entry.qmin}, {entry.qmax}, {entry.axis}; the plan has "
                f"{', '.join(map(str, wanted))}. Are --rules and --set those that the table was "
                "made with?"
            )
        if len(entry.zero_point) != len(entry.scale) or any(
            abs(z) > 2**16 for z in entry.zero_point
        ):
            raise FormatError(
                f"{table.name}: '{point.tensor}' needs one zero_point of at most 16 bits for each "
                "scale. Write the table again."
            )
        found.put(point, entry.scale, entry.zero_point, signed=signed, name=point.tensor)
    return found


NEUTRAL = Format(
    summary="all scales and zero points, exact, for any rule",
    files={"table": "onnxqat.json"},
    writer=_write,
    read=_read,
    per_reader=True,
)
