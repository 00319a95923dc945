"""Decide what is quantized and why: graph + rule -> `QuantPlan`. Reads only; no data, no runtime.

1. Every node gets its `OpRule`, or a `Skip` with a reason.
2. Chains that the chip runs as one node are found; tensors inside of them get no point.
3. Tensors that a quantized node writes or reads get a point; constants it reads a weight point;
   the bias of a weighted node a derived point (int32, scale_x * scale_w).
4. Tensors whose parameters the chip shares form a group.
5. The user's overrides are laid over it; one that covers nothing is an error.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import PlanError, RuleError
from onnxqat.overrides import Override
from onnxqat.qparams import QuantSpec
from onnxqat.rules import HardwareRule, OpRule

__all__ = ["Edge", "QuantPlan", "QuantPoint", "Skip", "channel_axis", "make_plan"]

# Facts of the ONNX operators, not of chips.
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
NONNEGATIVE_OPS = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs")
# Ops whose inputs behind the first are parameters (shapes, limits, slopes), not data.
SINGLE_DATA_INPUT = (
    *("Clip", "Expand", "Gather", "PRelu", "Pad", "ReduceMean", "Reshape", "Resize", "Slice"),
    *("Split", "Squeeze", "Tile", "Unsqueeze"),
)


class Edge(msgspec.Struct, frozen=True, order=True):
    """Input ``index`` of the node named ``node``; ``node`` is "" for graph output ``index``."""

    node: str
    index: int


class QuantPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor that is quantized.

    Attributes
    ----------
    tensor : str
        Its name in the float graph.
    role : {"weight", "activation", "bias"}
        A bias stays float in the working model; its point says what the export makes of it.
    consumers : tuple of Edge
        Who reads the quantized values.
    spec : QuantSpec
        How.
    group : str or None
        Points of one group share one set of parameters, named after this tensor.
    derived_from : (str, str) or None
        Of a bias: the activation and the weight whose scales multiply to its scale.
    reason : str
        Why it is quantized, and what was changed by whom.
    """

    tensor: str
    role: Literal["weight", "activation", "bias"]
    consumers: tuple[Edge, ...]
    spec: QuantSpec
    group: str | None = None
    derived_from: tuple[str, str] | None = None
    reason: str

    @property
    def parameters(self) -> str:
        """The name that its scale and zero_point go by."""
        return self.group or self.tensor

    def __str__(self) -> str:
        """Return one line for people: tensor -> consumers, spec, role, reason."""
        readers = " ".join(f"{e.node or 'output'}[{e.index}]" for e in self.consumers)
        group = f" group={self.group}" if self.group else ""
        derived = f" scale={' * '.join(self.derived_from)}" if self.derived_from else ""
        return (
            f"{self.tensor} -> {readers}  {_describe(self.spec)}{group}{derived}  "
            f"{self.role}  ({self.reason})"
        )


class Skip(msgspec.Struct, frozen=True):
    """One node that stays float, and why."""

    node: str
    op_type: str
    reason: str


class QuantPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What is quantized and why, as pure data with a stable JSON form.

    Attributes
    ----------
    rule : str
        Name of the hardware rule.
    points, skips : tuple
        The quantized tensors, and the nodes that stay float.
    chains : tuple of tuple of str
        Names of the nodes that the chip runs as one.
    overrides : tuple of str
        What the user changed.
    """

    rule: str
    points: tuple[QuantPoint, ...]
    skips: tuple[Skip, ...]
    chains: tuple[tuple[str, ...], ...] = ()
    overrides: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return stable JSON: the same plan gives the same text."""
        return msgspec.json.encode(self, order="deterministic").decode()

    @staticmethod
    def from_json(text: str) -> QuantPlan:
        """Read what `to_json` wrote.

        Raises
        ------
        PlanError
            The text is not a plan.
        """
        try:
            return msgspec.json.decode(text, type=QuantPlan)
        except msgspec.MsgspecError as error:
            raise PlanError(f"The stored plan cannot be read ({error}). Insert again.") from error

    def __str__(self) -> str:
        """Return one line per point, then one per skip."""
        skips = (f"float: {s.node} ({s.op_type}): {s.reason}" for s in self.skips)
        return "\n".join((*map(str, self.points), *skips))

    def grid_points(self) -> tuple[QuantPoint, ...]:
        """Return the points that have Q/DQ nodes: all but the biases."""
        return tuple(p for p in self.points if p.role != "bias")


