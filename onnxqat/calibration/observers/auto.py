"""Choose the range with the least error from those of all other observers."""

from __future__ import annotations

from typing import final

import numpy as np

from onnxqat.calibration.observers.analytic import GaussObserver, LaplaceObserver
from onnxqat.calibration.observers.base import Observer, Range, Seen
from onnxqat.calibration.observers.divergence import (
    TensorrtDivergenceObserver,
    TpuMlirDivergenceObserver,
)
from onnxqat.calibration.observers.extremes import (
    AverageObserver,
    MinMaxObserver,
    MovingAverageObserver,
)
from onnxqat.calibration.observers.percentile import PercentileObserver
from onnxqat.calibration.observers.squared_error import MseObserver, SquaredError

__all__ = ["AutoObserver"]

CANDIDATES: tuple[type[Observer], ...] = (
    MinMaxObserver,
    MovingAverageObserver,
    AverageObserver,
    PercentileObserver,
    MseObserver,
    TensorrtDivergenceObserver,
    TpuMlirDivergenceObserver,
    GaussObserver,
    LaplaceObserver,
)


@final
class AutoObserver(Observer):
    """Chooses the range of any other observer with the least mean squared quantization error.

    The error is computed by `SquaredError`, as in `MseObserver`, so the range is never worse than
    that of `MseObserver`. If errors are equal, the first in the order of `CANDIDATES` is chosen.
    """

    keeps_batches = True
    keeps_histogram = True

    def pick(self, seen: Seen) -> Range:
        """Return the range with the least squared error."""
        ranges = [kind(self._spec, name=self._name).pick(seen) for kind in CANDIDATES]
        error = SquaredError(seen.histogram, self._spec)
        return ranges[int(np.argmin([error.of(*ends) for ends in ranges]))]
