"""Masks of segmentation: a file for each image, with the class of each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxqat.data.arrays import reason
from onnxqat.data.images import MAX_PIXELS, image_size
from onnxqat.data.npy import ArrayReader
from onnxqat.data.preprocess import Preprocessing, fit_mask, output_size
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["VOID", "MaskReader", "masks_beside", "masks_of"]

VOID = 255  # the class of pixels that do not count, and of the padding of a letterbox
SUFFIXES = (".png", ".bmp", ".gif", ".npy", ".pgm", ".tif", ".tiff")  # lossless formats
FOLDERS = ("masks", "annotations")


class MaskReader:
    """Reads the mask of an image, resized and cropped like the image.

    Parameters
    ----------
    images : mapping of str to str
        Image file by mask file.
    preprocessing : Preprocessing
        Preprocessing of the images.
    """

    decoded = False
    kind = "masks"
    advice = "Give --resize-dims."

    def __init__(self, images: Mapping[str, str], preprocessing: Preprocessing) -> None:
        self._images, self._preprocessing = images, preprocessing

    def __call__(self, path: str) -> NDArray[Any]:
        """Return a mask.

        Raises
        ------
        DataError
            The mask cannot be read, holds colours, or differs in size from its image.
        """
        mask = self._read(path)
        size = image_size(self._images[path])
        if size != (0, 0) and mask.shape != size:  # without a size, reading the image raises
            raise DataError(
                f"{path}: has {self.described(mask)}, but its image '{self._images[path]}' has "
                f"{size[0]} x {size[1]}. Store a class for each pixel of the image."
            )
        height, width = mask.shape
        if output_size(height, width, self._preprocessing) is None:
            raise DataError(
                f"{path}: has {self.described(mask)}, less than --crop "
                f"{self._preprocessing.crop}. Give --resize-dims."
            )
        return fit_mask(mask, self._preprocessing, VOID)

    def _read(self, path: str) -> NDArray[Any]:
        if path.lower().endswith(".npy"):
            mask = ArrayReader(None)(path)
            if mask.ndim != 2 or mask.dtype.kind not in "iu":
                raise DataError(
                    f"{path}: holds {mask.dtype} of shape {mask.shape}. Store integers of shape "
                    "(height, width)."
                )
            return mask
        check_readable(path, DataError)
        try:
            with Image.open(path) as image:
                return _classes(image)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise DataError(
                f"{path}: cannot be read as a mask ({reason(error)}). Store a gray or "
                "palette PNG, in which each pixel is a class."
            ) from error

    def described(self, array: NDArray[Any]) -> str:
        """Return height and width."""
        return f"{array.shape[0]} x {array.shape[1]} pixels"


def _classes(image: Image.Image) -> NDArray[Any]:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode not in ("1", "L", "P", "I;16"):
        raise ValueError(f"its pixels are '{image.mode}', colours and not classes")
    values = np.asarray(image)  # of a palette the indices
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def masks_beside(folder: Path) -> Path | None:
    """Return ``masks/val`` or ``annotations/val`` of ``images/val``, if there are masks."""
    parts = folder.absolute().parts
    for position in reversed(range(len(parts))):
        if parts[position] == "images":
            wanted = (Path(*parts[:position], n, *parts[position + 1 :]) for n in FOLDERS)
            return next((path for path in wanted if path.is_dir() and _masks_in(path)), None)
    return None


def _masks_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def masks_of(images: Sequence[str], folder: Path) -> list[str]:
    """Return the mask of each image: the file of the same name but for the suffix.

    Raises
    ------
    DataError
        One is missing, or there are two.
    """
    found: dict[str, Path] = {}
    for path in _masks_in(folder):
        if path.stem in found:
            raise DataError(
                f"{path}: '{found[path.stem].name}' is a mask of the same image, too. Remove one."
            )
        found[path.stem] = path
    for image in images:
        if Path(image).stem not in found:
            raise DataError(
                f"{folder}: has no mask of '{image}'. Store '{Path(image).stem}.png' there, or "
                "list images and masks in a .csv file."
            )
    return [str(found[Path(image).stem]) for image in images]
