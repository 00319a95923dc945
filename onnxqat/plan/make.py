"""Graph + rule -> `QuantPlan`.

1. Every node gets its `OpRule`, or a `Skip` with a reason.
2. Chains that the chip runs as one node are found; tensors inside of them get no point.
3. Tensors that a quantized node writes or reads get a point; constants it reads a weight point;
   the bias of a weighted node a derived point (int32, scale_x * scale_w).
4. The user's overrides are laid over it; one that covers nothing is an error.
5. Tensors whose parameters the chip shares form a group.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.errors import PlanError, RuleError
from onnxqat.overrides import Override
from onnxqat.plan.chains import find_chains
from onnxqat.plan.graph import GraphIndex
from onnxqat.plan.groups import find_groups, merged_spec
from onnxqat.plan.operators import (
    BIAS_INPUT,
    NONNEGATIVE_OPS,
    SINGLE_DATA_INPUT,
    WEIGHTED_OPS,
    channel_axis,
    clips_from_zero,
    is_bias_add,
    is_constant,
    is_float,
    weight_index,
)
from onnxqat.plan.types import Edge, QuantPlan, QuantPoint, Skip
from onnxqat.qparams import QuantSpec
from onnxqat.rules import HardwareRule, OpRule

__all__ = ["make_plan"]

Role = Literal["weight", "activation"]


@dataclass
class _Draft:
    """A point while the plan is being made."""

    role: Role
    spec: QuantSpec
    consumers: list[Edge]
    reason: str


def make_plan(graph: gs.Graph, rule: HardwareRule, overrides: Sequence[Override] = ()) -> QuantPlan:
    """Decide what is quantized in a prepared float graph, and why.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        Prepared: unique node names, shapes inferred. It is not changed.
    rule : HardwareRule
        The chip.
    overrides : sequence of Override
        Laid over the rule, later ones win.

    Raises
    ------
    PlanError
        Node names are not unique, or the rule quantizes nothing here.
    RuleError
        An override covers nothing.
    """
    index = GraphIndex(graph)
    ops, skips = _choose_ops(index, rule, overrides)
    chains = find_chains(index, rule.fuse, ops)
    skips += _drop_loose_followers(index, rule, ops, chains)
    marker = _Marker(index, rule, ops, chains)
    marker.mark()
    _apply_overrides(index, marker.drafts, overrides)
    if not marker.drafts:
        raise PlanError(f"Rule {rule.name} quantizes nothing in this graph.")
    groups = find_groups(graph, ops, marker.drafts)
    for group in dict.fromkeys(groups.values()):
        members = [marker.drafts[name] for name, g in groups.items() if g == group]
        spec = merged_spec([draft.spec for draft in members])
        for draft in members:
            draft.spec = spec
    points = (
        QuantPoint(
            tensor=name,
            role=draft.role,
            consumers=tuple(draft.consumers),
            spec=draft.spec,
            group=groups.get(name),
            reason=draft.reason,
        )
        for name, draft in marker.drafts.items()
    )
    return QuantPlan(
        rule=rule.name,
        points=(*points, *marker.biases()),
        skips=tuple(skips),
        chains=chains,
        overrides=tuple(str(o) for o in overrides),
    )


def _choose_ops(
    index: GraphIndex, rule: HardwareRule, overrides: Sequence[Override]
) -> tuple[dict[str, OpRule], list[Skip]]:
    """Give every node its `OpRule` or a `Skip`."""
    kept_float = {
        name: override
        for override in overrides
        if override.key == "quantize" and override.selects_nodes
        for name in index.selected(override)
    }
    followers = {kind for chain in rule.fuse for kind in chain[1:]}
    ops: dict[str, OpRule] = {}
    skips = []
    for node in index.graph.nodes:
        op = rule.ops.get(node.op)
        if not any(is_float(t) for t in node.outputs):
            reason = "no float32 output"
        elif node.domain not in (None, "", "ai.onnx"):
            reason = f"domain '{node.domain}' is not ONNX's own"
        elif node.name in kept_float:
            reason = f"override {kept_float[node.name]}"
        elif op is None and node.op not in followers:
            reason = f"rule {rule.name} leaves {node.op} in float"
        else:
            ops[node.name] = op or OpRule()
            continue
        skips.append(Skip(node.name, node.op, reason))
    return ops, skips


def _drop_loose_followers(
    index: GraphIndex,
    rule: HardwareRule,
    ops: dict[str, OpRule],
    chains: tuple[tuple[str, ...], ...],
) -> list[Skip]:
    """Skip the nodes that the rule knows only as a part of chains, and that are in none."""
    chained = {name for chain in chains for name in chain}
    loose = [n for n in ops if n not in chained and index.nodes[n].op not in rule.ops]
    for name in loose:
        del ops[name]
    reason = "rule {} quantizes {} only behind a fused op"
    return [
        Skip(name, op_type, reason.format(rule.name, op_type))
        for name in loose
        for op_type in (index.nodes[name].op,)
    ]


class _Marker:
    """Makes a draft of a point for every tensor that a quantized node reads or writes."""

    def __init__(
        self,
        index: GraphIndex,
        rule: HardwareRule,
        ops: dict[str, OpRule],
        chains: tuple[tuple[str, ...], ...],
    ) -> None:
        self.index = index
        self.rule = rule
        self.ops = ops
        self.heads = {name: chain[0] for chain in chains for name in chain}
        self.tails = {chain[0]: chain[1:] for chain in chains}
        inner = (index.nodes[name] for chain in chains for name in chain[:-1])
        self.inner = {node.outputs[0].name for node in inner}
        self.drafts: dict[str, _Draft] = {}

    def mark(self) -> None:
        for node in self.index.graph.nodes:
            op = self.ops.get(node.name)
            if op is None:
                continue
            for i, tensor in enumerate(node.inputs):
                if is_float(tensor) and tensor.name not in self.inner:
                    self._mark_input(node, op, i, tensor)
            outputs = op.outputs or self.ops[self.heads.get(node.name, node.name)].outputs
            for tensor in node.outputs:
                if outputs and is_float(tensor) and tensor.name not in self.inner:
                    self._mark_output(node, tensor, outputs)

    def _mark_input(self, node: gs.Node, op: OpRule, i: int, tensor: gs.Tensor) -> None:
        if i == BIAS_INPUT.get(node.op) or (i and node.op in SINGLE_DATA_INPUT):
            return
        edge = Edge(node.name, i)
        if not is_constant(tensor):
            if op.inputs:
                spec = self.rule.specs[op.inputs].resolve(None)
                self._draft(tensor, "activation", spec, [edge], f"read by {node.op}")
        elif op.weight and not self._is_chained_bias(node):
            axis = channel_axis(node, i) if node.op in WEIGHTED_OPS else None
            spec = self.rule.specs[op.weight].resolve(axis)
            self._draft(tensor, "weight", spec, [edge], f"weight of {node.op}")

    def _is_chained_bias(self, node: gs.Node) -> bool:
        """Whether a node adds the bias of the MatMul at the head of its chain."""
        return self.heads.get(node.name, node.name) != node.name and is_bias_add(node)

    def _mark_output(self, node: gs.Node, tensor: gs.Tensor, spec_name: str) -> None:
        edges = self.index.readers.get(tensor.name, [])
        if self.rule.graph_outputs == "float":
            edges = [e for e in edges if e.node]
        if not edges:
            return
        spec = self.rule.specs[spec_name].resolve(None)
        if spec.signedness == "from_range" and (
            node.op in NONNEGATIVE_OPS or clips_from_zero(node)
        ):
            spec = msgspec.structs.replace(spec, signedness="unsigned")
        self._draft(tensor, "activation", spec, edges, f"written by {node.op}")

    def _draft(
        self, tensor: gs.Tensor, role: Role, spec: QuantSpec, edges: Iterable[Edge], reason: str
    ) -> None:
        known = self.drafts.get(tensor.name)
        if known is None:
            self.drafts[tensor.name] = _Draft(role, spec, list(edges), reason)
            return
        known.consumers += [e for e in edges if e not in known.consumers]
        if role == "weight" and known.spec.axis != spec.axis:
            known.spec = msgspec.structs.replace(known.spec, axis=None)
            known.reason += ", per-tensor: its consumers disagree on the channel axis"

    def biases(self) -> list[QuantPoint]:
        """Return the derived point of every bias behind a quantized input and weight."""
        found: list[QuantPoint] = []
        for node in self.index.weighted() if self.rule.bias == "int32" else ():
            i = weight_index(node) or 0
            weight, x = node.inputs[i], node.inputs[1 - i]
            edge = self._bias_edge(node)
            if edge is None or weight.name not in self.drafts or x.name not in self.drafts:
                continue
            per_axis = self.drafts[weight.name].spec.axis is not None
            found.append(
                QuantPoint(
                    tensor=self.index.nodes[edge.node].inputs[edge.index].name,
                    role="bias",
                    consumers=(edge,),
                    spec=QuantSpec(bits=32, axis=0 if per_axis else None),
                    derived_from=(x.name, weight.name),
                    reason=f"bias of {node.op}",
                )
            )
        return found

    def _bias_edge(self, node: gs.Node) -> Edge | None:
        i = BIAS_INPUT.get(node.op)
        if i is not None:
            has_bias = len(node.inputs) > i and is_constant(node.inputs[i])
            return Edge(node.name, i) if has_bias else None
        followers = (self.index.nodes[name] for name in self.tails.get(node.name, ()))
        for follower in followers:
            if is_bias_add(follower):
                inputs = enumerate(follower.inputs)
                return Edge(follower.name, next(i for i, t in inputs if is_constant(t)))
        return None


def _apply_overrides(
    index: GraphIndex, drafts: dict[str, _Draft], overrides: Sequence[Override]
) -> None:
    """Lay the overrides over the drafts, in order."""
    for override in overrides:
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
                _change(index, drafts[name], override, nodes)
            elif not override.selects_nodes:  # nodes kept float were skipped before
                del drafts[name]


def _change(index: GraphIndex, draft: _Draft, override: Override, nodes: set[str]) -> None:
    value = override.value
    if override.key == "axis":
        value = _channel_axis(index, draft) if value == "channel" else None
    elif override.key == "bits" and override.selects_nodes and draft.role == "activation":
        others = {e.node for e in draft.consumers} - nodes
        if others & {n.name for n in index.weighted()}:
            value = max(value, draft.spec.bits)  # a shared edge takes the higher precision
    draft.spec = msgspec.structs.replace(draft.spec, **{override.key: value})
    draft.reason += f", {override}"


def _channel_axis(index: GraphIndex, draft: _Draft) -> int | None:
    edge = draft.consumers[0]
    node = index.nodes.get(edge.node)
    if draft.role != "weight" or node is None or node.op not in WEIGHTED_OPS:
        return None
    return channel_axis(node, edge.index)


def _unmatched(index: GraphIndex, drafts: dict[str, _Draft], override: Override) -> str:
    candidates = {
        "op": {n.op for n in index.graph.nodes},
        "name": set(index.nodes),
        "tensor": set(drafts),
    }.get(override.kind, set())
    close = difflib.get_close_matches(override.pattern, sorted(candidates), n=3, cutoff=0.3)
    hint = f"Nearest: {', '.join(close)}." if close else "See 'onnxqat insert --plan-only'."
    return f"Override '{override}' covers nothing in this model. {hint}"
