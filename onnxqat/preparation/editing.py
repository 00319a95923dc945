"""Reading and rewiring a graphsurgeon graph: what its own methods get wrong or leave out.

Tensors compare by name and cannot be hashed, `Graph` methods overlook what subgraphs read, and
``Constant.values`` replaces a lazily loaded array in place, also where the constant is shared
with another graph (attributes always are). Passes use these functions instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

__all__ = [
    "constant_values",
    "dtype_of",
    "names_in_subgraphs",
    "own_name",
    "pinned_names",
    "remove_nodes",
    "replace_input",
    "scalar",
    "tensor_names",
    "unique_name",
]


def constant_values(tensor: gs.Tensor) -> NDArray[Any] | None:
    """Return the values of a dense constant of numbers or booleans, else None.

    The array belongs to the graph and to its copies: it is read, never written.
    """
    if not isinstance(tensor, gs.Constant) or isinstance(tensor._values, SparseValues):
        return None
    stored = tensor._values
    values: NDArray[Any] = stored.load() if isinstance(stored, LazyValues) else stored
    # ml_dtypes calls its types floats and integers too; isbuiltin is 2 for those
    return values if values.dtype.kind in "fiub" and values.dtype.isbuiltin != 2 else None


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Return a tensor's type; None if it is not known, or one that numpy lacks (bfloat16)."""
    kind = tensor.dtype
    return None if kind is None or isinstance(kind, int) else np.dtype(kind)


def names_in_subgraphs(nodes: Iterable[gs.Node]) -> set[str]:
    """Return the names that subgraphs of these nodes read, write or list, at any depth."""
    names: set[str] = set()
    for node in nodes:
        if not any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            continue  # almost all; gs.Node.subgraphs is slow
        for subgraph in node.subgraphs(recursive=True):
            names.update(tensor.name for tensor in (*subgraph.inputs, *subgraph.outputs))
            for inner in subgraph.nodes:
                names.update(tensor.name for tensor in (*inner.inputs, *inner.outputs))
    return names - {""}


def pinned_names(graph: gs.Graph) -> set[str]:
    """Return the names that must keep their meaning: inputs, outputs, and what subgraphs read."""
    names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    return names | names_in_subgraphs(graph.nodes)


def tensor_names(graph: gs.Graph) -> set[str]:
    """Return every tensor name that is taken, at any depth."""
    return set(graph.tensors()) | names_in_subgraphs(graph.nodes)


def unique_name(wanted: str, taken: set[str]) -> str:
    """Return ``wanted``, numbered if it is taken, and add it to ``taken``."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def replace_input(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads ``old`` read ``new``."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def remove_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> int:
    """Take nodes out of the graph, the others keeping their order; return how many."""
    removed = {id(node) for node in nodes}
    kept = []
    for node in graph.nodes:
        if id(node) in removed:
            node.inputs.clear()
            node.outputs.clear()
        else:
            kept.append(node)
    graph.nodes = kept
    return len(removed)


def scalar(tensor: gs.Tensor) -> Any:
    """Return the single value of a constant, None where it is not one."""
    values = constant_values(tensor)
    return None if values is None or np.size(values) != 1 else values.reshape(())[()]


def own_name(tensor: gs.Tensor, wanted: str, pinned: set[str], taken: set[str]) -> str:
    """Return the name of what takes the place of a constant for one of its readers.

    It is the constant's own where nothing else needs that, else a new one.
    """
    shared = len(tensor.outputs) > 1 or tensor.name in pinned
    return unique_name(wanted, taken) if shared else str(tensor.name)
