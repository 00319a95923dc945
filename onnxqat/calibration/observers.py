"""Clipping ranges from data: what each observer keeps of a tensor, and the range it picks.

Pure numpy; knows no graph and no runtime. An observer is fed batch by batch, and keeps no sample.
Several observers may share the batches between them: merged in the order of the batches, they
pick the range that one would have picked, bit for bit.

================  ======================================================================
minmax            smallest and largest value seen
moving-average    ``m += 0.01 * (batch_min - m)``, the same for the maximum: PyTorch's
                  ``MovingAverageMinMaxObserver`` and Horizon's default
percentile        the values that ``100 - p`` percent of all elements lie below, and above;
                  TensorRT's percentile calibration takes ``|x|`` instead, which wastes levels
                  on one-sided tensors
mse               least mean squared quantization error (Nagel et al. 2021,
                  https://arxiv.org/abs/2106.08295, section 2.3.1, equation 11)
================  ======================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.calibration.histogram import Histogram
from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import (
    FloatArray,
    QuantSpec,
    choose_qparams,
    fake_quantize,
    quantized_range,
)

__all__ = [
    "OBSERVERS",
    "MinMaxObserver",
    "MovingAverageObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "Range",
    "weight_range",
]

Range: TypeAlias = tuple[float, float]
Doubles: TypeAlias = NDArray[np.float64]
Candidates: TypeAlias = Callable[[Doubles], tuple[Doubles, Doubles]]  # of factors: low, high ends
Errors: TypeAlias = Callable[[Doubles, Doubles], list[float]]  # of low and high ends

_COARSE = 2.0 ** (-np.arange(128) / 16)  # 1 down to 0.004, 4 % apart
_FINE = 2.0 ** (np.arange(-16, 17) / 256)  # one coarse step to either side, 0.3 % apart
_WEIGHT_FACTORS = np.arange(100, 19, -1) / 100  # 1.0 down to 0.2


def _single(value: float | Doubles) -> FloatArray:
    """Return a float64, or an array of them, as float32 of its shape."""
    return np.asarray(value, np.float32)


class Observer(ABC):
    """Sees the values of one tensor, or of a group that shares parameters, and picks a range.

    Parameters
    ----------
    spec : QuantSpec
        How the tensor is quantized; per-tensor. ``fixed_range`` wins over the data.
    name : str
        What error messages call the tensor.

    Raises
    ------
    PlanError
        ``spec`` is per-axis: activations have one range.
    """

    def __init__(self, spec: QuantSpec, *, name: str = "tensor") -> None:
        if spec.axis is not None:
            raise PlanError(
                f"{name}: an activation cannot be quantized per-axis (axis={spec.axis}). "
                "Set its axis to none."
            )
        self._spec = spec
        self._name = name
        self._low = np.inf
        self._high = -np.inf

    @final
    def update(self, x: FloatArray) -> Range:
        """Take in one batch, and return its smallest and largest value.

        An empty one changes nothing, and has the range from infinity down to minus infinity.

        Parameters
        ----------
        x : float32 of any shape
            Not changed, and not kept.

        Raises
        ------
        DataError
            ``x`` holds nan or infinity. The observer is then as it was before.
        """
        if x.size == 0:
            return np.inf, -np.inf
        low, high = float(x.min()), float(x.max())  # both are nan where any element is
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                f"{self._name}: holds nan or infinity (min {low}, max {high}). "
                "Check the preprocessing, and the float model on this batch."
            )
        self._update(x, low, high)
        self._low, self._high = min(self._low, low), max(self._high, high)
        return low, high

    @final
    def merge(self, other: Observer) -> None:
        """Take in what ``other``, of the same kind and spec, saw after this one."""
        self._merge(other)
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    @property
    def saw_nothing(self) -> bool:
        """Whether there was no value, be it that every batch was empty."""
        return self._low > self._high

    @final
    def range(self) -> tuple[FloatArray, FloatArray]:
        """Return the clipping range ``(low, high)``, each float32 of shape ().

        Zero need not lie within; `choose_qparams` widens the range to hold it.

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
            low, high = self._range()
        return _single(low), _single(high)

    @abstractmethod
    def _update(self, x: FloatArray, low: float, high: float) -> None:
        """Take in a non-empty batch of finite values with its minimum and maximum."""

    @abstractmethod
    def _merge(self, other: Any) -> None:
        """Take in what ``other`` keeps beside its minimum and maximum; it saw later batches."""

    @abstractmethod
    def _range(self) -> Range:
        """Return the range, at least one value having been seen."""


