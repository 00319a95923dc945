"""Find the attention blocks that a compiler makes one op of.

A block has this form, with Reshape and Transpose at each ``~`` and an optional constant bias behind
each product with a weight::

    q, k, v = ~(x @ w_q), ~(y @ w_k), ~(z @ w_v)      where x is y, or y is z, or both
    output = ~(Softmax(q @ k * number) @ v) @ w_o

This is what Sophgo's compiler recognizes for the BM1684X (``ConvertMatMul2Attention`` of
sophgo/tpu-mlir lib/Dialect/Top/Transforms/ProcessorOptimize/OptimizeBM1684X.cpp): four axes, no
mask, one reader of each inner tensor, a limited size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.nodes import is_bias_add, is_constant, is_op
from onnxqat.plan.types import Edge

__all__ = ["Attention", "find_attention"]

MOVES = ("Reshape", "Transpose")
LARGEST_PART = 1024 * 128 * 4  # of the weights, for one head
LARGEST_INPUT = 2048 * 320 * 4  # of one sample


@dataclass(frozen=True)
class Attention:
    """One attention block.

    Attributes
    ----------
    projections : tuple of Node
        The MatMuls of the input with the weights of queries, keys and values.
    products : tuple of Node
        The MatMuls of queries and keys, of probabilities and values, and with the last weight.
    scale, softmax : Node
        The Mul by a number, and the Softmax.
    heads : int
        Number of heads.
    """

    projections: tuple[gs.Node, ...]
    products: tuple[gs.Node, ...]
    scale: gs.Node
    softmax: gs.Node
    heads: int


def find_attention(
    nodes: Sequence[gs.Node], readers: Mapping[str, Sequence[Edge]]
) -> list[Attention]:
    """Return the attention blocks of a graph.

    Parameters
    ----------
    nodes : sequence of Node
        All nodes of the graph.
    readers : mapping of str to sequence of Edge
        The readers of each tensor, graph outputs included.
    """
    search = _Search(readers)
    found = (search.ending_with(node) for node in nodes if _is_projection(node))
    return [attention for attention in found if attention is not None]


class _Search:
    """Follows tensors to the nodes that write them, if nothing else reads these tensors."""

    def __init__(self, readers: Mapping[str, Sequence[Edge]]) -> None:
        self.readers = readers

    def before(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """Return the node that writes a tensor, if it is one of these ops."""
        if len(tensor.inputs) != 1 or len(self.readers.get(tensor.name, ())) != 1:
            return None
        node = tensor.inputs[0]
        return node if is_op(node, *ops) else None

    def behind_moves(self, tensor: gs.Tensor) -> gs.Node | None:
        """Return the MatMul whose output, reshaped and transposed, is a tensor."""
        seen: set[str] = set()
        while (node := self.before(tensor, *MOVES)) is not None:
            seen.add(node.op)
            tensor = node.inputs[0]
        return self._product(tensor) if seen == set(MOVES) else None

    def _product(self, tensor: gs.Tensor) -> gs.Node | None:
        """Return the MatMul that writes a tensor, with or without a bias."""
        add = self.before(tensor, "Add")
        if add is not None and is_bias_add(add):
            tensor = next(t for t in add.inputs if not is_constant(t))
        return self.before(tensor, "MatMul")

    def ending_with(self, last: gs.Node) -> Attention | None:
        """Return the block that ends with a product, if there is one."""
        product = self.behind_moves(last.inputs[0])
        softmax = product and self.before(product.inputs[0], "Softmax")
        scale = softmax and self.before(softmax.inputs[0], "Mul")
        scores = scale and self.before(_scaled(scale), "MatMul")
        if not (product and softmax and scale and scores) or not _is_last_axis(softmax):
            return None
        read = (*scores.inputs, product.inputs[1])
        projections = [p for p in map(self.behind_moves, read) if p and _is_projection(p)]
        heads = _heads(product)
        if len(projections) != 3 or heads is None or not self._has_one_end(last):
            return None
        inputs = [p.inputs[0].name for p in projections]
        if inputs[0] == inputs[1] != inputs[2]:
            return None
        found = Attention(tuple(projections), (scores, product, last), scale, softmax, heads)
        return found if _is_small(found) else None

    def _has_one_end(self, last: gs.Node) -> bool:
        """Return whether the output of a block, behind its bias, has a single reader."""
        readers = self.readers.get(last.outputs[0].name, ())
        if (
            len(readers) == 1
            and last.outputs[0].outputs
            and is_bias_add(last.outputs[0].outputs[0])
        ):
            readers = self.readers.get(last.outputs[0].outputs[0].outputs[0].name, ())
        return len(readers) == 1


def _is_projection(node: gs.Node) -> bool:
    """Return whether a node is a product with a constant matrix on the right."""
    return is_op(node, "MatMul") and is_constant(node.inputs[1]) and node.inputs[1].values.ndim == 2


def _scaled(scale: gs.Node) -> gs.Tensor:
    """Return the tensor that a Mul multiplies by a number; without a number, an empty one."""
    data = [t for t in scale.inputs if not is_constant(t)]
    numbers = [t for t in scale.inputs if is_constant(t) and t.values.size == 1]
    return data[0] if len(data) == len(numbers) == 1 else gs.Variable.empty()


def _is_last_axis(softmax: gs.Node) -> bool:
    rank = len(softmax.outputs[0].shape or ())
    return rank > 0 and int(softmax.attrs.get("axis", -1)) in (-1, rank - 1)


def _heads(product: gs.Node) -> int | None:
    """Return the number of heads: the second of four axes."""
    shape = product.outputs[0].shape
    heads = shape[1] if shape and len(shape) == 4 else None
    return heads if isinstance(heads, int) and heads > 0 else None


def _is_small(attention: Attention) -> bool:
    """Return whether a block has a size that the compiler accepts."""
    widths = [p.inputs[1].values.shape[1] for p in attention.projections]
    if any(width % attention.heads for width in widths):
        return False
    queries, keys, values = (p.inputs[1].values.size for p in attention.projections)
    shape = attention.projections[0].inputs[0].shape
    sample = shape[1:] if shape and all(isinstance(n, int) for n in shape[1:]) else ()
    part = (2 * queries + keys + values) / attention.heads
    return part <= LARGEST_PART and int(np.prod(sample)) <= LARGEST_INPUT
