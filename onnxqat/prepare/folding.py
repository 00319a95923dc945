"""Compute at once what depends on constants only, where every runtime computes the same.

::

    initializer v -> Transpose -> w ; MatMul(x, w)     =>     initializer w ; MatMul(x, w)
    x [N, 3, 8, 8] -> Shape -> Gather(1) -> c          =>     initializer c = 3

What moves values, `onnxqat.prepare.movement`, and what computes with them, `arithmetic`, is folded
where the result is exact or rounded once, so that numpy and onnxruntime agree bit for bit. Shape of
a value is folded where the graph's inputs decide it (what a file says of inner values may be
stale); Gather and Slice of a shape that is known in part, where they take known sizes only.

The result has the name of the node's output, which must not be a graph output or read in a
subgraph. It is at most 64 MiB larger than what it is computed from, and 4 KiB where the graph's
constants make 2 GiB already. A node that cannot be evaluated is left for the runtime to complain
of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.prepare.arithmetic import ARITHMETIC
from onnxqat.prepare.editing import constant_values, is_op, pinned_names, remove_nodes
from onnxqat.prepare.movement import MOVEMENT
from onnxqat.prepare.shapes import reliable_shapes

__all__ = ["fold_constants", "fold_shapes"]

Array = NDArray[Any]

MAX_GROWTH = 2**26  # bytes of one result, beyond those of its inputs
SMALL_GROWTH = 2**12
MAX_CONSTANTS = 2**31  # bytes of all constants, beyond which results may grow by little only
_EVALUATORS: dict[str, Callable[[gs.Node, list[Array | None]], Array | list[Array] | None]] = {
    **MOVEMENT,
    **ARITHMETIC,
}


def fold_constants(graph: gs.Graph) -> int:
    """Replace operators on constants by their results; return how many."""
    pinned = pinned_names(graph)
    room = MAX_CONSTANTS - sum(
        t._values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant)
    )
    folded: list[gs.Node] = []
    for node in graph.nodes:
        if not is_op(node, *_EVALUATORS) or any(t.name in pinned for t in node.outputs):
            continue
        inputs = [constant_values(tensor) if tensor.name else None for tensor in node.inputs]
        if any(v is None and t.name for v, t in zip(inputs, node.inputs, strict=True)):
            continue
        results = _evaluate(node, inputs)
        growth = sum(r.nbytes for r in results) - sum(v.nbytes for v in inputs if v is not None)
        if len(results) == len(node.outputs) and growth <= (
            MAX_GROWTH if room > 0 else SMALL_GROWTH
        ):
            room -= sum(result.nbytes for result in results)
            for tensor, result in zip(node.outputs, results, strict=True):
                tensor.to_constant(np.ascontiguousarray(result).reshape(result.shape))
            folded.append(node)
    return remove_nodes(graph, folded)


def _evaluate(node: gs.Node, inputs: list[Array | None]) -> list[Array]:
    """Return the outputs; none where the node is left alone."""
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
    results = _evaluate(node, [values, *inputs])
    return results[0] if results else None


def _is_known(sizes: Array | None) -> bool:
    return sizes is not None and all(s is not None for s in sizes.reshape(-1).tolist())
