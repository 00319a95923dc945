"""Q/DQ pairs: their names, and how they are added to a graph and removed from it.

For a point on ``t``::

    producer -> t -> QuantizeLinear [-> Clip] -> DequantizeLinear -> t/dequantized -> consumers

The Clip is present if the quantized range is narrower than its dtype (2 to 7 bits, narrow range). A
graph output keeps its name behind the pair; the float tensor before the pair is renamed
``t/float``. Weights stay float, before their QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError, PlanError
from onnxqat.model import constant
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.preparation.editing import remove_nodes
from onnxqat.qparams import QuantParams, quantized_range

__all__ = [
    "PAIR_OPS",
    "add_pairs",
    "check_points",
    "dequantized_name",
    "float_name",
    "has_clip",
    "integers_name",
    "node_name",
    "node_names",
    "parameters_of",
    "params_of_pairs",
    "remove_pairs",
    "scale_name",
    "source_name",
    "zero_point_name",
]

PAIR_OPS = ("QuantizeLinear", "Clip", "DequantizeLinear")


def node_name(tensor: str, op: str) -> str:
    """Return the name of a pair's node of type ``op``, one of `PAIR_OPS`."""
    return f"{tensor}/{op}"


def node_names(tensor: str) -> tuple[str, ...]:
    """Return the names of all nodes that the pair of a tensor can have."""
    return tuple(node_name(tensor, op) for op in PAIR_OPS)


def dequantized_name(tensor: str) -> str:
    """Return the name of a pair's output (for graph outputs see `float_name`)."""
    return f"{tensor}/dequantized"


def float_name(tensor: str) -> str:
    """Return the name of the float tensor before the pair of a graph output."""
    return f"{tensor}/float"


def source_name(point: QuantPoint, outputs: Collection[str]) -> str:
    """Return the name of the float tensor before the pair of a point.

    Parameters
    ----------
    point : QuantPoint
        A point with a pair in the graph.
    outputs : collection of str
        Names of the graph's outputs.
    """
    is_output = point.tensor in outputs and any(not edge.node for edge in point.consumers)
    return float_name(point.tensor) if is_output else point.tensor


def has_clip(point: QuantPoint, params: QuantParams) -> bool:
    """Return whether a pair needs a Clip, because its range is narrower than its dtype."""
    limits, stored = quantized_range(point.spec, signed=params.signed), params.zero_point.dtype
    return limits != (np.iinfo(stored).min, np.iinfo(stored).max)


def integers_name(point: QuantPoint, params: QuantParams) -> str:
    """Return the name of the integers that the DequantizeLinear of a point reads."""
    return f"{point.tensor}/{'clipped' if has_clip(point, params) else 'quantized'}"


def scale_name(parameters: str) -> str:
    """Return the name of the scale of a set of parameters."""
    return f"{parameters}/scale"


def zero_point_name(parameters: str) -> str:
    """Return the name of the zero point of a set of parameters."""
    return f"{parameters}/zero_point"


def parameters_of(name: str) -> str:
    """Return the parameters' name to which a scale or zero point of this name belongs."""
    return name.removesuffix("/scale").removesuffix("/zero_point")


def check_points(graph: gs.Graph, plan: QuantPlan, params: Mapping[str, QuantParams]) -> None:
    """Check that the pairs of a plan can be added to a graph.

    Raises
    ------
    PlanError
        Plan, parameters and graph disagree.
    ModelError
        The graph already uses a name that a pair needs.
    """
    lookups = _Lookups(graph)
    for point in plan.grid_points():
        lookups.check(point, params)


