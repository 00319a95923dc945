"""How a tensor's values lie on its integers: counts in bins of equal width, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxqat.qparams import FloatArray

__all__ = ["Histogram", "LevelCounts"]

INSIDE = 32  # bins of the quantized range at most
BEYOND = 8  # bins on each side of it; the outermost ones count all that lies still further out


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of rounded values, before they are clipped.

    Attributes
    ----------
    first : int
        First integer of the first bin, which also counts all smaller ones.
    width : int
        Integers of a bin.
    counts : tuple of int
        Values of each bin; the last one also counts all larger ones.
    qmin, qmax : int
        The quantized range; what lies outside is clipped.
    """

    first: int
    width: int
    counts: tuple[int, ...]
    qmin: int
    qmax: int


class LevelCounts:
    """Counts on which integers the values of a tensor fall.

    Parameters
    ----------
    qmin, qmax : int
        The quantized range.
    """

    def __init__(self, qmin: int, qmax: int) -> None:
        levels = qmax - qmin + 1
        self._qmin, self._qmax = qmin, qmax
        self._width = -(-levels // INSIDE)
        self._first = qmin - BEYOND * self._width
        self._counts = np.zeros(-(-levels // self._width) + 2 * BEYOND, np.int64)

    def add(self, levels: FloatArray) -> None:
        """Count rounded values, of any shape; what is not a number counts nowhere."""
        last = len(self._counts) - 1
        places = (levels.reshape(-1) - self._first) / self._width
        if np.isnan(places).any():
            places = places[~np.isnan(places)]
        np.clip(places, 0, last, out=places)
        self._counts += np.bincount(places.astype(np.intp), minlength=last + 1)

    def result(self) -> Histogram:
        """Return the counts."""
        return Histogram(
            first=self._first,
            width=self._width,
            counts=tuple(self._counts.tolist()),
            qmin=self._qmin,
            qmax=self._qmax,
        )
