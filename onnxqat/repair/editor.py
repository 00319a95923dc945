"""Replace constants of a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import constant
from onnxqat.nodes import bias_index
from onnxqat.preparation.editing import own_name, pinned_names, tensor_names, unique_name

__all__ = ["Editor", "bias_of"]


def bias_of(node: gs.Node) -> gs.Tensor | None:
    """Return the bias of a layer, or None if it has none."""
    index = bias_index(node)
    if index is None or len(node.inputs) <= index or not node.inputs[index].name:
        return None
    return node.inputs[index]


class Editor:
    """Replaces constants of a graph; if other nodes read a constant too, a new name is used."""

    def __init__(self, graph: gs.Graph) -> None:
        self._pinned, self._taken = pinned_names(graph), tensor_names(graph)

    def replace(self, node: gs.Node, index: int, values: NDArray[Any], word: str) -> None:
        """Make input ``index`` of a node a float32 constant with these values."""
        name = own_name(node.inputs[index], f"{node.name}.{word}", self._pinned, self._taken)
        node.inputs[index] = constant(name, _rounded(values))

    def add_to_bias(self, node: gs.Node, change: NDArray[np.float64]) -> None:
        """Add ``change``, of shape (channels,), to the output channels of a Conv or Gemm.

        The layer must have a constant bias with one value per channel, or no bias.
        """
        bias, index = bias_of(node), bias_index(node)
        if bias is not None and index is not None:
            old = bias.values.astype(np.float64)
            shape = old.shape if old.size == change.size else change.shape
            self.replace(node, index, (old.reshape(-1) + change).reshape(shape), "bias")
            return
        name = unique_name(f"{node.name}.bias", self._taken)
        node.inputs = [*node.inputs[:2], constant(name, _rounded(change))]


def _rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the comparison of outputs finds infinity
        return values.astype(np.float32)
