"""Limit the memory of the constants that folding creates.

A file of 2 KB can compute terabytes from its constants: by concatenating a tensor with itself
repeatedly, by a Range to 10^11, or by sixty Expands to 64 MB. The size of a result is known before
it is computed. The size of inputs that nothing else reads is subtracted, because folding removes
them; an input that the node reads twice is subtracted once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError

__all__ = ["Budget", "TooLargeError", "check_growth"]

MAX_GROWTH = 2**26  # bytes by which one result may exceed its inputs
SMALL = 2**12  # bytes; smaller results are computed even if the budget is used up
LEAST_ROOM = 2**28  # bytes that all results together may add to a small model
MAX_CONSTANTS = 2**31  # bytes of all constants up to which a large model may grow to double size
# Bytes of unfolded constants that may be left to the runtime, which needs memory for them, too.
MAX_LEFT = 2**31


class TooLargeError(Exception):
    """A result would be too large; ``size`` is its size in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def check_growth(size: int, inputs: Iterable[NDArray[Any]]) -> None:
    """Raise `TooLargeError` if a result is more than `MAX_GROWTH` larger than its inputs."""
    distinct = {id(values): values.nbytes for values in inputs}
    if size > MAX_GROWTH + sum(distinct.values()):
        raise TooLargeError(size)


class Budget:
    """Counts the bytes that folded constants add during one preparation.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        The graph before preparation.
    where : str
        The beginning of each message, such as the file's path.
    """

    def __init__(self, graph: gs.Graph, where: str) -> None:
        constants = sum(
            t._values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant)
        )
        self.where = where
        self.room = max(LEAST_ROOM, min(constants, MAX_CONSTANTS - constants))
        self.left: dict[str, int] = {}  # bytes of unfolded results, by the node's first output

    def allows(self, node: gs.Node, size: int) -> bool:
        """Return whether the results of a node (``size`` bytes) fit, and count them if so.

        Raises
        ------
        ModelError
            The results that did not fit exceed `MAX_LEFT` in total.
        """
        freed = {t.name: t._values.nbytes for t in node.inputs if _read_once(t, node)}
        growth = size - sum(freed.values())
        read = {t.name: t._values.nbytes for t in node.inputs if isinstance(t, gs.Constant)}
        fits = growth <= self.room and size - sum(read.values()) <= MAX_GROWTH
        if fits or size <= SMALL:
            self.room -= max(growth, 0)
            return True
        self.leave(node, size)
        return False

    def leave(self, node: gs.Node, size: int) -> None:
        """Record that a node is not folded because its results are too large."""
        self.left[node.outputs[0].name] = size
        total = sum(self.left.values())
        if total > MAX_LEFT:
            raise ModelError(
                f"{self.where}: node '{node.name or node.outputs[0].name}' ({node.op}) computes "
                f"{size} bytes from constants, and all such nodes {total}. Export it with smaller "
                "constants."
            )


def _read_once(tensor: gs.Tensor, node: gs.Node) -> bool:
    return isinstance(tensor, gs.Constant) and all(reader is node for reader in tensor.outputs)
