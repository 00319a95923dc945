"""Find the class index of each folder of images.

If all folder names are numbers, these are the indices. Otherwise a list gives the index of each
name, in one of these forms:

==============  =======================================================================
lines of text   one name per line; the first has index 0
``.csv``        name and index in each row, in either order; a title row is skipped
``.json``       a list of names; ``{"name": index}``; ``{"index": "name"}``. A list in place of a
                name gives several names for one class
==============  =======================================================================
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqat.data.arrays import names, reason
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["YEAR", "Classes", "check_count", "class_indices", "read_classes", "refuse_splits"]

SPLITS = frozenset(
    {"images", "labels", "test", "testing", "train", "training", "val", "valid", "validation"}
)
YEAR = re.compile(r"(19|20)\d\d$")  # may follow the name of a split
MAX_BYTES = 2**24
MAX_INDEX = 2**31 - 1

Rows = list[tuple[Any, list[Any]]]  # an index, and the names of its class


@dataclass(frozen=True)
class Classes:
    """The classes of a model, as far as they are known.

    Attributes
    ----------
    known : mapping of str to int, or None
        Index of each class name.
    count : int or None
        Number of classes.
    needed : bool
        Whether it is an error if the class of a folder is not known.
    """

    known: Mapping[str, int] | None = None
    count: int | None = None
    needed: bool = True


def read_classes(path: str | Path) -> dict[str, int]:
    """Return the class index of each name in a list.

    Raises
    ------
    DataError
        The file cannot be read, or has a name or an index twice.
    """
    text = _text(Path(path))
    try:
        read = {".json": _json, ".csv": _csv}.get(Path(path).suffix.lower(), _lines)
        return _joined(read(text))
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"{path}: is not a list of classes ({reason(error)}). Give one name per line, or JSON "
            "or CSV with names and indices."
        ) from error


def _text(path: Path) -> str:
    check_readable(path, DataError)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    if len(content) > MAX_BYTES:
        raise DataError(
            f"{path}: has more than {MAX_BYTES} bytes. Give a list of class names only."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def _lines(text: str) -> Rows:
    return [(index, [line.strip()]) for index, line in enumerate(text.rstrip().split("\n"))]


def _csv(text: str) -> Rows:
    rows = [
        [cell.strip() for cell in row]
        for row in csv.reader(io.StringIO(text, newline=""), strict=True)
    ]
    rows = [row for row in rows if row]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"the row {','.join(row)[:80]!r} has {len(row)} columns instead of 2")
    if rows and not any(map(_is_index, rows[0])):
        rows = rows[1:]
    column = 1 if all(_is_index(row[1]) for row in rows) else 0
    return [(row[column], [row[1 - column]]) for row in rows]


def _json(text: str) -> Rows:
    # read an object as its members, to find names that appear twice: a dict would keep the last
    found = json.loads(text, object_pairs_hook=_Members)
    if isinstance(found, _Members):
        turned: list[Any] = [(v, k) if isinstance(v, int) else (k, v) for k, v in found]
    elif isinstance(found, list):
        turned = list(enumerate(found))
    else:
        raise ValueError(f"it holds a value of type '{type(found).__name__}'")
    return [(index, name if isinstance(name, list) else [name]) for index, name in turned]


class _Members(tuple[tuple[str, Any], ...]):
    """The members of a JSON object, in order."""

    __slots__ = ()


def _is_index(cell: str) -> bool:
    return cell.isascii() and cell.removeprefix("-").isdecimal()


def _joined(rows: Rows) -> dict[str, int]:
    """Return the index of each name.

    If a class has several names, the first one always gets its index. Another name gets it only if
    no other class has the same name (two classes of ImageNet have the name crane).
    """
    classes: dict[str, int] = {}
    seen: set[int] = set()
    for cell, found in rows:
        index = _index(cell, found)
        first = _name(found[0] if found else "")
        if index in seen or first in classes:
            twice = f"{first!r}" if first in classes else f"index {index}"
            raise ValueError(f"{twice} appears twice")
        seen.add(index)
        classes[first] = index
    if not classes:
        raise ValueError("it holds no names")
    others = [(_index(cell, found), {*map(_name, found[1:])}) for cell, found in rows]
    uses = Counter(name for _, more in others for name in more)
    return {name: i for i, more in others for name in more if uses[name] == 1} | classes


def _index(cell: Any, found: Sequence[Any]) -> int:
    index = int(cell) if isinstance(cell, str) and _is_index(cell) else cell
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= MAX_INDEX:
        raise ValueError(
            f"the index of {str(*found[:1])[:80]!r} is {str(cell)[:80]!r}, not an integer from 0"
        )
    return index


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{str(name)[:80]!r} is not a name")
    name.encode()  # raises for lone surrogates, which JSON can contain
    return name


def refuse_splits(folder: Path, found: Sequence[str], known: Mapping[str, int] | None) -> None:
    """Refuse folders of splits where class folders are expected.

    Raises
    ------
    DataError
        A folder has the name of a split, and the list of classes does not have this name.
    """
    splits = [
        name for name in found if YEAR.sub("", name.lower()) in SPLITS and name not in (known or {})
    ]
    if splits:
        offered = [name for name in splits if name.lower() != "labels"] or ["IMAGES"]
        paths = " or ".join(f"'{folder / name}'" for name in offered)
        raise DataError(
            f"{folder}: its folder '{splits[0]}' is a split of the data, not a class. Give {paths}."
        )


def class_indices(
    where: Path, found: Sequence[str], classes: Classes, kind: str = "folders"
) -> tuple[list[int], dict[str, int] | None]:
    """Return the class index of each name, and the index by name (None for number names).

    Parameters
    ----------
    where : Path
        Folder that contains the class folders, or file that contains the names.
    found : sequence of str
        Names of the classes, sorted.
    classes : Classes
        The list of classes, if there is one, and the number of the model's classes.
    kind : str
        What the names are, in the plural, for messages.

    Raises
    ------
    DataError
        A name is not in the list, an index appears twice or is not one of the model's classes, or
        the index of a name is not known.
    """
    known, count = classes.known, classes.count
    numeric = all(name.isascii() and name.isdecimal() for name in found)
    if known is not None and (not numeric or any(name.isdecimal() for name in known)):
        return [_looked_up(where, name, known) for name in found], dict(known)
    if numeric:
        return _numbers(where, found, count), None
    if len(found) != count:
        has = "the number of the model's classes is not known"
        if count is not None:
            has = f"the model has {count} classes"
        raise DataError(
            f"{where}: has {len(found)} {kind} ({names(found[:3])}, ...), but {has}, so the "
            f"classes cannot be numbered by the order of the {kind}. Give --classes FILE with the "
            "index of each name, or --label none."
        )
    by_order = {name: index for index, name in enumerate(found)}
    return list(by_order.values()), by_order


def check_count(known: Mapping[str, int], count: int | None, where: str) -> None:
    """Refuse class indices that the model does not have.

    Raises
    ------
    DataError
        An index is too large; the message names its class.
    """
    for name, index in known.items():
        if count is not None and index >= count:
            raise DataError(
                f"{where}: class {name!r} has the index {index}, but the model has {count} "
                f"classes, 0 to {count - 1}. Give --classes FILE with the model's own indices."
            )


def _looked_up(folder: Path, name: str, known: Mapping[str, int]) -> int:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    raise DataError(
        f"{folder / name}: is not in the list of {len(known)} classes; the nearest name is "
        f"{names(near)}. Rename it, or give --classes FILE with its name."
    )


def _numbers(folder: Path, found: Sequence[str], count: int | None) -> list[int]:
    limit = MAX_INDEX if count is None else count - 1
    owners: dict[int, str] = {}
    for name in found:
        number = int(name)
        if number > limit:
            has = "" if count is None else f"; the model has {count} classes, 0 to {limit}"
            raise DataError(
                f"{folder / name}: class {number} does not exist{has}. Name folders by the class "
                "index, or give --classes FILE."
            )
        if number in owners:
            raise DataError(
                f"{folder}: '{owners[number]}' and '{name}' are both class {number}. Merge them."
            )
        owners[number] = name
    return list(owners)
