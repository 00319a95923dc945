"""User overrides of a rule: ``SELECTOR.KEY=VALUE`` in `--set` and in an overrides file.

================  ==================================================================
SELECTOR          the points or nodes that it matches
================  ==================================================================
weight            all weight points
activation        all activation points
bias              all biases; the only key is ``quantize=false``
first, last       weight and input activations of the first / last weighted nodes
op:TYPE           weight and input activations of the nodes of this op type
name:REGEX        weight and input activations of the nodes whose whole name matches
between:A->B      weight and input activations of the nodes on the paths from tensor A to B
tensor:REGEX      the points of the tensors whose whole name matches
================  ==================================================================

KEY is a field of the spec (``bits``, ``signedness``, ``symmetric``, ``narrow_range``,
``off_center``, ``power_of_two``, ``axis``, ``min_range``, ``observer``, ``range_factor``,
``scale_ratio``, ``method``), ``spec``, whose value is the name of a spec of the rule, or
``quantize``: ``false`` leaves nodes or tensors float, ``true`` quantizes nodes that the rule, or an
earlier override, leaves float. Later overrides win.

A TOML file contains the same with one table per selector, in order::

    [weight]
    bits = 4
    ["name:/head/.*"]
    quantize = false
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from onnxqat.errors import RuleError
from onnxqat.qparams import WIDTHS
from onnxqat.rules import RuleSpec
from onnxqat.selectors import matches, parse_assignment
from onnxqat.toml_files import read_toml

__all__ = [
    "Override",
    "check_weight_observer",
    "overrides_text",
    "parse_override",
    "read_overrides",
]

ROLES = ("weight", "activation", "bias")
SELECTORS = (*ROLES, "first", "last", "op:TYPE", "name:REGEX", "between:A->B", "tensor:REGEX")
NOT_BY_HAND = ("fixed_range", "rounding", "min_scale")
SPEC_KEYS = tuple(k for k in RuleSpec.__struct_fields__ if k not in NOT_BY_HAND)
KEYS = (*SPEC_KEYS, "spec", "quantize")
WEIGHT_OBSERVERS = ("mse", "minmax", "auto")


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """A change of one field for the points that a selector matches."""

    kind: Literal[
        "weight", "activation", "bias", "first", "last", "op", "name", "between", "tensor"
    ]
    pattern: str = ""
    key: str
    value: Any

    def __str__(self) -> str:
        """Return the text form, normalized."""
        pattern = f":{self.pattern}" if self.pattern else ""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.kind}{pattern}.{self.key}={value}"

    @property
    def selects_nodes(self) -> bool:
        """Whether the selector matches nodes, and thereby the points that they read."""
        return self.kind in ("first", "last", "op", "name", "between")

    @property
    def tensors(self) -> tuple[str, str]:
        """The two ends of ``between:A->B``."""
        start, _, end = self.pattern.partition("->")
        return start, end

    def covers_point(self, role: str, tensor: str) -> bool:
        """Return whether a selector of points matches this point."""
        return self.matches(tensor) if self.kind == "tensor" else role == self.kind

    def matches(self, text: str) -> bool:
        """Return whether the pattern matches all of ``text``."""
        if self.kind == "op":
            return text == self.pattern
        return matches(self.pattern, text)


def parse_override(text: str) -> Override:
    """Read ``SELECTOR.KEY=VALUE``.

    Raises
    ------
    RuleError
        The selector or key is unknown, the value does not fit the key, or the regular expression
        is invalid.

    Examples
    --------
    >>> parse_override("weight.bits=4")
    Override(kind='weight', pattern='', key='bits', value=4)
    """
    kind, pattern, key, raw = parse_assignment(
        text, SELECTORS, example="weight.bits=4", error=RuleError
    )
    if kind == "between" and not all(pattern.partition("->")):
        raise RuleError(f"'{text}': not of the form between:TENSOR->TENSOR.KEY=VALUE.")
    override = Override(kind=kind, pattern=pattern, key=key, value=_value(text, key, raw))  # type: ignore[arg-type]
    _check_fit(text, override)
    return override


def read_overrides(path: str | Path) -> list[Override]:
    """Read an overrides file: one table per selector, in order.

    Raises
    ------
    RuleError
        The file cannot be read, is not TOML, or contains an override that `parse_override` refuses.
    """
    tables = read_toml(path, kind="an overrides file", error=RuleError)
    overrides = []
    for selector, table in tables.items():
        if not isinstance(table, dict):
            raise RuleError(f"{path}: '{selector}' is not a table. Write [\"{selector}\"].")
        for key, value in table.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            try:
                overrides.append(parse_override(f"{selector}.{key}={text}"))
            except RuleError as error:
                raise RuleError(f"{path}: {error}") from error
    return overrides


def overrides_text(overrides: Sequence[Override]) -> str:
    """Return the text of an overrides file with the same effect as these overrides.

    Raises
    ------
    RuleError
        The file would need two tables for a selector, because the order of overrides matters.

    Examples
    --------
    >>> overrides_text([parse_override("weight.bits=4")]).splitlines()
    ['["weight"]', 'bits = 4']
    """
    tables: dict[str, dict[str, Any]] = {}
    for override in overrides:
        pattern = f":{override.pattern}" if override.pattern else ""
        selector = f"{override.kind}{pattern}"
        names = list(tables)
        later = names[names.index(selector) + 1 :] if selector in tables else []
        if any(_overrules(key, override.key) for name in later for key in tables[name]):
            raise RuleError(
                f"Override '{override}': an overrides file cannot contain '{selector}' twice. Pass "
                "one of them with --set."
            )
        tables.setdefault(selector, {})[override.key] = override.value
    return "\n".join(
        "".join((f"[{_quoted(selector)}]\n", *(f"{k} = {_quoted(v)}\n" for k, v in table.items())))
        for selector, table in tables.items()
    )


def _overrules(key: str, other: str) -> bool:
    """Return whether the order of two overrides with these keys matters."""
    return key == other or "spec" in (key, other)


def _quoted(value: Any) -> str:
    """Return a value as TOML text; TOML's strings are JSON's, except for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_fit(text: str, override: Override) -> None:
    """Refuse a key that the selector does not support."""
    if override.kind == "bias" and override.key != "quantize":
        raise RuleError(
            f"'{text}': the scale of a bias follows from its input and weight. The only override "
            "is bias.quantize=false."
        )
    if override.kind == "weight":
        check_weight_observer(override)
    if override.key == "quantize" and override.value and not override.selects_nodes:
        raise RuleError(
            f"'{text}': quantize=true applies to nodes. Select them by name:, op: or between:."
        )


def check_weight_observer(override: Override) -> None:
    """Refuse an observer of batches for the selector ``weight``.

    Raises
    ------
    RuleError
        The observer cannot be used for weights.
    """
    if override.key == "observer" and override.value not in WEIGHT_OBSERVERS:
        raise RuleError(
            f"'{override}': the observers for weights are {', '.join(WEIGHT_OBSERVERS)}. Other "
            "observers need the batches of an activation."
        )


def _value(text: str, key: str, raw: str) -> Any:
    if key == "quantize":
        if raw not in ("true", "false"):
            raise RuleError(f"'{text}': quantize takes true or false.")
        return raw == "true"
    if key == "spec":
        return raw
    if key not in SPEC_KEYS:
        raise RuleError(f"'{text}': unknown key '{key}'. Use one of {', '.join(KEYS)}.")
    try:
        spec = msgspec.convert({key: raw}, RuleSpec, strict=False)
    except msgspec.ValidationError as error:
        raise RuleError(f"'{text}': {error}.") from error
    value = getattr(spec, key)
    if key == "bits" and value not in WIDTHS:
        raise RuleError(f"'{text}': bits = {value}. Widths are 2 to 8, and 16.")
    return value
