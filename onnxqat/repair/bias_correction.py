"""Empirical bias correction: subtract the shift of a layer's mean by quantization from its bias.

Nagel et al. 2019 (arXiv:1906.04721), section 4.2: rounding weights and activations shifts the mean
of each output channel by

::

    E[epsilon] = E[y_q] - E[y],    b -> b - E[epsilon]                  (equation 16)

over the data (appendix D, "empirical"). Layers are corrected in the order of the network, so that
each reads the outputs of corrected layers; layers on parallel paths are corrected together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.calibration import without_large_biases
from onnxqat.data import Batch
from onnxqat.ends import TensorReader
from onnxqat.errors import DataError
from onnxqat.model import constant
from onnxqat.nodes import (
    bias_index,
    biased_node,
    is_convolution,
    is_op,
    is_plain_product,
    weight_index,
)
from onnxqat.operators import WEIGHTED
from onnxqat.pairs import float_name
from onnxqat.plan import Skip
from onnxqat.preparation.editing import constant_values, pinned_names
from onnxqat.quantized import QuantizedModel
from onnxqat.repair.originals import note_originals

__all__ = [
    "Bias",
    "Corrected",
    "bias_passes",
    "correct_biases",
    "find_biases",
    "finished",
    "shift_bias",
]

Batches = Iterable[Batch | Mapping[str, NDArray[Any]]]
Means = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A quantized model with corrected biases.

    Attributes
    ----------
    model : QuantizedModel
        The corrected model; its metadata contain the old biases, see `onnxqat.repair.originals`.
    layers : tuple of str
        Names of the nodes whose bias changed.
    skips : tuple of Skip
        The quantized layers without a bias that can be changed, and why.
    """

    model: QuantizedModel
    layers: tuple[str, ...]
    skips: tuple[Skip, ...]


class Bias(NamedTuple):
    """A bias: input ``position`` of ``node``, and the channel axis of the node's output.

    ``node`` is the layer itself, or the Add behind a MatMul.
    """

    layer: str
    node: str
    position: int
    tensor: str
    axis: int


