"""The channels of a tensor, and the number of channels with a constant value."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import channel_axis, data_inputs, is_constant, is_convolution
from onnxqat.plan import QuantPoint

__all__ = ["ChannelRanges", "channels_of"]


def channels_of(graph: gs.Graph, point: QuantPoint) -> int | None:
    """Return the channel axis of a point's tensor, or None if it has none.

    The channels of a weight are its output channels. The channel axis of an activation is axis 1;
    for an activation of rank 3 that does not come from a convolution it is the last axis, as in
    transformers.
    """
    tensor = graph.tensors()[point.tensor]
    rank = None if tensor.shape is None else len(tensor.shape)
    if rank is None or rank < 2:
        return None
    if is_constant(tensor):
        edge = point.consumers[0]
        reader = next((node for node in tensor.outputs if node.name == edge.node), None)
        return None if reader is None else channel_axis(reader, edge.index, rank)
    return 1 if rank != 3 or _behind_convolution(tensor) else 2


def _behind_convolution(tensor: gs.Tensor) -> bool:
    """Return whether a tensor comes from a convolution through ops with one data input only."""
    while len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if is_convolution(node):
            return True
        before = [t for t in data_inputs(node) if not is_constant(t)]
        if len(before) != 1 or len(before[0].shape or ()) != 3:
            return False
        tensor = before[0]
    return False


class ChannelRanges:
    """The smallest and the largest value of each channel.

    Parameters
    ----------
    axis : int or None
        Axis of the channels, or None.
    """

    def __init__(self, axis: int | None) -> None:
        self._axis = axis
        self._low: NDArray[Any] | None = None
        self._high: NDArray[Any] | None = None

    def add(self, values: NDArray[Any]) -> None:
        """Add a part of the tensor; if its number of channels changes, no figures are returned."""
        if self._axis is None or not values.size:
            return
        others = tuple(i for i in range(values.ndim) if i != self._axis)
        low, high = values.min(axis=others), values.max(axis=others)
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        elif low.shape != self._low.shape:
            self._axis = self._low = self._high = None
        else:
            self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)

    @property
    def count(self) -> int | None:
        """Number of channels, or None."""
        return None if self._low is None else len(self._low)

    @property
    def constant(self) -> int | None:
        """Number of channels in which all values are equal, or None."""
        return None if self._low is None else int(np.count_nonzero(self._low == self._high))

    @property
    def zeros(self) -> int | None:
        """Number of channels in which all values are zero, or None."""
        if self._low is None or self._high is None:
            return None
        return int(np.count_nonzero((self._low == 0) & (self._high == 0)))
