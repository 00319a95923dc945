"""Hardware rules: one TOML file per chip, and a strict loader that returns frozen types."""

from onnxqat.rules.assumed import assumptions, variants
from onnxqat.rules.describe import describe_rule
from onnxqat.rules.loader import bundled_rules, load_rule, validate_rule
from onnxqat.rules.problems import json_schema, wrong_spec
from onnxqat.rules.schema import (
    Arithmetic,
    Changes,
    HardwareRule,
    OpRule,
    RuleException,
    RuleSpec,
    ShiftRounding,
)

__all__ = [
    "Arithmetic",
    "Changes",
    "HardwareRule",
    "OpRule",
    "RuleException",
    "RuleSpec",
    "ShiftRounding",
    "assumptions",
    "bundled_rules",
    "describe_rule",
    "json_schema",
    "load_rule",
    "validate_rule",
    "variants",
    "wrong_spec",
]
