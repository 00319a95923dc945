"""Read the distribution of a tensor's channels over the training data from BatchNormalizations.

::

    y = scale * (x - mean) / sqrt(var + epsilon) + B

Over the training data of a BatchNormalization, each channel of y has the mean B and the standard
deviation ``|scale| * sqrt(var / (var + epsilon))``. When it is folded into a layer, the layer's
output gets the name of y, so that the distribution of y applies to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import Model
from onnxqat.nodes import is_op
from onnxqat.preparation.batchnorm import read_statistics

__all__ = [
    "Distribution",
    "distributions_of",
    "find_distributions",
    "note_distributions",
    "remembered",
]

KEY = "onnxqat.distributions"
STORED = np.dtype("<f4")


class Distribution(NamedTuple):
    """Mean and standard deviation of the channels of a tensor, each float64 of shape (channels,).

    The channels are along axis 1.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


class _Stored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `Distribution` as float32, little-endian."""

    mean: bytes
    deviation: bytes


def remembered(node: gs.Node) -> Distribution | None:
    """Return the distribution of a BatchNormalization's output.

    Returns None if it is unknown, also for mean 0 and variance 1, the values before training.
    """
    read = read_statistics(node)
    if read is None:
        return None
    scale, bias, mean, variance, epsilon = read
    if not np.any(mean) and np.all(variance == 1):
        return None
    return Distribution(bias, np.abs(scale) * np.sqrt(variance / (variance + epsilon)))


def find_distributions(graph: gs.Graph) -> dict[str, Distribution]:
    """Return the distribution of each BatchNormalization's output, by the name of the tensor.

    The graph must have no Constant nodes.
    """
    found = {}
    for node in graph.nodes:
        distribution = remembered(node) if is_op(node, "BatchNormalization") else None
        if distribution is not None and np.isfinite(distribution).all():
            found[str(node.outputs[0].name)] = distribution
    return found


def note_distributions(model: Model, found: Mapping[str, Distribution]) -> None:
    """Store in the metadata the distributions of those tensors that the model still has."""
    tensors = model.graph.tensors()
    stored = {
        name: _Stored(mean=_bytes(one.mean), deviation=_bytes(one.deviation))
        for name, one in found.items()
        if name in tensors
    }
    model.metadata.pop(KEY, None)
    if stored:
        model.metadata[KEY] = msgspec.json.encode(stored, order="deterministic").decode()


def distributions_of(model: Model) -> dict[str, Distribution]:
    """Return the stored distributions, by tensor; empty if they cannot be read."""
    try:
        stored = msgspec.json.decode(model.metadata.get(KEY, "{}"), type=dict[str, _Stored])
        found = {name: Distribution(*map(_floats, _fields(one))) for name, one in stored.items()}
    except (msgspec.MsgspecError, ValueError):
        return {}
    return {name: one for name, one in found.items() if _is_sound(one)}


def _fields(stored: _Stored) -> tuple[bytes, bytes]:
    return stored.mean, stored.deviation


def _bytes(values: NDArray[np.float64]) -> bytes:
    with np.errstate(over="ignore"):  # infinite values are ignored on reading
        return values.astype(STORED).tobytes()


def _floats(stored: bytes) -> NDArray[np.float64]:
    return np.frombuffer(stored, STORED).astype(np.float64)


def _is_sound(one: Distribution) -> bool:
    same_size = 0 < one.mean.size == one.deviation.size
    return bool(same_size and np.isfinite(one).all() and one.deviation.min() >= 0)
