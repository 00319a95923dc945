"""The ``data.yaml`` of Ultralytics' YOLO: folders of images by split, and the names of classes.

====================  ========================================================================
``path``              folder of the data: relative to the file, or absolute (default: the file's)
``train``, ``val``,   a folder of images, a ``.txt`` list of images, or a list of these, relative to
``test``              ``path``; ``validation`` is ``val``
``names``             names of the classes: a list, or a mapping of indices
``nc``                number of classes
====================  ========================================================================

Folders are read with all folders in them, as ``check_det_dataset`` and ``BaseDataset`` of
ultralytics do (``ultralytics/data/utils.py``, ``ultralytics/data/base.py``). A ``../`` in front of
a split's folder is dropped, which the files of Roboflow need; ultralytics drops it where nothing
lies there. A relative ``path`` counts from the file, not from the data folder in the settings of
ultralytics. No split may leave ``path``; ``path`` itself may be anywhere, since the files
that come with ultralytics name it so (``path: ../datasets/coco8``). ``download`` is never run.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from onnxqat.data.arrays import Source, names
from onnxqat.data.boxes import labels_beside
from onnxqat.data.images import is_image
from onnxqat.data.lists import LIST_SUFFIXES, listed_files
from onnxqat.data.request import Request
from onnxqat.data.sample_files import open_files
from onnxqat.data.yaml_entries import Value, read_entries
from onnxqat.errors import DataError

__all__ = ["Layout", "layout_files", "open_layout", "read_layout"]

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class Layout(NamedTuple):
    """What a file says.

    Attributes
    ----------
    root : Path
        Folder of the data.
    splits : dict of str to tuple of Path
        Folders and lists of each split.
    classes : dict of str to int, or None
        Class index by name; None if the file has no names.
    """

    root: Path
    splits: dict[str, tuple[Path, ...]]
    classes: dict[str, int] | None


def read_layout(path: Path) -> Layout:
    """Return what a file says; whether the folders exist is not checked.

    Raises
    ------
    DataError
        The file cannot be read, has no split, names a folder outside of its data, or its names are
        not those of classes 0, 1, ...
    """
    found = read_entries(path, ("path", "names", "nc", *SPLITS))
    given = found.get("path") or "."
    if not isinstance(given, str):
        raise DataError(f"{path}: 'path' must be one folder, not {given}. Write 'path: FOLDER'.")
    root = Path(os.path.normpath(path.parent / given))
    splits = {split: _places(path, root, key, found.get(key)) for key, split in SPLITS.items()
              if found.get(key)}  # fmt: skip
    if not splits:
        raise DataError(
            f"{path}: names no images. Write 'train: FOLDER' and 'val: FOLDER', relative to 'path'."
        )
    return Layout(root, splits, _classes(path, found.get("names"), found.get("nc")))


def open_layout(path: Path, request: Request) -> Source:
    """Return the images of a split.

    Raises
    ------
    DataError
        The file cannot be read, does not have the split, or the split has no images.
    """
    layout = read_layout(path)
    has = names(list(layout.splits))
    if request.split is None:
        raise DataError(f"{path}: has the splits {has}. Choose one with --split.")
    if request.split not in layout.splits:
        raise DataError(f"--split {request.split}: '{path}' has no such split; it has {has}.")
    folder, root = (os.path.normpath(one.absolute()) for one in (path.parent, layout.root))
    if not Path(root).is_relative_to(folder):
        logger.info("%s: its data are in '%s', as its 'path' says.", path, layout.root)
    places = layout.splits[request.split]
    files = [str(file) for place in places for file in _images(path, request.split, place)]
    count = None if layout.classes is None else len(layout.classes)
    return open_files(str(path), files, request, classes=layout.classes, box_classes=count)


def layout_files(path: Path) -> list[Path]:
    """Return the images of all splits, and the files of labels that they may have.

    Raises
    ------
    DataError
        The file cannot be read, or a split has no images.
    """
    found: list[Path] = []
    for split, places in read_layout(path).splits.items():
        images = [file for place in places for file in _images(path, split, place)]
        labels = {folder: labels_beside(folder) for folder in {image.parent for image in images}}
        found += images
        found += [
            folder / f"{image.stem}.txt"
            for image in images
            if (folder := labels[image.parent]) is not None
        ]
    return found


def _places(path: Path, root: Path, key: str, value: Value) -> tuple[Path, ...]:
    if isinstance(value, dict):
        raise DataError(f"{path}: '{key}' is a mapping. Write a folder, or a list of folders.")
    given = [value] if isinstance(value, str) else value or []
    found = []
    for one in given:
        inner = os.path.normpath(one.removeprefix("../"))
        if Path(inner).is_absolute() or Path(inner).parts[:1] == (os.pardir,):
            raise DataError(
                f"{path}: '{key}: {one}' leaves the folder of the data, '{root}'. Name the folder "
                f"that holds all of the data with 'path', and write '{key}' relative to it."
            )
        found.append(root / inner)
    return tuple(found)


def _images(path: Path, split: str, place: Path) -> list[Path]:
    """Return the images of a list, or of a folder and all folders in it; hidden ones are left out.

    Raises
    ------
    DataError
        There is no such place, or no image in it.
    """
    if place.suffix.lower() in LIST_SUFFIXES and place.is_file():
        found = [file for file in listed_files(place) if is_image(file)]
    elif place.is_dir():
        found = sorted(
            Path(folder, name)
            for folder, _, names_there in os.walk(place, followlinks=False)
            for name in names_there
            if is_image(Path(name)) and not _is_hidden(Path(folder).relative_to(place))
        )
    else:
        raise DataError(
            f"{path}: '{split}' is in '{place}', which is neither a folder nor a list of images. "
            "Check 'path', which is relative to the file; leave it out if the file lies in the "
            "folder of the data."
        )
    if not found:
        raise DataError(f"{path}: '{split}' is in '{place}', which has no images. Check the path.")
    return found


def _is_hidden(folder: Path) -> bool:
    return any(part.startswith(".") for part in folder.parts)


def _classes(path: Path, given: Value, count: Value) -> dict[str, int] | None:
    """Return the class index of each name."""
    if isinstance(given, str):
        raise DataError(f"{path}: 'names' is '{given[:80]}'. Write a list of the classes' names.")
    if given is None:
        return None
    texts = given
    if isinstance(given, dict):
        indices = [str(index) for index in range(len(given))]
        if set(given) != set(indices):
            raise DataError(
                f"{path}: 'names' has the indices {names(list(given)[:5])}, ... Number the "
                f"{len(given)} classes from 0 to {len(given) - 1}."
            )
        texts = [given[index] for index in indices]
    if count is not None and count != str(len(texts)):
        raise DataError(
            f"{path}: 'nc' is {count}, but 'names' has {len(texts)} names. Correct one of them."
        )
    found = {name: index for index, name in enumerate(texts)}
    twice = next((name for index, name in enumerate(texts) if found[name] != index), None)
    if twice is not None:
        raise DataError(f"{path}: 'names' has '{twice}' twice. Give each class a name of its own.")
    return found
