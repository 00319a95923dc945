"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Iterator

from onnxqat.errors import DataError
from onnxqat.evaluation.labels import Hits
from onnxqat.evaluation.metrics.batch import MetricBatch, Values

__all__ = ["top1", "top5"]


def top1(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the fraction of samples whose label has the highest score in the first output."""
    return {"top1": _fractions("top1", outputs, data)["top1"]}


def top5(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the fraction of samples whose label is among the five highest scores.

    Raises
    ------
    DataError
        There are fewer than ten classes.
    """
    found = _fractions("top5", outputs, data)
    if "top5" not in found:
        raise DataError("--metric top5: the model has fewer than ten classes. Give top1.")
    return {"top5": found["top5"]}


def _fractions(
    name: str, outputs: Iterator[Values], data: Iterator[MetricBatch]
) -> dict[str, float]:
    hits = Hits()
    for values, batch in zip(outputs, data, strict=True):
        if batch.labels is None:
            raise DataError(f"--metric {name}: the data have no labels. Name them with --label.")
        hits.add(next(iter(values.values())), batch.labels)
    return hits.fractions
