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
from onnxqat.device import CPU, Device
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
    """The differences of a quantized model from the float model.

    Attributes
    ----------
    metric : str
        Name of the metric that defines the cost, see `onnxqat.analysis.sensitivity`.
    cost : float
        Cost of the whole quantized model.
    evaluation : Evaluation
        Comparison of its outputs with the float model's.
    points : tuple of PointFigures
        Figures of weights and activations, in the order of the plan.
    biases : tuple of BiasFigures
        Figures of biases, in the order of the plan.
    layers : tuple of LayerFigures
        Figures of layers; the layer that costs most when quantized alone comes first.
    advice : Advice
        What to change.
    sessions : int
        Number of onnxruntime sessions that were opened for the layers and the advice.
    data : str
        Name of the data.
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
    """Return the maximum number of times that an analysis reads the data."""
    return 1 + 2 * len(layers_of(model)) + MOST


def analyze(
    model: QuantizedModel,
    batches: Callable[[], Iterable[Batch]],
    *,
    against: Model | None = None,
    metric: AnyMetric = ERROR,
    rule: HardwareRule | None = None,
    threads: int = 0,
    device: Device = CPU,
    progress: Callable[[], None] = lambda: None,
) -> Analysis:
    """Measure where a quantized model differs from the float model, and which layers cost most.

    Parameters
    ----------
    model : QuantizedModel
        Calibrated or fine-tuned.
    batches : callable
        Returns a new iterator over the batches; one batch is in memory at a time.
    against : Model, optional
        The float model that the quantized one was made from. The default is the quantized model
        without its pairs; after fine-tuning its weights differ from the original float model's.
    metric : str, callable or Metric
        Metric that defines the cost of a layer, see `onnxqat.analysis.sensitivity`.
    rule : HardwareRule, optional
        The rule that the model was made with (default: the bundled rule of that name).
    device : Device
        Where the models run.
    progress : callable
        Called after each batch of each of the `passes`.

    Raises
    ------
    DataError
        There are no samples, or the metric does not fit the model and the data.
    ModelError
        ``against`` is not the float model of ``model``, or onnxruntime cannot run the models.
    PlanError
        The model is not calibrated.
    RuleError
        There is no bundled rule with the name in the model's plan.
    """
    model.check_calibrated()
    variants = Variants(model, rule or load_rule(model.plan.rule))
    floats = original(model.floats)
    if against is not None:
        floats = prepare(against, opset=model.floats.graph.opset)
    probe = Probe(floats, batches, metric=metric, threads=threads, device=device, progress=progress)
    whole = probe.evaluation(model)
    cost = probe.cost(whole)  # raises early if the metric does not fit
    points = compare_points(
        model, batches(), floats=floats, threads=threads, device=device, progress=progress
    )
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
