"""Ranges from the moments of a tensor: ACIQ, Banner et al. 2019, https://arxiv.org/abs/1810.05723.

The values are assumed to follow a known density around a centre. With clipping at a distance ``a``
from the centre and ``L`` levels on each side (so steps of ``a / L``), the mean squared error of
clipping and rounding is (section 3)::

    Laplace    2 b² exp(-a / b) + a² / (12 L²)
    Gauss      (a² + s²) erfc(a / (√2 s)) - √(2/π) a s exp(-a² / (2 s²)) + a² / (12 L²)

Here ``b`` is the mean absolute deviation, and ``s`` the standard deviation.

``L`` is 2^(M - 1) for M bits, or 2^M for a tensor without negative values. Such a tensor is treated
as one half of a density around 0, whose other half a Relu turned into exact zeros; these zeros are
left out of the moments. With t = a / b and t = a / s, the derivatives are zero where::

    Laplace    t exp(t) = 12 L²
    Gauss      2 t erfc(t / √2) - 2 √(2/π) exp(-t² / 2) + t / (6 L²) = 0

The centre is 0 for a symmetric spec, else the mean. The moments are computed from the bin centres
of a histogram, so mean and deviations are off by at most one bin: 1/4096 of the largest magnitude.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np

from onnxqat.calibration.observers.base import Observer, Range, Seen, levels_above_zero

__all__ = ["GaussObserver", "LaplaceObserver"]

LARGEST = 64.0  # t exp(t) exceeds 12 * 2**32 there, and a Gaussian density is 0


class Moments(NamedTuple):
    """Centre of a tensor's values, and their mean absolute and quadratic deviation from it."""

    centre: float
    absolute: float
    quadratic: float


def _moments(seen: Seen, *, about_zero: bool) -> Moments:
    """Return the moments; for a tensor without negative values, without its zeros."""
    edges, counts = seen.histogram.occupied()
    values, weights = (edges[:-1] + edges[1:]) / 2, counts.astype(np.float64)
    if seen.low < 0:
        values, weights = np.append(values, 0.0), np.append(weights, float(seen.histogram.zeros))
    total = weights.sum()
    if total == 0:
        return Moments(0.0, 0.0, 0.0)
    centre = 0.0 if about_zero or seen.low >= 0 else float((weights * values).sum() / total)
    off = values - centre
    absolute = float((weights * np.abs(off)).sum() / total)
    return Moments(centre, absolute, math.sqrt(float((weights * off * off).sum() / total)))


def root(f: Callable[[float], float]) -> float:
    """Return the zero of an increasing function between 0 and `LARGEST`, by bisection."""
    below, above = 0.0, LARGEST
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if f(middle) < 0 else (below, middle)
    return above


class _AnalyticObserver(Observer):
    """The common part of the observers for the two densities."""

    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the observed range, clipped at the best distance from the centre."""
        moments = _moments(seen, about_zero=self._spec.symmetric)
        reach = self._reach(moments, levels_above_zero(self._spec, seen.low))
        centre = moments.centre
        if not self._spec.symmetric:  # computed from bins, it may lie just outside the range
            centre = min(max(centre, seen.low), seen.high)
        return max(seen.low, centre - reach), min(seen.high, centre + reach)

    @abstractmethod
    def _reach(self, moments: Moments, levels: int) -> float:
        """Return the distance from the centre at which to clip."""


@final
class LaplaceObserver(_AnalyticObserver):
    """Chooses the range with the least error for values with a Laplace density."""

    def _reach(self, moments: Moments, levels: int) -> float:
        wanted = math.log(12 * levels**2)
        return moments.absolute * root(lambda t: t + math.log(t) - wanted)


@final
class GaussObserver(_AnalyticObserver):
    """Chooses the range with the least error for values with a Gaussian density."""

    def _reach(self, moments: Moments, levels: int) -> float:
        def slope(t: float) -> float:
            density = 2 * math.sqrt(2 / math.pi) * math.exp(-t * t / 2)
            return 2 * t * math.erfc(t / math.sqrt(2)) - density + t / (6 * levels**2)

        return moments.quadratic * root(slope)
