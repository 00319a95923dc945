"""Read the statistics of the training data from the first BatchNormalization of a network.

See `onnxqat.preparation.distributions`. A few channels of this one tensor are enough to tell
whether data are preprocessed as they were in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.preparation.batchnorm import read_statistics
from onnxqat.preparation.constants import lift_constants
from onnxqat.preparation.distributions import remembered
from onnxqat.preparation.order import sort_nodes

__all__ = [
    "Statistics",
    "divide_statistics",
    "find_statistics",
    "note_statistics",
    "statistics_of",
]

KEY = "onnxqat.statistics"
MAX_CHANNELS = 256
# A channel is ignored if its variance, relative to the others', is smaller than this.
DEAD = 1e-4


class Statistics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean and standard deviation of some channels (axis 1) of a tensor.

    Attributes
    ----------
    tensor : str
        The tensor's name.
    channels : tuple of int
        Indices of the described channels; constant channels are left out.
    mean, deviation : tuple of float
        One value for each described channel.
    """

    version: Literal[1] = 1
    tensor: str
    channels: tuple[int, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.channels), len(self.mean), len(self.deviation)}
        if len(sizes) != 1 or 0 in sizes or min(self.channels) < 0 or min(self.deviation) <= 0:
            raise ValueError("it does not describe channels")


def find_statistics(graph: gs.Graph) -> Statistics | None:
    """Return the statistics of the first BatchNormalization behind an input, if there is one.

    Returns None also for mean 0 and variance 1, the values before training.
    """
    reached = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        if not any(tensor.name in reached for tensor in node.inputs):
            continue
        reached.update(tensor.name for tensor in node.outputs)
        if is_op(node, "BatchNormalization"):
            return _remembered(node)
    return None


def _remembered(node: gs.Node) -> Statistics | None:
    read, known = read_statistics(node), remembered(node)
    if read is None or known is None or node.inputs[0].name == "":
        return None
    (mean, deviation), variance = known, read[3]
    alive = (variance > DEAD * np.median(variance)) & (deviation > 0)
    channels = np.flatnonzero(alive)
    channels = channels[:: -(-channels.size // MAX_CHANNELS) or 1]
    values = (np.asarray(a[channels], np.float32).tolist() for a in (mean, deviation))
    found_mean, found_deviation = values
    if not channels.size or not np.isfinite([*found_mean, *found_deviation]).all():
        return None
    return Statistics(
        tensor=node.outputs[0].name,
        channels=tuple(channels.tolist()),
        mean=tuple(found_mean),
        deviation=tuple(found_deviation),
    )


def note_statistics(model: Model, found: Statistics | None) -> None:
    """Store the statistics in the metadata, if the model still has the tensor."""
    if found is not None and found.tensor in model.graph.tensors():
        model.metadata[KEY] = msgspec.json.encode(found, order="deterministic").decode()


def divide_statistics(model: Model, scales: Mapping[str, NDArray[np.float64]]) -> None:
    """Adapt the stored statistics to channels that were divided by scales.

    Parameters
    ----------
    scales : mapping of str to array of shape (channels,)
        The divisors of the channels, by tensor.
    """
    found = statistics_of(model) if KEY in model.metadata else None
    if found is None or found.tensor not in scales:
        return
    divisors = scales[found.tensor][list(found.channels)]
    divided = msgspec.structs.replace(
        found,
        mean=tuple((np.array(found.mean) / divisors).tolist()),
        deviation=tuple((np.array(found.deviation) / divisors).tolist()),
    )
    note_statistics(model, divided)


def statistics_of(model: Model, *, in_place: bool = False) -> Statistics | None:
    """Return the statistics stored in the metadata or, without these, read from the graph.

    Stored statistics that cannot be read are ignored, because they only serve warnings.

    Parameters
    ----------
    in_place : bool
        Whether the model's own nodes may be sorted and its Constants made initializers.
    """
    if KEY in model.metadata:
        try:
            return msgspec.json.decode(model.metadata[KEY], type=Statistics)
        except msgspec.MsgspecError:
            return None
    graph = (model if in_place else model.copy()).graph
    sort_nodes(graph)
    lift_constants(graph)
    return find_statistics(graph)
