"""Ranges with the least mean squared quantization error, from clipping and rounding together.

Nagel et al. 2021, https://arxiv.org/abs/2106.08295, section 2.3.1, equation 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.calibration.observers.histogram import Histogram
from onnxqat.qparams import QuantSpec, choose_qparams, quantized_range

__all__ = ["MseObserver", "SquaredError"]

Doubles: TypeAlias = NDArray[np.float64]
Candidates: TypeAlias = Callable[[Doubles], tuple[Doubles, Doubles]]  # of factors: low, high ends

_COARSE = 2.0 ** (-np.arange(128) / 16)  # 1 down to 0.004, 4 % apart
_FINE = 2.0 ** (np.arange(-16, 17) / 256)  # one coarse step to either side, 0.3 % apart


@final
class MseObserver(Observer):
    """Chooses the range with the least quantization error, from clipping and rounding together.

    Candidates are evaluated on the histogram with the parameters that `choose_qparams` gives them.
    First the range ``[low, high]`` of the data is clipped to ``[-t, t]`` for 128 thresholds ``t``,
    then for 33 thresholds around the best one. For an asymmetric spec, each end is then searched
    alone, coarse and fine, twice. Values are assumed to be spread evenly over their bin, and the
    error is integrated exactly, so that a step smaller than a bin still costs ``step² / 12``. Exact
    zeros have no error.
    """

    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the range with the least error that the search finds."""
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        magnitude = max(-low, high)
        if magnitude == 0:
            return low, high
        error = SquaredError(seen.histogram, self._spec)

        def cut(factors: Doubles) -> tuple[Doubles, Doubles]:
            t = magnitude * factors
            return np.maximum(low, -t), np.minimum(high, t)

        best = _search(cut, error)
        if not self._spec.symmetric:
            best = _search_ends(_search_ends(best, error), error)
        return best


class SquaredError:
    """The squared quantization error of ranges for the values in a histogram.

    A range gets the parameters that `choose_qparams` returns for it in float32. Values are assumed
    to be spread evenly over their bin; exact zeros have no error.

    With ``u = x / scale``, ``k = clip(round(u), qmin - z, qmax - z)`` and ``d = u - k``, the
    integral of ``d²`` from 0 to ``u`` is ``k / 12 + d³ / 3``: every whole cell adds 1/12, and
    beyond the last level ``d`` keeps growing, which is the clipping error. The error of a bin is
    its count times the difference of this integral between its edges. Summed over all bins, this is
    a sum over edges, each weighted by the difference of the counts on its two sides.
    """

    def __init__(self, histogram: Histogram, spec: QuantSpec) -> None:
        self._spec = spec
        self._edges, counts = histogram.occupied()
        self._steps = -np.diff(counts, prepend=0, append=0) / 12
        self._width = histogram.width
        self._above = _Tail(self._edges, counts, self._width)
        self._below = _Tail(-self._edges[::-1], counts[::-1], self._width)

    def least(self, lows: Doubles, highs: Doubles) -> int:
        """Return the index of the range with the least error; the first if several are equal.

        A range is skipped if its clipping error alone exceeds the least error so far.

        Parameters
        ----------
        lows, highs : float64 of shape (n,)
            Ends of the ranges, in the units of the tensor.
        """
        scales, lowest, highest = self._grids(lows, highs)
        clipped = self._above.errors(highest * scales) + self._below.errors(-lowest * scales)
        best, least = 0, np.inf
        for index, bound in enumerate(clipped.tolist()):
            if bound < least:
                error = self._error(scales[index], lowest[index], highest[index])
                if error < least:
                    best, least = index, error
        return best

    def of(self, low: float, high: float) -> float:
        """Return the error of one range, summed over all values, in squared units of the tensor."""
        scales, lowest, highest = self._grids(np.array([low]), np.array([high]))
        return self._error(scales[0], lowest[0], highest[0])

    def _grids(self, lows: Doubles, highs: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Return the scales of ranges, and their lowest and highest levels minus the zero_point."""
        low, high = lows.astype(np.float32), highs.astype(np.float32)
        params = choose_qparams(low, high, self._spec)
        qmin, qmax = quantized_range(self._spec, signed=params.signed)
        zero_points = params.zero_point.astype(np.float64)
        return params.scale.astype(np.float64), qmin - zero_points, qmax - zero_points

    def _error(self, scale: float, lowest: float, highest: float) -> float:
        d = self._edges / scale
        k = np.rint(d)
        np.maximum(k, lowest, out=k)
        np.minimum(k, highest, out=k)
        d -= k
        cube = d * d
        cube *= d
        cube *= 4
        cube += k
        cube *= self._steps
        # not a dot product: a threaded BLAS is slow here, and its rounding depends on the machine
        return float(cube.sum() * (scale / self._width) * (scale * scale))


class _Tail:
    """Running sums that give the clipping error above a threshold.

    Parameters
    ----------
    edges : float64 of shape (n + 1,)
        Edges of the bins, evenly spaced, ascending.
    counts : int64 of shape (n,)
        Counts of the bins.
    width : float
        Width of a bin.
    """

    def __init__(self, edges: Doubles, counts: NDArray[np.int64], width: float) -> None:
        self._starts = edges[:-1]
        middles = (edges[:-1] + edges[1:]) / 2
        weights = counts.astype(np.float64)
        squares = weights * (middles * middles + width * width / 12)
        self._sums = [
            np.append(np.cumsum(values[::-1])[::-1], 0.0)
            for values in (weights, weights * middles, squares)
        ]

    def errors(self, thresholds: Doubles) -> Doubles:
        """Return the sum of ``(x - t)²`` over the bins entirely above ``t``, for each threshold."""
        at = np.searchsorted(self._starts, thresholds)
        counts, firsts, seconds = (sums[at] for sums in self._sums)
        return np.asarray(seconds - 2 * thresholds * firsts + thresholds * thresholds * counts)


def _search(candidates: Candidates, error: SquaredError) -> Range:
    """Return the candidate with the least error over a coarse grid of factors, then a fine one.

    The factor 1 is tried first, and only a smaller error replaces the best one. The result is
    therefore never worse than the range that the search starts from.
    """

    def least(factors: Doubles) -> Doubles:
        """Return the best factor, of shape (1,)."""
        best = error.least(*candidates(factors))
        return factors[best : best + 1]

    coarse = least(_COARSE)
    low, high = candidates(least(np.concatenate([coarse, np.minimum(coarse * _FINE, 1.0)])))
    return float(low[0]), float(high[0])


def _search_ends(best: Range, error: SquaredError) -> Range:
    """Search the high end alone, then the low end alone, both towards zero."""
    low, high = best
    low, high = _search(lambda factors: (np.full_like(factors, low), high * factors), error)
    return _search(lambda factors: (low * factors, np.full_like(factors, high)), error)
