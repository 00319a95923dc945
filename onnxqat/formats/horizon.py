"""Thresholds by tensor and bit widths by node, for Horizon's tools.

Horizon documents no file of thresholds: its plugin keeps them in the attributes ``thresholds`` and
``axis`` of HzCalibration nodes (HorizonRobotics/OE-Skills ``hbdk/j6-hbdk-compile/SKILL.md``). This
file lists such nodes, so that a script of yours can set the attributes::

    {"schema": "onnxqat.horizon/1", "calibration_nodes": [
      {"tensor": "input", "nodes": ["conv1"], "qtype": "int8", "thresholds": [1.0], "axis": null}]}

A threshold is ``127 * s`` (int16: ``32767 * s``). This is inferred from the column that the tool
prints, where an input of scale 1 has the threshold 127.0. A second file, the J6's ``quant_config``
(OE-Skills ``task-calibration-tuning.md``), sets the width of each node. Proof: format only.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written
from onnxqat.formats.json_table import numbers, read_json, write_json
from onnxqat.formats.thresholds import largest, require_symmetric
from onnxqat.plan import QuantPlan

__all__ = ["HORIZON"]

_TITLE = "A threshold of Horizon's"
_SCHEMA = "onnxqat.horizon/1"
_WIDTHS = (8, 16)


class _Calibration(msgspec.Struct):
    tensor: str
    qtype: Literal["int8", "int16"]
    thresholds: list[float]
    axis: int | None


class _Document(msgspec.Struct):
    schema: Literal["onnxqat.horizon/1"]
    calibration_nodes: list[_Calibration]


def _write(source: Calibrated) -> Written:
    require_symmetric(source, _TITLE, bits=_WIDTHS, weight_bits=_WIDTHS)
    nodes, widths = [], dict[str, int]()
    for point in source.plan.grid_points():
        thresholds = source.params(point).scale.astype(np.float64) * largest(point.spec.bits)
        readers = [e.node for e in point.consumers if e.node]
        nodes.append(
            {
                "tensor": point.tensor,
                "nodes": readers,
                "qtype": f"int{point.spec.bits}",
                "thresholds": numbers(thresholds),
                "axis": point.spec.axis,
            }
        )
        if point.role == "activation":
            for name in readers:  # a node with one 16-bit input runs in int16
                widths[name] = max(point.spec.bits, widths.get(name, 0))
    config: dict[str, Any] = {
        "node_config": {name: {"qtype": f"int{bits}"} for name, bits in widths.items()}
    }
    document = {"schema": _SCHEMA, "calibration_nodes": nodes}
    return Written(
        files={"table": write_json(document), "config": write_json(config)},
        left_out=source.left_out("biases"),
    )


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, nodes = Found(table.name, graph), read_json(table, _Document).calibration_nodes
    for point, entry in found.entries(plan, nodes):
        if (entry.qtype, entry.axis) != (f"int{point.spec.bits}", point.spec.axis):
            raise FormatError(
                f"{table.name}: '{point.tensor}' has {entry.qtype}, axis {entry.axis}; the plan "
                f"has int{point.spec.bits}, axis {point.spec.axis}. Is it the table of this rule?"
            )
        scales = np.asarray(entry.thresholds, np.float64) / largest(point.spec.bits)
        found.put(point, scales, signed=True, name=point.tensor)
    return found


HORIZON = Format(
    summary="thresholds for Horizon's HzCalibration nodes",
    files={"table": "hz_thresholds.json", "config": "quant_config.json"},
    writer=_write,
    read=_read,
)
