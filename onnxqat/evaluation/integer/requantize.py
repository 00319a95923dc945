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
from onnxqat.rules import Arithmetic, ShiftRounding

__all__ = [
    "Dequantizer",
    "Requantizer",
    "averager",
    "cut_multiplier",
    "dequantizer",
    "fixed_point",
    "gemmlowp",
    "in_float64",
    "nearest_multiplier",
    "ratio",
    "requantizer",
    "two_shifts",
]

Requantizer: TypeAlias = Callable[[Int64Array], Int64Array]
Dequantizer: TypeAlias = Callable[[Int64Array], NDArray[np.floating[Any]]]
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


MOST_OF_7_BITS = 127


def cut_multiplier(scale: float) -> tuple[int, int]:
    """Return an integer of 7 bits and a shift: ``multiplier / 2**shift`` is just below ``scale``.

    As ``getRShiftAndMultiplierFromQScale`` without ``qdm`` of sophgo/tpu-mlir,
    lib/Support/MathUtils.cpp. The relative error is below ``1 / 63``; the sign is not looked at.
    """
    if abs(scale) > MOST_OF_7_BITS:
        return MOST_OF_7_BITS, 0
    for shift in range(63):
        if abs(scale) * 2.0 ** (shift + 1) >= MOST_OF_7_BITS:
            return int(abs(scale) * 2.0**shift), shift
    return 0, 0


# hbdk 3, hbdk/torch_script/utils.py `gen_rescale_param`: 30 - 1 - 7 for 8-bit outputs
MOST_AFTER = 22
MOST_BEFORE = 31


