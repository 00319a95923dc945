"""Image files, decoded by pillow.

EXIF orientation is ignored. A file that has the suffix of an image and cannot be decoded is an
error.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxqat.data.arrays import reason
from onnxqat.data.feeds import InputSpec, model_layout
from onnxqat.data.preprocess import Preprocessing, output_size, resize_and_crop
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["IMAGE_SUFFIXES", "ImageReader", "decoded_as", "image_size", "is_image"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pixels above which images are decoded one at a time, since each may take half a gigabyte.
LARGE = 2**24
_LARGE = threading.Lock()
# Pillow warns above this number, and refuses above twice this number.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26


def is_image(path: Path) -> bool:
    """Return whether a file has the suffix of an image and is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


class ImageReader:
    """Decodes an image file for a model input, to shape (height, width, channels).

    Parameters
    ----------
    name : str
        Name of the data, for messages.
    spec : InputSpec
        The model input for the images. It determines the channels, and the size if
        ``preprocessing`` does not.
    preprocessing : Preprocessing
        Preprocessing of the user. Only resize and crop are done here, image by image, since images
        differ in size.

    Raises
    ------
    DataError
        The model's input is not an image.
    """

    decoded = True
    kind = "images"
    advice = "Give --resize-dims."

    def __init__(self, name: str, spec: InputSpec, preprocessing: Preprocessing) -> None:
        self._mode = _mode(name, spec, preprocessing)
        self.preprocessing = decoded_as(spec, preprocessing)

    def __call__(self, path: str) -> NDArray[Any]:
        """Return an image, resized and cropped.

        Raises
        ------
        DataError
            The file cannot be decoded, or is smaller than the crop.
        """
        check_readable(path, DataError)
        try:
            with Image.open(path) as image, _turn(image):
                pixels = _pixels(image, self._mode)
        except Exception as error:  # decoders may raise anything for a damaged file
            raise DataError(
                f"{path}: cannot be decoded ({reason(error)}). Repair or remove it."
            ) from error
        height, width = pixels.shape[:2]
        if output_size(height, width, self.preprocessing) is None:
            raise DataError(
                f"{path}: has {self.described(pixels)}, less than --crop "
                f"{self.preprocessing.crop}. Give --resize-dims."
            )
        return resize_and_crop(pixels, self.preprocessing)

    def described(self, array: NDArray[Any]) -> str:
        """Return height and width."""
        return f"{array.shape[0]} x {array.shape[1]} pixels"


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of an image file; zeros if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # reading the pixels reports the error
        return 0, 0


def _turn(image: Image.Image) -> AbstractContextManager[object]:
    """Return a context for decoding an image; large images share a lock."""
    return _LARGE if image.width * image.height > LARGE else nullcontext()


def _pixels(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith(("I", "F")):
        raise ValueError("its pixels have more than 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # pillow warns about a direct conversion to RGB
    pixels = np.asarray(image.convert("L" if mode == "gray" else "RGB"))
    if mode == "gray":
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if mode == "bgr" else pixels


def _mode(name: str, spec: InputSpec, preprocessing: Preprocessing) -> str:
    layout, wanted = model_layout(spec), preprocessing.pixel_format
    if layout is None:
        raise DataError(
            f"{name}: model input {spec.name!r} ({spec.dtype} of shape {spec.shape}) is not an "
            "image. Give .npz files."
        )
    channels = spec.shape[1 if layout == "nchw" else 3]
    if not isinstance(channels, int):
        return wanted
    fits = {"rgb": (1, 3), "bgr": (3,), "gray": (1,)}[wanted]
    if channels not in fits:
        raise DataError(
            f"{name}: model input {spec.name!r} has {channels} channels, but '{wanted}' images do "
            "not. Choose another --pixel-format."
        )
    return "gray" if channels == 1 else wanted


def decoded_as(spec: InputSpec, preprocessing: Preprocessing) -> Preprocessing:
    """Return the preprocessing; if it has no size, resize to the model's input."""
    height, width = spec.shape[2:4] if model_layout(spec) == "nchw" else spec.shape[1:3]
    if preprocessing.changes_size or not isinstance(height, int) or not isinstance(width, int):
        return preprocessing
    return msgspec.structs.replace(preprocessing, resize_dims=(height, width))
