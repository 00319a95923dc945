"""Arithmetic of Qualcomm's HTP: of its matrix unit (HMX) and of its vector unit (HVX).

The conversion of sums to 8 and to 16 bits is ``hmx_u8_cvt`` and ``hmx_u16_cvt`` of quic/qemu,
target/hexagon/hmx/mpy_hmx.c at 3aaad8ca. How the compiler chooses its operands (the multipliers,
where zero points and biases are added), and all of the vector unit, was measured on the HTP
emulator of onnxruntime-qnn 2.7.0, with single operators: docs/integer.md gives the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.requantize import Requantizer
from onnxqat.evaluation.integer.rounding import Int64Array, round_levels

__all__ = ["add_on_vectors", "concatenate_on_vectors", "convert_sums"]

SIGNIFICAND_BITS = 11
BYTE = 8  # bits; 16-bit sums are kept in two halves
SUM_BITS = 14  # of a multiplier of an Add
WORD_BITS = 15  # of a multiplier of a rescaled tensor
FRACTION_BITS = 6  # behind the point of a rescaled tensor
NARROW = 8  # bits of the integers that the vector unit's formulas below were measured for

Scale = NDArray[np.floating[Any]]


def convert_sums(
    scale: Scale,
    output: Grid,
    *,
    bias: Int64Array | None = None,
    offsets: Int64Array | None = None,
) -> Requantizer:
    """Return the function that converts int64 sums of products to centered output integers.

    With M = m * 2**e, m rounded to 11 bits: the sums, and round(zero_point / M), are shifted by e
    so that half as many bits as the output has stay behind the point. What lies behind these is
    cut off. Then they are multiplied by m, and half is rounded up. Sums of 16-bit activations are
    divided by 256 first: the sums of the integers themselves and the bias are rounded down, the
    share of the input's zero point to the nearest.

    Parameters
    ----------
    scale : float64
        M = s_x * s_w / s_y, broadcastable to the sums.
    output : Grid
        Grid of the output.
    bias : int64, optional
        The bias that the sums include.
    offsets : int64, optional
        The input's zero point times the sum of the weights. Read for outputs of 16 bits.
    """
    bits = output.spec.bits
    zero_point = np.int64(output.params.zero_point)
    wide = np.asarray(scale, np.float64)
    zero = np.rint(zero_point / wide).astype(np.int64)
    if bits <= NARROW:
        significand, places = _significand(wide, bits)
        return lambda sums: _scaled(sums + zero, significand, places, bits) - zero_point
    significand, places = _significand(wide * 2**BYTE, bits)
    added = np.int64(0) if bias is None else bias
    moved = np.int64(0) if offsets is None else offsets
    constant = ((added + zero) >> BYTE) + ((2 ** (BYTE - 1) - moved) >> BYTE)
    return lambda sums: (
        _scaled(((sums - added + moved) >> BYTE) + constant, significand, places, bits) - zero_point
    )


def _significand(scale: Scale, bits: int) -> tuple[Int64Array, Int64Array]:
    """Return m of 11 bits, and by how many places sums are shifted left."""
    exponent = np.floor(np.log2(scale))
    significand = np.rint(scale / 2.0**exponent * 2 ** (SIGNIFICAND_BITS - 1))
    return significand.astype(np.int64), exponent.astype(np.int64) + bits // 2


def _scaled(sums: Int64Array, significand: Int64Array, places: Int64Array, bits: int) -> Int64Array:
    shifted = (sums << np.maximum(places, 0)) >> np.maximum(-places, 0)
    last = bits // 2 + SIGNIFICAND_BITS - 1
    return np.asarray((shifted * significand + (np.int64(1) << (last - 1))) >> last)


def add_on_vectors(
    operands: Sequence[Grid], output: Grid, *, subtract: bool = False
) -> Callable[..., Int64Array]:
    """Return a kernel for Add or Sub: two arrays of integers -> centered output integers.

    Both integers are multiplied, with their zero points, by integers of 14 bits at one shift. The
    zero points become one constant, a multiple of 256. Half is rounded up. Wider integers than 8
    bits, whose arithmetic was not found out, are computed exactly.
    """
    first, second = operands
    sign = -1 if subtract else 1
    ratios = [np.float64(g.scale) / np.float64(output.scale) for g in operands]
    if output.spec.bits > NARROW:
        return lambda x, y: round_levels(
            first.centered(x) * ratios[0] + sign * (second.centered(y) * ratios[1]), "half-up"
        )
    largest = max(ratios) if subtract else sum(ratios)
    shift = SUM_BITS - 1 - int(np.floor(np.log2(largest)))
    a, b = (int(np.rint(np.ldexp(ratio, shift))) for ratio in ratios)
    b *= sign
    zeros = [int(g.params.zero_point) for g in (*operands, output)]
    constant = np.ldexp(zeros[2], shift) - zeros[0] * a - zeros[1] * b
    rounded = np.floor(constant / 2**BYTE + 0.5) * 2**BYTE + np.ldexp(0.5, shift)

    def kernel(x: NDArray[Any], y: NDArray[Any]) -> Int64Array:
        sums = x.astype(np.float64) * a + y.astype(np.float64) * b + rounded
        return np.asarray(np.floor(np.ldexp(sums, -shift)), np.int64) - zeros[2]

    return kernel


def concatenate_on_vectors(
    operands: Sequence[Grid], output: Grid, axis: int
) -> Callable[..., Int64Array]:
    """Return a kernel for Concat: arrays of integers -> centered output integers.

    Each is rescaled: multiplied by an integer of 15 bits, half rounded up so that 6 bits stay
    behind the point (fewer if the ratio of the scales is 2 or more), then half rounded up again.
    Wider integers than 8 bits, whose arithmetic was not found out, are rounded once.
    """
    rescale = [_rescaler(grid, output) for grid in operands]
    return lambda *arrays: np.concatenate(
        [one(x) for one, x in zip(rescale, arrays, strict=True)], axis=axis
    )


def _rescaler(grid: Grid, output: Grid) -> Callable[[NDArray[Any]], Int64Array]:
    ratio = np.float64(grid.scale) / np.float64(output.scale)
    if output.spec.bits > NARROW:
        return lambda x: round_levels(grid.centered(x) * ratio, "half-up")
    exponent = int(np.floor(np.log2(ratio)))
    shift = WORD_BITS - 1 - exponent
    multiplier = np.rint(np.ldexp(ratio, shift))
    behind = FRACTION_BITS - max(exponent, 0)

    def rescale(x: NDArray[Any]) -> Int64Array:
        products = np.ldexp(grid.centered(x) * multiplier, behind - shift)
        return round_levels(np.ldexp(np.floor(products + 0.5), -behind), "half-up")

    return rescale
