"""Upgrade a model below opset 13, where per-axis QuantizeLinear begins.

onnx's own version converter does the work; what it is known to get wrong is mended after it::

    Upsample -> Resize        gets coordinate_transformation_mode = asymmetric and
                              nearest_mode = floor, which is what Upsample 9 means
    Resize, empty roi/scales  empty initializers become absent inputs; onnxruntime refuses them

The converter is checked, not trusted: both models run on the same random input, and an upgrade that
changes an output by more than float32 rounding is refused.
"""

from __future__ import annotations

from collections.abc import MutableSequence

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto, to_proto
from onnxqat.runtime import open_session

__all__ = ["upgrade_opset"]

TARGET = 13
# Of the largest output: some tens of float32 roundings, as other kernels sum in another order.
TOLERANCE = 1e-5
ANY_LENGTH = 1  # what a dimension without a length is tried with


def upgrade_opset(model: Model) -> Model:
    """Return the model at opset 13 or above; the same object if it is there already.

    Raises
    ------
    ModelError
        The converter fails, or the converted model computes something else.
    """
    if model.graph.opset >= TARGET:
        return model
    source = to_proto(model)
    where = f"{model.name}: opset {model.graph.opset}"
    try:
        converted = onnx.version_converter.convert_version(source, TARGET)
    except Exception as error:  # the converter raises whatever its C++ part throws
        text = str(error).splitlines()[0]
        raise ModelError(
            f"{where} cannot be upgraded to {TARGET} ({text}). Export again with opset {TARGET} "
            "or above."
        ) from error
    converted.ir_version = max(source.ir_version, 7)
    _mend_resizes(converted.graph, source.graph)
    _compare(source, converted, where)
    upgraded = from_proto(converted, name=model.name)
    upgraded.metadata |= model.metadata
    return upgraded


def _mend_resizes(graph: onnx.GraphProto, source: onnx.GraphProto) -> None:
    upsampled = {n.input[0]: n.output[0] for n in source.node if n.op_type == "Upsample"}
    empty = {t.name for t in graph.initializer if 0 in t.dims}
    empty |= {n.output[0] for n in graph.node if n.op_type == "Constant" and _is_empty(n)}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Resize":
            continue
        for i, name in enumerate(node.input):
            if name in empty:
                node.input[i] = ""
        if node.input[0] in upsampled:
            renamed[node.output[0]] = upsampled[node.input[0]]
            for key, value in (
                ("coordinate_transformation_mode", "asymmetric"),
                ("nearest_mode", "floor"),
            ):
                node.attribute.append(onnx.helper.make_attribute(key, value))
    for node in graph.node:  # the converter gave the Resize a name of its own
        _rename(node.input, renamed)
        _rename(node.output, renamed)


def _is_empty(node: onnx.NodeProto) -> bool:
    return any(a.name == "value" and 0 in a.t.dims for a in node.attribute)


def _rename(names: MutableSequence[str], renamed: dict[str, str]) -> None:
    for i, name in enumerate(names):
        names[i] = renamed.get(name, name)


def _compare(source: onnx.ModelProto, converted: onnx.ModelProto, where: str) -> None:
    feeds = _random_inputs(source.graph)
    expected = open_session(source, optimization="none").run(None, feeds)
    actual = open_session(converted, optimization="none").run(None, feeds)
    for value, old, new in zip(source.graph.output, expected, actual, strict=True):
        size = float(np.max(np.abs(old), initial=0)) or 1.0
        difference = float(np.max(np.abs(old.astype(np.float64) - new), initial=0))
        if not difference <= TOLERANCE * size:
            raise ModelError(
                f"{where}: upgrading to {TARGET} changes output '{value.name}' by {difference:.3g} "
                f"(its values reach {size:.3g}). Export again with opset {TARGET} or above."
            )


def _random_inputs(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    """Return seeded values for every input that is not an initializer."""
    rng = np.random.default_rng(0)
    initializers = {t.name for t in graph.initializer}
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or ANY_LENGTH for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[value.name] = rng.normal(size=shape).astype(dtype)
    return feeds
