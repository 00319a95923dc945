"""Repair before quantization: float models that compute the same, with weights that lose less."""

from onnxqat.repair.difference import Difference
from onnxqat.repair.equalization import Equalized, equalize, unevenness

__all__ = ["Difference", "Equalized", "equalize", "unevenness"]
