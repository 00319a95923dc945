"""Ranges of least mean squared quantization error, clipping and rounding together.

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
    """The range whose quantization error, clipping and rounding together, is least.

    Searched over the histogram with the very parameters that `choose_qparams` gives each
    candidate: first ``[low, high]`` of the data cut to ``[-t, t]`` for 128 thresholds ``t``, then
    33 around the best; for an asymmetric spec then each end alone, coarse and fine, twice. What
    lies in a bin is taken to be spread evenly over it, and the error integrated exactly, so that
    a step finer than a bin still costs its ``step² / 12``. Exact zeros cost nothing.
    """

    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the range of least error that the search finds."""
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
    """The squared quantization error of ranges, over what a histogram holds.

    It is that of the parameters which `choose_qparams` gives a range in float32. What lies in a bin
    is taken to be spread evenly over it; exact zeros have no error.

    With ``u = x / scale``, ``k = clip(round(u), qmin - z, qmax - z)`` and ``d = u - k``, the
    integral of ``d²`` from 0 to ``u`` is ``k / 12 + d³ / 3``: every whole cell passed adds 1/12,
    and beyond the last level ``d`` simply keeps growing, which is the clipping error. The error is
    the sum over bins of their count times the difference of that integral between their edges; so
    it is a sum over edges, each with the difference of the counts to either side.
    """

    def __init__(self, histogram: Histogram, spec: QuantSpec) -> None:
        self._spec = spec
        self._edges, counts = histogram.occupied()
        self._steps = -np.diff(counts, prepend=0, append=0) / 12
        self._width = histogram.width
        self._above = _Tail(self._edges, counts, self._width)
        self._below = _Tail(-self._edges[::-1], counts[::-1], self._width)

    def least(self, lows: Doubles, highs: Doubles) -> int:
        """Return the index of the range of least error, of equal ones the first.

        A range is not looked at if what it clips alone costs more than the best so far.

        Parameters
        ----------
        lows, highs : float64 of shape (n,)
            In the units of the tensor.
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
        """Return the scales of ranges, and their outermost levels counted from zero."""
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
        # no dot product: a threaded BLAS makes it slow and its rounding depend on the machine
        return float(cube.sum() * (scale / self._width) * (scale * scale))


class _Tail:
    """Sums from which the clipping error above a threshold is read.

    Parameters
    ----------
    edges : float64 of shape (n + 1,)
        Evenly spaced, ascending.
    counts : int64 of shape (n,)
        Of the bins between them.
    width : float
        Of a bin.
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
        """Return the sums of ``(x - t)²`` over the bins that lie above ``t`` as a whole."""
        at = np.searchsorted(self._starts, thresholds)
        counts, firsts, seconds = (sums[at] for sums in self._sums)
        return np.asarray(seconds - 2 * thresholds * firsts + thresholds * thresholds * counts)


def _search(candidates: Candidates, error: SquaredError) -> Range:
    """Return the candidate of least error over a coarse grid of factors, then a fine one.

    The factor 1 comes first and only a smaller error replaces the best, so that the result is
    never worse than the range the search starts from.
    """

    def least(factors: Doubles) -> Doubles:
        """Return the best factor, of shape (1,)."""
        best = error.least(*candidates(factors))
        return factors[best : best + 1]

    coarse = least(_COARSE)
    low, high = candidates(least(np.concatenate([coarse, np.minimum(coarse * _FINE, 1.0)])))
    return float(low[0]), float(high[0])


def _search_ends(best: Range, error: SquaredError) -> Range:
    """Move the high end alone, then the low end alone, towards zero."""
    low, high = best
    low, high = _search(lambda factors: (np.full_like(factors, low), high * factors), error)
    return _search(lambda factors: (low * factors, np.full_like(factors, high)), error)
