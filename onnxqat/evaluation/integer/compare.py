"""Differences between an integer program and the fake-quantized model, by point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counts", "PointDifference"]


@dataclass(frozen=True, kw_only=True)
class PointDifference:
    """Differences of one tensor's integers from those of the fake-quantized model.

    Attributes
    ----------
    tensor : str
        Name of the tensor.
    differing, max_levels : float, int
        Fraction of the values that differ, and the largest difference, when the step that computes
        the tensor reads the integers of the fake-quantized model.
    bias_differing : float
        Fraction of the values that differ only because the bias is rounded.
    end_differing, end_max_levels : float, int
        The same in a run of the whole program, where the differences of earlier steps add up.
    """

    tensor: str
    differing: float
    max_levels: int
    bias_differing: float
    end_differing: float
    end_max_levels: int


@dataclass
class Counts:
    """Running sums of one point."""

    total: int = 0
    differing: int = 0
    max_levels: int = 0
    bias: int = 0
    end_differing: int = 0
    end_max_levels: int = 0

    def add(self, expected: NDArray[Any], alone: NDArray[Any], end: NDArray[Any]) -> None:
        """Add one batch: integers of the reference, of the step alone, of the whole program."""
        self.total += expected.size
        for name, found in (("", alone), ("end_", end)):
            levels = np.abs(found.astype(np.int32) - expected.astype(np.int32))
            largest = max(getattr(self, f"{name}max_levels"), int(levels.max(initial=0)))
            differing = getattr(self, f"{name}differing") + int(np.count_nonzero(levels))
            setattr(self, f"{name}max_levels", largest)
            setattr(self, f"{name}differing", differing)

    def result(self, tensor: str) -> PointDifference:
        """Return the differences over all batches."""
        total = max(self.total, 1)
        return PointDifference(
            tensor=tensor,
            differing=self.differing / total,
            max_levels=self.max_levels,
            bias_differing=self.bias / total,
            end_differing=self.end_differing / total,
            end_max_levels=self.end_max_levels,
        )
