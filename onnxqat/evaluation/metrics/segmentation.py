"""Mean intersection over union for segmentation (the mean Jaccard index of the classes).

Counts all pixels of all samples, as in the PASCAL VOC challenge (Everingham et al. 2010, section
4.2): ``IoU_c = TP_c / (TP_c + FP_c + FN_c)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import Array, MetricBatch, Values

__all__ = ["VOID", "mean_iou"]

VOID = 255  # marks pixels without a class in PASCAL VOC, Cityscapes and others


def mean_iou(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the mean IoU of the classes that occur in the masks or predictions.

    The output has scores of shape (N, classes, height, width), or classes as integers of shape
    (N, height, width). The mask has a class for each pixel. Pixels with a negative class are
    ignored; so are pixels with class 255, if the output has fewer classes.

    Raises
    ------
    DataError
        The mask does not fit the output, or all its pixels are ignored.
    """
    counts = np.zeros((0, 0), np.int64)
    for values, batch in zip(outputs, data, strict=True):
        (name, mask), *others = batch.truth.items()
        if others:
            message = "--metric mean-iou: measures one output. Give one --truth OUTPUT=ARRAY."
            raise DataError(message)
        found, classes = _classes(name, values[name])
        counts = _grown(counts, classes)
        counts += _confusion(name, found, mask, len(counts))
    seen = counts.sum(axis=0) + counts.sum(axis=1) > 0
    if not seen.any():
        raise DataError("--metric mean-iou: all pixels of the masks are ignored. Check the masks.")
    hits = np.diag(counts)[seen]
    union = (counts.sum(axis=0) + counts.sum(axis=1))[seen] - hits
    return {"mean_iou": float(np.mean(hits / union))}


def _classes(name: str, values: Array) -> tuple[NDArray[np.int64], int]:
    """Return the class of each pixel, and the number of classes that are known so far."""
    if values.dtype.kind in "iu" and values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind in "iu" and values.ndim == 3:
        return values.astype(np.int64), int(values.max(initial=0)) + 1
    if values.ndim != 4 or values.shape[1] < 2:
        raise DataError(
            f"--metric mean-iou: output '{name}' has the shape {values.shape}. Scores must be "
            "(N, classes, height, width), integers (N, height, width)."
        )
    return values.argmax(axis=1), values.shape[1]


def _grown(counts: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    more = max(classes - len(counts), 0)
    return np.pad(counts, ((0, more), (0, more)))


def _confusion(name: str, found: NDArray[np.int64], mask: Array, classes: int) -> NDArray[np.int64]:
    """Count the pixels for each pair of true and predicted class."""
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.shape != found.shape or mask.dtype.kind not in "iu":
        raise DataError(
            f"--metric mean-iou: the mask of '{name}' is {mask.dtype} of shape {mask.shape}, but "
            f"the output has classes of shape {found.shape}. Store integer masks of that size."
        )
    wanted = mask.astype(np.int64)
    counted = (wanted >= 0) & ((wanted != VOID) | (classes > VOID))
    largest = int(wanted[counted].max(initial=0))
    if largest >= classes:
        raise DataError(
            f"--metric mean-iou: the mask of '{name}' has the class {largest}, but the output has "
            f"{classes} classes. Store -1 or {VOID} for pixels to be ignored."
        )
    pairs = classes * wanted[counted] + found[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
