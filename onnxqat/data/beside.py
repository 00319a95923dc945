"""Boxes and masks that lie beside images, as arrays.

==============  =========================================================================
``boxes``       of shape (N, most, 6): class, centre, width, height, relative to the image file, and
                1 for a crowd; -1 as the class where an image has fewer
``size``        height and width of the image file
``targets``     of shape (N, most, 5): class, centre, width, height, relative to the model's
                input, clipped to it; rows of -1 follow. Crowds are left out
``targets_count``  number of targets
``mask``        of shape (N, height, width): the class of each pixel of the model's input
==============  =========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import Header
from onnxqat.data.boxes import labels_beside, read_boxes
from onnxqat.data.columns import Column, FileColumn, Unreadable, ValueColumn
from onnxqat.data.images import image_size
from onnxqat.data.masks import MaskReader, masks_beside, masks_of
from onnxqat.data.preprocess import Preprocessing, boxes_in_input, output_size

__all__ = [
    "BOXES",
    "MASK",
    "MOVED",
    "SIZE",
    "TARGETS",
    "TARGETS_COUNT",
    "centres_of",
    "columns_beside",
    "corners_of",
    "visible",
]

BOXES, SIZE, MASK = "boxes", "size", "mask"
TARGETS, TARGETS_COUNT = "targets", "targets_count"
MOVED = frozenset({MASK, TARGETS, TARGETS_COUNT})  # arrays that augmentation moves
VISIBLE = 0.1  # the least share of a box's area that has to be inside of the input
ROW = 5  # class, cx, cy, w, h


def columns_beside(
    name: str,
    images: Sequence[str],
    preprocessing: Preprocessing,
    unreadable: Unreadable,
    *,
    boxes: Path | None,
    masks: Path | None,
    classes: int | None = None,
) -> dict[str, Column]:
    """Return the columns of boxes and masks.

    Parameters
    ----------
    name : str
        What the user called the data.
    images : sequence of str
        The image files.
    preprocessing : Preprocessing
        Preprocessing of the images, with the size of the model's input.
    unreadable : Unreadable
        What happens to masks that cannot be read.
    boxes, masks : Path or None
        File or folder of boxes, folder of masks (default: beside a folder ``images``).
    classes : int, optional
        Number of classes that boxes may have.

    Raises
    ------
    DataError
        There is a folder of masks, and an image has none in it.
    """
    folder = Path(images[0]).parent
    columns: dict[str, Column] = {}
    if boxes is not None or labels_beside(folder) is not None:
        found = ValueColumn(
            name if boxes is None else str(boxes),
            lambda: read_boxes(boxes, list(map(Path, images)), classes),
        )
        targets = _Targets(images, found, preprocessing)
        columns[BOXES], columns[SIZE] = found, _Sizes(images)
        columns[TARGETS], columns[TARGETS_COUNT] = targets, _Counts(targets)
    masks = masks or masks_beside(folder)
    if masks is not None:
        files = masks_of(images, masks)
        reader = MaskReader(dict(zip(files, images, strict=True)), preprocessing)
        columns[MASK] = FileColumn(name, files, reader, unreadable)
    return columns


class _Sizes:
    """Height and width of each image file."""

    decoded = False

    def __init__(self, images: Sequence[str]) -> None:
        self._images = images

    def sample(self) -> Header:
        return Header((2,), np.dtype(np.int64))

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return np.array([image_size(self._images[i]) for i in indices.tolist()], np.int64)

    def origin(self, index: int) -> str:
        return self._images[index]


class _Targets:
    """The boxes of each image, relative to the model's input."""

    decoded = False

    def __init__(
        self, images: Sequence[str], boxes: ValueColumn, preprocessing: Preprocessing
    ) -> None:
        self._images, self._boxes, self._preprocessing = images, boxes, preprocessing

    def sample(self) -> Header:
        return Header((self._boxes.sample().shape[0], ROW), np.dtype(np.float32))

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        rows = np.full((len(indices), *self.sample().shape), -1, np.float32)
        for row, index, boxes in zip(
            rows, indices.tolist(), self._boxes.read(indices), strict=True
        ):
            found = _seen(boxes, image_size(self._images[index]), self._preprocessing)
            row[: len(found)] = found
        return rows

    def origin(self, index: int) -> str:
        return self._images[index]


class _Counts:
    """Number of targets of each image."""

    decoded = False

    def __init__(self, targets: _Targets) -> None:
        self._targets = targets

    def sample(self) -> Header:
        return Header((), np.dtype(np.int64))

    def read(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[np.int64] = (self._targets.read(indices)[:, :, 0] >= 0).sum(axis=1)
        return found

    def origin(self, index: int) -> str:
        return self._targets.origin(index)


def _seen(
    boxes: NDArray[np.float64], size: tuple[int, int], preprocessing: Preprocessing
) -> NDArray[np.float64]:
    """Return class, centre, width and height of one image's boxes, relative to the input."""
    boxes = boxes[(boxes[:, 0] >= 0) & (boxes[:, 5] == 0)]
    seen = output_size(*size, preprocessing)
    if seen is None or 0 in size:  # reading the pixels raises an error that says why
        return boxes[:0, :ROW]
    pixels = np.array([size[1], size[0]] * 2, np.float64)
    corners = boxes_in_input(corners_of(boxes[:, 1:5]) * pixels, size, seen, preprocessing)
    corners /= np.array([seen[1], seen[0]] * 2, np.float64)
    kept, corners = visible(corners)
    return np.concatenate([boxes[kept, :1], centres_of(corners)], axis=1)


def corners_of(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x, y of both corners, of centre, width and height; shapes (n, 4)."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def centres_of(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return centre, width and height, of x, y of both corners; shapes (n, 4)."""
    sizes = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners[:, :2] + sizes / 2, sizes], axis=1)


def visible(corners: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which boxes lie inside of the unit square, and these boxes clipped to it.

    A box is dropped if less than a tenth of its area is inside.

    Parameters
    ----------
    corners : float64 of shape (n, 4)
        x, y of the upper left and of the lower right corner.
    """
    inside = np.clip(corners, 0, 1)
    area, rest = (np.prod(c[:, 2:] - c[:, :2], axis=1) for c in (corners, inside))
    kept = (rest > 0) & (rest >= VISIBLE * area)
    return kept, inside[kept]
