"""Integer kernels: compute the integers of a node's output from the integers of its operands.

Each function here takes grids and the rule's arithmetic, and returns a kernel that takes integers.
The rule files name the sources. A docstring gives the formulas where they depend on the way of
requantizing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.bpu import add_scaled
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.hmx import add_on_vectors
from onnxqat.evaluation.integer.qdm import add_at_one_shift, multiply_below_one
from onnxqat.evaluation.integer.requantize import (
    averager,
    in_float64,
    nearest_multiplier,
    ratio,
    requantizer,
)
from onnxqat.evaluation.integer.rounding import Int64Array, divide, round_levels, shift_right
from onnxqat.rules import Arithmetic, ShiftRounding

__all__ = [
    "Kernel",
    "Window",
    "add",
    "add_constant",
    "change_scale",
    "leaky_relu",
    "mean",
    "multiply",
    "pool",
    "window_sums",
]

Levels: TypeAlias = NDArray[Any]
Kernel: TypeAlias = Callable[..., Int64Array]

TFLITE_LEFT_SHIFT = 20  # tensorflow/lite/kernels/add.cc, for int8


def add(
    operands: Sequence[Grid], output: Grid, arithmetic: Arithmetic, *, subtract: bool = False
) -> Kernel:
    """Return a kernel for Add or Sub: two arrays of integers -> centered output integers.

    ``float``: multiply both operands by their ratios of scales, add, round (MLAS ``qladd.cpp``).
    ``multiplier`` with ``rescaled_operands``: round each operand to the output's scale, then add.
    ``gemmlowp``: add at twice the larger scale with 20 extra bits, then round
    (``reference/integer_ops/add.h``). ``two-shifts``: see `onnxqat.evaluation.integer.bpu`.
    ``shift``, and ``multiplier`` without ``rescaled_operands``: add operands of equal scale, then
    round. ``hmx``: see `add_on_vectors`. ``qdm``: see `add_at_one_shift`.
    """
    if arithmetic.requantize == "hmx":
        return add_on_vectors(operands, output, subtract=subtract)
    a, b = operands
    sign = -1 if subtract else 1
    if arithmetic.requantize == "qdm":
        return add_at_one_shift(a, b, output, arithmetic, sign)
    if arithmetic.requantize == "float":
        factors = [ratio(arithmetic, g.scale, divisor=output.scale) for g in (a, b)]
        return lambda x, y: round_levels(
            a.centered(x) * factors[0].astype(np.float64)
            + sign * (b.centered(y) * factors[1].astype(np.float64)),
            arithmetic.rounding,
        )
    if arithmetic.requantize == "gemmlowp":
        return _add_gemmlowp(a, b, output, arithmetic, sign)
    if arithmetic.add != "plain":
        return add_scaled(a, b, output, arithmetic, sign)
    if arithmetic.rescaled_operands:
        rescale = [_rescaler(g, output, arithmetic) for g in (a, b)]
        return lambda x, y: rescale[0](x) + sign * rescale[1](y)
    if a.scale != b.scale:
        raise RuleError(
            f"The rule adds operands of equal scale, but their scales are {float(a.scale):.4g} and "
            f"{float(b.scale):.4g}. Set parameters = 'unify_inputs' for this op in the rule."
        )
    requantize = requantizer(
        arithmetic, ratio(arithmetic, a.scale, divisor=output.scale), arithmetic.operand_bits
    )
    return lambda x, y: requantize(
        (a.centered(x) + sign * b.centered(y).astype(np.int64)).astype(np.int64)
    )


def _rescaler(grid: Grid, output: Grid, arithmetic: Arithmetic) -> Callable[[Levels], Int64Array]:
    """Return a function that rounds an operand to the output's scale.

    As ``AddLowering::LoweringINT8`` of sophgo/tpu-mlir, whose shifts are not negative.
    """
    scale = ratio(arithmetic, grid.scale, divisor=output.scale)
    multiplier, shift = nearest_multiplier(scale, arithmetic.operand_bits, lowest_shift=0)
    return lambda x: shift_right(
        grid.centered(x).astype(np.int64) * multiplier, shift, arithmetic.rounding
    )


def _add_gemmlowp(a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic, sign: int) -> Kernel:
    scales = [g.scale.astype(np.float64) for g in (a, b)]
    twice = 2 * max(scales)
    rescale = [requantizer(arithmetic, np.asarray(s / twice), 32) for s in scales]
    last = twice / (2**TFLITE_LEFT_SHIFT * output.scale.astype(np.float64))
    finish = requantizer(arithmetic, np.asarray(last), 32)

    def kernel(x: Levels, y: Levels) -> Int64Array:
        wide = [g.centered(v).astype(np.int64) << TFLITE_LEFT_SHIFT for g, v in ((a, x), (b, y))]
        return finish(rescale[0](wide[0]) + sign * rescale[1](wide[1]))

    return kernel


def multiply(operands: Sequence[Grid], output: Grid, arithmetic: Arithmetic) -> Kernel:
    """Return a kernel for Mul: the product of the centered integers, requantized.

    ``gemmlowp``: the factor M is computed in float32 (google-ai-edge/LiteRT tflite/kernels/mul.cc).
    ``qdm``: see `multiply_below_one`.
    """
    a, b = operands
    if arithmetic.requantize == "qdm":
        return multiply_below_one(a, b, output, arithmetic)
    scale = ratio(arithmetic, a.scale, b.scale, divisor=output.scale)
    if arithmetic.requantize == "gemmlowp":
        scale = np.asarray(a.scale * b.scale / output.scale, np.float64)
    requantize = requantizer(arithmetic, scale, arithmetic.operand_bits)
    return lambda x, y: requantize(a.centered(x).astype(np.int64) * b.centered(y).astype(np.int64))


def change_scale(grid: Grid, output: Grid, arithmetic: Arithmetic) -> Kernel:
    """Return a kernel that requantizes integers from one scale to another."""
    factor = ratio(arithmetic, grid.scale, divisor=output.scale)
    requantize = requantizer(arithmetic, factor, arithmetic.operand_bits)
    return lambda x: requantize(grid.centered(x).astype(np.int64))


def mean(
    grid: Grid,
    output: Grid,
    arithmetic: Arithmetic,
    counts: Int64Array | int,
    *,
    first_rounding: ShiftRounding = "floor",
) -> Kernel:
    """Return a kernel for averages: int64 sums of ``counts`` centered values each.

    ``gemmlowp``: `averager`, for a single count. Otherwise, and with ``raw_means``, the count is
    part of the multiplier M.
    """
    if arithmetic.raw_means:
        return _raw_mean(grid, output, arithmetic, counts)
    if arithmetic.requantize == "gemmlowp":
        factor = ratio(arithmetic, grid.scale, divisor=output.scale)
        return averager(arithmetic, factor, int(counts))
    dtype = np.float64 if arithmetic.requantize == "qdm" else np.float32
    scale = ratio(arithmetic, grid.scale, divisor=output.scale * np.asarray(counts, dtype))
    return requantizer(arithmetic, scale, arithmetic.operand_bits, first_rounding=first_rounding)


def _raw_mean(grid: Grid, output: Grid, arithmetic: Arithmetic, counts: Int64Array | int) -> Kernel:
    """Return a kernel that requantizes sums of integers as they are stored.

    As ``ReduceMeanHW`` of MindSpore Lite, nnacl/int8/reduce_int8.c, and its caller
    ``ReduceMean4DCalQuantParam`` of reduce_int8.cc: what the zero_points add to the sum is
    subtracted afterwards, as a number truncated to an integer.
    """
    before, after = grid.stored_zero_point, output.stored_zero_point
    scales = [g.scale.astype(np.float64) for g in (grid, output)]
    requantize = requantizer(arithmetic, np.asarray(scales[0] / (scales[1] * counts)), 32)
    offset = int(np.trunc(after - before * scales[0] / scales[1])) - after
    return lambda sums: requantize(sums + before * np.asarray(counts, np.int64)) + offset


def pool(grid: Grid, counts: Int64Array | int) -> Kernel:
    """Return a kernel for an AveragePool of ``gemmlowp``, whose output has the grid of its input.

    The average of the integers themselves, not of the centered ones, is rounded half away from
    zero (google-ai-edge/LiteRT tflite/kernels/internal/reference/integer_ops/pooling.h).
    """
    zero_point = np.int64(grid.params.zero_point)
    return lambda sums: divide(sums + zero_point * counts, counts) - zero_point


def leaky_relu(grid: Grid, output: Grid, arithmetic: Arithmetic, alpha: float) -> Kernel:
    """Return a kernel for LeakyRelu: negative integers times alpha, requantized.

    ``gemmlowp``: the other integers are requantized too, and both factors are computed in float32
    (google-ai-edge/LiteRT tflite/kernels/activations.cc and internal/reference/leaky_relu.h).
    Otherwise both tensors have one grid.
    """
    factor, same = np.asarray(alpha), None
    if arithmetic.requantize == "gemmlowp":
        factor = np.asarray(grid.scale * np.float32(alpha) / output.scale, np.float64)
        scale = np.asarray(grid.scale / output.scale, np.float64)
        same = requantizer(arithmetic, scale, arithmetic.operand_bits)
    requantize = requantizer(arithmetic, factor, arithmetic.operand_bits)

    def kernel(x: Levels) -> Int64Array:
        centered = grid.centered(x).astype(np.int64)
        kept = centered if same is None else same(centered)
        return np.where(centered < 0, requantize(centered), kept)

    return kernel


@dataclass(frozen=True, kw_only=True)
class Window:
    """Geometry of an AveragePool over the spatial axes (2 and above).

    Attributes
    ----------
    kernel, strides, dilations : tuple of int
        One entry per spatial axis.
    pads : tuple of int
        Padding at the start of every axis, then at the end of every axis, as in ONNX.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