class _Lookups:
    """The tensors and nodes of a float graph by name."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.tensors = graph.tensors()
        self.nodes = {n.name: n for n in graph.nodes}  # without subgraphs, which may share names
        self.output_names = {t.name for t in graph.outputs}

    def check(self, point: QuantPoint, params: Mapping[str, QuantParams]) -> None:
        """Raise an error if the pair of a point cannot be added."""
        if point.tensor not in self.tensors:
            raise PlanError(
                f"The model has no tensor '{point.tensor}', which the plan names. Plan again from "
                "this model."
            )
        if point.parameters not in params:
            raise PlanError(f"No parameters for '{point.parameters}'. Calibrate it first.")
        for edge in point.consumers:
            readers = self.graph.outputs if not edge.node else ()
            if edge.node in self.nodes:
                readers = self.nodes[edge.node].inputs
            if edge.index >= len(readers) or readers[edge.index].name != point.tensor:
                of = f"input {edge.index} of '{edge.node}'" if edge.node else f"output {edge.index}"
                raise PlanError(
                    f"In the plan, {of} is '{point.tensor}'; the model has another tensor there. "
                    "Plan again from this model."
                )
        shape, axis = self.tensors[point.tensor].shape, point.spec.axis
        rank = None if shape is None else len(shape)
        if axis is not None and (rank is None or axis >= rank):
            raise PlanError(
                f"'{point.tensor}' has rank {rank}, but axis {axis} in the plan. Plan again from "
                "this model."
            )
        if taken := self._taken_name(point):
            raise ModelError(
                f"Name '{taken}', which a Q/DQ pair of '{point.tensor}' needs, is taken. "
                "Rename it in the model."
            )

    def _taken_name(self, point: QuantPoint) -> str | None:
        """Return the first name that the pair of a point needs and the model already uses."""
        tensor, parameters = point.tensor, point.parameters
        needed = [f"{tensor}/quantized", f"{tensor}/clipped", dequantized_name(tensor)]
        needed += [float_name(tensor)] if tensor in self.output_names else []
        needed += [scale_name(parameters), zero_point_name(parameters)]
        found = [name for name in needed if name in self.tensors]
        return next(iter((*found, *(n for n in node_names(tensor) if n in self.nodes))), None)


def add_pairs(graph: gs.Graph, plan: QuantPlan, params: Mapping[str, QuantParams]) -> None:
    """Add the pairs of a plan to a float graph that has passed `check_points`.

    The nodes are added in one pass, in linear time.
    """
    _Adder(graph, params).run(plan)


@dataclass
class _Pair:
    """The names and operands that the nodes of one pair share."""

    tensor: str
    operands: list[gs.Constant]
    attributes: dict[str, int]

    def node(self, op: str, source: gs.Tensor, target: gs.Tensor) -> gs.Node:
        """Return the QuantizeLinear or the DequantizeLinear."""
        inputs = [source, *self.operands]
        return gs.Node(op, node_name(self.tensor, op), dict(self.attributes), inputs, [target])


class _Adder:
    """Builds the node list with Q/DQ pairs."""

    def __init__(self, graph: gs.Graph, params: Mapping[str, QuantParams]) -> None:
        self.graph = graph
        self.params = params
        self.found = _Lookups(graph)
        self.constants: dict[str, gs.Constant] = {}

    def run(self, plan: QuantPlan) -> None:
        pending = {p.tensor: p for p in plan.grid_points()}
        nodes: list[gs.Node] = []
        for node in list(self.graph.nodes):
            # the pairs of weights and graph inputs stand before the first reader
            for tensor in list(node.inputs):
                if tensor.name in pending:
                    nodes += self._pair(pending.pop(tensor.name))
            nodes.append(node)
            for tensor in list(node.outputs):
                if tensor.name in pending:
                    nodes += self._pair(pending.pop(tensor.name))
        self.graph.nodes.clear()
        self.graph.nodes.extend(nodes)

    def _pair(self, point: QuantPoint) -> list[gs.Node]:
        source, params = self.found.tensors[point.tensor], self.params[point.parameters]
        name, shape, dtype = point.tensor, source.shape, params.zero_point.dtype
        target = gs.Variable(dequantized_name(name), np.float32, shape)
        if source_name(point, self.found.output_names) != name:
            source.name, target.name = float_name(name), name
        attributes = {} if point.spec.axis is None else {"axis": point.spec.axis}
        pair = _Pair(name, self._operands(point, params), attributes)
        integers = gs.Variable(f"{name}/quantized", dtype, shape)
        nodes = [pair.node("QuantizeLinear", source, integers)]
        if has_clip(point, params):
            clipped = gs.Variable(integers_name(point, params), dtype, shape)
            limits = quantized_range(point.spec, signed=params.signed)
            ends = [self._limit(end, dtype) for end in limits]
            clip = gs.Node("Clip", node_name(name, "Clip"), {}, [integers, *ends], [clipped])
            nodes.append(clip)
            integers = clipped
        nodes.append(pair.node("DequantizeLinear", integers, target))
        self._rewire(point, target)
        return nodes

    def _operands(self, point: QuantPoint, params: QuantParams) -> list[gs.Constant]:
        scale, zero_point = scale_name(point.parameters), zero_point_name(point.parameters)
        return [
            self._constant(scale, params.scale),
            self._constant(zero_point, params.zero_point),
        ]

    def _limit(self, value: int, dtype: np.dtype[Any]) -> gs.Constant:
        return self._constant(f"onnxqat/{dtype.name}/{value}", np.array(value, dtype))

    def _constant(self, name: str, values: NDArray[Any]) -> gs.Constant:
        """Return the constant of this name, which pairs share."""
        if name not in self.constants:
            self.constants[name] = constant(name, values)
        return self.constants[name]

    def _rewire(self, point: QuantPoint, target: gs.Variable) -> None:
        for edge in point.consumers:
            if edge.node:
                self.found.nodes[edge.node].inputs[edge.index] = target
            else:
                self.graph.outputs[edge.index] = target


def remove_pairs(graph: gs.Graph, plan: QuantPlan) -> None:
    """Remove the pairs of a plan from a graph: the exact inverse of `add_pairs`.

    Raises
    ------
    PlanError
        A pair is missing.
    """
    nodes = {n.name: n for n in graph.nodes}
    removed: list[gs.Node] = []
    for point in plan.grid_points():
        pair = _pair_nodes(point, nodes)
        source, target = pair[0].inputs[0], pair[-1].outputs[0]
        for edge in point.consumers:
            if edge.node:
                nodes[edge.node].inputs[edge.index] = source
            else:
                graph.outputs[edge.index] = source
        removed += pair
        if target.name == point.tensor:
            target.name, source.name = dequantized_name(point.tensor), point.tensor
    remove_nodes(graph, removed)


def params_of_pairs(graph: gs.Graph, plan: QuantPlan) -> dict[str, QuantParams]:
    """Return the parameters of the pairs in a graph, by `QuantPoint.parameters`.

    Raises
    ------
    PlanError
        A pair is missing.
    """
    nodes = {n.name: n for n in graph.nodes}
    found: dict[str, QuantParams] = {}
    for point in _points_by_parameters(plan):
        scale, zero_point = _pair_nodes(point, nodes)[0].inputs[1:3]
        values: NDArray[Any] = zero_point.values
        found[point.parameters] = QuantParams(scale=scale.values, zero_point=values)
    return found


def _pair_nodes(point: QuantPoint, nodes: Mapping[str, gs.Node]) -> list[gs.Node]:
    """Return the Q [, Clip], DQ nodes of a point."""
    found = [nodes[name] for name in node_names(point.tensor) if name in nodes]
    if len(found) < 2 or found[0].op != "QuantizeLinear" or found[-1].op != "DequantizeLinear":
        raise PlanError(
            f"The Q/DQ pair of '{point.tensor}' is missing. Another tool changed the file. Run "
            "'onnxqat insert' again."
        )
    return found


def _points_by_parameters(plan: QuantPlan) -> Iterator[QuantPoint]:
    """Yield one point for each set of parameters."""
    seen: set[str] = set()
    for point in plan.grid_points():
        if point.parameters not in seen:
            seen.add(point.parameters)
            yield point
