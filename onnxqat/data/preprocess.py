"""Preprocessing of images, in tpu-mlir's terms: resize, crop, then ``(x - mean) * scale``.

The definition is the same for decoded image files and for arrays of pixels, so that a data set
gives the same batches in both forms::

    resize_dims (bilinearly, as resize_by says, letterboxed with keep_aspect_ratio)
    -> crop (centre) -> y = (float32(x) - float32(mean)) * float32(scale)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnxqat.choices import check_choice
from onnxqat.data.resize import RESIZES, ResizeBy, nearest
from onnxqat.errors import DataError

__all__ = [
    "Layout",
    "Preprocessing",
    "Said",
    "boxes_in_image",
    "boxes_in_input",
    "fit_mask",
    "inner_size",
    "normalize",
    "output_size",
    "resize_and_crop",
]

Layout: TypeAlias = Literal["nchw", "nhwc"]
PixelFormat: TypeAlias = Literal["rgb", "bgr", "gray"]


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Preprocessing of an image before it enters the model. The default changes nothing.

    Attributes
    ----------
    mean, scale : tuple of float
        ``y = (x - mean) * scale`` in float32, x in pixel units (0 to 255 for decoded images).
        One value for all channels, or one per channel in the order of ``pixel_format``.
    resize_dims : (int, int), optional
        Height and width to resize to. Without ``resize_dims`` and ``crop``, decoded images are
        resized to the model's input if its size is fixed; arrays keep their size.
    crop : (int, int), optional
        Height and width of the centre crop after resizing.
    resize_by : {"pillow", "opencv"}
        The package whose bilinear resize is reproduced, see `onnxqat.data.resize`.
    keep_aspect_ratio : bool
        Resize without distortion so that the image fits ``resize_dims``, centre it, and pad the
        rest.
    pad_value : float
        Value of the padding in every channel, in pixel units.
    pixel_format : {"rgb", "bgr", "gray"}
        Order of channels that the model expects. Decoded images are converted to it; arrays must
        be in it already. With ``rgb``, a model input with one channel gets gray images.
    layout : {"nchw", "nhwc"}, optional
        Layout of the *data arrays* (default: deduced from their shape and the model's). The
        model's own layout follows from its input shape. Does not apply to decoded images.

    Raises
    ------
    DataError
        A value is out of its range, or values contradict each other.
    """

    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    resize_dims: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resize_by: ResizeBy = "pillow"
    keep_aspect_ratio: bool = False
    pad_value: float = 0.0
    pixel_format: PixelFormat = "rgb"
    layout: Layout | None = None

    def __post_init__(self) -> None:
        check_choice("pixel_format", self.pixel_format, get_args(PixelFormat), DataError)
        check_choice("resize_by", self.resize_by, get_args(ResizeBy), DataError)
        check_choice("layout", self.layout or "nchw", get_args(Layout), DataError)
        for name, values in (("mean", self.mean), ("scale", self.scale)):
            _check_channels(name, values, gray=self.pixel_format == "gray")
        if 0 in self.scale:
            raise DataError(f"--scale: {self.scale} makes a channel constant. Give no zeros.")
        for name, size in (("resize-dims", self.resize_dims), ("crop", self.crop)):
            if size is not None and min(size) < 1:
                raise DataError(
                    f"--{name}: {size} is not a valid size. Give a height and width above 0."
                )
        resized, crop = self.resize_dims, self.crop
        if resized and crop and (crop[0] > resized[0] or crop[1] > resized[1]):
            raise DataError(
                f"--crop: {crop} does not fit into the resized image {resized}. "
                "Give a smaller --crop or larger --resize-dims."
            )
        if not math.isfinite(self.pad_value):
            raise DataError(f"--pad-value: {self.pad_value} is not finite. Give 0 to 255.")
        if self.pad_value and not self.keep_aspect_ratio:
            raise DataError(
                f"--pad-value: {self.pad_value} has no effect without padding. "
                "Add --keep-aspect-ratio."
            )

    @property
    def changes_values(self) -> bool:
        """Whether mean or scale differ from 0 and 1."""
        return any(self.mean) or any(value != 1 for value in self.scale)

    @property
    def changes_size(self) -> bool:
        """Whether images are resized or cropped."""
        return self.resize_dims is not None or self.crop is not None


@dataclass(frozen=True, kw_only=True)
class Said:
    """The user's settings for the data, which are stored in a model.

    Attributes
    ----------
    preprocessing, label, input_map, truth
        See `onnxqat.data.open_data`.
    """

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    label: str | None = None
    input_map: Mapping[str, str] | None = None
    truth: Mapping[str, str] | None = None


def _check_channels(name: str, values: tuple[float, ...], *, gray: bool) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise DataError(f"--{name}: {values} are not finite numbers. Give one per channel.")
    if gray and len(values) != 1:
        raise DataError(
            f"--{name}: {values} has {len(values)} values for gray images. Give one value."
        )


