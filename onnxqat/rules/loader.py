"""Read hardware rule files strictly: bundled ones by name, others by path."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from onnxqat.errors import RuleError
from onnxqat.rules.problems import Problem, find_problems, line_of
from onnxqat.rules.schema import HardwareRule
from onnxqat.toml_files import merged, parse_toml, read_text

__all__ = ["bundled_rules", "load_rule", "validate_rule"]

KIND = "a rule file"
MAX_EXTENDS = 8  # a longer chain is taken for a loop


def bundled_rules() -> tuple[str, ...]:
    """Return the names of the rules that come with onnxqat, sorted."""
    folder = resources.files("onnxqat.rules")
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


def load_rule(name: str) -> HardwareRule:
    """Return the bundled rule of this name, or the rule in the ``.toml`` file at this path.

    Raises
    ------
    RuleError
        The name is unknown, the file cannot be read, or the schema does not allow a key or value.
    """
    table = _read(name, depth=0)
    problems = find_problems(table)
    if problems:
        raise RuleError(_describe(name, problems[0]))
    return msgspec.convert(table, HardwareRule)


def validate_rule(name: str) -> list[str]:
    """Return one line for each mistake in a rule file: file, line, key, advice.

    Raises
    ------
    RuleError
        The file cannot be read, or is not TOML.
    """
    return [_describe(name, problem) for problem in find_problems(_read(name, depth=0))]


def _describe(name: str, problem: Problem) -> str:
    """Return ``file:line [table]: message``; no line if the entry stands in a parent file."""
    line = line_of(_text(name), problem)
    where = f"{name}:{line}" if line else name
    return f"{where} {problem.place}".rstrip() + f": {problem.message}"


def _read(name: str, *, depth: int) -> dict[str, Any]:
    if depth > MAX_EXTENDS:
        raise RuleError(
            f"{name}: 'extends' leads through more than {MAX_EXTENDS} files, or back to itself."
        )
    table = parse_toml(_text(name), name, kind=KIND, error=RuleError)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise RuleError(f"{name}: 'extends' is {parent!r}. Name one rule.")
    if parent.endswith(".toml"):  # relative to the file that names it
        parent = str(Path(name).parent / parent)
    return merged(_read(parent, depth=depth + 1), table)


def _text(name: str) -> str:
    if name in bundled_rules():
        return (resources.files("onnxqat.rules") / f"{name}.toml").read_text(encoding="utf-8")
    if not name.endswith(".toml"):
        close = difflib.get_close_matches(name, bundled_rules(), n=3, cutoff=0.3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "See 'onnxqat rules list'."
        raise RuleError(f"Unknown rule '{name}'. {hint} Or give the path of a .toml file.")
    return read_text(Path(name), kind=KIND, error=RuleError)
