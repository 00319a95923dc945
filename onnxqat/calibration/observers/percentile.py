"""Ranges that leave out a fraction of the values at each end."""

from __future__ import annotations

from typing import final

from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.errors import PlanError
from onnxqat.qparams import QuantSpec

__all__ = ["PercentileObserver"]


@final
class PercentileObserver(Observer):
    """Leaves out the same fraction of values at each end.

    The ends are exact to one bin of the histogram: 1/4096 of the largest magnitude, or finer. If so
    few values differ from zero that both ends would be zero, the whole observed range is chosen,
    because a range of zero width would turn every value into zero. TensorRT's percentile
    calibration uses ``|x|`` instead, which wastes levels on one-sided tensors.

    Parameters
    ----------
    percentile : float
        Percentage of the values that are at most ``high``, and of those that are at least ``low``;
        above 50 and at most 100.

    Raises
    ------
    PlanError
        ``percentile`` is not in (50, 100].
    """

    keeps_histogram = True

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", percentile: float = 99.99) -> None:
        super().__init__(spec, name=name)
        if not 50 < percentile <= 100:
            raise PlanError(
                f"{name}: percentile {percentile} is not in (50, 100]. Choose another one."
            )
        self._fraction = percentile / 100

    def pick(self, seen: Seen) -> Range:
        """Return the two percentiles."""
        low, high = seen.histogram.ends(self._fraction)
        if low == high == 0.0:
            return seen.low, seen.high
        return max(low, seen.low), min(high, seen.high)
