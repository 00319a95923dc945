"""What a model file has to be, looked at once when it is loaded."""

from onnxqat.validate.checks import check_data, validate

__all__ = ["check_data", "validate"]
