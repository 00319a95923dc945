"""Histogram of a tensor's values over its integers, in bins of equal width and constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxqat.qparams import FloatArray

__all__ = ["Histogram", "LevelCounts"]

INSIDE = 32  # maximum number of bins inside of the quantized range
BEYOND = 8  # bins on each side of the range; the outermost bins also count all values beyond them


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of rounded values, before they are clipped.

    Attributes
    ----------
    first : int
        First integer of the first bin. The first bin also counts all smaller values.
    width : int
        Number of integers per bin.
    counts : tuple of int
        Number of values in each bin. The last bin also counts all larger values.
    qmin, qmax : int
        The quantized range; values outside of it are clipped.
    """

    first: int
    width: int
    counts: tuple[int, ...]
    qmin: int
    qmax: int


class LevelCounts:
    """Counts the values of a tensor by the integers they are rounded to.

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
        """Count rounded values of any shape; NaN is not counted."""
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
