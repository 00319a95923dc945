"""The arguments of a metric: the outputs of a batch, and the samples of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxqat.evaluation.decoders import Detections, Detector, input_size
from onnxqat.outputs import Output

__all__ = ["Array", "MetricBatch", "MetricFunction", "Values"]

Array: TypeAlias = NDArray[Any]
Values: TypeAlias = Mapping[str, Array]  # by the name of the output


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricBatch:
    """The samples of one batch, without padding.

    Attributes
    ----------
    inputs : mapping of str to array
        The model's inputs, by name.
    labels : int64 of shape (n,), or None
        Class indices.
    indices : int64 of shape (n,)
        Positions of the samples in the data.
    arrays : mapping of str to array
        The other arrays of the data, first axis n, as they are stored.
    truth : mapping of str to array
        The true values of each output, by the name of the output; taken from ``arrays``.
    reference : mapping of str to array, or None
        Outputs of the reference model, by name; None without one.
    outputs : mapping of str to Output
        The meaning of each output's values, by name.
    detector : Detector
        Decodes outputs to boxes.
    """

    inputs: Mapping[str, Array]
    labels: NDArray[np.int64] | None
    indices: NDArray[np.int64]
    arrays: Mapping[str, Array] = field(default_factory=dict)
    truth: Mapping[str, Array] = field(default_factory=dict)
    reference: Values | None = None
    outputs: Mapping[str, Output] = field(default_factory=dict)
    detector: Detector = field(default_factory=Detector)

    def detections(self, values: Values) -> list[Detections]:
        """Return the boxes in each image, decoded from outputs, in pixels of the image file.

        Raises
        ------
        ModelError
            The outputs do not fit the decoder, or no decoder fits their shapes.
        """
        return self.detector(list(values.values()), self.inputs, self.arrays.get("size"))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image file; if unknown, those of the model's input."""
        if "size" in self.arrays:
            return [(int(height), int(width)) for height, width in self.arrays["size"]]
        return [input_size(self.inputs)] * len(self.indices)


MetricFunction: TypeAlias = Callable[[Iterator[Values], Iterator[MetricBatch]], Any]
