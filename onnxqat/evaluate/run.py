"""Run a model over data, batch by batch, and count.

``float`` strips Q/DQ first; ``qdq`` runs the file node by node, as the rule describes it,
without any fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxqat.errors import DataError
from onnxqat.insert import PLAN_KEY, strip
from onnxqat.model import Model, to_proto
from onnxqat.runtime import open_session

__all__ = ["Evaluation", "Mode", "Samples", "evaluate", "model_session"]

Mode = Literal["float", "qdq"]


class Samples(Protocol):
    """What evaluation reads of a batch."""

    @property
    def inputs(self) -> dict[str, NDArray[Any]]:
        """Model inputs by name."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class indices of shape (N,), if there are any."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures over a data set.

    Attributes
    ----------
    samples : int
        How many samples were run.
    metrics : dict of str to float
        ``top1`` and, from ten classes on, ``top5``: fractions. Empty without labels.
    reference : dict of str to float
        The same figures of the reference model.
    agreement : float or None
        Fraction of samples with the same largest output as the reference model's.
    max_abs_diff : float or None
        Largest difference of any output value from the reference model's, in its units.
    """

    samples: int
    metrics: dict[str, float]
    reference: dict[str, float]
    agreement: float | None = None
    max_abs_diff: float | None = None


def model_session(model: Model, mode: Mode, *, threads: int = 0) -> ort.InferenceSession:
    """Return a session of ``model`` in a mode; a float model is itself in both."""
    quantized = PLAN_KEY in model.metadata
    if mode == "float" and quantized:
        model = strip(model)
    exact = mode == "qdq" and quantized
    return open_session(to_proto(model), optimization="none" if exact else "all", threads=threads)


def evaluate(
    model: Model,
    batches: Iterable[Samples],
    *,
    mode: Mode = "qdq",
    against: Model | None = None,
    threads: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Count how often a model is right, and how often it agrees with another.

    Parameters
    ----------
    model : Model
        Float or Q/DQ.
    batches : iterable of batches
        With labels for ``metrics``.
    mode : {"float", "qdq"}
        How to run ``model``.
    against : Model, optional
        Reference; a Q/DQ reference runs in its own arithmetic.
    progress : callable
        Called after each batch.

    Raises
    ------
    DataError
        There are no samples, or a label is outside of the model's classes.
    """
    session = model_session(model, mode, threads=threads)
    reference = model_session(against, "qdq", threads=threads) if against else None
    counts = _Counts()
    for batch in batches:
        outputs = session.run(None, batch.inputs)
        expected = reference.run(None, batch.inputs) if reference else None
        counts.add(outputs, batch.labels, expected)
        progress()
    return counts.result()


class _Counts:
    """Running sums of an evaluation."""

    def __init__(self) -> None:
        self.samples = 0
        self.correct: dict[str, int] = {}
        self.reference: dict[str, int] = {}
        self.agreeing: float | None = None
        self.max_abs_diff: float | None = None

    def add(
        self,
        outputs: list[NDArray[Any]],
        labels: NDArray[np.int64] | None,
        expected: list[NDArray[Any]] | None,
    ) -> None:
        scores = outputs[0]
        self.samples += len(scores)
        if labels is not None:
            _count_labels(scores, labels, self.correct)
        if expected is not None:
            if labels is not None:
                _count_labels(expected[0], labels, self.reference)
            pairs = zip(outputs, expected, strict=True)
            largest = max(float(np.max(np.abs(a - b), initial=0)) for a, b in pairs)
            self.max_abs_diff = max(largest, self.max_abs_diff or 0.0)
            same = np.argmax(scores, -1) == np.argmax(expected[0], -1)
            mean = same.reshape(len(same), -1).mean(axis=1)
            self.agreeing = (self.agreeing or 0.0) + float(mean.sum())

    def result(self) -> Evaluation:
        if not self.samples:
            raise DataError("There are no samples to evaluate.")
        agreement = None if self.agreeing is None else self.agreeing / self.samples
        return Evaluation(
            samples=self.samples,
            metrics={name: hits / self.samples for name, hits in self.correct.items()},
            reference={name: hits / self.samples for name, hits in self.reference.items()},
            agreement=agreement,
            max_abs_diff=self.max_abs_diff,
        )


def _count_labels(scores: NDArray[Any], labels: NDArray[np.int64], correct: dict[str, int]) -> None:
    """Add the hits of one batch to ``correct``."""
    if scores.ndim != 2:
        raise DataError(
            f"Top-1 needs an output of shape (N, classes); the first output is "
            f"{scores.shape}. Evaluate without labels, with --against."
        )
    classes = scores.shape[1]
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise DataError(
            f"Labels reach from {labels.min()} to {labels.max()}; the model has {classes} "
            f"classes, 0 to {classes - 1}. Check the labels."
        )
    ranking = np.argsort(-scores, axis=1, kind="stable")
    for name, depth in (("top1", 1), ("top5", 5)):
        if depth == 1 or classes >= 10:
            hits = int((ranking[:, :depth] == labels[:, None]).any(axis=1).sum())
            correct[name] = correct.get(name, 0) + hits
