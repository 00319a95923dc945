"""The base class of observers: fed batch by batch, it picks a range at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias, final

import numpy as np

from onnxqat.calibration.observers.histogram import CHUNK, Histogram
from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import FloatArray, QuantSpec

__all__ = ["Observer", "Range", "Seen", "levels_above_zero"]

Range: TypeAlias = tuple[float, float]


class Seen:
    """Summary of a tensor's values so far.

    Memory does not grow with the size of batches; `batches` grows by two numbers per batch.

    Parameters
    ----------
    batches, histogram : bool
        Whether to keep the extremes of each batch, and a histogram.

    Attributes
    ----------
    low, high : float
        Smallest and largest value; infinity and minus infinity if there was no value.
    batches : list of (float, float)
        Smallest and largest value of each non-empty batch, in order; empty if not kept.
    histogram : Histogram
        Histogram of all values; empty if not kept.
    """

    def __init__(self, *, batches: bool, histogram: bool) -> None:
        self._keeps_batches, self._keeps_histogram = batches, histogram
        self.low, self.high = np.inf, -np.inf
        self.batches: list[Range] = []
        self.histogram = Histogram()

    def add(self, x: FloatArray) -> Range:
        """Add a non-empty batch; return its smallest and largest value.

        The batch is read once, in chunks that fit the cache. If its smallest or largest value is
        not finite, the batch is not added.
        """
        flat = x.reshape(-1)
        low, high = np.inf, -np.inf
        counted = Histogram()
        for start in range(0, flat.size, CHUNK):
            chunk = flat[start : start + CHUNK]
            # both are NaN if any element is NaN
            chunk_low, chunk_high = float(chunk.min()), float(chunk.max())
            if not (np.isfinite(chunk_low) and np.isfinite(chunk_high)):
                return chunk_low, chunk_high
            if self._keeps_histogram:
                counted.add(chunk, max(-chunk_low, chunk_high))
            low, high = min(low, chunk_low), max(high, chunk_high)
        if self._keeps_batches:
            self.batches.append((low, high))
        if self._keeps_histogram:
            self.histogram.merge(counted)
        self.low, self.high = min(self.low, low), max(self.high, high)
        return low, high

    def merge(self, other: Seen) -> None:
        """Add the values of ``other``, whose batches come after those of this one."""
        self.batches += other.batches
        if self._keeps_histogram:
            self.histogram.merge(other.histogram)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def cut(self, threshold: float) -> Range:
        """Return the observed range, clipped to ``-threshold`` and ``threshold``."""
        return max(self.low, -threshold), min(self.high, threshold)


class Observer(ABC):
    """Picks a range from the values of one tensor, or of a group that shares parameters.

    Parameters
    ----------
    spec : QuantSpec
        How the tensor is quantized; per-tensor. Its ``fixed_range`` overrides the data.
    name : str
        Name of the tensor for error messages.

    Raises
    ------
    PlanError
        ``spec`` is per-axis, but an activation has one range.
    """

    keeps_batches: ClassVar[bool] = False
    keeps_histogram: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, *, name: str = "tensor") -> None:
        if spec.axis is not None:
            raise PlanError(
                f"{name}: an activation cannot be quantized per-axis (axis={spec.axis}). "
                "Set its axis to none."
            )
        self._spec = spec
        self._name = name
        self._seen = Seen(batches=self.keeps_batches, histogram=self.keeps_histogram)

    @final
    def update(self, x: FloatArray) -> Range:
        """Add one batch; return its smallest and largest value.

        An empty batch changes nothing; infinity and minus infinity are returned for it.

        Parameters
        ----------
        x : float32 of any shape
            The values; neither changed nor kept.

        Raises
        ------
        DataError
            ``x`` contains NaN or infinity. The observer is then unchanged.
        """
        if x.size == 0:
            return np.inf, -np.inf
        low, high = self._seen.add(x)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                f"{self._name}: contains NaN or infinity (min {low}, max {high}). "
                "Check the preprocessing, and the float model on this batch."
            )
        return low, high

    @final
    def merge(self, other: Observer) -> None:
        """Add the values of ``other``, an observer of the same kind and spec for later batches."""
        self._seen.merge(other._seen)

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no value at all, for example because every batch was empty."""
        return self._seen.low > self._seen.high

    @final
    def range(self) -> tuple[FloatArray, FloatArray]:
        """Return the clipping range ``(low, high)``, each float32 of shape ().

        The picked range is multiplied by the ``range_factor`` of the spec. It may not contain zero;
        `choose_qparams` widens it then.

        Raises
        ------
        DataError
            No value was seen.
        """
        if self._spec.fixed_range is not None:
            low, high = self._spec.fixed_range
        elif self.saw_nothing:
            raise DataError(f"{self._name}: no value was seen. Calibrate with at least one sample.")
        else:
            factor = self._spec.range_factor
            low, high = (end * factor for end in self.pick(self._seen))
        return np.asarray(low, np.float32), np.asarray(high, np.float32)

    @abstractmethod
    def pick(self, seen: Seen) -> Range:
        """Return the range for ``seen``, which has at least one value.

        Its ``batches`` and ``histogram`` are only filled if ``keeps_batches`` and
        ``keeps_histogram`` are set.
        """


def levels_above_zero(spec: QuantSpec, low: float) -> int:
    """Return the number of levels for magnitudes.

    All levels for a tensor without negative values. Half of them if the tensor has negative values,
    or if the spec is symmetric and signed.
    """
    signed = spec.signedness == "signed" and spec.symmetric
    return 1 << (spec.bits - 1 if signed or low < 0 else spec.bits)