@final
class MinMaxObserver(Observer):
    """The smallest and the largest value seen."""

    def _update(self, x: FloatArray, low: float, high: float) -> None:
        """Keep nothing beside what `Observer` keeps."""

    def _merge(self, other: MinMaxObserver) -> None:
        """There is nothing beside it."""

    def _range(self) -> Range:
        return self._low, self._high


@final
class MovingAverageObserver(Observer):
    """Exponential moving average of the minimum and maximum of each batch.

    The first batch is taken as it is. Every call of `update` counts as one batch, also where
    several tensors of a group feed one observer. Later batches weigh more, so that what is kept
    is the minimum and maximum of each, and the average is taken at the end, in their order.

    Parameters
    ----------
    constant : float
        Weight of the new batch, above 0 and at most 1.

    Raises
    ------
    PlanError
        ``constant`` lies outside.
    """

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", constant: float = 0.01) -> None:
        super().__init__(spec, name=name)
        if not 0 < constant <= 1:
            raise PlanError(
                f"{name}: averaging constant {constant} is not in (0, 1]. Choose one that is."
            )
        self._constant = constant
        self._batches: list[Range] = []

    def _update(self, x: FloatArray, low: float, high: float) -> None:  # noqa: ARG002
        self._batches.append((low, high))

    def _merge(self, other: MovingAverageObserver) -> None:
        self._batches += other._batches

    def _range(self) -> Range:
        low, high = self._batches[0]
        for batch_low, batch_high in self._batches[1:]:
            low += self._constant * (batch_low - low)
            high += self._constant * (batch_high - high)
        return low, high


@final
class PercentileObserver(Observer):
    """Leaves out the same share of elements at either end.

    Exact to one bin of the histogram: 1/4096 of the largest magnitude, or finer. Where so few
    elements differ from zero that both ends fall on zero, the whole observed range is taken,
    since a range of no width would turn every value into zero.

    Parameters
    ----------
    percentile : float
        Percent of the elements that do not lie above ``high``, and likewise below ``low``;
        above 50 and at most 100.

    Raises
    ------
    PlanError
        ``percentile`` lies outside.
    """

    def __init__(self, spec: QuantSpec, *, name: str = "tensor", percentile: float = 99.99) -> None:
        super().__init__(spec, name=name)
        if not 50 < percentile <= 100:
            raise PlanError(
                f"{name}: percentile {percentile} is not in (50, 100]. Choose one that is."
            )
        self._fraction = percentile / 100
        self._histogram = Histogram()

    def _update(self, x: FloatArray, low: float, high: float) -> None:
        self._histogram.add(x, max(-low, high))

    def _merge(self, other: PercentileObserver) -> None:
        self._histogram.merge(other._histogram)

    def _range(self) -> Range:
        low, high = self._histogram.ends(self._fraction)
        if low == high == 0.0:
            return self._low, self._high
        return max(low, self._low), min(high, self._high)


@final
class MseObserver(Observer):
    """The range whose quantization error, clipping and rounding together, is least.

    Searched over the histogram with the very parameters that `choose_qparams` gives each
    candidate: first ``[low, high]`` of the data cut to ``[-t, t]`` for 128 thresholds ``t``, then
    33 around the best; for an asymmetric spec then each end alone, coarse and fine, twice. What
    lies in a bin is taken to be spread evenly over it, and the error integrated exactly, so that
    a step finer than a bin still costs its ``step² / 12``. Exact zeros cost nothing.
    """

    def __init__(self, spec: QuantSpec, *, name: str = "tensor") -> None:
        super().__init__(spec, name=name)
        self._histogram = Histogram()

    def _update(self, x: FloatArray, low: float, high: float) -> None:
        self._histogram.add(x, max(-low, high))

    def _merge(self, other: MseObserver) -> None:
        self._histogram.merge(other._histogram)

    def _range(self) -> Range:
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        magnitude = max(-low, high)
        if magnitude == 0:
            return low, high
        edges, counts = self._histogram.occupied()

        def errors(lows: Doubles, highs: Doubles) -> list[float]:
            params = choose_qparams(_single(lows), _single(highs), self._spec)
            qmin, qmax = quantized_range(self._spec, signed=params.signed)
            grids = zip(params.scale.tolist(), params.zero_point.tolist(), strict=True)
            # no dot product: a threaded BLAS makes it slow and its rounding depend on the machine
            return [
                float((counts * _bin_errors(edges, scale, qmin - z, qmax - z)).sum())
                for scale, z in grids
            ]

        def cut(factors: Doubles) -> tuple[Doubles, Doubles]:
            t = magnitude * factors
            return np.maximum(low, -t), np.minimum(high, t)

        best = _search(cut, errors)
        if not self._spec.symmetric:
            best = _search_ends(_search_ends(best, errors), errors)
        return best


