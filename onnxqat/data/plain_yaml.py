"""Read a few entries of a YAML file: text, and flat lists and mappings of text.

This is the part of YAML in which data sets are described. A value is one of these:

- text, plain or in quotes
- a list, as ``[a, b]`` over one or more lines, or as lines ``- a``
- a mapping, as ``{0: a, 1: b}``, or as lines ``0: a``

Everything else is refused in the wanted entries: anchors, aliases, tags, text over several lines,
and lists of lists. Other entries are skipped, whatever they hold. Nothing is ever run, and plain
text stays text: ``no`` is not false, and ``1`` is not a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from onnxqat.errors import DataError
from onnxqat.toml_files import read_text

__all__ = ["YAML_SUFFIXES", "Value", "read_entries"]

YAML_SUFFIXES = (".yaml", ".yml")

Value: TypeAlias = str | list[str] | dict[str, str] | None

QUOTED = r"""'(?:[^'\n]|'')*'|"(?:[^"\\\n]|\\.)*\""""
FIRST = r"""(?:[^\s\[\]{},&*!|>%@`#?:'"-]|[-?:](?=\S))"""  # the others mean something in YAML
QUOTE = r"""(?<![\s\[{,])['"]"""  # elsewhere it might hide a '#', see CONTENT
PLAIN = rf"{FIRST}(?:[^:\s'\"]|[ \t]|{QUOTE}|:(?=\S))*"
PLAIN_INSIDE = rf"{FIRST}(?:[^:,\[\]{{}}\s'\"]|[ \t]|{QUOTE}|:(?=[^\s,\[\]{{}}]))*"
# what precedes a comment: '#' begins one after a space only, and a quote opens text only there
CONTENT = re.compile(rf"(?:(?<![^\s,\[{{])(?:{QUOTED})|[^#]|(?<=\S)#)*")
ENTRY = re.compile(r"([A-Za-z_][\w-]*):(?:\s+(.*))?")
TEXT = re.compile(rf"{QUOTED}|{PLAIN}")
LINE = re.compile(r"(?:-|(\w+):)\s+(.*)")
ITEM = re.compile(rf"(?:(\w+):\s+)?({QUOTED}|{PLAIN_INSIDE})\s*(?:,\s*|$)")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
NULLS = ("", "~", "null", "Null", "NULL")


def read_entries(path: Path, wanted: Collection[str]) -> dict[str, Value]:
    """Return the values of the entries that the file has.

    Parameters
    ----------
    path : Path
        The file.
    wanted : collection of str
        Names of the entries.

    Raises
    ------
    DataError
        The file cannot be read, is larger than 1 MiB, names an entry twice, or a wanted entry is
        none of the forms above.
    """
    found: dict[str, list[str]] = {}
    for key, line in _lines(path):
        if key is None:
            found[next(reversed(found))].append(line)
        elif key in found:
            raise DataError(f"{path}: has the entry '{key}' twice. Remove one of them.")
        else:
            found[key] = [line]
    values: dict[str, Value] = {}
    for key in wanted:
        if key in found:
            try:
                values[key] = _value(found[key])
            except ValueError as error:
                raise DataError(
                    f"{path}: cannot read the entry '{key}' ({error}). Write text, a list such as "
                    "[a, b], or a mapping such as {0: a, 1: b}."
                ) from error
    return values


def _lines(path: Path) -> list[tuple[str | None, str]]:
    """Return the lines without comments: name and rest of the first of an entry; None and text."""
    found: list[tuple[str | None, str]] = []
    text = read_text(path, kind="a description of data", error=DataError)
    for line in text.removeprefix("\ufeff").split("\n"):
        match = CONTENT.match(line)
        bare = match[0].rstrip() if match else ""
        if not bare or (bare == "---" and not found):
            continue
        entry = ENTRY.fullmatch(bare)
        if entry is None and not found:
            raise DataError(f"{path}: begins with '{bare[:80]}'. Write entries such as 'train: x'.")
        found.append((entry[1], entry[2] or "") if entry else (None, bare))
    return found


def _value(lines: Sequence[str]) -> Value:
    first, *body = lines
    joined = "\n".join(lines).strip()
    if joined in NULLS:
        return None
    if joined[0] in "[{":
        return _inside(joined)
    if first and body:
        raise ValueError("it has several lines")
    return _block(body) if body else _text(first)


def _block(lines: Sequence[str]) -> Value:
    """Return a list or mapping with one item on each line, all of them equally indented."""
    indents = {len(line) - len(line.lstrip()) for line in lines}
    if len(indents) > 1 or (indents == {0} and lines[0][0] != "-"):
        raise ValueError("its lines are not equally indented")
    return _collected([_matched(LINE, line.strip()).groups() for line in lines])


def _inside(text: str) -> Value:
    """Return a list or mapping in brackets."""
    inner = text[1:-1].strip()
    if text[-1] != {"[": "]", "{": "}"}[text[0]]:
        raise ValueError(f"'{text[0]}' is not closed")
    items, end = [], 0
    while end < len(inner):
        match = _matched(ITEM, inner, end)
        items.append((match[1], match[2].rstrip()))
        end = match.end()
    if any((key is None) != (text[0] == "[") for key, _ in items):
        raise ValueError("a list has no names, and a mapping has one for each item")
    return _collected(items)


def _matched(pattern: re.Pattern[str], text: str, start: int = 0) -> re.Match[str]:
    match = pattern.match(text, start)
    if match is None:
        raise ValueError(f"at {text[start : start + 80]!r}")
    return match


def _collected(items: Sequence[Sequence[str | None]]) -> Value:
    """Return a list if no item has a key, else a mapping."""
    texts = [_text(text or "") for _, text in items]
    keys = [key for key, _ in items if key is not None]
    if not keys:
        return texts
    if len(keys) != len(items) or len(set(keys)) != len(keys):
        raise ValueError("it mixes a list and a mapping, or has a name twice")
    return dict(zip(keys, texts, strict=True))


def _text(text: str) -> str:
    if not TEXT.fullmatch(text):
        raise ValueError(f"at {text[:80]!r}")
    if text[0] == "'":
        text = text[1:-1].replace("''", "'")
    elif text[0] == '"':
        text = json.loads(text)
    if UNPRINTABLE.search(text):
        raise ValueError(f"{text[:80]!r} has a character that cannot be printed")
    return text
