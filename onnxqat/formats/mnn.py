"""MNN's table of scales: inputs and outputs of convolutions, outputs of additions.

::

    {"shape": {"channels": 3, "height": 224, "width": 224},
     "conv1_out input_tensor_0": 0.02, "conv1_out output_tensor_0": 0.05,
     "add1_out output_tensor_0": 0.04}

Keys are the names of the ops' outputs; of a convolution fused with what follows, the scale is that
of the chain's end (OpenPPL/ppq ``ppq/parser/mnn_exporter.py``, which gives an Add the scale of its
second input; its output's is written here). Integers are signed and symmetric. MNN quantizes
weights itself. Other ops have no entry, and are listed. Format-checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_graphsurgeon as gs

from onnxqat.errors import FormatError
from onnxqat.formats.format import Calibrated, Format, Found, Table, Written, edges_of, refuse
from onnxqat.formats.json_table import read_json, write_json
from onnxqat.formats.thresholds import LEFT_OUT, require_symmetric
from onnxqat.plan import QuantPlan, QuantPoint

__all__ = ["MNN"]

_TITLE = "An MNN table"
_INPUT, _OUTPUT = "input_tensor_0", "output_tensor_0"


def _entries(graph: gs.Graph, plan: QuantPlan) -> Iterator[tuple[str, QuantPoint | None]]:
    """Yield each key, and the point whose scale stands under it."""
    edges = edges_of(plan)
    points = {p.tensor: p for p in plan.grid_points()}
    ends = {name: chain[-1] for chain in plan.chains for name in chain}
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        key, end = node.outputs[0].name, nodes[ends.get(node.name, node.name)]
        if node.op == "Conv" and (node.name, 1) in edges:
            yield f"{key} {_INPUT}", edges.get((node.name, 0))
        elif node.op != "Add" or (node.name, 0) not in edges:
            continue
        yield f"{key} {_OUTPUT}", points.get(end.outputs[0].name)


def _write(source: Calibrated) -> Written:
    require_symmetric(source, _TITLE, weight_bits=range(2, 17))
    entries = list(_entries(source.graph, source.plan))
    refuse(
        (f"'{key}' has no scale" for key, point in entries if point is None),
        "MNN needs the scales of a convolution's input and output; take a rule that has both",
    )
    table: dict[str, Any] = {"shape": _shape(source.graph)}
    table |= {key: float(source.params(p).scale) for key, p in entries if p is not None}
    covered = {p.parameters for _, p in entries if p is not None}
    others = source.others(covered, "activation")
    return Written(files={"table": write_json(table)}, left_out=others | source.left_out(*LEFT_OUT))


def _shape(graph: gs.Graph) -> dict[str, int]:
    shape = graph.inputs[-1].shape or ()
    if len(shape) != 4 or not all(isinstance(d, int) for d in shape[1:]):
        raise FormatError(
            f"An MNN table has the input's channels, height and width; '{graph.inputs[-1].name}' "
            f"has the shape {list(shape)}. Export the model with them."
        )
    return dict(zip(("channels", "height", "width"), map(int, shape[1:]), strict=True))


def _read(table: Table, graph: gs.Graph, plan: QuantPlan) -> Found:
    document = read_json(table, dict[str, float | dict[str, int]])
    found = Found(table.name, graph)
    scales = {name: value for name, value in document.items() if not isinstance(value, dict)}
    lacking = {p.parameters: p.tensor for p in plan.grid_points() if p.role == "activation"}
    for key, point in _entries(graph, plan):
        if point is None:
            continue
        lacking.pop(point.parameters, None)
        if key in scales:
            found.put(point, scales.pop(key), signed=True, name=key)
        else:
            found.missing.append(key)
    found.missing += lacking.values()
    found.put_weights_by_absmax(plan)
    found.unused += scales
    return found


MNN = Format(
    summary="scales of convolutions and additions for MNN",
    files={"table": "mnn.json"},
    write=_write,
    read=_read,
)
