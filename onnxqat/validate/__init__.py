"""Checks that a model file must pass, made once when it is loaded."""

from onnxqat.validate.checks import check_data, validate

__all__ = ["check_data", "validate"]
