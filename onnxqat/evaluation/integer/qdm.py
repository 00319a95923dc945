"""Integers on Sophgo's CV18xx (CV180X to CV183X), whose compiler changes scales of weights.

Products have a multiplier of 31 bits ("QDM" in the compiler), all other ops one of 7 bits that is
cut off, not rounded. Sources: sophgo/tpu-mlir lib/Conversion/TopToTpu/CV18xx/{Conv,MatMul,Deconv,
Add,Sub,Mul,MulConst,AvgPool,LeakyRelu}.cpp (Conv and Add at ca0304a, MatMul at 0455fc3) and
lib/Support/MathUtils.cpp (at 00058f6): ``getQscaleForFilter``, ``getQscaleForBias``,
``getRShiftAndMultiplierFromQScale``,
``quantizeFilterRShiftAndMultiplier``, ``quantizeBiasRShiftAndMultiplier``,
``applyMultiplierAndRShift``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.requantize import cut_multiplier, fixed_point, gemmlowp, ratio
from onnxqat.evaluation.integer.rounding import Int64Array, round_levels, shift_right
from onnxqat.rules import Arithmetic

__all__ = ["CompiledProduct", "add_at_one_shift", "compile_product", "multiply_below_one"]

Levels: TypeAlias = NDArray[Any]

TOP = np.float32(127)
BELOW_ONE = 0.999999  # the chip cannot shift to the left: no factor reaches 1
INT32 = 2**31 - 1
ROOM = 0.998  # share of int32 that a bias may take


@dataclass(frozen=True, kw_only=True)
class CompiledProduct:
    """What the compiler makes of a constant weight and a bias.

    Attributes
    ----------
    levels : int8
        The integers of the weight, in its shape.
    bias : int64 or None
        The integers of the bias, in its shape.
    scale : float64 of shape () or (C,)
        Scale of the integers of the weight, one for each output channel of a convolution.
    multiplier, exponent : int64 of the same shape
        The factor M of the sums is ``multiplier * 2**(exponent - 31)``.
    """

    levels: NDArray[np.int8]
    bias: Int64Array | None
    scale: NDArray[np.float64]
    multiplier: Int64Array
    exponent: Int64Array


def compile_product(
    weight: NDArray[np.float32],
    bias: NDArray[np.float64] | None,
    axis: int | None,
    *,
    source: NDArray[np.float32],
    output: NDArray[np.float32],
    scales: NDArray[np.float32] | None = None,
) -> CompiledProduct:
    """Return the integers and the factors of a convolution or a product with a matrix.

    M = s_x * s_w / s_y stays below 1, where weights are cut off, and is raised where the bias would
    leave int32; the weights are then smaller integers.

    Parameters
    ----------
    weight : float32
        The weight as `strip` writes it.
    bias : float, optional
        One number for each output channel, in any shape.
    axis : int, optional
        The output channels of a convolution, which have a scale each; None: one scale for all.
    source, output : float32 of shape ()
        Scales of the input and the output.
    scales : float32 of shape (C,), optional
        Scales of the weight that the compiler reads from the table (default: the largest weight of
        a channel, or of the matrix, becomes 127).
    """
    below, above = (np.float32(127 * np.float64(scale)) for scale in (source, output))
    flat = None if bias is None else bias.astype(np.float32).ravel()
    largest = _largest(weight, axis, scales)
    multiplier, exponent = fixed_point(
        _below_one(largest * below / (TOP * above), flat, axis, above)
    )
    used = multiplier > 0
    exact = np.where(used, multiplier * np.exp2(exponent - 31.0), 1)
    inverse = np.where(used, 1 / exact, 0)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = (np.float64(below / above) * inverse).astype(np.float32).reshape(shape)
    levels = np.clip(round_levels(weight * steps, "half-even"), -128, 127)
    integers = None
    if bias is not None and flat is not None:
        rounded = round_levels(
            flat * (np.float64(TOP / above) * inverse).astype(np.float32), "half-even"
        )
        integers = np.clip(rounded, -INT32 - 1, INT32).reshape(bias.shape)
    return CompiledProduct(
        levels=levels.astype(np.int8),
        bias=integers,
        scale=np.asarray(np.float64(output) / np.float64(source) * exact),
        multiplier=multiplier,
        exponent=exponent,
    )


def _largest(
    weight: NDArray[np.float32], axis: int | None, scales: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Return the weight that becomes 127, of each channel or of the matrix."""
    if scales is not None:
        return (127 * scales.astype(np.float64)).astype(np.float32)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    return np.asarray(np.abs(weight).max(axis=others, initial=0), np.float32)


def _below_one(
    wanted: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    axis: int | None,
    above: np.float32,
) -> NDArray[np.float64]:
    """Return M below 1 and large enough for the bias; ``above`` is 127 times the output's scale."""
    factor = np.asarray(wanted, np.float64)
    if bias is None:
        return np.where(factor >= 1, BELOW_ONE, factor)
    needed = (np.abs(bias) * TOP).astype(np.float64) / (INT32 * ROOM * np.float64(above))
    if axis is None:
        factor = np.maximum(factor, needed.max(initial=0))
        return np.where(factor >= 1, BELOW_ONE, factor)
    factor = np.where(factor >= 1, BELOW_ONE, factor)
    return np.where((needed > factor) & (needed < 1), needed, factor)


def multiply_below_one(
    a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic
) -> Callable[[Levels, Levels], Int64Array]:
    """Return a kernel for Mul: the product of the integers times M of 31 bits, below 1."""
    factor = ratio(arithmetic, a.scale, b.scale, divisor=output.scale)
    requantize = gemmlowp(
        *fixed_point(np.where(factor >= 1, BELOW_ONE, factor)),
        arithmetic.product_rounding or arithmetic.rounding,
    )
    return lambda x, y: requantize(a.centered(x).astype(np.int64) * b.centered(y).astype(np.int64))


def add_at_one_shift(
    a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic, sign: int
) -> Callable[[Levels, Levels], Int64Array]:
    """Return a kernel for ``a + sign * b``: each times an integer of 7 bits, then one shift."""
    factors = [float(np.float32(ratio(arithmetic, g.scale, divisor=output.scale))) for g in (a, b)]
    _, shift = cut_multiplier(max(factors))
    first, second = (int(factor * 2**shift) for factor in factors)

    def kernel(x: Levels, y: Levels) -> Int64Array:
        total = a.centered(x).astype(np.int64) * first
        total = total + sign * second * b.centered(y).astype(np.int64)
        return shift_right(total, shift, arithmetic.rounding)

    return kernel