def window_sums(values: NDArray[Any], window: Window) -> Int64Array:
    """Return the int64 sums of zero-padded (N, C, spatial...) integers over the windows."""
    rank = len(window.kernel)
    pads = [(0, 0), (0, 0), *zip(window.pads[:rank], window.pads[rank:], strict=True)]
    padded = np.pad(values, pads)
    spans = tuple(d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    views = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in window.strides))
    taps = tuple(slice(None, None, d) for d in window.dilations)
    axes = tuple(range(-rank, 0))
    return np.asarray(views[(*steps, *taps)].sum(axis=axes, dtype=np.int64))


def add_constant(
    grid: Grid,
    output: Grid,
    arithmetic: Arithmetic,
    values: NDArray[Any],
    *,
    signs: tuple[int, int] = (1, 1),
) -> Kernel:
    """Return a kernel that rounds an operand and a constant to the output's scale and adds them.

    For an Add, the constant is first rounded to a scale of its own, as in
    ``AddLowering::LoweringINT8`` of sophgo/tpu-mlir; for a Sub it is not, as in
    ``SubLowering::LoweringINT8``.

    Parameters
    ----------
    values : array
        The constant, in float.
    signs : tuple of int
        Factors 1 or -1 of the operand and of the constant; a Sub has one -1.
    """
    if signs == (1, 1):
        levels, scale = _compiled_constant(values)
        factor = ratio(arithmetic, scale, divisor=output.scale)
        multiplier, shift = nearest_multiplier(factor, arithmetic.operand_bits, lowest_shift=0)
        merged = shift_right(levels * multiplier, shift, arithmetic.rounding)
    else:
        low, high = (-128, 127) if values.min(initial=0) < 0 else (0, 255)
        levels = round_levels(values.astype(np.float64) / output.scale, "half-away")
        merged = signs[1] * np.clip(levels, low, high)
    rescale = _rescaler(grid, output, arithmetic)
    return lambda x: signs[0] * rescale(x) + merged


