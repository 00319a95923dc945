"""Run several metrics on a model and on its reference model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from onnxqat.data import Batch
from onnxqat.errors import DataError
from onnxqat.evaluation.metrics.batch import Array, MetricBatch, Values
from onnxqat.evaluation.metrics.figures import OURS
from onnxqat.evaluation.metrics.meter import Meter
from onnxqat.evaluation.metrics.named import Metric
from onnxqat.outputs import Output

__all__ = ["Measured", "Meters"]


class Measured(NamedTuple):
    """The results of the metrics.

    Attributes
    ----------
    metrics, reference : dict of str to float
        Figures of the model and of the reference model.
    first : dict of str to str
        Name of the first figure of each metric, by name of the metric.
    """

    metrics: dict[str, float]
    reference: dict[str, float]
    first: dict[str, str]


class Meters:
    """Feeds the outputs of a model, and of its reference model if there is one, to every metric.

    A context manager, which ends all functions that still run.

    Parameters
    ----------
    metrics : sequence of Metric
        Metrics as `onnxqat.evaluation.metrics.fitted` returns them.
    outputs : sequence of Output
        Outputs of the model.
    compared : bool
        Whether there is a reference model.
    """

    def __init__(
        self, metrics: Sequence[Metric], outputs: Sequence[Output], *, compared: bool
    ) -> None:
        self.outputs = {output.name: output for output in outputs}
        self._ours: list[Meter] = []
        self._theirs: dict[str, Meter] = {}
        for metric in metrics:
            self._ours.append(Meter(metric))
            if compared and not metric.compares:
                self._theirs[metric.name] = Meter(metric)

    def __enter__(self) -> Meters:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for meter in (*self._ours, *self._theirs.values()):
            meter.close()

    def add(self, batch: Any, ours: Sequence[Array], theirs: Sequence[Array] | None) -> None:
        """Add one batch and the models' outputs for it.

        Raises
        ------
        DataError
            A function has raised.
        """
        values = dict(zip(self.outputs, ours, strict=True))
        reference = None if theirs is None else dict(zip(self.outputs, theirs, strict=True))
        for meter in self._ours:
            samples = self._samples(batch, meter.metric, reference)
            meter.add(values, samples)
            if meter.metric.name in self._theirs and reference is not None:
                self._theirs[meter.metric.name].add(reference, samples)

    def _samples(self, batch: Any, metric: Metric, reference: Values | None) -> MetricBatch:
        """Return the samples of a batch for a metric, without padding."""
        inputs, indices, held = dict(batch.inputs), None, {}
        if isinstance(batch, Batch):
            indices = batch.indices
            inputs = {name: batch.counting(values) for name, values in inputs.items()}
            held = {name: batch.arrays[name][: len(indices)] for name in metric.arrays}
        if indices is None:
            indices = np.arange(len(next(iter(inputs.values()))))
        return MetricBatch(
            inputs=inputs,
            labels=batch.labels,
            indices=indices,
            arrays=held,
            truth={output: held[array] for output, array in metric.truth.items()},
            reference=reference,
            outputs=self.outputs,
            detector=metric.detector,
        )

    def result(self) -> Measured:
        """Return the figures of all batches.

        Raises
        ------
        DataError
            A function raised or returned no figures, or two figures have the same name.
        """
        metrics: dict[str, float] = {}
        reference: dict[str, float] = {}
        first: dict[str, str] = {}
        for meter in self._ours:
            metric, found = meter.metric, meter.result()
            taken = set() if metric.built_in else metrics.keys() | OURS
            for name in found.keys() & taken:
                raise DataError(
                    f"{metric.name}: returned a figure '{name}', a name that is already taken. "
                    "Choose another name."
                )
            metrics |= found
            first[metric.name] = next(iter(found))
            if metric.name in self._theirs:
                reference |= self._theirs[metric.name].result()
        return Measured(metrics, reference, first)
