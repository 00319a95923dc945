"""Evaluation: run a model on data and compute figures."""

from onnxqat.evaluation.integer import IntegerProgram, PointDifference
from onnxqat.evaluation.run import Evaluation, check_interface, evaluate

__all__ = ["Evaluation", "IntegerProgram", "PointDifference", "check_interface", "evaluate"]
