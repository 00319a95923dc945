"""Draft a point for each tensor that a quantized unit reads or writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import onnx_graphsurgeon as gs

from onnxqat.nodes import (
    bias_channels,
    bias_index,
    channel_axis,
    clips_from_zero,
    is_bias_add,
    is_cell,
    is_constant,
    is_empty,
    is_float,
    runs_along,
    takes_grid,
)
from onnxqat.operators import NONNEGATIVE, WEIGHTED
from onnxqat.plan.choose import Choice
from onnxqat.plan.graph import GraphIndex, Unit
from onnxqat.plan.requantization import requantized_edges
from onnxqat.plan.types import Edge, QuantPoint
from onnxqat.qparams import FloatArray, QuantSpec
from onnxqat.rules import HardwareRule, OpRule

__all__ = ["Draft", "PointDrafter"]

Role = Literal["weight", "activation"]


@dataclass
class Draft:
    """A point that can still change while the plan is made."""

    role: Role
    spec: QuantSpec
    consumers: list[Edge]
    reason: str


def _scale_of_constant(values: FloatArray) -> float:
    """Return the smallest scale at which a constant fits int8 (or uint8 if it is not negative)."""
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    return max(-low / 128, high / 127) if low < 0 else high / 255


class PointDrafter:
    """Drafts the points of activations and weights, and makes the derived points of biases.

    Parameters
    ----------
    choice : Choice
        The quantized units, and the nodes that read floats.
    chains : list of tuple of Unit
        The units that the chip runs as one.
    drowned : set of str
        Tensors that get no point.
    """

    def __init__(
        self,
        index: GraphIndex,
        rule: HardwareRule,
        choice: Choice,
        chains: list[tuple[Unit, ...]],
        drowned: set[str],
    ) -> None:
        self.index = index
        self.rule = rule
        self.ops = choice.ops
        self.fed_floats = choice.fed_floats
        self.drowned = drowned
        self.heads = {unit.name: chain[0] for chain in chains for unit in chain}
        self.tails = {chain[0].name: chain[1:] for chain in chains}
        self.inner = {chain_unit.outputs[0].name for c in chains for chain_unit in c[:-1]}
        self.requantized = requantized_edges(index, choice.ops)
        self.drafts: dict[str, Draft] = {}

    def mark(self) -> None:
        """Draft the points of activations and constants."""
        for unit in self.index.units:
            op = self.ops.get(unit.name)
            if op is None:
                continue
            for node, i, tensor in unit.inputs():
                if is_float(tensor) and tensor.name not in self.inner | self.drowned:
                    self._mark_input(unit, node, op, i, tensor)
            outputs = op.outputs or self.ops[self._head(unit).name].outputs
            for i, tensor in enumerate(unit.outputs):
                inside = tensor.name in self.inner or is_cell(unit.nodes[-1], i)
                if outputs and is_float(tensor) and not inside:
                    self._mark_output(unit, tensor, outputs)
        self._requantize()

    def _requantize(self) -> None:
        """Give each requantized input a draft of its own, behind the tensor's."""
        drafts: dict[str, Draft] = {}
        for name, draft in self.drafts.items():
            drafts[name] = draft
            for edge in [e for e in draft.consumers if e in self.requantized]:
                target = self.requantized[edge]
                unit = self.index.unit_of[edge.node]
                if target not in drafts:
                    spec = self.rule.specs[self.ops[unit.name].inputs or ""].resolve(None)
                    reason = f"'{name}' requantized for {unit.kind}"
                    drafts[target] = Draft("activation", spec, [], reason)
                    draft.consumers[draft.consumers.index(edge)] = Edge(target, 0)
                else:  # the node reads the tensor twice
                    draft.consumers.remove(edge)
                drafts[target].consumers.append(edge)
        self.drafts = drafts

    def _head(self, unit: Unit) -> Unit:
        return self.heads.get(unit.name, unit)

    def _mark_input(self, unit: Unit, node: gs.Node, op: OpRule, i: int, tensor: gs.Tensor) -> None:
        if not takes_grid(node, i):
            return
        edge = Edge(node.name, i)
        if not is_constant(tensor):
            if op.inputs and (op.reads == "all" or self._is_residual(unit, tensor)):
                spec = self.rule.specs[op.inputs].resolve(None)
                self._draft(tensor, "activation", spec, [edge], f"read by {unit.kind}")
        elif op.weight and len(unit.nodes) == 1 and self._has_its_input(node, op, i):
            if self._is_chained_bias(unit):
                return
            axis = channel_axis(node, i, len(tensor.shape))
            spec = self.rule.specs[op.weight].resolve(axis, self.index.heads.get(node.name))
            self._draft(tensor, "weight", spec, [edge], f"weight of {unit.kind}")

    def _has_its_input(self, node: gs.Node, op: OpRule, i: int) -> bool:
        """Whether the data operand of a weight can be quantized, if the rule requires that."""
        if node.op not in WEIGHTED or not op.inputs:
            return True
        data = node.inputs[1 - i]
        return is_float(data) and data.name not in self.drowned

    def _is_residual(self, unit: Unit, tensor: gs.Tensor) -> bool:
        """Whether a unit adds this tensor to the output of a weighted node."""
        others = [t for _, _, t in unit.inputs() if t is not tensor]
        return not self._from_weighted(tensor) and any(map(self._from_weighted, others))

    def _from_weighted(self, tensor: gs.Tensor) -> bool:
        """Whether a weighted node, or a chain with one at its head, writes this tensor."""
        return any(
            self._head(self.index.unit_of[node.name]).kind in WEIGHTED for node in tensor.inputs
        )

    def _is_chained_bias(self, unit: Unit) -> bool:
        """Whether a unit adds the bias of the MatMul at the head of its chain."""
        return self._head(unit) is not unit and is_bias_add(unit.nodes[-1])

    def _mark_output(self, unit: Unit, tensor: gs.Tensor, spec_name: str) -> None:
        nodes, all_edges = self.index.nodes, self.index.readers.get(tensor.name, [])
        edges = [e for e in all_edges if not e.node or takes_grid(nodes[e.node], e.index)]
        edges = [e for e in edges if e.node not in self.fed_floats]
        if self.rule.graph_outputs == "float":
            edges = [e for e in edges if e.node]
        if not edges:
            return
        spec = self.rule.specs[spec_name].resolve(None)
        if spec.signedness == "from_range" and (
            unit.kind in NONNEGATIVE or clips_from_zero(unit.nodes[-1])
        ):
            spec = msgspec.structs.replace(spec, signedness="unsigned")
        spec = msgspec.structs.replace(spec, min_scale=self._smallest_scale(unit, spec))
        self._draft(tensor, "activation", spec, edges, f"written by {unit.kind}")

    def _smallest_scale(self, unit: Unit, spec: QuantSpec) -> float:
        """Return the smallest output scale that covers constants stored with that scale."""
        head = self._head(unit)
        if self.ops[head.name].constant_scale == "own":
            return spec.min_scale
        constants = [t.values for _, _, t in head.inputs() if is_constant(t) and is_float(t)]
        return max(spec.min_scale, *map(_scale_of_constant, constants), 0.0)

    def _draft(
        self, tensor: gs.Tensor, role: Role, spec: QuantSpec, edges: Iterable[Edge], reason: str
    ) -> None:
        if is_empty(tensor):
            return
        known = self.drafts.get(tensor.name)
        if known is None:
            self.drafts[tensor.name] = Draft(role, spec, list(edges), reason)
            return
        known.consumers += [e for e in edges if e not in known.consumers]
        if role == "weight" and known.spec.axis != spec.axis:
            known.spec = msgspec.structs.replace(known.spec, axis=None, heads=None)
            known.reason += ", per-tensor: its consumers need scales along different axes"

    def biases(self) -> list[QuantPoint]:
        """Return the derived point of each bias whose node has a quantized input and weight."""
        found: list[QuantPoint] = []
        for node in self.index.weighted() if self.rule.bias == "int32" else ():
            x, weight = node.inputs[:2]
            edge = self._bias_edge(node)
            if edge is None or is_constant(x) or not {x.name, weight.name} <= self.drafts.keys():
                continue
            bias = self.index.nodes[edge.node].inputs[edge.index]
            channels = bias_channels(node, weight.shape) if is_constant(weight) else None
            if channels is None or not (is_float(bias) and runs_along(bias.shape, channels)):
                continue  # it stays float: s_x * s_w is not its scale
            per_axis = self.drafts[weight.name].spec.axis is not None
            found.append(
                QuantPoint(
                    tensor=bias.name,
                    role="bias",
                    consumers=(edge,),
                    spec=QuantSpec(bits=self.rule.bias_bits, axis=0 if per_axis else None),
                    derived_from=(x.name, weight.name),
                    reason=f"bias of {node.op}",
                )
            )
        return found

    def _bias_edge(self, node: gs.Node) -> Edge | None:
        i = bias_index(node)
        if i is not None:
            has_bias = len(node.inputs) > i and is_constant(node.inputs[i])
            return Edge(node.name, i) if has_bias else None
        followers = (unit.nodes[-1] for unit in self.tails.get(node.name, ()))
        for follower in followers:
            if is_bias_add(follower):
                inputs = enumerate(follower.inputs)
                return Edge(follower.name, next(i for i, t in inputs if is_constant(t)))
        return None
