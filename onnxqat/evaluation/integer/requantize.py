"""Rescale integer sums to the scale of an output, in the way that a rule documents.

With M = s_x * s_w / s_y, the sum of a convolution becomes ``round(sum * M)``. Chips replace the
factor M by integers and shifts, which these functions compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.rounding import Int64Array, round_levels, shift_right
from onnxqat.rules import Arithmetic

__all__ = [
    "Requantizer",
    "averager",
    "fixed_point",
    "in_float64",
    "nearest_multiplier",
    "ratio",
    "requantizer",
]

Requantizer: TypeAlias = Callable[[Int64Array], Int64Array]
Scale: TypeAlias = NDArray[np.floating[Any]]


def nearest_multiplier(
    scale: Scale, bits: int, *, lowest_shift: int = -32
) -> tuple[Int64Array, Int64Array]:
    """Return the integers for which ``multiplier / 2**shift`` is nearest to ``scale``.

    As ``get_scale_and_shift`` and ``get_scale_and_shift_positive`` of sophgo/tpu-mlir,
    lib/Support/MathUtils.cpp: among the shifts up to 30 whose multiplier is smaller in magnitude
    than ``2**(bits - 1) - 1``, the first with the least error in float32.

    Parameters
    ----------
    scale : float
        Scale of any shape, rounded to float32.
    bits : int
        Width of the multiplier.
    lowest_shift : int
        Smallest shift.

    Returns
    -------
    multiplier, shift : int64
        Arrays of the shape of ``scale``. The error is at most ``2**-31``, or
        ``scale * 2**-(bits - 2)`` if the width of the multiplier is the limit.
    """
    wanted = np.asarray(scale, np.float32).astype(np.float64)
    least = np.full(wanted.shape, np.inf, np.float32)
    multiplier, shift = (np.zeros(wanted.shape, np.int64) for _ in range(2))
    for n in range(lowest_shift, 31):
        m = np.sign(wanted) * np.floor(np.abs(wanted) * 2.0**n + 0.5)
        error = np.abs(m / 2.0**n - wanted).astype(np.float32)
        better = (error < least) & (np.abs(m) < 2 ** (bits - 1) - 1)
        least = np.where(better, error, least)
        multiplier = np.where(better, m, multiplier).astype(np.int64)
        shift = np.where(better, n, shift)
    return multiplier, shift


def fixed_point(scale: Scale) -> tuple[Int64Array, Int64Array]:
    """Return ``multiplier`` of 31 bits and ``exponent``: scale = multiplier * 2**(exponent - 31).

    As ``QuantizeMultiplier`` of tensorflow/lite/kernels/internal/quantization_util.cc; the relative
    error is at most ``2**-31``.
    """
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    multiplier = np.floor(mantissa * 2.0**31 + 0.5).astype(np.int64)
    carried = multiplier == 2**31
    multiplier = np.where(carried, multiplier // 2, multiplier)
    exponent = exponent.astype(np.int64) + carried
    tiny = exponent < -31
    return np.where(tiny, 0, multiplier), np.where(tiny, 0, exponent)


def ratio(arithmetic: Arithmetic, *scales: Scale, divisor: Scale) -> Scale:
    """Return the product of ``scales`` divided by ``divisor``, in the precision of the kernels."""
    dtype = np.float32 if arithmetic.requantize == "float" else np.float64
    product = np.asarray(scales[0], dtype)
    for scale in scales[1:]:
        product = product * np.asarray(scale, dtype)
    return np.asarray(product / np.asarray(divisor, dtype), dtype)


def requantizer(arithmetic: Arithmetic, scale: Scale, bits: int) -> Requantizer:
    """Return the function that multiplies int64 sums by ``scale`` and rounds.

    Parameters
    ----------
    scale : float
        The factor M, broadcastable to the sums.
    bits : int
        Width of the multiplier, for ``requantize = "multiplier"``.

    Raises
    ------
    RuleError
        The rule requantizes by a shift, and ``scale`` is not a power of two.
    """
    rounding = arithmetic.rounding
    if arithmetic.requantize == "float":
        factor = np.asarray(scale, np.float32)
        return lambda sums: round_levels(sums.astype(np.float32) * factor, rounding)
    if arithmetic.requantize == "hmx":  # not of its matrix unit, see hmx.convert_sums
        exact = np.asarray(scale, np.float64)
        return lambda sums: round_levels(sums * exact, rounding)
    if arithmetic.requantize == "multiplier":
        multiplier, shift = nearest_multiplier(scale, bits)
        return lambda sums: shift_right(sums * multiplier, shift, rounding)
    if arithmetic.requantize == "gemmlowp":
        return _gemmlowp(*fixed_point(scale), arithmetic)
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    if np.any(mantissa != 0.5):
        raise RuleError(
            f"The rule requantizes by a shift, but the ratio of the scales, {scale.flat[0]:g}, is "
            "not a power of two. Make the scales powers of two."
        )
    places = 1 - exponent.astype(np.int64)
    return lambda sums: shift_right(sums, places, rounding)


def in_float64(scale: Scale) -> Requantizer:
    """Return the function that multiplies int64 sums by ``scale`` in float64 and rounds half away.

    As ``FullyConnected`` and ``FullyConnectedPerChannel`` of google-ai-edge/LiteRT
    tflite/kernels/internal/reference/integer_ops/fully_connected.h, in the functions that take
    scales.
    """
    factor = np.asarray(scale, np.float64)
    return lambda sums: round_levels(sums.astype(np.float64) * factor, "half-away")


def averager(arithmetic: Arithmetic, scale: Scale, count: int) -> Requantizer:
    """Return the function that multiplies int64 sums of ``count`` values by ``scale / count``.

    As ``QuantizedMeanOrSum`` of google-ai-edge/LiteRT tflite/kernels/internal/reference/reduce.h:
    the multiplier of ``scale`` is shifted to the left as far as the count allows, and divided by
    the count without rounding.
    """
    multiplier, exponent = fixed_point(scale)
    shift = np.minimum(min(count.bit_length() - 1, 32), 31 + exponent)
    return _gemmlowp((multiplier << shift) // count, exponent - shift, arithmetic)


def _gemmlowp(multiplier: Int64Array, exponent: Int64Array, arithmetic: Arithmetic) -> Requantizer:
    """Return ``MultiplyByQuantizedMultiplier`` of tensorflow/lite/kernels/internal/common.h.

    Its ``SaturatingRoundingDoublingHighMul`` rounds half up: for negative products it adds a nudge
    of 1 - 2**30 and truncates, which gives the same.
    """
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)

    def apply(sums: Int64Array) -> Int64Array:
        high = shift_right((sums << left) * multiplier, 31, "half-up")
        return shift_right(high, right, arithmetic.rounding)

    return apply
