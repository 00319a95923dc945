"""The clipping range of a weight, from all its values: per tensor or per axis."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError, PlanError
from onnxqat.qparams import FloatArray, QuantParams, QuantSpec, choose_qparams, quantized_range

__all__ = ["WeightMethod", "weight_method", "weight_range"]

Doubles: TypeAlias = NDArray[np.float64]
WeightMethod: TypeAlias = Literal["minmax", "mse"]

_CHUNK = 1 << 15  # elements at a time
_FACTORS = np.arange(100, 19, -1) / 100  # 1.0 down to 0.2


def weight_method(spec: QuantSpec, observer: str) -> WeightMethod:
    """Return the method for the range of a weight in a calibration with this observer."""
    return "mse" if (spec.observer or observer) in ("mse", "auto") else "minmax"


def weight_range(
    w: FloatArray, spec: QuantSpec, method: WeightMethod
) -> tuple[FloatArray, FloatArray]:
    """Return the clipping range of a weight, per tensor or per axis.

    Parameters
    ----------
    w : float32 of any shape
        The weight; not changed.
    spec : QuantSpec
        How the weight is quantized: ``axis`` is None for per-tensor. The chosen range is multiplied
        by ``range_factor``. With ``heads``, it is that of the extremes of each head, for all
        channels of the head, whatever ``method`` and ``range_factor`` say.
    method : {"minmax", "mse"}
        ``mse`` multiplies minimum and maximum of each channel by one of the factors 1.00, 0.99,
        ... 0.20, the one with the least squared quantization error (Nagel et al. 2021,
        https://arxiv.org/abs/2106.08295, section 2.3.1). The error is that of `fake_quantize`; it
        is never larger than with ``minmax``.

    Returns
    -------
    low, high : float32 of shape () or (C,)
        Ends of the range, in the units of the weight.

    Raises
    ------
    DataError
        The weight is empty, or contains NaN or infinity.
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
        raise DataError("Weight contains NaN or infinity. Repair the model first.")
    if spec.heads is not None:
        return _of_heads(low, high, spec.heads)
    if method == "mse":
        low, high = _shrunk(rows, low, high, spec)
    low, high = (end * np.float32(spec.range_factor) for end in (low, high))
    return (low.reshape(()), high.reshape(())) if spec.axis is None else (low, high)


def _of_heads(low: FloatArray, high: FloatArray, heads: int) -> tuple[FloatArray, FloatArray]:
    """Give all channels of a head the range of the head."""
    size = low.size // heads
    return (
        low.reshape(heads, size).min(axis=1).repeat(size),
        high.reshape(heads, size).max(axis=1).repeat(size),
    )


def _shrunk(
    rows: FloatArray, low: FloatArray, high: FloatArray, spec: QuantSpec
) -> tuple[FloatArray, FloatArray]:
    """Shrink the range of each row of ``rows``, of shape (C, n), to its least squared error.

    If errors are equal, the larger range is kept. The search of a row ends as soon as the clipping
    error of its extremes alone, which grows for smaller ranges, exceeds the least error so far.
    """
    spec = msgspec.structs.replace(spec, axis=0)
    factors = np.ones_like(low)
    best = np.full(low.shape, np.inf)
    left = np.arange(low.size)  # the rows whose search has not ended
    for candidate in _FACTORS.astype(np.float32):
        params = choose_qparams(low[left] * candidate, high[left] * candidate, spec)
        errors = _squared_errors(rows, params, spec)
        better = errors < best[left]
        factors[left[better]], best[left[better]] = candidate, errors[better]
        open_ = _cut_off(low[left], high[left], params, spec) <= best[left]
        if not open_.all():
            left, rows = left[open_], rows[open_]
        if not left.size:
            break
    return low * factors, high * factors


def _squared_errors(rows: FloatArray, params: QuantParams, spec: QuantSpec) -> Doubles:
    """Return the sum of the squared errors of `fake_quantize` in each row, of shape (C,).

    A few rows are computed at a time, so that the temporaries fit the cache.
    """
    errors = np.empty(len(rows))
    step = max(1, _CHUNK // rows.shape[1])
    qmin, qmax = quantized_range(spec, signed=params.signed)
    zero_points = params.zero_point.astype(np.float32)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        x, scale, zero_point = rows[some], params.scale[some, None], zero_points[some, None]
        with np.errstate(over="ignore"):  # infinity is clipped like any other large value
            y = x / scale
        np.rint(y, out=y)
        y += zero_point
        np.clip(y, qmin, qmax, out=y)
        y -= zero_point  # exact: both are small integers
        y *= scale
        y -= x
        errors[some] = np.einsum("cn,cn->c", y, y, dtype=np.float64)
    return errors


def _cut_off(low: FloatArray, high: FloatArray, params: QuantParams, spec: QuantSpec) -> Doubles:
    """Return a lower bound of the squared error of an extreme, for this and all smaller ranges.

    Rounding of range, scale and zero_point moves the ends of a grid by less than two steps.
    """
    qmin, qmax = quantized_range(spec, signed=params.signed)
    scale, zero_point = (a.astype(np.float64) for a in (params.scale, params.zero_point))
    above = high - (qmax - zero_point + 2) * scale
    below = (qmin - zero_point - 2) * scale - low
    return np.asarray(np.maximum(np.maximum(above, below), 0.0) ** 2)
