"""Read and rewire a graphsurgeon graph where its own methods are wrong or missing.

graphsurgeon tensors compare by name and cannot be hashed, its `Graph` methods ignore values that
subgraphs read, and ``Constant.values`` replaces a lazily loaded array in place even if another
graph shares the constant (attributes are always shared). Passes use these functions instead.
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
    """Return the values of a dense constant of numbers or booleans; otherwise None.

    The graph and its copies share the array: do not write to it.
    """
    if not isinstance(tensor, gs.Constant) or isinstance(tensor._values, SparseValues):
        return None
    stored = tensor._values
    values: NDArray[Any] = stored.load() if isinstance(stored, LazyValues) else stored
    # ml_dtypes registers its types as floats and integers; their isbuiltin is 2
    return values if values.dtype.kind in "fiub" and values.dtype.isbuiltin != 2 else None


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Return a tensor's type, or None if it is unknown or numpy lacks it (bfloat16)."""
    kind = tensor.dtype
    return None if kind is None or isinstance(kind, int) else np.dtype(kind)


def names_in_subgraphs(nodes: Iterable[gs.Node]) -> set[str]:
    """Return the names that occur in the subgraphs of these nodes, at any depth."""
    names: set[str] = set()
    for node in nodes:
        if not any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            continue  # the usual case; gs.Node.subgraphs is slow
        for subgraph in node.subgraphs(recursive=True):
            names.update(tensor.name for tensor in (*subgraph.inputs, *subgraph.outputs))
            for inner in subgraph.nodes:
                names.update(tensor.name for tensor in (*inner.inputs, *inner.outputs))
    return names - {""}


def pinned_names(graph: gs.Graph) -> set[str]:
    """Return the names that must keep their meaning: inputs, outputs and names in subgraphs."""
    names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    return names | names_in_subgraphs(graph.nodes)


def tensor_names(graph: gs.Graph) -> set[str]:
    """Return all tensor names in use, at any depth."""
    return set(graph.tensors()) | names_in_subgraphs(graph.nodes)


def unique_name(wanted: str, taken: set[str]) -> str:
    """Return ``wanted``, with a number appended if it is taken, and add it to ``taken``."""
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def replace_input(old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every node that reads ``old`` read ``new`` instead."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def remove_nodes(graph: gs.Graph, nodes: Iterable[gs.Node]) -> int:
    """Remove nodes from the graph, keeping the order of the others; return their number."""
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
    """Return the single value of a constant, or None if there is not exactly one."""
    values = constant_values(tensor)
    return None if values is None or np.size(values) != 1 else values.reshape(())[()]


def own_name(tensor: gs.Tensor, wanted: str, pinned: set[str], taken: set[str]) -> str:
    """Return the name for a tensor that replaces a constant for one of its readers.

    It is the constant's name if nothing else uses that; otherwise a new name.
    """
    shared = len(tensor.outputs) > 1 or tensor.name in pinned
    return unique_name(wanted, taken) if shared else str(tensor.name)
