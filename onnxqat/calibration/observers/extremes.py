"""Ranges from the smallest and largest values: of all data, or of each batch."""

from __future__ import annotations

from typing import final

from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.errors import PlanError
from onnxqat.qparams import QuantSpec

__all__ = ["AverageObserver", "MinMaxObserver", "MovingAverageObserver"]


@final
class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""

    def pick(self, seen: Seen) -> Range:
        """Return the extremes of all data."""
        return seen.low, seen.high


@final
class MovingAverageObserver(Observer):
    """Exponential moving average of the minimum and maximum of each batch.

    ``m += constant * (batch_min - m)``, and the same for the maximum: PyTorch's
    ``MovingAverageMinMaxObserver`` and Horizon's default. The first batch is taken as it is. Every
    call of `update` counts as one batch, also where several tensors of a group feed one observer.

    Parameters
    ----------
    constant : float
        Weight of the new batch, above 0 and at most 1.

    Raises
    ------
    PlanError
        ``constant`` lies outside.
    """

    keeps_batches = True

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", constant: float = 0.01) -> None:
        super().__init__(spec, name=name)
        if not 0 < constant <= 1:
            raise PlanError(
                f"{name}: averaging constant {constant} is not in (0, 1]. Choose one that is."
            )
        self._constant = constant

    def pick(self, seen: Seen) -> Range:
        """Return the moving averages after the last batch."""
        low, high = seen.batches[0]
        for batch_low, batch_high in seen.batches[1:]:
            low += self._constant * (batch_low - low)
            high += self._constant * (batch_high - high)
        return low, high


@final
class AverageObserver(Observer):
    """Mean of the minimum and maximum of each batch, in which the first batch counts twice.

    This is ``use_avg`` of Cambricon's CATCH, which updates ``m = (m * n + batch_min) / (n + 1)``
    from the second batch on with n = 2, 3, ... (Cambricon/catch,
    torch_mlu/core/quantized/observer.py). There a batch is most often one image. Its
    ``data_scale`` is the ``range_factor`` of the spec.
    """

    keeps_batches = True

    def pick(self, seen: Seen) -> Range:
        """Return the means."""
        low, high = seen.batches[0]
        for n, (batch_low, batch_high) in enumerate(seen.batches[1:], start=2):
            low = (low * n + batch_low) / (n + 1)
            high = (high * n + batch_high) / (n + 1)
        return low, high
