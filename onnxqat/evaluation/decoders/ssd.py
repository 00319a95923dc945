"""Outputs of torchvision's SSD (Liu et al. 2016, https://arxiv.org/abs/1512.02325).

A model has the two outputs of the head: first the offsets of the boxes from default boxes,
(N, boxes, 4), then the logits of the classes, (N, boxes, 1 + classes), with the background first.
The default boxes are no outputs. They are known for the two networks that torchvision has:

============  =====================================================================
``ssd``       ``ssd300_vgg16``: 8,732 boxes of six maps, for images of 300 x 300
``ssdlite``   ``ssdlite320_mobilenet_v3_large``: 3,234 boxes of six maps, 320 x 320
============  =====================================================================

Decoding and selection follow ``torchvision/models/detection``: ``anchor_utils.py:
DefaultBoxGenerator``, ``_utils.py: BoxCoder.decode_single`` and ``ssd.py:
postprocess_detections``, with the settings in ``ssd.py`` and ``ssdlite.py``. Class 0 is the first
label behind the background. Models with 91 labels have COCO's category ids as labels; the ten ids
that COCO does not use are left out, so that the classes are 0 to 79, as in COCO's files.
``scripts/check_decoders.py`` found the same boxes, scores and classes as torchvision 0.29.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.decoders.grid import corners_of
from onnxqat.evaluation.decoders.suppression import Candidates, Selection

__all__ = ["SSD300", "SSDLITE320", "Ssd"]

Array = NDArray[Any]

WEIGHTS = (10, 10, 5, 5)  # the offsets are multiples of a tenth and a fifth
LARGEST = float(np.log(1000 / 16))  # of the logarithm of a size relative to its default box
COCO_LABELS = 91
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # COCO's category ids without a category


@dataclass(frozen=True, kw_only=True)
class Ssd:
    """An SSD with its default boxes.

    Attributes
    ----------
    size : int
        Height and width of the input.
    maps : tuple of int
        Number of rows, and of columns, of each map.
    steps : tuple of float
        Distance of the cells of each map, in pixels.
    scales : tuple of float
        Size of the square default box of each map, relative to the input; one more than maps.
    ratios : tuple of tuple of int
        Aspect ratios of the other default boxes of each map; each is also used upright.
    selection : Selection
        How detections are selected from the candidates.
    most_of_class : int
        Maximum number of candidates of each class.
    """

    size: int
    maps: tuple[int, ...]
    steps: tuple[float, ...]
    scales: tuple[float, ...]
    ratios: tuple[tuple[int, ...], ...]
    selection: Selection
    most_of_class: int

    def fits(self, outputs: Sequence[Array], size: tuple[int, int]) -> bool:
        """Return whether outputs have the shapes of this SSD for an input of (height, width)."""
        shapes = [output.shape for output in outputs]
        return (
            size == (self.size, self.size)
            and len(shapes) == 2
            and all(len(shape) == 3 for shape in shapes)
            and shapes[0][1:] == self.boxes.shape
            and shapes[1][1] == len(self.boxes)
            and shapes[1][2] > 1
        )

    def candidates(self, outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
        """Return the candidates of each image: for each class, the boxes with the best scores."""
        del size
        return [
            Candidates(self._corners(offsets), self._scores(logits))
            for offsets, logits in zip(*outputs, strict=True)
        ]

    @cached_property
    def boxes(self) -> Array:
        """Centre x and y, width and height of the default boxes in pixels, of shape (n, 4)."""
        found = []
        for k, cells in enumerate(self.maps):
            scale, between = self.scales[k], (self.scales[k] * self.scales[k + 1]) ** 0.5
            shapes = [(scale, scale), (between, between)]
            for ratio in self.ratios[k]:
                longer, shorter = scale * ratio**0.5, scale / ratio**0.5
                shapes += [(longer, shorter), (shorter, longer)]
            centres = (np.arange(cells) + 0.5) * self.steps[k]
            y, x = np.meshgrid(centres, centres, indexing="ij")
            middle = np.stack([x, y], axis=-1).reshape(-1, 1, 2).repeat(len(shapes), axis=1)
            sizes = np.broadcast_to(np.clip(shapes, 0, 1) * self.size, middle.shape)
            found.append(np.concatenate([middle, sizes], axis=2).reshape(-1, 4))
        return np.concatenate(found)

    def _corners(self, offsets: Array) -> Array:
        relative = offsets.astype(np.float64) / WEIGHTS
        centres = self.boxes[:, :2] + relative[:, :2] * self.boxes[:, 2:]
        sizes = self.boxes[:, 2:] * np.exp(np.minimum(relative[:, 2:], LARGEST))
        return np.clip(corners_of(np.hstack([centres, sizes])), 0, self.size)

    def _scores(self, logits: Array) -> Array:
        """Return probabilities; 0 for boxes that are not among the best ones of a class."""
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (powers / powers.sum(axis=1, keepdims=True))[:, 1:]
        if logits.shape[1] == COCO_LABELS:
            scores = np.delete(scores, np.array(UNUSED) - 1, axis=1)
        best = np.argsort(-scores, axis=0, kind="stable")[: self.most_of_class]
        kept: Array = np.zeros_like(scores)
        np.put_along_axis(kept, best, np.take_along_axis(scores, best, axis=0), axis=0)
        return kept


SSD300 = Ssd(
    size=300,
    maps=(38, 19, 10, 5, 3, 1),
    steps=(8, 16, 32, 64, 100, 300),
    scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    selection=Selection(min_score=0.01, max_overlap=0.45, most=200, candidates=10**6),
    most_of_class=400,
)
SSDLITE320 = Ssd(
    size=320,
    maps=(20, 10, 5, 3, 2, 1),
    steps=tuple(320 / cells for cells in (20, 10, 5, 3, 2, 1)),
    scales=(*(0.2 + 0.75 * k / 5 for k in range(6)), 1.0),
    ratios=((2, 3),) * 6,
    selection=Selection(min_score=0.001, max_overlap=0.55, most=300, candidates=10**6),
    most_of_class=300,
)
