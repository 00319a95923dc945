"""Repairs before fine-tuning: change a model so that quantization costs less accuracy."""

from onnxqat.repair.analytic import correct_biases_analytically
from onnxqat.repair.bias_correction import Corrected, bias_passes, correct_biases
from onnxqat.repair.difference import Difference, is_rounding
from onnxqat.repair.equalization import Equalized, equalize, unevenness
from onnxqat.repair.originals import original
from onnxqat.repair.relu6 import RELU6, SMALL_DB, Relu6

__all__ = [
    "RELU6",
    "SMALL_DB",
    "Corrected",
    "Difference",
    "Equalized",
    "Relu6",
    "bias_passes",
    "correct_biases",
    "correct_biases_analytically",
    "equalize",
    "is_rounding",
    "original",
    "unevenness",
]
