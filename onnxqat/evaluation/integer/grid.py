"""Conversion between the integers of a tensor and their real values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.integer.rounding import Int64Array, round_levels
from onnxqat.qparams import (
    FloatArray,
    QuantParams,
    QuantSpec,
    Rounding,
    dequantize,
    quantize,
    quantized_range,
)

__all__ = ["Grid"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Spec and parameters of one tensor."""

    params: QuantParams
    spec: QuantSpec

    @property
    def scale(self) -> FloatArray:
        """float32 of shape () or (C,)."""
        return self.params.scale

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return quantized_range(self.spec, signed=self.params.signed)

    def centered(self, levels: NDArray[Any]) -> NDArray[np.int32]:
        """Return the integers minus the zero_point, int32."""
        # only weights are per-axis, and they are symmetric
        zero_point = self.params.zero_point.astype(np.int32)
        return levels.astype(np.int32) - (zero_point if zero_point.ndim == 0 else 0)

    def saturate(self, centered: Int64Array) -> NDArray[Any]:
        """Return ``centered + zero_point``, saturated to the quantized range."""
        shifted = centered + np.int64(self.params.zero_point)
        levels: NDArray[Any] = np.clip(shifted, *self.limits).astype(self.params.zero_point.dtype)
        return levels

    def dequantize(self, levels: NDArray[Any]) -> FloatArray:
        """Return the float32 values of integers."""
        return dequantize(levels, self.params, self.spec)

    def quantize(self, values: FloatArray, rounding: Rounding) -> NDArray[Any]:
        """Return the integers of float32 values."""
        if rounding == "half-even":
            return quantize(values, self.params, self.spec)
        with np.errstate(over="ignore"):
            levels = values / self.scale
        low, high = self.limits
        span = high - low + 1  # clipping to twice this changes nothing: such values saturate anyway
        return self.saturate(round_levels(np.clip(levels, -2 * span, 2 * span), rounding))