def normalize(
    images: NDArray[Any], preprocessing: Preprocessing, channel_axis: int
) -> NDArray[np.float32]:
    """Return ``(float32(x) - float32(mean)) * float32(scale)`` as a new C-contiguous array.

    Parameters
    ----------
    images : array of any real dtype
        One or many images, in pixel units.
    preprocessing : Preprocessing
        Its mean and scale have one value, or one per channel.
    channel_axis : int
        Axis of the channels.
    """
    shape = [1] * images.ndim
    shape[channel_axis] = -1
    # float64 values beyond float32's range become infinite, which a later check refuses
    with np.errstate(over="ignore"):
        result = np.array(images, dtype=np.float32, order="C")
        if preprocessing.changes_values:
            result -= np.array(preprocessing.mean, np.float32).reshape(shape)
            result *= np.array(preprocessing.scale, np.float32).reshape(shape)
    return result


def output_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int] | None:
    """Return height and width after resize and crop; None if the crop does not fit."""
    if preprocessing.resize_dims is not None:
        height, width = preprocessing.resize_dims
    if preprocessing.crop is None:
        return height, width
    crop = preprocessing.crop
    return crop if crop[0] <= height and crop[1] <= width else None


def resize_and_crop(image: NDArray[Any], preprocessing: Preprocessing) -> NDArray[Any]:
    """Resize and crop one image to `output_size`, which must not be None.

    Parameters
    ----------
    image : array of shape (height, width, channels)
        Pixels; uint8 stays uint8 (rounded, as the package does that ``resize_by`` names), all else
        becomes float32.
    """
    return _fitted(image, preprocessing, RESIZES[preprocessing.resize_by], preprocessing.pad_value)


def fit_mask(mask: NDArray[Any], preprocessing: Preprocessing, void: int) -> NDArray[Any]:
    """Resize and crop a mask like its image.

    Parameters
    ----------
    mask : integers of shape (height, width)
        Classes. Each new pixel takes the class of the nearest old pixel.
    preprocessing : Preprocessing
        Preprocessing of the image.
    void : int
        Value of the padding of a letterbox.
    """
    return _fitted(mask[:, :, None], preprocessing, nearest, void)[:, :, 0]


def _fitted(
    image: NDArray[Any],
    preprocessing: Preprocessing,
    resize: Callable[[NDArray[Any], int, int], NDArray[Any]],
    pad: float,
) -> NDArray[Any]:
    if preprocessing.resize_dims is not None:
        height, width = preprocessing.resize_dims
        if preprocessing.keep_aspect_ratio:
            inner = resize(image, *inner_size(image.shape[:2], height, width))
            image = _padded(inner, height, width, pad)
        else:
            image = resize(image, height, width)
    if preprocessing.crop is not None:
        height, width = preprocessing.crop
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top : top + height, left : left + width]
    return image


def boxes_in_input(
    corners: NDArray[np.float64],
    image: tuple[int, int],
    seen: tuple[int, int],
    preprocessing: Preprocessing,
) -> NDArray[np.float64]:
    """Map boxes from pixels of the image file to pixels of the model's input.

    The inverse of `boxes_in_image`, with the same parameters; boxes are not clipped.
    """
    shift, factor = _moved(image, seen, preprocessing)
    found: NDArray[np.float64] = corners / factor - shift
    return found


def boxes_in_image(
    corners: NDArray[np.float64],
    image: tuple[int, int],
    seen: tuple[int, int],
    preprocessing: Preprocessing,
) -> NDArray[np.float64]:
    """Map boxes from pixels of the model's input to pixels of the image file.

    Parameters
    ----------
    corners : float64 of shape (n, 4)
        x, y of the upper left and the lower right corner, in pixels of the model's input.
    image, seen : (int, int)
        Height and width of the image file, and of the model's input.
    preprocessing : Preprocessing
        The preprocessing between them.

    Returns
    -------
    float64 of shape (n, 4)
        Boxes in pixels of the image file, clipped to the image.
    """
    shift, factor = _moved(image, seen, preprocessing)
    limits = np.array([image[1], image[0]] * 2, np.float64)
    found: NDArray[np.float64] = np.clip((corners + shift) * factor, 0, limits)
    return found


def _moved(
    image: tuple[int, int], seen: tuple[int, int], preprocessing: Preprocessing
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return shift and factor of x, y, x, y, from the input to the image."""
    frame = preprocessing.resize_dims or (image if preprocessing.crop else seen)
    inner = inner_size(image, *frame) if preprocessing.keep_aspect_ratio else frame
    # pixels to the left of and above the input: cropped off, or padding if negative
    cut = [(outer - end) // 2 for outer, end in zip(frame, seen, strict=True)]
    margin = [(outer - within) // 2 for outer, within in zip(frame, inner, strict=True)]
    shift = np.array([cut[1] - margin[1], cut[0] - margin[0]] * 2, np.float64)
    factor = np.array([image[1] / inner[1], image[0] / inner[0]] * 2)
    return shift, factor


def _padded(inner: NDArray[Any], height: int, width: int, pad: float) -> NDArray[Any]:
    """Return a canvas with the image in its centre."""
    exact = inner.dtype.kind in "iu" and pad in range(256)
    canvas = np.full((height, width, inner.shape[2]), pad, inner.dtype if exact else np.float32)
    top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def inner_size(size: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """Return the largest size that fits the frame with the aspect ratio of the image."""
    rows, columns = size
    # in integers, because rows * (height / rows) in floating point may be one less than height
    if height * columns <= width * rows:
        return height, max(1, columns * height // rows)
    return max(1, rows * width // columns), width
