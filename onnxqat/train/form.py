"""Make the training form of a Q/DQ model: parameters become inputs, pairs become `FakeQuantize`.

The forward pass keeps the same values, bit for bit. A pair whose input already lies on the same
grid (behind a MaxPool, a Reshape, a Concat of one group ...) is the identity and is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxqat.calibration import placeholder_params
from onnxqat.computable import computable
from onnxqat.errors import ModelError, TrainingError
from onnxqat.gradients.reaching import Links, leading_to
from onnxqat.model import Model
from onnxqat.nodes import data_inputs, keeps_grid, may_be_float32
from onnxqat.pairs import dequantized_name, float_name, node_name, scale_name, zero_point_name
from onnxqat.plan import QuantPlan, QuantPoint
from onnxqat.qparams import FloatArray, Method, quantized_range
from onnxqat.quantized import QuantizedModel, insert_pairs
from onnxqat.train.adaround import AdaRound
from onnxqat.train.fake_quantize import DOMAIN, FakeQuantize
from onnxqat.train.lowering import (
    CustomOp,
    Refusal,
    ShapeUnknown,
    ceiling,
    fixed_shapes,
    handing_on,
    lower,
    with_steps,
)
from onnxqat.train.trained import trained_initializers

__all__ = ["TrainingForm", "Untrainable", "reaching", "training_form", "untrainable_nodes"]

logger = logging.getLogger(__name__)

MAX_NAMED = 5  # the most nodes that a message names


@dataclass(frozen=True, kw_only=True)
class TrainingForm:
    """A model whose parameters are inputs.

    Attributes
    ----------
    proto : onnx.ModelProto
        The graph. Inputs: the data, then weights and scales by name. Outputs: those of the model.
    weights : dict of str to float32 array
        The trained parameters except scales: weights, biases, normalization parameters. For a
        weight whose rounding is learned, the variables of the rounding.
    scales : dict of str to float32 array
        The scales, by `QuantPoint.parameters`; their inputs are named ``<parameters>/scale``.
    zero_points : dict of str to float32 array
        The trained zero points, named ``<parameters>/zero_point``; the forward pass rounds them.
    learned : frozenset of str
        The inputs that have gradients.
    frozen : frozenset of str
        The learned inputs that no step changes: their gradient is not computed, and is zero.
    observed : dict of str to tuple of str
        The activations whose range moves a clipping range, by `QuantPoint.parameters`; empty for
        weights.
    roundings : dict of str to AdaRound
        The weights whose rounding is learned, by name.
    """

    proto: onnx.ModelProto
    weights: dict[str, FloatArray]
    scales: dict[str, FloatArray]
    zero_points: dict[str, FloatArray]
    learned: frozenset[str]
    observed: dict[str, tuple[str, ...]]
    roundings: dict[str, AdaRound] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @property
    def roles(self) -> dict[str, str]:
        """The parameters that are a ``scale`` or a ``zero_point``, by the input's name."""
        scales = {scale_name(name): "scale" for name in self.scales}
        return scales | {zero_point_name(name): "zero_point" for name in self.zero_points}

    def with_gradient(self, outputs: Collection[str]) -> dict[str, FloatArray]:
        """Return the parameters whose gradient a graph with these outputs has, or that is zero."""
        return {
            name: value
            for name, value in self.parameters.items()
            if f"{name}_grad" in outputs or name in self.frozen
        }

    @property
    def parameters(self) -> dict[str, FloatArray]:
        """All parameters that are inputs of the graph, by the input's name."""
        scales = {scale_name(name): scale for name, scale in self.scales.items()}
        zero_points = {zero_point_name(name): z for name, z in self.zero_points.items()}
        return self.weights | scales | zero_points


