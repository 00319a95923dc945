"""Mean average precision of boxes, as COCO's evaluation computes it (pycocotools).

Lin et al. 2014 (https://arxiv.org/abs/1405.0312): the area under the precision-recall curve,
averaged over the classes and over the overlaps 0.50 to 0.95.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnxqat.data.boxes import COLUMNS
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation.decoders import Detections
from onnxqat.evaluation.metrics.batch import Array, MetricBatch, Values

__all__ = ["mean_average_precision", "require_pycocotools"]

Size = tuple[int, int]


def mean_average_precision(
    outputs: Iterator[Values], data: Iterator[MetricBatch]
) -> dict[str, float]:
    """Return ``map`` (mean over the overlaps 0.50 to 0.95), ``map50`` and ``map75``.

    Raises
    ------
    OptionError
        pycocotools is not installed.
    DataError
        There are no boxes.
    ModelError
        The outputs cannot be decoded.
    """
    require_pycocotools()
    found: list[Detections] = []
    wanted: list[Array] = []
    sizes: list[Size] = []
    for values, batch in zip(outputs, data, strict=True):
        found += batch.detections(values)
        boxes = batch.arrays["boxes"]
        if boxes.ndim != 3 or boxes.shape[2] not in (COLUMNS - 1, COLUMNS):
            raise DataError(
                f"--metric map: array 'boxes' has samples of shape {boxes.shape[1:]}. Store rows "
                "(class, cx, cy, w, h), and fill unused rows with class -1."
            )
        wanted += [one[one[:, 0] >= 0] for one in boxes]
        sizes += batch.sizes
    return _figures(found, wanted, sizes)


def require_pycocotools() -> None:
    """Raise OptionError if pycocotools is not installed."""
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--metric map: needs pycocotools. Run pip install 'onnxqat[detection]'."
        ) from error


def _figures(found: list[Detections], wanted: list[Array], sizes: list[Size]) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = _annotations(wanted, sizes), _results(found)
    if not truth:
        raise DataError("--metric map: no image has a box. Check --boxes.")
    if not results:
        return dict.fromkeys(("map", "map50", "map75"), 0.0)
    labels = {one["category_id"] for one in truth} | {one["category_id"] for one in results}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "width": w, "height": h} for i, (h, w) in enumerate(sizes)],
            "annotations": truth,
            "categories": [{"id": label, "name": str(label)} for label in sorted(labels)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [max(float(value), 0.0) for value in evaluation.stats[:3]]
    return dict(zip(("map", "map50", "map75"), stats, strict=True))


def _annotations(wanted: list[Array], sizes: list[Size]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for image, (boxes, (height, width)) in enumerate(zip(wanted, sizes, strict=True)):
        for label, x, y, w, h, *crowd in (boxes * _scale(boxes, height, width)).tolist():
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x - w / 2, y - h / 2, w, h],
                    "area": w * h,
                    "iscrowd": int(bool(crowd and crowd[0])),
                }
            )
    return rows


def _scale(boxes: Array, height: int, width: int) -> Array:
    """Return the factor for each column: class, centre, width, height and the crowd flag."""
    return np.array([1, width, height, width, height, 1][: boxes.shape[1]], np.float64)


def _results(found: list[Detections]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "category_id": label,
            "score": score,
            "bbox": [x, y, x2 - x, y2 - y],
        }
        for image, one in enumerate(found)
        for label, score, (x, y, x2, y2) in zip(
            one.classes.tolist(), one.scores.tolist(), one.corners.tolist(), strict=True
        )
    ]
