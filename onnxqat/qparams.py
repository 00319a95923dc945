"""The integer grid of a quantized tensor, and the mapping of floats onto it, in numpy.

With scale ``s`` and zero_point ``z`` (ONNX QuantizeLinear and DequantizeLinear,
https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html)::

    q = clip(round_half_even(x / s) + z, qmin, qmax)        y = (q - z) * s

=============  ========  ============  =====================
bits, signed   qmin      qmax          narrow_range
=============  ========  ============  =====================
8, signed      -128      127           [-127, 127]
8, unsigned    0         255           (symmetric: as signed)
4, signed      -8        7             [-7, 7]
4, unsigned    0         15
=============  ========  ============  =====================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.choices import ObserverName
from onnxqat.errors import PlanError

__all__ = [
    "WIDTHS",
    "FloatArray",
    "Method",
    "QuantParams",
    "QuantSpec",
    "Rounding",
    "Signedness",
    "aligned",
    "center",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "nearest_power_of_two",
    "power_of_two",
    "quantize",
    "quantized_range",
    "rounded_levels",
    "storage_dtype",
]

FloatArray: TypeAlias = NDArray[np.float32]
Signedness: TypeAlias = Literal["signed", "unsigned", "from_range"]
Rounding: TypeAlias = Literal["half-even", "half-away", "half-up"]
Method: TypeAlias = Literal["lsq", "lsq+", "pact", "dsq", "moving-average", "ste"]

# QuantizeLinear writes 8 or 16 bits. Clipping makes 2 to 7 of 8; runtimes cannot clip 16 bits.
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


class QuantSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a tensor is quantized, apart from its scale and zero_point.

    Attributes
    ----------
    bits : int
        Width of the integers, one of `WIDTHS`.
    signedness : {"signed", "unsigned", "from_range"}
        ``from_range`` becomes unsigned in calibration when the range has no negative value.
    symmetric : bool
        zero_point is 0; the clipping range is ``[-t, t]`` (signed) or ``[0, t]`` (unsigned).
    narrow_range : bool
        Leave out the most negative integer, so that the range is ``[-qmax, qmax]``.
    off_center : bool
        zero_point is never the center of its dtype: 0 of int8, 128 of uint8 (asymmetric only). For
        compilers that take such a tensor for a symmetric one and change its scale.
    power_of_two : bool
        The scale is the smallest power of two that covers the range (symmetric only).
    rounding : {"half-even", "half-away", "half-up"}
        How the chip's own tools round ``x / s``. Training rounds half to even, like
        QuantizeLinear; for weights that lie on the grid, all three give the same result.
    axis : int or None
        One scale for each index of this axis; None is per-tensor.
    heads : int or None
        The indices of ``axis`` form this many heads of equal size, one behind the other. All scales
        of a head are equal: the largest weight of the head is ``qmax``, before and after training,
        because the chip's compiler computes these scales from the weights.
    fixed_range : (float, float) or None
        Clipping range that the chip uses regardless of the data (Softmax: 0 to 1).
    min_range : float
        Smallest width of a clipping range, in units of the tensor; keeps the scale of an
        all-zero tensor or channel positive.
    min_scale : float
        Smallest scale, also if the range is smaller.
    scale_ratio : float or None
        The largest ratio of the scales of two channels (not with ``power_of_two``); smaller scales
        are raised. For chips that multiply all channels by integers with one common shift.
    observer : ObserverName or None
        How calibration chooses the clipping range, see `onnxqat.calibration.observers`; None: by
        the calibration's settings. The range of a weight has the least squared error with ``mse``
        and ``auto``, and goes to the extremes with all other observers.
    range_factor : float
        Factor by which the observer's range is multiplied.
    method : Method or None
        How fine-tuning trains scale and zero_point, see `onnxqat.train.fake_quantize`; None: by
        the training's settings.
    """

    bits: int = 8
    signedness: Signedness = "signed"
    symmetric: bool = True
    narrow_range: bool = False
    off_center: bool = False
    power_of_two: bool = False
    rounding: Rounding = "half-even"
    axis: int | None = None
    heads: int | None = None
    fixed_range: tuple[float, float] | None = None
    min_range: float = 1e-12
    min_scale: float = 0.0
    scale_ratio: float | None = None
    observer: ObserverName | None = None
    range_factor: float = 1.0
    method: Method | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantParams:
    """Scale and zero_point of one tensor.

    Attributes
    ----------
    scale : float32 of shape () or (C,)
        Units of the tensor per level; positive.
    zero_point : int8, uint8, int16 or uint16 of the same shape
        The integer that stands for 0.0. Its dtype is the dtype of the quantized tensor.
    """

    scale: FloatArray
    zero_point: NDArray[Any]

    def __post_init__(self) -> None:
        # arithmetic on arrays of shape () gives numpy scalars, which onnxruntime does not accept
        object.__setattr__(self, "scale", np.asarray(self.scale))
        object.__setattr__(self, "zero_point", np.asarray(self.zero_point))

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return bool(np.issubdtype(self.zero_point.dtype, np.signedinteger))

    def same_as(self, other: QuantParams) -> bool:
        """Return whether both are equal bit for bit."""
        return (
            self.zero_point.dtype == other.zero_point.dtype
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


def quantized_range(spec: QuantSpec, *, signed: bool) -> tuple[int, int]:
    """Return ``(qmin, qmax)``, both inclusive.

    Examples
    --------
    >>> quantized_range(QuantSpec(bits=4), signed=True)
    (-8, 7)
    >>> quantized_range(QuantSpec(bits=4), signed=False)
    (0, 15)
    """
    if not signed:
        return 0, 2**spec.bits - 1
    qmax = 2 ** (spec.bits - 1) - 1
    return (-qmax if spec.narrow_range else -qmax - 1), qmax


def clipping_range(params: QuantParams, spec: QuantSpec) -> tuple[float, float]:
    """Return the smallest and the largest value in the clipping range.

    With several scales, these are the ends of the widest range.

    Examples
    --------
    >>> params = QuantParams(scale=np.float32(0.5), zero_point=np.uint8(3))
    >>> clipping_range(params, QuantSpec(bits=4))
    (-1.5, 6.0)
    """
    qmin, qmax = quantized_range(spec, signed=params.signed)
    zero_point = params.zero_point.astype(np.int32)
    low, high = ((end - zero_point).astype(np.float32) * params.scale for end in (qmin, qmax))
    return float(np.min(low)), float(np.max(high))


def storage_dtype(spec: QuantSpec, *, signed: bool) -> np.dtype[Any]:
    """Return the integer dtype that QuantizeLinear produces for ``spec``."""
    width = 8 if spec.bits <= 8 else 16
    return np.dtype(f"{'' if signed else 'u'}int{width}")


def choose_qparams(low: FloatArray, high: FloatArray, spec: QuantSpec) -> QuantParams:
    """Choose the scale and zero_point that cover the clipping range ``[low, high]``.

    The range is first widened to contain zero, so that zero is represented exactly
    (Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 2.1).

    Parameters
    ----------
    low, high : float32 of shape () or (C,)
        Clipping range in the units of the tensor, per tensor or per axis.
    spec : QuantSpec
        The spec of the tensor. Its ``fixed_range`` overrides ``low`` and ``high``.

    Returns
    -------
    QuantParams
        Parameters of the same shape as ``low``.

    Raises
    ------
    PlanError
        The range is not finite, its low end lies above its high end, or its scale would be zero.

    Examples
    --------
    >>> params = choose_qparams(np.float32(-1.0), np.float32(2.54), QuantSpec())
    >>> round(float(params.scale), 6), int(params.zero_point)
    (0.02, 0)
    """
    if spec.fixed_range is not None:
        low, high = (np.full_like(low, end) for end in spec.fixed_range)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and np.all(low <= high)):
        raise PlanError(f"Clipping range [{low}, {high}] is not a finite interval.")
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    signed = spec.signedness == "signed" or (
        spec.signedness == "from_range" and bool(np.any(low < 0))
    )
    qmin, qmax = quantized_range(spec, signed=signed)
    floor = np.float32(spec.min_range)
    if spec.symmetric:
        threshold = np.maximum(np.maximum(-low, high) if signed else high, floor)
        scale = np.asarray(threshold / np.float32(qmax), np.float32)
    else:
        width = high.astype(np.float64) - low  # may exceed the largest float32
        scale = (np.maximum(width, floor) / (qmax - qmin)).astype(np.float32)
    scale = raised_scales(np.maximum(scale, np.float32(spec.min_scale)), spec)
    if spec.power_of_two:
        scale = power_of_two(scale)
    if not np.all(scale > 0):
        at = int(np.argmin(scale))
        raise PlanError(
            f"Clipping range [{low.flat[at]}, {high.flat[at]}] is too narrow for a float32 scale. "
            "Raise min_range."
        )
    zero_point = (
        np.zeros_like(scale) if spec.symmetric else np.clip(np.rint(qmin - low / scale), qmin, qmax)
    )
    dtype = storage_dtype(spec, signed=signed)
    if spec.off_center and not spec.symmetric:
        scale, zero_point = _moved_off_center(low, high, scale, zero_point, (qmin, qmax), dtype)
    return QuantParams(
        scale=np.asarray(scale, np.float32), zero_point=np.asarray(zero_point).astype(dtype)
    )


