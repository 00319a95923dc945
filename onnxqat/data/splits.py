"""Data that are divided into splits: train, val and test.

The layouts of folders are ``images/train`` beside ``labels/train`` (YOLO), ``train/images`` beside
``train/labels``, and ``train`` beside ``val``. A year may follow the name, as in ``train2017``. A
``data.yaml`` names its splits, see `onnxqat.data.yolo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxqat.data.classes import YEAR
from onnxqat.data.sample_files import is_sample
from onnxqat.data.yaml_entries import YAML_SUFFIXES
from onnxqat.data.yolo import read_layout
from onnxqat.errors import DataError

__all__ = ["folder_of_split", "splits_in", "usual_split"]

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
BESIDE = ("annotations", "images", "labels", "masks")  # folders that may lie beside splits


def usual_split(source: object, wanted: Sequence[str]) -> str | None:
    """Return the split to read if the user names none.

    Parameters
    ----------
    source : str or Path
        Path of the data; anything else has no splits.
    wanted : sequence of str
        Splits that suit the command, the best one first.

    Returns
    -------
    str or None
        The first of ``wanted`` that exists; None without any.
    """
    if not isinstance(source, str | Path):
        return None
    try:
        path = Path(source)
        named = path.suffix.lower() in YAML_SUFFIXES and path.is_file()
        found = read_layout(path).splits.keys() if named else splits_in(path).keys()
    except (DataError, OSError, ValueError):  # opening the data raises an error that says why
        return None
    return next((split for split in wanted if split in found), None)


def folder_of_split(folder: Path, split: str | None) -> Path:
    """Return the folder of a split; the folder itself without one.

    Raises
    ------
    DataError
        The split does not exist.
    """
    if split is None:
        return folder
    found = splits_in(folder)
    if split not in found:
        has = ", ".join(f"'{name}'" for name in found) or "none"
        raise DataError(
            f"--split {split}: '{folder}' has no such split; it has {has}. Splits are folders such "
            f"as '{folder / 'images' / split}' and '{folder / split}'."
        )
    return found[split]


def splits_in(folder: Path) -> dict[str, Path]:
    """Return the folder of samples of each split, by ``train``, ``val`` and ``test``.

    Raises
    ------
    OSError
        The folder cannot be listed.
    """
    # the first sample ends the search: a folder may hold millions
    if any(is_sample(entry) or entry.suffix.lower() == ".npz" for entry in folder.iterdir()):
        return {}
    visible = (entry for entry in sorted(folder.iterdir()) if not entry.name.startswith("."))
    folders = [entry for entry in visible if entry.is_dir()]
    found = {split: path for path in folders if (split := _split(path.name)) is not None}
    if any(path.name not in BESIDE for path in folders if path not in found.values()):
        return {}  # the folders are classes, and one of them has the name of a split
    if not found:
        images = folder / "images"
        return splits_in(images) if images.is_dir() and folder.name != "images" else {}
    inner = {split: path / "images" for split, path in found.items()}
    return {split: inner[split] if inner[split].is_dir() else path for split, path in found.items()}


def _split(name: str) -> str | None:
    word = YEAR.sub("", name.lower())
    return next((split for split, words in SPLITS.items() if word in words), None)
