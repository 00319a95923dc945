"""Replace the Q/DQ pairs of a graph by `FakeQuantize`, for the training form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqat.gradients.reaching import Links, leading_to
from onnxqat.model import Model
from onnxqat.nodes import data_inputs, keeps_grid, may_be_float32
from onnxqat.pairs import dequantized_name, float_name, node_name, scale_name, zero_point_name
from onnxqat.plan import QuantPoint
from onnxqat.qparams import FloatArray, Method, quantized_range
from onnxqat.quantized import QuantizedModel
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
)

__all__ = ["FormBuilder", "Untrainable", "links", "reaching"]


class Untrainable(NamedTuple):
    """A node without a gradient that lies behind a trained parameter."""

    node: str
    op_type: str
    reason: str


class FormBuilder:
    """Replaces Q/DQ pairs in node order, and tracks grids and tensors that need a gradient.

    Parameters
    ----------
    graph : gs.Graph
        The graph of ``source`` with its pairs; `run` changes it.
    source : QuantizedModel
        The Q/DQ model.
    trained : set of str
        The inputs of the graph that are trained weights.
    method : Method
        The method of points whose spec names none.
    read : str or None
        A tensor that the loss reads (None: the first output).
    """

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
        """Replace the pairs; collect nodes without a gradient in ``refused``."""
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
        if point.spec.heads is not None:  # the compiler computes the scale from the weight
            return "moving-average"
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
    return leading_to({end}, links(graph), floats.__contains__)


def links(graph: gs.Graph) -> Links:
    """Yield the names of the inputs and of the outputs of each node."""
    return (([t.name for t in n.inputs], [t.name for t in n.outputs]) for n in graph.nodes)
