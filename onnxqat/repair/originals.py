"""Store the biases that a repair changed, as they were before.

Absorption and bias correction change only biases. With the old biases the model computes the same
as the user's model, so it can still be the teacher of its own fine-tuning.
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
    """Store the old values of changed small constants in the metadata of ``after``.

    Parameters
    ----------
    before, after : Model
        Two models with the same node names. Values already stored in ``after`` stay.
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
    """Yield the old values of each changed constant of a node, in the new shape, and its tensor.

    A constant that did not exist before counts as zero.
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
    """Whether both constants share the same stored values, so that they need not be loaded."""
    if not isinstance(one, gs.Constant) or not isinstance(other, gs.Constant):
        return False
    return one._values is other._values


def original(model: Model) -> Model:
    """Return a model with its biases before repair; the same object if none was changed."""
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
    """Return the old values by name; empty if they cannot be read."""
    try:
        return msgspec.json.decode(model.metadata.get(KEY, "{}"), type=dict[str, bytes])
    except msgspec.MsgspecError:
        return {}
