"""Integer kernels: from the integers of a node's operands to the integers of its output.

Each takes grids and the rule's arithmetic once, and integers then. Sources are named in the rule
files; formulas that differ between ways of requantizing are named here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.requantize import nearest_multiplier, ratio, requantizer
from onnxqat.evaluation.integer.rounding import Int64Array, divide, round_levels, shift_right
from onnxqat.rules import Arithmetic

__all__ = [
    "Kernel",
    "Window",
    "add",
    "add_constant",
    "leaky_relu",
    "mean",
    "multiply",
    "window_sums",
]

Levels: TypeAlias = NDArray[Any]
Kernel: TypeAlias = Callable[..., Int64Array]

TFLITE_LEFT_SHIFT = 20  # tensorflow/lite/kernels/add.cc, for int8


def add(
    operands: Sequence[Grid], output: Grid, arithmetic: Arithmetic, *, subtract: bool = False
) -> Kernel:
    """Return a kernel for Add or Sub: two levels arrays -> centered output integers.

    ``float``: both operands times their ratio of scales (MLAS ``qladd.cpp``). ``multiplier``:
    each operand rounded to the output's scale, then added, or added and then rounded where the
    rule does not say ``rescaled_operands``. ``gemmlowp``: both at twice the larger scale with 20
    extra bits (``reference/integer_ops/add.h``). ``shift``: operands of one scale are added.
    """
    a, b = operands
    sign = -1 if subtract else 1
    if arithmetic.requantize == "float":
        factors = [ratio(arithmetic, g.scale, divisor=output.scale) for g in (a, b)]
        return lambda x, y: round_levels(
            a.centered(x) * factors[0].astype(np.float64)
            + sign * (b.centered(y) * factors[1].astype(np.float64)),
            arithmetic.rounding,
        )
    if arithmetic.requantize == "gemmlowp":
        return _add_gemmlowp(a, b, output, arithmetic, sign)
    if arithmetic.rescaled_operands:
        rescale = [_rescaler(g, output, arithmetic) for g in (a, b)]
        return lambda x, y: rescale[0](x) + sign * rescale[1](y)
    if a.scale != b.scale:
        raise RuleError("The rule adds operands of one scale, and theirs differ. Unify them.")
    requantize = requantizer(
        arithmetic, ratio(arithmetic, a.scale, divisor=output.scale), arithmetic.operand_bits
    )
    return lambda x, y: requantize(
        (a.centered(x) + sign * b.centered(y).astype(np.int64)).astype(np.int64)
    )


def _rescaler(grid: Grid, output: Grid, arithmetic: Arithmetic) -> Callable[[Levels], Int64Array]:
    """``AddLowering::LoweringINT8`` of sophgo/tpu-mlir: shifts of an operand are not negative."""
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
    """Return a kernel for Mul: the product of the centered integers, requantized."""
    a, b = operands
    scale = ratio(arithmetic, a.scale, b.scale, divisor=output.scale)
    requantize = requantizer(arithmetic, scale, arithmetic.operand_bits)
    return lambda x, y: requantize(a.centered(x).astype(np.int64) * b.centered(y).astype(np.int64))


def mean(grid: Grid, output: Grid, arithmetic: Arithmetic, counts: Int64Array | int) -> Kernel:
    """Return a kernel for averages: int64 sums of ``counts`` centered values each.

    ``gemmlowp``: requantized, then divided (``reference/integer_ops/mean.h`` and ``pooling.h``).
    Otherwise the count is part of M.
    """
    if arithmetic.requantize == "gemmlowp":
        multiplier = ratio(arithmetic, grid.scale, divisor=output.scale)
        requantize = requantizer(arithmetic, multiplier, 32)
        return lambda sums: divide(requantize(sums), counts)
    scale = ratio(arithmetic, grid.scale, divisor=output.scale * np.asarray(counts, np.float32))
    return requantizer(arithmetic, scale, arithmetic.operand_bits)


def leaky_relu(grid: Grid, arithmetic: Arithmetic, alpha: float) -> Kernel:
    """Return a kernel for LeakyRelu on one grid: negative integers times alpha, requantized."""
    requantize = requantizer(arithmetic, np.asarray(alpha), arithmetic.operand_bits)

    def kernel(x: Levels) -> Int64Array:
        centered = grid.centered(x).astype(np.int64)
        return np.where(centered < 0, requantize(centered), centered)

    return kernel


@dataclass(frozen=True, kw_only=True)
class Window:
    """Geometry of an AveragePool over the spatial axes, axis 2 and on.

    Attributes
    ----------
    kernel, strides, dilations : tuple of int
        One entry per spatial axis.
    pads : tuple of int
        All begins, then all ends, as in ONNX.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]


def window_sums(values: NDArray[Any], window: Window) -> Int64Array:
    """Return the int64 sums over the windows of (N, C, spatial...) integers, zero-padded."""
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
    """Return a kernel for an operand and a constant, each rounded to the output's scale.

    ``AddLowering::LoweringINT8`` of sophgo/tpu-mlir rounds the constant to a scale of its own
    first, ``SubLowering::LoweringINT8`` does not.

    Parameters
    ----------
    values : array
        The constant, in float.
    signs : tuple of int
        What the operand and the constant are multiplied by; a -1 makes it a Sub.
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

    ``MulConstLowering`` and ``MulLowering::LoweringINT8`` of sophgo/tpu-mlir: a single number is
    part of M.
    """
    if values.size == 1:
        levels, scale = None, values.reshape(()).astype(np.float64)
    else:
        levels, scale = _compiled_constant(values)
    factor = ratio(arithmetic, grid.scale, scale, divisor=output.scale)
    requantize = requantizer(arithmetic, factor, arithmetic.operand_bits)

    def kernel(x: Levels) -> Int64Array:
        centered = grid.centered(x).astype(np.int64)
        return requantize(centered if levels is None else centered * levels)

    return kernel


def _compiled_constant(values: NDArray[Any]) -> tuple[Int64Array, NDArray[np.float64]]:
    """Return the integers and the scale that tpu-mlir gives a constant.

    int8 of scale absmax / 127 where one is negative, uint8 of absmax / 255 otherwise.
    """
    top, low = (127, -128) if values.min(initial=0) < 0 else (255, 0)
    largest = np.abs(values).max(initial=0).astype(np.float64)
    scale = np.asarray(largest / top if largest else 1.0)
    levels = round_levels(values.astype(np.float64) / scale, "half-away")
    return np.clip(levels, low, top), scale
