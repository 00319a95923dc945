"""Which channels of a float graph can be multiplied by a number without changing what it computes.

Every activation is followed from the layer that writes it to the layers that read it. An operator f
with f(s * x) = s * f(x) for s > 0 (Relu, LeakyRelu, PRelu, pooling, linear Resize) passes the scale
of each channel on; one that moves values moves the scales with them, which is computed on an array
of channel numbers; what is added must have the same scale. All else keeps its inputs as they are.

The scales of a layer's outputs and inputs are then free of each other: the layer itself is divided
by the one and multiplied by the other.
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
# What unknown lengths are taken for; not 1, which would hide that an axis is mixed with others.
BATCH, LENGTH = 2, 3
MAX_VALUES = 2**26  # of a tensor whose channels are followed through a node that moves values


class Shift(NamedTuple):
    """A constant that is added to a tensor with the channels ``ids``: an input of ``node``."""

    node: gs.Node
    position: int
    ids: Ids


@dataclass(kw_only=True, eq=False)
class Network:
    """What `find_channels` found.

    Attributes
    ----------
    sets : ChannelSets
        Which channels share a scale.
    layers : list of Layer
        In order.
    shifts : list of Shift
        Constants that are added.
    norms : list of (Norm, array of shape (channels,))
        Normalizations that may be scaled, and the numbers of their channels.
    tensors : dict of str to array
        The channel numbers of each tensor that may have scales: an array of the tensor's rank,
        whose length is 1 along each axis on which they do not depend: (1, C, 1, 1) behind a Conv.
    """

    sets: ChannelSets = field(default_factory=ChannelSets)
    layers: list[Layer] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    norms: list[tuple[Norm, Ids]] = field(default_factory=list)
    tensors: dict[str, Ids] = field(default_factory=dict)


def find_channels(graph: gs.Graph, norms: Iterable[Norm] = ()) -> Network:
    """Return the layers of a prepared float graph, and which of their channels share a scale.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        Not changed.
    norms : iterable of Norm
        The normalizations whose channels may be scaled too.
    """
    walk = _Walk(graph, norms)
    for node in graph.nodes:
        walk.visit(node)
    walk.finish()
    return walk.found


class _Walk:
    """Follows the channels through the nodes in order."""

    def __init__(self, graph: gs.Graph, norms: Iterable[Norm]) -> None:
        self.found = Network()
        self._norms = {id(norm.node): norm for norm in norms}
        self._pinned = pinned_names(graph)

    @property
    def sets(self) -> ChannelSets:
        """The sets of channels."""
        return self.found.sets

    def visit(self, node: gs.Node) -> None:
        """Take the next node."""
        rule = self._rule(node)
        results = rule(node) if rule else None
        if results is None:
            self._keep_inputs(node, f"'{node.name}' ({node.op}) reads it")
            return
        for tensor, ids in zip(node.outputs, results, strict=False):
            if ids is not None and _fits(tensor, ids):
                self.found.tensors[tensor.name] = ids
            elif ids is not None:
                self.sets.fix(ids, f"the channels of '{tensor.name}' are not known")

    def finish(self) -> None:
        """Keep what leaves the graph, or is read where it is not followed."""
        for name, ids in self.found.tensors.items():
            if name in self._pinned:
                self.sets.fix(ids, f"'{name}' leaves the model, or a subgraph reads it")

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
        """Return the channels that a layer reads."""
        tensor = node.inputs[0]
        ids = self._of(tensor)
        if ids is not None:
            if ids.shape[axis : axis + 1] == (ids.size,) and ids.size in (1, count):
                return np.broadcast_to(ids.reshape(-1), count)  # of one channel, all are the same
            self.sets.fix(ids, f"'{node.name}' ({node.op}) sums over another axis")
        fresh = self.sets.new(count)
        self.sets.fix(fresh, f"'{tensor.name}' comes from no layer that can be scaled")
        return fresh

    def _problem(self, node: gs.Node) -> str | None:
        """Return why a layer is left alone."""
        if not node.outputs[0].shape:
            return f"the shape of what '{node.name}' writes is not known"
        if len(node.inputs[1].outputs) > 1:
            return f"other nodes read the weight of '{node.name}' too"
        if {t.name for t in node.inputs[1:]} & self._pinned:
            return f"the weight or bias of '{node.name}' is read elsewhere"
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
        """Follow a Pad with zeros or a Resize that leaves the axis of the channels alone."""
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
        """Let all that is added have the scales of one of them."""
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
            return None  # a constant limit would have to be scaled too
        self.found.shifts += shifts
        for other in known:
            self.sets.join(ids, np.broadcast_to(other, ids.shape))
        return [ids]

    def _multiplied(self, node: gs.Node) -> list[Ids | None] | None:
        """Pass on the scales of the one factor that has any; the other has none."""
        known = [self._of(tensor) for tensor in node.inputs]
        found = [ids for ids in known if ids is not None]
        rank = len(node.outputs[0].shape or ())
        if not found:
            return [None]
        if len(found) > 1 or not rank or (is_op(node, "Div") and known[0] is None):
            return None
        return [_of_rank(found[0], rank)]

    def _clipped(self, node: gs.Node) -> list[Ids | None]:
        """Keep the channels before and behind as they are."""
        reason = f"'{node.name}' (Clip) reads it (a Clip cuts at numbers that are not scaled)"
        self._keep_inputs(node, reason)
        return [self._of(node.inputs[0])]

    def _moved(self, node: gs.Node) -> list[Ids | None] | None:
        """Move channel numbers as the node moves values."""
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
        """Return an array of a tensor's shape that holds the number of each value's channel."""
        ids, shape = self._of(tensor), tensor.shape
        if shape is None:
            return None
        sizes = [n if isinstance(n, int) else LENGTH if i else BATCH for i, n in enumerate(shape)]
        if math.prod(sizes) > MAX_VALUES:
            return None
        if ids is None:
            ids = self.sets.new(1)
            self.sets.fix(ids, f"'{tensor.name}' comes from no layer that can be scaled")
        return np.broadcast_to(ids, sizes)


def _spread(rank: int, axis: int) -> list[int]:
    """Return the shape of an array of this rank whose values are along one axis."""
    return [-1 if i == axis else 1 for i in range(rank)]


def _of_rank(ids: Ids, rank: int) -> Ids:
    """Return an array with axes of length 1 in front, as broadcasting adds them."""
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def _fits(tensor: gs.Tensor, ids: Ids) -> bool:
    """Return whether a tensor is known to have channels in such an array."""
    shape = tensor.shape
    return (
        shape is not None
        and len(shape) == ids.ndim
        and all(n in (1, size) for n, size in zip(ids.shape, shape, strict=True))
    )


def _has_shape(tensor: gs.Tensor, values: NDArray[Any]) -> bool:
    """Return whether values have a tensor's shape, as far as it is known."""
    shape = tensor.shape
    return (
        shape is not None
        and len(shape) == values.ndim
        and all(
            not isinstance(n, int) or n == size for n, size in zip(shape, values.shape, strict=True)
        )
    )


def _compressed(numbers: Ids) -> Ids:
    """Return an array with length 1 along each axis on which it does not depend."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if np.array_equal(np.broadcast_to(first, numbers.shape), numbers):
            numbers = first
    return numbers


def _pads_others(node: gs.Node, axis: int, _: int) -> bool:
    """Return whether a Pad adds zeros, or values that are there, on other axes than this."""
    pads = constant_values(node.inputs[1]) if len(node.inputs) > 1 else None
    some_axes = len(node.inputs) > 3 and node.inputs[3].name
    if pads is None or some_axes or not keeps_grid(node):
        return False
    both = pads.reshape(2, -1)
    return bool(both.shape[1] > axis and not both[:, axis].any())


def _resizes_others(node: gs.Node, axis: int, count: int) -> bool:
    """Return whether a Resize leaves this axis, of length ``count``, as it is."""
    crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops or "axes" in node.attrs:
        return False
    values = [constant_values(t) if t.name else None for t in node.inputs[2:4]]
    scales, sizes = (*values, None, None)[:2]
    if scales is not None and scales.size > axis:
        return bool(scales[axis] == 1)
    aspect = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    return sizes is not None and aspect == "stretch" and bool(sizes[axis] == count)