def multiply_constant(
    grid: Grid, output: Grid, arithmetic: Arithmetic, values: NDArray[Any]
) -> Kernel:
    """Return a kernel for the product of centered integers and a constant.

    As ``MulLowering::LoweringINT8`` of sophgo/tpu-mlir; a single number becomes part of the
    multiplier M, as in ``MulConstLowering``. ``qdm``: a single number has a look-up table.
    """
    if values.size == 1:
        levels, scale = None, values.reshape(()).astype(np.float64)
    else:
        levels, scale = _compiled_constant(values)
    factor = ratio(arithmetic, grid.scale, scale, divisor=output.scale)
    if arithmetic.requantize == "qdm":
        requantize = in_float64(factor)
    else:
        requantize = requantizer(arithmetic, factor, arithmetic.operand_bits)

    def kernel(x: Levels) -> Int64Array:
        centered = grid.centered(x).astype(np.int64)
        return requantize(centered if levels is None else centered * levels)

    return kernel


def _compiled_constant(values: NDArray[Any]) -> tuple[Int64Array, NDArray[np.float64]]:
    """Return the integers and the scale that tpu-mlir gives a constant.

    int8 with scale absmax / 127 if a value is negative, else uint8 with scale absmax / 255.
    """
    top, low = (127, -128) if values.min(initial=0) < 0 else (255, 0)
    largest = np.abs(values).max(initial=0).astype(np.float64)
    scale = np.asarray(largest / top if largest else 1.0)
    levels = round_levels(values.astype(np.float64) / scale, "half-away")
    return np.clip(levels, low, top), scale
