"""Find the mistakes in a rule, entry by entry, and their line numbers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import onnx

from onnxqat.operators import PATTERN_NAMES
from onnxqat.qparams import WIDTHS, QuantSpec
from onnxqat.rules.assumed import wrong_assumptions
from onnxqat.rules.schema import (
    Arithmetic,
    Changes,
    HardwareRule,
    OpRule,
    RuleException,
    RuleSpec,
)

__all__ = ["Problem", "find_problems", "json_schema", "line_of", "wrong_spec"]

ENTRIES: dict[str, type[msgspec.Struct]] = {"specs": RuleSpec, "ops": OpRule}
KINDS = (HardwareRule, OpRule, RuleSpec, RuleException, Changes, Arithmetic)
KNOWN_KEYS = sorted({f.encode_name for kind in KINDS for f in msgspec.structs.fields(kind)})
EFFECTS = ("changes", "kept_float", "unsupported")


@dataclass(frozen=True)
class Problem:
    """A mistake, and the keys that lead to it (a number is an index into a list of tables)."""

    path: tuple[str | int, ...]
    message: str

    @property
    def place(self) -> str:
        """The table, as ``[specs.weight]``; empty for the top of the file."""
        return f"[{'.'.join(map(str, self.path))}]" if self.path else ""


def find_problems(table: Mapping[str, Any]) -> list[Problem]:
    """Return all mistakes in a rule's table, whose ``extends`` is already resolved."""
    problems = list(_wrong_entries(table))
    if problems:
        return problems
    try:
        rule = msgspec.convert(table, HardwareRule)
    except msgspec.ValidationError as error:
        return [Problem((), _explain(str(error)))]
    return [*_wrong_specs(rule), *_wrong_ops(rule), *_wrong_exceptions(rule), *_wrong_rest(rule)]


def _wrong_entries(table: Mapping[str, Any]) -> Iterator[Problem]:
    """Convert each table separately, so that each message names the key of its table."""
    for section, kind in ENTRIES.items():
        entries = table.get(section, {})
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            yield from _wrong(value, kind, (section, key))
    exceptions = table.get("exceptions", [])
    for number, value in enumerate(exceptions if isinstance(exceptions, list) else ()):
        yield from _wrong(value, RuleException, ("exceptions", number))


def _wrong(
    value: Any, kind: type[msgspec.Struct], path: tuple[str | int, ...]
) -> Iterator[Problem]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        yield Problem(path, _explain(str(error)))


def _explain(message: str) -> str:
    """Add the nearest known key to msgspec's message about an unknown one."""
    found = re.search(r"unknown field `(\w+)`", message)
    if found and found[1] in KNOWN_KEYS:
        return message.replace("$.", "").rstrip(".") + ". That key belongs to another table."
    close = difflib.get_close_matches(found[1], KNOWN_KEYS, n=1) if found else []
    return message.replace("$.", "").rstrip(".") + (
        f". Did you mean '{close[0]}'?" if close else "."
    )


def _wrong_specs(rule: HardwareRule) -> Iterator[Problem]:
    for key, spec in rule.specs.items():
        if wrong := wrong_spec(spec):
            yield Problem(("specs", key), wrong)
        if spec.heads is not None:
            yield Problem(("specs", key), "heads is counted in the model. Set axis = 'head'.")


def wrong_spec(spec: QuantSpec) -> str | None:
    """Return why no integer grid can satisfy a spec, or None if one can."""
    if spec.bits not in WIDTHS:
        return f"bits = {spec.bits}. Widths are 2 to 8, and 16."
    if spec.bits == 16 and spec.narrow_range:
        return "narrow_range needs 8 bits or fewer: no runtime clips 16-bit integers."
    if not spec.symmetric and spec.signedness == "from_range":
        return (
            "an asymmetric spec needs a fixed signedness. Set signedness to 'signed' or 'unsigned'."
        )
    if not spec.symmetric and spec.power_of_two:
        return "power_of_two needs symmetric = true."
    if spec.scale_ratio is not None and spec.power_of_two:
        return "scale_ratio needs power_of_two = false."
    if spec.symmetric and spec.off_center:
        return "off_center needs symmetric = false: a symmetric zero_point is the center."
    low, high = spec.fixed_range or (0.0, 0.0)
    if not -math.inf < low <= 0 <= high < math.inf:
        return f"fixed_range = {[low, high]}. Give a finite range that contains 0."
    return _wrong_number(spec)


def _wrong_number(spec: QuantSpec) -> str | None:
    if not 0 < spec.min_range < math.inf:
        return f"min_range = {spec.min_range}. Give a number above 0."
    if not 0 <= spec.min_scale < math.inf:
        return f"min_scale = {spec.min_scale}. Give 0 or more."
    if spec.scale_ratio is not None and not 1 <= spec.scale_ratio < math.inf:
        return f"scale_ratio = {spec.scale_ratio}. Give a number of 1 or more."
    if not 0 < spec.range_factor < math.inf:
        return (
            f"range_factor = {spec.range_factor}. Give a number above 0; 1 leaves ranges unchanged."
        )
    return None


