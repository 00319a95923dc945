"""Folders of samples.

=========================  ==================================================================
what is in the folder      what it is
=========================  ==================================================================
``.npz`` files             arrays by name, joined in the order of their names
``.npy`` files             arrays by name, where one is called like an input or labels; else one
                           sample each
images                     one sample each
folders of the latter two  the same, of the classes that the folders are called
folders of splits          one of them, see `onnxqat.data.splits`
=========================  ==================================================================

Other files and hidden files are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxqat.data.arrays import Source, names
from onnxqat.data.classes import Classes, class_indices, refuse_splits
from onnxqat.data.images import is_image
from onnxqat.data.npy import open_npy
from onnxqat.data.npz import open_npz
from onnxqat.data.request import Request
from onnxqat.data.sample_files import is_sample, open_files
from onnxqat.data.splits import folder_of_split
from onnxqat.errors import DataError

__all__ = ["LABEL_NAMES", "open_folder"]

LABEL_NAMES = ("label", "labels", "y")


def open_folder(path: Path, request: Request) -> Source:
    """Return the samples of a folder.

    Raises
    ------
    DataError
        The folder cannot be listed, holds no samples, or mixes kinds of files.
    """
    try:
        return _opened(folder_of_split(path, request.split), request)
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror}). Check it.") from error


def _opened(path: Path, request: Request) -> Source:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    npz, npy = ([e for e in entries if e.suffix.lower() == suffix] for suffix in (".npz", ".npy"))
    images = [entry for entry in entries if is_image(entry)]
    kinds = [found for found in (npz, npy, images) if found]
    if len(kinds) > 1:
        what = "images" if images else "arrays of another kind"
        raise DataError(
            f"{path}: holds arrays ('{kinds[0][0].name}') and {what} ('{kinds[-1][0].name}'). "
            "Keep them in different directories."
        )
    if npz:
        request.refuse_beside(str(path))
        return open_npz(str(path), npz)
    named = {entry.stem: entry for entry in npy}
    if any(request.spec_of(stem) or stem in LABEL_NAMES for stem in named):
        request.refuse_beside(str(path))
        return open_npy(str(path), named)
    paths, labels, classes = _list_samples(path, entries, request.classes)
    return open_files(str(path), paths, request, labels=labels, classes=classes)


def _list_samples(
    folder: Path, entries: Sequence[Path], classes: Classes | None
) -> tuple[list[str], list[int] | None, Mapping[str, int] | None]:
    """Return paths, class indices and class names; no indices for a flat folder."""
    folders = [path for path in entries if path.is_dir()]
    found = [path.name for path in folders]
    flat = [str(path) for path in entries if is_sample(path) and not path.is_dir()]
    if not folders:
        if not flat:
            raise DataError(f"{folder}: holds no images and no .npz or .npy files. Check the path.")
        return flat, None, None
    if flat:
        raise DataError(
            f"{folder}: holds samples ('{flat[0]}') beside folders ('{found[0]}'). "
            "Move the files into class folders, or the folders elsewhere."
        )
    refuse_splits(folder, found, classes.known if classes else None)
    by_folder = [_samples_of_class(class_folder) for class_folder in folders]
    paths = [path for samples in by_folder for path in samples]
    if not paths:
        raise DataError(f"{folder}: its folders {names(found[:5])} hold no images. Check the path.")
    if classes is None:
        return paths, None, None
    try:
        numbers, indices = class_indices(folder, found, classes)
    except DataError:
        if classes.needed:
            raise
        return paths, None, None
    pairs = zip(numbers, by_folder, strict=True)
    return paths, [number for number, samples in pairs for _ in samples], indices


def _samples_of_class(folder: Path) -> list[str]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    nested = [path for path in entries if path.is_dir()]
    if nested:
        raise DataError(
            f"{nested[0]}: is a folder inside of a class folder. Move its files into '{folder}'."
        )
    return [str(path) for path in entries if is_sample(path)]
