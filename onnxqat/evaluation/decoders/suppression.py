"""What is left of candidate boxes: those above a score, and of overlapping ones the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidates", "Detections", "Selection", "selected"]

Array = NDArray[Any]


class Candidates(NamedTuple):
    """Boxes of one image, each with a score of every class.

    Attributes
    ----------
    corners : float of shape (n, 4)
        x, y of the upper left and the lower right corner, in pixels of the model's input.
    scores : float of shape (n, classes)
        Probabilities.
    """

    corners: Array
    scores: Array


class Detections(NamedTuple):
    """Boxes that were found in one image, the surest first.

    Attributes
    ----------
    corners : float of shape (n, 4)
        x, y of the upper left and the lower right corner, in pixels.
    scores : float of shape (n,)
        Probabilities.
    classes : int64 of shape (n,)
        Indices.
    """

    corners: Array
    scores: Array
    classes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which candidates become detections.

    Attributes
    ----------
    min_score : float
        Lower ones are left out, and equal ones.
    max_overlap : float
        Intersection over union with a better box of the same class, above which a box is left out.
    most : int
        How many are kept of an image.
    candidates : int
        How many of the best take part in it.
    best_class_only : bool
        Whether a candidate can be of one class only.
    """

    min_score: float
    max_overlap: float
    most: int
    candidates: int = 30000
    best_class_only: bool = False


def selected(found: Candidates, rule: Selection) -> Detections:
    """Return the detections among the candidates of one image."""
    scores = found.scores
    taken = scores > rule.min_score
    if rule.best_class_only:
        best = np.zeros_like(taken)
        best[np.arange(len(scores)), scores.argmax(axis=1)] = True
        taken &= best
    rows, classes = np.nonzero(taken)
    order = np.argsort(-scores[rows, classes], kind="stable")[: rule.candidates]
    rows, classes = rows[order], classes[order]
    kept = np.zeros(len(rows), bool)
    for label in np.unique(classes):
        chosen = np.flatnonzero(classes == label)
        kept[chosen[_suppressed(found.corners[rows[chosen]], rule.max_overlap)]] = True
    rows, classes = rows[kept][: rule.most], classes[kept][: rule.most]
    return Detections(found.corners[rows], scores[rows, classes], classes)


def _suppressed(corners: Array, limit: float) -> list[int]:
    """Return which boxes greedy non-maximum suppression keeps; the best come first."""
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    left, kept = np.arange(len(corners)), []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(corners[best, :2], corners[left, :2])
        high = np.minimum(corners[best, 2:], corners[left, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        with np.errstate(invalid="ignore"):
            overlap = common / (area[best] + area[left] - common)
        left = left[~(overlap > limit)]
    return kept
