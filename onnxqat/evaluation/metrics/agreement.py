"""Agreement of a model with a reference model."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnxqat.errors import DataError
from onnxqat.evaluation.likeness import Likeness
from onnxqat.evaluation.metrics.batch import MetricBatch, Values

__all__ = ["agreement"]


def agreement(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return the fraction of equal classes or integers: the mean over outputs, then each output's.

    See `onnxqat.evaluation.likeness.OutputFigures`.

    Raises
    ------
    DataError
        No output holds classes or integers.
    """
    likeness: dict[str, Likeness] = {}
    for values, batch in zip(outputs, data, strict=True):
        assert batch.reference is not None
        for name, output in batch.outputs.items():
            kept = likeness.setdefault(name, Likeness(output))
            kept.add(values[name], batch.reference[name])
    found = {name: one.result().agreement for name, one in likeness.items()}
    shares = {name: share for name, share in found.items() if share is not None}
    if not shares:
        raise DataError(
            "--metric agreement: no output holds classes. Give --metric cosine, which compares "
            "values."
        )
    mean = math.fsum(shares.values()) / len(shares)
    each = {f"agreement:{name}": share for name, share in shares.items()}
    return {"agreement": mean} | (each if len(each) > 1 else {})
