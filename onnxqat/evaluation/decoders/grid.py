"""Cells of a detector's output maps, and conversion of boxes from centre and size to corners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cell_counts", "cells", "corners_of"]

Array = NDArray[Any]


def cell_counts(size: tuple[int, int], strides: Sequence[int]) -> list[int]:
    """Return the number of cells of each map, for an input of this (height, width)."""
    return [-(-size[0] // stride) * -(-size[1] // stride) for stride in strides]


def cells(size: tuple[int, int], stride: int) -> Array:
    """Return column and row of each cell of a map, row by row, float32 of shape (cells, 2)."""
    rows, columns = (-(-length // stride) for length in size)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x, y], axis=1).astype(np.float32)


def corners_of(boxes: Array) -> Array:
    """Convert boxes (centre x, centre y, width, height) to corners, both of shape (..., 4)."""
    half = boxes[..., 2:4] / 2
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)