def correct_biases(
    model: QuantizedModel,
    batches: Callable[[], Batches],
    *,
    threads: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Corrected:
    """Return a calibrated model whose layers have the output means of the float model.

    Parameters
    ----------
    model : QuantizedModel
        A calibrated model; it is not changed.
    batches : callable
        Returns an iterator over all data. It is called once, and once more for each depth at which
        there are layers. One batch is in memory at a time.
    progress : callable
        Called after each batch.

    Raises
    ------
    PlanError
        The model is not calibrated.
    DataError
        There is no data, or means are not finite.
    """
    model.check_calibrated()
    depths, skips = find_biases(model)
    found = [bias for biases in depths for bias in biases]
    wanted = {bias.tensor: bias for bias in found}
    corrected = replace(model, floats=model.floats.copy())
    expected = _means(model.floats.to_proto(), wanted, batches(), threads, progress)
    nodes = {node.name: node for node in corrected.floats.graph.nodes}
    for biases in depths:
        proto = corrected.to_proto()
        there = {name for node in proto.graph.node for name in node.output}
        ours = {
            float_name(b.tensor) if float_name(b.tensor) in there else b.tensor: b for b in biases
        }
        means = _means(proto, ours, batches(), threads, progress)
        for name, bias in ours.items():
            shift_bias(nodes[bias.node], bias.position, expected[bias.tensor] - means[name])
    return finished(model, corrected, [bias.node for bias in found], skips)


def finished(
    before: QuantizedModel, after: QuantizedModel, layers: Iterable[str], skips: Iterable[Skip]
) -> Corrected:
    """Return the corrected model with the old biases in its metadata, and what was done."""
    note_originals(before.floats, after.floats)
    plan = without_large_biases(after.plan, after.params, after.floats.graph.tensors())
    return Corrected(model=replace(after, plan=plan), layers=tuple(layers), skips=tuple(skips))


def bias_passes(model: QuantizedModel) -> int:
    """Return how many times `correct_biases` reads the data."""
    return 1 + len(find_biases(model)[0])


def find_biases(model: QuantizedModel) -> tuple[list[list[Bias]], list[Skip]]:
    """Return the biases of quantized layers, listed by the number of such layers before them."""
    graph = model.floats.graph
    weights = {point.tensor for point in model.plan.points if point.role == "weight"}
    gridded = {point.tensor for point in model.plan.grid_points()}
    kept = pinned_names(graph)
    depth: dict[str, int] = {}  # the number of layers before each tensor
    depths: dict[int, list[Bias]] = {}
    skips = []
    for node in graph.nodes:
        before = max((depth.get(tensor.name, 0) for tensor in node.inputs), default=0)
        index = weight_index(node) if is_op(node, *WEIGHTED) else None
        if index is not None and node.inputs[index].name in weights:
            found = _bias_of(node, kept, gridded)
            if isinstance(found, str):
                skips.append(Skip(node.name, node.op, found))
            else:
                depths.setdefault(before, []).append(found)
                before += 1
        depth.update((tensor.name, before) for tensor in node.outputs)
    return [depths[key] for key in sorted(depths)], skips


def _bias_of(layer: gs.Node, kept: set[str], gridded: set[str]) -> Bias | str:
    """Return the bias of a layer, or the reason why there is none that can be changed."""
    node, index = layer, bias_index(layer)
    if index is None:  # a MatMul: its bias is the operand of the Add behind it
        node = layer.outputs[0].outputs[0] if len(layer.outputs[0].outputs) == 1 else layer
        sides = [i for i in range(len(node.inputs)) if biased_node(node, i) is layer]
        index = sides[0] if node is not layer and sides else None
    if index is None or len(node.inputs) <= index or not node.inputs[index].name:
        return "it has no bias"
    if not is_plain_product(layer):
        return "its alpha or beta scales the product or the bias"
    bias, output = node.inputs[index], node.outputs[0]
    values, rank = constant_values(bias), len(output.shape or ())
    axis = 1 if is_convolution(node) else rank - 1
    if values is None or len(bias.outputs) > 1 or bias.name in kept:
        return "its bias is computed, or other nodes also read it"
    if bias.name in gridded:
        return "its bias has its own quantization parameters"
    if axis < 1 or values.size != output.shape[axis] or values.shape[-1:] != (values.size,):
        return "its bias does not have one value per channel"
    return Bias(str(layer.name), str(node.name), index, str(output.name), axis)


def shift_bias(node: gs.Node, index: int, change: NDArray[np.float64]) -> None:
    """Add a number to each channel of a bias, input ``index`` of a node."""
    old = node.inputs[index]
    values = (old.values.astype(np.float64) + change).astype(np.float32)
    node.inputs[index] = constant(old.name, values)


def _means(
    proto: onnx.ModelProto,
    wanted: Mapping[str, Bias],
    batches: Batches,
    threads: int,
    progress: Callable[[], None],
) -> Means:
    """Return the mean of each channel of some tensors over the data."""
    reader = TensorReader(proto, wanted, optimization="basic", threads=threads)
    sums: Means = {}
    counts = dict.fromkeys(wanted, 0)
    for batch in batches:
        inputs = batch.inputs if isinstance(batch, Batch) else batch
        for name, values in reader.run(inputs).items():
            counted = batch.counting(values) if isinstance(batch, Batch) else values
            channels = np.moveaxis(counted, wanted[name].axis, 0).reshape(
                counted.shape[wanted[name].axis], -1
            )
            sums[name] = sums.get(name, 0.0) + channels.sum(axis=1, dtype=np.float64)
            counts[name] += channels.shape[1]
        progress()
    if wanted and not all(counts.values()):
        raise DataError("There are no data to correct biases with. Give at least one sample.")
    means = {name: total / counts[name] for name, total in sums.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise DataError(f"'{name}' is not finite on the data. Check --mean and --scale.")
    return means
