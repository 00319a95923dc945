"""Repair before quantization: float models that compute the same, with weights that lose less."""

from onnxqat.repair.bias_correction import Corrected, correct_biases
from onnxqat.repair.difference import Difference
from onnxqat.repair.equalization import Equalized, equalize, unevenness

__all__ = [
    "Corrected",
    "Difference",
    "Equalized",
    "correct_biases",
    "equalize",
    "unevenness",
]
