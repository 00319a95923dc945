"""Histogram of a tensor's values with a fixed number of bins, for several observers.

Pure numpy, independent of specs and ranges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.qparams import FloatArray

__all__ = ["CHUNK", "Histogram"]

_HALF_BITS = 13
_HALF = 1 << _HALF_BITS  # bins on each side of zero; more than half of one side is used
CHUNK = 1 << 15  # best number of elements to count at a time
_SMALLEST_EXPONENT = -126  # of the bin width, because its inverse must be a float32


class Histogram:
    """Counts of values in bins of equal width; larger values double the width.

    Bin ``k`` holds ``[k * width, (k + 1) * width)``. Exact zeros are counted separately: a Relu
    produces many of them, and they must not be spread over a bin. The width is the smallest power
    of two that covers the largest magnitude. Therefore binning is exact in float32, doubling the
    width merges pairs of bins exactly, and the counts depend only on the values, not on their
    division into batches or histograms.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(2 * _HALF, np.int64)
        self._exponent = _SMALLEST_EXPONENT  # the bin width is 2**exponent
        self.zeros = 0
        self._scratch: tuple[FloatArray, NDArray[np.int16], NDArray[np.intp]] | None = None

    @property
    def width(self) -> float:
        """Width of a bin, in the units of the tensor."""
        return float(2.0**self._exponent)

    def add(self, x: FloatArray, magnitude: float) -> None:
        """Count the finite values ``x``, whose largest magnitude is ``magnitude``.

        Chunks of `CHUNK` values are fastest, because the temporaries then fit the cache.
        """
        if magnitude == 0:
            self.zeros += x.size
            return
        self._grow(int(np.frexp(magnitude)[1]) - _HALF_BITS)
        inverse = np.float32(2.0**-self._exponent)
        flat = x.reshape(-1)
        level, bins, index = self._temporaries(flat.size)
        np.multiply(flat, inverse, out=level)
        np.floor(level, out=level)
        if inverse < 1:  # only then can a negative value underflow to zero
            level[(flat < 0) & (level == 0)] = -1
        # convert by way of 16 bits, since numpy converts floats to 64 bits slowly
        np.copyto(bins, level, casting="unsafe")
        bins += np.int16(_HALF)
        np.copyto(index, bins)
        counts = np.bincount(index, minlength=2 * _HALF)
        zeros = int(np.count_nonzero(flat == 0))
        counts[_HALF] -= zeros
        self.zeros += zeros
        self._counts += counts

    def _temporaries(self, size: int) -> tuple[FloatArray, NDArray[np.int16], NDArray[np.intp]]:
        """Return temporary arrays, which the next call of `add` reuses."""
        if self._scratch is None or self._scratch[0].size < size:
            self._scratch = (
                np.empty(size, np.float32),
                np.empty(size, np.int16),
                np.empty(size, np.intp),
            )
        level, bins, index = self._scratch
        return level[:size], bins[:size], index[:size]

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``; the bins of ``other`` may be widened."""
        exponent = max(self._exponent, other._exponent)
        for histogram in (self, other):
            histogram._grow(exponent)
        self._counts += other._counts
        self.zeros += other.zeros

    def _grow(self, exponent: int) -> None:
        """Double the bin width until it is at least ``2**exponent``."""
        if exponent <= self._exponent:
            return
        # After this many doublings each side is one bin, and more doublings change nothing.
        doublings = min(exponent - self._exponent, _HALF_BITS)
        merged = self._counts.reshape(-1, 1 << doublings).sum(axis=1)
        half = _HALF >> doublings
        self._counts = np.zeros_like(self._counts)
        self._counts[_HALF - half : _HALF + half] = merged
        self._exponent = exponent

    def occupied(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return edges of shape (n + 1,) and counts of shape (n,) of all values except zeros."""
        used = np.flatnonzero(self._counts)
        first, last = (int(used[0]), int(used[-1])) if used.size else (_HALF, _HALF - 1)
        edges = np.arange(first - _HALF, last + 2 - _HALF, dtype=np.float64) * self.width
        return edges, self._counts[first : last + 1]

    def magnitudes(self, most: int = _HALF) -> tuple[float, NDArray[np.int64]]:
        """Return the bin width and counts of shape (n,) of a histogram of the magnitudes.

        Exact zeros and trailing empty bins are left out. Bins are merged, so that there are at most
        ``most``, a power of two. A magnitude on the border of two bins is counted in the lower bin
        for a negative value, and in the higher bin for a positive value.
        """
        folded = self._counts[_HALF:] + self._counts[_HALF - 1 :: -1]
        counts: NDArray[np.int64] = folded.reshape(most, -1).sum(axis=1)
        last = int(np.flatnonzero(counts)[-1]) if counts.any() else -1
        return self.width * (_HALF // most), counts[: last + 1]

    def ends(self, fraction: float) -> tuple[float, float]:
        """Return ``(low, high)``: ``fraction`` of the values are at most high, or at least low.

        The ends are interpolated linearly within a bin, so each is off by less than `width`.
        """
        edges, counts = self.occupied()
        at = int(np.searchsorted(edges[:-1], 0.0))  # bins at or above zero start here
        left, right = np.insert(edges[:-1], at, 0.0), np.insert(edges[1:], at, 0.0)
        counts = np.insert(counts, at, self.zeros)
        low = _quantile(-right[::-1], -left[::-1], counts[::-1], fraction)
        return 0.0 - low, _quantile(left, right, counts, fraction)


def _quantile(
    left: NDArray[np.float64], right: NDArray[np.float64], counts: NDArray[Any], fraction: float
) -> float:
    """Return the ``fraction`` quantile of the counts, interpolated linearly within a bin."""
    total = np.cumsum(counts)
    target = fraction * float(total[-1])
    at = int(np.searchsorted(total, target))
    inside = (target - float(total[at] - counts[at])) / max(float(counts[at]), 1.0)
    return float(left[at] + min(max(inside, 0.0), 1.0) * (right[at] - left[at]))
