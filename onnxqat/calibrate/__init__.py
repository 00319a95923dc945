"""Calibration: observers of clipping ranges, and the streaming run that feeds them."""

from onnxqat.calibrate.arriving import unlike_training
from onnxqat.calibrate.biases import fit_bias_range, without_large_biases
from onnxqat.calibrate.observers import OBSERVERS, Observer, weight_range
from onnxqat.calibrate.run import (
    calibrate,
    placeholder_params,
    resolved_plan,
)

__all__ = [
    "OBSERVERS",
    "Observer",
    "calibrate",
    "fit_bias_range",
    "placeholder_params",
    "resolved_plan",
    "unlike_training",
    "weight_range",
    "without_large_biases",
]