def _describe(spec: QuantSpec) -> str:
    kind = {"signed": "int", "unsigned": "uint", "from_range": "int|uint"}[spec.signedness]
    words = [kind.replace("|", f"{spec.bits}|") + str(spec.bits)]
    words.append("sym" if spec.symmetric else "asym")
    words += ["narrow"] if spec.narrow_range else []
    words += [f"axis={spec.axis}"] if spec.axis is not None else []
    words += [f"range={list(spec.fixed_range)}"] if spec.fixed_range else []
    return " ".join(words)


def channel_axis(node: gs.Node, index: int) -> int:
    """Return the axis of the output channels in constant operand ``index`` of ``node``."""
    rank = len(node.inputs[index].shape)
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    if node.op == "MatMul":
        return rank - 1 if index == 1 else max(rank - 2, 0)
    return 1 if node.op == "ConvTranspose" else 0


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype) == np.float32


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def _is_bias_add(node: gs.Node) -> bool:
    constants = [t for t in node.inputs if _is_constant(t)]
    return node.op == "Add" and len(constants) == 1 and len(constants[0].shape) == 1


def _clips_from_zero(node: gs.Node) -> bool:
    if node.op != "Clip" or len(node.inputs) < 2 or not _is_constant(node.inputs[1]):
        return False
    return bool(np.all(node.inputs[1].values >= 0))


def _is_kind(node: gs.Node, kind: str) -> bool:
    if kind == "BiasAdd":
        return _is_bias_add(node)
    return bool(node.op == kind and (kind != "Clip" or _clips_from_zero(node)))


@dataclass
class _Draft:
    """A point while the plan is being made."""

    role: Literal["weight", "activation"]
    spec_name: str
    spec: QuantSpec
    consumers: list[Edge]
    reason: str


