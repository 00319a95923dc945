"""Job files in TOML. A file may extend another one, use variables, and define a matrix of jobs."""

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

MAX_EXTENDS = 8  # files in a row
MAX_JOBS = 1000  # in a matrix
MAX_TEXT = 10_000  # characters in a value after its variables are replaced
MAX_NAME = 100  # characters in the name of a job and of its folder
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
REFERENCE = re.compile(r"\$?\$\{([^{}]*)\}")  # $${x} stands for ${x} itself


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One job as read from its file, with variables replaced, not yet checked.

    Attributes
    ----------
    name : str
        Name of the job and of its folder.
    file : Path
        The job file.
    table : dict
        Contents of the file for this job.
    """

    name: str
    file: Path
    table: Table


@dataclass(frozen=True)
class _Entry:
    """An entry of a matrix axis: label for the job's name, value of the variable, other changes.

    ``changes`` is None if the entry is no table.
    """

    label: str
    value: Any
    changes: Table | None


def drafts(path: str | Path, variables: Mapping[str, Any] | None = None) -> list[Draft]:
    """Return the jobs of a file: one job, or all jobs of its matrix.

    Parameters
    ----------
    path : str or Path
        A TOML file.
    variables : mapping, optional
        Values that replace those in the file's ``variables``.

    Raises
    ------
    JobError
        The file cannot be read, is not TOML, is too large or extends itself, a variable is unknown,
        or the matrix is invalid.
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
    """Read ``NAME=VALUE``. A value that is not valid TOML is a string.

    Raises
    ------
    JobError
        The text has another form.

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
    """Read a file and the files that it extends; return them merged."""
    if path.resolve() in children or len(children) >= MAX_EXTENDS:
        raise JobError(
            f"{path}: 'extends' forms a circle, or a chain of more than {MAX_EXTENDS} files."
        )
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
            raise JobError(
                f"{file}: [{name}] '{key}' is not a valid name. Use letters, digits, - and _."
            )
    return found


def _axes(matrix: Table, file: Path) -> dict[str, list[_Entry]]:
    axes = {}
    for axis, entries in matrix.items():
        if not (isinstance(entries, list) and entries):
            raise JobError(f"{file}: [matrix] '{axis}' is {entries!r}. Write a list of values.")
        axes[axis] = [_entry(one, f"{file}: [matrix] '{axis}'") for one in entries]
    count = math.prod(len(entries) for entries in axes.values())
    if count > MAX_JOBS:
        raise JobError(f"{file}: [matrix] has {count} jobs. Define at most {MAX_JOBS}.")
    return axes


def _entry(entry: Any, where: str) -> _Entry:
    if isinstance(entry, dict):
        changes = dict(entry)
        name = changes.pop("name", None)
        if not isinstance(name, str):
            raise JobError(f"{where} has a table without a name. Add name = '...' to it.")
        return _Entry(name, name, changes)
    if not isinstance(entry, str | int | float):
        raise JobError(f"{where} holds {entry!r}. Write strings, numbers or tables with a name.")
    return _Entry(_label(str(entry)), entry, None)


def _label(text: str) -> str:
    """Return the part of a job's name for a value; for a path, its stem."""
    path = Path(text)
    is_path = "/" in text or path.suffix in (".onnx", ".toml")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem if is_path else text).strip("-.")


def _draft(
    file: Path, table: Table, variables: Table, stem: Any, chosen: Mapping[str, _Entry]
) -> Draft:
    for entry in chosen.values():
        table = merged(table, entry.changes or {})
    values = variables | {axis: entry.value for axis, entry in chosen.items()}
    filling = _Filling(file, values)
    filled = filling.fill(table)
    for axis, entry in chosen.items():
        if entry.changes is None and axis not in filling.used:
            raise JobError(
                f"{file}: [matrix] '{axis}': no key uses it. Write ${{{axis}}} in the value of a "
                "key."
            )
    name = "-".join([str(filling.fill(stem)), *(entry.label for entry in chosen.values())])
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise JobError(
            f"{file}: the job's name '{name[:MAX_NAME]}' cannot be the name of a folder. Set "
            "name = '...' to letters, digits, - and _."
        )
    return Draft(name=name, file=file, table=filled)


class _Filling:
    """Replaces variables by their values, and records which were used."""

    def __init__(self, file: Path, variables: Table) -> None:
        self.file, self.used = file, set[str]()
        self.values: Table = {}
        for name, value in variables.items():  # a variable may use earlier ones
            if not isinstance(value, str | int | float):
                raise JobError(
                    f"{file}: variable '{name}' is {value!r}. Give a string or a number."
                )
            self.values[name] = self.fill(value)
        self.used.clear()

    def fill(self, value: Any) -> Any:
        """Return a value of the file with the variables in its strings replaced."""
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
                raise JobError(
                    f"{self.file}: '{text[:40]}...' is longer than {MAX_TEXT} characters after its "
                    "variables are replaced."
                )
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
                f"{draft.file}: two jobs of the matrix have the name '{draft.name}'. Write the "
                "entries as tables with different names."
            )
        seen[draft.name] = draft
