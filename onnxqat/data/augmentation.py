"""Random changes to training images that leave their class as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.feeds import layout_of_shape
from onnxqat.errors import DataError

__all__ = ["AUGMENTATIONS", "augment"]

AUGMENTATIONS = ("flip", "crop")
PAD = 4


def augment(
    images: NDArray[np.float32], kinds: Sequence[str], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return changed copies of a batch of images.

    Parameters
    ----------
    images : float32 of shape (n, channels, height, width) or (n, height, width, channels)
        As a `Batch` has them; told apart as the inputs of a model are. Not changed.
    kinds : sequence of {"flip", "crop"}
        ``flip``: each image is mirrored left to right with probability one half. ``crop``:
        each is shifted by up to 4 pixels in both directions; what comes in is reflected at
        the edge, since 0 need not be black after preprocessing. The order makes no difference.
    rng : numpy.random.Generator
        Draws; the same state gives the same result.

    Raises
    ------
    DataError
        An unknown kind, or an array that is no batch of images.
    """
    for kind in kinds:
        if kind not in AUGMENTATIONS:
            raise DataError(
                f"--augment: unknown kind {kind!r}. Give one or more of {AUGMENTATIONS}."
            )
    if images.ndim != 4:
        raise DataError(
            f"--augment: needs images, but a model input has batches of shape {images.shape}. "
            "Leave it out."
        )
    result = np.array(images, order="C")
    view = result if layout_of_shape(images.shape) == "nchw" else result.transpose(0, 3, 1, 2)
    count, _, height, width = view.shape
    if "flip" in kinds:
        mirrored = rng.random(count) < 0.5
        view[mirrored] = view[mirrored, :, :, ::-1]
    if "crop" in kinds:
        padded = np.pad(view, ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD)), mode="symmetric")
        for index, (top, left) in enumerate(rng.integers(0, 2 * PAD + 1, size=(count, 2))):
            view[index] = padded[index, :, top : top + height, left : left + width]
    return result
