"""The quantized network run in integers, as the rule says its chip runs it."""

from onnxqat.evaluate.integer.compare import PointDifference
from onnxqat.evaluate.integer.program import IntegerProgram

__all__ = ["IntegerProgram", "PointDifference"]
