"""What a path of data may be.

===================  =========================================================================
``.npz``             arrays by name
``.npy``             one array of all samples
``.txt``, ``.csv``   a list of files, see `onnxqat.data.lists`
``.jsonl``           text, see `onnxqat.data.text`
``.json``            COCO's instances: the images that it names, and their boxes
``.yaml``, ``.yml``  folders of images by split, see `onnxqat.data.yolo`
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
from onnxqat.data.yaml_entries import YAML_SUFFIXES
from onnxqat.data.yolo import layout_files, open_layout
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["open_source", "read_besides"]


def open_source(name: str, request: Request) -> Source:
    """Open the data of a path or of ``module:function``.

    Parameters
    ----------
    name : str
        What the user called the data.
    request : Request
        What is asked of the data.

    Raises
    ------
    DataError
        There is nothing of that name, or it is not data.
    """
    path = Path(name)
    if path.is_dir():
        return open_folder(path, request)
    if request.split is not None and path.suffix.lower() not in YAML_SUFFIXES:
        raise DataError(f"--split: '{name}' is not a folder with splits. Leave --split out.")
    if path.exists():
        check_readable(path, DataError)
        return _open_file(path, request)
    if FUNCTION.fullmatch(name):
        request.refuse_beside(name)
        return open_function(name)
    raise DataError(f"{name}: no such file or directory. Check the path.")


def read_besides(path: Path) -> list[Path]:
    """Return the other files and folders that are read with a path, to notice their changes.

    These are the files that a list or a COCO file names, the images and labels of a ``data.yaml``,
    and the folders of labels and masks beside a folder of images. A list that cannot be read names
    none.
    """
    try:
        if path.is_dir():
            found = (labels_beside(path), masks_beside(path))
            return [folder for folder in found if folder is not None]
        if path.suffix.lower() in LIST_SUFFIXES:
            return listed_files(path)
        if path.suffix.lower() in YAML_SUFFIXES:
            return layout_files(path)
        if path.suffix.lower() == ".json":
            names = coco_images(path)
            folder = _folder_of(path, names)
            return [folder / name for name in names]
    except (DataError, OSError):  # opening the data raises an error that says why
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
        **dict.fromkeys(YAML_SUFFIXES, open_layout),
    }
    if suffix not in openers:
        raise DataError(
            f"{path}: is not data. Give an .npz or .npy file, a .txt or .csv list of files, a "
            ".jsonl file, COCO's .json, YOLO's data.yaml, or a folder."
        )
    return openers[suffix](path, request)


def _open_npz(path: Path, request: Request) -> Source:
    request.refuse_beside(str(path))
    return open_npz(str(path), [path])


def _open_npy(path: Path, request: Request) -> Source:
    request.refuse_beside(str(path))
    return open_npy(str(path), {path.stem: path})


def _open_coco(path: Path, request: Request) -> Source:
    """Return the images that a COCO file names, with their boxes."""
    if request.boxes is not None:
        raise DataError(f"--boxes: '{path}' has boxes of its own. Leave --boxes out.")
    names = coco_images(path)
    for name in names:
        if not is_image(Path(name)):
            raise DataError(
                f"{path}: '{name[:200]}' does not have the suffix of an image. Check the file."
            )
    folder = _folder_of(path, names)
    files = [str(folder / name) for name in names]
    return open_files(str(path), files, replace(request, boxes=path))


def _folder_of(path: Path, names: list[str]) -> Path:
    """Return the folder of the images.

    For ``annotations/instances_val2017.json`` this is ``val2017`` or ``images/val2017``. It may
    also be the folder of the file.
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
