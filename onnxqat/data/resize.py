"""Images of another size, bilinearly, as the packages do it that models were made with.

Pillow widens its filter when an image becomes smaller, so that every pixel counts. OpenCV's
``INTER_LINEAR`` always reads two neighbouring pixels along each axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["RESIZES", "ResizeBy", "nearest", "resize_by_opencv", "resize_by_pillow"]

ResizeBy: TypeAlias = Literal["pillow", "opencv"]

ONE = 2048  # weights of 8-bit images are multiples of 1 / 2048 (INTER_RESIZE_COEF_BITS)


def resize_by_pillow(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return an image of another size, as pillow's ``BILINEAR`` gives it.

    Parameters
    ----------
    image : array of shape (height, width, channels)
        uint8 stays uint8, rounded; all else becomes float32.
    height, width : int
        The size.
    """
    if image.shape[:2] == (height, width):
        return image
    image = _floats_or_bytes(image)
    bilinear = Image.Resampling.BILINEAR
    if image.dtype == np.uint8 and image.shape[2] == 3:
        pixels = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(pixels.resize((width, height), bilinear))
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0))
    return np.stack([np.asarray(plane.resize((width, height), bilinear)) for plane in planes], -1)


def resize_by_opencv(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return an image of another size, as OpenCV's ``INTER_LINEAR`` gives it.

    uint8 images get the bytes of cv2.resize (``modules/imgproc/src/resize.cpp`` of OpenCV): integer
    sums along the rows, then along the columns, where 4 bits are dropped before the weights and 16
    behind them. float32 images get the
    same formula; cv2's own sums may differ in the last bits.

    Parameters
    ----------
    image : array of shape (height, width, channels)
        uint8 stays uint8; all else becomes float32.
    height, width : int
        The size.
    """
    if image.shape[:2] == (height, width):
        return image
    image = _floats_or_bytes(image)
    exact = image.dtype == np.uint8
    rows, columns = (
        _Taps(there, length) for there, length in zip(image.shape[:2], (height, width), strict=True)
    )
    # beyond the edge, a column gets the whole weight; rows use the edge row twice
    inside = (columns.at >= 0) & (columns.at < image.shape[1] - 1)
    left, right = columns.weights(np.where(inside, columns.fraction, np.float32(0)), exact=exact)
    upper, lower = rows.weights(rows.fraction, exact=exact)
    first, second = columns.pixels(image.shape[1])
    values = image.astype(np.int32) if exact else image
    wide = values[:, first] * left[:, None] + values[:, second] * right[:, None]
    first, second = rows.pixels(image.shape[0])
    if not exact:
        mixed = wide[first] * upper[:, None, None] + wide[second] * lower[:, None, None]
        return np.asarray(mixed)
    wide >>= 4
    above = (wide[first] * upper[:, None, None]) >> 16
    below = (wide[second] * lower[:, None, None]) >> 16
    return np.asarray((above + below + 2) >> 2, np.uint8)


class _Taps:
    """The two pixels that each new pixel lies between, along one axis.

    Attributes
    ----------
    at : int64 of shape (new,)
        The first of the two pixels; -1 or the last pixel at the ends.
    fraction : float32 of shape (new,)
        Distance to the first pixel.
    """

    def __init__(self, there: int, length: int) -> None:
        scale = 1 / (length / there)  # OpenCV's rounding, which differs from there / length
        place = ((np.arange(length) + 0.5) * scale - 0.5).astype(np.float32)
        whole = np.floor(place)
        self.at, self.fraction = whole.astype(np.int64), place - whole

    def weights(self, fraction: NDArray[np.float32], *, exact: bool) -> list[NDArray[Any]]:
        """Return the weights of both pixels; integers for images of bytes."""
        found = [np.float32(1) - fraction, fraction]
        if not exact:
            return found
        return [np.rint(weight * np.float32(ONE)).astype(np.int32) for weight in found]

    def pixels(self, there: int) -> list[NDArray[np.int64]]:
        """Return both pixels, inside of the image."""
        return [np.clip(self.at + step, 0, there - 1) for step in (0, 1)]


def nearest(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Return an image of another size by the nearest pixel.

    Parameters
    ----------
    image : array of shape (height, width, channels)
        Any values.
    height, width : int
        The size.
    """
    rows, columns = (
        ((2 * np.arange(length) + 1) * there) // (2 * length)
        for there, length in zip(image.shape[:2], (height, width), strict=True)
    )
    return np.asarray(image[rows[:, None], columns])


def _floats_or_bytes(image: NDArray[Any]) -> NDArray[Any]:
    if image.dtype == np.uint8:
        return image
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
        return image.astype(np.float32)


RESIZES: dict[ResizeBy, Callable[[NDArray[Any], int, int], NDArray[Any]]] = {
    "pillow": resize_by_pillow,
    "opencv": resize_by_opencv,
}
