"""Compute the mean of tensors' channels over the training data from BatchNormalization statistics.

The output of a BatchNormalization is assumed to be normally distributed, with the stored mean and
deviation. Behind a function that clips it,

::

    f(y) = slope * y for y < 0,  y for 0 <= y < high,  high for y >= high

the mean follows from the partial expectations of a normal distribution (Nagel et al. 2019,
arXiv:1906.04721, section 4.2.1 and appendix C). Averages and operators that move values keep the
mean, and additions add means. Padded zeros are not counted, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import data_inputs, is_op
from onnxqat.operators import moving
from onnxqat.preparation.distributions import Distribution
from onnxqat.preparation.editing import constant_values, scalar
from onnxqat.repair.channels import Network
from onnxqat.repair.layers import Layer

__all__ = ["Expectations", "clipped_mean"]

Floats = NDArray[np.float64]

AVERAGING = ("AveragePool", "GlobalAveragePool", "ReduceMean")
KEEPING = moving("axes", "blocks", "repeats", "picks", "joins")


def clipped_mean(
    one: Distribution, *, low: float = 0.0, high: float = math.inf, slope: Floats | float = 0.0
) -> Floats:
    """Return the mean of clipped normal distributions.

    Parameters
    ----------
    one : Distribution
        The distribution before the function.
    low, high : float
        The function is ``low + slope * (y - low)`` below ``low`` and ``high`` above ``high``.
    slope : array of shape (channels,) or float
        The slope below ``low``.
    """
    spread = np.maximum(one.deviation, np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):  # both are very large for a constant channel
        below, above = (low - one.mean) / spread, (high - one.mean) / spread
    under, over = _cumulative(below), 1 - _cumulative(above)
    inside = one.mean * (1 - under - over) + spread * (_density(below) - _density(above))
    left = one.mean * under - spread * _density(below)  # E[y; y < low]
    return np.asarray(low * under + slope * (left - low * under) + inside + _times(high, over))


def _times(high: float, over: Floats) -> Floats | float:
    return high * over if math.isfinite(high) else 0.0


def _cumulative(x: Floats) -> Floats:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.reshape(-1)])


def _density(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi))


class Expectations:
    """The means of the input channels of the layers in a float graph.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        A prepared graph.
    network : Network
        The channels of the graph.
    known : mapping of str to Distribution
        The distributions from BatchNormalization statistics, by tensor.
    """

    def __init__(
        self, graph: gs.Graph, network: Network, known: Mapping[str, Distribution]
    ) -> None:
        self._network = network
        self._normal = dict(known)
        self._means = {name: one.mean for name, one in known.items()}  # along axis 1
        for node in graph.nodes:
            name = str(node.outputs[0].name) if node.outputs else ""
            mean = None if name in self._means else self._mean_behind(node)
            if mean is not None:
                self._means[name] = mean

    def read_by(self, layer: Layer) -> Floats | None:
        """Return the mean of each input channel, in the shape of ``layer.inputs``, if known."""
        channels: dict[int, float] = {}
        for tensor in self._sources(layer.node.inputs[0]):
            ids = None if tensor is None else self._network.tensors.get(tensor)
            if tensor is None or ids is None or ids.size != self._means[tensor].size:
                return None
            for channel, mean in zip(ids.reshape(-1).tolist(), self._means[tensor], strict=True):
                if channels.setdefault(channel, float(mean)) != float(mean):
                    return None  # the channel is read both before and behind a function
        wanted = layer.inputs.reshape(-1).tolist()
        if not all(channel in channels for channel in wanted):
            return None
        return np.array([channels[channel] for channel in wanted]).reshape(layer.inputs.shape)

    def _mean_behind(self, node: gs.Node) -> Floats | None:
        names = [str(tensor.name) for tensor in node.inputs]
        if is_op(node, "Add", "Sum") and all(name in self._means for name in names):
            means = [self._means[name] for name in names]
            same = len({mean.size for mean in means}) == 1
            return np.sum(means, axis=0) if same else None
        normal = self._normal.get(names[0]) if names else None
        return None if normal is None else _behind_function(node, normal)

    def _sources(self, tensor: gs.Tensor) -> Iterator[str | None]:
        """Yield the tensors with a known mean that a tensor consists of; None for other parts."""
        waiting, seen = [tensor], {str(tensor.name)}
        while waiting:
            tensor = waiting.pop()
            if tensor.name in self._means:
                yield str(tensor.name)
                continue
            node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
            if node is None or not (is_op(node, *KEEPING) or _averages(node)):
                yield None
                return
            before = [one for one in data_inputs(node) if one.name not in seen]
            seen.update(str(one.name) for one in before)
            waiting += before


def _averages(node: gs.Node) -> bool:
    return is_op(node, *AVERAGING) and not any(node.attrs.get("pads", ()))


def _behind_function(node: gs.Node, normal: Distribution) -> Floats | None:
    """Return the mean behind an activation function, if the function clips."""
    if is_op(node, "Relu"):
        return clipped_mean(normal)
    if is_op(node, "LeakyRelu"):
        return clipped_mean(normal, slope=float(node.attrs.get("alpha", 0.01)))
    if is_op(node, "PRelu"):
        slope = constant_values(node.inputs[1])
        if slope is None or slope.size not in (1, normal.mean.size):
            return None
        return clipped_mean(normal, slope=slope.reshape(-1).astype(np.float64))
    if is_op(node, "Clip"):
        limits = [scalar(tensor) for tensor in node.inputs[1:3]]
        if len(limits) == 2 and None not in limits and limits[0] <= limits[1]:
            return clipped_mean(normal, low=float(limits[0]), high=float(limits[1]))
    return None
