"""Find the values that a gradient can reach from the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import onnx
from onnx import TensorProto

__all__ = ["Links", "leading_to", "links", "other_types"]

# The names that each node of a graph reads and writes, in order.
Links: TypeAlias = Iterable[tuple[Sequence[str], Sequence[str]]]


def leading_to(ends: Iterable[str], nodes: Links, passes: Callable[[str], bool]) -> set[str]:
    """Return ``ends`` and all values that lead to them over values for which ``passes`` is true."""
    names = set(ends) - {""}  # an empty name is an absent input or output
    for inputs, outputs in reversed(list(nodes)):
        if not names.isdisjoint(outputs):
            names.update(name for name in inputs if name and passes(name))
    return names


def links(graph: onnx.GraphProto) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Yield the names that each node reads and the names that it writes."""
    for node in graph.node:
        yield node.input, node.output


def other_types(graph: onnx.GraphProto) -> set[str]:
    """Return the values known not to be float32, which therefore have no gradient."""
    return {
        value.name
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.elem_type not in (TensorProto.UNDEFINED, TensorProto.FLOAT)
    }
