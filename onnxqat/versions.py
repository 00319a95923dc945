"""Check the ONNX versions of a model, and read newer opsets as opset 21 if nothing changes.

onnxruntime-training 1.19.2 reads IR versions up to 10 and opsets 7 to 21. A newer model is read as
opset 21 if all of its nodes mean the same there: their operators did not change, or only in the
accepted types, or in attributes and inputs that the node does not use. The default of a new
attribute keeps the old behaviour, except for `CHANGED`. Other changes of behaviour (Softmax 13,
Clip 11, Upsample) came with a changed default or input, or replaced the operator, which the schemas
of ``onnx.defs`` show. The texts of opsets 22 to 28 were compared with those of 21 by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import onnx
from onnx.defs import OpSchema, SchemaError

from onnxqat.errors import ModelError
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.preserve import all_nodes

__all__ = [
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "MIN_OPSET",
    "changed_node",
    "default_opset",
    "readable_opset",
]

logger = logging.getLogger(__name__)

MAX_IR_VERSION = 10
MIN_OPSET, MAX_OPSET = 7, 21
MAX_LOWERED_OPSET = 28

# Operators that behave differently without their new attribute (RoiAlign shifted by no half pixel;
# a Split into equal parts needed no number of parts), or whose input changed its meaning
# (GroupNormalization: one scale per group, later per channel).
CHANGED = {"GroupNormalization": 21, "RoiAlign": 16, "Split": 18}
# Inputs of BatchNormalization that opset 14 named anew.
RENAMED = {"mean": "input_mean", "var": "input_var"}


def readable_opset(proto: onnx.ModelProto, name: str) -> int:
    """Return the default-domain opset that the model can be read as.

    Raises
    ------
    ModelError
        The model has no opset of the default domain, or one that is too old, a node that opset 21
        lacks, or an IR version that onnx does not know.
    """
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{name}: IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest "
            f"that the installed onnx knows. Export with opset {MAX_OPSET} or lower."
        )
    opset = default_opset(proto.opset_import)
    if opset is None:
        raise ModelError(f"{name}: imports no version of the default ONNX opset. Export it again.")
    newest = min(MAX_LOWERED_OPSET, onnx.defs.onnx_opset_version())
    if not MIN_OPSET <= opset <= newest:
        raise ModelError(
            f"{name}: opset {opset} is not in the range {MIN_OPSET} to {newest}. Export again in "
            "this range, or convert with onnx.version_converter and compare the outputs."
        )
    _check_lowers(proto.graph.node, opset, name)
    for function in proto.functions:
        _check_lowers(function.node, default_opset(function.opset_import) or opset, name)
    if opset > MAX_OPSET:
        logger.info("%s: opset %d is read as %d", name, opset, MAX_OPSET)
    return min(opset, MAX_OPSET)


def default_opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int | None:
    """Return the version of the default domain."""
    return next((o.version for o in imports if o.domain in ONNX_DOMAINS), None)


def _check_lowers(nodes: Iterable[onnx.NodeProto], opset: int, name: str) -> None:
    node = changed_node(nodes, opset, MAX_OPSET) if opset > MAX_OPSET else None
    if node is not None:
        raise ModelError(
            f"{name}: node '{node.name or node.output[0]}' ({node.op_type}) of opset {opset} "
            f"has no equivalent in opset {MAX_OPSET}, the newest that onnxruntime-training 1.19.2 "
            f"reads. Export with opset {MAX_OPSET} or lower."
        )


def changed_node(
    nodes: Iterable[onnx.NodeProto], source: int, target: int
) -> onnx.NodeProto | None:
    """Return the first node whose meaning differs between two opsets, if there is one."""
    for node in all_nodes(nodes):
        if node.domain in ONNX_DOMAINS and not _same_meaning(node, source, target):
            return node
    return None


def _same_meaning(node: onnx.NodeProto, source: int, target: int) -> bool:
    here, there = _schema(node, source), _schema(node, target)
    if here is None or there is None:
        return here is there  # an unknown operator: the runtime will report it
    if here.since_version == there.since_version:
        return True
    shared = here.attributes.keys() & there.attributes.keys()
    return (
        not there.deprecated
        and not _changed_without_a_sign(node, here.since_version, there.since_version)
        and all(attribute.name in shared for attribute in node.attribute)
        and all(_facts(here.attributes[name]) == _facts(there.attributes[name]) for name in shared)
        and _used(here.inputs, node.input) == _used(there.inputs, node.input)
        and _used(here.outputs, node.output) == _used(there.outputs, node.output)
    )


def _changed_without_a_sign(node: onnx.NodeProto, here: int, there: int) -> bool:
    """Whether a node's operator changed in a way that its schemas do not show."""
    since = CHANGED.get(node.op_type, 0)
    equal_parts = node.op_type != "Split" or len(node.input) < 2 or not node.input[1]
    return here < since <= there and equal_parts


def _schema(node: onnx.NodeProto, opset: int) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except SchemaError:
        return None


def _facts(attribute: OpSchema.Attribute) -> tuple[object, ...]:
    return attribute.type, attribute.required, str(attribute.default_value)


def _used(
    parameters: Sequence[OpSchema.FormalParameter], names: Sequence[str]
) -> list[tuple[str, object]]:
    used = parameters[: len(names)]
    return [(RENAMED.get(parameter.name, parameter.name), parameter.option) for parameter in used]
