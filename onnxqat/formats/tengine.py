"""Tengine's scale file: one line ``tensor scale zero_point`` for each activation.

The layout is that of MQBench's ``<model>_for_tengine.scale`` (ModelTC/MQBench
``mqbench/deploy/deploy_tengine.py``). Tengine fuses Conv + Relu but looks up the convolution's
output, so each inner tensor of a chain gets the numbers of the chain's output. The dtype (uint8 or
int8) is an option of Tengine, not part of the file. Tengine quantizes weights itself. Scales are
written with all digits of a float64, like MQBench's. Proof: format only.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Key, Table, Written, refuse
from onnxqat.formats.text_table import misread, rows
from onnxqat.formats.thresholds import LEFT_OUT, activation_keys
from onnxqat.plan import QuantPlan

__all__ = ["TENGINE"]


def _write(source: Calibrated) -> Written:
    refuse(
        (
            f"'{point.tensor}' has {point.spec.bits} bits"
            for point, _ in source.points("activation")
            if point.spec.bits != 8
        ),
        "A Tengine scale file holds 8 bits; insert again with 8 bits",
    )
    signed = {params.signed for _, params in source.points("activation")}
    if len(signed) > 1:
        raise FormatError(
            "A Tengine scale file is for int8 or for uint8, and the model has both. Insert again "
            "with --set activation.signedness=signed."
        )
    lines = {
        point.tensor: f"{float(params.scale)!r} {int(params.zero_point)}"
        for point, params in source.points("activation")
    }
    lines |= {
        inner: lines[end]
        for inner, end in _inner(source.graph, source.plan).items()
        if end in lines
    }
    text = "".join(f"{name} {numbers}\n" for name, numbers in lines.items())
    return Written(files={"table": text}, left_out=source.left_out(*LEFT_OUT))


def _keys(graph: gs.Graph, plan: QuantPlan) -> Iterator[Key]:
    yield from activation_keys(graph, plan)
    yield from (Key(name) for name in _inner(graph, plan))


def _inner(graph: gs.Graph, plan: QuantPlan) -> dict[str, str]:
    """Map each inner tensor of a chain to the chain's output."""
    outputs = {node.name: node.outputs[0].name for node in graph.nodes}
    return {outputs[name]: outputs[chain[-1]] for chain in plan.chains for name in chain[:-1]}


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    found, lines = Found(table.name, graph), rows(table, (2,))
    for point in plan.grid_points():
        if point.role != "activation":
            continue
        if point.tensor not in lines:
            found.missing.append(point.tensor)
            continue
        scale, zero_point = lines[point.tensor]
        if zero_point != int(zero_point):
            raise FormatError(
                f"{table.name}: '{point.tensor}' has zero_point {zero_point}. Write an integer."
            )
        signed = found.signed(point, point.tensor)
        found.put(point, scale, int(zero_point), signed=signed, name=point.tensor)
    found.put_weights_by_absmax(plan)
    known = {p.tensor for p in plan.grid_points()} | _inner(graph, plan).keys()
    found.unused += [name for name in lines if name not in known]
    return found


TENGINE = Format(
    summary="Tengine scale file",
    files={"table": "for_tengine.scale"},
    writer=_write,
    read=_read,
    keys=_keys,
    misread=misread,
)
