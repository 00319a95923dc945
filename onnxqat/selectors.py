"""Parse the text form ``SELECTOR.KEY=VALUE`` of `--set` and `--group`.

A selector is a word such as ``weight``, or a word and a pattern such as ``name:/head/.*``. The
callers define which selectors exist and what they match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from onnxqat.errors import OnnxQatError

__all__ = ["Assignment", "matches", "parse_assignment"]

REGEX = ":REGEX"


class Assignment(NamedTuple):
    """The parts of ``SELECTOR.KEY=VALUE``; ``pattern`` is the text behind the selector's colon."""

    kind: str
    pattern: str
    key: str
    value: str


def parse_assignment(
    text: str, selectors: Sequence[str], *, example: str, error: type[OnnxQatError]
) -> Assignment:
    """Read ``SELECTOR.KEY=VALUE``.

    Parameters
    ----------
    selectors : sequence of str
        The known selectors, in the form of a message: ``weight``, ``op:TYPE``, ``name:REGEX``.
    example : str
        An example, for messages.
    error : type
        The type of the error.

    Raises
    ------
    OnnxQatError
        An error of the type ``error``: the text does not have this form, the selector is unknown,
        or the regular expression is invalid.
    """
    left, equals, value = text.rpartition("=")
    selector, dot, key = left.rpartition(".")
    if not (equals and dot and selector):
        raise error(f"'{text}': not of the form SELECTOR.KEY=VALUE, as in {example}.")
    kind, _, pattern = selector.partition(":")
    found = next((s for s in selectors if s.partition(":")[0] == kind), None)
    if found is None or (":" in found) != bool(pattern):
        known = ", ".join(selectors)
        raise error(f"'{text}': unknown selector '{selector}'. Use one of {known}.")
    if found.endswith(REGEX):
        try:
            re.compile(pattern)
        except re.error as cause:
            raise error(f"'{text}': '{pattern}' is not a regular expression ({cause}).") from cause
    return Assignment(kind, pattern, key, value)


def matches(pattern: str, text: str) -> bool:
    """Return whether a regular expression matches all of ``text``."""
    return re.fullmatch(pattern, text) is not None
