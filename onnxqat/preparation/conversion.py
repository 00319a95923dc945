"""Run onnx's version converter, and correct its mistakes between opsets 7 and 21.

::

    Upsample, Resize 10       set coordinate_transformation_mode = asymmetric; for mode nearest,
                              nearest_mode = floor, or ceil when downsampling: onnxruntime
                              computes this for opset 10 and below
    Resize, empty roi/scales  empty tensors become absent inputs, because onnxruntime refuses them
    replaced nodes            write values with the same names as the nodes that they replace

The converter handles all other operators. `onnxqat.preparation.opset` compares the outputs of the
converted model with those of the original.
"""

from __future__ import annotations

from collections.abc import MutableSequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnxqat import native
from onnxqat.preserve import replace_messages

__all__ = ["convert"]

FIRST_COORDINATES = 11  # the first opset in which Resize has coordinate_transformation_mode


def convert(source: onnx.ModelProto, opset: int, target: int) -> onnx.ModelProto:
    """Return the model converted to another opset; ``source`` is not changed.

    Raises
    ------
    onnxqat.native.NativeError
        The converter refuses the model.
    """
    converted = native.convert_version(source, target)
    _keep_names(converted.graph, source.graph)
    _leave_out_empty(converted.graph)
    if opset < FIRST_COORDINATES:
        _set_coordinates(converted.graph)
    return converted


def _keep_names(graph: onnx.GraphProto, source: onnx.GraphProto) -> None:
    """Give the outputs of replaced nodes their original names."""
    before = [name for node in source.node for name in node.output if name]
    after = [name for node in graph.node for name in node.output if name]
    lost = [name for name in before if name not in set(after)]
    made = [
        name
        for node in graph.node
        for name in node.output
        if name not in set(before) and node.op_type in ("Resize", "ScatterElements")
    ]
    if len(lost) == len(made):
        renamed = dict(zip(made, lost, strict=True))
        for node in graph.node:
            _rename(node.input, renamed)
            _rename(node.output, renamed)


def _rename(names: MutableSequence[str], renamed: dict[str, str]) -> None:
    for i, name in enumerate(names):
        names[i] = renamed.get(name, name)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            found[node.output[0]] = attribute.t
    return found


def _leave_out_empty(graph: onnx.GraphProto) -> None:
    empty = {name for name, tensor in _constants(graph).items() if 0 in tensor.dims}
    for node in graph.node:
        if node.op_type == "Resize":
            _rename(node.input, dict.fromkeys(empty, ""))


def _set_coordinates(graph: onnx.GraphProto) -> None:
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type != "Resize":
            continue
        scales = constants.get(node.input[2]) if len(node.input) > 2 else None
        factors = numpy_helper.to_array(scales) if scales is not None else np.ones(1)
        smaller = bool(np.all(factors <= 1) and np.any(factors < 1))
        given = {
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "ceil" if smaller else "floor",
        }
        kept = [attribute for attribute in node.attribute if attribute.name not in given]
        made = [onnx.helper.make_attribute(key, value) for key, value in given.items()]
        replace_messages(node.attribute, [*kept, *made])
