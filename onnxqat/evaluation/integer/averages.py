"""Steps for averages: AveragePool, GlobalAveragePool, ReduceMean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.context import Context, FusedOp, Operand
from onnxqat.evaluation.integer.kernels import Kernel, Window, mean, pool, window_sums
from onnxqat.evaluation.integer.rounding import Int64Array
from onnxqat.evaluation.integer.steps import Array, MeanStep, Target

__all__ = ["build_mean", "is_spatial"]

COUNTING_PADS = ("multiplier", "two-shifts", "qdm")  # their sources average padding too


def build_mean(
    context: Context, group: FusedOp, operands: Sequence[Operand], target: Target
) -> MeanStep:
    """Return the step of an average.

    Raises
    ------
    RuleError
        No source documents the integer arithmetic for its padding.
    """
    node = group.nodes[0]
    source = operands[0]
    grid = context.grids[source.tensor]
    window = _window(node) if node.op == "AveragePool" else None
    arithmetic = context.arithmetic
    if arithmetic.requantize in COUNTING_PADS and _counts_differ(node, window):
        raise RuleError(
            f"Node '{node.name}': the arithmetic of an AveragePool with count_include_pad = 0 is "
            "unknown. Evaluate with --mode qdq."
        )
    sums = _sums(node, window)
    output = target.grid
    by_integers = window is not None and arithmetic.requantize == "gemmlowp"
    if by_integers and not grid.params.same_as(output.params):
        raise RuleError(
            f"Node '{node.name}': the chip averages integers of one grid, but the grids of its "
            "input and its output differ. Evaluate with --mode qdq."
        )
    twice = arithmetic.round_averages_twice and node.op != "ReduceMean"
    average = partial(
        mean, grid, output, arithmetic, first_rounding=arithmetic.rounding if twice else "floor"
    )

    def kernel_for(centered: Array) -> Kernel:
        counts = _counts(node, window, centered)
        return pool(grid, counts) if by_integers else average(counts)

    return MeanStep(
        source=source.tensor, grid=grid, sums=sums, kernel_for=kernel_for, target=target
    )


def is_spatial(node: gs.Node) -> bool:
    """Return whether an average runs over all spatial axes (2 and above), like a pool."""
    if node.op != "ReduceMean":
        return True
    shape = node.inputs[0].shape
    rank = len(shape) if shape is not None else 0
    axes = _given_axes(node)
    return axes is not None and {a % max(rank, 1) for a in axes} == set(range(2, rank))


def _given_axes(node: gs.Node) -> list[int] | None:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values.tolist()
    return None if axes is None else [int(axis) for axis in axes]


def _window(node: gs.Node) -> Window:
    kernel = tuple(node.attrs["kernel_shape"])
    rank = len(kernel)
    if node.attrs.get("ceil_mode", 0) or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        raise RuleError(
            f"Node '{node.name}': integer evaluation does not support ceil_mode or auto_pad of an "
            "AveragePool. Evaluate with --mode qdq."
        )
    return Window(
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", (1,) * rank)),
        dilations=tuple(node.attrs.get("dilations", (1,) * rank)),
        pads=tuple(node.attrs.get("pads", (0,) * (2 * rank))),
    )


def _sums(node: gs.Node, window: Window | None) -> Callable[[Array], Int64Array]:
    if window is not None:
        return lambda centered: window_sums(centered, window)
    keep = bool(node.attrs.get("keepdims", 1))

    def sums(centered: Array) -> Int64Array:
        axes = _axes(node, centered)
        total = np.asarray(centered.sum(axis=axes, dtype=np.int64))
        return np.expand_dims(total, axes) if keep else total

    return sums


def _axes(node: gs.Node, centered: Array) -> tuple[int, ...]:
    """Return the axes that a GlobalAveragePool or a ReduceMean runs over."""
    if node.op == "GlobalAveragePool":
        return tuple(range(2, centered.ndim))
    axes = _given_axes(node)
    return tuple(axes) if axes is not None else tuple(range(centered.ndim))


def _counts_differ(node: gs.Node, window: Window | None) -> bool:
    """Return whether windows at the border average fewer values than others."""
    return bool(window and any(window.pads) and not node.attrs.get("count_include_pad", 0))


def _counts(node: gs.Node, window: Window | None, centered: Array) -> Int64Array | int:
    """Return the number of values in each average."""
    if window is None:
        return int(np.prod([centered.shape[axis] for axis in _axes(node, centered)]))
    if not _counts_differ(node, window):
        return int(np.prod(window.kernel))
    ones = np.ones((1, 1, *centered.shape[2:]), np.int32)
    return window_sums(ones, window)
