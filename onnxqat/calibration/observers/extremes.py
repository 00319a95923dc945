"""Ranges from the smallest and largest values: of all data, or of each batch."""

from __future__ import annotations

from typing import final

from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.errors import PlanError
from onnxqat.qparams import QuantSpec

__all__ = ["AverageObserver", "MinMaxObserver", "MovingAverageObserver"]


@final
class MinMaxObserver(Observer):
    """Chooses the smallest and the largest value."""

    def pick(self, seen: Seen) -> Range:
        """Return the extremes of all data."""
        return seen.low, seen.high


@final
class MovingAverageObserver(Observer):
    """Chooses exponential moving averages of the minimum and maximum of each batch.

    ``m += constant * (batch_min - m)``, and the same for the maximum, starting from the first
    batch. This is PyTorch's ``MovingAverageMinMaxObserver`` and Horizon's default. Every call of
    `update` counts as one batch, even if several tensors of a group feed the observer.

    Parameters
    ----------
    constant : float
        Weight of the new batch, above 0 and at most 1.

    Raises
    ------
    PlanError
        ``constant`` is not in (0, 1].
    """

    keeps_batches = True

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", constant: float = 0.01) -> None:
        super().__init__(spec, name=name)
        if not 0 < constant <= 1:
            raise PlanError(
                f"{name}: averaging constant {constant} is not in (0, 1]. Choose another one."
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
    """Chooses the means of the minimum and maximum of each batch; the first batch counts twice.

    This is ``use_avg`` of Cambricon's CATCH, which updates ``m = (m * n + batch_min) / (n + 1)``
    from the second batch on with n = 2, 3, ... (Cambricon/catch,
    torch_mlu/core/quantized/observer.py). In CATCH a batch is usually one image. CATCH's
    ``data_scale`` corresponds to the ``range_factor`` of the spec.
    """

    keeps_batches = True

    def pick(self, seen: Seen) -> Range:
        """Return the means."""
        low, high = seen.batches[0]
        for n, (batch_low, batch_high) in enumerate(seen.batches[1:], start=2):
            low = (low * n + batch_low) / (n + 1)
            high = (high * n + batch_high) / (n + 1)
        return low, high
