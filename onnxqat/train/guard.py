"""The losses of a run, and whether they rise."""

from __future__ import annotations

import math

import msgspec
import numpy as np

__all__ = ["GUARD_STEPS", "LossHistory"]

# The mean loss of the last steps is compared with that of as many at the start.
GUARD_STEPS = 20
RISE, STANDARD_ERRORS = 1.5, 4.0  # a rise is one by this factor, and beyond the noise


class LossHistory(msgspec.Struct, kw_only=True):
    """The first and the last losses.

    Attributes
    ----------
    window : int
        How many losses are compared at each end; 0 compares nothing.
    count : int
        How many there were.
    first, recent : list of float
        The first ``window``, and the last `GUARD_STEPS`.
    """

    window: int
    count: int = 0
    first: list[float] = []
    recent: list[float] = []

    def add(self, loss: float) -> None:
        """Take the loss of one more step."""
        self.count += 1
        if len(self.first) < self.window:
            self.first.append(loss)
        self.recent = [*self.recent, loss][-GUARD_STEPS:]

    @property
    def mean(self) -> float:
        """The mean of the last losses."""
        return float(np.mean(self.recent))

    def rising(self) -> bool:
        """Whether the mean of the last losses lies clearly above that of the first."""
        window = self.window
        if not window or self.count % window or self.count < 2 * window:
            return False
        first, last = np.array(self.first), np.array(self.recent[-window:])
        noise = math.sqrt((first.var() + last.var()) / window)
        rise = last.mean() - first.mean()
        return bool(last.mean() > RISE * first.mean() and rise > STANDARD_ERRORS * noise)
