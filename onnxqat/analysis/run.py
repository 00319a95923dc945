"""The whole analysis: points, layers, outputs and advice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from onnxqat.analysis.advice import MOST, Advice, advise
from onnxqat.analysis.biases import BiasFigures, look_at_biases
from onnxqat.analysis.points import PointFigures, compare_points
from onnxqat.analysis.sensitivity import ERROR, LayerFigures, Probe, measure_layers
from onnxqat.analysis.variants import Variants, layers_of
from onnxqat.data import Batch
from onnxqat.evaluation import Evaluation
from onnxqat.evaluation.metrics import AnyMetric
from onnxqat.model import Model
from onnxqat.preparation import prepare
from onnxqat.quantized import QuantizedModel
from onnxqat.repair import original
from onnxqat.rules import HardwareRule, load_rule

__all__ = ["Analysis", "analyze", "passes"]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Where a quantized model differs from the float one.

    Attributes
    ----------
    metric : str
        What the costs are, see `onnxqat.analysis.sensitivity`.
    cost : float
        Cost of the whole quantized model.
    evaluation : Evaluation
        Its outputs against the float model's.
    points : tuple of PointFigures
        Weights and activations, in the order of the plan.
    biases : tuple of BiasFigures
        In the order of the plan.
    layers : tuple of LayerFigures
        The one that costs most alone first.
    advice : Advice
        What to change.
    sessions : int
        How many models were opened for the layers and the advice.
    data : str
        What the samples were of.
    """

    metric: str
    cost: float
    evaluation: Evaluation
    points: tuple[PointFigures, ...]
    biases: tuple[BiasFigures, ...]
    layers: tuple[LayerFigures, ...]
    advice: Advice
    sessions: int
    data: str = ""


def passes(model: QuantizedModel) -> int:
    """Return how often an analysis reads the data, at most."""
    return 1 + 2 * len(layers_of(model)) + MOST


def analyze(
    model: QuantizedModel,
    batches: Callable[[], Iterable[Batch]],
    *,
    against: Model | None = None,
    metric: AnyMetric = ERROR,
    rule: HardwareRule | None = None,
    threads: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Analysis:
    """Say where a quantized model differs from the float one, and which layers cost most.

    Parameters
    ----------
    model : QuantizedModel
        Calibrated or fine-tuned.
    batches : callable
        Returns the batches, each time anew; one is held at a time.
    against : Model, optional
        The float model that it was made from; by default its own float part, whose weights a
        fine-tuned model has changed.
    metric : str, callable or Metric
        What the cost of a layer is, see `onnxqat.analysis.sensitivity`.
    rule : HardwareRule, optional
        The one that the model was made with; by default the bundled one of its name.
    progress : callable
        Called after each batch of each of the `passes`.

    Raises
    ------
    DataError
        There are no samples, or the metric does not fit model and data.
    ModelError
        The float model is another one, or onnxruntime cannot run the models.
    PlanError
        The model is not calibrated.
    RuleError
        There is no bundled rule of its name.
    """
    model.check_calibrated()
    variants = Variants(model, rule or load_rule(model.plan.rule))
    floats = original(model.floats)
    if against is not None:
        floats = prepare(against, opset=model.floats.graph.opset)
    probe = Probe(floats, batches, metric=metric, threads=threads, progress=progress)
    whole = probe.evaluation(model)
    cost = probe.cost(whole)  # a metric that does not fit is told now
    points = compare_points(model, batches(), floats=floats, threads=threads, progress=progress)
    layers = measure_layers(variants, probe)
    advice = advise(variants, layers, points, probe, cost=cost)
    return Analysis(
        metric=probe.metric,
        cost=cost,
        evaluation=whole,
        points=points,
        biases=look_at_biases(model),
        layers=layers,
        advice=advice,
        sessions=1 + 2 * len(layers) + max(advice.tried - 1, 0),
    )
