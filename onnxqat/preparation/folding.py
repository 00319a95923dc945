"""Compute at once what depends on constants only, where every runtime computes the same.

::

    initializer v -> Transpose -> w ; MatMul(x, w)     =>     initializer w ; MatMul(x, w)
    x [N, 3, 8, 8] -> Shape -> Gather(1) -> c          =>     initializer c = 3

What moves values, `onnxqat.preparation.movement`, and what computes with them, `arithmetic`, is
folded where the result is exact or rounded once, so that numpy and onnxruntime agree bit for bit.
Shape of a value is folded where the graph's inputs decide it (what a file says of inner values may
be stale); Gather and Slice of a shape that is known in part, where they take known sizes only.

The result has the name of the node's output, which must not be a graph output or read in a
subgraph. How large it may be is the matter of `onnxqat.preparation.budget`. A node that cannot be
evaluated is left for the runtime to complain of.

numpy evaluates, and not onnxruntime or onnx's reference evaluator, by measurement: the 94 nodes
that a ViT exported by PyTorch folds take 8 ms here, and 25 to 50 ms as sessions of one node or in
the reference evaluator (0.27 and 0.5 ms a node). The guards for ranks, sizes and types would be
needed all the same, as a single malformed node ends onnxruntime's process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.nodes import is_op
from onnxqat.preparation.arithmetic import ARITHMETIC
from onnxqat.preparation.budget import Budget, TooLargeError
from onnxqat.preparation.editing import constant_values, pinned_names, remove_nodes
from onnxqat.preparation.movement import MOVEMENT
from onnxqat.preparation.shapes import reliable_shapes

__all__ = ["evaluate", "fold_constants", "fold_shapes"]

Array = NDArray[Any]

_EVALUATORS: dict[str, Callable[[gs.Node, list[Array | None]], Array | list[Array] | None]] = {
    **MOVEMENT,
    **ARITHMETIC,
}


def fold_constants(graph: gs.Graph, budget: Budget | None = None) -> int:
    """Replace operators on constants by their results; return how many.

    Raises
    ------
    ModelError
        The graph computes gigabytes from its constants.
    """
    pinned = pinned_names(graph)
    budget = budget or Budget(graph, graph.name)
    folded: list[gs.Node] = []
    for node in graph.nodes:
        if not is_op(node, *_EVALUATORS) or any(t.name in pinned for t in node.outputs):
            continue
        inputs = [constant_values(tensor) if tensor.name else None for tensor in node.inputs]
        if node.outputs[0].name in budget.left or any(
            v is None and t.name for v, t in zip(inputs, node.inputs, strict=True)
        ):
            continue
        try:
            results = evaluate(node, inputs)
        except TooLargeError as error:
            budget.leave(node, error.size)
            continue
        size = sum(result.nbytes for result in results)
        if len(results) == len(node.outputs) and budget.allows(node, size):
            for tensor, result in zip(node.outputs, results, strict=True):
                tensor.to_constant(np.ascontiguousarray(result).reshape(result.shape))
            folded.append(node)
    return remove_nodes(graph, folded)


def evaluate(node: gs.Node, inputs: list[Array | None]) -> list[Array]:
    """Return what a node computes; nothing where it cannot be computed, or not exactly.

    Parameters
    ----------
    node : onnx_graphsurgeon.Node
        A node whose operator is folded.
    inputs : list of array or None
        None for an input that is left out.

    Raises
    ------
    TooLargeError
        The result would be far larger than the inputs.
    """
    try:
        with np.errstate(all="ignore"):  # infinity and NaN are results like others
            results = _EVALUATORS[node.op](node, inputs)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        return []
    if results is None:
        return []
    return [np.asarray(r) for r in (results if isinstance(results, list) else [results])]


def fold_shapes(graph: gs.Graph) -> int:
    """Replace Shape, and Gather and Slice of one, where the sizes are known; return how many."""
    shapes = [node for node in graph.nodes if is_op(node, "Shape")]
    if not shapes:
        return 0
    pinned = pinned_names(graph)
    known = reliable_shapes(graph, {node.inputs[0].name for node in shapes})
    folded: list[gs.Node] = []
    for node in shapes:
        sizes = known.get(node.inputs[0].name)
        if sizes is None:
            continue
        values = np.array(sizes, dtype=object)[node.attrs.get("start", 0) : node.attrs.get("end")]
        readers = [r for r in node.outputs[0].outputs if is_op(r, "Gather", "Slice")]
        for candidate, result in [(node, values), *((r, _partial(r, values)) for r in readers)]:
            target = candidate.outputs[0]
            if target.name not in pinned and _is_known(result):
                target.to_constant(np.asarray(result, np.int64))
                folded.append(candidate)
    return remove_nodes(graph, folded)


def _partial(node: gs.Node, values: Array) -> Array | None:
    """Return what a Gather or Slice takes from the sizes."""
    inputs = [constant_values(tensor) for tensor in node.inputs[1:]]
    if any(v is None for v in inputs):
        return None
    results = evaluate(node, [values, *inputs])
    return results[0] if results else None


def _is_known(sizes: Array | None) -> bool:
    return sizes is not None and all(s is not None for s in sizes.reshape(-1).tolist())
