"""Fold nodes that depend on constants only, where all runtimes compute the same result.

::

    initializer v -> Transpose -> w ; MatMul(x, w)     =>     initializer w ; MatMul(x, w)
    x [N, 3, 8, 8] -> Shape -> Gather(1) -> c          =>     initializer c = 3

Operators that move values (`onnxqat.preparation.movement`) or compute with them (`arithmetic`) are
folded if the result is exact or rounded once, so that numpy and onnxruntime agree bit for bit. A
Shape is folded if the graph's inputs determine it (shapes that the file states for inner values may
be stale). Gather and Slice of a partly known shape are folded if they select known sizes only.

The result gets the name of the node's output, which must not be a graph output or be read in a
subgraph. `onnxqat.preparation.budget` limits its size. A node that cannot be evaluated stays, and
the runtime reports its error.

numpy evaluates the nodes because it is faster: the 94 folded nodes of a ViT exported by PyTorch
take 8 ms, but 25 to 50 ms in onnxruntime sessions of one node each or in onnx's reference evaluator
(0.27 and 0.5 ms per node). onnxruntime would need the same checks of ranks, sizes and types, since
a malformed node crashes its process.
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
    """Replace nodes that read only constants by their results; return their number.

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
    """Return the outputs of a node; an empty list if they cannot be computed exactly.

    Parameters
    ----------
    node : onnx_graphsurgeon.Node
        A node whose operator can be folded.
    inputs : list of array or None
        The values of its inputs; None for an absent input.

    Raises
    ------
    TooLargeError
        The result would be far larger than the inputs.
    """
    try:
        with np.errstate(all="ignore"):  # infinity and NaN are valid results
            results = _EVALUATORS[node.op](node, inputs)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        return []
    if results is None:
        return []
    return [np.asarray(r) for r in (results if isinstance(results, list) else [results])]


def fold_shapes(graph: gs.Graph) -> int:
    """Fold Shape, and Gather and Slice of its result, if the sizes are known; return the number."""
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
    """Return the sizes that a Gather or Slice selects, or None if one is unknown."""
    inputs = [constant_values(tensor) for tensor in node.inputs[1:]]
    if any(v is None for v in inputs):
        return None
    results = evaluate(node, [values, *inputs])
    return results[0] if results else None


def _is_known(sizes: Array | None) -> bool:
    return sizes is not None and all(s is not None for s in sizes.reshape(-1).tolist())
