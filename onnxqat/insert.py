"""Write a plan into a graph as Q/DQ nodes, and take them out again.

The only code that makes or removes QuantizeLinear and DequantizeLinear. For a point on ``t``::

    producer -> t -> QuantizeLinear [-> Clip] -> DequantizeLinear -> t/dequantized -> consumers

The Clip stands where the quantized range is narrower than its dtype (2 to 7 bits, narrow
range). A graph output keeps its name on the dequantized side; the float tensor before it is
renamed ``t/float`` meanwhile. Weights stay float, before their QuantizeLinear.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError, PlanError
from onnxqat.model import Model, constant
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.prepare.editing import remove_nodes
from onnxqat.qparams import QuantParams, quantized_range

__all__ = [
    "OPSET_OF_16_BITS",
    "State",
    "check_calibrated",
    "forget_plan",
    "insert",
    "needs_16_bits",
    "plan_of",
    "read_params",
    "state_of",
    "strip",
    "weights_hash",
    "with_params",
]

OPSET_OF_16_BITS = 21  # https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
State = Literal["uncalibrated", "calibrated", "finetuned"]
PLAN_KEY, STATE_KEY, SOURCE_KEY = "onnxqat.plan", "onnxqat.state", "onnxqat.source"


def needs_16_bits(plan: QuantPlan) -> bool:
    """Return whether a plan has points that QuantizeLinear writes as 16 bits."""
    return any(point.spec.bits > 8 for point in plan.grid_points())


def plan_of(model: Model) -> QuantPlan:
    """Return the plan stored in a Q/DQ model.

    Raises
    ------
    ModelError
        The model holds none.
    """
    if PLAN_KEY not in model.metadata:
        raise ModelError(
            f"{model.name}: holds no quantization plan. Run 'onnxqat insert' on it first."
        )
    return QuantPlan.from_json(model.metadata[PLAN_KEY])


def state_of(model: Model) -> State:
    """Return how far a Q/DQ model has come."""
    state = model.metadata.get(STATE_KEY)
    if state not in ("uncalibrated", "calibrated", "finetuned"):
        raise ModelError(f"{model.name}: state is {state!r}. Run 'onnxqat insert' again.")
    return state  # type: ignore[return-value]


def check_calibrated(model: Model) -> None:
    """Refuse a Q/DQ model whose scales are placeholders, for all that reads them.

    Raises
    ------
    PlanError
        It is not calibrated.
    """
    if state_of(model) == "uncalibrated":
        raise PlanError(f"{model.name}: is not calibrated. Calibrate or fine-tune it first.")


def weights_hash(graph: gs.Graph) -> str:
    """Return the SHA-256 of all float32 initializers of a float graph, in order of name."""
    digest = hashlib.sha256()
    tensors = graph.tensors()
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32:
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(tensor.values).data)
    return digest.hexdigest()


def insert(
    model: Model, plan: QuantPlan, params: Mapping[str, QuantParams], *, state: State
) -> Model:
    """Return a copy of a prepared float model with the Q/DQ pairs of ``plan``.

    Parameters
    ----------
    model : Model
        The prepared float model the plan was made for.
    plan : QuantPlan
        What to quantize.
    params : mapping of str to QuantParams
        By `QuantPoint.parameters`; one entry for each weight and activation.
    state : {"uncalibrated", "calibrated", "finetuned"}
        Stored with the plan in the metadata.

    Raises
    ------
    PlanError
        Plan, parameters and model disagree.
    """
    if PLAN_KEY in model.metadata:
        raise ModelError(f"{model.name}: already holds a quantization plan. Strip it first.")
    if needs_16_bits(plan) and model.graph.opset < OPSET_OF_16_BITS:
        raise PlanError(
            f"{model.name}: the plan has 16-bit points, which QuantizeLinear of opset "
            f"{model.graph.opset} cannot write. Prepare with opset={OPSET_OF_16_BITS}, plan again."
        )
    result = model.copy()
    _Inserter(result.graph, plan, params).run()
    result.metadata |= {
        PLAN_KEY: plan.to_json(),
        STATE_KEY: state,
        SOURCE_KEY: weights_hash(model.graph),
    }
    return result


class _Inserter:
    """Build the node list with Q/DQ pairs in one pass, linear in the number of nodes."""

    def __init__(self, graph: gs.Graph, plan: QuantPlan, params: Mapping[str, QuantParams]) -> None:
        self.graph = graph
        self.plan = plan
        self.params = params
        self.tensors = graph.tensors()
        self.nodes = {n.name: n for n in graph.nodes}  # a reader in a subgraph may be called alike
        self.constants: dict[str, gs.Constant] = {}
        self.output_names = {t.name for t in graph.outputs}

    def run(self) -> None:
        points = {p.tensor: p for p in self.plan.grid_points()}
        self._check(points)
        pending = dict(points)
        nodes: list[gs.Node] = []
        for node in list(self.graph.nodes):
            for tensor in list(node.inputs):  # weights and graph inputs: before the first reader
                if tensor.name in pending:
                    nodes += self._pair(pending.pop(tensor.name))
            nodes.append(node)
            for tensor in list(node.outputs):
                if tensor.name in pending:
                    nodes += self._pair(pending.pop(tensor.name))
        self.graph.nodes.clear()
        self.graph.nodes.extend(nodes)

    def _check(self, points: Mapping[str, QuantPoint]) -> None:
        for point in points.values():
            if point.tensor not in self.tensors:
                raise PlanError(f"Plan expects tensor '{point.tensor}'; the model has none.")
            if point.parameters not in self.params:
                raise PlanError(f"No parameters for '{point.parameters}'. Calibrate it first.")
            for edge in point.consumers:
                readers = self.graph.outputs if not edge.node else ()
                if edge.node in self.nodes:
                    readers = self.nodes[edge.node].inputs
                if edge.index >= len(readers) or readers[edge.index].name != point.tensor:
                    raise PlanError(
                        f"Plan expects '{point.tensor}' at ('{edge.node}', {edge.index}); the "
                        "model has another tensor there. Plan again from this model."
                    )
            if taken := self._taken_name(point):
                raise ModelError(
                    f"Name '{taken}', which a Q/DQ pair of '{point.tensor}' needs, is taken. "
                    "Rename it in the model."
                )

    def _taken_name(self, point: QuantPoint) -> str | None:
        """Return the first name that the pair of a point needs and the model has."""
        tensor, parameters = point.tensor, point.parameters
        suffixes = ["quantized", "clipped", "dequantized"]
        suffixes += ["float"] if tensor in self.output_names else []
        needed = [f"{tensor}/{suffix}" for suffix in suffixes]
        needed += [f"{parameters}/scale", f"{parameters}/zero_point"]
        nodes = (f"{tensor}/{op}" for op in ("QuantizeLinear", "Clip", "DequantizeLinear"))
        found = [name for name in needed if name in self.tensors]
        return next(iter((*found, *(name for name in nodes if name in self.nodes))), None)

    def _pair(self, point: QuantPoint) -> list[gs.Node]:
        source = self.tensors[point.tensor]
        params = self.params[point.parameters]
        is_output = point.tensor in self.output_names
        name, rank = point.tensor, len(source.shape) if source.shape is not None else None
        shape = source.shape
        target = gs.Variable(f"{name}/dequantized", np.float32, shape)
        if is_output and any(not e.node for e in point.consumers):
            source.name, target.name = f"{name}/float", name
        scale, zero_point = self._parameters(point, params)
        attributes = {} if point.spec.axis is None else {"axis": point.spec.axis}
        if point.spec.axis is not None and (rank is None or point.spec.axis >= rank):
            raise PlanError(f"'{name}' has rank {rank}; the plan says axis {point.spec.axis}.")
        integers = gs.Variable(f"{name}/quantized", params.zero_point.dtype, shape)
        nodes = [
            gs.Node(
                "QuantizeLinear",
                f"{name}/QuantizeLinear",
                dict(attributes),
                [source, scale, zero_point],
                [integers],
            )
        ]
        limits = quantized_range(point.spec, signed=params.signed)
        info = np.iinfo(params.zero_point.dtype)
        if limits != (info.min, info.max):
            clipped = gs.Variable(f"{name}/clipped", params.zero_point.dtype, shape)
            ends = [self._limit(end, params.zero_point.dtype) for end in limits]
            nodes.append(gs.Node("Clip", f"{name}/Clip", {}, [integers, *ends], [clipped]))
            integers = clipped
        nodes.append(
            gs.Node(
                "DequantizeLinear",
                f"{name}/DequantizeLinear",
                dict(attributes),
                [integers, scale, zero_point],
                [target],
            )
        )
        self._rewire(point, target)
        return nodes

    def _parameters(self, point: QuantPoint, params: QuantParams) -> list[gs.Constant]:
        made = []
        for suffix, values in (("scale", params.scale), ("zero_point", params.zero_point)):
            name = f"{point.parameters}/{suffix}"
            if name not in self.constants:
                self.constants[name] = constant(name, values)
            made.append(self.constants[name])
        return made

    def _limit(self, value: int, dtype: np.dtype[Any]) -> gs.Constant:
        name = f"onnxqat/{dtype.name}/{value}"
        if name not in self.constants:
            self.constants[name] = constant(name, np.array(value, dtype))
        return self.constants[name]

    def _rewire(self, point: QuantPoint, target: gs.Variable) -> None:
        for edge in point.consumers:
            if edge.node:
                self.nodes[edge.node].inputs[edge.index] = target
            else:
                self.graph.outputs[edge.index] = target


def _pair_nodes(point: QuantPoint, nodes: Mapping[str, gs.Node]) -> list[gs.Node]:
    """Return the Q [, Clip], DQ nodes of a point."""
    names = (f"{point.tensor}/{op}" for op in ("QuantizeLinear", "Clip", "DequantizeLinear"))
    found = [nodes[name] for name in names if name in nodes]
    if len(found) < 2 or found[0].op != "QuantizeLinear" or found[-1].op != "DequantizeLinear":
        raise PlanError(
            f"The Q/DQ pair of '{point.tensor}' is missing. The file was changed by another tool; "
            "insert again."
        )
    return found


def strip(model: Model) -> Model:
    """Return the float model: the exact inverse of `insert`.

    Raises
    ------
    ModelError, PlanError
        No plan is stored, or its Q/DQ pairs are not there.
    """
    plan = plan_of(model)
    result = model.copy()
    graph = result.graph
    nodes = {n.name: n for n in graph.nodes}
    removed: set[str] = set()
    for point in plan.grid_points():
        pair = _pair_nodes(point, nodes)
        source, target = pair[0].inputs[0], pair[-1].outputs[0]
        for edge in point.consumers:
            if edge.node:
                nodes[edge.node].inputs[edge.index] = source
            else:
                graph.outputs[edge.index] = source
        removed.update(node.name for node in pair)
        if target.name == point.tensor:
            target.name, source.name = f"{point.tensor}/dequantized", point.tensor
    forget_plan(result, removed)
    return result


def forget_plan(model: Model, removed: Set[str]) -> None:
    """Take nodes, by name, and everything we stored in the metadata out of ``model``."""
    remove_nodes(model.graph, [n for n in model.graph.nodes if n.name in removed])
    for key in [k for k in model.metadata if k.startswith("onnxqat.")]:
        del model.metadata[key]


def _points_by_parameters(plan: QuantPlan) -> Iterator[QuantPoint]:
    """Yield one point for each set of parameters."""
    seen: set[str] = set()
    for point in plan.grid_points():
        if point.parameters not in seen:
            seen.add(point.parameters)
            yield point


def read_params(model: Model) -> dict[str, QuantParams]:
    """Return the parameters in a Q/DQ model, by `QuantPoint.parameters`."""
    nodes = {n.name: n for n in model.graph.nodes}
    found: dict[str, QuantParams] = {}
    for point in _points_by_parameters(plan_of(model)):
        scale, zero_point = _pair_nodes(point, nodes)[0].inputs[1:3]
        values: NDArray[Any] = zero_point.values
        found[point.parameters] = QuantParams(scale=scale.values, zero_point=values)
    return found


def with_params(
    model: Model,
    params: Mapping[str, QuantParams],
    *,
    state: State,
    plan: QuantPlan | None = None,
) -> Model:
    """Return a copy of a Q/DQ model with other parameters, state and, if given, plan."""
    metadata = model.metadata
    result = insert(strip(model), plan or plan_of(model), params, state=state)
    ours = {k: v for k, v in metadata.items() if k.startswith("onnxqat.")}
    result.metadata |= ours | {k: result.metadata[k] for k in (PLAN_KEY, STATE_KEY)}
    return result
