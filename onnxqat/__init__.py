"""Quantization-aware training for an exported ONNX model, with no training framework installed.

The commands of the command line are functions here. Names are imported when they are first used, so
that ``import onnxqat`` and ``onnxqat --help`` are fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxqat.analysis import Analysis
    from onnxqat.calibration import Calibration, placeholder_params, unlike_training
    from onnxqat.data import Batch, DataSet, InputSpec, Preprocessing, Tokenization, open_data
    from onnxqat.deploy import Deployment, deployed_model, write_deployment
    from onnxqat.errors import OnnxQatError
    from onnxqat.evaluation import Evaluation
    from onnxqat.jobs import Summary, run_jobs
    from onnxqat.model import Model
    from onnxqat.overrides import Override, parse_override, read_overrides
    from onnxqat.plan import QuantPlan, make_plan
    from onnxqat.preparation import prepare
    from onnxqat.qparams import QuantParams, QuantSpec
    from onnxqat.quantized import QuantizedModel, Stage, insert_pairs, load_model
    from onnxqat.reporting import Report
    from onnxqat.rules import HardwareRule, bundled_rules, describe_rule, load_rule, validate_rule
    from onnxqat.settings import Settings, input_specs
    from onnxqat.train import Checkpoints, Config, Finetuned, Progress
    from onnxqat.verbs.analyze import analyze
    from onnxqat.verbs.calibrate import calibrate
    from onnxqat.verbs.check import Check, check
    from onnxqat.verbs.compare_dumps import compare_dumps
    from onnxqat.verbs.dump import dump
    from onnxqat.verbs.equalize import equalize
    from onnxqat.verbs.evaluate import evaluate
    from onnxqat.verbs.export import export
    from onnxqat.verbs.finetune import TrainingLogs, finetune
    from onnxqat.verbs.import_table import import_table
    from onnxqat.verbs.insert import insert
    from onnxqat.verbs.listener import Listener
    from onnxqat.verbs.opening import DataSource
    from onnxqat.verbs.report import report
    from onnxqat.verbs.search import Searched, search
    from onnxqat.verbs.strip import strip

__version__: str

# The names that a type checker reads above, for the interpreter; a test compares the two.
_HOMES = {
    "Analysis": "analysis",
    "Batch": "data",
    "Calibration": "calibration",
    "Check": "verbs.check",
    "Checkpoints": "train",
    "Config": "train",
    "DataSet": "data",
    "DataSource": "verbs.opening",
    "Deployment": "deploy",
    "Evaluation": "evaluation",
    "Finetuned": "train",
    "HardwareRule": "rules",
    "InputSpec": "data",
    "Listener": "verbs.listener",
    "Model": "model",
    "OnnxQatError": "errors",
    "Override": "overrides",
    "Preprocessing": "data",
    "Progress": "train",
    "QuantParams": "qparams",
    "QuantPlan": "plan",
    "QuantSpec": "qparams",
    "QuantizedModel": "quantized",
    "Report": "reporting",
    "Searched": "verbs.search",
    "Settings": "settings",
    "Stage": "quantized",
    "Summary": "jobs",
    "Tokenization": "data",
    "TrainingLogs": "verbs.finetune",
    "analyze": "verbs.analyze",
    "bundled_rules": "rules",
    "calibrate": "verbs.calibrate",
    "check": "verbs.check",
    "compare_dumps": "verbs.compare_dumps",
    "deployed_model": "deploy",
    "describe_rule": "rules",
    "dump": "verbs.dump",
    "equalize": "verbs.equalize",
    "evaluate": "verbs.evaluate",
    "export": "verbs.export",
    "finetune": "verbs.finetune",
    "import_table": "verbs.import_table",
    "input_specs": "settings",
    "insert": "verbs.insert",
    "insert_pairs": "quantized",
    "load_model": "quantized",
    "load_rule": "rules",
    "make_plan": "plan",
    "open_data": "data",
    "parse_override": "overrides",
    "placeholder_params": "calibration",
    "prepare": "preparation",
    "read_overrides": "overrides",
    "report": "verbs.report",
    "run_jobs": "jobs",
    "search": "verbs.search",
    "strip": "verbs.strip",
    "unlike_training": "calibration",
    "validate_rule": "rules",
    "write_deployment": "deploy",
}

__all__ = [
    "Analysis",
    "Batch",
    "Calibration",
    "Check",
    "Checkpoints",
    "Config",
    "DataSet",
    "DataSource",
    "Deployment",
    "Evaluation",
    "Finetuned",
    "HardwareRule",
    "InputSpec",
    "Listener",
    "Model",
    "OnnxQatError",
    "Override",
    "Preprocessing",
    "Progress",
    "QuantParams",
    "QuantPlan",
    "QuantSpec",
    "QuantizedModel",
    "Report",
    "Searched",
    "Settings",
    "Stage",
    "Summary",
    "Tokenization",
    "TrainingLogs",
    "analyze",
    "bundled_rules",
    "calibrate",
    "check",
    "compare_dumps",
    "deployed_model",
    "describe_rule",
    "dump",
    "equalize",
    "evaluate",
    "export",
    "finetune",
    "import_table",
    "input_specs",
    "insert",
    "insert_pairs",
    "load_model",
    "load_rule",
    "make_plan",
    "open_data",
    "parse_override",
    "placeholder_params",
    "prepare",
    "read_overrides",
    "report",
    "run_jobs",
    "search",
    "strip",
    "unlike_training",
    "validate_rule",
    "write_deployment",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("onnxqat")
    if name not in _HOMES:
        message = f"module 'onnxqat' has no attribute '{name}'"
        raise AttributeError(message)
    return getattr(importlib.import_module(f"onnxqat.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
