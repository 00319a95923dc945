"""Outputs of the YOLO detectors.

============  =====================================================================================
``yolov5``    (N, boxes, 5 + classes): centre and size in pixels, objectness, classes; the export of
              ultralytics/yolov5 (``export.py``). Selection as in ``utils/general.py:
              non_max_suppression``, called by ``val.py``.
``yolov7``    the same shapes; the export of WongKinYiu/yolov7 (``export.py --grid``). Selection as
              in ``utils/general.py: non_max_suppression``, called by ``test.py``: with one class,
              the score is the objectness.
``yolov8``    (N, 4 + classes, boxes): centre and size in pixels, classes; the export of ultralytics
              for YOLOv8 and YOLO11. Selection as in ``non_max_suppression`` of its validation.
``yolox``     (N, cells, 5 + classes): centre and size in units of the map, objectness, classes; the
              export of Megvii-BaseDetection/YOLOX (``tools/export_onnx.py``). Selection as in
              ``yolox/utils/boxes.py: postprocess``, called by ``tools/eval.py``.
============  =====================================================================================

``scripts/check_decoders.py`` found the same boxes, scores and classes as yolov5 7.0.14, yolov7
a207844, ultralytics 8.4.190 and YOLOX 6ddff48.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.decoders.grid import cell_counts, cells, corners_of
from onnxqat.evaluation.decoders.suppression import Candidates, Selection

__all__ = ["STRIDES", "YOLOV5", "YOLOV7", "YOLOV8", "YOLOX", "is_yolov5", "is_yolov8", "is_yolox",
           "yolov5", "yolov7", "yolov8", "yolox"]  # fmt: skip

Array = NDArray[Any]

STRIDES = (8, 16, 32)
FURTHER = 64  # stride of the fourth map of the larger models
ANCHORS = 3  # boxes per cell
YOLOV5 = Selection(min_score=0.001, max_overlap=0.6, most=300)
YOLOV7 = Selection(min_score=0.001, max_overlap=0.65, most=300)
YOLOV8 = Selection(min_score=0.001, max_overlap=0.7, most=300)
YOLOX = Selection(min_score=0.01, max_overlap=0.65, most=10**6, candidates=10**6,
                  best_class_only=True)  # fmt: skip


def is_yolov5(outputs: Sequence[Array], size: tuple[int, int]) -> bool:
    """Return whether outputs have YOLOv5's shapes, also YOLOv7's, for a (height, width)."""
    shape = outputs[0].shape
    counts = [ANCHORS * n for n in _totals(size)]
    return len(shape) == 3 and shape[2] > 5 and shape[1] in counts


def is_yolov8(outputs: Sequence[Array], size: tuple[int, int]) -> bool:
    """Return whether outputs have YOLOv8's shapes for an input of this (height, width)."""
    shape = outputs[0].shape
    return len(outputs) == 1 and len(shape) == 3 and shape[1] > 4 and shape[2] in _totals(size)


def is_yolox(outputs: Sequence[Array], size: tuple[int, int]) -> bool:
    """Return whether outputs have YOLOX's shapes for an input of this (height, width)."""
    shape = outputs[0].shape
    cells_there = sum(cell_counts(size, STRIDES))
    return len(outputs) == 1 and len(shape) == 3 and shape[2] > 5 and shape[1] == cells_there


def _totals(size: tuple[int, int]) -> list[int]:
    """Return the number of cells of the first three maps together, and of all four."""
    three = sum(cell_counts(size, STRIDES))
    return [three, three + sum(cell_counts(size, [FURTHER]))]


def yolov5(outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
    """Return the candidates of each image; a score is objectness times class probability.

    As in ``non_max_suppression``, boxes need an objectness above the minimum score.
    """
    del size
    found = []
    for rows in outputs[0]:
        kept = rows[rows[:, 4] > np.float32(YOLOV5.min_score)]
        found.append(Candidates(corners_of(kept[:, :4]), kept[:, 5:] * kept[:, 4:5]))
    return found


def yolov7(outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
    """Return the candidates of each image, as `yolov5`; with one class, scores are objectness."""
    if outputs[0].shape[2] > 6:
        return yolov5(outputs, size)
    return [Candidates(corners_of(rows[:, :4]), rows[:, 4:5]) for rows in outputs[0]]


def yolov8(outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
    """Return the candidates of each image."""
    del size
    rows = outputs[0].transpose(0, 2, 1)
    return [Candidates(corners_of(one[:, :4]), one[:, 4:]) for one in rows]


def yolox(outputs: Sequence[Array], size: tuple[int, int]) -> list[Candidates]:
    """Return the candidates of each image; a score is objectness times class probability."""
    grid = np.concatenate([cells(size, stride) for stride in STRIDES])
    stride = np.repeat(np.array(STRIDES, np.float32), cell_counts(size, STRIDES))[:, None]
    found = []
    for rows in outputs[0]:
        with np.errstate(over="ignore"):
            boxes = np.hstack([(rows[:, :2] + grid) * stride, np.exp(rows[:, 2:4]) * stride])
        found.append(Candidates(corners_of(boxes), rows[:, 5:] * rows[:, 4:5]))
    return found
