"""Bias absorption: move part of a high bias into the bias of the next layer.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1.3: for r(y) = max(y, 0) and c >= 0,

::

    r(W1 x + b1) = r(W1 x + b1 - c) + c        where W1 x + b1 >= c
    b1 -> b1 - c,  b2 -> b2 + W2 c             (of a Conv, W2 summed over its taps)

so that the activation between the layers has a smaller range. The same holds for LeakyRelu and
PRelu. If the statistics of a BatchNormalization give the distribution of y, c = max(0, mean - 3 *
deviation), which 99.87 % of a normal distribution exceed. Otherwise c is the smallest value of y on
the data, for which the outputs do not change.

Nothing is moved into a Conv with padding, because its padded zeros would stand for the value c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import data_inputs, is_op, is_plain_product, runs_along
from onnxqat.operators import homogeneous, moving
from onnxqat.preparation.distributions import Distribution
from onnxqat.preparation.editing import constant_values, pinned_names
from onnxqat.repair.channels import Network
from onnxqat.repair.editor import Editor, bias_of
from onnxqat.repair.layers import Layer

__all__ = ["Absorption"]

IDENTITY_ABOVE_ZERO = ("Relu", "LeakyRelu", "PRelu")
WRITERS, READERS = ("Conv", "ConvTranspose", "Gemm"), ("Conv", "Gemm")
# f(y + c) = f(y) + c for one number c per channel; for windows only without padding.
PASSING = (*homogeneous("windows"), "ReduceMean", "ReduceMax", "ReduceMin")
PASSING_VALUES = moving("axes", "blocks", "repeats", "picks", "joins")
DEVIATIONS = 3  # standard deviations below the mean


class Absorption:
    """The layers of a network whose bias can partly move into the layers behind.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        A prepared graph.
    network : Network
        The channels of the graph.
    """

    def __init__(self, graph: gs.Graph, network: Network) -> None:
        self._graph, self._network = graph, network
        self._pinned = pinned_names(graph)
        self._layers = {id(layer.node): layer for layer in network.layers}
        self._pairs = [
            (layer, readers)
            for layer in network.layers
            if (readers := self._readers(layer)) is not None
        ]

    @property
    def tensors(self) -> list[str]:
        """The outputs of the layers, before the activation function."""
        return [str(layer.node.outputs[0].name) for layer, _ in self._pairs]

    def amounts(
        self, known: Mapping[str, Distribution], smallest: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the amount c of each channel, by tensor; tensors with all c = 0 are left out.

        Parameters
        ----------
        known : mapping of str to Distribution
            The known distributions, by tensor.
        smallest : mapping of str to array of shape (channels,)
            The smallest values on the data, for tensors without a known distribution.
        """
        found = {}
        for layer, _ in self._pairs:
            name = str(layer.node.outputs[0].name)
            amount = np.zeros(layer.outputs.size)
            if name in known and known[name].mean.size == amount.size:
                amount = known[name].mean - DEVIATIONS * known[name].deviation
            elif name in smallest:
                amount = np.asarray(smallest[name], np.float64)
            if (amount > 0).any():
                found[name] = np.maximum(amount, 0)
        return found

    def apply(self, amounts: Mapping[str, NDArray[np.float64]]) -> tuple[str, ...]:
        """Move the amounts; return the names of the layers whose bias became smaller."""
        editor, changed = Editor(self._graph), []
        moved = np.zeros(self._network.sets.count)
        readers: dict[int, Layer] = {}
        for layer, behind in self._pairs:
            amount = amounts.get(str(layer.node.outputs[0].name))
            if amount is not None:
                editor.add_to_bias(layer.node, -amount)
                moved[layer.outputs.reshape(-1)] = amount
                readers |= {id(one.node): one for one in behind}
                changed.append(str(layer.node.name))
        for reader in readers.values():
            weight = reader.node.inputs[1].values.astype(np.float64)
            sums = reader.matrix(weight).sum(axis=-1)  # (groups, outputs, inputs)
            lifted = np.einsum("goi,gi->go", sums, moved[reader.inputs])
            editor.add_to_bias(reader.node, lifted.reshape(-1))
        return tuple(changed)

    def _readers(self, layer: Layer) -> list[Layer] | None:
        """Return the layers that can absorb the bias; None if anything else reads the output."""
        behind = layer.node.outputs[0].outputs
        if not (
            is_op(layer.node, *WRITERS)
            and _has_plain_bias(layer)
            and layer.node.outputs[0].name not in self._pinned
            and len(behind) == 1
            and is_op(behind[0], *IDENTITY_ABOVE_ZERO)
        ):
            return None
        return self._followed(behind[0].outputs[0])

    def _followed(self, tensor: gs.Tensor) -> list[Layer] | None:
        """Return the layers that a tensor reaches; None if a shift cannot be followed to them."""
        found, waiting, seen = [], [tensor], {str(tensor.name)}
        while waiting:
            tensor = waiting.pop()
            if tensor.name in self._pinned or tensor.name not in self._network.tensors:
                return None
            for node in tensor.outputs:
                layer = self._layers.get(id(node))
                if layer is not None and _takes(layer, tensor):
                    found.append(layer)
                elif layer is not None or not _passes(node, tensor):
                    return None
                else:
                    waiting += [one for one in node.outputs if one.name not in seen]
                    seen.update(str(one.name) for one in node.outputs)
        return found


def _has_plain_bias(layer: Layer) -> bool:
    """Whether the layer has, or can get, a bias with one constant per output channel."""
    bias = bias_of(layer.node)
    values = None if bias is None else constant_values(bias)
    runs = bias is None or (values is not None and runs_along(values.shape, layer.outputs.size))
    return runs and is_plain_product(layer.node)


def _takes(layer: Layer, tensor: gs.Tensor) -> bool:
    """Whether a constant shift of each input channel shifts all outputs of a channel equally."""
    node = layer.node
    reads = node.inputs[0] is tensor and all(t is not tensor for t in node.inputs[1:])
    return reads and is_op(node, *READERS) and _has_plain_bias(layer) and not _pads(node)


def _passes(node: gs.Node, tensor: gs.Tensor) -> bool:
    if is_op(node, *PASSING_VALUES):
        return any(one is tensor for one in data_inputs(node))
    return is_op(node, *PASSING) and node.inputs[0] is tensor and not _pads(node)


def _pads(node: gs.Node) -> bool:
    """Whether the windows of a node can include padding."""
    automatic = node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(node.attrs.get("pads", ())) or bool(node.attrs.get("ceil_mode", 0))
