"""What each layer costs: quantized alone, and left float alone.

A cost is 0 where the outputs are those of the float model, and grows as they differ:

=============  =====================================================================
metric         cost
=============  =====================================================================
``error``      mean over the outputs of the squared error, divided by the variance
               of the float model's values: noise per signal
``agreement``  mean over the outputs of classes of 1 - agreement
``top1``       top-1 of the float model less that of the quantized one
=============  =====================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxqat.analysis.variants import Layer, Variants
from onnxqat.data import Batch
from onnxqat.errors import DataError
from onnxqat.evaluation import Evaluation, evaluate
from onnxqat.quantized import AnyModel, QuantizedModel

__all__ = ["METRICS", "LayerFigures", "Metric", "Probe", "cost_of", "measure_layers"]

Metric = Literal["error", "agreement", "top1"]


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


def _error(result: Evaluation) -> float | None:
    errors = [one.relative_error for one in result.outputs if one.relative_error is not None]
    return math.fsum(e**2 for e in errors) / len(errors) if errors else None


def _agreement(result: Evaluation) -> float | None:
    shares = [one.agreement for one in result.outputs if one.agreement is not None]
    return 1 - math.fsum(shares) / len(shares) if shares else None


def _top1(result: Evaluation) -> float | None:
    if "top1" not in result.metrics:
        return None
    return result.reference["top1"] - result.metrics["top1"]


# the cost, and what a model or its data lack where there is none
METRICS: dict[str, tuple[Callable[[Evaluation], float | None], str]] = {
    "error": (_error, "no output holds float values that vary. Give --metric agreement"),
    "agreement": (_agreement, "no output holds classes. Give --metric error"),
    "top1": (_top1, "the data have no labels. Give --metric error"),
}


def cost_of(result: Evaluation, metric: Metric) -> float:
    """Return the cost that a metric finds.

    Raises
    ------
    DataError
        The metric is not one of this model and these data.
    """
    figure, lacking = METRICS[metric]
    cost = figure(result)
    if cost is None:
        raise DataError(f"--metric {metric}: {lacking}.")
    return cost


class Probe:
    """Measures variants of a model on the same samples against the same reference.

    Each takes a session of its own, whose making is a part of the price; one is held at a time.

    Parameters
    ----------
    reference : Model
        Float.
    batches : callable
        Returns the batches, each time anew.
    metric : {"error", "agreement", "top1"}
        What the cost is, see above.
    progress : callable
        Called after each batch.
    """

    def __init__(
        self,
        reference: AnyModel,
        batches: Callable[[], Iterable[Batch]],
        *,
        metric: Metric = "error",
        threads: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.reference, self.batches, self.metric = reference, batches, metric
        self.threads, self.progress = threads, progress

    def evaluation(self, model: QuantizedModel) -> Evaluation:
        """Return the figures of the fake-quantized model against the reference."""
        return evaluate(
            model,
            self.batches(),
            against=self.reference,
            threads=self.threads,
            progress=self.progress,
        )

    def cost(self, result: Evaluation) -> float:
        """Return the cost of a model whose figures these are.

        Raises
        ------
        DataError
            The metric is not one of this model and these data.
        """
        return cost_of(result, self.metric)

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
