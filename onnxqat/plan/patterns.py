"""Find the patterns that exporters write as several nodes and chips run as one.

A pattern is an expression. A tuple stands for a node: its op type, then its operands. ``"x"`` is
the input of the pattern (the same tensor at each place), ``"c"`` any constant, and a number a
constant of that value. The operands of Add and Mul may have either order; further constant inputs
(such as axes) are ignored. The patterns are those written by PyTorch's exporters (TorchScript and
dynamo) and tf2onnx. Formulas: the ONNX functions of the same name
(https://onnx.ai/onnx/operators), SiLU: https://arxiv.org/abs/1702.03118, RMSNormalization:
https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.plan.types import Edge

__all__ = ["PATTERNS", "find_patterns"]

Expression: TypeAlias = str | float | tuple[Any, ...]

_HALF_ERF = ("Add", ("Erf", ("Div", "x", math.sqrt(2))), 1.0)
_HALF_ERF_MUL = ("Add", ("Erf", ("Mul", "x", math.sqrt(0.5))), 1.0)
_CUBES = (("Pow", "x", 3.0), ("Mul", "x", ("Mul", "x", "x")))
_HALF_TANHS = tuple(
    ("Add", ("Tanh", ("Mul", ("Add", "x", ("Mul", cube, 0.044715)), math.sqrt(2 / math.pi))), 1.0)
    for cube in _CUBES
)
_SIX = ("Clip", ("Add", "x", 3.0), 0.0, 6.0)
_CENTERED = ("Sub", "x", ("ReduceMean", "x"))


def _normalized(centered: Expression) -> tuple[Expression, ...]:
    """Return the expressions for ``centered / sqrt(mean(centered ** 2) + epsilon)``."""
    squares = (("Pow", centered, 2.0), ("Mul", centered, centered))
    roots = tuple(("Sqrt", ("Add", ("ReduceMean", square), "c")) for square in squares)
    divided = tuple(("Div", centered, root) for root in roots)
    multiplied = tuple(
        ("Mul", centered, inverse)
        for root in roots
        for inverse in (("Reciprocal", root), ("Div", 1.0, root))
    )
    return divided + multiplied


_LAYER_NORMS = _normalized(_CENTERED)
_RMS_NORMS = _normalized("x")

# The larger expression of a name comes first.
PATTERNS: dict[str, tuple[Expression, ...]] = {
    "SiLU": (("Mul", "x", ("Sigmoid", "x")),),
    "HardSwish": (
        ("Mul", "x", ("HardSigmoid", "x")),
        ("Div", ("Mul", "x", _SIX), 6.0),
        ("Mul", "x", ("Div", _SIX, 6.0)),
        ("Mul", ("Mul", "x", _SIX), 1 / 6),
        ("Mul", "x", ("Mul", _SIX, 1 / 6)),
    ),
    "Mish": (("Mul", "x", ("Tanh", ("Softplus", "x"))),),
    "Gelu": tuple(
        expression
        for half in (_HALF_ERF, _HALF_ERF_MUL, *_HALF_TANHS)
        for expression in (
            ("Mul", ("Mul", "x", half), 0.5),
            ("Mul", ("Mul", "x", 0.5), half),
            ("Mul", "x", ("Mul", half, 0.5)),
        )
    ),
    "LayerNormalization": (
        *(("Add", ("Mul", norm, "c"), "c") for norm in _LAYER_NORMS),
        *_LAYER_NORMS,
    ),
    "RMSNormalization": (*(("Mul", norm, "c") for norm in _RMS_NORMS), *_RMS_NORMS),
}


def find_patterns(
    graph: gs.Graph, readers: Mapping[str, list[Edge]], kinds: Collection[str]
) -> Iterator[tuple[str, tuple[gs.Node, ...]]]:
    """Yield the name and the nodes (in graph order) of each pattern in a graph.

    Patterns do not overlap, and their inner tensors are not read from outside.

    Parameters
    ----------
    readers : mapping of str to list of Edge
        The readers of each tensor.
    kinds : collection of str
        The names in `PATTERNS` to look for.
    """
    positions = {id(node): i for i, node in enumerate(graph.nodes)}
    roots = {kind: {e[0] for e in PATTERNS[kind] if isinstance(e, tuple)} for kind in kinds}
    taken: set[int] = set()
    for node in reversed(graph.nodes):  # from the end, so that the larger of two patterns is found
        for kind in kinds:
            if node.op not in roots[kind] or id(node) in taken:
                continue
            found = next((m for m in _matches(node, PATTERNS[kind], readers)), None)
            if found and not any(id(n) in taken for n in found):
                taken.update(id(n) for n in found)
                yield kind, tuple(sorted(found, key=lambda n: positions[id(n)]))


def _matches(
    node: gs.Node, expressions: tuple[Expression, ...], readers: Mapping[str, list[Edge]]
) -> Iterator[list[gs.Node]]:
    for expression in expressions:
        match = _Match()
        if match.fits(expression, node.outputs[0]) and match.closed(node, readers):
            yield list(match.nodes.values())


class _Match:
    """One attempt to match an expression with the nodes that compute a tensor."""

    def __init__(self) -> None:
        self.nodes: dict[int, gs.Node] = {}
        self.source: str | None = None

    def fits(self, expression: Expression, tensor: gs.Tensor) -> bool:
        if expression == "x":
            self.source = self.source or tensor.name
            return not isinstance(tensor, gs.Constant) and tensor.name == self.source
        if not isinstance(expression, tuple):
            return _is_constant(tensor, expression)
        if len(tensor.inputs) != 1 or tensor.inputs[0].op != expression[0]:
            return False
        node, operands = tensor.inputs[0], expression[1:]
        inputs = node.inputs[: len(operands)]
        rest = node.inputs[len(operands) :]
        if len(inputs) != len(operands) or not all(isinstance(t, gs.Constant) for t in rest):
            return False
        orders = [inputs, inputs[::-1]] if node.op in ("Add", "Mul") else [inputs]
        for order in orders:
            saved = dict(self.nodes), self.source
            if all(self.fits(e, t) for e, t in zip(operands, order, strict=True)):
                self.nodes[id(node)] = node
                return True
            self.nodes, self.source = saved
        return False

    def closed(self, root: gs.Node, readers: Mapping[str, list[Edge]]) -> bool:
        """Return whether only nodes of the match read its inner tensors."""
        names = {node.name for node in self.nodes.values()}
        inner = (t.name for n in self.nodes.values() if n is not root for t in n.outputs)
        return all(edge.node in names for name in inner for edge in readers.get(name, ()))


def _is_constant(tensor: gs.Tensor, wanted: str | float) -> bool:
    if not isinstance(tensor, gs.Constant):
        return False
    if isinstance(wanted, str):
        return True
    return tensor.values.size == 1 and bool(np.isclose(tensor.values.item(), wanted, rtol=1e-3))
