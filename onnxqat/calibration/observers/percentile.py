"""Ranges that leave out a share of the values."""

from __future__ import annotations

from typing import final

from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.errors import PlanError
from onnxqat.qparams import QuantSpec

__all__ = ["PercentileObserver"]


@final
class PercentileObserver(Observer):
    """Leaves out the same share of elements at either end.

    Exact to one bin of the histogram: 1/4096 of the largest magnitude, or finer. Where so few
    elements differ from zero that both ends fall on zero, the whole observed range is taken,
    since a range of no width would turn every value into zero. TensorRT's percentile calibration
    takes ``|x|`` instead, which wastes levels on one-sided tensors.

    Parameters
    ----------
    percentile : float
        Percent of the elements that do not lie above ``high``, and likewise below ``low``;
        above 50 and at most 100.

    Raises
    ------
    PlanError
        ``percentile`` lies outside.
    """

    keeps_histogram = True

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", percentile: float = 99.99) -> None:
        super().__init__(spec, name=name)
        if not 50 < percentile <= 100:
            raise PlanError(
                f"{name}: percentile {percentile} is not in (50, 100]. Choose one that is."
            )
        self._fraction = percentile / 100

    def pick(self, seen: Seen) -> Range:
        """Return the two percentiles."""
        low, high = seen.histogram.ends(self._fraction)
        if low == high == 0.0:
            return seen.low, seen.high
        return max(low, seen.low), min(high, seen.high)