def two_shifts(scale: Scale) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return the multiplier of 16 bits, the shift before it and the rounding shift behind it.

    As ``gen_rescale_param`` of Horizon's hbdk 3, hbdk/torch_script/utils.py, for sums of 32 bits
    that become 8 bits: the first shift is as small as the second one, of at most 22, allows. The
    relative error of ``multiplier / 2**(before + after)`` is at most ``2**-15``.
    """
    bounded = np.clip(np.asarray(scale, np.float32), -32768, 32767)
    mantissa, exponent = np.frexp(bounded)
    multiplier = np.clip(np.floor(mantissa * np.float32(2**15) + 0.5), -32768, 32767)
    shift = 15 - exponent.astype(np.int64)
    before = np.clip(shift - MOST_AFTER, 0, MOST_BEFORE)
    return multiplier.astype(np.int64), before, np.clip(shift - before, 0, 31)


def ratio(arithmetic: Arithmetic, *scales: Scale, divisor: Scale) -> Scale:
    """Return the product of ``scales`` divided by ``divisor``, in the precision of the kernels.

    With ``factor_type = "float32"`` the product is a float32, but not the quotient.
    """
    narrow = arithmetic.requantize in ("float", "two-shifts")
    first = np.float32 if narrow or arithmetic.factor_type == "float32" else np.float64
    last = np.float32 if narrow else np.float64
    product = np.asarray(scales[0], first)
    for scale in scales[1:]:
        product = product * np.asarray(scale, first)
    return np.asarray(np.asarray(product, last) / np.asarray(divisor, last), last)


def requantizer(
    arithmetic: Arithmetic,
    scale: Scale,
    bits: int,
    *,
    rounding: ShiftRounding | None = None,
    offset: Scale | None = None,
    first_rounding: ShiftRounding = "floor",
) -> Requantizer:
    """Return the function that multiplies int64 sums by ``scale`` and rounds.

    Parameters
    ----------
    scale : float
        The factor M, broadcastable to the sums.
    bits : int
        Width of the multiplier, for ``requantize = "multiplier"``.
    rounding : str, optional
        Rounding of the last step (default: the ``rounding`` of the arithmetic).
    offset : float, optional
        What ``requantize = "float"`` adds before it rounds: a float bias divided by s_y.
    first_rounding : str
        Rounding of the first shift of ``requantize = "two-shifts"``.

    Raises
    ------
    RuleError
        The rule requantizes by a shift, and ``scale`` is not a power of two; or an offset is given
        that the rule cannot add.
    """
    rounding = rounding or arithmetic.rounding
    if arithmetic.requantize == "float":
        return _by_float(np.asarray(scale, np.float32), offset, rounding)
    if offset is not None:
        raise RuleError(
            "The rule keeps the bias of a convolution in float, but requantizes integer sums. Set "
            "requantize = 'float' or bias = 'int32' in its [arithmetic]."
        )
    if arithmetic.requantize == "hmx":  # not of its matrix unit, see hmx.convert_sums
        exact = np.asarray(scale, np.float64)
        return lambda sums: round_levels(sums * exact, rounding)
    if arithmetic.requantize == "multiplier":
        multiplier, shift = nearest_multiplier(scale, bits)
        return lambda sums: shift_right(sums * multiplier, shift, rounding)
    if arithmetic.requantize == "qdm":  # not of products, see qdm.compile_product
        return _cut(float(scale), rounding)
    if arithmetic.requantize == "gemmlowp":
        return gemmlowp(*fixed_point(scale), rounding)
    if arithmetic.requantize == "two-shifts":
        factor, before, after = two_shifts(scale)
        return lambda sums: shift_right(
            shift_right(sums, before, first_rounding) * factor, after, rounding
        )
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    if np.any(mantissa != 0.5):
        raise RuleError(
            f"The rule requantizes by a shift, but the ratio of the scales, {scale.flat[0]:g}, is "
            "not a power of two. Make the scales powers of two."
        )
    places = 1 - exponent.astype(np.int64)
    return lambda sums: shift_right(sums, places, rounding)


def _cut(scale: float, rounding: ShiftRounding) -> Requantizer:
    """Return ``applyMultiplierAndRShift`` of tpu-mlir for CV18xx, which multiplies in float32."""
    multiplier, shift = cut_multiplier(scale)
    factor = np.float32(multiplier if scale >= 0 else -multiplier)
    step = np.float32(2.0**shift)
    return lambda sums: round_levels(sums.astype(np.float32) * factor / step, rounding)


def _by_float(factor: Scale, offset: Scale | None, rounding: ShiftRounding) -> Requantizer:
    if offset is None:
        return lambda sums: round_levels(sums.astype(np.float32) * factor, rounding)
    added = np.asarray(offset, np.float32)
    return lambda sums: round_levels(sums.astype(np.float32) * factor + added, rounding)


def dequantizer(
    arithmetic: Arithmetic, scales: tuple[Scale, Scale], bias: Scale | None = None
) -> Dequantizer:
    """Return the function that makes floats of int64 sums: times s_x * s_w, plus a float bias.

    The floats have the ``float_type`` of the arithmetic, and are returned as float64 or float32.
    """
    if arithmetic.factor_type == "float64":
        exact = np.asarray(scales[0], np.float64) * np.asarray(scales[1], np.float64)
        if bias is None:
            return lambda sums: np.asarray(sums * exact)
        added = np.asarray(bias, np.float64)
        return lambda sums: np.asarray(sums * exact + added)
    factor = _rounded_factor(
        np.asarray(scales[0], np.float32) * np.asarray(scales[1], np.float32), arithmetic
    )

    def apply(sums: Int64Array) -> NDArray[np.floating[Any]]:
        values = sums.astype(np.float32) * factor
        if bias is not None:
            values = values + np.asarray(bias, np.float32)
        with np.errstate(over="ignore"):
            return np.asarray(values.astype(arithmetic.float_type), np.float32)

    return apply


def _rounded_factor(factor: NDArray[np.float32], arithmetic: Arithmetic) -> NDArray[np.float32]:
    if arithmetic.factor_type == "float16":
        return np.asarray(factor.astype(np.float16), np.float32)
    if arithmetic.factor_type == "float19":
        return np.asarray((factor.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32))
    return factor


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
    return gemmlowp((multiplier << shift) // count, exponent - shift, arithmetic.rounding)


def gemmlowp(multiplier: Int64Array, exponent: Int64Array, rounding: ShiftRounding) -> Requantizer:
    """Return ``MultiplyByQuantizedMultiplier`` of tensorflow/lite/kernels/internal/common.h.

    Its ``SaturatingRoundingDoublingHighMul`` rounds half up: for negative products it adds a nudge
    of 1 - 2**30 and truncates, which gives the same.
    """
    left, right = np.maximum(exponent, 0), np.maximum(-exponent, 0)

    def apply(sums: Int64Array) -> Int64Array:
        high = shift_right((sums << left) * multiplier, 31, "half-up")
        return shift_right(high, right, rounding)

    return apply
