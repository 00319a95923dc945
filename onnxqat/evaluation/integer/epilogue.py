"""The ops that a chip fuses after a kernel: bias, Relu, Clip."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.evaluation.integer.context import Context, FusedOp
from onnxqat.evaluation.integer.steps import Target, limits_of
from onnxqat.nodes import is_bias_add

__all__ = ["added", "float_limits", "has_only_limits", "make_target"]


def has_only_limits(group: FusedOp, *, sums: bool = False) -> bool:
    """Return whether only a bias, Relu or Clip with constant limits follows the first op.

    With ``sums``, an Add of an activation may come first.
    """
    first = added(group) if sums else None
    return all(
        node is first
        or node.op == "Relu"
        or is_bias_add(node)
        or (node.op == "Clip" and _has_constant_limits(node))
        for node in group.epilogue
    )


def added(group: FusedOp) -> gs.Node | None:
    """Return the Add of an activation that follows the first op at once, if there is one."""
    first = next(iter(group.epilogue), None)
    return first if first is not None and first.op == "Add" and not is_bias_add(first) else None


def _has_constant_limits(node: gs.Node) -> bool:
    return all(not t.name or isinstance(t, gs.Constant) for t in node.inputs[1:])


def float_limits(group: FusedOp) -> tuple[float, float]:
    """Return the smallest and the largest float that the epilogue lets through."""
    low, high = -math.inf, math.inf
    for node in group.epilogue:
        if node.op == "Relu":
            low = max(low, 0.0)
        elif node.op == "Clip":
            ends = [t.values.item() if t.name else None for t in node.inputs[1:]]
            ends += [None] * (2 - len(ends))
            low = low if ends[0] is None else max(low, ends[0])
            high = high if ends[1] is None else min(high, ends[1])
    return low, high


def make_target(context: Context, group: FusedOp) -> Target | None:
    """Return the target for the integers of a group; None if its output is not quantized."""
    (tensor,) = group.outputs
    if tensor not in context.grids:
        return None
    grid = context.grids[tensor]
    ends = np.finfo(np.float32)
    low, high = float_limits(group)
    limits = limits_of(grid, [(max(low, float(ends.min)), min(high, float(ends.max)))])
    return Target(tensor=tensor, grid=grid, limits=limits)
