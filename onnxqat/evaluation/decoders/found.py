"""The decoders by name, and the choice of one by the shapes of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from onnxqat.choices import check_choice, nearest
from onnxqat.errors import ModelError, OptionError
from onnxqat.evaluation.decoders import nanodet, ssd, yolo
from onnxqat.evaluation.decoders.suppression import Candidates, Selection

__all__ = ["DECODERS", "Decoder", "decoder_of", "read_decoder"]

Array = NDArray[Any]
Size = tuple[int, int]


class Decoder(NamedTuple):
    """Functions that compute boxes from the outputs of one family of detectors.

    Attributes
    ----------
    name : str
        Name in ``--decode``.
    fits : callable
        (outputs, (height, width) of the input) -> whether the outputs have the shapes of this
        family.
    candidates : callable
        (outputs, (height, width) of the input) -> the candidates of each image.
    selection : Selection
        How detections are selected from the candidates.
    """

    name: str
    fits: Callable[[Sequence[Array], Size], bool]
    candidates: Callable[[Sequence[Array], Size], list[Candidates]]
    selection: Selection


DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder("nanodet", nanodet.is_nanodet, nanodet.nanodet, nanodet.NANODET),
        Decoder("ssd", ssd.SSD300.fits, ssd.SSD300.candidates, ssd.SSD300.selection),
        Decoder(
            "ssdlite", ssd.SSDLITE320.fits, ssd.SSDLITE320.candidates, ssd.SSDLITE320.selection
        ),
        Decoder("yolov5", yolo.is_yolov5, yolo.yolov5, yolo.YOLOV5),
        # fits what yolov5 fits, and so has to be named
        Decoder("yolov7", yolo.is_yolov5, yolo.yolov7, yolo.YOLOV7),
        Decoder("yolov8", yolo.is_yolov8, yolo.yolov8, yolo.YOLOV8),
        Decoder("yolox", yolo.is_yolox, yolo.yolox, yolo.YOLOX),
    )
}
ALIASES = {"yolo11": "yolov8"}


def read_decoder(name: str) -> Decoder:
    """Return the decoder with a name.

    Raises
    ------
    OptionError
        There is none.
    """
    check_choice("--decode", name, [*DECODERS, *ALIASES], OptionError)
    return DECODERS[ALIASES.get(name, name)]


def decoder_of(outputs: Sequence[Array], size: Size) -> Decoder:
    """Return the decoder that fits the shapes of the outputs.

    Raises
    ------
    ModelError
        No decoder fits.
    """
    for decoder in DECODERS.values():
        if decoder.fits(outputs, size):
            return decoder
    shapes = ", ".join(str(output.shape) for output in outputs)
    raise ModelError(
        f"No decoder fits outputs of the shapes {shapes} for an input of {size[0]} x {size[1]}. "
        f"Name one with --decode. {nearest('', DECODERS)} Or measure boxes with a function of your "
        "own: --metric module:function."
    )
