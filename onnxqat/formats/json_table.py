"""Strict reading and exact writing of JSON tables.

A number is written as the shortest decimal that reads back to the same float64. Every float32 scale
is exactly a float64, so it survives bit for bit.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.errors import FormatError
from onnxqat.formats.format import Table

__all__ = ["numbers", "read_json", "write_json"]

_Type = TypeVar("_Type")


def numbers(values: NDArray[Any]) -> list[Any]:
    """Return the values of an array as a flat list of Python numbers, exactly."""
    return np.atleast_1d(values).ravel().tolist()


def write_json(document: Any) -> str:
    """Return a document as indented JSON, with each list of numbers on one line."""
    try:
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        text.encode()
    except ValueError as error:  # numbers that are not finite, lone surrogates
        raise FormatError(f"The table cannot be written as JSON ({error}).") from error
    return msgspec.json.format(text, indent=1) + "\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            message = f"key '{key[:80]}' appears twice"
            raise ValueError(message)
        found[key] = value
    return found


def _constant(name: str) -> float:
    message = f"{name} is not a number of JSON"
    raise ValueError(message)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text[:40])


def read_json(table: Table, kind: type[_Type]) -> _Type:
    """Read a JSON table into a type; errors name the line, or the path in the document.

    Raises
    ------
    FormatError
        The text is not JSON, a key appears twice, or a value has an unexpected type.
    """
    try:
        document = json.loads(
            table.text(),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_finite,
        )
        return msgspec.convert(document, kind)
    except json.JSONDecodeError as error:
        message = f"{table.name}:{error.lineno}: not JSON ({error.msg}). Write the table again."
        raise FormatError(message) from error
    except msgspec.ValidationError as error:
        raise FormatError(f"{table.name}: {error}. Is it a table of this format?") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{table.name}: {error}. Write the table again.") from error
