"""The contents of Sophgo's calibration table, independent of its text.

`onnxqat.formats.sophgo` reads and writes the text, and defines what the numbers mean.
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
        In a symmetric table the value of the largest integer, in units of the tensor; positive. In
        an asymmetric table the larger magnitude of ``low`` and ``high``.
    low, high : float
        Clipping range in units of the tensor; ``low`` is 0 if the integers are unsigned and their
        zero_point is 0.
    """

    threshold: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightScales:
    """Grid of one weight: one scale per output channel, or a single one for the whole tensor.

    Attributes
    ----------
    scales : tuple of float
        Units of the weight per level; positive.
    zero_points : tuple of int
        One for each scale.
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
        The same for tensors of 4 bits; a tensor read at both widths appears in both dicts.
    int4_ops : tuple of str
        Names of the ops that compute with 4 bits.
    weights : dict of str to WeightScales
        By the name that the compiler looks up.
    work_mode : str
        One of `onnxqat.formats.sophgo.WORK_MODES`.
    """

    activations: dict[str, Threshold] = field(default_factory=dict)
    int4: dict[str, Threshold] = field(default_factory=dict)
    weights: dict[str, WeightScales] = field(default_factory=dict)
    int4_ops: tuple[str, ...] = ()
    work_mode: str = "QAT_all_int8"
