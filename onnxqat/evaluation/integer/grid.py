"""Conversion between the integers of a tensor and their real values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.rounding import Int64Array, round_levels
from onnxqat.qparams import (
    FloatArray,
    QuantParams,
    QuantSpec,
    dequantize,
    quantize,
    quantized_range,
)
from onnxqat.rules import Arithmetic, ShiftRounding

__all__ = ["Grid", "rounded_to_half"]


def rounded_to_half(values: FloatArray) -> FloatArray:
    """Return float32 values rounded to float16; what is too large becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


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

    @property
    def stored_zero_point(self) -> int:
        """The zero_point of the signed integers that a runtime without unsigned ones stores."""
        return int(self.params.zero_point) - (0 if self.params.signed else 128)

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

    def quantize(self, values: FloatArray, rounding: ShiftRounding) -> NDArray[Any]:
        """Return the integers of float32 values."""
        if rounding == "half-even":
            return quantize(values, self.params, self.spec)
        with np.errstate(over="ignore"):
            levels = values / self.scale
        low, high = self.limits
        span = high - low + 1  # clipping to twice this changes nothing: such values saturate anyway
        return self.saturate(round_levels(np.clip(levels, -2 * span, 2 * span), rounding))

    def quantize_as(self, values: FloatArray, arithmetic: Arithmetic) -> NDArray[Any]:
        """Return the integers that the chip makes of floats, see `Arithmetic.float_scaling`."""
        rounding = arithmetic.float_rounding
        if arithmetic.float_scaling == "divide" and arithmetic.float_type == "float32":
            return self.quantize(values, rounding)
        dtype = np.dtype(arithmetic.float_type)
        stored = self.stored_zero_point
        with np.errstate(over="ignore"):
            x = values.astype(dtype)
            if arithmetic.float_scaling == "divide":
                levels = x / self.scale.astype(dtype)
            else:
                levels = x * self._inverse(dtype) + dtype.type(stored)
        low, high = self.limits
        span = 2 * (high - low + 1)
        rounded = round_levels(np.clip(levels.astype(np.float32), -span, span), rounding)
        offset = stored if arithmetic.float_scaling == "multiply" else 0
        return self.saturate(rounded - offset)

    def to_halves(self, levels: NDArray[Any]) -> FloatArray:
        """Return the values that a chip with float16 makes of integers: s and s * q are float16.

        As ``dequant`` of sophgo/tpu-mlir lib/Support/CastUtils.cpp.
        """
        scale = self.scale.astype(np.float16).astype(np.float32)
        return rounded_to_half(scale * self.centered(levels).astype(np.float32))

    def from_halves(self, values: FloatArray, rounding: ShiftRounding) -> NDArray[Any]:
        """Return the integers that such a chip makes of floats: 1 / s and x * (1 / s) are float16.

        As ``requant`` of sophgo/tpu-mlir lib/Support/CastUtils.cpp.
        """
        levels = rounded_to_half(values * self._inverse(np.dtype(np.float16)).astype(np.float32))
        low, high = self.limits
        span = 2 * (high - low + 1)
        return self.saturate(round_levels(np.clip(levels, -span, span), rounding))

    def _inverse(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        inverse = np.asarray(np.float32(1) / self.scale).astype(dtype)
        if not np.isfinite(inverse).all():
            raise RuleError(
                f"Scale {float(self.scale):.3g} is too small: its inverse exceeds {dtype.name}. "
                "Give the tensor a wider range with --set, such as min_range."
            )
        return inverse
