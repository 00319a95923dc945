"""Samples that are one file each: images, or ``.npy`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxqat.data.beside import MOVED, columns_beside
from onnxqat.data.columns import Column, ColumnSource, FileColumn, Unreadable, ValueColumn
from onnxqat.data.images import ImageReader, is_image
from onnxqat.data.npy import ArrayReader
from onnxqat.data.request import Request
from onnxqat.errors import DataError

__all__ = ["ARRAY", "IMAGE", "LABEL", "is_sample", "open_files"]

ARRAY, IMAGE, LABEL = "array", "image", "label"


def is_sample(path: Path) -> bool:
    """Return whether a file is an image or an array, by its suffix; hidden files are neither."""
    return is_image(path) or (path.suffix.lower() == ".npy" and not path.name.startswith("."))


def open_files(
    name: str,
    paths: Sequence[str],
    request: Request,
    *,
    labels: Sequence[int] | None = None,
    classes: Mapping[str, int] | None = None,
    box_classes: int | None = None,
) -> ColumnSource:
    """Return samples with the array ``image`` or ``array``, and ``label`` if there are labels.

    Parameters
    ----------
    name : str
        What the user called the data.
    paths : sequence of str
        The files, at least one; all images, or all ``.npy``.
    request : Request
        What is asked of the data. The model has one input.
    labels : sequence of int, optional
        Class of each file.
    classes : mapping of str to int, optional
        Class index by name.
    box_classes : int, optional
        Number of classes that boxes may have.

    Raises
    ------
    DataError
        There are files of both kinds, or the model's input does not fit them.
    """
    unreadable = Unreadable(name, skip=request.skip_broken)
    images = [path for path in paths if is_image(Path(path))]
    if images and len(images) < len(paths):
        other = next(path for path in paths if not is_image(Path(path)))
        raise DataError(
            f"{name}: has images ('{images[0]}') and arrays ('{other}'). Keep them apart."
        )
    columns: dict[str, Column] = {}
    extras: dict[str, Column] = {}
    if images:
        reader = ImageReader(name, request.only_input(name, "images"), request.preprocessing)
        columns[IMAGE] = FileColumn(name, paths, reader, unreadable)
        extras = columns_beside(
            name,
            paths,
            reader.preprocessing,
            unreadable,
            boxes=request.boxes,
            masks=request.masks,
            classes=box_classes,
        )
    else:
        request.refuse_beside(name)
        spec = request.only_input(name, "files of one sample")
        columns[ARRAY] = FileColumn(name, paths, ArrayReader(spec), unreadable)
    if labels is not None:
        values = np.array(labels, np.int64)
        columns[LABEL] = ValueColumn(name, lambda: values)
    return ColumnSource(
        name,
        len(paths),
        columns | extras,
        unreadable,
        classes=classes,
        extras=frozenset(extras),
        moved=MOVED & extras.keys(),
    )
