"""Hardware rules: one TOML file per chip, and the strict loader into frozen types."""

from onnxqat.rules.loader import bundled_rules, load_rule, validate_rule
from onnxqat.rules.problems import json_schema
from onnxqat.rules.schema import Changes, HardwareRule, OpRule, RuleException, RuleSpec

__all__ = [
    "Changes",
    "HardwareRule",
    "OpRule",
    "RuleException",
    "RuleSpec",
    "bundled_rules",
    "json_schema",
    "load_rule",
    "validate_rule",
]
