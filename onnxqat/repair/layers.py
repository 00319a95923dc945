"""Layers with a weight, and the relation between the weight's values and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import is_convolution, output_channels, weight_index
from onnxqat.repair.sets import Ids

__all__ = ["Layer", "layer_sizes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A node with a weight, and its input and output channels.

    Attributes
    ----------
    node : Node
        A Conv, ConvTranspose, Gemm or MatMul whose input 1 is constant.
    inputs, outputs : array of shape (groups, channels of a group)
        The channel numbers.
    """

    node: gs.Node
    inputs: Ids
    outputs: Ids

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Return a weight in the shape (groups, outputs, inputs, taps)."""
        (groups, inputs), outputs = self.inputs.shape, self.outputs.shape[1]
        if self.node.op == "ConvTranspose":  # (C, M / groups, ...)
            return weight.reshape(groups, inputs, outputs, -1).swapaxes(1, 2)
        stored = weight.T if self._is_flipped else weight
        return stored.reshape(groups, outputs, inputs, -1)

    def stored(self, matrix: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Return the weight of ``shape`` for a matrix; the inverse of `matrix`."""
        if self.node.op == "ConvTranspose":
            return matrix.swapaxes(1, 2).reshape(shape)
        return matrix.reshape(shape[::-1]).T if self._is_flipped else matrix.reshape(shape)

    @property
    def _is_flipped(self) -> bool:
        """Whether the weight is stored as (inputs, outputs)."""
        return not is_convolution(self.node) and not self.node.attrs.get("transB", 0)


def layer_sizes(node: gs.Node) -> tuple[int, int, int] | None:
    """Return the groups, inputs per group and outputs per group; None without a constant matrix.

    A MatMul with a constant left operand also gives None, because it sums over rows.
    """
    shape = node.inputs[1].shape
    if weight_index(node) != 1 or not shape or 0 in shape or node.attrs.get("transA", 0):
        return None
    outputs = output_channels(node, shape)
    if outputs is None or (not is_convolution(node) and len(shape) != 2):
        return None
    groups = int(node.attrs.get("group", 1)) if is_convolution(node) else 1
    return groups, math.prod(shape[:2]) // outputs, outputs // groups
