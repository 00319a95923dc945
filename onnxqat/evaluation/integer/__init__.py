"""The quantized network run in integers, as the rule says its chip runs it."""

from onnxqat.evaluation.integer.compare import PointDifference
from onnxqat.evaluation.integer.program import IntegerProgram

__all__ = ["IntegerProgram", "PointDifference"]
