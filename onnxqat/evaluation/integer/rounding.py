"""Rounding modes of the rules: ties to even, away from zero, or up; and always down."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.rules import ShiftRounding

__all__ = ["Int64Array", "divide", "round_levels", "shift_right"]

Int64Array: TypeAlias = NDArray[np.int64]


def round_levels(values: NDArray[Any], rounding: ShiftRounding) -> Int64Array:
    """Return float32 or float64 ``values`` rounded to integers, same shape."""
    if rounding == "half-even":
        return np.asarray(np.rint(values), np.int64)
    wide = values.astype(np.float64)
    if rounding == "floor":
        return np.asarray(np.floor(wide), np.int64)
    if rounding == "half-up":
        return np.asarray(np.floor(wide + 0.5), np.int64)
    return np.asarray(np.sign(wide) * np.floor(np.abs(wide) + 0.5), np.int64)


def shift_right(values: Int64Array, shift: Int64Array | int, rounding: ShiftRounding) -> Int64Array:
    """Return ``values / 2**shift``, rounded; a negative shift shifts left.

    Parameters
    ----------
    values : int64
        Below 2**62 in magnitude.
    shift : int64
        Broadcastable to ``values``; -32 to 62.

    Examples
    --------
    >>> [shift_right(np.int64([-3, -1, 1, 3]), 1, r).tolist() for r in ("half-even", "half-up")]
    [[-2, 0, 0, 2], [-1, 0, 1, 2]]
    >>> shift_right(np.int64([-3, -1, 1, 3]), 1, "half-away").tolist()
    [-2, -1, 1, 2]
    """
    shift = np.asarray(shift, np.int64)
    if shift.min(initial=0) < 0:
        values = values << np.maximum(-shift, 0)
        shift = np.maximum(shift, 0)
    if rounding == "floor":
        return np.asarray(values >> shift)
    half = (np.int64(1) << shift) >> 1
    if rounding == "half-up":
        return np.asarray((values + half) >> shift)
    down = values < 0 if rounding == "half-away" else ((values >> shift) & 1) == 0
    return np.asarray((values + half - (down & (shift > 0))) >> shift)


def divide(values: Int64Array, divisor: Int64Array | int) -> Int64Array:
    """Return ``values / divisor`` rounded half away from zero, for a positive divisor."""
    return np.asarray(np.sign(values) * ((np.abs(values) + np.asarray(divisor) // 2) // divisor))
