"""Find the channels of a float graph that can be scaled without changing what the graph computes.

Each activation is followed from the layer that writes it to the layers that read it. An operator f
with f(s * x) = s * f(x) for s > 0 (Relu, LeakyRelu, PRelu, pooling, linear Resize) keeps the scale
of each channel. An operator that moves values moves the scales with them, which is computed by
applying it to an array of channel numbers. The operands of an addition must have the same scale.
The inputs of all other operators must not be scaled.

The scales of a layer's inputs and outputs are independent: the layer's weight is multiplied by the
input scales and divided by the output scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import (
    bias_index,
    input_role,
    is_convolution,
    is_float,
    is_op,
    keeps_grid,
)
from onnxqat.operators import WEIGHTED, homogeneous, moving
from onnxqat.preparation.budget import TooLargeError
from onnxqat.preparation.editing import constant_values, pinned_names
from onnxqat.preparation.folding import evaluate
from onnxqat.repair.layers import Layer, layer_sizes
from onnxqat.repair.norms import Norm
from onnxqat.repair.sets import ChannelSets, Ids

__all__ = ["Network", "Shift", "find_channels"]

MOVING = moving("axes", "blocks", "repeats", "picks", "joins")
# The length assumed for unknown lengths; it is not 1, which would hide that axes are mixed.
BATCH, LENGTH = 2, 3
MAX_VALUES = 2**26  # larger tensors are not followed through nodes that move values


class Shift(NamedTuple):
    """A constant input of ``node`` that is added to a tensor with the channels ``ids``."""

    node: gs.Node
    position: int
    ids: Ids


@dataclass(kw_only=True, eq=False)
class Network:
    """The channels of a graph, as found by `find_channels`.

    Attributes
    ----------
    sets : ChannelSets
        The sets of channels that share a scale.
    layers : list of Layer
        The layers, in graph order.
    shifts : list of Shift
        The constants that are added to scaled tensors.
    norms : list of (Norm, array of shape (channels,))
        The normalizations that can be scaled, and their channel numbers.
    tensors : dict of str to array
        The channel numbers of each tensor that can be scaled: an array of the tensor's rank with
        length 1 along each axis on which they do not depend, such as (1, C, 1, 1) behind a Conv.
    """

    sets: ChannelSets = field(default_factory=ChannelSets)
    layers: list[Layer] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    norms: list[tuple[Norm, Ids]] = field(default_factory=list)
    tensors: dict[str, Ids] = field(default_factory=dict)


def find_channels(graph: gs.Graph, norms: Iterable[Norm] = ()) -> Network:
    """Return the layers of a prepared float graph, and the sets of channels that share a scale.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The graph; it is not changed.
    norms : iterable of Norm
        Normalizations whose channels can also be scaled.
    """
    walk = _Walk(graph, norms)
    for node in graph.nodes:
        walk.visit(node)
    walk.finish()
    return walk.found


class _Walk:
    """Follows the channels through the nodes, in graph order."""

    def __init__(self, graph: gs.Graph, norms: Iterable[Norm]) -> None:
        self.found = Network()
        self._norms = {id(norm.node): norm for norm in norms}
        self._pinned = pinned_names(graph)

    @property
    def sets(self) -> ChannelSets:
        """The sets of channels."""
        return self.found.sets

    def visit(self, node: gs.Node) -> None:
        """Follow the channels through the next node."""
        rule = self._rule(node)
        results = rule(node) if rule else None
        if results is None:
            self._keep_inputs(node, f"'{node.name}' ({node.op}) reads it")
            return
        for tensor, ids in zip(node.outputs, results, strict=False):
            if ids is not None and _fits(tensor, ids):
                self.found.tensors[tensor.name] = ids
            elif ids is not None:
                self.sets.fix(ids, f"the channels of '{tensor.name}' are unknown")

    def finish(self) -> None:
        """Fix the scales of graph outputs and of tensors that subgraphs read."""
        for name, ids in self.found.tensors.items():
            if name in self._pinned:
                self.sets.fix(ids, f"'{name}' is an output of the model, or a subgraph reads it")

    def _rule(self, node: gs.Node) -> Callable[[gs.Node], list[Ids | None] | None] | None:
        if id(node) in self._norms:
            return self._normalized
        rules: tuple[tuple[tuple[str, ...], Callable[[gs.Node], Any]], ...] = (
            (WEIGHTED, self._layer),
            (homogeneous("values"), self._same),
            (homogeneous("windows"), self._pooled),
            (homogeneous("axes"), self._reduced),
            (homogeneous("operands"), self._summed),
            (moving("fills"), self._filled),
            (("Mul", "Div"), self._multiplied),
            (("Clip",), self._clipped),
            (MOVING, self._moved),
        )
        return next((rule for ops, rule in rules if is_op(node, *ops)), None)

    def _keep_inputs(self, node: gs.Node, reason: str) -> None:
        for tensor in node.inputs:
            if tensor.name in self.found.tensors:
                self.sets.fix(self.found.tensors[tensor.name], reason)

    def _of(self, tensor: gs.Tensor) -> Ids | None:
        return self.found.tensors.get(tensor.name)

    def _layer(self, node: gs.Node) -> list[Ids | None]:
        sizes = layer_sizes(node)
        rank = len(node.outputs[0].shape or ())
        axis = 1 if is_convolution(node) else rank - 1
        problem = self._problem(node)
        if sizes is None or problem or not 1 <= axis < rank:
            self._keep_inputs(node, problem or f"'{node.name}' ({node.op}) has no weight to scale")
            return [None]
        groups, inputs, outputs = sizes
        layer = Layer(
            node=node,
            inputs=self._incoming(node, axis, groups * inputs).reshape(groups, inputs),
            outputs=self.sets.new(groups * outputs).reshape(groups, outputs),
        )
        self.found.layers.append(layer)
        return [layer.outputs.reshape(_spread(rank, axis))]

    def _normalized(self, node: gs.Node) -> list[Ids | None]:
        norm = self._norms[id(node)]
        ids = self.sets.new(norm.channels)
        self._keep_inputs(node, f"'{norm.name}' normalizes it")
        self.found.norms.append((norm, ids))
        rank = len(node.outputs[0].shape)
        return [ids.reshape(_spread(rank, rank - 1))]

    def _incoming(self, node: gs.Node, axis: int, count: int) -> Ids:
        """Return the channel numbers of a layer's input."""
        tensor = node.inputs[0]
        ids = self._of(tensor)
        if ids is not None:
            if ids.shape[axis : axis + 1] == (ids.size,) and ids.size in (1, count):
                return np.broadcast_to(ids.reshape(-1), count)  # one channel has one number
            self.sets.fix(ids, f"'{node.name}' ({node.op}) sums over another axis")
        fresh = self.sets.new(count)
        self.sets.fix(fresh, f"'{tensor.name}' is not computed by a layer that can be scaled")
        return fresh

    def _problem(self, node: gs.Node) -> str | None:
        """Return why a layer cannot be scaled, or None."""
        if not node.outputs[0].shape:
            return f"the shape of the output of '{node.name}' is unknown"
        if len(node.inputs[1].outputs) > 1:
            return f"other nodes also read the weight of '{node.name}'"
        if {t.name for t in node.inputs[1:]} & self._pinned:
            return f"a graph output or a subgraph reads the weight or bias of '{node.name}'"
        index = bias_index(node)
        bias = node.inputs[index] if index is not None and len(node.inputs) > index else None
        if bias is not None and bias.name and constant_values(bias) is None:
            return f"the bias of '{node.name}' is computed"
        return None

    def _same(self, node: gs.Node) -> list[Ids | None]:
        return [self._of(node.inputs[0])]

    def _pooled(self, node: gs.Node) -> list[Ids | None] | None:
        ids = self._of(node.inputs[0])
        if ids is not None and (math.prod(ids.shape[2:]) > 1 or len(node.outputs) > 1):
            return None
        return [ids]

    def _filled(self, node: gs.Node) -> list[Ids | None] | None:
        """Follow a Pad with zeros, or a Resize, that does not change the channel axis."""
        ids = self._of(node.inputs[0])
        if ids is None:
            return [None]
        axes = [axis for axis, size in enumerate(ids.shape) if size > 1]
        leaves = _pads_others if node.op == "Pad" else _resizes_others
        return [ids] if all(leaves(node, axis, ids.shape[axis]) for axis in axes) else None

    def _reduced(self, node: gs.Node) -> list[Ids | None] | None:
        ids = self._of(node.inputs[0])
        if ids is None:
            return [None]
        axes = node.attrs.get("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1].name:
            axes = constant_values(node.inputs[1])
        if axes is None or not len(axes):
            return None
        reduced = tuple(sorted(int(axis) % ids.ndim for axis in axes))
        if any(ids.shape[axis] > 1 for axis in reduced):
            return None
        return [ids if node.attrs.get("keepdims", 1) else np.squeeze(ids, reduced)]

    def _summed(self, node: gs.Node) -> list[Ids | None] | None:
        """Give all operands of an addition the same scales."""
        found = [self._of(t) for t in node.inputs if constant_values(t) is None]
        known = [ids for ids in found if ids is not None]
        rank = len(node.outputs[0].shape or ())
        if not known:
            return [None]
        if len(known) < len(found) or not rank:
            return None
        known = [_of_rank(ids, rank) for ids in known]
        ids = np.broadcast_arrays(*known)[0]
        constants = [(i, constant_values(tensor)) for i, tensor in enumerate(node.inputs)]
        shifts = [Shift(node, i, ids) for i, v in constants if v is not None and v.any()]
        if shifts and (not is_op(node, "Add", "Sub") or not is_float(node.outputs[0])):
            return None  # a constant limit would also have to be scaled
        self.found.shifts += shifts
        for other in known:
            self.sets.join(ids, np.broadcast_to(other, ids.shape))
        return [ids]

    def _multiplied(self, node: gs.Node) -> list[Ids | None] | None:
        """Pass on the scales of one factor; the other factor must not be scaled."""
        known = [self._of(tensor) for tensor in node.inputs]
        found = [ids for ids in known if ids is not None]
        rank = len(node.outputs[0].shape or ())
        if not found:
            return [None]
        if len(found) > 1 or not rank or (is_op(node, "Div") and known[0] is None):
            return None
        return [_of_rank(found[0], rank)]

    def _clipped(self, node: gs.Node) -> list[Ids | None]:
        """Fix the scales of the channels before and behind a Clip."""
        reason = f"'{node.name}' (Clip) reads it, and its limits are not scaled"
        self._keep_inputs(node, reason)
        return [self._of(node.inputs[0])]

    def _moved(self, node: gs.Node) -> list[Ids | None] | None:
        """Move the channel numbers in the same way as the node moves values."""
        data = [i for i in range(len(node.inputs)) if input_role(node, i) == "data"]
        if all(self._of(node.inputs[i]) is None for i in data):
            return [None] * len(node.outputs)
        arrays: list[Any] = []
        for index, tensor in enumerate(node.inputs):
            arrays.append(self._numbered(tensor) if index in data else constant_values(tensor))
            if arrays[-1] is None and tensor.name:
                return None
        try:
            results = evaluate(node, arrays)
        except TooLargeError:
            return None
        if len(results) != len(node.outputs) or not all(map(_has_shape, node.outputs, results)):
            return None
        return [_compressed(numbers) for numbers in results]

    def _numbered(self, tensor: gs.Tensor) -> Ids | None:
        """Return an array of a tensor's shape with the channel number of each value."""
        ids, shape = self._of(tensor), tensor.shape
        if shape is None:
            return None
        sizes = [n if isinstance(n, int) else LENGTH if i else BATCH for i, n in enumerate(shape)]
        if math.prod(sizes) > MAX_VALUES:
            return None
        if ids is None:
            ids = self.sets.new(1)
            self.sets.fix(ids, f"'{tensor.name}' is not computed by a layer that can be scaled")
        return np.broadcast_to(ids, sizes)


def _spread(rank: int, axis: int) -> list[int]:
    """Return a shape of this rank with length -1 along one axis and 1 along the others."""
    return [-1 if i == axis else 1 for i in range(rank)]


def _of_rank(ids: Ids, rank: int) -> Ids:
    """Return an array of this rank, with axes of length 1 in front as in broadcasting."""
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def _fits(tensor: gs.Tensor, ids: Ids) -> bool:
    """Return whether the channel numbers are known to fit a tensor's shape."""
    shape = tensor.shape
    return (
        shape is not None
        and len(shape) == ids.ndim
        and all(n in (1, size) for n, size in zip(ids.shape, shape, strict=True))
    )


def _has_shape(tensor: gs.Tensor, values: NDArray[Any]) -> bool:
    """Return whether the shape of values agrees with the known lengths of a tensor."""
    shape = tensor.shape
    return (
        shape is not None
        and len(shape) == values.ndim
        and all(
            not isinstance(n, int) or n == size for n, size in zip(shape, values.shape, strict=True)
        )
    )


def _compressed(numbers: Ids) -> Ids:
    """Return an array reduced to length 1 along each axis on which it does not depend."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if np.array_equal(np.broadcast_to(first, numbers.shape), numbers):
            numbers = first
    return numbers


def _pads_others(node: gs.Node, axis: int, _: int) -> bool:
    """Return whether a Pad adds zeros, or copies of values, on other axes only."""
    pads = constant_values(node.inputs[1]) if len(node.inputs) > 1 else None
    some_axes = len(node.inputs) > 3 and node.inputs[3].name
    if pads is None or some_axes or not keeps_grid(node):
        return False
    both = pads.reshape(2, -1)
    return bool(both.shape[1] > axis and not both[:, axis].any())


def _resizes_others(node: gs.Node, axis: int, count: int) -> bool:
    """Return whether a Resize does not change this axis, of length ``count``."""
    crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops or "axes" in node.attrs:
        return False
    values = [constant_values(t) if t.name else None for t in node.inputs[2:4]]
    scales, sizes = (*values, None, None)[:2]
    if scales is not None and scales.size > axis:
        return bool(scales[axis] == 1)
    aspect = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    return sizes is not None and aspect == "stretch" and bool(sizes[axis] == count)
