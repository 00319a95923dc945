"""Attention blocks as Sophgo's compiler fuses them for the BM1684X.

The compiler turns the products of an attention block, its scale and its Softmax into one op
(``ConvertMatMul2Attention`` of sophgo/tpu-mlir
lib/Dialect/Top/Transforms/ProcessorOptimize/OptimizeBM1684X.cpp), which runs head by head
(lib/Conversion/TopToTpu/BM1684X/Attention.cpp, lib/Support/Dnnl/Attention.cpp). Its arithmetic
differs from that of the ops one by one:

- The weights of queries, keys and values get a scale of their own for each head, absmax / 127,
  although the calibration table gives one scale for each weight.
- The scale is not multiplied: the Softmax reads the integers of the product of queries and keys,
  with the scale of the Mul's output.
- The Softmax sums table values ``exp(-s * (127 - x))`` in float32.
- Products round half away from zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.evaluation.integer.context import Context, FusedOp, Operand
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.matrix import build_product
from onnxqat.evaluation.integer.rounding import round_levels
from onnxqat.evaluation.integer.steps import ProductStep, Step, Values
from onnxqat.nodes import is_bias_add
from onnxqat.qparams import QuantParams

__all__ = ["Attention", "attention_steps", "find_attention"]

MOVES = ("Reshape", "Transpose")
TOP = 127  # the largest integer of the Softmax's input
LARGEST_PART = 1024 * 128 * 4  # of the weights, for one head
LARGEST_INPUT = 2048 * 320 * 4  # of one sample


@dataclass(frozen=True)
class Attention:
    """One attention block.

    Attributes
    ----------
    projections : tuple of FusedOp
        The products of the input with the weights of queries, keys and values.
    products : tuple of FusedOp
        Queries times keys, probabilities times values, and the product with the last weight.
    scale, softmax : FusedOp
        The Mul by a number, and the Softmax.
    heads : int
        Number of heads.
    """

    projections: tuple[FusedOp, ...]
    products: tuple[FusedOp, ...]
    scale: FusedOp
    softmax: FusedOp
    heads: int


@dataclass(frozen=True, kw_only=True)
class CopyStep:
    """Takes the integers of a tensor for those of another."""

    source: str
    target: str

    def run(self, values: Values) -> Values:
        """Return the integers."""
        return Values(levels={self.target: values.levels[self.source]})


@dataclass(frozen=True, kw_only=True)
class SoftmaxStep:
    """Computes a Softmax over the last axis from integers, by a table of ``exp``.

    Attributes
    ----------
    table : float32 of shape (256,)
        ``exp(-s * i)``, for the scale ``s`` of the input.
    scale : float32
        Scale of the output.
    """

    source: str
    target: str
    table: NDArray[np.float32]
    scale: NDArray[np.float32]

    def run(self, values: Values) -> Values:
        """Look up, divide by the sum and round."""
        powers = self.table[TOP - values.levels[self.source].astype(np.int32)]
        sums = np.cumsum(powers, axis=-1, dtype=np.float32)[..., -1:]  # one by one, as the compiler
        levels = round_levels(powers / (sums * self.scale), "half-away")
        return Values(levels={self.target: np.clip(levels, 0, 255).astype(np.uint8)})


def find_attention(context: Context, groups: Sequence[FusedOp]) -> list[Attention]:
    """Return the blocks that the compiler fuses.

    Only blocks of four axes, without a mask, with one reader for each inner tensor, and with int8
    integers are found.
    """
    graph = _Groups(context, groups)
    found = (_match(graph, group) for group in groups if group.kind == "MatMul")
    return [attention for attention in found if attention is not None]


class _Groups:
    """The groups by the tensor that they write, and the readers of each tensor."""

    def __init__(self, context: Context, groups: Sequence[FusedOp]) -> None:
        self.context = context
        self.writers = {name: group for group in groups for name in group.outputs}
        self.readers: dict[str, int] = {}
        for node in context.graph.nodes:
            for tensor in node.inputs:
                self.readers[tensor.name] = self.readers.get(tensor.name, 0) + 1
        for tensor in context.graph.outputs:
            self.readers[tensor.name] = self.readers.get(tensor.name, 0) + 1

    def before(self, tensor: gs.Tensor, kind: str) -> FusedOp | None:
        """Return the group of a kind that writes a tensor, if nothing else reads it."""
        group = self.writers.get(tensor.name)
        if group is None or group.kind != kind or self.readers.get(tensor.name) != 1:
            return None
        return group

    def behind_moves(self, tensor: gs.Tensor) -> FusedOp | None:
        """Return the MatMul whose output, reshaped and transposed, is a tensor."""
        seen: set[str] = set()
        while (group := self.writers.get(tensor.name)) is not None:
            if self.readers.get(tensor.name) != 1:
                return None
            if group.kind not in MOVES:
                complete = group.kind == "MatMul" and seen == set(MOVES)
                return group if complete else None
            seen.add(group.kind)
            tensor = group.nodes[0].inputs[0]
        return None

    def is_int8(self, group: FusedOp) -> bool:
        """Return whether the output of a group is int8."""
        grid = self.context.grids.get(group.outputs[0])
        return grid is not None and grid.limits == (-128, 127)


def _match(graph: _Groups, last: FusedOp) -> Attention | None:
    """Return the block that ends with a product, if there is one."""
    product = graph.behind_moves(last.nodes[0].inputs[0]) if _is_projection(last) else None
    softmax = product and graph.before(product.nodes[0].inputs[0], "Softmax")
    scale = softmax and graph.before(softmax.nodes[0].inputs[0], "Mul")
    if not (product and softmax and scale) or not _is_last_axis(softmax.nodes[0]):
        return None
    data = [t for t in scale.nodes[0].inputs if not isinstance(t, gs.Constant)]
    if len(data) != 1 or sum(t.values.size for t in scale.nodes[0].inputs if t not in data) != 1:
        return None
    scores = graph.before(data[0], "MatMul")
    if scores is None:
        return None
    values = graph.behind_moves(product.nodes[0].inputs[1])
    pair = [graph.behind_moves(t) for t in scores.nodes[0].inputs]
    projections = [p for p in (*pair, values) if p is not None and _is_projection(p)]
    inner = (*projections, scores, scale, product)
    heads = _heads(product.nodes[0])
    if len(projections) != 3 or heads is None or not all(map(graph.is_int8, inner)):
        return None
    read = [p.nodes[0].inputs[0].name for p in projections]
    if graph.readers[last.outputs[0]] != 1 or (read[0] == read[1] != read[2]):
        return None
    if len(scores.nodes) + len(product.nodes) + len(scale.nodes) + len(softmax.nodes) != 4:
        return None
    found = Attention(tuple(projections), (scores, product, last), scale, softmax, heads)
    return found if _is_small(found) else None


def _is_projection(group: FusedOp) -> bool:
    """Return whether a product has a constant matrix on the right and nothing but a bias behind."""
    weight = group.nodes[0].inputs[1]
    constant = isinstance(weight, gs.Constant) and weight.values.ndim == 2
    return constant and all(map(is_bias_add, group.epilogue))


def _is_last_axis(softmax: gs.Node) -> bool:
    rank = len(softmax.outputs[0].shape or ())
    return rank > 0 and int(softmax.attrs.get("axis", -1)) in (-1, rank - 1)


def _heads(product: gs.Node) -> int | None:
    """Return the number of heads: the second of four axes."""
    shape = product.outputs[0].shape
    heads = shape[1] if shape and len(shape) == 4 else None
    return heads if isinstance(heads, int) and heads > 0 else None


def _is_small(attention: Attention) -> bool:
    """Return whether a block has the size that the compiler fuses."""
    queries, keys, values = (p.nodes[0].inputs[1].values.size for p in attention.projections)
    shape = attention.projections[0].nodes[0].inputs[0].shape
    sample = shape[1:] if shape and all(isinstance(n, int) for n in shape[1:]) else ()
    part = (2 * queries + keys + values) / attention.heads
    return part <= LARGEST_PART and int(np.prod(sample)) <= LARGEST_INPUT


def attention_steps(context: Context, attention: Attention) -> Iterator[tuple[str, Step]]:
    """Yield the steps that differ from those of the ops one by one, by the output of the op."""
    away = msgspec.structs.replace(context.arithmetic, rounding="half-away")
    fused = dataclasses.replace(context, arithmetic=away)
    for group in attention.products:
        yield group.outputs[0], build_product(fused, group, context.operands(group))
    for group in attention.projections:
        yield group.outputs[0], _projection(fused, group, attention.heads)
    source = attention.products[0].outputs[0]
    scaled, target = attention.scale.outputs[0], attention.softmax.outputs[0]
    yield scaled, CopyStep(source=source, target=scaled)
    steps = -np.arange(256) * context.grids[scaled].scale.astype(np.float64)
    yield (
        target,
        SoftmaxStep(
            source=scaled,
            target=target,
            table=np.exp(steps).astype(np.float32),
            scale=context.grids[target].scale,
        ),
    )


def _projection(context: Context, group: FusedOp, heads: int) -> ProductStep:
    """Return the step of queries, keys or values, whose weight has a scale for each head."""
    name = group.nodes[0].inputs[1].name
    trained, operands = context.grids[name], context.operands(group)
    changed: list[Operand] = []
    grids: Mapping[str, Grid] = context.grids
    for operand in operands:
        if operand.tensor == name and operand.values is not None:
            stripped = trained.dequantize(trained.quantize(operand.values, "half-even"))
            grid, values = _per_head(trained, stripped, heads)
            grids = {**grids, name: grid}
            operand = dataclasses.replace(operand, grid=grid, values=values)
        changed.append(operand)
    return build_product(dataclasses.replace(context, grids=grids), group, changed)


def _per_head(grid: Grid, weight: NDArray[Any], heads: int) -> tuple[Grid, NDArray[Any]]:
    """Return the grid with a scale for each head, and the weight on it."""
    columns = np.abs(weight.astype(np.float64)).reshape(len(weight), heads, -1)
    largest = columns.max(axis=(0, 2))
    scales = np.where(largest > 0, largest / TOP, 1.0).repeat(weight.shape[1] // heads)
    levels = round_levels(weight / scales, "half-away")
    spec = msgspec.structs.replace(grid.spec, axis=1)
    zero_points = np.zeros(len(scales), np.int8)
    params = QuantParams(scale=scales.astype(np.float32), zero_point=zero_points)
    found = Grid(params=params, spec=spec)
    return found, found.dequantize(levels.astype(np.int8))
