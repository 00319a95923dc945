"""Quantization-aware training for an exported ONNX model, with no training framework installed.

The verbs of the command line, as functions. Names are imported when they are first used, so that
``import onnxqat`` and ``onnxqat --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Config": "onnxqat.train",
    "HardwareRule": "onnxqat.rules",
    "Model": "onnxqat.model",
    "OnnxQatError": "onnxqat.errors",
    "Override": "onnxqat.overrides",
    "Preprocessing": "onnxqat.data",
    "QuantParams": "onnxqat.qparams",
    "QuantPlan": "onnxqat.plan",
    "QuantSpec": "onnxqat.qparams",
    "QuantizedModel": "onnxqat.quantized",
    "bundled_rules": "onnxqat.rules",
    "calibrate": "onnxqat.calibration",
    "deployed_model": "onnxqat.deploy",
    "equalize": "onnxqat.repair",
    "evaluate": "onnxqat.evaluation",
    "finetune": "onnxqat.train",
    "insert_pairs": "onnxqat.quantized",
    "load_model": "onnxqat.quantized",
    "load_rule": "onnxqat.rules",
    "make_plan": "onnxqat.plan",
    "open_data": "onnxqat.data",
    "parse_override": "onnxqat.overrides",
    "placeholder_params": "onnxqat.calibration",
    "prepare": "onnxqat.preparation",
    "unlike_training": "onnxqat.calibration",
    "write_deployment": "onnxqat.deploy",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'onnxqat' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)
