"""What a calibration table holds, whatever text it is written as.

Pure data, in the terms of the Sophgo layout; each format's module says what the numbers mean to
its compiler and refuses what it cannot write.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CalibrationTable", "Threshold", "WeightScales"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Range of one activation.

    Attributes
    ----------
    threshold : float
        Value of the largest level, in units of the tensor; positive.
    low, high : float
        Clipping range in units of the tensor; ``low`` is 0 where the integers are unsigned.
    """

    threshold: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScales:
    """Grid of one weight, one entry per output channel, or a single one for the whole tensor.

    Attributes
    ----------
    scales : tuple of float
        Units of the weight per level; positive.
    zero_points : tuple of int
        As many as scales.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationTable:
    """The grids of a network's activations and weights, in the order they are written.

    Attributes
    ----------
    activations : dict of str to Threshold
        By the name that the compiler looks up.
    int4 : dict of str to Threshold
        The same for tensors of 4 bits; a tensor read at both widths stands in both.
    weights : dict of str to WeightScales
        By the name that the compiler looks up.
    work_mode : str
        One of the words that the compiler knows.
    """

    activations: dict[str, Threshold] = field(default_factory=dict)
    int4: dict[str, Threshold] = field(default_factory=dict)
    weights: dict[str, WeightScales] = field(default_factory=dict)
    work_mode: str = "QAT_all_int8"
