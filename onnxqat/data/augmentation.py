"""Random changes of training images, and of their boxes and masks.

================  =================================================================================
``flip``          mirrored left to right with probability one half
``crop``          shifted by up to 4 pixels in both directions; what comes in is reflected at the
                  edge, since 0 need not be black after preprocessing
``resized-crop``  a window of a quarter of the area or more, of aspect 3/4 to 4/3, is enlarged
                  bilinearly to the whole (Szegedy et al. 2015, section 6; less small windows than
                  there, since the image has the model's size already)
``jitter``        brightness, contrast and saturation of the pixels, each by 0.6 to 1.4, in this
                  order (torchvision's ColorJitter)
================  =================================================================================

They are applied in this order. All images of a sample get the same change. A box is dropped if less
than a tenth of it is left, see `onnxqat.data.beside`. Masks take the class of the nearest pixel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.beside import centres_of, corners_of, visible
from onnxqat.data.feeds import layout_of_shape
from onnxqat.data.preprocess import Preprocessing
from onnxqat.errors import DataError

__all__ = ["AUGMENTATIONS", "Augmentation", "augment"]

AUGMENTATIONS = ("flip", "crop", "resized-crop", "jitter")
PAD = 4
AREA = (0.25, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10  # to find a window inside of the image
STRENGTH = 0.4
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
WHITE = 255.0


def augment(
    images: NDArray[Any],
    kinds: Sequence[str],
    rng: np.random.Generator,
    *,
    pixels: Preprocessing | None = None,
) -> NDArray[Any]:
    """Return changed copies of a batch of images.

    Parameters
    ----------
    images : array of shape (n, channels, height, width) or (n, height, width, channels)
        Images of a `Batch`; their layout follows from the shape, see `layout_of_shape`. Not
        changed.
    kinds : sequence of {"flip", "crop", "resized-crop", "jitter"}
        See the module's docstring. The order does not matter.
    rng : numpy.random.Generator
        Source of random numbers; the same state gives the same result.
    pixels : Preprocessing, optional
        The preprocessing that made the images of pixels from 0 to 255; ``jitter`` needs it.

    Raises
    ------
    DataError
        A kind is unknown, the array is not a batch of images, or jitter gets no pixels.
    """
    return Augmentation({"": images}, kinds, rng).images({"": pixels})[""]


@dataclass(frozen=True)
class _Draw:
    """The random numbers of a batch; None for a change that is not asked for.

    Attributes
    ----------
    mirrored : bool of shape (n,)
        Whether to mirror the image.
    shift : int64 of shape (n, 2)
        First row and column of the crop of the padded image.
    window : float64 of shape (n, 4)
        Top, left, height and width, as fractions of the image.
    factors : float64 of shape (n, 3)
        Factors of brightness, contrast and saturation.
    """

    mirrored: NDArray[np.bool_] | None
    shift: NDArray[np.int64] | None
    window: NDArray[np.float64] | None
    factors: NDArray[np.float64] | None


class Augmentation:
    """The changes of one batch, drawn once for its images, boxes and masks.

    Parameters
    ----------
    images : mapping of str to array
        Images by model input, see `augment`; all of one size.
    kinds : sequence of str
        See `augment`.
    rng : numpy.random.Generator
        Source of random numbers; the same state gives the same changes.

    Raises
    ------
    DataError
        A kind is unknown, or an array is not a batch of images of the size of the others.
    """

    def __init__(
        self, images: Mapping[str, NDArray[Any]], kinds: Sequence[str], rng: np.random.Generator
    ) -> None:
        for kind in kinds:
            if kind not in AUGMENTATIONS:
                raise DataError(
                    f"--augment: unknown kind {kind!r}. Give one or more of {AUGMENTATIONS}."
                )
        for array in images.values():
            if array.ndim != 4:
                raise DataError(
                    "--augment: needs images, but a model input has batches of shape "
                    f"{array.shape}. Leave it out."
                )
        self._images = {name: _channels_first(array) for name, array in images.items()}
        sizes = {view.shape[2:] for view in self._images.values()}
        if len(sizes) > 1:
            raise DataError(
                f"--augment: the images of a sample have the sizes {sorted(sizes)}. Leave it out."
            )
        self._layouts = {name: layout_of_shape(array.shape) for name, array in images.items()}
        height, width = next(iter(sizes))
        self._size = (height, width)
        count = len(next(iter(images.values())))
        self._draw = _Draw(
            mirrored=rng.random(count) < 0.5 if "flip" in kinds else None,
            shift=rng.integers(0, 2 * PAD + 1, size=(count, 2)) if "crop" in kinds else None,
            window=_windows(count, self._size, rng) if "resized-crop" in kinds else None,
            factors=rng.uniform(1 - STRENGTH, 1 + STRENGTH, (count, 3))
            if "jitter" in kinds
            else None,
        )

    def images(self, pixels: Mapping[str, Preprocessing | None]) -> dict[str, NDArray[Any]]:
        """Return the changed images of each input, C-contiguous and new.

        Parameters
        ----------
        pixels : mapping of str to Preprocessing or None
            By input, the preprocessing that made its images of pixels from 0 to 255.

        Raises
        ------
        DataError
            ``jitter`` is asked for, and the images are not made of such pixels.
        """
        found = {}
        for name, view in self._images.items():
            values = view.copy()
            self._move(values, _enlarge)
            if self._draw.factors is not None:
                values = _jittered(values, self._draw.factors, name, pixels[name])
            back = values if self._layouts[name] == "nchw" else values.transpose(0, 2, 3, 1)
            found[name] = np.ascontiguousarray(back)
        return found

    def masks(self, masks: NDArray[Any]) -> NDArray[Any]:
        """Return masks of shape (n, height, width), moved like the images."""
        moved = masks[:, None].copy()
        self._move(moved, _enlarge_nearest)
        return moved[:, 0]

    def _move(self, view: NDArray[Any], enlarge: Any) -> None:
        """Mirror, shift and enlarge arrays of shape (n, channels, height, width) in place."""
        draw, (height, width) = self._draw, view.shape[2:]
        if draw.mirrored is not None:
            view[draw.mirrored] = view[draw.mirrored][:, :, :, ::-1]
        if draw.shift is not None:
            padded = np.pad(view, ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD)), mode="symmetric")
            for index, (top, left) in enumerate(draw.shift):
                view[index] = padded[index, :, top : top + height, left : left + width]
        if draw.window is not None:
            for index, window in enumerate(draw.window):
                view[index] = enlarge(view[index], window)

    def targets(self, targets: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the boxes moved like the images; the ones that are left come first.

        Parameters
        ----------
        targets : float32 of shape (n, most, 5)
            Class, centre, width and height, relative to the image; -1 as the class of no box.
        """
        result = np.full_like(targets, -1)
        for index, rows in enumerate(targets.astype(np.float64)):
            boxes = rows[rows[:, 0] >= 0]
            kept, corners = visible(self._moved_corners(index, corners_of(boxes[:, 1:])))
            result[index, : len(corners), 0] = boxes[kept, 0]
            result[index, : len(corners), 1:] = centres_of(corners)
        return result

    def _moved_corners(self, index: int, corners: NDArray[np.float64]) -> NDArray[np.float64]:
        draw, (height, width) = self._draw, self._size
        x, y = corners[:, 0::2].copy(), corners[:, 1::2].copy()
        if draw.mirrored is not None and draw.mirrored[index]:
            x = 1 - x[:, ::-1]
        if draw.shift is not None:
            top, left = draw.shift[index]
            x, y = x + (PAD - left) / width, y + (PAD - top) / height
        if draw.window is not None:
            top, left, tall, wide = draw.window[index]
            x, y = (x - left) / wide, (y - top) / tall
        return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    return images if layout_of_shape(images.shape) == "nchw" else images.transpose(0, 3, 1, 2)


