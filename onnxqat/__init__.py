"""Quantization-aware training for an exported ONNX model, with no training framework installed.

The verbs of the command line, as functions. Names are imported when they are first used, so that
``import onnxqat`` and ``onnxqat --help`` cost nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
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
    "calibrate": "onnxqat.calibrate",
    "deployed_model": "onnxqat.deploy",
    "evaluate": "onnxqat.evaluate",
    "finetune": "onnxqat.train",
    "insert_pairs": "onnxqat.quantized",
    "load_model": "onnxqat.quantized",
    "load_rule": "onnxqat.rules",
    "make_plan": "onnxqat.plan",
    "open_data": "onnxqat.data",
    "parse_override": "onnxqat.overrides",
    "placeholder_params": "onnxqat.calibrate",
    "prepare": "onnxqat.prepare",
    "unlike_training": "onnxqat.calibrate",
    "write_deployment": "onnxqat.deploy",
}

__all__ = list(_HOMES)


class _Package(ModuleType):
    """Keeps the verbs ``insert``, ``calibrate`` and ``evaluate`` apart from their modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        # importing onnxqat.insert would bind the module under the function's name
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'onnxqat' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)
