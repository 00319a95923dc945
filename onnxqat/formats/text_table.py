"""Tables of lines ``name number number ...``, which several targets use.

Numbers are decimal, with or without an exponent, as C's ``%f`` reads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container

from onnxqat.errors import FormatError
from onnxqat.formats.format import Table

__all__ = ["misread", "rows"]

_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,400})?([eE][-+]?[0-9]{1,3})?")


def misread(name: str, *, longest: int = 2**16) -> str | None:
    """Return why a name would not be read back as one field, or None.

    Parameters
    ----------
    longest : int
        Length limit of the target's reader, in bytes of UTF-8.

    Examples
    --------
    >>> misread("conv 1")
    'has white space or a control character'
    """
    if name.split() != [name] or any(ord(c) < 32 or ord(c) == 127 for c in name):
        return "has white space or a control character" if name else "is empty"
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "cannot be written as UTF-8"
    return f"is longer than {longest} bytes" if len(name.encode()) > longest else None


def rows(table: Table, counts: Container[int]) -> dict[str, tuple[float, ...]]:
    """Return the numbers of each line, by name.

    Parameters
    ----------
    counts : container of int
        How many numbers a line may have.

    Raises
    ------
    FormatError
        As ``name:line: what is wrong``.
    """
    found: dict[str, tuple[float, ...]] = {}
    for number, line in enumerate(table.text().split("\n"), 1):
        fields = line.split()
        if not fields:
            continue
        name, *texts = fields
        place = f"{table.name}:{number}"
        if name in found:
            raise FormatError(f"{place}: '{name[:80]}' appears twice. Remove one of the lines.")
        if len(texts) not in counts:
            raise FormatError(f"{place}: {len(texts)} numbers after the name. Write it again.")
        found[name] = tuple(_number(text, place) for text in texts)
    return found


def _number(text: str, place: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise FormatError(f"{place}: '{text[:40]}' is not a decimal number. Write it as 0.125.")
    return value
