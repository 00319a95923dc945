"""Sums of operands of two scales on Horizon's BPU, which brings them to one scale first.

Source: horizon_plugin_pytorch 2.5.9, horizon_plugin_pytorch/nn/quantized/functional_impl.py,
``_add``, ``_sub`` and the formula of ``_conv_transpose2d``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.requantize import requantizer
from onnxqat.evaluation.integer.rounding import Int64Array
from onnxqat.rules import Arithmetic

__all__ = ["add_scaled", "sum_factors"]

Levels: TypeAlias = NDArray[Any]
MOST_SHIFT = 23  # of operands of 8 bits
MOST_FACTOR = 2**15 - 1
LEAST_RATIO = 16  # below this, a whole number is too coarse a factor


def add_scaled(
    a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic, sign: int
) -> Callable[[Levels, Levels], Int64Array]:
    """Return a kernel for ``a + sign * b`` by ``shift-one`` or ``multiply-both``."""
    if arithmetic.add == "shift-one":
        return _shift_one(a, b, output, arithmetic, sign)
    return _multiply_both(a, b, output, arithmetic, sign)


def _shift_one(
    a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic, sign: int
) -> Callable[[Levels, Levels], Int64Array]:
    """``(x << n) + y * q``: the operand of the larger scale is shifted as far as it goes."""
    swapped = bool(b.scale / a.scale > a.scale / b.scale)
    large, small = (b, a) if swapped else (a, b)
    most = np.floor(np.log2(np.float32(MOST_FACTOR) * large.scale / small.scale))
    shift = min(int(most), MOST_SHIFT)
    wanted = sign * small.scale * np.float32(2**shift) / large.scale
    factor = int(np.clip(np.floor(wanted + np.float32(0.5)), -MOST_FACTOR, MOST_FACTOR))
    scale = large.scale / np.float32(2**shift) * np.float32(sign if swapped else 1)
    finish = requantizer(arithmetic, np.asarray(scale / output.scale), arithmetic.operand_bits)

    def kernel(x: Levels, y: Levels) -> Int64Array:
        first, second = (y, x) if swapped else (x, y)
        shifted = large.centered(first).astype(np.int64) << shift
        return finish(shifted + small.centered(second).astype(np.int64) * factor)

    return kernel


def _multiply_both(
    a: Grid, b: Grid, output: Grid, arithmetic: Arithmetic, sign: int
) -> Callable[[Levels, Levels], Int64Array]:
    """``x * w + (y << n) * q``: as the sum of a convolution with the weight w and an addend."""
    swapped = bool(a.scale > b.scale)
    small, large = (b, a) if swapped else (a, b)
    scale = np.maximum(small.scale / np.float32(127), large.scale / np.float32(2**25))
    weight = int(np.clip(_half_up(small.scale / scale), -128, 127))
    factor, shift = sum_factors(np.asarray(large.scale / scale))
    finish = requantizer(arithmetic, np.asarray(scale / output.scale), arithmetic.operand_bits)

    def kernel(x: Levels, y: Levels) -> Int64Array:
        wide = [a.centered(x).astype(np.int64), b.centered(y).astype(np.int64)]
        if sign < 0:  # -128 becomes 127
            wide[1] = np.clip(-wide[1], -128, 127)
        first, second = wide[::-1] if swapped else wide
        return finish(first * weight + (second << shift) * factor)

    return kernel


def sum_factors(ratio: NDArray[np.float32]) -> tuple[Int64Array, Int64Array]:
    """Return the integer of 16 bits and the shift that bring an addend to the scale of sums.

    Parameters
    ----------
    ratio : float32
        Scale of the addend divided by the scale of the sums.

    Raises
    ------
    RuleError
        The ratio is too small to be rounded to a whole number.
    """
    if np.min(ratio) < LEAST_RATIO:
        raise RuleError(
            f"The scale of an addend is only {np.min(ratio):.3g} times that of the sums; no source "
            "says how the chip adds it. Evaluate with --mode qdq."
        )
    mantissa, exponent = np.frexp(_half_up(ratio))
    wide = np.exp2(np.minimum(exponent, 15).astype(np.float32)) * mantissa
    factor = np.minimum(wide, MOST_FACTOR).astype(np.int64)
    return factor, np.maximum(exponent - 15, 0).astype(np.int64)


def _half_up(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.floor(values + np.float32(0.5)), np.float32)
