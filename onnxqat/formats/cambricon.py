"""Scales of Cambricon's CATCH, and the configuration of MagicMind.

CATCH keeps reciprocal scales ``127 / absmax``, which is ``1 / s``, in a module's state dict
(Cambricon/catch ``torch_mlu/core/quantized/modules/conv.py``)::

    {"conv1.scale": [64.0, 812.7], "conv1.quantized_mode": [1]}
    {"conv1.scale": [64.0, 0], "conv1.quantized_mode": [1],
     "conv1.quantized_by_channel": [1], "conv1.scale_weight_per_channel": [812.7, 790.1]}

``scale`` holds the scale of the input, then that of the weight. ``quantized_mode`` 1 is int8, 2 is
int16. The name of a module is the name of its weight without ``.weight``, as PyTorch exports it;
if the weight has no such name, it is the name of the node. CATCH has one input scale for each
module. When a model calls a module twice and the two inputs have different grids, each call is
written under the name of its node. The dict is written as JSON, since a state dict is a pickle.

MagicMind's build (Cambricon/magicmind_cloud ``buildin/python_common/model_process.py``) takes
ranges by tensor, ``{"custom_ranges": {"input": {"max": [1.0], "min": [-1.0]}}}``, and a precision
configuration. Ranges by tensor name are an inference: the code there only uses the default, an
empty name. Proof: format only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Key, Table, Written, edges_of, refuse
from onnxqat.formats.json_table import numbers, read_json, write_json
from onnxqat.formats.thresholds import largest, require_symmetric
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["CAMBRICON"]

_TITLE = "A table for Cambricon"
_MODES = {8: 1, 16: 2}


class _Range(msgspec.Struct):
    max: list[float]
    min: list[float]


class _Module(NamedTuple):
    """A module of the table: its name, and the points of its input and weight."""

    name: str
    input: QuantPoint
    weight: QuantPoint


def _modules(graph: gs.Graph, plan: QuantPlan) -> Iterator[_Module]:
    edges = edges_of(plan)
    calls: list[tuple[gs.Node, QuantPoint, QuantPoint]] = []
    inputs: dict[str, set[str]] = {}
    for node in graph.nodes:
        points = [edges[node.name, i] for i in (0, 1) if (node.name, i) in edges]
        if sorted(p.role for p in points) == ["activation", "weight"]:
            x, weight = sorted(points, key=lambda p: p.role)
            calls.append((node, x, weight))
            inputs.setdefault(weight.tensor, set()).add(x.parameters)
    for node, x, weight in calls:
        name = weight.tensor.removesuffix(".weight")
        known = name not in ("", weight.tensor) and len(inputs[weight.tensor]) == 1
        yield _Module(name if known else node.name, x, weight)


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    return (Key(m.name, f"{m.input.parameters}, {m.weight.parameters}")
            for m in _modules(graph, plan))  # fmt: skip


def _write(source: Calibrated) -> Written:
    require_symmetric(source, _TITLE, bits=tuple(_MODES), weight_bits=tuple(_MODES))
    modules = list(_modules(source.graph, source.plan))
    refuse(
        (f"'{m}' has widths {x.spec.bits}, {w.spec.bits}" for m, x, w in modules
         if x.spec.bits != w.spec.bits),
        "A module has one quantized_mode; insert with equal widths",
    )  # fmt: skip
    state: dict[str, Any] = {}
    for module, x, weight in modules:
        state |= {f"{module}.{key}": value for key, value in _state(source, x, weight).items()}
    ranges = {p.tensor: _range(p, float(q.scale)) for p, q in source.points("activation")}
    covered = {p.parameters for _, *points in modules for p in points}
    others = source.others(covered, "activation", "weight")
    return Written(
        files={
            "table": write_json(state),
            "ranges": write_json({"custom_ranges": ranges}),
            "config": write_json(_config(source)),
        },
        left_out=others | source.left_out("biases"),
    )


def _state(source: Calibrated, x: QuantPoint, weight: QuantPoint) -> dict[str, list[Any]]:
    inverse = 1 / float(source.params(x).scale)
    weights = numbers(1 / source.params(weight).scale.astype(np.float64))
    state: dict[str, list[Any]] = {"quantized_mode": [_MODES[x.spec.bits]]}
    if weight.spec.axis is None:
        return {"scale": [inverse, *weights]} | state
    by_channel = {"quantized_by_channel": [1], "scale_weight_per_channel": weights}
    return {"scale": [inverse, 0]} | state | by_channel


def _range(point: QuantPoint, scale: float) -> dict[str, list[float]]:
    end = largest(point.spec.bits) * scale
    return {"max": [end], "min": [-end]}


def _config(source: Calibrated) -> dict[str, Any]:
    points = source.plan.grid_points()
    width = max(p.spec.bits for p in points)
    axes = any(p.spec.axis is not None for p in points)
    return {
        "precision_config": {
            "precision_mode": f"qint{width}_mixed_float16",
            "weight_quant_granularity": "per_axis" if axes else "per_tensor",
            "activation_quant_algo": "symmetric",
        }
    }


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    document = read_json(table, dict[str, Any])
    found = Found(table.name, graph)
    if "custom_ranges" in document:
        _read_ranges(found, read_json(table, dict[str, dict[str, _Range]]), plan)
    else:
        _read_state(found, read_json(table, dict[str, list[float]]), graph, plan)
    return found


def _read_ranges(found: Found, document: dict[str, dict[str, _Range]], plan: QuantPlan) -> None:
    ranges = document["custom_ranges"]
    points = [p for p in plan.grid_points() if p.role == "activation"]
    for point in points:
        entry = ranges.get(point.tensor)
        if entry is None:
            found.missing.append(point.tensor)
            continue
        if len(entry.max) != 1 or entry.min != [-entry.max[0]]:
            raise FormatError(
                f"{found.source}: '{point.tensor}' has no range of the form [-x, x]. "
                "Calibrate with symmetric activations."
            )
        scale = entry.max[0] / largest(point.spec.bits)
        found.put(point, scale, signed=True, name=point.tensor)
    found.put_weights_by_absmax(plan)
    found.unused += sorted(ranges.keys() - {p.tensor for p in points})


def _read_state(
    found: Found, state: dict[str, list[float]], graph: gs.Graph, plan: QuantPlan
) -> None:
    lacking = {p.parameters: p.tensor for p in plan.grid_points()}
    read: set[str] = set()
    for module, x, weight in _modules(graph, plan):
        scale = state.get(f"{module}.scale")
        read |= {key for key in state if key.rpartition(".")[0] == module}
        for point in (x, weight):
            lacking.pop(point.parameters, None)
        if scale is None:
            found.missing.append(f"{module}.scale")
            continue
        if state.get(f"{module}.quantized_mode") != [_MODES.get(x.spec.bits)]:
            raise FormatError(
                f"{found.source}: '{module}.quantized_mode' does not stand for {x.spec.bits} bits. "
                "Are --rules and --set those that the table was made with?"
            )
        weights = state.get(f"{module}.scale_weight_per_channel", scale[1:])
        found.put(x, _inverse(scale[:1]), signed=True, name=f"{module}.scale")
        found.put(weight, _inverse(weights), signed=True, name=f"{module}.scale")
    found.unsaid += lacking.values()
    found.unused += sorted(state.keys() - read)


def _inverse(values: list[float]) -> Any:
    with np.errstate(divide="ignore"):
        return 1 / np.asarray(values, np.float64)


CAMBRICON = Format(
    summary="scales of CATCH, and ranges of MagicMind",
    files={
        "table": "catch_scales.json",
        "ranges": "magicmind_ranges.json",
        "config": "magicmind_config.json",
    },
    writer=_write,
    read=_read,
    keys=_keys,
)
