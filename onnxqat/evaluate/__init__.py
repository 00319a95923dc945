"""Evaluation: a model over data, and the figures that come of it."""

from onnxqat.evaluate.run import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
