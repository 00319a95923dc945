"""Detections in the pixels of the original image files."""

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
    """Decodes outputs to boxes, and maps the boxes back to the original images.

    Parameters
    ----------
    decoder : Decoder, optional
        The default is chosen by the shapes of the first outputs; the choice is logged.
    preprocessing : Preprocessing
        Preprocessing of the images.
    """

    decoder: Decoder | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    _once: Lock = field(default_factory=Lock, repr=False)  # two metrics may call at the same time

    def __call__(
        self, outputs: Sequence[Array], inputs: Mapping[str, Array], sizes: Array | None
    ) -> list[Detections]:
        """Return the detections of each image of a batch, in pixels of its file.

        Parameters
        ----------
        outputs : sequence of array
            Outputs of the model, in its order.
        inputs : mapping of str to array
            Inputs of the model; exactly one of them must be images.
        sizes : int of shape (n, 2), or None
            Height and width of the image files; without them, boxes are in pixels of the input.

        Raises
        ------
        ModelError
            The shapes of the outputs fit no decoder, or not the given one.
        """
        seen = input_size(inputs)
        with self._once:
            if self.decoder is None:
                self.decoder = decoder_of(outputs, seen)
                name = self.decoder.name
                logger.info("The outputs are decoded as %s, chosen by their shapes.", name)
        if not self.decoder.fits(outputs, seen):
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise ModelError(
                f"--decode {self.decoder.name}: does not fit outputs of the shapes {shapes} for an "
                f"input of {seen[0]} x {seen[1]}. Name another decoder, or leave the option out."
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
        The model has no image input, or several.
    """
    images = [values.shape for values in inputs.values() if values.ndim == 4]
    if len(images) != 1:
        raise ModelError(
            f"Boxes can be decoded for models with one image input; this one has {len(images)}. "
            "Measure boxes with a function of your own: --metric module:function."
        )
    shape = images[0]
    height, width = shape[1:3] if layout_of_shape(shape) == "nhwc" else shape[2:]
    return int(height), int(width)