def _wrong_ops(rule: HardwareRule) -> Iterator[Problem]:
    for op_type, op in rule.ops.items():
        yield from _unknown_ops(("ops", op_type), (op_type,))
        yield from _unknown_specs(rule, ("ops", op_type), op)
    for section, ops in (("float", rule.kept_float), ("unsupported", rule.unsupported)):
        yield from _unknown_ops((section,), tuple(ops))
    for chain in rule.fuse:
        yield from _unknown_ops(("fuse",), chain, ("BiasAdd",))
        if len(chain) < 2:
            yield Problem(("fuse",), f"{list(chain)} is too short. Name two ops or more.")
    for name in rule.split:
        if name not in PATTERN_NAMES:
            yield Problem(("split",), f"'{name}' is not one of {', '.join(PATTERN_NAMES)}.")


def _unknown_ops(
    path: tuple[str | int, ...], ops: tuple[str, ...], others: tuple[str, ...] = ()
) -> Iterator[Problem]:
    for op_type in ops:
        if op_type in (*PATTERN_NAMES, *others) or onnx.defs.has(op_type):
            continue
        known = sorted({s.name for s in onnx.defs.get_all_schemas()} | {*PATTERN_NAMES, *others})
        close = difflib.get_close_matches(op_type, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        yield Problem(path, f"'{op_type}' is not an op type of ONNX.{hint}")


def _unknown_specs(
    rule: HardwareRule, path: tuple[str | int, ...], table: OpRule | Changes
) -> Iterator[Problem]:
    for key in ("inputs", "outputs", "weight"):
        spec = getattr(table, key)
        allowed = spec == "none" and isinstance(table, Changes)
        if spec is not None and spec not in rule.specs and not allowed:
            defined = ", ".join(rule.specs)
            yield Problem(
                path, f"{key} names spec '{spec}', which is not defined. Defined: {defined}."
            )


def _wrong_exceptions(rule: HardwareRule) -> Iterator[Problem]:
    for number, exception in enumerate(rule.exceptions):
        path = ("exceptions", number)
        yield from _unknown_ops(path, exception.op)
        if sum(getattr(exception, effect) is not None for effect in EFFECTS) != 1:
            yield Problem(path, "must have exactly one of changes, float, unsupported.")
        if exception.reads_float and exception.kept_float is None:
            yield Problem(path, "reads_float needs float: a quantized node reads integers.")
        if exception.changes is not None:
            yield from _unknown_specs(rule, path, exception.changes)


def _wrong_rest(rule: HardwareRule) -> Iterator[Problem]:
    for key in ("weight_bits", "activation_bits"):
        widths = getattr(rule, key)
        if not widths or not all(width in WIDTHS for width in widths):
            yield Problem((key,), f"{list(widths)}. Widths are 2 to 8, and 16.")
    if not 16 <= rule.bias_bits <= 32:
        yield Problem(("bias_bits",), f"bias_bits = {rule.bias_bits}. Widths are 16 to 32.")
    if rule.arithmetic is not None:
        yield from _wrong_arithmetic(rule.arithmetic)


def _wrong_arithmetic(arithmetic: Arithmetic) -> Iterator[Problem]:
    path = ("arithmetic",)
    for key in ("multiplier_bits", "operand_bits"):
        width = getattr(arithmetic, key)
        if not 4 <= width <= 32:
            yield Problem(path, f"{key} = {width}. Widths are 4 to 32.")
    ops = (*arithmetic.integer, *arithmetic.table, *arithmetic.kept_float)
    yield from _unknown_ops(path, ops)
    if twice := sorted({op for op in ops if ops.count(op) > 1}):
        yield Problem(path, f"lists {', '.join(twice)} more than once.")
    yield from (Problem(path, message) for message in wrong_assumptions(arithmetic))


def line_of(text: str, problem: Problem) -> int | None:
    """Return the line number (from 1) of a problem's entry in a TOML text, if it is there."""
    if not problem.path:
        return None
    section, *rest = problem.path
    lines = text.splitlines()
    if rest and isinstance(rest[0], int):
        heads = [i for i, line in enumerate(lines) if line.strip() == f"[[{section}]]"]
        return heads[rest[0]] + 1 if rest[0] < len(heads) else None
    if not rest:
        return _find(lines, rf"^\s*(\[{section}\]|{section}\s*=)", 0)
    key = re.escape(str(rest[0]))
    own = _find(lines, rf'^\s*\[{section}\."?{key}"?\]', 0)
    start = _find(lines, rf"^\s*\[{section}\]", 0)
    return own or (_find(lines, rf'^\s*"?{key}"?\s*[.=]', start) if start else None)


def _find(lines: list[str], pattern: str, start: int) -> int | None:
    numbers = range(start, len(lines))
    return next((i + 1 for i in numbers if re.match(pattern, lines[i])), None)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of rule files, for editors."""
    schema = msgspec.json.schema(HardwareRule)
    rule = schema["$defs"]["HardwareRule"]
    rule["properties"]["extends"] = {
        "type": "string",
        "description": "The rule that this file changes: a bundled one, or a .toml file beside it.",
    }
    rule["anyOf"] = [{"required": ["extends"]}, {"required": rule.pop("required")}]
    del schema["$defs"]["Arithmetic"]["required"]  # a rule with `extends` may change parts only
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
