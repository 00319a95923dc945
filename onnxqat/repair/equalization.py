"""Cross-layer equalization: the same function, by weights whose channels have ranges alike.

A layer whose channels differ much in range loses most of them on the grid of the largest one, and
so does the activation behind it. Nagel et al. 2019 (arXiv:1906.04721, section 4.1) divide each
channel of a layer by a number and multiply the layer behind by it. This changes nothing but
rounding where the function between is positively homogeneous: f(s * x) = s * f(x) for s > 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.model import Model, constant
from onnxqat.nodes import bias_index
from onnxqat.plan import Skip
from onnxqat.preparation.editing import own_name, pinned_names, tensor_names
from onnxqat.preparation.statistics import divide_statistics
from onnxqat.repair.channels import Network, find_channels
from onnxqat.repair.difference import Difference, differences
from onnxqat.repair.layers import Layer
from onnxqat.repair.relu6 import replace_relu6
from onnxqat.repair.scales import Spread, find_scales, spreads

__all__ = ["Equalized", "equalize", "unevenness"]

# Of the largest value of an output, and in decibels: what float32 rounding may come to in a deep
# network. Measured on six of 10 to 73 layers: at most 3e-6, and 109 dB or more.
ROUNDING, ROUNDING_DB = 1e-4, 80.0
# Octaves that the channels of a layer lie below the largest one more, on average, than equalized.
UNEVEN = 2.0
# Weights of more elements than this take too much memory and time for advice: 256 MiB of float32.
MOST_ELEMENTS = 2**26
ESTIMATE = 3  # sweeps over the network, to see whether it pays

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Equalized:
    """A float model after equalization, and what was done.

    Attributes
    ----------
    model : Model
        Computes what the prepared model does, up to float rounding and ``relu6_cost``.
    layers : tuple of str
        Names of the nodes whose weight changed.
    skips : tuple of Skip
        The layers whose output channels keep their scale, and why.
    spreads : tuple of Spread
        How unequal the channel ranges of each weight were and are.
    differences : tuple of Difference
        What equalization alone did to each output.
    relu6 : tuple of str
        The Clip nodes that a Relu replaced.
    relu6_cost : tuple of Difference
        What that did to each output; empty where none was replaced.
    """

    model: Model
    layers: tuple[str, ...]
    skips: tuple[Skip, ...]
    spreads: tuple[Spread, ...]
    differences: tuple[Difference, ...]
    relu6: tuple[str, ...] = ()
    relu6_cost: tuple[Difference, ...] = ()


def equalize(
    model: Model,
    batches: Iterable[Feeds] | None = None,
    *,
    relu6: Literal["keep", "replace"] = "keep",
    threads: int = 0,
) -> Equalized:
    """Return a prepared float model with equalized channel ranges.

    Parameters
    ----------
    model : Model
        As `onnxqat.prepare` returns it; not changed.
    batches : iterable of mapping of str to array, optional
        Model inputs by name, on which outputs are compared; random values by default.
    relu6 : {"keep", "replace"}
        ``replace`` puts a Relu in the place of each Clip from 0, which changes the function where
        values reached the upper limit; ``keep`` leaves the channels before and behind it alone.

    Raises
    ------
    ModelError
        The function changed by more than float32 rounding, or the model does not run.
    """
    batches = None if batches is None else list(batches)
    start, replaced = model, tuple[str, ...]()
    if relu6 == "replace":
        start = model.copy()
        replaced = replace_relu6(start.graph)
    result = start.copy()
    network = find_channels(result.graph)
    scales = find_scales(network)
    measured = spreads(network, scales)
    changed = _apply(result.graph, network, scales)
    divide_statistics(result, _along_axis_1(network, scales))
    found = differences(start, result, batches, threads=threads) if changed else ()
    _refuse_changes(found, model.name)
    cost = differences(model, start, batches, threads=threads) if replaced else ()
    return Equalized(
        model=result,
        layers=changed,
        skips=_skips(network, scales),
        spreads=measured,
        differences=found,
        relu6=replaced,
        relu6_cost=cost,
    )


def unevenness(graph: gs.Graph) -> list[Spread]:
    """Return the layers of a prepared graph whose channel ranges call for equalization.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        Not changed.

    Returns
    -------
    list of Spread
        Those whose channels lie, on average, `UNEVEN` octaves or more further below the largest one
        than they would after equalization; the worst first. Empty where the weights have more than
        `MOST_ELEMENTS` elements.
    """
    network = find_channels(graph)
    if sum(one.inputs.size * one.outputs.shape[1] for one in network.layers) > MOST_ELEMENTS:
        return []
    found = spreads(network, find_scales(network, sweeps=ESTIMATE))
    uneven = [one for one in found if one.before - one.after >= UNEVEN]
    return sorted(uneven, key=lambda one: one.after - one.before)


def _along_axis_1(network: Network, scales: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return the scales of the tensors whose channels are along axis 1."""
    return {
        name: scales[ids.reshape(-1)]
        for name, ids in network.tensors.items()
        if ids.ndim > 1 and ids.size == ids.shape[1]
    }


