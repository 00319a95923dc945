"""Quantization parameters under MindSpore's attribute names, one object for each node.

MindSpore r1.5 sets them as attributes of its operators when it exports a MINDIR
(mindspore-ai/mindspore ``mindspore/compression/export/quant_export.py``); it has no file for them.
This file has them in JSON under the same names, by node::

    {"schema": "onnxqat.mindspore/1", "nodes": {"conv1": {
      "filter_maxq": [0.3, 0.2], "filter_minq": [-0.3, -0.2], "symmetric": true,
      "weight_num_bits": 8, "weight_narrow_range": true, "act_num_bits": 8,
      "input_maxq": 6.0, "input_minq": 0.0, "input_narrow_range": false,
      "output_maxq": 2.5, "output_minq": 0.0, "output_narrow_range": false}}}

``maxq`` and ``minq`` are the ends of the range in units of the tensor: ``(qmax - z) * s`` and
``(qmin - z) * s``. ``output`` is the output of the fused layer. MindSpore's ``mean`` and
``std_dev`` of the network's input are not written, since onnxqat calibrates that range.
Proof: format only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, edges_of, refuse
from onnxqat.formats.json_table import numbers, read_json, write_json
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import QuantParams, quantized_range

__all__ = ["MINDSPORE"]

_SCHEMA = "onnxqat.mindspore/1"


def _places(graph: gs.Graph, plan: QuantPlan) -> Iterator[tuple[str, str, QuantPoint]]:
    """Yield a node's name, ``filter``, ``input`` or ``output``, and the point at that place.

    An input gets an entry if its node has a weight. An output gets one if its node has a weight,
    or if a node without a weight reads it. A pooling between two convolutions gets none.
    """
    edges = edges_of(plan)
    points = {p.tensor: p for p in plan.grid_points()}
    ends = {chain[0]: chain[-1] for chain in plan.chains}
    inner = {name for chain in plan.chains for name in chain[1:]}
    nodes = {node.name: node for node in graph.nodes}
    layers = {name for (name, _), point in edges.items() if point.role == "weight"}
    for node in graph.nodes:
        read = [edges[node.name, i] for i in range(len(node.inputs)) if (node.name, i) in edges]
        for point in read if node.name in layers else ():
            yield node.name, "filter" if point.role == "weight" else "input", point
        output = points.get(nodes[ends.get(node.name, node.name)].outputs[0].name)
        if node.name in inner or output is None:
            continue
        if node.name in layers or {e.node for e in output.consumers} - layers:
            yield node.name, "output", output


def _ends(point: QuantPoint, params: QuantParams) -> tuple[Any, Any]:
    """Return minq and maxq, exact in float64."""
    ends = quantized_range(point.spec, signed=params.signed)
    zero_point, scale = params.zero_point.astype(np.int64), params.scale.astype(np.float64)
    low, high = ((end - zero_point) * scale for end in ends)
    return (numbers(low), numbers(high)) if point.role == "weight" else (float(low), float(high))


def _write(source: Calibrated) -> Written:
    refuse(
        (f"'{p.tensor}' has {p.spec.bits} bits" for p, _ in source.points("activation")
         if p.spec.bits != 8),
        "act_num_bits is always 8 in MindSpore; insert again with 8 bits",
    )  # fmt: skip
    nodes: dict[str, dict[str, Any]] = {}
    covered = set()
    for name, place, point in _places(source.graph, source.plan):
        entry = nodes.setdefault(name, {"act_num_bits": 8})
        if f"{place}_maxq" in entry:
            raise FormatError(
                f"'{name}' has two quantized {place}s, but a layer of MindSpore has one. Keep one "
                "float."
            )
        low, high = _ends(point, source.params(point))
        entry |= {f"{place}_minq": low, f"{place}_maxq": high}
        if place == "filter":
            entry |= {"symmetric": point.spec.symmetric, "weight_num_bits": point.spec.bits}
        entry[_narrow(place)] = point.spec.narrow_range
        covered.add(point.parameters)
    others = source.others(covered, "activation", "weight")
    return Written(
        files={"table": write_json({"schema": _SCHEMA, "nodes": nodes})},
        left_out=others | source.left_out("biases"),
    )


def _narrow(place: str) -> str:
    return f"{'weight' if place == 'filter' else place}_narrow_range"


class _Document(msgspec.Struct):
    schema: str
    nodes: dict[str, dict[str, float | bool | list[float]]]


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    document = read_json(table, _Document)
    if document.schema != _SCHEMA:
        message = f"{table.name}: schema is not '{_SCHEMA}'. Give a table that strip wrote."
        raise FormatError(message)
    found = Found(table.name, graph)
    lacking = {p.parameters: p.tensor for p in plan.grid_points()}
    used = set()
    for name, place, point in _places(graph, plan):
        lacking.pop(point.parameters, None)
        entry = document.nodes.get(name, {})
        low, high = entry.get(f"{place}_minq"), entry.get(f"{place}_maxq")
        used.add(name)
        if low is None or high is None:
            found.missing.append(f"{name}.{place}_maxq")
            continue
        bits = entry.get("weight_num_bits" if place == "filter" else "act_num_bits")
        wanted = (point.spec.bits, point.spec.narrow_range)
        if (bits, entry.get(_narrow(place))) != wanted:
            raise FormatError(
                f"{table.name}: '{name}' has {bits} bits, narrow_range {entry.get(_narrow(place))} "
                f"for its {place}; the plan has {wanted[0]}, {wanted[1]}. "
                "Are --rules and --set those that the table was made with?"
            )
        _put(found, point, (np.atleast_1d(low), np.atleast_1d(high)), f"{name}.{place}")
    found.unsaid += lacking.values()
    found.unused += sorted(document.nodes.keys() - used)
    return found


def _put(found: Found, point: QuantPoint, ends: tuple[Any, Any], name: str) -> None:
    """Add the parameters of a point from the ends of its ranges; the inverse of `_ends`."""
    signed = found.signed(point, name, lowest=not any(ends[0] < 0))
    qmin, qmax = quantized_range(point.spec, signed=signed)
    if ends[0].shape != ends[1].shape:
        raise FormatError(
            f"{found.source}: '{name}' has different numbers of minq and maxq. Write the table "
            "again."
        )
    with np.errstate(all="ignore"):  # `put` refuses scales that are not finite
        scale = (ends[1] - ends[0]) / (qmax - qmin)
        levels = np.rint(qmin - ends[0] / scale)
    zero_point = np.where(np.abs(levels) < 2**17, levels, 2**17)
    found.put(point, scale, zero_point.astype(np.int64), signed=signed, name=name)


MINDSPORE = Format(
    summary="ranges under MindSpore's attribute names",
    files={"table": "mindspore.json"},
    writer=_write,
    read=_read,
)
