"""Tables of lines ``name number number ...``, as several targets have them.

Numbers are decimal, with or without exponent, as C's ``%f`` reads them; a sign is refused only
where a format has no negative numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable

from onnxqat.errors import FormatError
from onnxqat.formats.format import Table, refuse

__all__ = ["check_names", "rows"]

_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,400})?([eE][-+]?[0-9]{1,3})?")


def check_names(names: Iterable[str], *, longest: int = 2**16) -> None:
    """Refuse names that would not be read back as one field.

    Parameters
    ----------
    longest : int
        Bytes that the target's reader takes.

    Raises
    ------
    FormatError
        It lists the names.
    """
    refuse(
        (
            f"{name!r} is empty, longer than {longest} bytes or has white space"
            for name in names
            if name.split() != [name] or len(name.encode(errors="replace")) > longest
        ),
        "The table could not be read again; rename the tensors or nodes",
    )


def rows(table: Table, counts: Container[int]) -> dict[str, tuple[float, ...]]:
    """Return the numbers of each line, by its name.

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
            raise FormatError(f"{place}: {len(texts)} numbers behind the name. Write it again.")
        found[name] = tuple(_number(text, place) for text in texts)
    return found


def _number(text: str, place: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise FormatError(f"{place}: '{text[:40]}' is not a decimal number. Write it as 0.125.")
    return value
