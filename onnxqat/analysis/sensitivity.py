"""The cost of each layer: when only it is quantized, and when only it stays float.

A cost is 0 if the outputs equal those of the float model, and grows with the difference:

==============  ====================================================================
metric          cost
==============  ====================================================================
``error``       squared error of an output divided by the variance of the float
                model's values, averaged over the outputs (noise-to-signal ratio)
``agreement``   1 - the mean agreement of the outputs
``cosine``      1 - the smallest cosine of the outputs
any other       the first figure of the metric for the float model, minus the same
                figure for the quantized model; the metric may be a user function
==============  ====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnxqat.analysis.variants import Layer, Variants
from onnxqat.data import Batch
from onnxqat.device import CPU, Device
from onnxqat.errors import DataError, OptionError
from onnxqat.evaluation import Evaluation, evaluate
from onnxqat.evaluation.metrics import AnyMetric, Metric, read_metric
from onnxqat.quantized import AnyModel, QuantizedModel

__all__ = [
    "ERROR",
    "LayerFigures",
    "Probe",
    "cost_of",
    "error_of",
    "measure_layers",
    "metrics_of",
]

ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """The costs of one layer.

    Attributes
    ----------
    layer : Layer
        The layer.
    alone : float
        Cost of the model in which only this layer is quantized.
    left_float : float
        Cost of the model in which all layers except this one are quantized.
    """

    layer: Layer
    alone: float
    left_float: float


def error_of(result: Evaluation) -> float | None:
    """Return the mean noise-to-signal ratio of the outputs; None if no output has one."""
    errors = [one.relative_error for one in result.outputs if one.relative_error is not None]
    return math.fsum(e**2 for e in errors) / len(errors) if errors else None


def metrics_of(metric: AnyMetric) -> tuple[Metric, ...]:
    """Return the metrics to measure for a cost; none for ``error``, which evaluation always has.

    Raises
    ------
    OptionError
        The metric is unknown, or its differences cannot be a cost.
    """
    if metric == ERROR:
        return ()
    if metric == "sqnr":
        raise OptionError(
            "--metric sqnr: cannot be a cost. Give --metric error, which measures the same noise."
        )
    return (read_metric(metric, [ERROR]),)


def cost_of(result: Evaluation, metric: Metric | None) -> float:
    """Return the cost by a metric; without a metric, the error of the outputs.

    Raises
    ------
    DataError
        No output has an error.
    """
    if metric is None:
        cost = error_of(result)
        if cost is None:
            raise DataError(
                "--metric error: no output has float values that vary. Give --metric agreement."
            )
        return cost
    name = result.first[metric.name]
    return (1.0 if metric.compares else result.reference[name]) - result.metrics[name]


class Probe:
    """Measures variants of a model on the same samples against the same reference.

    Each variant needs a new onnxruntime session, and creating it is part of the run time. One
    session exists at a time.

    Parameters
    ----------
    reference : Model
        The float model.
    batches : callable
        Returns a new iterator over the batches.
    metric : str, callable or Metric
        Metric that defines the cost, see the module's docstring.
    device : Device
        Where the models run.
    progress : callable
        Called after each batch.
    """

    def __init__(
        self,
        reference: AnyModel,
        batches: Callable[[], Iterable[Batch]],
        *,
        metric: AnyMetric = ERROR,
        threads: int = 0,
        device: Device = CPU,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.reference, self.batches = reference, batches
        self.measured = next(iter(metrics_of(metric)), None)
        self.threads, self.device, self.progress = threads, device, progress

    def evaluation(self, model: QuantizedModel) -> Evaluation:
        """Compare a fake-quantized model with the reference; return the figures."""
        return evaluate(
            model,
            self.batches(),
            against=self.reference,
            metrics=[self.measured] if self.measured else [],
            threads=self.threads,
            device=self.device,
            progress=self.progress,
        )

    @property
    def metric(self) -> str:
        """Name of the metric that defines the cost."""
        return self.measured.name if self.measured else ERROR

    def cost(self, result: Evaluation) -> float:
        """Return the cost of a model from its figures.

        Raises
        ------
        DataError
            The metric does not fit the model and the data.
        """
        return cost_of(result, self.measured)

    def __call__(self, model: QuantizedModel) -> float:
        """Return the cost of a model."""
        return self.cost(self.evaluation(model))


def measure_layers(variants: Variants, probe: Probe) -> tuple[LayerFigures, ...]:
    """Return the costs of each layer; the layer with the largest cost alone comes first."""
    found = []
    for layer in variants.layers:
        alone, left_float = variants.only([layer]), variants.left_float([layer])
        found.append(LayerFigures(layer=layer, alone=probe(alone), left_float=probe(left_float)))
    return ranked(found)


def ranked(layers: Sequence[LayerFigures]) -> tuple[LayerFigures, ...]:
    """Return the layers by falling cost alone; NaN comes first."""

    def key(one: LayerFigures) -> tuple[bool, float, float]:
        return not math.isnan(one.alone), -one.alone, one.left_float

    return tuple(sorted(layers, key=key))
