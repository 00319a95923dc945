"""Analysis: which tensors and layers of a quantized model differ most from the float one."""

from onnxqat.analysis.advice import Advice, overrides_file
from onnxqat.analysis.biases import BiasFigures
from onnxqat.analysis.points import PointFigures, compare_points
from onnxqat.analysis.run import Analysis, analyze, passes
from onnxqat.analysis.sensitivity import METRICS, LayerFigures, Metric
from onnxqat.analysis.variants import Layer, Variants

__all__ = [
    "METRICS",
    "Advice",
    "Analysis",
    "BiasFigures",
    "Layer",
    "LayerFigures",
    "Metric",
    "PointFigures",
    "Variants",
    "analyze",
    "compare_points",
    "overrides_file",
    "passes",
]
