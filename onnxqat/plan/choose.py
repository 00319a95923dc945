"""Assign each unit of a graph its `OpRule`, or a `Skip` with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxqat.errors import RuleError
from onnxqat.nodes import is_bias_add, is_empty, is_float
from onnxqat.operators import ONNX_DOMAINS
from onnxqat.overrides import Override
from onnxqat.plan.exceptions import changed, find_exception
from onnxqat.plan.graph import GraphIndex, Unit
from onnxqat.plan.masks import Masks
from onnxqat.plan.types import Skip
from onnxqat.rules import HardwareRule, OpRule

__all__ = ["Choice", "choose_ops"]

# The spec of a node that the rule leaves float and the user includes.
INCLUDED_SPEC = "activation"


@dataclass
class Choice:
    """The `OpRule` of each quantized unit, by name, and the skipped nodes.

    Nodes in ``fed_floats`` read the float values of a tensor even if it has a point.
    """

    ops: dict[str, OpRule] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    fed_floats: set[str] = field(default_factory=set)

    def skip(self, unit: Unit, reason: str, *, unsupported: bool = False) -> None:
        """Keep all nodes of a unit float."""
        part = "" if len(unit.nodes) == 1 else f"part of {unit.kind}: "
        self.skips += (Skip(n.name, n.op, f"{part}{reason}", unsupported) for n in unit.nodes)


def choose_ops(
    index: GraphIndex,
    rule: HardwareRule,
    overrides: Sequence[Override],
    masks: Masks,
) -> Choice:
    """Choose an `OpRule` or a `Skip` for each unit.

    Parameters
    ----------
    masks : Masks
        The nodes that stay float because of masks, unless an override names the node.

    Raises
    ------
    RuleError
        The user includes an op that the rule does not list, and the rule has no spec for it.
    """
    choice = Choice()
    decided = _user_decisions(index, overrides)
    for unit in index.units:
        by_user = next((decided[n.name] for n in reversed(unit.nodes) if n.name in decided), None)
        if reason := _impossible(unit):
            choice.skip(unit, reason)
        elif by_user is not None and not by_user.value:
            choice.skip(unit, f"override {by_user}")
        elif unit.name in masks.reasons and not (by_user and by_user.pattern == unit.name):
            choice.skip(unit, masks.reasons[unit.name])
            choice.fed_floats.update({unit.name} & masks.computing)
        elif by_user is not None:
            choice.ops[unit.name] = rule.ops.get(unit.kind) or _included(rule, unit, by_user)
        else:
            _by_rule(index, rule, unit, choice)
    return choice


def _user_decisions(index: GraphIndex, overrides: Sequence[Override]) -> dict[str, Override]:
    return {
        name: override
        for override in overrides
        if override.key == "quantize" and override.selects_nodes
        for name in index.selected(override)
    }


def _impossible(unit: Unit) -> str | None:
    node = unit.nodes[-1]
    if node.domain not in ONNX_DOMAINS:
        return f"domain '{node.domain}' is not ONNX's own"
    floats = [t for t in unit.outputs if is_float(t)]
    if floats and all(map(is_empty, floats)):
        return f"'{floats[0].name}' of shape {list(floats[0].shape)} holds no values"
    if floats:
        return None
    unknown = next((t.name for t in unit.outputs if t.name and t.dtype is None), None)
    return "no float32 output" if unknown is None else f"the type of '{unknown}' is not known"


def _included(rule: HardwareRule, unit: Unit, override: Override) -> OpRule:
    if INCLUDED_SPEC not in rule.specs:
        raise RuleError(
            f"Override '{override}': rule {rule.name} neither lists {unit.kind} nor has a spec "
            f"'{INCLUDED_SPEC}'. Write a rule that extends it and lists {unit.kind}."
        )
    return OpRule(inputs=INCLUDED_SPEC, outputs=INCLUDED_SPEC)


def _by_rule(index: GraphIndex, rule: HardwareRule, unit: Unit, choice: Choice) -> None:
    exception = find_exception(index, rule, unit)
    op = rule.ops.get(unit.kind)
    if exception is not None and exception.unsupported:
        choice.skip(unit, exception.unsupported, unsupported=True)
    elif unit.kind in rule.unsupported:
        choice.skip(unit, rule.unsupported[unit.kind], unsupported=True)
    elif exception is not None and exception.kept_float:
        choice.skip(unit, exception.kept_float)
        if exception.reads_float:
            choice.fed_floats.add(unit.name)
            _keep_movers_float(index, unit, choice)
    elif op is not None:
        choice.ops[unit.name] = changed(op, exception)
    elif unit.kind in rule.kept_float:
        choice.skip(unit, rule.kept_float[unit.kind])
    elif _follows_in_a_chain(rule, unit):
        choice.ops[unit.name] = OpRule()
    else:
        choice.skip(unit, f"rule {rule.name} leaves {unit.kind} in float")


def _keep_movers_float(index: GraphIndex, unit: Unit, choice: Choice) -> None:
    """Keep float all nodes that only move values into a unit that must read floats.

    A runtime propagates Q/DQ pairs through such nodes, and would run the unit in integers.
    """
    frontier = [unit]
    while frontier:
        for node in frontier.pop().nodes[0].inputs[0].inputs:
            mover = index.unit_of[node.name]
            op = choice.ops.get(mover.name)
            if op is not None and op.parameters == "passthrough":
                del choice.ops[mover.name]
                choice.skip(mover, f"moves values to '{unit.name}', which reads floats")
                choice.fed_floats.add(mover.name)
                frontier.append(mover)


def _follows_in_a_chain(rule: HardwareRule, unit: Unit) -> bool:
    kinds = {kind for chain in rule.fuse for kind in chain[1:]}
    return unit.kind in kinds or ("BiasAdd" in kinds and is_bias_add(unit.nodes[-1]))
