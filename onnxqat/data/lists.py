"""Lists of samples: text with a path on each line, or CSV with titles.

========  =================================================================================
``.txt``  ``PATH`` or ``PATH LABEL`` a line; the label is an integer behind the last space
``.csv``  a column ``path``, ``file`` or ``filename`` and, if there are labels, ``label``,
          ``labels``, ``y`` or ``class``; or a column for each array, called like it. Without
          titles the first column has paths, the second one labels
========  =================================================================================

Paths are relative to the folder of the list, or absolute. Each is an image or a ``.npy`` file of
one sample; other files are refused. Blank lines are skipped. Cells of a CSV may also be numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import reason
from onnxqat.data.beside import MASK, MOVED, columns_beside
from onnxqat.data.classes import class_indices
from onnxqat.data.columns import Column, ColumnSource, FileColumn, Unreadable, ValueColumn
from onnxqat.data.images import ImageReader, is_image
from onnxqat.data.masks import MaskReader
from onnxqat.data.npy import ArrayReader
from onnxqat.data.request import Request
from onnxqat.data.sample_files import ARRAY, IMAGE, LABEL, is_sample, open_files
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["LIST_SUFFIXES", "listed_files", "open_list", "read_lines", "read_text"]

LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv")
MAX_BYTES = 2**28
MAX_LINES = 10**7
MAX_CELLS, MAX_COLUMNS = 2 * 10**7, 1000  # of a CSV
PATHS = ("path", "file", "filename")
LABELS = ("label", "labels", "y", "class")

Table = dict[str, list[str]]


def open_list(path: Path, request: Request) -> ColumnSource:
    """Return the samples of a list.

    Raises
    ------
    DataError
        The file is too large or not a list, or it names files that are not samples.
    """
    table = _table(path)
    if not any(table.values()):
        raise DataError(f"{path}: names no samples. Write one sample on each line.")
    table = {_named(title, cells): cells for title, cells in table.items()}
    labels, classes = _labels(path, table, request)
    if len(table) == 1 and len(request.inputs) == 1 and next(iter(table)) in (IMAGE, ARRAY):
        files = _files(path, *table.values())
        return open_files(str(path), files, request, labels=labels, classes=classes)
    return _Columns(path, request).source(table, labels, classes)


def _table(path: Path) -> Table:
    text = read_text(path)
    return _csv(path, text) if path.suffix.lower() == ".csv" else _lines(path, text)


def listed_files(path: Path) -> list[Path]:
    """Return the files that a list names, in all of its columns.

    Raises
    ------
    DataError
        It is too large, or no list.
    """
    cells = (cell for column in _table(path).values() for cell in column)
    return [path.parent / cell for cell in cells if is_sample(Path(cell))]


def _named(title: str, cells: Sequence[str]) -> str:
    """Return what the array of a column is called."""
    if title not in PATHS:
        return title
    return IMAGE if is_image(Path(cells[0])) else ARRAY


def read_text(path: Path) -> str:
    """Return a text file of bounded size.

    Raises
    ------
    DataError
        The file cannot be read, is too large, or is not UTF-8.
    """
    check_readable(path, DataError)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: has more than {MAX_BYTES} bytes. Divide the list.")
    return text


def read_lines(path: Path, text: str) -> list[str]:
    """Return the lines that are not blank, at most ten million.

    Raises
    ------
    DataError
        There are more.
    """
    if text.count("\n") > MAX_LINES:
        raise DataError(f"{path}: has more than {MAX_LINES} lines. Divide the list.")
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def _lines(path: Path, text: str) -> Table:
    """Return paths, and labels if the lines have some."""
    cells = [_divided(line) for line in read_lines(path, text)]
    labelled = sum(label is not None for _, label in cells)
    if labelled not in (0, len(cells)):
        bare = next(file for file, label in cells if label is None)
        raise DataError(
            f"{path}: '{bare}' has no label, but other lines have one. Label every line, or none."
        )
    table: Table = {"path": [file for file, _ in cells]}
    return table | ({LABEL: [label or "" for _, label in cells]} if labelled else {})


def _divided(line: str) -> tuple[str, str | None]:
    """Return path and label of a line; the label is a number behind the last space."""
    file, _, last = line.rpartition(" ") if " " in line else line.rpartition("\t")
    if file and last.isascii() and last.isdecimal():
        return file.rstrip(), last
    return line, None


def _csv(path: Path, text: str) -> Table:
    rows = _rows(path, text)
    if not rows:
        return {}
    first = [cell.strip() for cell in rows[0]]
    if any(is_sample(Path(cell)) for cell in first):
        titles = ["path", LABEL][: len(first)]
    else:
        titles, rows = first, rows[1:]
    _check_titles(path, titles, len(first))
    for number, row in enumerate(rows, start=1):
        if len(row) != len(titles):
            raise DataError(
                f"{path}: row {number} of the samples has {len(row)} cells, but there are "
                f"{len(titles)} columns. Quote cells with commas in them."
            )
    return {title: [row[i].strip() for row in rows] for i, title in enumerate(titles)}


def _rows(path: Path, text: str) -> list[list[str]]:
    """Return the rows that are not blank; stop as soon as there are too many."""
    rows: list[list[str]] = []
    cells = 0
    try:
        for row in csv.reader(io.StringIO(text, newline=""), strict=True):
            cells += len(row)
            if len(rows) > MAX_LINES or cells > MAX_CELLS:
                raise DataError(
                    f"{path}: has more than {MAX_LINES} lines or {MAX_CELLS} cells. Divide it."
                )
            if row:
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV ({reason(error)}). Save it again.") from error
    return rows


def _check_titles(path: Path, titles: Sequence[str], columns: int) -> None:
    if len(titles) != columns:
        raise DataError(
            f"{path}: has {columns} columns without titles. Write titles into the first row, the "
            "names of the arrays."
        )
    if columns > MAX_COLUMNS:
        raise DataError(f"{path}: has {columns} columns. At most {MAX_COLUMNS} are read.")
    for title in titles:
        if not title or titles.count(title) > 1:
            raise DataError(
                f"{path}: the title '{title}' is empty or appears twice. Give each column a name."
            )


def _files(path: Path, cells: Sequence[str]) -> list[str]:
    """Return the files of one column."""
    for number, cell in enumerate(cells):
        if not is_sample(Path(cell)):
            raise DataError(
                f"{path}: sample {number + 1} is '{cell[:200]}', which is neither an image nor a "
                ".npy file. Lists name such files."
            )
    folder = path.parent
    return [str(folder / cell) for cell in cells]


def _is_paths(cells: Sequence[str]) -> bool:
    return is_sample(Path(cells[0]))


def _labels(
    path: Path, table: Table, request: Request
) -> tuple[list[int] | None, Mapping[str, int] | None]:
    """Take the labels out of a table; names are looked up like those of class folders."""
    title = next((t for t in LABELS if t in table and request.spec_of(t) is None), None)
    if title is None or request.classes is None:
        return None, None
    cells = table[title]
    if all(cell.isascii() and cell.isdecimal() and len(cell) < 10 for cell in cells):
        del table[title]
        return [int(cell) for cell in cells], None
    if all(_number(cell) is not None for cell in cells):
        return None, None  # other numbers are an array
    found = sorted(set(cells))
    try:
        numbers, classes = class_indices(path, found, request.classes, "names")
    except DataError:
        if request.classes.needed:
            raise
        return None, None
    del table[title]
    index = dict(zip(found, numbers, strict=True))
    return [index[cell] for cell in cells], classes


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


class _Columns:
    """Makes arrays of the columns of a table.

    Parameters
    ----------
    path : Path
        The list.
    request : Request
        What is asked of the data.
    """

    def __init__(self, path: Path, request: Request) -> None:
        self._path, self._request = path, request
        self._unreadable = Unreadable(str(path), skip=request.skip_broken)
        self._images: tuple[list[str], ImageReader] | None = None

    def source(
        self, table: Table, labels: list[int] | None, classes: Mapping[str, int] | None
    ) -> ColumnSource:
        """Return the samples of a table without its labels, which are given apart."""
        name, request = str(self._path), self._request
        # masks come last, since they need the images
        order = sorted(table, key=lambda title: title == MASK)
        made = {title: self._column(title, table[title]) for title in order}
        columns = {title: column for title in table if (column := made[title]) is not None}
        beside: dict[str, Column] = {}
        if self._images is None:
            request.refuse_beside(name)
        else:
            images, reader = self._images
            beside = columns_beside(
                name,
                images,
                reader.preprocessing,
                self._unreadable,
                boxes=request.boxes,
                masks=request.masks,
            )
        # numbers feed an input only by its name
        numbers = {t for t, c in columns.items() if isinstance(c, ValueColumn)}
        extras = {t for t in numbers if t not in LABELS and request.spec_of(t) is None}
        extras |= {MASK, *beside}
        if labels is not None:
            values = np.array(labels, np.int64)
            columns[LABEL] = ValueColumn(name, lambda: values)
        length = len(next(iter(table.values()))) if table else len(labels or ())
        return ColumnSource(
            name,
            length,
            beside | columns,
            self._unreadable,
            classes=classes,
            extras=extras,
            moved=MOVED & {*columns, *beside} if self._images else frozenset(),
        )

    def _column(self, title: str, cells: list[str]) -> Column | None:
        """Return one column; None for text, which is skipped."""
        if _is_paths(cells):
            return self._files(title, _files(self._path, cells))
        numbers = self._numbers(title, cells)
        return None if numbers is None else ValueColumn(str(self._path), lambda: numbers)

    def _files(self, title: str, files: list[str]) -> Column:
        name, request = str(self._path), self._request
        if title == MASK:
            return FileColumn(name, files, self._masks(files), self._unreadable)
        spec = request.spec_of(title)
        if spec is None and len(request.inputs) == 1 and title in (IMAGE, ARRAY):
            spec = request.inputs[0]
        if not is_image(Path(files[0])):
            return FileColumn(name, files, ArrayReader(spec), self._unreadable)
        if spec is None:
            raise DataError(
                f"{name}: the images of column '{title}' feed no input of the model. Name the "
                "column after an input, give --input INPUT=COLUMN, or leave the column out."
            )
        reader = ImageReader(name, spec, request.preprocessing)
        self._images = self._images or (files, reader)
        return FileColumn(name, files, reader, self._unreadable)

    def _masks(self, files: list[str]) -> MaskReader:
        if self._images is None:
            raise DataError(f"{self._path}: has masks but no images. Add a column of images.")
        images, reader = self._images
        return MaskReader(dict(zip(files, images, strict=True)), reader.preprocessing)

    def _numbers(self, title: str, cells: list[str]) -> NDArray[Any] | None:
        found = [_number(cell) for cell in cells]
        wrong = next((i for i, number in enumerate(found) if number is None), None)
        if wrong is not None:
            if self._request.spec_of(title) is None:
                return None
            raise DataError(
                f"{self._path}: sample {wrong + 1} of column '{title}' is '{cells[wrong][:200]}'. "
                "Write a number, or the path of an image or a .npy file."
            )
        try:
            return np.array([int(cell) for cell in cells], np.int64)
        except (ValueError, OverflowError):
            return np.array(found, np.float64)
