"""Scale and zero_point of an activation as the numbers of Sophgo's table, and back.

The threshold for a scale ``s`` (tpu-mlir ``lib/Support/Module.cpp``, ``getScale``):

=========  ===============  =====================  =============
bits       signed           unsigned               min, max
=========  ===============  =====================  =============
8          ``127 * s``      ``255 * s``            ``-th, th``
4          ``7 * s``        ``15 * s``             unsigned:
16         ``32767 * s``    ``65535 * s``          ``0, th``
=========  ===============  =====================  =============

``model_deploy.py --asymmetric`` takes ``min`` and ``max`` instead (``getScaleAndZeroPoint`` of the
same file): ``s = (max - min) / 255``, ``z = round(qmin - min / s)``, int8 if ``min < 0``
and uint8 otherwise. `span` writes ``min = (qmin - z) * s`` and ``max = (qmax - z) * s``, as
sophgo-mq. The integers of int8 and uint8 differ by 128 here, their values do not.
"""

from __future__ import annotations

import math

import numpy as np

from onnxqat.errors import FormatError
from onnxqat.formats.table import Threshold

__all__ = ["scale_of", "span", "span_of", "threshold"]

_BITS = (4, 8, 16)


def _largest(bits: int, *, signed: bool) -> int:
    """Return the integer that the threshold corresponds to."""
    if bits not in _BITS:
        raise FormatError(f"A Sophgo table holds 4, 8 or 16 bits, not {bits}. Change the rule.")
    return 2 ** (bits - 1) - 1 if signed else int(2**bits - 1)


def threshold(scale: float, bits: int, signed: bool) -> Threshold:
    """Return the table entry of an activation with zero_point 0.

    Parameters
    ----------
    scale : float
        A float32 value, in units of the tensor per level; positive.
    bits : {4, 8, 16}
        Width of the integers.
    signed : bool
        Whether the integers are signed.

    Raises
    ------
    FormatError
        The scale is not positive and finite, or ``bits`` is another width.

    Examples
    --------
    >>> threshold(0.5, 8, signed=True)
    Threshold(threshold=63.5, low=-63.5, high=63.5)
    >>> threshold(0.5, 4, signed=False)
    Threshold(threshold=7.5, low=0.0, high=7.5)
    """
    th = float(scale) * _largest(bits, signed=signed)
    if not (math.isfinite(th) and th > 0):
        raise FormatError(f"Scale {scale} is not positive and finite. Calibrate again.")
    return Threshold(threshold=th, low=-th if signed else 0.0, high=th)


def scale_of(entry: Threshold, bits: int) -> tuple[np.float32, bool]:
    """Return the scale and signedness that the compiler gives an entry: inverse of `threshold`.

    Parameters
    ----------
    entry : Threshold
        Signed if its ``low`` lies below zero.
    bits : {4, 8, 16}
        Width of the integers.

    Returns
    -------
    scale : numpy.float32
        Units of the tensor per level; bit for bit the scale given to `threshold`.
    signed : bool
        Whether the integers are signed.

    Raises
    ------
    FormatError
        The scale is not a positive float32, or ``bits`` is another width.

    Examples
    --------
    >>> scale, signed = scale_of(Threshold(threshold=63.5, low=-63.5, high=63.5), 8)
    >>> float(scale), signed
    (0.5, True)
    """
    signed = entry.low < 0
    scale = entry.threshold / _largest(bits, signed=signed)
    if not scale <= float(np.finfo(np.float32).max) or not np.float32(scale) > 0:
        raise FormatError(
            f"Threshold {entry.threshold} does not give a positive float32 scale. Calibrate again."
        )
    return np.float32(scale), signed


def span(scale: float, zero_point: int, signed: bool) -> Threshold:
    """Return the entry of an 8-bit activation in an asymmetric table.

    Parameters
    ----------
    scale : float
        A float32 value, in units of the tensor per level; positive.
    zero_point : int
        Counted in the integers of the tensor.
    signed : bool
        Whether the integers are -128 to 127, or 0 to 255.

    Raises
    ------
    FormatError
        The scale is not positive and finite.

    Examples
    --------
    >>> span(0.5, 55, signed=False)
    Threshold(threshold=100.0, low=-27.5, high=100.0)
    """
    if not (math.isfinite(scale) and scale > 0):
        raise FormatError(f"Scale {scale} is not positive and finite. Calibrate again.")
    least = -128 if signed else 0
    low, high = (least - zero_point) * float(scale), (least + 255 - zero_point) * float(scale)
    return Threshold(threshold=max(-low, high), low=low, high=high)


def span_of(entry: Threshold, signed: bool) -> tuple[np.float32, int]:
    """Return scale and zero_point that the compiler gives an entry: inverse of `span`.

    Parameters
    ----------
    signed : bool
        Whether the zero_point is counted in -128 to 127, or in 0 to 255.

    Raises
    ------
    FormatError
        The range is empty, or does not contain 0.

    Examples
    --------
    >>> scale, zero_point = span_of(Threshold(threshold=100.0, low=-27.5, high=100.0), signed=False)
    >>> float(scale), zero_point
    (0.5, 55)
    """
    scale = (entry.high - entry.low) / 255
    if not (np.float32(scale) > 0 and math.isfinite(scale) and entry.low <= 0 <= entry.high):
        raise FormatError(
            f"The range {entry.low} to {entry.high} is empty or does not contain 0. Calibrate "
            "again."
        )
    return np.float32(scale), int(np.rint(-entry.low / scale)) - (128 if signed else 0)
