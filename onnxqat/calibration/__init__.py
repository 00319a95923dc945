"""Calibration: observers, which choose clipping ranges, and the run that feeds them batches."""

from onnxqat.calibration.arriving import unlike_training
from onnxqat.calibration.biases import fit_bias_range, without_large_biases
from onnxqat.calibration.config import Calibration
from onnxqat.calibration.observers import OBSERVERS, Observer, weight_method, weight_range
from onnxqat.calibration.run import (
    calibrate,
    placeholder_params,
    resolved_plan,
)

__all__ = [
    "OBSERVERS",
    "Calibration",
    "Observer",
    "calibrate",
    "fit_bias_range",
    "placeholder_params",
    "resolved_plan",
    "unlike_training",
    "weight_method",
    "weight_range",
    "without_large_biases",
]
