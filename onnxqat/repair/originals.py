"""The biases that a repair changed, as they were before.

With them the model computes what the user's does: absorption and bias correction change biases
alone. A model that remembers the old ones can still be the teacher of its own fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import Model, constant
from onnxqat.preparation.editing import constant_values

__all__ = ["note_originals", "original"]

KEY = "onnxqat.originals"
STORED = np.dtype("<f4")


def note_originals(before: Model, after: Model) -> None:
    """Store in the metadata of a model what it changed of its small constants.

    Parameters
    ----------
    before, after : Model
        The same nodes by name. What ``after`` remembers from earlier changes stays.
    """
    nodes = {node.name: node for node in before.graph.nodes}
    found = {}
    for node in after.graph.nodes:
        for old, new in _changed(nodes[node.name], node):
            found[str(new.name)] = old.astype(STORED).tobytes()
    stored = found | _stored(after)
    if stored:
        after.metadata[KEY] = msgspec.json.encode(stored, order="deterministic").decode()


def _changed(before: gs.Node, after: gs.Node) -> Iterator[tuple[NDArray[np.float32], gs.Tensor]]:
    """Yield the old values, of the new shape, of each constant of a node that is another one now.

    A constant that was not there was zero.
    """
    for index, tensor in enumerate(after.inputs):
        there = before.inputs[index] if index < len(before.inputs) else None
        if _is_shared(there, tensor):
            continue
        new, old = constant_values(tensor), None if there is None else constant_values(there)
        if new is None or new.dtype != np.float32:
            continue
        values = np.zeros_like(new) if old is None else np.broadcast_to(old, new.shape)
        if not np.array_equal(values, new):
            yield values, tensor


def _is_shared(one: gs.Tensor | None, other: gs.Tensor) -> bool:
    """Whether both are constants with the same stored values, which need not be read."""
    if not isinstance(one, gs.Constant) or not isinstance(other, gs.Constant):
        return False
    return one._values is other._values


def original(model: Model) -> Model:
    """Return a model with the biases that it had before repair; itself, where none was changed."""
    stored, tensors = _stored(model), model.graph.tensors()
    known = {name: values for name, values in stored.items() if _fits(tensors.get(name), values)}
    if not known:
        return model
    result = model.copy()
    for node in result.graph.nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor.name in known:
                values = np.frombuffer(known[tensor.name], STORED).astype(np.float32)
                node.inputs[index] = constant(tensor.name, values.reshape(tensor.shape))
    return result


def _fits(tensor: gs.Tensor | None, stored: bytes) -> bool:
    values = None if tensor is None else constant_values(tensor)
    return values is not None and values.dtype == np.float32 and values.nbytes == len(stored)


def _stored(model: Model) -> dict[str, bytes]:
    """Return the old values by name; nothing where they cannot be read."""
    try:
        return msgspec.json.decode(model.metadata.get(KEY, "{}"), type=dict[str, bytes])
    except msgspec.MsgspecError:
        return {}
