"""Hardware rules: one TOML file per chip, and the strict loader into frozen types."""

from onnxqat.rules.loader import bundled_rules, load_rule
from onnxqat.rules.schema import HardwareRule, OpRule, RuleSpec

__all__ = ["HardwareRule", "OpRule", "RuleSpec", "bundled_rules", "load_rule"]
