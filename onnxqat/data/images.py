"""Folders of images, decoded by pillow in a few threads.

Where the boxes of their objects are known, they are arrays too: `onnxqat.data.boxes`.

``class/name.jpg``: `onnxqat.data.classes` says which class a folder is. A flat folder of images
has no labels. Files without the suffix of an image are skipped;
one that has it and cannot be decoded is an error. EXIF orientation is ignored.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onnxqat.data.arrays import BrokenError, Header, names, reason
from onnxqat.data.boxes import labels_beside, read_boxes
from onnxqat.data.classes import Classes, class_indices, refuse_splits
from onnxqat.data.feeds import InputSpec, model_layout
from onnxqat.data.preprocess import Preprocessing, output_size, resize_and_crop
from onnxqat.errors import DataError
from onnxqat.files import check_readable

__all__ = ["BOXES", "IMAGE", "IMAGE_SUFFIXES", "SIZE", "ImageFolder", "is_image"]

logger = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
BOXES, SIZE = "boxes", "size"  # objects, and height and width of the file
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
DECODERS = min(4, os.cpu_count() or 1)
# So many are decoded alone, since each may take half a gigabyte meanwhile.
LARGE = 2**24
_LARGE = threading.Lock()
MAX_NAMED = 1000
# Pillow warns from here on, and refuses twice as many.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26


def is_image(path: Path) -> bool:
    """Return whether a file counts as an image: by its suffix, and not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


class ImageFolder:
    """Images as an array ``image`` (NHWC), and ``label`` where there are class folders.

    Parameters
    ----------
    folder : Path
        The directory.
    spec : InputSpec
        The model input the images are for: gives channels, and the size to resize to when
        ``preprocessing`` names none.
    preprocessing : Preprocessing
        Resize and crop happen here, image by image, since images differ in size.
    classes : Classes or None
        Say which class a folder is; None: images of all folders, without labels.
    skip_broken : bool
        Name images that cannot be read, and do without them, also if they vanish later.
    boxes : Path, optional
        The objects in them, see `onnxqat.data.boxes`; by default ``labels`` beside ``images``.

    Raises
    ------
    DataError
        There are no images, class folders are not clear, or the model's input is no image.
    """

    def __init__(
        self,
        folder: Path,
        spec: InputSpec,
        preprocessing: Preprocessing,
        classes: Classes | None,
        *,
        skip_broken: bool = False,
        boxes: Path | None = None,
    ) -> None:
        self._broken: set[int] = set()
        self.broken: Set[int] = self._broken
        self._skip_broken = skip_broken
        self.name = str(folder)
        self._mode = _mode(self.name, spec, preprocessing)
        self._preprocessing = _with_model_size(spec, preprocessing)
        self._paths, labels, self.classes = _list_images(folder, classes)
        self._labels = None if labels is None else np.array(labels, np.int64)
        self.keys: tuple[str, ...] = (IMAGE,) if labels is None else (IMAGE, LABEL)
        self._boxes_from = boxes or labels_beside(folder)
        if self._boxes_from is not None:
            self.keys += (BOXES, SIZE)

    @cached_property
    def _boxes(self) -> NDArray[np.float64]:
        assert self._boxes_from is not None
        return read_boxes(self._boxes_from, list(map(Path, self._paths)))

    def count(self, keys: Sequence[str]) -> int:  # noqa: ARG002 (both arrays are as long)
        """Return the number of images."""
        return len(self._paths)

    def header(self, key: str) -> Header:
        """Return shape and dtype of all images, if they are like the first, or of the labels."""
        shape, dtype = self.sample(key)
        return Header((len(self._paths), *shape), dtype)

    def parts(self, key: str) -> list[NDArray[Any]]:
        """Return all images, or labels."""
        return [self.read(key, np.arange(len(self._paths)))]

    def sample(self, key: str) -> Header:
        """Return shape and dtype of the first image, decoded, or of a label."""
        if key == LABEL:
            return Header((), np.dtype(np.int64))
        if key == BOXES:
            return Header(self._boxes.shape[1:], self._boxes.dtype)
        if key == SIZE:
            return Header((2,), np.dtype(np.int64))
        for index in (i for i in range(len(self._paths)) if i not in self.broken):
            with suppress(BrokenError):
                image = self.read(key, np.array([index]))[0]
                return Header(image.shape, image.dtype)
        raise DataError(f"{self.name}: none of its {len(self._paths)} images can be read.")

    def read(self, key: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return images of shape (n, height, width, channels), or labels.

        Raises
        ------
        DataError
            An image cannot be decoded, or differs in size from the first of the batch.
        """
        if key == LABEL:
            assert self._labels is not None
            return self._labels[indices]
        if key == BOXES:
            return self._boxes[indices]
        if key == SIZE:
            return np.array([_image_size(self._paths[i]) for i in indices.tolist()], np.int64)
        # of this call alone: no thread outlives an iterator that is given up
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="onnxqat-decode") as pool:
            read = list(pool.map(self._attempt, indices.tolist()))
        images = [image for image in read if not isinstance(image, DataError)]
        if len(images) < len(read):
            self._do_without(dict(zip(indices.tolist(), read, strict=True)))
        for index, image in zip(indices.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(
                    f"{self._paths[index]}: is {_size(image)}, but another image of the batch "
                    f"{_size(images[0])}. Give --resize-dims."
                )
        return np.stack(images)

    def _attempt(self, index: int) -> NDArray[Any] | DataError:
        try:
            return self._decode(index)
        except DataError as error:
            return error

    def _do_without(self, read: dict[int, NDArray[Any] | DataError]) -> None:
        """Raise the first error or, where broken images may be skipped, name and note them all."""
        errors = {index: found for index, found in read.items() if isinstance(found, DataError)}
        if not self._skip_broken:
            raise next(iter(errors.values()))
        for index, error in errors.items():
            if len(self.broken) < MAX_NAMED:
                logger.warning("Skipped: %s", error)
            elif len(self.broken) == MAX_NAMED:
                logger.warning("Skipped: more images, which are not named.")
            self._broken.add(index)
        raise BrokenError(f"{self.name}: {len(errors)} images cannot be read.")

    def _decode(self, index: int) -> NDArray[Any]:
        path = self._paths[index]
        check_readable(path, DataError)
        try:
            with Image.open(path) as image, _turn(image):
                pixels = _pixels(image, self._mode)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise DataError(
                f"{path}: cannot be decoded ({reason(error)}). Repair or remove it."
            ) from error
        height, width = pixels.shape[:2]
        if output_size(height, width, self._preprocessing) is None:
            raise DataError(
                f"{path}: is {_size(pixels)}, smaller than --crop {self._preprocessing.crop}. "
                "Give --resize-dims."
            )
        return resize_and_crop(pixels, self._preprocessing)

    def origin(self, key: str, index: int) -> str:
        """Return the file of a sample."""
        return f"{self._paths[index]}: array {key!r}"

    def close(self) -> None:
        """Nothing is held open."""


def _image_size(path: str) -> tuple[int, int]:
    """Return height and width of an image file; zeros where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # whoever reads the pixels says what is wrong
        return 0, 0


def _turn(image: Image.Image) -> AbstractContextManager[object]:
    """Return what is held while an image is decoded: large ones wait for each other."""
    return _LARGE if image.width * image.height > LARGE else nullcontext()


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[0]} x {image.shape[1]} pixels"


