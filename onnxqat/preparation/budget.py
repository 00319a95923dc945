"""How much memory the constants that folding makes may take, in all.

A file of 2 KB can compute terabytes from its constants: a Concat of one tensor with itself, again
and again; a Range to 10^11; sixty Expands to 64 MB. What a result takes is known before it exists,
and counts without the inputs that nothing else reads: those go. An input that is read twice by one
node is one input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import ModelError

__all__ = ["Budget", "TooLargeError", "check_growth"]

MAX_GROWTH = 2**26  # bytes of one result, beyond those of its inputs
SMALL = 2**12  # bytes of a result that is made even where the budget is used up
LEAST_ROOM = 2**28  # bytes that all results together may add to a small model
MAX_CONSTANTS = 2**31  # bytes of all constants, up to which a large model may double
# Bytes that may be left to the runtime to compute from constants: it would need them, too.
MAX_LEFT = 2**31


class TooLargeError(Exception):
    """A result would take this many bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def check_growth(size: int, inputs: Iterable[NDArray[Any]]) -> None:
    """Raise `TooLargeError` for a result that is far larger than what it is computed from."""
    distinct = {id(values): values.nbytes for values in inputs}
    if size > MAX_GROWTH + sum(distinct.values()):
        raise TooLargeError(size)


class Budget:
    """Counts what the results of one preparation add.

    Parameters
    ----------
    graph : onnx_graphsurgeon.Graph
        As the file has it.
    where : str
        What messages begin with.
    """

    def __init__(self, graph: gs.Graph, where: str) -> None:
        constants = sum(
            t._values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant)
        )
        self.where = where
        self.room = max(LEAST_ROOM, min(constants, MAX_CONSTANTS - constants))
        self.left: dict[str, int] = {}  # bytes of results that are not made, by the first of them

    def allows(self, node: gs.Node, size: int) -> bool:
        """Take the results of a node, of ``size`` bytes, if there is room for them.

        Raises
        ------
        ModelError
            The results for which there was none take more than `MAX_LEFT`.
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
        """Note that a node stays as it is, because its results are too large."""
        self.left[node.outputs[0].name] = size
        total = sum(self.left.values())
        if total > MAX_LEFT:
            raise ModelError(
                f"{self.where}: node '{node.name or node.outputs[0].name}' ({node.op}) makes "
                f"{size} bytes of constants, and all such nodes {total}. Export it with smaller "
                "constants."
            )


def _read_once(tensor: gs.Tensor, node: gs.Node) -> bool:
    return isinstance(tensor, gs.Constant) and all(reader is node for reader in tensor.outputs)
