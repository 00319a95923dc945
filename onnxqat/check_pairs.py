"""Compare the Q/DQ pairs of a file, which another tool may have edited, with the stored plan.

The pairs must be those that `onnxqat.pairs` adds for this plan. A file is checked once, when it is
read. Scales, zero points and weights are then taken from the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.model import Model
from onnxqat.nodes import biased_node, is_op
from onnxqat.pairs import PAIR_OPS, float_name, node_name
from onnxqat.plan import Edge, QuantPlan, QuantPoint
from onnxqat.preparation.editing import constant_values, names_in_subgraphs
from onnxqat.qparams import WIDTHS, QuantParams, quantized_range, storage_dtype

__all__ = ["check_pairs"]


def check_pairs(model: Model, plan: QuantPlan) -> None:
    """Check that the Q/DQ pairs in a model are those of a plan.

    Raises
    ------
    ModelError
        The pairs differ from the plan; the message names the tensor.
    """
    _Checker(model, plan).run()


class _Checker:
    """Compares pairs with points; tensors and nodes are looked up by name, in linear time."""

    def __init__(self, model: Model, plan: QuantPlan) -> None:
        self.name, self.graph, self.plan = model.name, model.graph, plan
        self.tensors = model.graph.tensors()
        self.nodes: dict[str, gs.Node] = {}
        for node in model.graph.nodes:
            if self.nodes.setdefault(node.name, node) is not node:
                raise ModelError(
                    f"{self.name}: two nodes have the name '{node.name}', so the stored plan is "
                    "ambiguous. Run 'onnxqat insert' again."
                )
        self.inner = names_in_subgraphs(model.graph.nodes)
        self.outputs = {t.name for t in model.graph.outputs}
        self.params: dict[str, QuantParams] = {}
        self.points: dict[str, QuantPoint] = {}

    def run(self) -> None:
        for point in self.plan.grid_points():
            if self.points.setdefault(point.tensor, point) is not point:
                self.wrong(point.tensor, "appears twice in the stored plan")
            self._check_point(point)
        for bias in self.plan.points:
            if bias.role == "bias":
                self._check_bias(bias)
        for name in (name for chain in self.plan.chains for name in chain):
            if name not in self.nodes:
                raise ModelError(
                    f"{self.name}: node '{name}' of the stored plan is missing. Run 'onnxqat "
                    "insert' again."
                )

    def wrong(self, tensor: str, what: str) -> NoReturn:
        raise ModelError(
            f"{self.name}: tensor '{tensor}' {what}. Another tool changed the file. Run 'onnxqat "
            "insert' again on the float model."
        )

    def _check_point(self, point: QuantPoint) -> None:
        tensor, spec = point.tensor, point.spec
        if spec.bits not in WIDTHS:
            self.wrong(tensor, f"has {spec.bits} bits in the stored plan")
        pair = self._pair(point)
        source = pair[0].inputs[0]
        if source.name not in (tensor, float_name(tensor)):
            self.wrong(tensor, f"is not read by its QuantizeLinear, which reads '{source.name}'")
        shape = source.shape
        if point.role == "weight" and not _is_float_constant(source):
            self.wrong(tensor, "is a weight, but not a float32 constant")
        if spec.axis is not None and (shape is None or not 0 <= spec.axis < len(shape)):
            self.wrong(tensor, f"has no axis {spec.axis}, which the stored plan names")
        params = self._params(point, pair, None if spec.axis is None else shape[spec.axis])
        if not self.params.setdefault(point.parameters, params).same_as(params):
            self.wrong(tensor, f"must share its parameters with '{point.parameters}', but differs")
        self._check_readers(point, pair[-1].outputs[0])

    def _pair(self, point: QuantPoint) -> list[gs.Node]:
        """Return the nodes of a point's pair, after checking that nothing else reads inside it."""
        tensor = point.tensor
        has_clip = node_name(tensor, "Clip") in self.nodes
        ops = [op for op in PAIR_OPS if has_clip or op != "Clip"]
        pair = [self.nodes.get(node_name(tensor, op)) for op in ops]
        for node, op in zip(pair, ops, strict=True):
            if node is None or not is_op(node, op):
                self.wrong(tensor, f"has no {op} named '{node_name(tensor, op)}'")
            if len(node.inputs) != 3 or len(node.outputs) != 1 or not node.inputs[0].name:
                self.wrong(tensor, f"has a {op} without its three inputs and one output")
        nodes = [node for node in pair if node is not None]
        for node, reader in pairwise(nodes):
            integers = node.outputs[0]
            known = {integers.name} & (self.inner | self.outputs)
            if known or [id(n) for n in integers.outputs] != [id(reader)]:
                self.wrong(tensor, f"has integers that nodes other than its {reader.op} read")
            if reader.inputs[0] is not integers:
                self.wrong(tensor, f"has a {reader.op} that does not read its {node.op}")
        return nodes

    def _params(
        self, point: QuantPoint, pair: list[gs.Node], channels: int | str | None
    ) -> QuantParams:
        """Return scale and zero_point of a pair, after checking that they fit the plan."""
        tensor, spec = point.tensor, point.spec
        ends = (pair[0], pair[-1])
        scale, zero_point = (self._same(tensor, (n.inputs[i] for n in ends)) for i in (1, 2))
        wanted = () if channels is None else (channels,)
        if scale.dtype != np.float32 or scale.shape != wanted or zero_point.shape != wanted:
            self.wrong(
                tensor,
                f"has a scale of {scale.dtype} {scale.shape} and a zero_point of shape "
                f"{zero_point.shape}; both must have the shape {wanted}, and the scale float32",
            )
        if not np.all((scale > 0) & np.isfinite(scale)):
            self.wrong(tensor, "has a scale that is not a positive number")
        params = QuantParams(scale=scale, zero_point=zero_point)
        signedness = "signed" if params.signed else "unsigned"
        if spec.signedness not in (signedness, "from_range") or (
            zero_point.dtype != storage_dtype(spec, signed=params.signed)
        ):
            self.wrong(
                tensor,
                f"has integers of type {zero_point.dtype}; the stored plan says {spec.bits} bits, "
                f"{spec.signedness}",
            )
        limits = quantized_range(spec, signed=params.signed)
        if spec.symmetric and zero_point.any():
            self.wrong(tensor, "has a zero_point other than 0, but is symmetric in the stored plan")
        if zero_point.min(initial=0) < limits[0] or zero_point.max(initial=0) > limits[1]:
            self.wrong(tensor, f"has a zero_point outside of {limits}")
        self._check_limits(tensor, pair, limits, zero_point.dtype)
        axes = {node.attrs.get("axis") for node in ends}
        if spec.axis is not None and axes != {spec.axis}:
            self.wrong(tensor, f"is not quantized along axis {spec.axis}, as in the stored plan")
        return params

    def _same(self, tensor: str, operands: Iterable[gs.Tensor]) -> NDArray[Any]:
        """Return the common value of an operand at both nodes of a pair."""
        first, second = (constant_values(operand) for operand in operands)
        if first is None or second is None:
            self.wrong(tensor, "has a scale or zero_point that is not a constant")
        if first.dtype != second.dtype or not np.array_equal(first, second):
            self.wrong(tensor, "has other parameters in QuantizeLinear than in DequantizeLinear")
        return first

    def _check_limits(
        self, tensor: str, pair: list[gs.Node], limits: tuple[int, int], dtype: np.dtype[Any]
    ) -> None:
        stored = np.iinfo(dtype)
        if (len(pair) == 2) != (limits == (stored.min, stored.max)):
            what = "no Clip" if len(pair) == 2 else "a Clip"
            self.wrong(
                tensor, f"has {what} between its pair; the stored plan has integers {limits}"
            )
        for limit, operand in zip(
            limits, pair[1].inputs[1:] if len(pair) == 3 else (), strict=False
        ):
            value = constant_values(operand)
            if (
                value is None
                or value.dtype != dtype
                or value.size != 1
                or int(value.item()) != limit
            ):
                self.wrong(tensor, f"has a Clip whose limits are not {limits} of type {dtype}")

    def _check_readers(self, point: QuantPoint, target: gs.Tensor) -> None:
        """Check that exactly the consumers in the plan read the dequantized tensor."""
        found = {
            Edge(node.name, i)
            for node in {id(n): n for n in target.outputs}.values()
            for i, tensor in enumerate(node.inputs)
            if tensor is target
        }
        outputs = enumerate(self.graph.outputs)
        found |= {Edge("", i) for i, tensor in outputs if tensor is target}
        if target.name in self.inner:
            self.wrong(point.tensor, "is read by a subgraph, which is not in the stored plan")
        different = sorted(found.symmetric_difference(point.consumers))
        if different:
            edge = different[0]
            reader = (
                f"input {edge.index} of '{edge.node}'"
                if edge.node
                else f"model output {edge.index}"
            )
            does = "reads it" if edge in found else "does not read it"
            self.wrong(point.tensor, f"has other readers than in the stored plan: {reader} {does}")

    def _check_bias(self, bias: QuantPoint) -> None:
        if not _is_float_constant(self.tensors.get(bias.tensor)):
            self.wrong(bias.tensor, "is a bias, but not a float32 constant")
        if len(bias.consumers) != 1 or not self._reads(bias.consumers[0], bias.tensor):
            self.wrong(bias.tensor, "is not the bias of the node that the stored plan names")
        roles = [self.points[n].role for n in bias.derived_from or () if n in self.points]
        if roles != ["activation", "weight"] or not 2 <= bias.spec.bits <= 64:
            self.wrong(
                bias.tensor, "is a bias whose input or weight is missing from the stored plan"
            )

    def _reads(self, edge: Edge, tensor: str) -> bool:
        """Return whether a node reads a tensor as the bias of a product."""
        node = self.nodes.get(edge.node)
        if node is None or not 0 <= edge.index < len(node.inputs):
            return False
        return node.inputs[edge.index].name == tensor and biased_node(node, edge.index) is not None


def _is_float_constant(tensor: gs.Tensor | None) -> bool:
    """Return whether a tensor is a float32 initializer, without loading its values."""
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32
