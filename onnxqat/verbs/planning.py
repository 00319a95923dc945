"""Prepare a float model and plan its quantization: the first step of several verbs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeAlias

from onnxqat.model import Model
from onnxqat.overrides import Override, parse_override, read_overrides
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.preparation.float16 import refuse_other_floats
from onnxqat.quantized import OPSET_OF_16_BITS, needs_16_bits
from onnxqat.rules import HardwareRule, load_rule

__all__ = ["AnyRule", "Overrides", "planned", "rule_of", "warn_of_widths"]

logger = logging.getLogger(__name__)
AnyRule: TypeAlias = str | Path | HardwareRule
Overrides: TypeAlias = str | Path | Iterable[str | Override]


def rule_of(rules: AnyRule) -> HardwareRule:
    """Return the hardware rule of a bundled name, of a file, or the rule that was passed."""
    return rules if isinstance(rules, HardwareRule) else load_rule(str(rules))


def planned(
    floats: Model,
    rule: HardwareRule,
    overrides: Overrides = (),
    *,
    repair: Callable[[Model, QuantPlan], Model] | None = None,
) -> tuple[Model, QuantPlan]:
    """Prepare a float model, at the opset that the plan needs, and plan its quantization.

    Parameters
    ----------
    floats : Model
        The exported model; it is not changed.
    rule : HardwareRule
        The rule of the chip.
    overrides : path, or iterable of str or Override
        A TOML file, or texts ``SELECTOR.KEY=VALUE``; later ones override earlier ones.
    repair : callable, optional
        Changes the prepared model; gets it with its plan, which is then made again.

    Returns
    -------
    Model, QuantPlan
        The prepared float model, and its plan.

    Raises
    ------
    ModelError, PlanError, RuleError
        The model cannot be prepared, an override matches nothing, or nothing is quantized.
    """
    parsed = _parsed(overrides)
    prepared = prepare(floats)
    refuse_other_floats(prepared.graph, floats.name)
    found = make_plan(prepared.graph, rule, parsed)
    if prepared.graph.opset < OPSET_OF_16_BITS and needs_16_bits(found):
        prepared = prepare(floats, opset=OPSET_OF_16_BITS)
        found = make_plan(prepared.graph, rule, parsed)
    if repair is not None:
        prepared = repair(prepared, found)
        found = make_plan(prepared.graph, rule, parsed)
    for role in ("weight", "activation"):
        warn_of_widths(rule, role, {p.spec.bits for p in found.points if p.role == role})
    return prepared, found


def _parsed(overrides: Overrides) -> list[Override]:
    if isinstance(overrides, str | Path):
        return read_overrides(overrides)
    return [one if isinstance(one, Override) else parse_override(one) for one in overrides]


def warn_of_widths(rule: HardwareRule, role: Literal["weight", "activation"],
                   widths: Iterable[int]) -> None:  # fmt: skip
    """Warn of widths that the chip of a rule lacks."""
    known = rule.weight_bits if role == "weight" else rule.activation_bits
    others = sorted({*widths} - {*known, *(spec.bits for spec in rule.specs.values())})
    if others:
        logger.warning(
            "%s bits for %ss are for study only: rule %s supports only %s bits.",
            _listed(others),
            role,
            rule.name,
            _listed(known),
        )


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
