"""Selection of detections: a minimum score, then non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Candidates", "Detections", "Selection", "selected"]

Array = NDArray[Any]


class Candidates(NamedTuple):
    """Candidate boxes of one image, each with a score for every class.

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
    """Boxes that were found in one image, highest score first.

    Attributes
    ----------
    corners : float of shape (n, 4)
        x, y of the upper left and the lower right corner, in pixels.
    scores : float of shape (n,)
        Probabilities.
    classes : int64 of shape (n,)
        Class indices.
    """

    corners: Array
    scores: Array
    classes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How detections are selected from candidates.

    Attributes
    ----------
    min_score : float
        Candidates with this score or a lower one are dropped.
    max_overlap : float
        A box is dropped if its intersection over union with a better box of the same class is
        larger than this.
    most : int
        Maximum number of detections per image.
    candidates : int
        Maximum number of candidates, the best ones, that enter the suppression.
    best_class_only : bool
        Whether each candidate keeps only its best class.
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
    """Return the indices that greedy non-maximum suppression keeps; ``corners`` is best first."""
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
