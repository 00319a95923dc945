"""Read the small TOML files that users write: rules, overrides and jobs. They are hostile input."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from onnxqat.errors import OnnxQatError
from onnxqat.files import check_readable

__all__ = ["Table", "merged", "parse_toml", "read_text", "read_toml"]

MAX_FILE_BYTES = 2**20

Table = dict[str, Any]


def read_toml(path: str | Path, *, kind: str, error: type[OnnxQatError]) -> Table:
    """Return the content of a file.

    Parameters
    ----------
    path : str or Path
        The file.
    kind : str
        The kind of file, for messages, such as "a rule file".
    error : type of OnnxQatError
        The type of the error.

    Raises
    ------
    OnnxQatError
        The file cannot be read, is larger than 1 MiB, is not TOML, or is nested too deeply.
    """
    return parse_toml(read_text(path, kind=kind, error=error), path, kind=kind, error=error)


def read_text(path: str | Path, *, kind: str, error: type[OnnxQatError]) -> str:
    """Return the text of a file; raises the errors of `read_toml`."""
    check_readable(path, error)
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise error(f"{path}: is larger than {MAX_FILE_BYTES} bytes. This is not {kind}.")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path}: cannot be read ({cause}).") from cause


def parse_toml(text: str, name: str | Path, *, kind: str, error: type[OnnxQatError]) -> Table:
    """Return the content of a text from a file ``name``; raises the errors of `read_toml`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as cause:
        raise error(f"{name}: not valid TOML: {cause}.") from cause
    except RecursionError as cause:
        raise error(f"{name}: is nested too deeply for {kind}.") from cause


def merged(parent: Table, child: Table) -> Table:
    """Return the parent's tables, in which the child's keys replace or complete the parent's.

    Examples
    --------
    >>> merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}})
    {'a': {'x': 1, 'y': 4}, 'b': 3}
    """
    found = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found
