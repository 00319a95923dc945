"""Exact match and F1 of answers that are spans of a text, as SQuAD defines them.

Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250), section 6.1: exact match is the fraction
of answers that equal a true answer. F1 is the harmonic mean of the precision and recall of the
words; for each question the best true answer counts, and the questions are averaged. Here words are
token positions. The predicted span is the one with the largest ``start_i + end_j``, ``i <= j``
(Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import Array, MetricBatch, Values

__all__ = ["exact_match", "f1"]

Spans = NDArray[np.int64]  # first and last position, both inclusive


def exact_match(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return exact match, then F1.

    Two outputs of shape (N, positions) have the scores of the first and of the last position. Two
    arrays have the true positions, of shape (N,), or (N, answers) padded with -1.

    Raises
    ------
    DataError
        There are not two such outputs with arrays, or the arrays do not fit them.
    """
    exact, overlap = _scores(outputs, data)
    return {"exact_match": exact, "f1": overlap}


def f1(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> dict[str, float]:
    """Return F1, then exact match; see `exact_match`."""
    exact, overlap = _scores(outputs, data)
    return {"f1": overlap, "exact_match": exact}


def _scores(outputs: Iterator[Values], data: Iterator[MetricBatch]) -> tuple[float, float]:
    exact: list[float] = []
    overlap: list[float] = []
    for values, batch in zip(outputs, data, strict=True):
        start, end = _pair(values, batch)
        found, wanted = _best(values[start], values[end]), _wanted(batch, start, end)
        _check(wanted, len(found), values[start].shape)
        same = np.all(wanted == found[:, None], axis=2)
        exact += np.any(same, axis=1).astype(float).tolist()
        overlap += _overlap(found[:, None], wanted).max(axis=1).tolist()
    return math.fsum(exact) / len(exact), math.fsum(overlap) / len(overlap)


def _pair(values: Values, batch: MetricBatch) -> tuple[str, str]:
    """Return the outputs of the first and the last position, in the order of the model."""
    names = [name for name in values if name in batch.truth]
    shapes = {values[name].shape for name in names}
    if len(names) != 2 or len(shapes) != 1 or len(shapes.pop()) != 2:
        raise DataError(
            "--metric f1, exact-match: needs two outputs (N, positions), for the first and the "
            "last position. Give --truth START=ARRAY --truth END=ARRAY."
        )
    return names[0], names[1]


def _best(start: Array, end: Array) -> Spans:
    """Return the span with the largest sum of scores for each sample, of shape (N, 2)."""
    length = start.shape[1]
    sums = start.astype(np.float64)[:, :, None] + end.astype(np.float64)[:, None, :]
    sums[:, ~np.triu(np.ones((length, length), bool))] = -math.inf
    best = sums.reshape(len(sums), -1).argmax(axis=1)
    return np.stack(np.divmod(best, length), axis=1)


def _wanted(batch: MetricBatch, start: str, end: str) -> Spans:
    """Return the true spans, of shape (N, answers, 2)."""
    pair = [batch.truth[name] for name in (start, end)]
    if pair[0].shape != pair[1].shape or any(a.dtype.kind not in "iu" for a in pair):
        raise DataError(
            f"--metric f1, exact-match: the true positions are {pair[0].dtype} of shape "
            f"{pair[0].shape} and {pair[1].dtype} of shape {pair[1].shape}. Store integers of the "
            "same shape."
        )
    spans = np.stack([array.astype(np.int64) for array in pair], axis=-1)
    return spans[:, None] if spans.ndim == 2 else spans


def _check(wanted: Spans, count: int, shape: tuple[int, ...]) -> None:
    there = np.all(wanted >= 0, axis=-1)
    fits = wanted.ndim == 3 and len(wanted) == count and np.any(there, axis=1).all()
    if not fits or wanted.max() >= shape[1] or (wanted[there][:, 0] > wanted[there][:, 1]).any():
        raise DataError(
            f"--metric f1, exact-match: each sample needs at least one pair of true positions "
            f"from 0 to {shape[1] - 1}, the first not after the last. Check the arrays."
        )


def _overlap(found: Spans, wanted: Spans) -> NDArray[np.float64]:
    """Return the F1 of spans by their positions, of shape (N, answers); 0 for answers of -1."""
    first = np.maximum(found[..., 0], wanted[..., 0])
    last = np.minimum(found[..., 1], wanted[..., 1])
    common = np.maximum(last - first + 1, 0)
    lengths = (found[..., 1] - found[..., 0] + 1) + (wanted[..., 1] - wanted[..., 0] + 1)
    return np.where((wanted >= 0).all(axis=-1), 2 * common / lengths, 0.0)
