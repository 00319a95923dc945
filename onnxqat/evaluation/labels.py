"""Accuracy of a classifier, and a warning when the labels cannot be those of its own classes.

A trained network is right more often than chance, and its accuracy is close to its mean confidence.
If neither holds, the labels number the classes differently than the outputs do, or the images are
not preprocessed as in training. An accuracy is doubted if its 95 % upper bound (Wilson 1927) is

- below 10 %, or below the smaller of twice chance and chance + 10 % where that is larger, or
- below a quarter of the mean confidence.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError

__all__ = ["CAUSES", "Hits", "doubt"]

FEWEST = 100  # labels; with fewer the bound is too wide to be useful
NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
CAUSES = (
    "Check whether the labels are the indices of the model's own classes (--classes), "
    "--mean and --scale, --pixel-format, and --layout."
)


class Hits:
    """Running sums over labelled samples.

    Attributes
    ----------
    samples, classes : int
        Number of samples so far, and number of classes in the last batch.
    correct : dict of str to int
        Number of correct samples, by name of the metric.
    """

    def __init__(self) -> None:
        self.samples = self.classes = 0
        self.correct: dict[str, int] = {}
        self._confidence = 0.0

    def add(self, scores: NDArray[np.generic], labels: NDArray[np.int64]) -> None:
        """Count one batch.

        Raises
        ------
        DataError
            The scores are not of shape (N, classes), or a label is not one of the classes.
        """
        if scores.ndim != 2:
            raise DataError(
                f"Top-1 needs an output of shape (N, classes); the first output is "
                f"{scores.shape}. Evaluate with --label none and --against."
            )
        self.classes = scores.shape[1]
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= self.classes:
            raise DataError(
                f"Labels range from {labels.min()} to {labels.max()}; the model has "
                f"{self.classes} classes, 0 to {self.classes - 1}. Check the labels."
            )
        values = scores.astype(np.float64)
        ranking = np.argsort(-values, axis=1, kind="stable")
        for name, depth in (("top1", 1), ("top5", 5)):
            if depth == 1 or self.classes >= 10:
                hits = int((ranking[:, :depth] == labels[:, None]).any(axis=1).sum())
                self.correct[name] = self.correct.get(name, 0) + hits
        self.samples += len(labels)
        self._confidence += float(_confidences(values).sum())

    @property
    def fractions(self) -> dict[str, float]:
        """The metrics as fractions of one; empty before the first batch."""
        return {name: hits / self.samples for name, hits in self.correct.items()}

    @property
    def confidence(self) -> float | None:
        """The mean of the largest probability; None if it is not finite."""
        mean = self._confidence / self.samples if self.samples else math.nan
        return mean if math.isfinite(mean) else None


def _confidences(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest probability of each row of scores or probabilities."""
    if values.size and values.min() >= 0 and values.max() <= 1:
        return np.asarray(values.max(axis=1))
    with np.errstate(all="ignore"):
        powers = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(1 / powers.sum(axis=1))


def doubt(accuracy: float, samples: int, classes: int, confidence: float | None) -> str | None:
    """Return why the labels cannot be those that the classifier was trained with, or None.

    Parameters
    ----------
    accuracy, confidence : float
        Top-1 accuracy and the mean of the largest probability, as fractions of one.
    samples, classes : int
        An accuracy over fewer than 100 samples is never doubted.
    """
    if samples < FEWEST or not classes:
        return None
    upper = _upper_bound(accuracy, samples)
    least = max(0.1, min(2 / classes, 1 / classes + 0.1))
    found = f"is right on {accuracy:.2%} of {samples} labels (95 % upper bound {upper:.2%})"
    if upper < least:
        return f"{found}, and a trained network with {classes} classes reaches {least:.0%}"
    if confidence is not None and upper < confidence / 4:
        return f"{found}, and its mean confidence is {confidence:.2%}"
    return None


def _upper_bound(fraction: float, count: int) -> float:
    """Return the upper end of Wilson's 95 % interval of a fraction."""
    z2 = NORMAL_95**2
    spread = NORMAL_95 * math.sqrt(fraction * (1 - fraction) / count + z2 / (4 * count**2))
    return (fraction + z2 / (2 * count) + spread) / (1 + z2 / count)
