"""Analysis: which tensors and layers of a quantized model differ most from the float model."""

from onnxqat.analysis.advice import Advice, overrides_file
from onnxqat.analysis.biases import BiasFigures
from onnxqat.analysis.document import analysis_document, worst_points
from onnxqat.analysis.dumps import (
    Comparison,
    DumpNote,
    Level,
    TensorDifference,
    check_replaceable,
    compare_dumps,
    write_sample,
)
from onnxqat.analysis.histogram import Histogram
from onnxqat.analysis.points import PointFigures, compare_points
from onnxqat.analysis.run import Analysis, analyze, passes
from onnxqat.analysis.search import (
    Found,
    Ranking,
    Search,
    check_budget,
    rank,
    ranking_passes,
    search,
    verifying_passes,
)
from onnxqat.analysis.sensitivity import LayerFigures, Probe, metrics_of
from onnxqat.analysis.tensors import run_of
from onnxqat.analysis.variants import Layer, Variants
from onnxqat.analysis.widths import Weight, Widths, average_bits, widths_of

__all__ = [
    "Advice",
    "Analysis",
    "BiasFigures",
    "Comparison",
    "DumpNote",
    "Found",
    "Histogram",
    "Layer",
    "LayerFigures",
    "Level",
    "PointFigures",
    "Probe",
    "Ranking",
    "Search",
    "TensorDifference",
    "Variants",
    "Weight",
    "Widths",
    "analysis_document",
    "analyze",
    "average_bits",
    "check_budget",
    "check_replaceable",
    "compare_dumps",
    "compare_points",
    "metrics_of",
    "overrides_file",
    "passes",
    "rank",
    "ranking_passes",
    "run_of",
    "search",
    "verifying_passes",
    "widths_of",
    "worst_points",
    "write_sample",
]
