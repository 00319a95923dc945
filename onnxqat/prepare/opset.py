"""Upgrade a model to the opset that is wanted: 13, where per-axis QuantizeLinear begins, or above.

Where every node means the same in both opsets, only the version changes. Otherwise onnx's own
version converter does the work; what it is known to get wrong is mended after it::

    Upsample -> Resize        gets coordinate_transformation_mode = asymmetric and
                              nearest_mode = floor, which is what Upsample 9 means
    Resize, empty roi/scales  empty initializers become absent inputs; onnxruntime refuses them

Neither is trusted: both models run on the same random input, and an upgrade that changes an output
by more than float32 rounding is refused.
"""

from __future__ import annotations

from collections.abc import MutableSequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxqat import native
from onnxqat.errors import ModelError
from onnxqat.model import Model, from_proto, to_proto
from onnxqat.runtime import open_session
from onnxqat.versions import MAX_OPSET, changed_node

__all__ = ["upgrade_opset"]

MIN_TARGET = 13
# Of the largest output: some tens of float32 roundings, as other kernels sum in another order.
TOLERANCE = 1e-5
LENGTHS = (1, 8, 64, 256)  # what dimensions without a length are tried with

Feeds = dict[str, NDArray[np.generic]]


def upgrade_opset(model: Model, minimum: int = MIN_TARGET) -> Model:
    """Return the model at opset ``minimum`` or above; the same object if it is there already.

    Raises
    ------
    ModelError
        The opset is not one that onnxruntime-training reads, the converter fails, or the converted
        model computes something else.
    """
    target = max(minimum, MIN_TARGET)
    if target > MAX_OPSET:
        raise ModelError(f"{model.name}: opset {target} is wanted; at most {MAX_OPSET} is read.")
    if model.graph.opset >= target:
        return model
    source = to_proto(model)
    where = f"{model.name}: opset {model.graph.opset}"
    changed = changed_node(source.graph.node, model.graph.opset, target)
    if changed is None:
        converted = onnx.ModelProto()
        converted.CopyFrom(source)
        for entry in converted.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = target
    else:
        converted = _converted(source, target, where, changed)
    # IR versions that know these opsets: https://onnx.ai/onnx/repo-docs/Versioning.html
    converted.ir_version = max(source.ir_version, 7 if target < 19 else 9 if target < 21 else 10)
    _compare(source, converted, where, target)
    upgraded = from_proto(converted, name=model.name)
    upgraded.metadata |= model.metadata
    return upgraded


def _converted(
    source: onnx.ModelProto, target: int, where: str, changed: onnx.NodeProto
) -> onnx.ModelProto:
    try:
        converted = native.convert_version(source, target)
    except native.NativeError as error:
        name = changed.name or changed.output[0]
        raise ModelError(
            f"{where} cannot be upgraded to {target} ({error}); the first node that has to change "
            f"is '{name}' ({changed.op_type}). Export again with opset {target} or above."
        ) from error
    _mend_resizes(converted.graph, source.graph)
    return converted


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


def _compare(source: onnx.ModelProto, converted: onnx.ModelProto, where: str, target: int) -> None:
    feeds, expected = _example(source, where)
    actual = open_session(converted, optimization="none", name=where).run(None, feeds)
    for value, old, new in zip(source.graph.output, expected, actual, strict=True):
        if np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
            continue
        size = float(np.max(np.abs(old), initial=0)) or 1.0
        difference = float(np.max(np.abs(old.astype(np.float64) - new), initial=0))
        if not difference <= TOLERANCE * size:
            raise ModelError(
                f"{where}: upgrading to {target} changes output '{value.name}' by {difference:.3g} "
                f"(its values reach {size:.3g}). Export again with opset {target} or above."
            )


def _example(source: onnx.ModelProto, where: str) -> tuple[Feeds, list[NDArray[np.generic]]]:
    """Return random inputs that the model accepts, and its outputs."""
    session = open_session(source, optimization="none", name=where)
    reason = ""
    for length in LENGTHS:
        feeds = _random_inputs(source.graph, length)
        try:
            return feeds, session.run(None, feeds)
        except Exception as error:  # the bindings raise a class per status code
            reason = str(error).splitlines()[0]
    raise ModelError(
        f"{where}: has to be upgraded, and does not run on random inputs to compare ({reason}). "
        f"Export again with opset {MIN_TARGET} or above."
    )


def _random_inputs(graph: onnx.GraphProto, length: int) -> Feeds:
    """Return seeded values for every input that is not an initializer; integers are 0 or 1."""
    rng = np.random.default_rng(0)
    initializers = {t.name for t in graph.initializer}
    feeds: Feeds = {}
    for value in graph.input:
        if value.name in initializers:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or length for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn = rng.normal(size=shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[value.name] = drawn.astype(dtype)
    return feeds
