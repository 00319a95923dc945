"""Q/DQ model -> training form: parameters become inputs, Q/DQ pairs become `FakeQuantize`.

The forward pass stays what it was, bit for bit. A pair whose input already lies on the same
grid (behind a MaxPool, a Reshape, a Concat of one group ...) is the identity and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxqat.errors import TrainingError
from onnxqat.insert import plan_of, read_params
from onnxqat.model import Model, to_proto
from onnxqat.plan import WEIGHTED_OPS, QuantPlan, QuantPoint
from onnxqat.qparams import FloatArray, QuantParams, quantized_range
from onnxqat.train.gradients import DOMAIN, FakeQuantize, LeakyRelu

__all__ = ["TrainingForm", "training_form"]

# Ops that only move or pick values: what goes in on a grid comes out on it.
GRID_PRESERVING = (
    *("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"),
    *("Tile", "Gather", "Expand", "DepthToSpace", "SpaceToDepth", "Identity", "Relu", "Concat"),
)
# Ops whose gradient in onnxruntime 1.19.2 was found right against finite differences.
DIFFERENTIABLE = frozenset(
    (
        *("Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div", "Erf", "Exp"),
        *("Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm"),
        *("GlobalAveragePool", "Identity", "LayerNormalization", "LeakyRelu", "Log"),
        *("LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Pow"),
        *("Reciprocal", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice"),
        *("Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Trilu"),
        *("Unsqueeze", "Where"),
    )
)
OPSET_OF_REDUCTION_AXES = 13


@dataclass(frozen=True, kw_only=True)
class TrainingForm:
    """A model whose parameters are inputs.

    Attributes
    ----------
    proto : onnx.ModelProto
        Inputs: the data, then weights and scales by name. Outputs: those of the model.
    weights : dict of str to float32 array
        What is trained besides scales: weights, biases, normalisation parameters.
    scales : dict of str to float32 array
        By `QuantPoint.parameters`; its input is named ``<parameters>/scale``.
    learns_scales : bool
        Whether the scales have gradients.
    """

    proto: onnx.ModelProto
    weights: dict[str, FloatArray]
    scales: dict[str, FloatArray]
    learns_scales: bool

    @property
    def parameters(self) -> dict[str, FloatArray]:
        """Every parameter that is an input of the graph, by the input's name."""
        return self.weights | {f"{name}/scale": scale for name, scale in self.scales.items()}


def training_form(model: Model, *, learn_scales: bool) -> TrainingForm:
    """Return the training form of a Q/DQ model.

    Parameters
    ----------
    model : Model
        As `insert` made it. It is not changed.
    learn_scales : bool
        LSQ when true; scales are constants of the training otherwise (straight-through only).

    Raises
    ------
    TrainingError
        An op on the way from a parameter to an output has no right gradient.
    """
    plan, params = plan_of(model), read_params(model)
    work = model.copy()
    graph = work.graph
    weights = _make_inputs(graph, _trainable(graph, plan))
    builder = _Builder(graph, plan, params, set(weights), learn_scales)
    variants = builder.run()
    work.metadata.clear()
    proto = to_proto(work)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    proto.functions.extend(v.function(graph.opset) for v in variants)
    for variant in variants:
        variant.register()
    scales = {name: p.scale for name, p in params.items()}
    for name, scale in scales.items():
        proto.graph.input.append(
            helper.make_tensor_value_info(f"{name}/scale", TensorProto.FLOAT, scale.shape)
        )
    return TrainingForm(proto=proto, weights=weights, scales=scales, learns_scales=learn_scales)


def _trainable(graph: gs.Graph, plan: QuantPlan) -> list[str]:
    """Return the float initializers that are trained: of points and of weighted nodes."""
    names = [p.tensor for p in plan.points if p.role != "activation"]
    for node in graph.nodes:
        if node.op in (*WEIGHTED_OPS, "LayerNormalization"):
            names += [
                t.name for t in node.inputs if isinstance(t, gs.Constant) and t.dtype == np.float32
            ]
    return list(dict.fromkeys(names))


def _make_inputs(graph: gs.Graph, names: list[str]) -> dict[str, FloatArray]:
    """Turn initializers into graph inputs and return their values."""
    tensors = graph.tensors()
    values: dict[str, FloatArray] = {}
    for name in names:
        tensor = tensors[name]
        values[name] = np.array(tensor.values, np.float32, order="C")
        tensor.to_variable(np.float32, values[name].shape)
        tensor.type = "tensor_type"  # graphsurgeon's conversion leaves it out
        graph.inputs.append(tensor)
    return values