def _pixels(image: Image.Image, mode: str) -> NDArray[np.uint8]:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    if image.mode.startswith(("I", "F")):
        raise ValueError("its pixels have more than 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # by way of it, since pillow warns about the direct one
    pixels = np.asarray(image.convert("L" if mode == "gray" else "RGB"))
    if mode == "gray":
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if mode == "bgr" else pixels


def _mode(name: str, spec: InputSpec, preprocessing: Preprocessing) -> str:
    layout, wanted = model_layout(spec), preprocessing.pixel_format
    if layout is None:
        raise DataError(
            f"{name}: model input {spec.name!r} ({spec.dtype} of shape {spec.shape}) is no "
            "image. Give .npz files."
        )
    channels = spec.shape[1 if layout == "nchw" else 3]
    if not isinstance(channels, int):
        return wanted
    fits = {"rgb": (1, 3), "bgr": (3,), "gray": (1,)}[wanted]
    if channels not in fits:
        raise DataError(
            f"{name}: model input {spec.name!r} has {channels} channels, which '{wanted}' images "
            "do not. Choose another --pixel-format."
        )
    return "gray" if channels == 1 else wanted


def _with_model_size(spec: InputSpec, preprocessing: Preprocessing) -> Preprocessing:
    height, width = spec.shape[2:4] if model_layout(spec) == "nchw" else spec.shape[1:3]
    if preprocessing.changes_size or not isinstance(height, int) or not isinstance(width, int):
        return preprocessing
    return msgspec.structs.replace(preprocessing, resize_dims=(height, width))


def _list_images(
    folder: Path, classes: Classes | None
) -> tuple[list[str], list[int] | None, Mapping[str, int] | None]:
    """Return paths, class indices and class names; no indices for a flat folder."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in entries if path.is_dir()]
    found = [path.name for path in folders]
    flat = [str(path) for path in entries if is_image(path) and not path.is_dir()]
    if not folders:
        if not flat:
            raise DataError(f"{folder}: holds no images and no .npz files. Check the path.")
        return flat, None, None
    if flat:
        raise DataError(
            f"{folder}: holds images ('{flat[0]}') beside folders ('{found[0]}'). "
            "Move the images into class folders, or the folders elsewhere."
        )
    refuse_splits(folder, found, classes.known if classes else None)
    by_folder = [_images_of_class(class_folder) for class_folder in folders]
    paths = [path for images in by_folder for path in images]
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
    return paths, [number for number, images in pairs for _ in images], indices


def _images_of_class(folder: Path) -> list[str]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    nested = [path for path in entries if path.is_dir()]
    if nested:
        raise DataError(
            f"{nested[0]}: is a folder within a class folder. Move its images into '{folder}'."
        )
    return [str(path) for path in entries if is_image(path)]
