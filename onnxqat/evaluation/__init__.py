"""Evaluation: a model over data, and the figures that come of it."""

from onnxqat.evaluation.integer import IntegerProgram, PointDifference
from onnxqat.evaluation.run import Evaluation, check_interface, evaluate

__all__ = ["Evaluation", "IntegerProgram", "PointDifference", "check_interface", "evaluate"]
