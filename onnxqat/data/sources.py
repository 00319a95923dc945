"""What a path of data may be.

===================  =========================================================================
``.npz``             arrays by name
``.npy``             one array of all samples
``.txt``, ``.csv``   a list of files, see `onnxqat.data.lists`
``.jsonl``           text, see `onnxqat.data.text`
``.json``            COCO's instances: the images that it names, and their boxes
a folder             see `onnxqat.data.folders`
``module:function``  a function of the user's, see `onnxqat.data.function`
===================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from onnxqat.data.arrays import Source
from onnxqat.data.boxes import coco_images, labels_beside
from onnxqat.data.folders import open_folder
from onnxqat.data.function import FUNCTION, open_function
from onnxqat.data.images import is_image
from onnxqat.data.lists import LIST_SUFFIXES, listed_files, open_list
from onnxqat.data.masks import masks_beside
from onnxqat.data.npy import open_npy
from onnxqat.data.npz import open_npz
from onnxqat.data.request import Request
from onnxqat.data.sample_files import open_files
from onnxqat.data.text import open_jsonl
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["open_source", "read_besides"]


def open_source(name: str, request: Request) -> Source:
    """Return the samples that a path or ``module:function`` stands for.

    Parameters
    ----------
    name : str
        What the user called the data.
    request : Request
        What the model wants.

    Raises
    ------
    DataError
        There is nothing of that name, or it is no data.
    """
    path = Path(name)
    if path.is_dir():
        return open_folder(path, request)
    if request.split is not None:
        raise DataError(f"--split: is of a folder, and '{name}' is none. Leave it out.")
    if path.exists():
        check_readable(path, DataError)
        return _open_file(path, request)
    if FUNCTION.fullmatch(name):
        request.refuse_beside(name)
        return open_function(name)
    raise DataError(f"{name}: no such file or directory. Check the path.")


def read_besides(path: Path) -> list[Path]:
    """Return the files and folders that are read with a path, for those who watch for changes.

    These are the files that a list or COCO's file names, and the folders of labels and masks beside
    a folder of images. Of what cannot be read there are none.
    """
    try:
        if path.is_dir():
            found = (labels_beside(path), masks_beside(path))
            return [folder for folder in found if folder is not None]
        if path.suffix.lower() in LIST_SUFFIXES:
            return listed_files(path)
        if path.suffix.lower() == ".json":
            names = coco_images(path)
            folder = _folder_of(path, names)
            return [folder / name for name in names]
    except (DataError, OSError):  # whoever opens it says what is wrong
        pass
    return []


def _open_file(path: Path, request: Request) -> Source:
    suffix = path.suffix.lower()
    openers: dict[str, Callable[[Path, Request], Source]] = {
        ".npz": _open_npz,
        ".npy": _open_npy,
        ".json": _open_coco,
        ".jsonl": open_jsonl,
        **dict.fromkeys(LIST_SUFFIXES, open_list),
    }
    if suffix not in openers:
        raise DataError(
            f"{path}: is no data. Give an .npz or .npy file, a .txt or .csv list of files, .jsonl, "
            "COCO's .json, or a folder."
        )
    return openers[suffix](path, request)


def _open_npz(path: Path, request: Request) -> Source:
    request.refuse_beside(str(path))
    return open_npz(str(path), [path])


def _open_npy(path: Path, request: Request) -> Source:
    request.refuse_beside(str(path))
    return open_npy(str(path), {path.stem: path})


def _open_coco(path: Path, request: Request) -> Source:
    """Return the images that COCO's file names, and their boxes."""
    if request.boxes is not None:
        raise DataError(f"--boxes: '{path}' has boxes of its own. Leave it out.")
    names = coco_images(path)
    for name in names:
        if not is_image(Path(name)):
            raise DataError(f"{path}: image '{name[:200]}' is none by its suffix. Check the file.")
    folder = _folder_of(path, names)
    files = [str(folder / name) for name in names]
    return open_files(str(path), files, replace(request, boxes=path))


def _folder_of(path: Path, names: list[str]) -> Path:
    """Return where the images lie.

    The file is ``annotations/instances_val2017.json`` beside ``val2017`` or ``images/val2017``,
    or it lies beside the images.
    """
    part, root = path.stem.rpartition("_")[2], path.parent.parent
    tried = (root / part, root / "images" / part, path.parent, root / "images", root)
    for folder in tried:
        if (folder / names[0]).is_file():
            return folder
    listed = ", ".join(f"'{folder}'" for folder in tried)
    raise DataError(
        f"{path}: its image '{names[0][:200]}' is in none of {listed}. Give the folder of images "
        "as DATA and this file with --boxes."
    )
