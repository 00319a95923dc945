"""The parts that people divide data into, as folders.

``images/train`` beside ``labels/train`` (YOLO's layout), ``train/images`` beside ``train/labels``,
or ``train`` beside ``val``; a year may stand behind the name, as in ``train2017``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from onnxqat.data.sample_files import is_sample
from onnxqat.errors import DataError

__all__ = ["SPLITS", "part_of", "usual_part"]

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
BESIDE = ("annotations", "images", "labels", "masks")  # folders that are no classes beside parts
YEAR = re.compile(r"(19|20)\d\d$")


def usual_part(source: object, wanted: Sequence[str]) -> str | None:
    """Return which part of a folder to read where the user names none.

    Parameters
    ----------
    source : str or Path
        What the user named; anything else has no parts.
    wanted : sequence of str
        The parts that would do, the best first.

    Returns
    -------
    str or None
        None where the folder has no parts, or none of those.
    """
    if not isinstance(source, str | Path):
        return None
    try:
        found = _parts(Path(source))
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return None
    return next((part for part in wanted if part in found), None)


def part_of(folder: Path, split: str | None) -> Path:
    """Return the folder of a part of the data; the whole where no part is named.

    Raises
    ------
    DataError
        There is no such part.
    """
    if split is None:
        return folder
    found = _parts(folder)
    if split not in found:
        has = ", ".join(f"'{part}'" for part in found) or "none"
        raise DataError(
            f"--split {split}: '{folder}' has no such part; it has {has}. Parts are folders such "
            f"as '{folder / 'images' / split}' and '{folder / split}'."
        )
    return found[split]


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folder of samples of each part."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if any(is_sample(entry) or entry.suffix.lower() == ".npz" for entry in entries):
        return {}
    folders = [entry for entry in entries if entry.is_dir()]
    found = {part: path for path in folders if (part := _part(path.name)) is not None}
    if any(path.name not in BESIDE for path in folders if path not in found.values()):
        return {}  # classes, one of which may be called train
    if not found:
        images = folder / "images"
        return _parts(images) if images.is_dir() and folder.name != "images" else {}
    inner = {part: path / "images" for part, path in found.items()}
    return {part: inner[part] if inner[part].is_dir() else path for part, path in found.items()}


def _part(name: str) -> str | None:
    word = YEAR.sub("", name.lower())
    return next((part for part, words in SPLITS.items() if word in words), None)
