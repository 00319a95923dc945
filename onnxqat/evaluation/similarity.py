"""Similarity of two signals, from running sums in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Similarity", "decibels"]


def decibels(ratio: float) -> float:
    """Return ``10 log10(ratio)``; -inf for 0, inf for inf, NaN for negative ratios.

    Examples
    --------
    >>> decibels(100.0)
    20.0
    """
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf if ratio == 0 else math.nan


class Similarity:
    """Running sums of a reference x and its approximation y; the memory is constant."""

    def __init__(self) -> None:
        self.signal = self.noise = self.product = self.other = 0.0
        self.equal = True

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Add a part of both, of the same shape."""
        first, second = (np.asarray(v, np.float64).reshape(-1) for v in (x, y))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = first - second
            self.signal += float(first @ first)
            self.noise += float(difference @ difference)
            self.product += float(first @ second)
            self.other += float(second @ second)
        self.equal = self.equal and bool(np.array_equal(first, second))

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB, ``10 log10(sum x^2 / sum (x - y)^2)``.

        Infinite if both are equal.
        """
        if self.equal:
            return math.inf
        # the squares of very small differences can underflow to 0: the ratio is then unknown
        return decibels(self.signal / self.noise) if self.noise else math.nan

    @property
    def cosine(self) -> float:
        """``sum x y / sqrt(sum x^2 sum y^2)``; 1 if both are equal, NaN if one is all zero."""
        if self.equal:
            return 1.0
        size = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.product / size if size else math.nan