@dataclass
class _Planner:
    """The indexes over one graph that the steps share."""

    graph: gs.Graph
    rule: HardwareRule
    overrides: Sequence[Override]
    readers: dict[str, list[Edge]] = field(default_factory=dict)
    nodes: dict[str, gs.Node] = field(default_factory=dict)
    ops: dict[str, OpRule] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)  # tensors inside a fused chain
    fused: dict[str, str] = field(default_factory=dict)  # node in a chain -> node at its head
    drafts: dict[str, _Draft] = field(default_factory=dict)
    biases: list[QuantPoint] = field(default_factory=list)
    used: set[Override] = field(default_factory=set)

    def index(self) -> None:
        """Index nodes by name and tensors by reader."""
        counts = Counter(node.name for node in self.graph.nodes)
        twice = next((n for n, count in counts.items() if count > 1 or not n), None)
        if twice is not None:
            raise PlanError(f"Node name '{twice}' is not unique. Prepare the model first.")
        for node in self.graph.nodes:
            self.nodes[node.name] = node
            for i, tensor in enumerate(node.inputs):
                self.readers.setdefault(tensor.name, []).append(Edge(node.name, i))
        for i, tensor in enumerate(self.graph.outputs):
            self.readers.setdefault(tensor.name, []).append(Edge("", i))

    def choose_ops(self) -> None:
        """Give every node its `OpRule` or a `Skip`."""
        kept_float = self._float_by_override()
        chained = {kind for chain in self.rule.fuse for kind in chain[1:]}
        for node in self.graph.nodes:
            op = self.rule.ops.get(node.op)
            if not any(_is_float(t) for t in node.outputs):
                reason = "no float32 output"
            elif node.domain not in (None, "", "ai.onnx"):
                reason = f"domain '{node.domain}' is not ONNX's own"
            elif node.name in kept_float:
                reason = f"override {kept_float[node.name]}"
            elif op is None and node.op not in chained:
                reason = f"rule {self.rule.name} leaves {node.op} in float"
            else:
                self.ops[node.name] = op or OpRule()
                continue
            self.skips.append(Skip(node.name, node.op, reason))

    def _float_by_override(self) -> dict[str, Override]:
        kept: dict[str, Override] = {}
        for override in self.overrides:
            if override.key == "quantize" and override.kind not in (
                "weight",
                "activation",
                "tensor",
            ):
                names = self.selected_nodes(override)
                self.used |= {override} if names else set()
                kept.update(dict.fromkeys(names, override))
        return kept

    def find_chains(self) -> None:
        """Find the nodes that the chip runs as one, longest chain first."""
        chains = sorted(self.rule.fuse, key=len, reverse=True)
        for node in self.graph.nodes:
            if node.name not in self.ops or node.name in self.fused:
                continue
            found = next((m for c in chains if (m := self._match(node, c))), None)
            if found:
                self.inner.update(n.outputs[0].name for n in found[:-1])
                self.fused.update({n.name: node.name for n in found})
        for node in self.graph.nodes:  # ops that are quantized only as part of a chain
            alone = node.name in self.ops and node.name not in self.fused
            if alone and node.op not in self.rule.ops:
                del self.ops[node.name]
                reason = f"rule {self.rule.name} quantizes {node.op} only behind a fused op"
                self.skips.append(Skip(node.name, node.op, reason))

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of the nodes in each chain, in order."""
        members: dict[str, list[str]] = {}
        for name, head in self.fused.items():
            members.setdefault(head, []).append(name)
        return tuple(map(tuple, members.values()))

    def _match(self, node: gs.Node, chain: tuple[str, ...]) -> list[gs.Node] | None:
        if not _is_kind(node, chain[0]):
            return None
        found = [node]
        for kind in chain[1:]:
            readers = self.readers.get(found[-1].outputs[0].name, [])
            if len(readers) != 1 or not readers[0].node:
                return None
            follower = self.nodes[readers[0].node]
            if follower.name not in self.ops or not _is_kind(follower, kind):
                return None
            found.append(follower)
        return found

    def mark(self) -> None:
        """Make a draft of a point for every tensor that a quantized node reads or writes."""
        for node in self.graph.nodes:
            op = self.ops.get(node.name)
            if op is None:
                continue
            for i, tensor in enumerate(node.inputs):
                if _is_float(tensor) and tensor.name not in self.inner:
                    self._mark_input(node, op, i, tensor)
            head = self.nodes[self.fused.get(node.name, node.name)]
            outputs = op.outputs or self.ops[head.name].outputs
            for tensor in node.outputs:
                if outputs and _is_float(tensor) and tensor.name not in self.inner:
                    self._mark_output(node, tensor, outputs)

    def _mark_input(self, node: gs.Node, op: OpRule, i: int, tensor: gs.Tensor) -> None:
        if i == BIAS_INPUT.get(node.op) or (i and node.op in SINGLE_DATA_INPUT):
            return
        edge = Edge(node.name, i)
        if not _is_constant(tensor):
            if op.inputs:
                self._draft(tensor, "activation", op.inputs, [edge], f"read by {node.op}")
        elif self.fused.get(node.name, node.name) != node.name and _is_bias_add(node):
            return  # the bias of the MatMul at the head of the chain
        elif op.weight:
            axis = channel_axis(node, i) if node.op in WEIGHTED_OPS else None
            self._draft(tensor, "weight", op.weight, [edge], f"weight of {node.op}", axis)

    def _mark_output(self, node: gs.Node, tensor: gs.Tensor, spec_name: str) -> None:
        edges = self.readers.get(tensor.name, [])
        if self.rule.graph_outputs == "float":
            edges = [e for e in edges if e.node]
        if not edges:
            return
        self._draft(tensor, "activation", spec_name, [], f"written by {node.op}")
        draft = self.drafts[tensor.name]
        draft.consumers = list(edges)
        nonnegative = node.op in NONNEGATIVE_OPS or _clips_from_zero(node)
        if draft.spec.signedness == "from_range" and nonnegative:
            draft.spec = msgspec.structs.replace(draft.spec, signedness="unsigned")

    def _draft(
        self,
        tensor: gs.Tensor,
        role: Literal["weight", "activation"],
        spec_name: str,
        edges: Iterable[Edge],
        reason: str,
        axis: int | None = None,
    ) -> None:
        spec = self.rule.specs[spec_name].resolve(axis)
        known = self.drafts.get(tensor.name)
        if known is None:
            self.drafts[tensor.name] = _Draft(role, spec_name, spec, list(edges), reason)
            return
        known.consumers += [e for e in edges if e not in known.consumers]
        if role == "weight" and known.spec.axis != spec.axis:
            known.spec = msgspec.structs.replace(known.spec, axis=None)
            known.reason += ", per-tensor: its consumers disagree on the channel axis"

    def weighted(self) -> list[gs.Node]:
        """Return the nodes with a constant weight, in order."""
        return [n for n in self.graph.nodes if n.op in WEIGHTED_OPS and self._weight_index(n)]

    def _weight_index(self, node: gs.Node) -> int | None:
        found = [i for i, t in enumerate(node.inputs[:2]) if _is_constant(t) and _is_float(t)]
        return (found[-1] + 1) if found else None  # one more, so that index 0 is true

    def derive_biases(self) -> None:
        """Make the derived point of every bias behind a quantized input and weight."""
        for node in self.weighted():
            index = (self._weight_index(node) or 1) - 1
            weight, x = node.inputs[index], node.inputs[1 - index]
            if weight.name not in self.drafts or x.name not in self.drafts:
                continue
            edge = self._bias_edge(node)
            if edge is not None:
                bias = self.nodes[edge.node].inputs[edge.index]
                axis = 0 if self.drafts[weight.name].spec.axis is not None else None
                self.biases.append(
                    QuantPoint(
                        tensor=bias.name,
                        role="bias",
                        consumers=(edge,),
                        spec=QuantSpec(bits=32, axis=axis),
                        derived_from=(x.name, weight.name),
                        reason=f"bias of {node.op}",
                    )
                )

    def _bias_edge(self, node: gs.Node) -> Edge | None:
        index = BIAS_INPUT.get(node.op)
        if index is not None:
            has_bias = len(node.inputs) > index and _is_constant(node.inputs[index])
            return Edge(node.name, index) if has_bias else None
        for name, head in self.fused.items():
            follower = self.nodes[name]
            if head == node.name and name != head and _is_bias_add(follower):
                return Edge(name, next(i for i, t in enumerate(follower.inputs) if _is_constant(t)))
        return None

    def apply_overrides(self) -> None:
        """Lay the overrides over the drafts, in order."""
        for override in self.overrides:
            names = self._covered(override)
            if not names and override not in self.used:
                raise RuleError(self._unmatched(override))
            for name in sorted(names & self.drafts.keys()):
                if override.key == "quantize":
                    del self.drafts[name]
                else:
                    self._change(name, override)

    def _change(self, name: str, override: Override) -> None:
        draft = self.drafts[name]
        value = override.value
        if override.key == "axis":
            value = self._axis(draft) if value == "channel" else None
        elif override.key == "bits" and override.kind in ("first", "last", "op", "name"):
            others = {e.node for e in draft.consumers} - set(self.selected_nodes(override))
            weighted = {n.name for n in self.weighted()}
            if draft.role == "activation" and others & weighted:
                value = max(value, draft.spec.bits)  # a shared edge takes the higher precision
        draft.spec = msgspec.structs.replace(draft.spec, **{override.key: value})
        draft.reason += f", {override}"

    def _axis(self, draft: _Draft) -> int | None:
        edge = draft.consumers[0]
        node = self.nodes.get(edge.node)
        if draft.role != "weight" or node is None or node.op not in WEIGHTED_OPS:
            return None
        return channel_axis(node, edge.index)

    def _covered(self, override: Override) -> set[str]:
        """Return the tensors whose points an override covers."""
        if override.kind in ("weight", "activation"):
            return {n for n, d in self.drafts.items() if d.role == override.kind}
        if override.kind == "tensor":
            return {n for n in self.drafts if override.matches(n)}
        nodes = set(self.selected_nodes(override))
        return (
            {n for n, d in self.drafts.items() if any(e.node in nodes for e in d.consumers)}
            if override.key != "quantize"
            else set()
        )

    def selected_nodes(self, override: Override) -> list[str]:
        """Return the names of the nodes that a node selector covers."""
        if override.kind in ("first", "last"):
            return _ends(self.graph, self.weighted(), first=override.kind == "first")
        attribute = "op" if override.kind == "op" else "name"
        return [n.name for n in self.graph.nodes if override.matches(getattr(n, attribute))]

    def _unmatched(self, override: Override) -> str:
        candidates = {
            "op": {n.op for n in self.graph.nodes},
            "name": set(self.nodes),
            "tensor": set(self.drafts),
        }.get(override.kind, set())
        close = difflib.get_close_matches(override.pattern, sorted(candidates), n=3, cutoff=0.3)
        hint = f"Nearest: {', '.join(close)}." if close else "See 'onnxqat insert --plan-only'."
        return f"Override '{override}' covers nothing in this model. {hint}"

    def groups(self) -> dict[str, str]:
        """Return tensor -> group for the points that share parameters (union-find)."""
        parent = {name: name for name in self.drafts}

        def root(name: str) -> str:
            while parent[name] != name:
                parent[name] = parent[parent[name]]
                name = parent[name]
            return name

        for node in self.graph.nodes:
            op = self.ops.get(node.name)
            if op is None or op.parameters == "own":
                continue
            inputs = node.inputs[:1] if op.parameters == "passthrough" else node.inputs
            shared = [t.name for t in (*inputs, *node.outputs) if t.name in parent]
            for name in shared[1:]:
                parent[root(name)] = root(shared[0])
        members: dict[str, list[str]] = {}
        for name in self.drafts:
            members.setdefault(root(name), []).append(name)
        return {n: names[0] for names in members.values() if len(names) > 1 for n in names}

    def merge_groups(self, groups: dict[str, str]) -> None:
        """Give the members of a group one spec: the highest precision, signed if any may be."""
        for group in dict.fromkeys(groups.values()):
            drafts = [self.drafts[n] for n, g in groups.items() if g == group]
            spec = _merged([d.spec for d in drafts])
            for draft in drafts:
                draft.spec = spec


def _merged(specs: list[QuantSpec]) -> QuantSpec:
    kinds = {s.signedness for s in specs}
    kind = (
        "unsigned" if kinds == {"unsigned"} else "signed" if kinds == {"signed"} else "from_range"
    )
    ranges = {s.fixed_range for s in specs}
    if kind == "from_range" and not specs[0].symmetric:
        kind = "signed"
    return msgspec.structs.replace(
        specs[0],
        bits=max(s.bits for s in specs),
        signedness=kind,
        fixed_range=ranges.pop() if len(ranges) == 1 else None,
        min_range=max(s.min_range for s in specs),
    )


def _ends(graph: gs.Graph, weighted: list[gs.Node], *, first: bool) -> list[str]:
    """Return the weighted nodes that no weighted node precedes (or follows) on some path.

    A weighted node is first when a graph input reaches it over nodes without weights, and last
    when it reaches a graph output so.
    """
    names = {n.name for n in weighted}
    found: list[str] = []
    seen: set[str] = set()
    frontier = list(graph.inputs if first else graph.outputs)
    while frontier:
        tensor = frontier.pop()
        for node in tensor.outputs if first else tensor.inputs:
            if node.name in seen:
                continue
            seen.add(node.name)
            if node.name in names:
                found.append(node.name)
            else:
                frontier += node.outputs if first else node.inputs
    return found


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
    planner = _Planner(graph, rule, overrides)
    planner.index()
    planner.choose_ops()
    planner.find_chains()
    planner.mark()
    planner.apply_overrides()
    if not planner.drafts:
        raise PlanError(f"Rule {rule.name} quantizes nothing in this graph.")
    planner.derive_biases()
    groups = planner.groups()
    planner.merge_groups(groups)
    points = (
        QuantPoint(
            tensor=name,
            role=draft.role,
            consumers=tuple(draft.consumers),
            spec=draft.spec,
            group=groups.get(name),
            reason=draft.reason,
        )
        for name, draft in planner.drafts.items()
    )
    return QuantPlan(
        rule=rule.name,
        points=(*points, *planner.biases),
        skips=tuple(planner.skips),
        chains=planner.chains(),
        overrides=tuple(str(o) for o in overrides),
    )