def training_form(
    model: QuantizedModel,
    *,
    method: Method = "lsq",
    read: str | None = None,
    asked: Collection[str] = (),
    adaround: bool = False,
) -> TrainingForm:
    """Return the training form of a Q/DQ model.

    Parameters
    ----------
    model : QuantizedModel
        The Q/DQ model. It is not changed.
    method : Method
        The method of points whose spec names none, see `onnxqat.train.fake_quantize`.
    read : str, optional
        A tensor that the loss reads (default: the first output).
    asked : collection of str
        Constants that the user wants to train, see `onnxqat.train.trained`.
    adaround : bool
        Whether weights that only their Q/DQ pair reads learn their rounding instead of values and
        scales, see `onnxqat.train.adaround`.

    Raises
    ------
    TrainingError
        An op between a parameter and an output has no correct gradient.
    """
    work, weights, builder = _build(model, method=method, read=read, asked=asked, adaround=adaround)
    if builder.refused:
        raise TrainingError(_refusal(builder.refused))
    work.metadata = {}
    proto = work.to_proto()
    proto.functions.extend(builder.functions)
    needed = {f.domain for f in builder.functions}
    needed |= {opset.domain for f in builder.functions for opset in f.opset_import}
    for domain in sorted(needed - {"", *(o.domain for o in proto.opset_import)}):
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    made = TrainingForm(
        proto=proto,
        weights=weights | {name: r.start() for name, r in builder.roundings.items()},
        scales={
            name: p.scale for name, p in builder.params.items() if name not in builder.roundings
        },
        zero_points={
            name: builder.params[name].zero_point.astype(np.float32) for name in builder.moving
        },
        learned=frozenset({*weights, *builder.learned}),
        observed={name: tuple(tensors) for name, tensors in builder.observed.items()},
        roundings=builder.roundings,
    )
    for name, value in made.parameters.items():
        if name not in weights:
            proto.graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
            )
    return made


class Untrainable(NamedTuple):
    """A node without a gradient that lies behind a trained parameter."""

    node: str
    op_type: str
    reason: str


def untrainable_nodes(model: Model, plan: QuantPlan) -> list[Untrainable]:
    """Return the nodes that prevent fine-tuning of a model with a plan; empty if there are none.

    Ops that onnxruntime lacks behind the last point are no obstacle: training ends before them.
    Nor are sequences of unknown length: fine-tuning takes the length of the data.

    Parameters
    ----------
    model : Model
        The prepared float model.
    plan : QuantPlan
        The plan of the model.
    """
    quantized = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    with suppress(ModelError):  # if the model cannot run, its nodes are named below
        quantized = computable(quantized).model
        quantized = replace(quantized, floats=with_steps(quantized.floats, {}))
    return _build(quantized)[2].refused


def _refusal(nodes: list[Untrainable]) -> str:
    named = "; ".join(f"'{n.node}' ({n.op_type}: {n.reason})" for n in nodes[:MAX_NAMED])
    rest = len(nodes) - MAX_NAMED
    named += f"; and {rest} more, which 'onnxqat check --train' names" if rest > 0 else ""
    noun = "Node" if len(nodes) == 1 else f"{len(nodes)} nodes:"
    return (
        f"{noun} {named}. No gradient passes, so earlier layers cannot be trained. Keep these "
        "layers float (--set 'name:REGEX.quantize=false') or rewrite the model."
    )


def _build(
    model: QuantizedModel,
    *,
    method: Method = "lsq",
    read: str | None = None,
    asked: Collection[str] = (),
    adaround: bool = False,
) -> tuple[Model, dict[str, FloatArray], _Builder]:
    """Return the Q/DQ model with the graph of its training form, and its weights.

    Float weights before a node without a gradient are not trained: a user can exclude nodes from
    training by not quantizing them.
    """
    plan = model.plan
    names = trained_initializers(model.floats.graph, plan, asked)
    while True:
        work = model.qdq()
        weights = _make_inputs(work.graph, names)
        builder = _Builder(work.graph, model, set(weights), method, read)
        builder.rounded = weights if adaround else {}
        builder.run()
        before = _before(model.floats.graph, builder.refused) - {p.tensor for p in plan.points}
        if before.isdisjoint(names):
            return work, weights, builder
        logger.info(
            "Not trained, because they are float and '%s' behind them has no gradient: %s",
            builder.refused[0].node,
            ", ".join(name for name in names if name in before),
        )
        names = [name for name in names if name not in before]


def _before(graph: gs.Graph, refused: list[Untrainable]) -> set[str]:
    """Return the tensors that the refused nodes depend on."""
    stops = {node.node for node in refused}
    ends = (t.name for node in graph.nodes if node.name in stops for t in node.inputs)
    return leading_to(ends, _links(graph), lambda _: True)


def _make_inputs(graph: gs.Graph, names: list[str]) -> dict[str, FloatArray]:
    """Turn initializers into graph inputs and return their values."""
    tensors = graph.tensors()
    values: dict[str, FloatArray] = {}
    for name in names:
        tensor = tensors[name]
        values[name] = np.array(tensor.values, np.float32, order="C")
        tensor.to_variable(np.float32, values[name].shape)
        tensor.type = "tensor_type"  # graphsurgeon's conversion does not set it
        graph.inputs.append(tensor)
    return values


