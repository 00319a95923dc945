"""Metrics: functions of a model's outputs and the data that return numbers by name.

Built-in metrics lie one to a file; `onnxqat.evaluation.metrics.named` lists them.
"""

from onnxqat.evaluation.metrics.batch import MetricBatch
from onnxqat.evaluation.metrics.figures import figure_text
from onnxqat.evaluation.metrics.fitting import fitted
from onnxqat.evaluation.metrics.meters import Meters
from onnxqat.evaluation.metrics.named import BUILT_IN, AnyMetric, Metric, read_metric

__all__ = [
    "BUILT_IN",
    "AnyMetric",
    "Meters",
    "Metric",
    "MetricBatch",
    "figure_text",
    "fitted",
    "read_metric",
]
