"""Clipping ranges that follow the observed ranges in training: the method ``moving-average``.

================  ===============================================================================
activation        ``low += c * (batch_low - low)``, and the same for ``high``, starting with the
                  calibrated range; c is Horizon's and PyTorch's averaging constant; with 0 the
                  range does not change
weight            the smallest and the largest value of the current weights
================  ===============================================================================

A step quantizes with the range after the previous step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnxqat.calibration import weight_range
from onnxqat.errors import TrainingError
from onnxqat.pairs import scale_name, zero_point_name
from onnxqat.parallel import Workers
from onnxqat.plan import QuantPoint
from onnxqat.qparams import FloatArray, QuantParams, choose_qparams, quantized_range
from onnxqat.quantized import QuantizedModel
from onnxqat.train.engine import Flat
from onnxqat.train.form import TrainingForm

__all__ = ["Ranges"]


class Ranges:
    """The ranges of all quantization parameters that follow the observed ranges.

    Parameters
    ----------
    form : TrainingForm
        The training form, which lists these parameters.
    values : Flat
        The parameter values; scales and zero_points are set, weights are read.
    model : QuantizedModel
        The Q/DQ model: the plan and the calibrated parameters.
    constant : float
        The averaging constant, 0 to 1.

    Attributes
    ----------
    averages : float32 of shape (sets, 2)
        The clipping ranges of the activations; the rows of weights do not change.
    """

    def __init__(
        self, form: TrainingForm, values: Flat, model: QuantizedModel, constant: float
    ) -> None:
        self.values, self.constant = values, constant
        plan, params = model.plan, model.params
        self.points: dict[str, list[QuantPoint]] = {name: [] for name in form.observed}
        for point in plan.grid_points():
            if point.parameters in self.points:
                self.points[point.parameters].append(point)
        shape = (len(self.points), 2)
        self.averages: FloatArray = np.zeros(shape, np.float32)
        self.seen: FloatArray = np.zeros(shape, np.float32)
        for row, (name, points) in zip(self.averages, self.points.items(), strict=True):
            if _activations(points):
                row[...] = _clipping_range(params[name], points[0])

    def begin(self) -> None:
        """Reset the observed ranges at the beginning of a step."""
        self.seen[...] = (np.inf, -np.inf)

    def see(self, extremes: Mapping[str, tuple[float, float]]) -> None:
        """Add the smallest and the largest value of each tensor in one batch."""
        for row, name in zip(self.seen, self.points, strict=True):
            low, high = extremes.get(name, (np.inf, -np.inf))
            row[...] = min(row[0], low), max(row[1], high)

    def step(self, workers: Workers, frozen: Callable[[str], bool]) -> None:
        """Move the ranges, and set scales and zero_points accordingly.

        Parameters
        ----------
        workers : Workers
            The processes whose batches are included.
        frozen : callable
            Returns whether the scale of a name is frozen.

        Raises
        ------
        TrainingError
            An activation is infinite.
        """
        workers.widen(self.seen)
        for row, seen, (name, points) in zip(
            self.averages, self.seen, self.points.items(), strict=True
        ):
            if frozen(scale_name(name)):
                continue
            if not _activations(points):
                weight = self.values.views[points[0].tensor]
                self.assign(name, points[0], *weight_range(weight, points[0].spec, "minmax"))
            elif self.constant and seen[0] <= seen[1]:
                row += np.float32(self.constant) * (self._with_weights(seen, points) - row)
                self.assign(name, points[0], row[0], row[1])

    def _with_weights(self, seen: FloatArray, points: list[QuantPoint]) -> FloatArray:
        """Return a range that also covers the constants that share it."""
        weights = [self.values.views[p.tensor] for p in points if p.role == "weight"]
        low, high = seen
        for weight in weights:
            low, high = min(low, weight.min()), max(high, weight.max())
        return np.array([low, high], np.float32)

    def assign(self, name: str, point: QuantPoint, low: FloatArray, high: FloatArray) -> None:
        """Set scale and zero_point to cover a range.

        Raises
        ------
        TrainingError
            The range is not finite.
        """
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise TrainingError(
                f"'{name}': its values reached [{low}, {high}] in training. Try a smaller --lr."
            )
        params = choose_qparams(np.asarray(low), np.asarray(high), point.spec)
        views = self.values.views
        views[scale_name(name)][...] = params.scale
        if zero_point_name(name) in views:
            views[zero_point_name(name)][...] = params.zero_point


def _activations(points: list[QuantPoint]) -> bool:
    """Whether the range of these points is observed on activations."""
    return any(point.role == "activation" for point in points)


def _clipping_range(params: QuantParams, point: QuantPoint) -> tuple[float, float]:
    ends = quantized_range(point.spec, signed=params.signed)
    zero_point, scale = int(params.zero_point), float(params.scale)
    return (ends[0] - zero_point) * scale, (ends[1] - zero_point) * scale