class _Builder:
    """Replaces Q/DQ pairs in node order, and tracks grids and tensors that need a gradient."""

    def __init__(
        self,
        graph: gs.Graph,
        source: QuantizedModel,
        trained: set[str],
        method: Method,
        read: str | None,
    ) -> None:
        self.graph = graph
        self.source: Model | None = source.floats  # released once its shapes were used
        self.params = source.params
        self.method = method
        points = source.plan.grid_points()
        self.points = {node_name(p.tensor, "QuantizeLinear"): p for p in points}
        self.grid: dict[str, str] = {}  # for each tensor on a grid, the name of its parameters
        self.weights = frozenset(trained)
        self.trained = set(trained)  # tensors that need a gradient
        self.variants: dict[str, FakeQuantize | CustomOp] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.refused: list[Untrainable] = []
        self.inputs: dict[str, gs.Tensor] = {}  # scales and zero_points
        self.moving: list[str] = []  # parameters whose zero_point is trained
        self.learned: list[str] = []  # inputs that have gradients
        self.observed: dict[str, list[str]] = {}
        self.dead: set[int] = set()
        self.ceilings: dict[str, float] = {}  # tensors whose point includes the mask before it
        self.rounded: dict[str, FloatArray] = {}  # weights that can learn their rounding
        self.roundings: dict[str, AdaRound] = {}  # weights that learn their rounding
        self.reaching = reaching(graph, read)

    def run(self) -> None:
        nodes: list[gs.Node] = []
        for node in list(self.graph.nodes):
            if id(node) in self.dead:
                continue
            point = self.points.get(node.name)
            nodes += self._follow(node) if point is None else self._replace(node, point)
        self.graph.nodes.clear()
        self.graph.nodes.extend(nodes)

    def _follow(self, node: gs.Node) -> list[gs.Node]:
        """Update grids and needed gradients for one node; return the nodes that replace it."""
        grids = {self.grid.get(t.name) for t in data_inputs(node)}
        if keeps_grid(node) and len(grids) == 1 and None not in grids:
            self.grid.update(dict.fromkeys((t.name for t in node.outputs), grids.pop()))
        floats = [t.name for t in node.outputs if t.name and may_be_float32(t)]
        learned = [i for i, t in enumerate(node.inputs) if t.name in self.trained]
        if not floats or not learned:
            return [node]
        self.trained.update(floats)
        return self._lower(node, learned)

    def _lower(self, node: gs.Node, learned: list[int]) -> list[gs.Node]:
        complete = all(t.name in self.reaching for t in node.outputs)
        try:
            if self._shares_mask(node):
                nodes, ops = handing_on(node, learned, self.graph.opset)
            else:
                nodes, ops = lower(node, learned, opset=self.graph.opset, all_reach_loss=complete)
        except Refusal as refusal:
            if isinstance(refusal, ShapeUnknown) and self.source is not None:
                self._fix_shapes(self.source)
                return self._lower(node, learned)
            self.refused.append(Untrainable(node.name, node.op, str(refusal)))
            return [node]
        if all(made is not node for made in nodes):
            node.inputs.clear()
            node.outputs.clear()
        for op in ops:
            self._use(op, op.forward, op.gradient)
        return nodes

    def _shares_mask(self, node: gs.Node) -> bool:
        """Return whether the point behind a Relu or Clip includes its gradient."""
        high, out = ceiling(node), node.outputs[0]
        alone = len(out.outputs) == 1 and all(out is not t for t in self.graph.outputs)
        point = self.points.get(out.outputs[0].name) if alone else None
        if high is None or point is None or self.grid.get(out.name) == point.parameters:
            return False
        self.ceilings[out.name] = high
        return self._variant(point, out).ceiling is not None

    def _fix_shapes(self, source: Model) -> None:
        """Fill in missing lengths that do not depend on the batch."""
        self.source = None
        found = fixed_shapes(source)
        for rename in (float_name, dequantized_name):
            found |= {
                rename(point.tensor): found[point.tensor]
                for point in self.points.values()
                if point.tensor in found
            }
        for name, tensor in self.graph.tensors().items():
            missing = tensor.shape is None or not all(isinstance(n, int) for n in tensor.shape[1:])
            if missing and name in found:
                tensor.shape = found[name]

    def _use(self, variant: FakeQuantize | CustomOp, *functions: onnx.FunctionProto) -> None:
        if variant.op_type not in self.variants:
            self.variants[variant.op_type] = variant
            self.functions += functions

    def _replace(self, node: gs.Node, point: QuantPoint) -> list[gs.Node]:
        chain = _pair_nodes(node)
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
        if self._learns_rounding(point, source):
            rounding = AdaRound.of(self.rounded[source.name], self.params[source.name], point.spec)
            self.roundings[source.name] = rounding
            self.trained.add(target.name)
            return rounding.nodes(source, target)
        variant = self._variant(point, source)
        gradient = variant.gradient_function(self.graph.opset)
        functions = [variant.function(self.graph.opset), *([gradient] if gradient else [])]
        self._use(variant, *functions)
        if variant.learns_x or variant.learns_scale:
            self.trained.add(target.name)
        if self._method(point) == "moving-average":
            seen = self.observed.setdefault(point.parameters, [])
            seen += [source.name] if point.role == "activation" and point.observed else []
        scale, zero_point = self._inputs(point, variant)
        formal = {"x": source, "s": scale, "z": zero_point}
        name = f"{point.tensor}/{variant.op_type}"
        inputs = [formal[i] for i in variant.inputs]
        return [gs.Node(variant.op_type, name, {}, inputs, [target], domain=DOMAIN)]

    def _learns_rounding(self, point: QuantPoint, source: gs.Tensor) -> bool:
        """Return whether the weight of a pair that was taken out learns its rounding."""
        read = source.outputs or any(source is tensor for tensor in self.graph.outputs)
        return source.name in self.rounded and point.group is None and not read

    def _method(self, point: QuantPoint) -> Method:
        """Return the method by which the scale of a point is trained.

        A scale that the chip fixes is not trained, nor is that of an untrained constant, whose
        values would change with it.
        """
        alone = point.role == "weight" and point.group is None
        if point.spec.fixed_range or (alone and point.tensor not in self.weights):
            return "ste"
        return point.spec.method or self.method

    def _variant(self, point: QuantPoint, source: gs.Tensor) -> FakeQuantize:
        params = self.params[point.parameters]
        qmin, qmax = quantized_range(point.spec, signed=params.signed)
        method = self._method(point)
        # a gradient could move a zero_point to the center, choose_qparams does not
        moving = ("moving-average",) if point.spec.off_center else ("lsq+", "moving-average")
        moves = method in moving and not point.spec.symmetric
        variant = FakeQuantize(
            dtype=params.zero_point.dtype.name,
            qmin=qmin,
            qmax=qmax,
            axis=point.spec.axis,
            rank=None if source.shape is None else len(source.shape),
            learns_x=source.name in self.trained,
            method=method,
            moves_zero_point=moves,
        )
        return variant.sharing_mask(self.ceilings.get(source.name))

    def _inputs(self, point: QuantPoint, variant: FakeQuantize) -> tuple[gs.Tensor, gs.Tensor]:
        """Return the scale and the zero_point of a point."""
        name, params = point.parameters, self.params[point.parameters]
        scale, zero_point = scale_name(name), zero_point_name(name)
        if scale not in self.inputs:
            shape = params.scale.shape
            self.inputs[scale] = gs.Variable(scale, np.float32, shape)
            self.inputs[zero_point] = (
                gs.Variable(zero_point, np.float32, shape)
                if variant.moves_zero_point
                else gs.Constant(zero_point, params.zero_point)
            )
            self.moving += [name] if variant.moves_zero_point else []
            self.learned += [scale] if variant.learns_scale else []
            self.learned += [zero_point] if variant.learns_zero_point else []
        return self.inputs[scale], self.inputs[zero_point]


def _pair_nodes(node: gs.Node) -> list[gs.Node]:
    """Return the Q [, Clip], DQ nodes that begin at one of our QuantizeLinear nodes."""
    chain = [node]
    while chain[-1].op != "DequantizeLinear":
        chain.append(chain[-1].outputs[0].outputs[0])
    return chain


def reaching(graph: gs.Graph, read: str | None = None) -> set[str]:
    """Return the tensors with a path of float32 values to ``read`` (default: the first output)."""
    end = graph.outputs[0].name if read is None else read
    read_by_nodes = (t for node in graph.nodes for t in node.inputs if t.name)
    floats = {t.name for t in read_by_nodes if may_be_float32(t)}
    return leading_to({end}, _links(graph), floats.__contains__)


def _links(graph: gs.Graph) -> Links:
    return (([t.name for t in n.inputs], [t.name for t in n.outputs]) for n in graph.nodes)
