"""Attention blocks as Sophgo's compiler fuses them for the BM1684X.

The compiler turns the products of an attention block, its scale and its Softmax into one op (see
`onnxqat.plan.attention`), which runs head by head (sophgo/tpu-mlir
lib/Conversion/TopToTpu/BM1684X/Attention.cpp, lib/Support/Dnnl/Attention.cpp). Its arithmetic
differs from that of the ops one by one:

- The weights of queries, keys and values have a scale for each head, absmax / 127, which the
  compiler computes itself. The plan gives them this scale; weights with another are changed here.
- The scale is not multiplied: the Softmax reads the integers of the product of queries and keys,
  with the scale of the Mul's output.
- The Softmax sums table values ``exp(-s * (127 - x))`` in float32.
- Products round half away from zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.integer.context import Context, FusedOp, Operand
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.matrix import build_product
from onnxqat.evaluation.integer.rounding import round_levels
from onnxqat.evaluation.integer.steps import ProductStep, Step, Values
from onnxqat.nodes import is_bias_add
from onnxqat.plan.graph import GraphIndex
from onnxqat.qparams import QuantParams

__all__ = ["FusedAttention", "attention_steps", "find_attention"]

TOP = 127  # the largest integer of the Softmax's input


@dataclass(frozen=True)
class FusedAttention:
    """One attention block that the compiler fuses.

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


def find_attention(context: Context, groups: Sequence[FusedOp]) -> list[FusedAttention]:
    """Return the blocks that the compiler fuses: quantized ones whose integers are int8."""
    by_node = {node.name: group for group in groups for node in group.nodes}
    found = []
    for block in GraphIndex(context.graph).attention:
        projections = tuple(by_node[node.name] for node in block.projections)
        products = tuple(by_node[node.name] for node in block.products)
        scale, softmax = by_node[block.scale.name], by_node[block.softmax.name]
        alone = all(len(group.nodes) == 1 for group in (*products[:2], scale, softmax))
        biased = all(is_bias_add(n) for g in (*projections, products[2]) for n in g.epilogue)
        whole = all(node.inputs[1].name in context.grids for node in block.projections)
        int8 = _are_int8(context, (*projections, *products[:2], scale))
        if alone and biased and whole and int8:
            fused = FusedAttention(projections, products, scale, softmax, block.heads)
            found.append(fused)
    return found


def _are_int8(context: Context, groups: Iterable[FusedOp]) -> bool:
    """Return whether the outputs of all groups are int8."""
    grids = [context.grids.get(group.outputs[0]) for group in groups]
    return all(grid is not None and grid.limits == (-128, 127) for grid in grids)


def attention_steps(context: Context, attention: FusedAttention) -> Iterator[tuple[str, Step]]:
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
