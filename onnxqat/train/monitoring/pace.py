"""The speed of training, and the share of time spent waiting for data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["Pace", "duration", "peak_memory"]

T = TypeVar("T")


def peak_memory() -> float | None:
    """Return the peak memory of this process in GB; None if the system does not report it.

    Memory on a GPU is not included.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Return a duration as text with a unit.

    Examples
    --------
    >>> duration(45), duration(150), duration(7000)
    ('45 s', '2.5 min', '1.9 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 3600 else f"{seconds / 3600:.2g} h"


class Pace:
    """Measures the time of the steps, except the first, in which onnxruntime warms up.

    Attributes
    ----------
    steps : int
        Number of timed steps; -1 until the first step ends.
    seconds, waited : float
        Total time of these steps, and the part spent waiting for data.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.waited = -1, 0.0, 0.0
        self._started = self._waited = 0.0

    def begin(self, batches: Iterator[T]) -> Iterator[T]:
        """Begin a step; yield its batches, and measure the time spent waiting for them."""
        self._started, self._waited = time.perf_counter(), 0.0
        end = object()
        while True:
            asked = time.perf_counter()
            batch = next(batches, end)
            self._waited += time.perf_counter() - asked
            if batch is end:
                return
            yield batch  # type: ignore[misc]

    def end(self) -> None:
        """End a step."""
        self.steps += 1
        if self.steps:
            self.seconds += time.perf_counter() - self._started
            self.waited += self._waited

    @property
    def waiting(self) -> float | None:
        """Share of the time spent waiting for data; None before the first timed step."""
        return self.waited / self.seconds if self.steps > 0 else None

    @property
    def step(self) -> float:
        """Mean seconds per step; at least one step must have been timed."""
        return self.seconds / self.steps

    def rate(self, samples: int) -> float | None:
        """Return samples per second for ``samples`` a step; None before the first timed step."""
        return samples * self.steps / self.seconds if self.steps > 0 else None