def center(dtype: np.dtype[Any]) -> int:
    """Return the center of an integer dtype: 0 if it is signed, 128 for uint8.

    Examples
    --------
    >>> center(np.dtype(np.int8)), center(np.dtype(np.uint8))
    (0, 128)
    """
    limits = np.iinfo(dtype)
    return (int(limits.min) + int(limits.max) + 1) // 2


def _moved_off_center(
    low: FloatArray,
    high: FloatArray,
    scale: FloatArray,
    zero_point: FloatArray,
    limits: tuple[int, int],
    dtype: np.dtype[Any],
) -> tuple[FloatArray, FloatArray]:
    """Move zero_points at the center by one, to the side where the scale grows least.

    The scale grows so far that the range still covers ``[low, high]``.
    """
    middle, (qmin, qmax) = center(dtype), limits
    moved = [middle - 1, middle + 1]
    with np.errstate(divide="ignore", invalid="ignore"):  # no level is left on one side (2 bits)
        scales = [
            np.maximum(np.maximum(-low / (z - qmin), high / (qmax - z)), scale).astype(np.float32)
            for z in map(np.float32, moved)
        ]
    below = scales[0] <= scales[1]
    at_center = zero_point == middle
    return (
        np.where(at_center, np.where(below, *scales), scale),
        np.where(at_center, np.where(below, *moved), zero_point),
    )


