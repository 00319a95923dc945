"""What each layer costs: quantized alone, and left float alone.

A cost is 0 where the outputs are those of the float model, and grows as they differ:

==============  ====================================================================
metric          cost
==============  ====================================================================
``error``       mean over the outputs of the squared error, divided by the variance
                of the float model's values: noise per signal
those that      1 - the figure: of ``agreement``, the mean over the outputs of
compare         classes; of ``cosine``, the smallest
any other       its first figure of the float model less that of the quantized one;
                it may be a function of the user's
==============  ====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnxqat.analysis.variants import Layer, Variants
from onnxqat.data import Batch
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
    """What one layer costs.

    Attributes
    ----------
    layer : Layer
        Which one.
    alone : float
        Cost of the model in which this layer alone is quantized.
    left_float : float
        Cost of the model in which all but this layer are quantized.
    """

    layer: Layer
    alone: float
    left_float: float


def error_of(result: Evaluation) -> float | None:
    """Return noise per signal of the outputs; None where none holds float values that vary."""
    errors = [one.relative_error for one in result.outputs if one.relative_error is not None]
    return math.fsum(e**2 for e in errors) / len(errors) if errors else None


def metrics_of(metric: AnyMetric) -> tuple[Metric, ...]:
    """Return what has to be measured for a cost; nothing of ``error``, which evaluation has.

    Raises
    ------
    OptionError
        There is no such metric, or its differences are no cost.
    """
    if metric == ERROR:
        return ()
    if metric == "sqnr":
        raise OptionError("--metric sqnr: 'error' is the same as a cost. Give --metric error.")
    return (read_metric(metric, [ERROR]),)


def cost_of(result: Evaluation, metric: Metric | None) -> float:
    """Return the cost that a metric finds; without one, the error of the outputs.

    Raises
    ------
    DataError
        No output has an error.
    """
    if metric is None:
        cost = error_of(result)
        if cost is None:
            raise DataError(
                "--metric error: no output holds float values that vary. Give --metric agreement."
            )
        return cost
    name = result.first[metric.name]
    return (1.0 if metric.compares else result.reference[name]) - result.metrics[name]


class Probe:
    """Measures variants of a model on the same samples against the same reference.

    Each takes a session of its own, whose making is a part of the price; one is held at a time.

    Parameters
    ----------
    reference : Model
        Float.
    batches : callable
        Returns the batches, each time anew.
    metric : str, callable or Metric
        What the cost is, see above.
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
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.reference, self.batches = reference, batches
        self.measured = next(iter(metrics_of(metric)), None)
        self.threads, self.progress = threads, progress

    def evaluation(self, model: QuantizedModel) -> Evaluation:
        """Return the figures of the fake-quantized model against the reference."""
        return evaluate(
            model,
            self.batches(),
            against=self.reference,
            metrics=[self.measured] if self.measured else [],
            threads=self.threads,
            progress=self.progress,
        )

    @property
    def metric(self) -> str:
        """What the cost is, by name."""
        return self.measured.name if self.measured else ERROR

    def cost(self, result: Evaluation) -> float:
        """Return the cost of a model whose figures these are.

        Raises
        ------
        DataError
            The metric is not one of this model and these data.
        """
        return cost_of(result, self.measured)

    def __call__(self, model: QuantizedModel) -> float:
        """Return the cost of a model."""
        return self.cost(self.evaluation(model))


def measure_layers(variants: Variants, probe: Probe) -> tuple[LayerFigures, ...]:
    """Return what each layer costs, the one that costs most alone first."""
    found = []
    for layer in variants.layers:
        alone, left_float = variants.only([layer]), variants.left_float([layer])
        found.append(LayerFigures(layer=layer, alone=probe(alone), left_float=probe(left_float)))
    return ranked(found)


def ranked(layers: Sequence[LayerFigures]) -> tuple[LayerFigures, ...]:
    """Return layers, the one that costs most alone first; what is not a number before all."""

    def key(one: LayerFigures) -> tuple[bool, float, float]:
        return not math.isnan(one.alone), -one.alone, one.left_float

    return tuple(sorted(layers, key=key))
