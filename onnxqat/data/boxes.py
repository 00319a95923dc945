"""Boxes of objects in images, read from common file formats.

===========================  ====================================================================
source                       contents
===========================  ====================================================================
a folder, or ``labels``      YOLO's layout: for ``name.jpg`` a file ``name.txt`` with a line
beside ``images``            ``class cx cy w h`` for each object; no file if there is no object
a ``.json`` file             COCO's instances: ``images``, ``annotations``, ``categories``. The
                             category ids in rising order become the classes 0, 1, ...
a ``.npy`` file              rows (image, class, cx, cy, w, h); images are numbered in the order
                             of their names
===========================  ====================================================================

Centre, width and height are relative to the image. COCO's pixels are divided by the image size in
the file; crowds are marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.data.arrays import reason
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["COLUMNS", "coco_images", "labels_beside", "read_boxes"]

COLUMNS = 6  # class, cx, cy, w, h, crowd
NOTHING = (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
MOST = 2**16  # objects in an image
LARGEST = 2**30  # bytes in a file

Rows = list[list[tuple[float, ...]]]


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    width: Annotated[float, msgspec.Meta(gt=0)]
    height: Annotated[float, msgspec.Meta(gt=0)]


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


class _Category(msgspec.Struct):
    id: int


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def labels_beside(folder: Path) -> Path | None:
    """Return the folder ``labels/val`` for ``images/val`` if it exists, else None.

    If the path has several parts ``images``, the last one is replaced.
    """
    parts = folder.absolute().parts
    for position in reversed(range(len(parts))):
        if parts[position] == "images":
            found = Path(*parts[:position], "labels", *parts[position + 1 :])
            return found if found.is_dir() else None
    return None


def read_boxes(
    source: Path | None, images: Sequence[Path], classes: int | None = None
) -> NDArray[np.float64]:
    """Return the boxes of each image.

    Parameters
    ----------
    source : Path or None
        Folder or file with the boxes, see the module's docstring. None: ``labels`` beside the
        folder of each image.
    images : sequence of Path
        Paths of the images, in the order of the samples.
    classes : int, optional
        Number of classes.

    Returns
    -------
    float64 of shape (N, most, 6)
        Class, centre x and y, width, height, and 1 for a crowd. Images with fewer boxes than
        ``most`` are padded with class -1.

    Raises
    ------
    DataError
        The source cannot be read, a box is invalid, or its class does not exist.
    """
    where = "labels" if source is None else source
    try:
        if source is None:
            rows = [_yolo(labels, image.stem) for labels, image in _labels_of(images)]
        elif source.is_dir():
            rows = [_yolo(source, image.stem) for image in images]
        elif source.suffix.lower() == ".json":
            rows = _coco(source, images)
        else:
            rows = _table(source, len(images))
        found = _padded(where, rows)
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{where}: cannot be read as boxes ({reason(error)}). Give a folder of YOLO's .txt "
            "files, a .json file of COCO, or an .npy file of rows (image, class, cx, cy, w, h)."
        ) from error
    if classes is not None and found[..., 0].max(initial=-1) >= classes:
        image = images[int(found[..., 0].max(axis=1).argmax())]
        raise DataError(
            f"{where}: a box of '{image}' has the class {found[..., 0].max():g}, but there are "
            f"{classes} classes, 0 to {classes - 1}. Correct the box, or the names of the classes."
        )
    return found


def _labels_of(images: Sequence[Path]) -> list[tuple[Path | None, Path]]:
    """Return the folder of labels beside an image's folder, if there is one, and the image."""
    found = {folder: labels_beside(folder) for folder in {image.parent for image in images}}
    return [(found[image.parent], image) for image in images]