def _refuse_changes(found: Iterable[Difference], name: str) -> None:
    for one in found:
        rounding = one.max_abs_diff <= ROUNDING * one.largest and one.sqnr_db >= ROUNDING_DB
        if not rounding and one.max_abs_diff != 0:
            raise ModelError(
                f"{name}: equalization changed more than float rounding does: {one}. "
                "Work without it."
            )


def _skips(network: Network, scales: NDArray[np.float64]) -> tuple[Skip, ...]:
    """Return the layers whose output channels all keep their scale."""
    found = []
    for layer in network.layers:
        channel = int(layer.outputs.flat[0])
        if np.all(scales[layer.outputs] == 1):
            reason = network.sets.fixed_because(channel) or "its channels are equal, or carry none"
            found.append(Skip(layer.node.name, layer.node.op, reason))
    return tuple(found)


def _apply(graph: gs.Graph, network: Network, scales: NDArray[np.float64]) -> tuple[str, ...]:
    """Scale weights, biases and what is added; return the names of the layers that changed."""
    editor = _Editor(graph)
    changed = []
    for layer in network.layers:
        if np.any(scales[layer.inputs] != 1) or np.any(scales[layer.outputs] != 1):
            _scale_layer(layer, scales, editor)
            changed.append(str(layer.node.name))
    for shift in network.shifts:
        if np.any(scales[shift.ids] != 1):
            values = shift.node.inputs[shift.position].values.astype(np.float64)
            editor.replace(shift.node, shift.position, values / scales[shift.ids], "added")
    return tuple(changed)


def _scale_layer(layer: Layer, scales: NDArray[np.float64], editor: _Editor) -> None:
    """W -> W * s_in / s_out, b -> b / s_out, in float64, rounded once."""
    node, inputs, outputs = layer.node, scales[layer.inputs], scales[layer.outputs]
    weight = node.inputs[1].values
    factors = inputs[:, None, :, None] / outputs[:, :, None, None]
    matrix = layer.matrix(weight.astype(np.float64)) * factors
    editor.replace(node, 1, layer.stored(matrix, weight.shape), "weight")
    index = bias_index(node)
    if index is not None and len(node.inputs) > index and node.inputs[index].name:
        bias = node.inputs[index].values.astype(np.float64)
        editor.replace(node, index, bias / outputs.reshape(-1), "bias")


class _Editor:
    """Replaces constants of a graph; one that others read too gets a name of its own."""

    def __init__(self, graph: gs.Graph) -> None:
        self._pinned, self._taken = pinned_names(graph), tensor_names(graph)

    def replace(self, node: gs.Node, index: int, values: NDArray[Any], word: str) -> None:
        """Let input ``index`` of a node be a constant with these values, as float32."""
        with np.errstate(over="ignore"):  # infinity shows in the outputs, which are compared
            rounded = values.astype(np.float32)
        name = own_name(node.inputs[index], f"{node.name}.{word}", self._pinned, self._taken)
        node.inputs[index] = constant(name, rounded)
