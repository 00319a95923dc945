"""Calibration tables of the deployment targets, each with ``write`` and ``read``."""

from onnxqat.formats.sophgo_names import float_ops, params_from_table, table_of
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales

__all__ = [
    "CalibrationTable",
    "Threshold",
    "WeightScales",
    "float_ops",
    "params_from_table",
    "table_of",
]
