"""Which values a gradient can come to on its way back from the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import onnx
from onnx import TensorProto

__all__ = ["Links", "leading_to", "links", "other_types"]

# What each node of a graph reads and writes, in order.
Links: TypeAlias = Iterable[tuple[Sequence[str], Sequence[str]]]


def leading_to(ends: Iterable[str], nodes: Links, passes: Callable[[str], bool]) -> set[str]:
    """Return ``ends``, and the values that lead there over values for which ``passes`` is true."""
    names = set(ends) - {""}  # what is left out is no value
    for inputs, outputs in reversed(list(nodes)):
        if not names.isdisjoint(outputs):
            names.update(name for name in inputs if name and passes(name))
    return names


def links(graph: onnx.GraphProto) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Yield what each node reads and writes."""
    for node in graph.node:
        yield node.input, node.output


def other_types(graph: onnx.GraphProto) -> set[str]:
    """Return the values that are known not to be float32, and so take no gradient."""
    return {
        value.name
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.elem_type not in (TensorProto.UNDEFINED, TensorProto.FLOAT)
    }
