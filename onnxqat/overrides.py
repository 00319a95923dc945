"""User overrides of a rule: ``SELECTOR.KEY=VALUE``, as `--set` and the overrides file have them.

================  ==================================================================
SELECTOR          what it covers
================  ==================================================================
weight            every weight point
activation        every activation point
first, last       weight and input activations of the first / last weighted nodes
op:TYPE           weight and input activations of the nodes of this op type
name:REGEX        weight and input activations of the nodes whose whole name matches
tensor:REGEX      the points of the tensors whose whole name matches
================  ==================================================================

KEY is a field of the spec (``bits``, ``signedness``, ``symmetric``, ``narrow_range``, ``axis``,
``min_range``) or ``quantize``, whose only value is ``false``. Later overrides win.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from onnxqat.errors import RuleError
from onnxqat.rules import RuleSpec

__all__ = ["Override", "parse_override"]

SELECTORS = ("weight", "activation", "first", "last", "op:", "name:", "tensor:")
SPEC_KEYS = tuple(k for k in RuleSpec.__struct_fields__ if k != "fixed_range")


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one field for the points that a selector covers."""

    kind: Literal["weight", "activation", "first", "last", "op", "name", "tensor"]
    pattern: str = ""
    key: str
    value: Any

    def __str__(self) -> str:
        """Return the text it was read from, normalised."""
        pattern = f":{self.pattern}" if self.pattern else ""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.kind}{pattern}.{self.key}={value}"

    @property
    def selects_nodes(self) -> bool:
        """Whether the selector names nodes, and so covers the points they read."""
        return self.kind in ("first", "last", "op", "name")

    def covers_point(self, role: str, tensor: str) -> bool:
        """Return whether a selector of points covers this one."""
        return self.matches(tensor) if self.kind == "tensor" else role == self.kind

    def matches(self, text: str) -> bool:
        """Return whether the pattern covers the whole of ``text``."""
        if self.kind == "op":
            return text == self.pattern
        return re.fullmatch(self.pattern, text) is not None


def parse_override(text: str) -> Override:
    """Read ``SELECTOR.KEY=VALUE``.

    Raises
    ------
    RuleError
        Unknown selector or key, a value outside the field's type, or an invalid regex.

    Examples
    --------
    >>> parse_override("weight.bits=4")
    Override(kind='weight', pattern='', key='bits', value=4)
    """
    left, equals, raw = text.rpartition("=")
    selector, dot, key = left.rpartition(".")
    if not (equals and dot and selector):
        raise RuleError(f"'{text}': not of the form SELECTOR.KEY=VALUE, as in weight.bits=4.")
    kind, _, pattern = selector.partition(":")
    if kind not in {s.rstrip(":") for s in SELECTORS} or (f"{kind}:" in SELECTORS) != bool(pattern):
        raise RuleError(f"'{text}': unknown selector '{selector}'. One of {', '.join(SELECTORS)}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise RuleError(f"'{text}': '{pattern}' is not a regular expression ({error}).") from error
    return Override(kind=kind, pattern=pattern, key=key, value=_value(text, key, raw))  # type: ignore[arg-type]


def _value(text: str, key: str, raw: str) -> Any:
    if key == "quantize":
        if raw != "false":
            raise RuleError(f"'{text}': quantize takes 'false' only; leave it out to quantize.")
        return False
    if key not in SPEC_KEYS:
        raise RuleError(f"'{text}': unknown key '{key}'. One of {', '.join(SPEC_KEYS)}, quantize.")
    try:
        spec = msgspec.convert({key: raw}, RuleSpec, strict=False)
    except msgspec.ValidationError as error:
        raise RuleError(f"'{text}': {error}.") from error
    value = getattr(spec, key)
    if key == "bits" and not 2 <= value <= 8:
        raise RuleError(f"'{text}': bits = {value}. Widths are 2 to 8.")
    return value
