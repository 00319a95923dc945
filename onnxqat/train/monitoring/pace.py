"""How fast training goes, and how long it waits for data."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["Pace", "duration", "peak_memory"]

T = TypeVar("T")


def peak_memory() -> float | None:
    """Return the largest memory of this process so far, in GB; None where the system has no answer.

    What lies on a GPU is not in it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """Return a time in words.

    Examples
    --------
    >>> duration(45), duration(150), duration(7000)
    ('45 s', '2.5 min', '1.9 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 3600 else f"{seconds / 3600:.2g} h"


class Pace:
    """Times the steps; the first, in which a runtime warms up, is left out.

    Attributes
    ----------
    steps : int
        How many were timed.
    seconds, waited : float
        How long they took, and how much of that they waited for data.
    """

    def __init__(self) -> None:
        self.steps, self.seconds, self.waited = -1, 0.0, 0.0
        self._started = self._waited = 0.0

    def begin(self, batches: Iterator[T]) -> Iterator[T]:
        """Begin a step, and return its batches, for which it waits."""
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
        """Share of the time that was spent waiting for data; None where nothing was timed."""
        return self.waited / self.seconds if self.steps > 0 else None

    @property
    def step(self) -> float:
        """Seconds of a step, once one was timed."""
        return self.seconds / self.steps

    def rate(self, samples: int) -> float | None:
        """Return samples per second, of so many a step; None where nothing was timed."""
        return samples * self.steps / self.seconds if self.steps > 0 else None
