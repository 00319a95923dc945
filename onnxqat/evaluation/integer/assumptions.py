"""What a rule assumes of its chip: each combination, and where figures must not decide."""

from __future__ import annotations

import msgspec

from onnxqat.errors import RuleError
from onnxqat.evaluation.integer.program import IntegerProgram
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule, assumptions, load_rule, variants

__all__ = ["check_documented", "other_programs"]


def check_documented(model: QuantizedModel, rule: HardwareRule | None, purpose: str) -> None:
    """Refuse a rule that assumes a part of its arithmetic where its figures would decide.

    Parameters
    ----------
    rule : HardwareRule or None
        The rule (None: the bundled rule of the model's plan).
    purpose : str
        What the figures would decide, as the subject of a sentence.

    Raises
    ------
    RuleError
        A part of the rule's arithmetic is assumed.
    """
    used = rule or load_rule(model.plan.rule)
    if used.arithmetic is not None and (found := assumptions(used.arithmetic)):
        raise RuleError(
            f"{purpose} cannot use integer figures of rule {used.name}: no source documents "
            f"{', '.join(found)} of its chip. Use figures of the Q/DQ model."
        )


def other_programs(
    model: QuantizedModel, rule: HardwareRule | None, threads: int
) -> tuple[list[dict[str, str]], list[IntegerProgram]]:
    """Return all combinations of assumed values, and a program for each but the stated one.

    Without assumptions both lists are empty.
    """
    used = rule or load_rule(model.plan.rule)
    if used.arithmetic is None or not assumptions(used.arithmetic):
        return [], []
    found = variants(used.arithmetic)
    programs = [
        IntegerProgram(
            model,
            msgspec.structs.replace(used, arithmetic=arithmetic),
            threads=threads,
            compared=False,
        )
        for _, arithmetic in found[1:]
    ]
    return [values for values, _ in found], programs