def raised_scales(scale: FloatArray, spec: QuantSpec) -> FloatArray:
    """Return scales of which none is smaller than the largest over ``scale_ratio``, same shape.

    Examples
    --------
    >>> raised_scales(np.float32([1, 64, 1024]), QuantSpec(axis=0, scale_ratio=256)).tolist()
    [4.0, 64.0, 1024.0]
    """
    if spec.scale_ratio is None:
        return scale
    return np.asarray(np.maximum(scale, scale.max() / np.float32(spec.scale_ratio)), np.float32)


def power_of_two(scale: FloatArray) -> FloatArray:
    """Return the smallest powers of two greater than or equal to ``scale``, same shape.

    Examples
    --------
    >>> power_of_two(np.float32([0.3, 0.5, 1e-3])).tolist()
    [0.5, 0.5, 0.001953125]
    """
    mantissa, exponent = np.frexp(scale)  # mantissa in [0.5, 1)
    return np.asarray(np.ldexp(np.float32(1), exponent - (mantissa == 0.5)), np.float32)


def nearest_power_of_two(scale: FloatArray) -> FloatArray:
    """Return the powers of two nearest to ``scale`` on a logarithmic axis, same shape.

    Examples
    --------
    >>> nearest_power_of_two(np.float32([0.3, 0.5, 0.7, 0.8])).tolist()
    [0.25, 0.5, 0.5, 1.0]
    """
    return power_of_two(np.asarray(scale * np.float32(0.5**0.5), np.float32))


def aligned(values: NDArray[Any], rank: int, axis: int | None) -> NDArray[Any]:
    """Reshape per-axis values of shape (C,) so that they broadcast along ``axis``."""
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def rounded_levels(x: FloatArray, params: QuantParams, spec: QuantSpec) -> FloatArray:
    """Return ``round_half_even(x / s) + z`` before clipping, same shape, float32."""
    scale = aligned(params.scale, x.ndim, spec.axis)
    zero_point = aligned(params.zero_point, x.ndim, spec.axis).astype(np.float32)
    with np.errstate(over="ignore"):  # infinity is clipped like any other large value
        levels: FloatArray = np.rint(x / scale) + zero_point
    return levels


def quantize(x: FloatArray, params: QuantParams, spec: QuantSpec) -> NDArray[Any]:
    """Return the integers of ``x``, same shape, in the dtype of the zero_point."""
    qmin, qmax = quantized_range(spec, signed=params.signed)
    levels = np.clip(rounded_levels(x, params, spec), qmin, qmax)
    integers: NDArray[Any] = levels.astype(params.zero_point.dtype)
    return integers


def dequantize(q: NDArray[Any], params: QuantParams, spec: QuantSpec) -> FloatArray:
    """Return the float32 values of the integers ``q``, same shape."""
    scale = aligned(params.scale, q.ndim, spec.axis)
    zero_point = aligned(params.zero_point, q.ndim, spec.axis).astype(np.int32)
    values: FloatArray = (q.astype(np.int32) - zero_point).astype(np.float32) * scale
    return values


def fake_quantize(x: FloatArray, params: QuantParams, spec: QuantSpec) -> FloatArray:
    """Return ``dequantize(quantize(x))``: the float32 values on the grid, same shape.

    Examples
    --------
    >>> spec = QuantSpec(bits=4)
    >>> params = choose_qparams(np.float32(-7), np.float32(7), spec)
    >>> fake_quantize(np.float32([0.4, 1.5, 2.5, 100]), params, spec).tolist()
    [0.0, 2.0, 2.0, 7.0]
    """
    return dequantize(quantize(x, params, spec), params, spec)