class _Builder:
    """Replace Q/DQ pairs in node order, keeping track of grids and of what needs a gradient."""

    def __init__(
        self,
        graph: gs.Graph,
        plan: QuantPlan,
        params: dict[str, QuantParams],
        trained: set[str],
        learn_scales: bool,
    ) -> None:
        self.graph = graph
        self.params = params
        self.learn_scales = learn_scales
        self.points = {f"{p.tensor}/QuantizeLinear": p for p in plan.grid_points()}
        self.grid: dict[str, str] = {}  # tensor on a grid -> the name of its parameters
        self.trained = set(trained)  # tensors that need a gradient
        self.variants: dict[str, FakeQuantize | LeakyRelu] = {}
        self.scale_inputs: dict[str, gs.Variable] = {}
        self.dead: set[int] = set()

    def run(self) -> list[FakeQuantize | LeakyRelu]:
        nodes: list[gs.Node] = []
        for node in list(self.graph.nodes):
            if id(node) in self.dead:
                continue
            point = self.points.get(node.name)
            if point is not None:
                nodes += self._replace(node, point)
                continue
            self._follow(node)
            self._lower(node)
            nodes.append(node)
        self.graph.nodes.clear()
        self.graph.nodes.extend(nodes)
        return list(self.variants.values())

    def _follow(self, node: gs.Node) -> None:
        """Carry grids and the need of a gradient over one node."""
        floats = [t.name for t in node.outputs if t.dtype in (None, np.float32)]
        if floats and any(t.name in self.trained for t in node.inputs):
            if node.op not in DIFFERENTIABLE:
                raise TrainingError(
                    f"Node '{node.name}': {node.op} has no gradient here, and parameters before "
                    "it are trained. Exclude the nodes before it (--set 'name:...quantize=false') "
                    "or rewrite the node."
                )
            self.trained.update(floats)
        if node.op == "LayerNormalization":
            _declare_statistics(node)
        sources = node.inputs if node.op == "Concat" else node.inputs[:1]
        grids = {self.grid.get(t.name) for t in sources}
        if node.op in GRID_PRESERVING and len(grids) == 1 and None not in grids:
            self.grid.update(dict.fromkeys((t.name for t in node.outputs), grids.pop()))

    def _lower(self, node: gs.Node) -> None:
        """Put an op of ours in the place of one whose kernels are slow."""
        if node.op == "LeakyRelu" and (alpha := node.attrs.get("alpha", 0.01)) < 1:
            variant = LeakyRelu(alpha=alpha)
            self.variants[variant.op_type] = variant
            node.op, node.domain, node.attrs = variant.op_type, DOMAIN, {}

    def _replace(self, node: gs.Node, point: QuantPoint) -> list[gs.Node]:
        chain = _chain(node)
        self.dead.update(id(n) for n in chain)
        source, target = node.inputs[0], chain[-1].outputs[0]
        for removed in chain:
            removed.inputs.clear()
            removed.outputs.clear()
        on_grid = self.grid.get(source.name) == point.parameters
        if on_grid and all(edge.node for edge in point.consumers):
            for reader in list(target.outputs):
                for i, tensor in enumerate(reader.inputs):
                    if tensor is target:
                        reader.inputs[i] = source
            return []
        self.grid[target.name] = point.parameters
        variant = self._variant(point, source)
        if variant.learns_x or variant.learns_scale:
            self.trained.add(target.name)
        scale, zero_point = self._inputs(point)
        formal = {"x": source, "s": scale, "z": zero_point}
        name = f"{point.tensor}/{variant.op_type}"
        inputs = [formal[i] for i in variant.inputs]
        return [gs.Node(variant.op_type, name, {}, inputs, [target], domain=DOMAIN)]

    def _variant(self, point: QuantPoint, source: gs.Tensor) -> FakeQuantize:
        params = self.params[point.parameters]
        qmin, qmax = quantized_range(point.spec, signed=params.signed)
        variant = FakeQuantize(
            dtype=params.zero_point.dtype.name,
            qmin=qmin,
            qmax=qmax,
            axis=point.spec.axis,
            rank=None if point.spec.axis is None else len(source.shape),
            learns_x=source.name in self.trained,
            learns_scale=self.learn_scales,
        )
        self.variants[variant.op_type] = variant
        return variant

    def _inputs(self, point: QuantPoint) -> tuple[gs.Variable, gs.Constant]:
        name, params = point.parameters, self.params[point.parameters]
        if name not in self.scale_inputs:
            shape = params.scale.shape
            self.scale_inputs[name] = gs.Variable(f"{name}/scale", np.float32, shape)
        return self.scale_inputs[name], gs.Constant(f"{name}/zero_point", params.zero_point)


def _chain(node: gs.Node) -> list[gs.Node]:
    """Return the Q [, Clip], DQ nodes that begin at a QuantizeLinear of ours."""
    chain = [node]
    while chain[-1].op != "DequantizeLinear":
        chain.append(chain[-1].outputs[0].outputs[0])
    return chain


def _declare_statistics(node: gs.Node) -> None:
    """Give a LayerNormalization its optional outputs, which its gradient reads."""
    for suffix in ("mean", "inverse_std")[len(node.outputs) - 1 :]:
        node.outputs.append(gs.Variable(f"{node.name}/{suffix}", np.float32))
