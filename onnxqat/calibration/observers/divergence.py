"""Ranges that preserve the distribution of magnitudes: least Kullback-Leibler divergence.

For a threshold ``t``, the histogram of ``|x|`` gives two distributions. In P, the counts beyond
``t`` are added to the last bin below ``t``. In Q, the counts of each quantization level are spread
evenly over the occupied bins of the level. The threshold with the least
``KL(P || Q) = sum P log(P / Q)`` is chosen (Migacz, "8-bit inference with TensorRT", 2017). The
tools that use this method differ in bins and candidates, therefore there are two observers. Exact
zeros are not counted in any bin.
"""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from onnxqat.calibration.observers.base import Observer, Range, Seen, levels_above_zero

__all__ = ["TensorrtDivergenceObserver", "TpuMlirDivergenceObserver"]

BINS = 2048
FIRST = 128  # bins of the smallest candidate in TensorRT's method
TIED = 1e-9  # divergences closer than this count as equal, in nats; rounding is below 1e-12
SMALLEST = 1e-30  # added to probabilities before taking the logarithm, as in tpu-mlir


@final
class TensorrtDivergenceObserver(Observer):
    """TensorRT's method, as in NVIDIA's pytorch-quantization: try every threshold from bin 128 on.

    If several thresholds have the least divergence, the largest one is chosen. The count of the
    first bin is set to that of the second (NVIDIA/TensorRT,
    tools/pytorch-quantization/pytorch_quantization/calib/histogram.py, ``_compute_amax_entropy``).
    There the first batch determines the width of a bin. Here the width is the power of two for
    which the largest magnitude lies in one of the bins 1,025 to 2,048. The order of the data
    therefore does not matter, and the bins are exact.
    """

    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the observed range, clipped at the threshold with the least divergence."""
        width, counts = seen.histogram.magnitudes(BINS)
        if counts.size < 2:
            return seen.low, seen.high
        counts[0] = counts[1]
        first = min(FIRST, counts.size)
        levels = levels_above_zero(self._spec, seen.low)
        sums = _Sums(counts)
        candidates = range(first, counts.size + 1)
        divergences = np.array([sums.divergence(i, levels) for i in candidates])
        best = int(np.flatnonzero(divergences <= divergences.min() + TIED)[-1])
        return seen.cut((first + best) * width)


class _Sums:
    """Running sums over bins, which give the divergence of a candidate in one step per level.

    Parameters
    ----------
    counts : int64 of shape (n,)
        Counts of the bins.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self._counts = counts.astype(np.float64)
        occupied = self._counts > 0
        logs = np.log(self._counts, where=occupied, out=np.zeros_like(self._counts))
        self._inside = _running(self._counts)
        self._occupied = _running(occupied.astype(np.float64))
        self._entropy = _running(self._counts * logs)

    def divergence(self, bins: int, levels: int) -> float:
        """Return ``KL(P || Q)`` in nats for the candidate with the first ``bins`` bins as range.

        Level m has the bins from ``ceil(bins * m / levels)`` on. Its count is spread evenly over
        its occupied bins.
        """
        total, inside = self._inside[-1], self._inside[bins]
        beyond, last = total - inside, self._counts[bins - 1]
        if inside == 0 or (last == 0 and beyond > 0):
            return np.inf  # P is positive where Q is zero
        ends = -(-bins * np.arange(levels + 1) // levels)
        count, occupied = np.diff(self._inside[ends]), np.diff(self._occupied[ends])
        share = count[count > 0] / occupied[count > 0]
        p_log_p = self._entropy[bins] - _x_log_x(last) + _x_log_x(last + beyond)
        p_log_q = float((count[count > 0] * np.log(share)).sum())
        if beyond > 0:
            p_log_q += beyond * float(np.log(share[-1]))
        return float((p_log_p - p_log_q) / total - np.log(total) + np.log(inside))


def _running(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of the first 0, 1, ... n values, of shape (n + 1,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _x_log_x(x: float) -> float:
    return float(x * np.log(x)) if x > 0 else 0.0


@final
class TpuMlirDivergenceObserver(Observer):
    """tpu-mlir's method: 2,048 bins; in each candidate all levels have the same number of bins.

    Bin j holds the magnitudes nearest to ``j * width``, with ``width = absmax / 2047``. At 8 bits
    there are 16 candidates of 128, 256, ... 2,048 bins, and the first of the best is chosen
    (sophgo/tpu-mlir, bindings/kld/calibration_math.cpp, ``kl_calc_thread``). The bins are computed
    from a histogram with bins of at most half the width; the count of a bin that a border divides
    is assumed to be spread evenly over it.
    """

    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the observed range, clipped at the threshold with the least divergence."""
        largest = max(-seen.low, seen.high)
        if largest == 0:
            return seen.low, seen.high
        width = largest / (BINS - 1)
        counts = _nearest_bins(seen, width)
        levels = min(2 ** (self._spec.bits - 1), BINS)
        candidates = range(levels, BINS + 1, levels)
        best = int(np.argmin([_divergence(counts, bins, levels) for bins in candidates]))
        return seen.cut(candidates[best] * width)


def _nearest_bins(seen: Seen, width: float) -> NDArray[np.float64]:
    """Return how many magnitudes are nearest to each multiple of ``width``, of shape (2048,)."""
    finer, counts = seen.histogram.magnitudes()
    edges = np.arange(counts.size + 1) * finer
    borders = np.append((np.arange(BINS) - 0.5) * width, np.inf)
    return np.diff(np.interp(borders, edges, _running(counts.astype(np.float64))))


def _divergence(counts: NDArray[np.float64], bins: int, levels: int) -> float:
    """Return ``KL(P || Q)`` with logarithms to base 10; each level has ``bins / levels`` bins."""
    inside = counts[:bins]
    p = inside.copy()
    p[-1] += counts[bins:].sum()
    p /= max(counts.sum(), 1.0)
    by_level = inside.reshape(levels, -1)
    share = by_level.sum(axis=1) / np.maximum((by_level > 0).sum(axis=1), 1)
    q = np.where(by_level > 0, share[:, None], 0.0).reshape(-1) / max(inside.sum(), 1.0)
    return float((p * (np.log10(p + SMALLEST) - np.log10(q + SMALLEST))).sum())
