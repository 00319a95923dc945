"""The values that a vendor's command line needs from a deployment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxqat.camera import Camera
from onnxqat.data import InputSpec, Preprocessing
from onnxqat.data.feeds import model_layout
from onnxqat.data.preprocess import Layout
from onnxqat.model import Model
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule
from onnxqat.settings import input_specs, stored_settings

__all__ = ["NOT_RUN", "Facts", "Input", "command", "document", "facts_of", "numbers"]

NOT_RUN = "not run by us"  # first line of files that were not run with the vendor's tool


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of the float model.

    Attributes
    ----------
    name : str
        Name in the model.
    shape : tuple of int or str
        Shape with a free batch size set to 1. Another free length is given as its name in
        capitals, for the user to fill in.
    layout : {"nchw", "nhwc"} or None
        Layout of an image input; None for other inputs.
    """

    name: str
    shape: tuple[int | str, ...]
    layout: Layout | None

    @property
    def channels(self) -> int | str:
        """Number of channels of an image."""
        return self.shape[3 if self.layout == "nhwc" else 1]

    @property
    def size(self) -> tuple[int | str, int | str]:
        """Height and width of an image."""
        first = 1 if self.layout == "nhwc" else 2
        return self.shape[first], self.shape[first + 1]

    def lengths(self, separator: str) -> str:
        """Return the shape as text."""
        return separator.join(map(str, self.shape))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The files that were written for the chip, and the preprocessing of its data.

    Attributes
    ----------
    files : mapping of str to str
        File names by kind: the float model (``model``), the calibration table and its companions.
    inputs : tuple of Input
        Inputs in the order of the model.
    quantized : QuantizedModel
        The deployed model.
    rule : HardwareRule or None
        Its rule; None if it is a file of the user's.
    preprocessing : Preprocessing
        Preprocessing that the model was trained with.
    bits : int
        Largest width of the activations.
    camera : Camera or None
        Pixels that the model is fed if they are not those that it was trained with.
    """

    files: Mapping[str, str]
    inputs: tuple[Input, ...]
    quantized: QuantizedModel
    rule: HardwareRule | None
    preprocessing: Preprocessing
    bits: int
    camera: Camera | None = None

    @property
    def model(self) -> str:
        """File name of the float model."""
        return self.files["model"]

    @property
    def target(self) -> str:
        """Name of the chip in the vendor's tool; a word in capitals if it is unknown."""
        return (self.rule and self.rule.target) or "CHIP"

    @property
    def images(self) -> list[Input]:
        """The inputs that take images."""
        return [one for one in self.inputs if one.layout is not None]

    @property
    def mean(self) -> tuple[float, ...]:
        """One mean per channel, in pixel units: x = (pixel - mean) * scale."""
        return self._per_channel(self.preprocessing.mean)

    @property
    def scale(self) -> tuple[float, ...]:
        """One scale per channel."""
        return self._per_channel(self.preprocessing.scale)

    @property
    def std(self) -> tuple[float, ...]:
        """One divisor per channel: 1 / scale."""
        return tuple(1 / value for value in self.scale)

    @property
    def normalization(self) -> str:
        """The normalization of a pixel, as text."""
        return (
            f"Pixels: {self.pixels}, (pixel - mean) * scale with mean {numbers(self.mean)} and "
            f"scale {numbers(self.scale)}"
        )

    def _per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
        count = self.images[0].channels if self.images else 1
        return values * count if len(values) == 1 and isinstance(count, int) else values

    @property
    def pixels(self) -> str:
        """Order of the colour channels: rgb, bgr or gray."""
        gray = bool(self.images) and self.images[0].channels == 1
        return "gray" if gray else self.preprocessing.pixel_format


def facts_of(
    model: QuantizedModel,
    floats: Model,
    *,
    rule: HardwareRule | None,
    files: Mapping[str, str],
    camera: Camera | None = None,
) -> Facts:
    """Return the values for the vendor's commands.

    Parameters
    ----------
    model : QuantizedModel
        The deployed model.
    floats : Model
        The float model that was written.
    rule : HardwareRule or None
        Rule of the model; None if it is a file of the user's.
    files : mapping of str to str
        File names by kind: ``model``, ``table`` and the table's companions.
    camera : Camera, optional
        Pixels that the float model takes, if it has nodes for them.
    """
    activations = [p.spec.bits for p in model.plan.grid_points() if p.role == "activation"]
    return Facts(
        files=files,
        inputs=tuple(map(_input, input_specs(floats))),
        quantized=model,
        rule=rule,
        preprocessing=stored_settings(model).preprocessing(),
        bits=max(activations, default=8),
        camera=camera,
    )


def _input(spec: InputSpec) -> Input:
    first, *others = spec.shape or (1,)
    batch = first if isinstance(first, int) else 1
    shape = (batch, *(n if isinstance(n, int) else str(n or "LENGTH").upper() for n in others))
    return Input(name=spec.name, shape=shape if spec.shape else (), layout=model_layout(spec))


def numbers(values: tuple[float, ...], separator: str = ",") -> str:
    """Return numbers as text: the shortest plain decimals that read back to the same float64.

    Examples
    --------
    >>> numbers((128.0, 1e-7))
    '128,0.0000001'
    """
    return separator.join(np.format_float_positional(value, trim="-") for value in values)


def document(*paragraphs: str) -> str:
    """Return a text file of these paragraphs; its first line says that it was not run."""
    return "\n\n".join((NOT_RUN, *paragraphs)) + "\n"


def command(*words: str) -> str:
    """Return a command with its words quoted for a shell and one option per line."""
    first, *others = words
    text = first
    for word in map(shlex.quote, others):
        text += f" \\\n    {word}" if word.startswith("-") else f" {word}"
    return text
