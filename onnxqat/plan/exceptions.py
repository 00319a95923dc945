"""Decide whether an exception of a rule holds for a unit."""

from __future__ import annotations

from typing import Any

import msgspec

from onnxqat.errors import RuleError
from onnxqat.nodes import attribute, is_constant, is_depthwise, kernel_size
from onnxqat.plan.graph import GraphIndex, Unit
from onnxqat.rules import HardwareRule, OpRule, RuleException

__all__ = ["changed", "find_exception"]


def find_exception(index: GraphIndex, rule: HardwareRule, unit: Unit) -> RuleException | None:
    """Return the first exception of the rule whose conditions hold for a unit, or None."""
    return next((e for e in rule.exceptions if _holds(index, e, unit)), None)


def changed(op: OpRule, exception: RuleException | None) -> OpRule:
    """Return an op's table with the changes of an exception."""
    if exception is None or exception.changes is None:
        return op
    changes = {k: v for k, v in msgspec.structs.asdict(exception.changes).items() if v}
    return msgspec.structs.replace(
        op, **{k: None if v == "none" else v for k, v in changes.items()}
    )


def _holds(index: GraphIndex, exception: RuleException, unit: Unit) -> bool:
    if unit.kind not in exception.op:
        return False
    node = unit.nodes[-1]
    kernel = kernel_size(node)
    shape = unit.outputs[0].shape
    channels = shape[1] if shape and len(shape) > 1 else None
    checks = (
        node.attrs.keys() >= set(exception.written),
        exception.depthwise in (None, is_depthwise(node)),
        exception.constant_operand in (None, any(map(is_constant, node.inputs))),
        exception.projection is None or exception.projection == (node.name in index.heads),
        exception.kernel is None or kernel == exception.kernel,
        _above(max(kernel, default=0), exception.kernel_above),
        _above(max(node.attrs.get("dilations", [1])), exception.dilation_above),
        _above(node.attrs.get("group", 1), exception.group_above),
        _above(channels, exception.channels_above),
        exception.position is None or node.name in index.ends(exception.position),
    )
    return all(checks) and all(
        _attribute(index, node, name) == value for name, value in exception.attributes.items()
    )


def _above(size: Any, limit: int | None) -> bool:
    return limit is None or (isinstance(size, int) and size > limit)


def _attribute(index: GraphIndex, node: Any, name: str) -> Any:
    """Return the value of an attribute, or its default if the node does not state it."""
    try:
        value = attribute(node, name, index.graph.opset)
    except KeyError:
        raise RuleError(
            f"Node '{node.name}': {node.op} has no attribute '{name}', which an exception of "
            "the rule names. Correct the rule."
        ) from None
    return tuple(value) if isinstance(value, list) else value