def _yolo(folder: Path | None, stem: str) -> list[tuple[float, ...]]:
    if folder is None or not (path := folder / f"{stem}.txt").exists():
        return []
    rows = []
    for number, line in enumerate(_bytes(path).decode().splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split()
        if len(cells) != COLUMNS - 1:
            raise DataError(
                f"{path}: line {number} has {len(cells)} numbers. Write class, cx, cy, w and h."
            )
        rows.append((*map(float, cells), 0.0))
    return rows


def _coco(path: Path, images: Sequence[Path]) -> Rows:
    document = _coco_document(path)
    classes = {one: i for i, one in enumerate(sorted({c.id for c in document.categories}))}
    named = {Path(image.file_name).name: image for image in document.images}
    found: dict[int | str, list[_Annotation]] = {}
    for one in document.annotations:
        if one.category_id not in classes:
            raise ValueError(f"category {one.category_id} is not in its 'categories'")
        found.setdefault(one.image_id, []).append(one)
    rows = []
    for image in images:
        if image.name not in named:
            raise DataError(
                f"{path}: does not list the image '{image.name}'. Give the file for these images."
            )
        size = named[image.name]
        rows.append(
            [
                (classes[one.category_id], *_relative(one.bbox, size), float(bool(one.iscrowd)))
                for one in found.get(size.id, [])
            ]
        )
    return rows


def _coco_document(path: Path) -> _Coco:
    return msgspec.json.decode(_bytes(path), type=_Coco)


def coco_images(path: Path) -> list[str]:
    """Return the file names of a COCO file's images, in their order.

    Raises
    ------
    DataError
        The file cannot be read, or has no images.
    """
    try:
        names = [image.file_name for image in _coco_document(path).images]
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{path}: cannot be read as COCO's instances ({reason(error)}). Give a file with "
            "images, annotations and categories."
        ) from error
    if not names:
        raise DataError(f"{path}: lists no images. Give COCO's instances.")
    return names


def _relative(box: tuple[float, ...], image: _Image) -> tuple[float, ...]:
    x, y, width, height = box
    centre = (x + width / 2) / image.width, (y + height / 2) / image.height
    return (*centre, width / image.width, height / image.height)


def _table(path: Path, count: int) -> Rows:
    check_readable(path, DataError)
    table: NDArray[Any] = np.load(path, allow_pickle=False)
    if table.ndim != 2 or table.shape[1] != COLUMNS or table.dtype.kind not in "iuf":
        raise ValueError(f"it holds {table.dtype} of shape {table.shape}")
    rows: Rows = [[] for _ in range(count)]
    for image, *box in table.astype(np.float64).tolist():
        if image not in range(count):
            raise ValueError(f"it has a row for image {image:g}, but there are {count} images")
        rows[int(image)].append((*box, 0.0))
    return rows


def _bytes(path: Path) -> bytes:
    check_readable(path, DataError)
    if path.stat().st_size > LARGEST:
        raise ValueError("it has more than a gigabyte")
    return path.read_bytes()


def _padded(where: str | Path, rows: Rows) -> NDArray[np.float64]:
    most = max((len(boxes) for boxes in rows), default=0)
    if most > MOST:
        raise ValueError(f"an image has {most} objects, more than {MOST}")
    found = np.full((len(rows), max(most, 1), COLUMNS), NOTHING)
    for index, boxes in enumerate(rows):
        if boxes:
            found[index, : len(boxes)] = boxes
    given = np.concatenate([found[i, : len(boxes)] for i, boxes in enumerate(rows)])
    classes = given[:, 0]
    wrong = ~np.isfinite(given).all(axis=1) | (classes < 0) | (classes % 1 != 0)
    wrong |= (given[:, 3:5] < 0).any(axis=1) | (np.abs(given[:, 1:5]) > 2).any(axis=1)
    if wrong.any():
        box = ", ".join(f"{value:g}" for value in given[wrong][0][:5])
        raise DataError(
            f"{where}: the box ({box}) is invalid. Store class, cx, cy, w and h, relative to the "
            "image."
        )
    return found
