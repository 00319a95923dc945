"""Compare an output of a model with the same output of a reference model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.outputs import Output

__all__ = ["Likeness", "OutputFigures"]

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class OutputFigures:
    """Figures of one output, compared with the same output of the reference model.

    Attributes
    ----------
    output : str
        Name of the output.
    kind : {"classes", "integers", "values"}
        Kind of its values, see `onnxqat.outputs`.
    agreement : float or None
        ``classes``: fraction of the positions where both models have the largest score for the same
        class. ``integers``: fraction of equal values. Averaged over the positions of each sample,
        then over the samples. None for other values.
    relative_error : float or None
        Root mean square of the difference, divided by the standard deviation of the reference
        model's values. None for integers, and if the reference is constant or not finite.
    max_abs_diff : float or None
        Largest difference, in the output's units; NaN if any is NaN. None if the two have different
        shapes, which happens where the number of values depends on the data.
    classes, positions : int or None
        Number of classes, and number of positions per sample; None if the output has no class
        scores.
    """

    output: str
    kind: Literal["classes", "integers", "values"]
    agreement: float | None
    relative_error: float | None
    max_abs_diff: float | None
    classes: int | None = None
    positions: int | None = None

    @property
    def meaning(self) -> str:
        """Text that follows the agreement, or the relative error where there is no agreement."""
        if self.kind == "integers":
            return f"of the integers of '{self.output}' equal those of the reference model"
        if self.kind == "values":
            return f"root mean square error of '{self.output}', relative to its standard deviation"
        places = "samples"
        if self.positions not in (None, 1):
            places = f"positions ({self.positions} per sample)"
        return (
            f"of the {places} have the same top class of '{self.output}' ({self.classes} classes) "
            "as the reference model"
        )


class Likeness:
    """Running sums of one output over batches.

    Parameters
    ----------
    output : Output
        The output, with the meaning of its values.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self._samples, self._same = 0, 0.0
        self._largest = 0.0
        self._errors = 0.0  # sum of squared differences
        self._count, self._mean, self._squares = 0, 0.0, 0.0  # of the reference
        self._comparable = True
        self._places: tuple[int, int] | None = None  # classes and positions
        self._integers = False

    def add(self, ours: Array, theirs: Array) -> None:
        """Add one batch.

        Raises
        ------
        ModelError
            The shapes differ in an axis whose length does not depend on the data.
        """
        self._integers = theirs.dtype.kind in "iub"
        if ours.shape != theirs.shape:
            self._check_dynamic(ours.shape, theirs.shape)
            self._comparable = False
            return
        self._largest = float(np.max([self._largest, _difference(ours, theirs)]))
        self._samples += len(ours) if ours.ndim else 1
        if self._integers:
            self._same += _shares(ours == theirs)
            return
        self._agree(ours, theirs)
        self._spread(ours.astype(np.float64), theirs.astype(np.float64))

    def _check_dynamic(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        """Refuse shapes that differ in a fixed axis; a free axis may depend on the data."""
        shape = self.output.shape
        free = shape is not None and len(shape) == len(ours) == len(theirs)
        if not free or any(
            a != b and isinstance(n, int) for a, b, n in zip(ours, theirs, shape or (), strict=True)
        ):
            raise ModelError(
                f"Output '{self.output.name}' has the shapes {ours} and {theirs}. Give models "
                "whose outputs have the same shapes."
            )

    def _agree(self, ours: Array, theirs: Array) -> None:
        axis = self._axis(ours)
        if axis is not None:
            self._same += _shares(np.argmax(ours, axis) == np.argmax(theirs, axis))
            classes = ours.shape[axis]
            self._places = classes, ours[:1].size // classes

    def _axis(self, values: Array) -> int | None:
        """Return the axis of the classes if their scores compete, or None."""
        scores = self.output.scores
        if scores is None or values.ndim <= scores.axis or values.shape[scores.axis] < 2:
            return None
        # with independent scores most positions show no class, and their largest score is noise
        return None if scores.kind == "independent" and values.ndim > 2 else scores.axis

    def _spread(self, ours: Array, theirs: Array) -> None:
        if not theirs.size:
            return
        with np.errstate(invalid="ignore", over="ignore"):
            self._errors += float(np.square(ours - theirs).sum())
            mean, total = float(theirs.mean()), self._count + theirs.size
            distance = mean - self._mean
            self._squares += float(np.square(theirs - mean).sum())
            self._squares += distance**2 * self._count * theirs.size / total
        self._mean += distance * theirs.size / total
        self._count = total

    def result(self) -> OutputFigures:
        """Return the figures of all batches."""
        kind: Any = "integers" if self._integers else "classes" if self._places else "values"
        counted = self._comparable and self._samples > 0 and kind != "values"
        classes, positions = self._places or (None, None)
        return OutputFigures(
            output=self.output.name,
            kind=kind,
            agreement=self._same / self._samples if counted else None,
            relative_error=self._relative_error(),
            max_abs_diff=self._largest if self._comparable else None,
            classes=classes,
            positions=positions,
        )

    def _relative_error(self) -> float | None:
        if self._integers or not self._comparable or not self._squares > 0:
            return None
        error = math.sqrt(self._errors / self._squares)
        return error if math.isfinite(error) else None


def _shares(same: Array) -> float:
    """Return the sum over the samples of the mean over each sample's positions."""
    return float(same.reshape(len(same), -1).mean(axis=1).sum()) if same.ndim else float(same)


def _difference(a: Array, b: Array) -> float:
    """Return the largest difference; equal infinities count as equal, NaN gives NaN."""
    unequal = a != b  # compare before converting: large integers are not exact in float64
    difference = np.abs(a[unequal].astype(np.float64) - b[unequal].astype(np.float64))
    return float(np.max(difference, initial=0.0))