def _windows(count: int, size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw top, left, height and width of windows, as fractions; the whole image if none fits."""
    area = rng.uniform(*AREA, (count, TRIES))
    low, high = map(math.log, ASPECT)
    aspect = np.exp(rng.uniform(low, high, (count, TRIES)))  # width by height, in pixels
    corner = rng.random((count, 2))
    shape = size[0] / size[1]
    wide, tall = np.sqrt(area * aspect * shape), np.sqrt(area / aspect / shape)
    fits = (wide <= 1) & (tall <= 1)
    rows, first = np.arange(count), fits.argmax(axis=1)
    found = np.stack([tall[rows, first], wide[rows, first]], axis=1)
    found[~fits.any(axis=1)] = 1
    return np.concatenate([corner * (1 - found), found], axis=1)


def _places(length: int, start: float, share: float) -> NDArray[np.float64]:
    """Return where the middles of pixels lie in the image, along one axis, in its pixels."""
    return (start + (np.arange(length) + 0.5) / length * share) * length


def _enlarge(image: NDArray[Any], window: NDArray[np.float64]) -> NDArray[Any]:
    """Return a window of an image of shape (channels, height, width), as large as that."""
    values = image.astype(np.float32, copy=False)
    for axis, (start, share) in zip((1, 2), zip(window[:2], window[2:], strict=True), strict=True):
        length = image.shape[axis]
        place = np.clip(_places(length, start, share) - 0.5, 0, length - 1)
        first = place.astype(np.int64)
        fraction = (place - first).astype(np.float32)
        fraction = fraction[:, None] if axis == 1 else fraction
        near = np.take(values, first, axis)
        values = near + (np.take(values, np.minimum(first + 1, length - 1), axis) - near) * fraction
    return np.rint(values) if image.dtype.kind in "iu" else values


def _enlarge_nearest(mask: NDArray[Any], window: NDArray[np.float64]) -> NDArray[Any]:
    rows, columns = (
        np.clip(_places(length, start, share).astype(np.int64), 0, length - 1)
        for length, start, share in zip(mask.shape[1:], window[:2], window[2:], strict=True)
    )
    return mask[:, rows[:, None], columns]


def _jittered(
    images: NDArray[Any],
    factors: NDArray[np.float64],
    name: str,
    preprocessing: Preprocessing | None,
) -> NDArray[Any]:
    """Change brightness, contrast and saturation, in this order, of (n, channels, h, w)."""
    if preprocessing is None:
        raise DataError(
            f"--augment jitter: model input {name!r} does not get pixels from 0 to 255, so the "
            "value of black is not known. Leave jitter out."
        )
    mean, scale = (
        np.array(values, np.float32).reshape(1, -1, 1, 1)
        for values in (preprocessing.mean, preprocessing.scale)
    )
    brightness, contrast, saturation = factors.astype(np.float32).T[:, :, None, None, None]
    pixels = np.clip((images / scale + mean) * brightness, 0, WHITE)
    grey = _grey(pixels, preprocessing.pixel_format).mean(axis=(2, 3), keepdims=True)
    pixels = np.clip(grey + (pixels - grey) * contrast, 0, WHITE)
    grey = _grey(pixels, preprocessing.pixel_format)
    pixels = np.clip(grey + (pixels - grey) * saturation, 0, WHITE)
    result = (pixels - mean) * scale
    return np.asarray(np.rint(result) if images.dtype.kind in "iu" else result, images.dtype)


def _grey(pixels: NDArray[np.float32], pixel_format: str) -> NDArray[np.float32]:
    """Return how bright each pixel is, of shape (n, 1, height, width)."""
    if pixels.shape[1] != len(LUMA):
        return np.asarray(pixels.mean(axis=1, keepdims=True))
    weights = np.array(LUMA[:: -1 if pixel_format == "bgr" else 1], np.float32)
    return np.asarray((pixels * weights[:, None, None]).sum(axis=1, keepdims=True))
