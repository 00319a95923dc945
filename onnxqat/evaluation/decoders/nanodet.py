"""NanoDet's outputs (RangiLyu/nanodet): generalized focal loss (Li et al. 2020).

A model has six outputs for three maps: first the class scores of each map, (N, cells, classes),
then its distances from the cell's centre to the left, top, right and bottom of the box, as logits
of a distribution over 0 to 7 strides, (N, cells, 4 * 8). Decoding and selection follow
``nanodet/model/head/gfl_head.py: get_bboxes_single`` of version 0.4.2, the last version whose
export has six outputs. ``scripts/check_decoders.py`` found the same boxes, within 2e-5 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.decoders.grid import cell_counts, cells
from onnxqat.evaluation.decoders.suppression import Candidates, Selection

__all__ = ["NANODET", "is_nanodet", "nanodet"]

Array = NDArray[Any]

STRIDES = (8, 16, 32)
BINS = 8
MOST_OF_MAP = 1000  # only the best cells of each map become candidates
NANODET = Selection(min_score=0.05, max_overlap=0.6, most=100, candidates=10**6)


def is_nanodet(outputs: Sequence[Array], size: tuple[int, int]) -> bool:
    """Return whether outputs have NanoDet's shapes for an input of this (height, width)."""
    counts = cell_counts(size, STRIDES)
    shapes = [output.shape for output in outputs]
    return (
        len(shapes) == 2 * len(STRIDES)
        and all(len(shape) == 3 for shape in shapes)
        and [shape[1] for shape in shapes] == 2 * counts
        and all(shape[2] == 4 * BINS for shape in shapes[3:])
    )


def nanodet(outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
    """Return the candidates of each image: the cells of each map with the highest scores."""
    maps = list(zip(STRIDES, outputs[:3], outputs[3:], strict=True))
    return [
        _joined([_of_map(size, stride, scores[i], logits[i]) for stride, scores, logits in maps])
        for i in range(len(outputs[0]))
    ]


def _of_map(size: tuple[int, int], stride: int, scores: Array, logits: Array) -> Candidates:
    best = np.argsort(-scores.max(axis=1), kind="stable")[:MOST_OF_MAP]
    centre = (cells(size, stride)[best] + 0.5) * stride
    values = logits[best].reshape(-1, 4, BINS).astype(np.float64)
    powers = np.exp(values - values.max(axis=2, keepdims=True))
    distance = powers @ np.arange(BINS) / powers.sum(axis=2) * stride
    corners = np.hstack([centre - distance[:, :2], centre + distance[:, 2:]])
    height, width = size
    return Candidates(np.clip(corners, 0, [width, height] * 2), scores[best])


def _joined(parts: Sequence[Candidates]) -> Candidates:
    corners, scores = zip(*parts, strict=True)
    return Candidates(np.concatenate(corners), np.concatenate(scores))