def _bin_errors(edges: Doubles, scale: float, lowest: int, highest: int) -> Doubles:
    """Return the mean squared quantization error of each bin, its values evenly spread.

    With ``u = x / scale``, ``k = clip(round(u), qmin - z, qmax - z)`` and ``d = u - k``, the
    integral of ``d²`` from 0 to ``u`` is ``k / 12 + d³ / 3``: every whole cell passed adds 1/12,
    and beyond the last level ``d`` simply keeps growing, which is the clipping error.

    Parameters
    ----------
    edges : float64 of shape (n + 1,)
        Evenly spaced ends of the bins, in the units of the tensor.
    scale : float
        Units of the tensor per level.
    lowest, highest : int
        ``qmin - z`` and ``qmax - z``, in levels.

    Returns
    -------
    float64 of shape (n,)
        In squared units of the tensor.
    """
    step = (edges[1] - edges[0]) / scale
    d = edges / scale
    integral = np.rint(d)
    np.maximum(integral, lowest, out=integral)
    np.minimum(integral, highest, out=integral)
    d -= integral
    cube = d * d
    cube *= d
    cube /= 3
    integral /= 12
    integral += cube
    errors: Doubles = integral[1:] - integral[:-1]
    errors *= scale * scale / step
    return errors


def _search(candidates: Candidates, errors: Errors) -> Range:
    """Return the candidate of least error over a coarse grid of factors, then a fine one.

    The factor 1 comes first and only a smaller error replaces the best, so that the result is
    never worse than the range the search starts from.
    """

    def least(factors: Doubles) -> Doubles:
        """Return the best factor, of shape (1,)."""
        best = np.argmin(errors(*candidates(factors)))
        return factors[best : best + 1]

    coarse = least(_COARSE)
    low, high = candidates(least(np.concatenate([coarse, np.minimum(coarse * _FINE, 1.0)])))
    return float(low[0]), float(high[0])


def _search_ends(best: Range, errors: Errors) -> Range:
    """Move the high end alone, then the low end alone, towards zero."""
    low, high = best
    low, high = _search(lambda factors: (np.full_like(factors, low), high * factors), errors)
    return _search(lambda factors: (low * factors, np.full_like(factors, high)), errors)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
}


def weight_range(
    w: FloatArray, spec: QuantSpec, method: Literal["minmax", "mse"]
) -> tuple[FloatArray, FloatArray]:
    """Return the clipping range of a weight, per tensor or per axis.

    Parameters
    ----------
    w : float32 of any shape
        Not changed.
    spec : QuantSpec
        ``axis`` says per which axis, None for per-tensor.
    method : {"minmax", "mse"}
        ``mse`` shrinks minimum and maximum by the factor out of 1.00, 0.99, ... 0.20 whose
        squared quantization error is least, each channel by its own (Nagel et al. 2021,
        https://arxiv.org/abs/2106.08295, section 2.3.1). The error is that of `fake_quantize`
        itself, and never above that of ``minmax``.

    Returns
    -------
    low, high : float32 of shape () or (C,)
        In the units of the weight.

    Raises
    ------
    DataError
        The weight is empty, or holds nan or infinity.
    PlanError
        The weight has no such axis.
    """
    if w.size == 0:
        raise DataError(f"Weight of shape {w.shape} is empty. Remove it, or do not quantize it.")
    if spec.axis is None:
        rows = w.reshape(1, -1)
    elif -w.ndim <= spec.axis < w.ndim:
        rows = np.moveaxis(w, spec.axis, 0).reshape(w.shape[spec.axis], -1)
    else:
        raise PlanError(f"Weight of shape {w.shape} has no axis {spec.axis}. Choose another axis.")
    low, high = rows.min(axis=1), rows.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise DataError("Weight holds nan or infinity. Repair the model first.")
    if method == "mse":
        low, high = _shrunk(rows, low, high, spec)
    return (low.reshape(()), high.reshape(())) if spec.axis is None else (low, high)


def _shrunk(
    rows: FloatArray, low: FloatArray, high: FloatArray, spec: QuantSpec
) -> tuple[FloatArray, FloatArray]:
    """Shrink the range of each row of ``rows``, of shape (C, n), to its least squared error."""
    spec = msgspec.structs.replace(spec, axis=0)
    factors = np.ones_like(low)
    best = np.full(low.shape, np.inf)
    for candidate in _WEIGHT_FACTORS.astype(np.float32):
        params = choose_qparams(low * candidate, high * candidate, spec)
        difference = fake_quantize(rows, params, spec) - rows
        errors = np.einsum("cn,cn->c", difference, difference, dtype=np.float64)
        better = errors < best
        factors[better], best[better] = candidate, errors[better]
    return low * factors, high * factors
