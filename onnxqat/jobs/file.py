"""Job files: TOML that may extend another file, has variables, and may be a matrix of jobs."""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqat.choices import nearest
from onnxqat.errors import JobError
from onnxqat.toml_files import Table, merged, read_toml

__all__ = ["Draft", "drafts", "read_variable"]

MAX_EXTENDS = 8  # files
MAX_JOBS = 1000  # of a matrix
MAX_TEXT = 10_000  # characters of a value with its variables filled in
MAX_NAME = 100  # characters of a job's name, which is that of its folder
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
REFERENCE = re.compile(r"\$?\$\{([^{}]*)\}")  # $${x} stands for ${x} itself


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One job as a file has it, its variables filled in.

    Attributes
    ----------
    name : str
        Of the job, and of the folder it works in.
    file : Path
        The job file.
    table : dict
        What it says.
    """

    name: str
    file: Path
    table: Table


@dataclass(frozen=True)
class _Entry:
    """A value of a matrix axis: that of the variable, and what it changes of the job."""

    label: str
    value: Any
    changes: Table


def drafts(path: str | Path, variables: Mapping[str, Any] | None = None) -> list[Draft]:
    """Return the jobs of a file: one, or those of its matrix.

    Parameters
    ----------
    path : str or Path
        A TOML file.
    variables : mapping, optional
        Values that replace those of the file's ``variables``.

    Raises
    ------
    JobError
        The file cannot be read, is not TOML or too large, extends itself, a variable is unknown,
        or the matrix is wrong.
    """
    file = Path(path)
    table = _read(file, ())
    given = _taken(table, "variables", file) | dict(variables or {})
    axes = _axes(_taken(table, "matrix", file), file)
    stem = table.pop("name", file.stem)
    found = [
        _draft(file, table, given, stem, dict(zip(axes, chosen, strict=True)))
        for chosen in itertools.product(*axes.values())
    ]
    _check_names(found)
    return found


def read_variable(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, where the value is one of TOML, or else a text.

    Raises
    ------
    JobError
        It has another form.

    Examples
    --------
    >>> read_variable("epochs=2"), read_variable("rules=tensorrt")
    (('epochs', 2), ('rules', 'tensorrt'))
    """
    name, equals, value = text.partition("=")
    if not (equals and NAME.fullmatch(name)):
        raise JobError(f"'{text}' is not of the form NAME=VALUE.")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return name, value


def _read(path: Path, children: tuple[Path, ...]) -> Table:
    """Read a file, and the one that it extends."""
    if path.resolve() in children or len(children) >= MAX_EXTENDS:
        raise JobError(f"{path}: 'extends' goes round in a circle, or over {MAX_EXTENDS} files.")
    table = read_toml(path, kind="a job file", error=JobError)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise JobError(f"{path}: 'extends' is {parent!r}. Name one file.")
    return merged(_read(path.parent / parent, (*children, path.resolve())), table)


def _taken(table: Table, name: str, file: Path) -> Table:
    found = table.pop(name, {})
    if not isinstance(found, dict):
        raise JobError(f"{file}: '{name}' is {found!r}. Write a table.")
    for key in found:
        if not NAME.fullmatch(key):
            raise JobError(f"{file}: [{name}] '{key}' is no name. Use letters, digits, - and _.")
    return found


def _axes(matrix: Table, file: Path) -> dict[str, list[_Entry]]:
    axes = {}
    for axis, entries in matrix.items():
        if not (isinstance(entries, list) and entries):
            raise JobError(f"{file}: [matrix] '{axis}' is {entries!r}. Write a list of values.")
        axes[axis] = [_entry(one, f"{file}: [matrix] '{axis}'") for one in entries]
    count = math.prod(len(entries) for entries in axes.values())
    if count > MAX_JOBS:
        raise JobError(f"{file}: [matrix] makes {count} jobs. At most {MAX_JOBS} are run.")
    return axes


def _entry(entry: Any, where: str) -> _Entry:
    if isinstance(entry, dict):
        changes = dict(entry)
        name = changes.pop("name", None)
        if not isinstance(name, str):
            raise JobError(f"{where} has a table without a name. Add name = '...' to it.")
        return _Entry(name, name, changes)
    if not isinstance(entry, str | int | float):
        raise JobError(f"{where} holds {entry!r}. Write texts, numbers or tables with a name.")
    return _Entry(_label(str(entry)), entry, {})


def _label(text: str) -> str:
    """Return what a value adds to a job's name: of a path, its stem."""
    path = Path(text)
    is_path = "/" in text or path.suffix in (".onnx", ".toml")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem if is_path else text).strip("-.")


def _draft(
    file: Path, table: Table, variables: Table, stem: Any, chosen: Mapping[str, _Entry]
) -> Draft:
    for entry in chosen.values():
        table = merged(table, entry.changes)
    values = variables | {axis: entry.value for axis, entry in chosen.items()}
    filling = _Filling(file, values)
    filled = filling.fill(table)
    for axis, entry in chosen.items():
        if not entry.changes and axis not in filling.used:
            raise JobError(
                f"{file}: [matrix] '{axis}': no key uses it. Write ${{{axis}}} in the value of one."
            )
    name = "-".join([str(filling.fill(stem)), *(entry.label for entry in chosen.values())])
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise JobError(
            f"{file}: the job's name '{name[:MAX_NAME]}' is no name of a folder. Give name = '...' "
            "of letters, digits, - and _."
        )
    return Draft(name=name, file=file, table=filled)


class _Filling:
    """Puts values in the place of variables, and notes which were used."""

    def __init__(self, file: Path, variables: Table) -> None:
        self.file, self.used = file, set[str]()
        self.values: Table = {}
        for name, value in variables.items():  # each may use those before it
            if not isinstance(value, str | int | float):
                raise JobError(f"{file}: variable '{name}' is {value!r}. Give a text or a number.")
            self.values[name] = self.fill(value)
        self.used.clear()

    def fill(self, value: Any) -> Any:
        """Return a value of the file with the variables in its texts filled in."""
        if isinstance(value, dict):
            return {key: self.fill(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.fill(one) for one in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> Any:
        whole = REFERENCE.fullmatch(text)
        if whole and not text.startswith("$$"):
            return self._value(whole[1])
        parts = []
        length = 0
        for part in self._parts(text):
            parts.append(part)
            length += len(part)
            if length > MAX_TEXT:
                raise JobError(f"{self.file}: '{text[:40]}...' is too long when it is filled in.")
        return "".join(parts)

    def _parts(self, text: str) -> Iterator[str]:
        end = 0
        for found in REFERENCE.finditer(text):
            yield text[end : found.start()]
            end = found.end()
            escaped = found[0].startswith("$$")
            yield found[0][1:] if escaped else str(self._value(found[1]))
        yield text[end:]

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise JobError(
                f"{self.file}: variable '{name}' is unknown. {nearest(name, self.values)}"
            )
        self.used.add(name)
        return self.values[name]


def _check_names(found: list[Draft]) -> None:
    seen: dict[str, Draft] = {}
    for draft in found:
        if draft.name in seen:
            raise JobError(
                f"{draft.file}: two jobs of the matrix are called '{draft.name}'. Write entries as "
                "tables with names of their own."
            )
        seen[draft.name] = draft
