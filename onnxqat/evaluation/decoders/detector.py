"""Boxes in the images that a batch was made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxqat.data.feeds import layout_of_shape
from onnxqat.data.preprocess import Preprocessing, boxes_in_image
from onnxqat.errors import ModelError
from onnxqat.evaluation.decoders.found import Decoder, decoder_of
from onnxqat.evaluation.decoders.suppression import Detections, selected

__all__ = ["Detector", "input_size"]

logger = logging.getLogger(__name__)

Array = NDArray[Any]


@dataclass(kw_only=True)
class Detector:
    """Decodes outputs, and undoes the preprocessing.

    Parameters
    ----------
    decoder : Decoder, optional
        By default the one whose shapes the first outputs have; which one is told.
    preprocessing : Preprocessing
        Of the images.
    """

    decoder: Decoder | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    _once: Lock = field(default_factory=Lock, repr=False)  # two metrics may ask at a time

    def __call__(
        self, outputs: Sequence[Array], inputs: Mapping[str, Array], sizes: Array | None
    ) -> list[Detections]:
        """Return the detections of each image of a batch, in pixels of its file.

        Parameters
        ----------
        outputs : sequence of array
            Of the model, in its order.
        inputs : mapping of str to array
            What it was fed; one of them is images.
        sizes : int of shape (n, 2), or None
            Height and width of the files; without them boxes are in pixels of the input.

        Raises
        ------
        ModelError
            The outputs are not those of the decoder, or of none.
        """
        seen = input_size(inputs)
        with self._once:
            if self.decoder is None:
                self.decoder = decoder_of(outputs, seen)
                name = self.decoder.name
                logger.info("The outputs are decoded as those of %s, by their shapes.", name)
        if not self.decoder.fits(outputs, seen):
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise ModelError(
                f"--decode {self.decoder.name}: the outputs have the shapes {shapes}, for an input "
                f"of {seen[0]} x {seen[1]}, which are not its own. Name another, or leave it out."
            )
        found = [
            selected(candidates, self.decoder.selection)
            for candidates in self.decoder.candidates(outputs, seen)
        ]
        if sizes is None:
            return found
        return [
            one._replace(
                corners=boxes_in_image(
                    one.corners.astype(np.float64), (int(h), int(w)), seen, self.preprocessing
                )
            )
            for one, (h, w) in zip(found, sizes, strict=True)
        ]


def input_size(inputs: Mapping[str, Array]) -> tuple[int, int]:
    """Return height and width of the images that a model was fed.

    Raises
    ------
    ModelError
        It has no image input, or several.
    """
    images = [values.shape for values in inputs.values() if values.ndim == 4]
    if len(images) != 1:
        raise ModelError(
            f"Boxes are decoded of a model with one image input, and this one has {len(images)}. "
            "Measure them by --metric module:function."
        )
    shape = images[0]
    height, width = shape[1:3] if layout_of_shape(shape) == "nhwc" else shape[2:]
    return int(height), int(width)
