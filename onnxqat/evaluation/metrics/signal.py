"""Cosine and signal-to-quantization-noise ratio of each output, against the reference model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import MetricBatch, Values
from onnxqat.evaluation.similarity import Similarity

__all__ = ["cosine", "sqnr"]


def cosine(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the smallest cosine of any output, then the cosine of each, over all values."""
    found = {name: one.cosine for name, one in _similarities(outputs, data).items()}
    return _with_each("cosine", found)


def sqnr(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the smallest SQNR of any output in dB, then the SQNR of each, over all values."""
    found = {name: one.sqnr for name, one in _similarities(outputs, data).items()}
    return _with_each("sqnr", found)


def _with_each(name: str, found: dict[str, float]) -> dict[str, float]:
    # numpy's minimum keeps a NaN
    worst = {name: float(np.min(list(found.values())))}
    each = {f"{name}:{output}": value for output, value in found.items()}
    return worst | (each if len(each) > 1 else {})


def _similarities(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, Similarity]:
    found: dict[str, Similarity] = {}
    for values, batch in zip(outputs, data, strict=True):
        assert batch.reference is not None
        for name, reference in batch.reference.items():
            if values[name].shape != reference.shape:
                raise DataError(
                    f"--metric cosine, sqnr: '{name}' has the shape {values[name].shape}, in the "
                    f"reference model {reference.shape}: its size depends on the data. Give "
                    "another metric."
                )
            found.setdefault(name, Similarity()).add(reference, values[name])
    return found
