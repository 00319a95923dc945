"""Make a `QuantPlan` from a graph and a hardware rule.

1. Group the nodes of a pattern that the chip runs as one op into a unit (`patterns`).
2. Give each unit its `OpRule`, or a `Skip` with a reason (`choose`, `masks`, `exceptions`).
3. Find the chains that the chip runs as one; tensors inside a chain get no point (`chains`).
4. Make a point for each tensor that a quantized unit reads or writes (a weight point for a
   constant), and a derived point (int32, scale_x * scale_w) for each bias (`points`).
5. Apply the user's overrides; an override that matches nothing is an error.
6. Put tensors that share parameters on the chip into groups (`groups`).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.errors import PlanError, RuleError
from onnxqat.nodes import channel_axis
from onnxqat.overrides import Override, check_weight_observer
from onnxqat.plan.chains import find_chains
from onnxqat.plan.choose import Choice, choose_ops
from onnxqat.plan.graph import GraphIndex, Unit
from onnxqat.plan.groups import Quantized, find_groups, merged_spec, unobserved_tensors
from onnxqat.plan.masks import find_masks
from onnxqat.plan.patterns import PATTERNS
from onnxqat.plan.points import Draft, PointDrafter
from onnxqat.plan.requantization import without_requantizations
from onnxqat.plan.types import REQUANTIZED, Edge, QuantPlan, QuantPoint
from onnxqat.rules import HardwareRule, wrong_spec

__all__ = ["EmptyPlanError", "make_plan"]


class EmptyPlanError(PlanError):
    """The rule quantizes nothing in this graph."""


def make_plan(graph: gs.Graph, rule: HardwareRule, overrides: Sequence[Override] = ()) -> QuantPlan:
    """Decide what is quantized in a prepared float graph, and why.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        A prepared graph: unique node names, shapes inferred. It is not changed. Nodes that stand
        for requantizations are planned anew.
    rule : HardwareRule
        The rule of the chip.
    overrides : sequence of Override
        Changes to the rule, applied in order; later ones override earlier ones.

    Raises
    ------
    PlanError
        Node names are not unique.
    EmptyPlanError
        The rule quantizes nothing in this graph.
    RuleError
        An override matches nothing, or names a spec that the rule does not have.
    """
    graph = without_requantizations(graph)
    index = GraphIndex(graph, [kind for kind in PATTERNS if kind not in rule.split])
    masks = find_masks(graph)
    choice = choose_ops(index, rule, overrides, masks)
    chains = find_chains(index, rule.fuse, choice.ops)
    _skip_loose_followers(index, rule, choice, chains)
    marker = PointDrafter(index, rule, choice, chains, masks.drowned)
    marker.mark()
    _apply_overrides(index, rule, marker.drafts, overrides)
    if not marker.drafts:
        raise EmptyPlanError(f"Rule {rule.name} quantizes nothing in this graph.")
    patterns = [(u,) for u in index.units if len(u.nodes) > 1 and u.name in choice.ops]
    chained = {unit.name for chain in chains for unit in chain}
    chains += [single for single in patterns if single[0].name not in chained]
    _skip_untouched(index, rule, choice, marker.drafts, chained)
    no_bias = any(o.kind == "bias" for o in overrides)
    return QuantPlan(
        rule=rule.name,
        points=(
            *_points(index, choice, marker, chains),
            *(() if no_bias else marker.biases()),
        ),
        skips=tuple(choice.skips),
        chains=tuple(tuple(n.name for unit in c for n in unit.nodes) for c in chains),
        overrides=tuple(str(o) for o in overrides),
    )


def _points(
    index: GraphIndex, choice: Choice, marker: PointDrafter, chains: list[tuple[Unit, ...]]
) -> tuple[QuantPoint, ...]:
    """Find the groups, and return a point for each draft."""
    ends = {unit.name: chain[-1] for chain in chains for unit in chain}
    drafts, requantized = marker.drafts, marker.requantized
    units = [
        Quantized(
            choice.ops[unit.name],
            ends.get(unit.name, unit),
            [requantized.get(Edge(n.name, i), t.name) for n, i, t in unit.inputs()],
        )
        for unit in index.units
        if unit.name in choice.ops
    ]
    # a group is named after its first tensor: not after a requantized one
    ordered = sorted(drafts, key=set(requantized.values()).__contains__)
    groups = find_groups(units, {name: drafts[name].spec for name in ordered})
    unobserved = unobserved_tensors(units, groups)
    members: dict[str, list[Draft]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(drafts[name])
    for together in members.values():
        spec = merged_spec([draft.spec for draft in together])
        for draft in together:
            draft.spec = spec
    return tuple(
        QuantPoint(
            tensor=name,
            role=draft.role,
            consumers=tuple(draft.consumers),
            spec=draft.spec,
            group=groups.get(name),
            observed=name not in unobserved,
            reason=draft.reason,
        )
        for name, draft in drafts.items()
    )


def _skip_loose_followers(
    index: GraphIndex, rule: HardwareRule, choice: Choice, chains: list[tuple[Unit, ...]]
) -> None:
    """Skip units that the rule quantizes only inside a chain and that are in no chain."""
    chained = {unit.name for chain in chains for unit in chain}
    for unit in index.units:
        table = choice.ops.get(unit.name)
        if table is None or unit.name in chained:
            continue
        if not (table.inputs or table.outputs or table.weight):
            del choice.ops[unit.name]
            reason = f"rule {rule.name} quantizes {unit.kind} only if fused with the op before it"
            choice.skip(unit, reason)


def _skip_untouched(
    index: GraphIndex,
    rule: HardwareRule,
    choice: Choice,
    drafts: dict[str, Draft],
    chained: set[str],
) -> None:
    """Skip units that neither read nor write a quantized tensor in the finished plan."""
    touched = {edge.node for draft in drafts.values() for edge in draft.consumers}
    for unit in index.units:
        writes = any(t.name in drafts for t in unit.outputs)
        reads = any(node.name in touched for node in unit.nodes)
        if unit.name in choice.ops and unit.name not in chained and not (reads or writes):
            choice.skip(unit, f"rule {rule.name} quantizes nothing around this {unit.kind}")


def _apply_overrides(
    index: GraphIndex, rule: HardwareRule, drafts: dict[str, Draft], overrides: Sequence[Override]
) -> None:
    """Apply the overrides to the drafts, in order."""
    for override in overrides:
        if override.kind == "bias":  # its only key is quantize=false
            continue
        if override.selects_nodes:
            nodes = set(index.selected(override))
            names = [n for n, d in drafts.items() if any(e.node in nodes for e in d.consumers)]
            matched = bool(nodes)
        else:
            nodes = set()
            names = [n for n, d in drafts.items() if override.covers_point(d.role, n)]
            matched = bool(names)
        if not matched:
            raise RuleError(_unmatched(index, drafts, override))
        for name in names:
            if override.key != "quantize":
                _change(index, rule, drafts[name], override, nodes)
            elif not override.selects_nodes:  # node overrides were handled by `choose_ops`
                _leave_float(drafts, name)


def _leave_float(drafts: dict[str, Draft], name: str) -> None:
    """Remove a draft, those requantized from its tensor, and the readers that it was for."""
    for edge in drafts.pop(name).consumers if name in drafts else ():
        if REQUANTIZED in edge.node:
            drafts.pop(edge.node, None)
    for other, draft in list(drafts.items()) if REQUANTIZED in name else ():
        draft.consumers = [edge for edge in draft.consumers if edge.node != name]
        if not draft.consumers:
            del drafts[other]


def _change(
    index: GraphIndex, rule: HardwareRule, draft: Draft, override: Override, nodes: set[str]
) -> None:
    if draft.role == "weight" and override.kind == "tensor":
        check_weight_observer(override)
    draft.spec = msgspec.structs.replace(
        draft.spec, **_new_fields(index, rule, draft, override, nodes)
    )
    if wrong := wrong_spec(draft.spec):
        raise RuleError(f"Override '{override}' on rule {rule.name}: {wrong}")
    draft.reason += f", {override}"


def _new_fields(
    index: GraphIndex, rule: HardwareRule, draft: Draft, override: Override, nodes: set[str]
) -> dict[str, Any]:
    value = override.value
    if override.key == "spec":
        if value not in rule.specs:
            raise RuleError(
                f"Override '{override}': rule {rule.name} has no spec '{value}'. "
                f"It has {', '.join(rule.specs)}."
            )
        heads = next((index.heads[e.node] for e in draft.consumers if e.node in index.heads), None)
        spec = rule.specs[value].resolve(_channel_axis(index, draft), heads)
        return msgspec.structs.asdict(spec)
    if override.key == "axis":
        axis = _channel_axis(index, draft) if value == "channel" else None
        return {"axis": axis, "heads": None}
    if override.key == "bits" and override.selects_nodes and draft.role == "activation":
        others = {e.node for e in draft.consumers} - nodes
        if others & {n.name for n in index.weighted()}:
            value = max(value, draft.spec.bits)  # a shared edge takes the higher precision
    return {override.key: value}


def _channel_axis(index: GraphIndex, draft: Draft) -> int | None:
    edge = draft.consumers[0]
    node = index.nodes.get(edge.node)
    if draft.role != "weight" or node is None:
        return None
    return channel_axis(node, edge.index, len(node.inputs[edge.index].shape))


def _unmatched(index: GraphIndex, drafts: dict[str, Draft], override: Override) -> str:
    if override.kind == "between":
        tensors = index.graph.tensors()
        missing = next((t for t in override.tensors if t not in tensors), None)
        if missing is None:
            start, end = override.tensors
            return f"Override '{override}' matches nothing: no path leads from {start} to {end}."
        candidates, wanted = set(tensors), missing
    else:
        candidates = {
            "op": {n.op for n in index.graph.nodes},
            "name": set(index.nodes),
            "tensor": set(drafts),
        }.get(override.kind, set())
        wanted = override.pattern
    close = difflib.get_close_matches(wanted, sorted(candidates), n=3, cutoff=0.3)
    hint = f"Nearest: {', '.join(close)}." if close else "See 'onnxqat insert --plan-only'."
    return f"Override '{override}' matches nothing in this model. {hint}"
