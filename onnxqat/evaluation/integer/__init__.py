"""Run the quantized network in the integer arithmetic that the rule gives for its chip."""

from onnxqat.evaluation.integer.assumptions import check_documented, other_programs
from onnxqat.evaluation.integer.compare import PointDifference
from onnxqat.evaluation.integer.program import IntegerProgram

__all__ = ["IntegerProgram", "PointDifference", "check_documented", "other_programs"]
