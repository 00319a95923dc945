"""The report on a quantized model: an HTML page with figures, curves, layers and advice."""

from onnxqat.reporting.analysis import AnalysisDocument, read_analysis, typed_analysis
from onnxqat.reporting.comparison import Comparison, Row, figures_of_evaluation
from onnxqat.reporting.history import floats_of, kind_of, runs_of, source_of
from onnxqat.reporting.numbers import value_text
from onnxqat.reporting.page import Report, make_report
from onnxqat.reporting.training import Log, check_log, log_of

__all__ = [
    "AnalysisDocument",
    "Comparison",
    "Log",
    "Report",
    "Row",
    "check_log",
    "figures_of_evaluation",
    "floats_of",
    "kind_of",
    "log_of",
    "make_report",
    "read_analysis",
    "runs_of",
    "source_of",
    "typed_analysis",
    "value_text",
]
