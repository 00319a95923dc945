"""Lookups for building a program: grids, edges, constants, and sessions for parts of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.evaluation.integer.grid import Grid
from onnxqat.nodes import input_role, is_bias_add
from onnxqat.operators import ONNX_DOMAINS, WEIGHTED
from onnxqat.pairs import dequantized_name
from onnxqat.plan.graph import GraphIndex
from onnxqat.plan.patterns import PATTERNS
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import Arithmetic, HardwareRule
from onnxqat.runtime import open_session

__all__ = ["Context", "FusedOp", "Operand", "fused_ops", "is_bias", "make_context"]


@dataclass(frozen=True)
class Operand:
    """One input of a node.

    Attributes
    ----------
    node : str
        Name of the node.
    index : int
        Index of the input.
    tensor : str
        Name of the tensor that it reads.
    grid : Grid or None
        The grid of the tensor's integers; None if the input is not quantized.
    values : array or None
        The float values of a constant; None for other tensors.
    """

    node: str
    index: int
    tensor: str
    grid: Grid | None
    values: NDArray[Any] | None


@dataclass(frozen=True)
class FusedOp:
    """Nodes that the chip runs as one operation.

    Attributes
    ----------
    kind : str
        Op type or pattern at the start.
    nodes : tuple of Node
        All nodes, in order.
    epilogue : tuple of Node
        The nodes after the first op or pattern.
    """

    kind: str
    nodes: tuple[gs.Node, ...]
    epilogue: tuple[gs.Node, ...]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs of the last node, without those that are left out."""
        return [t.name for t in self.nodes[-1].outputs if t.name]


@dataclass(frozen=True, kw_only=True)
class Context:
    """A model, its plan and its rule, with lookups by name.

    Attributes
    ----------
    grids : dict of str to Grid
        The grid of each quantized tensor.
    groups : dict of str to str
        The `QuantPoint.parameters` of each quantized tensor.
    edges : frozenset of (str, int)
        Inputs of nodes that read integers.
    biases : frozenset of (str, int)
        Inputs of nodes that read an int32 bias.
    float_nodes : frozenset of str
        Names of the nodes that the plan keeps in float.
    """

    rule: HardwareRule
    arithmetic: Arithmetic
    graph: gs.Graph
    protos: Mapping[str, onnx.NodeProto]
    opsets: Sequence[onnx.OperatorSetIdProto]
    opset: int
    threads: int
    grids: Mapping[str, Grid]
    groups: Mapping[str, str]
    edges: frozenset[tuple[str, int]]
    biases: frozenset[tuple[str, int]]
    float_nodes: frozenset[str]

    @property
    def keeps_biases(self) -> bool:
        """Whether a bias that training leaves float is still that of a product in integers.

        The chip adds it to floats, or its compiler chooses a scale at which it fits into int32.
        """
        return self.rule.bias == "float" or self.arithmetic.requantize == "qdm"

    def operands(self, group: FusedOp) -> list[Operand]:
        """Return all inputs of a group that it does not compute itself."""
        inner = {t.name for node in group.nodes for t in node.outputs}
        return [
            Operand(
                node.name,
                index,
                tensor.name,
                self.grids[tensor.name] if (node.name, index) in self.edges else None,
                tensor.values if isinstance(tensor, gs.Constant) else None,
            )
            for node in group.nodes
            for index, tensor in enumerate(node.inputs)
            if tensor.name and tensor.name not in inner
        ]

    def session(
        self, group: FusedOp, operands: Iterable[Operand], constants: Mapping[str, NDArray[Any]]
    ) -> ort.InferenceSession:
        """Return a session that runs a group node by node.

        Parameters
        ----------
        constants : mapping of str to array
            Values of constant inputs, by input name; all other inputs must be fed. A quantized
            operand ``t`` has the input name ``t/dequantized``.
        """
        protos = {n.name: onnx.NodeProto() for n in group.nodes}
        for name, proto in protos.items():
            proto.CopyFrom(self.protos[name])
        dtypes = {t.name: t.dtype for n in group.nodes for t in n.inputs}
        fed: dict[str, onnx.ValueInfoProto] = {}
        for operand in operands:
            name = operand.tensor if operand.grid is None else dequantized_name(operand.tensor)
            protos[operand.node].input[operand.index] = name
            if name not in constants:
                kind = onnx.helper.np_dtype_to_tensor_dtype(
                    np.dtype(np.float32 if operand.grid else dtypes[operand.tensor] or np.float32)
                )
                fed[name] = onnx.helper.make_tensor_value_info(name, kind, None)
        graph = onnx.helper.make_graph(
            list(protos.values()),
            "part",
            list(fed.values()),
            [onnx.ValueInfoProto(name=name) for name in group.outputs],
            [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=self.opsets, ir_version=8)
        return open_session(model, optimization="none", threads=self.threads)


def is_bias(group: FusedOp, node: gs.Node, index: int) -> bool:
    """Return whether an input is the constant bias of a convolution or product."""
    if not isinstance(node.inputs[index], gs.Constant):
        return False
    if node is group.nodes[0]:
        return input_role(node, index) == "bias"
    return group.kind in WEIGHTED and is_bias_add(node)


def make_context(
    model: QuantizedModel, rule: HardwareRule, arithmetic: Arithmetic, threads: int
) -> Context:
    """Return the lookups for a Q/DQ model."""
    plan, params, floats = model.plan, model.params, model.floats
    proto = floats.to_proto()
    points = plan.grid_points()
    return Context(
        rule=rule,
        arithmetic=arithmetic,
        graph=floats.graph,
        protos={n.name: n for n in proto.graph.node},
        opsets=list(proto.opset_import),
        opset=next(o.version for o in proto.opset_import if o.domain in ONNX_DOMAINS),
        threads=threads,
        grids={p.tensor: Grid(params[p.parameters], p.spec) for p in points},
        groups={p.tensor: p.parameters for p in points},
        edges=frozenset((e.node, e.index) for p in points for e in p.consumers if e.node),
        biases=frozenset(
            (e.node, e.index) for p in plan.points if p.role == "bias" for e in p.consumers
        ),
        float_nodes=frozenset(skip.node for skip in plan.skips),
    )


def fused_ops(context: Context, chains: Sequence[Sequence[str]]) -> list[FusedOp]:
    """Return all nodes in a valid order of execution; the nodes of a chain form one group."""
    kinds = [kind for kind in PATTERNS if kind not in context.rule.split]
    index = GraphIndex(context.graph, kinds)
    heads = {chain[-1]: chain for chain in chains}
    chained = {name for chain in chains for name in chain}
    groups = []
    for node in context.graph.nodes:
        chain = heads.get(node.name)
        if chain is None and node.name in chained:
            continue
        names = chain or (node.name,)
        nodes = tuple(index.nodes[name] for name in names)
        unit = index.unit_of[names[0]]
        whole = chain is not None and {n.name for n in unit.nodes} <= set(names)
        first = unit.nodes if whole else nodes[:1]
        groups.append(FusedOp(unit.kind if whole else nodes[0].op, nodes, nodes[len(first) :]))
    return groups
