"""Wrap a node as a custom op: the node as forward pass, and its gradient written as ONNX text.

The forward function contains the original node, so that training computes the same as the saved
file, bit for bit. The gradient is a second model-local function::

    (inputs, y, dy) => (d<input>, ...)

whose text can read the node's inputs by their formal names, its output ``y`` and the upstream
gradient ``dy``. The text gives the axes of reductions, Squeeze and Unsqueeze as attributes; they
are converted to inputs if the opset of the graph requires this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxqat.preparation.editing import constant_values

__all__ = [
    "LOWERED_DOMAIN",
    "CustomOp",
    "Gradient",
    "Refusal",
    "ShapeUnknown",
    "custom_op",
    "rank_of",
    "static_shape",
    "summed_to",
]

LOWERED_DOMAIN = "onnxqat.lowered"  # the domain of custom ops that replace ops of the model
# Constants that all texts can read. A mask is Clip(big * something, zero, one): a comparison
# and a cast from bool are 20 times slower on a CPU.
NUMBERS = {"zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "big": 1e30}
# Ops that read axes as an input, with the first opset in which they do.
AXES_INPUT_SINCE = {"ReduceSum": 13, "Squeeze": 13, "Unsqueeze": 13}
OTHER_REDUCTIONS_SINCE = 18
# Constants of up to this many elements are written into the function, for shape inference.
EMBEDDED_ELEMENTS = 16
CONTRIB = "com.microsoft"

Array = NDArray[Any]


class Refusal(Exception):  # noqa: N818 - an answer, not a failure; it never leaves `train`
    """The reason why onnxqat has no gradient for a node."""


class ShapeUnknown(Refusal):
    """A length is unknown; shape inference with a fixed batch may find it."""


@dataclass(frozen=True, kw_only=True)
class CustomOp:
    """An op whose forward pass and gradient are two model-local functions.

    Attributes
    ----------
    forward : onnx.FunctionProto
        The forward pass. Inputs that have gradients come first; its only output is ``y``.
    gradient : onnx.FunctionProto
        The gradient, which reads inputs of the forward pass, ``y`` and the upstream gradient
        ``dy``; see `onnxqat.gradients`.
    """

    forward: onnx.FunctionProto
    gradient: onnx.FunctionProto

    @property
    def op_type(self) -> str:
        """The op type."""
        return self.forward.name


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of one node.

    Attributes
    ----------
    inputs : tuple of str
        Formal names of the node's inputs.
    text : str
        The body, in the syntax of `onnx.parser`. It defines ``d<input>`` for each input that has a
        gradient.
    constants : dict of str to array or float
        Constants that the text reads; a float is a float32 of shape ().
    """

    inputs: tuple[str, ...]
    text: str
    constants: Mapping[str, Any] = field(default_factory=dict)


def rank_of(tensor: gs.Tensor, what: str) -> int:
    """Return the number of axes of a tensor; see `static_shape`."""
    if tensor.shape is None:
        raise ShapeUnknown(f"the rank of its {what} is unknown")
    return len(tensor.shape)


def static_shape(tensor: gs.Tensor, what: str) -> list[int]:
    """Return the shape of a tensor, in which only the first length may be unknown (-1).

    Raises
    ------
    ShapeUnknown
        Another length is unknown; the message names the tensor as ``what``.
    """
    shape = list(tensor.shape) if tensor.shape is not None else None
    if shape is None or not all(isinstance(size, int) for size in shape[1:]):
        raise ShapeUnknown(
            f"the shape {shape} of its {what} is not fixed; export the model with fixed sizes"
        )
    return [size if isinstance(size, int) else -1 for size in shape]


def summed_to(tensor: gs.Tensor, rank: int, terms: str, target: str) -> tuple[str, Array]:
    """Return text that sums ``terms`` over the axes along which ``tensor`` was broadcast.

    Parameters
    ----------
    tensor : gs.Tensor
        The operand.
    rank : int
        Rank of the result to which it was broadcast.
    terms, target : str
        The name of the terms, and the name of the sum, which has the operand's shape.

    Returns
    -------
    text : str
    shape : int64 array
        The constant ``<target>_shape``, which the text reads.
    """
    shape = static_shape(tensor, f"operand '{tensor.name}'")
    aligned = [1] * (rank - len(shape)) + shape
    axes = [i for i, size in enumerate(aligned) if size == 1]
    total = f"ReduceSum<axes = {axes}, keepdims = 1>({terms})" if axes else f"Identity({terms})"
    text = f"{target}_sum = {total} {target} = Reshape({target}_sum, {target}_shape) "
    return text, np.array(shape, np.int64)


def custom_op(
    node: gs.Node, gradient: Gradient, learned: Iterable[int], opset: int
) -> tuple[CustomOp, gs.Node]:
    """Return a custom op that replaces ``node`` in training, and a node of this op.

    Parameters
    ----------
    node : gs.Node
        The original node; its tensors move to the new node.
    gradient : Gradient
        The gradient of the node.
    learned : iterable of int
        The indices of the inputs that need a gradient.
    opset : int
        The opset of the graph.

    Raises
    ------
    Refusal
        ``gradient`` is not defined for one of these inputs, or the node has several outputs.
    """
    if any(tensor.name for tensor in node.outputs[1:]):
        raise Refusal("it has more than one output")
    formal = dict(zip(gradient.inputs, node.inputs, strict=False))
    wanted = [gradient.inputs[i] for i in learned]
    constants = {n: v for n, t in formal.items() if (v := _embedded(t)) is not None}
    others = [n for n, t in formal.items() if t.name and n not in (*wanted, *constants)]
    inputs = [*wanted, *others]
    names = [n if t.name else "" for n, t in formal.items()]
    forward = [
        *_constant_nodes(constants),
        helper.make_node(node.op, names, ["y"], domain=node.domain or "", **node.attrs),
    ]
    backward = _gradient_nodes(gradient, constants, [f"d{n}" for n in wanted], opset)
    read = {name for n in backward for name in n.input}
    passed = [n for n in (*inputs, "y", "dy") if n in read]
    name = f"{node.op}_{_digest([*forward, *backward], [*inputs, *wanted])}"
    op = CustomOp(
        forward=_function(name, inputs, ["y"], forward, opset),
        gradient=_function(f"{name}_gradient", passed, [f"d{n}" for n in wanted], backward, opset),
    )
    tensors, outputs = [formal[n] for n in inputs], list(node.outputs[:1])
    return op, gs.Node(name, node.name, {}, tensors, outputs, domain=LOWERED_DOMAIN)


def _embedded(tensor: gs.Tensor) -> Array | None:
    values = constant_values(tensor)
    if values is None or (values.dtype.kind == "f" and values.size > EMBEDDED_ELEMENTS):
        return None
    return values


def _constant_nodes(constants: Mapping[str, Any]) -> list[onnx.NodeProto]:
    made = []
    for name, value in constants.items():
        array = np.float32(value) if isinstance(value, float) else value
        tensor = numpy_helper.from_array(np.asarray(array), name)
        made.append(helper.make_node("Constant", [], [name], value=tensor))
    return made


def _gradient_nodes(
    gradient: Gradient, constants: Mapping[str, Any], wanted: Sequence[str], opset: int
) -> list[onnx.NodeProto]:
    text = f'<opset_import: ["": {opset}], domain: "any"> f (dy) => (dx) {{{gradient.text}}}'
    nodes = [
        *_constant_nodes({**NUMBERS, **constants, **gradient.constants}),
        *(made for n in onnx.parser.parse_function(text).node for made in _axes(n, opset)),
    ]
    missing = set(wanted) - {name for n in nodes for name in n.output}
    if missing:
        names = ", ".join(sorted(f"'{name[1:]}'" for name in missing))
        raise Refusal(f"onnxqat has no gradient with respect to its input {names}")
    return _needed(nodes, wanted)


def _axes(node: onnx.NodeProto, opset: int) -> Iterator[onnx.NodeProto]:
    """Yield the node with its axes in the form that the opset requires."""
    since = AXES_INPUT_SINCE.get(node.op_type, OTHER_REDUCTIONS_SINCE)
    axes = next((a for a in node.attribute if a.name == "axes"), None)
    if axes is not None and opset >= since:
        name = f"{node.output[0]}_axes"
        yield helper.make_node("Constant", [], [name], value_ints=list(axes.ints))
        node.attribute.remove(axes)
        node.input.append(name)
    yield node


def _needed(nodes: Sequence[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes needed to compute ``wanted``; unread outputs lose their names."""
    read = set(wanted)
    kept = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            names = [name if name in read else "" for name in node.output]
            del node.output[:]
            node.output.extend(names)
            kept.append(node)
    return kept[::-1]


def _digest(nodes: Iterable[onnx.NodeProto], names: Iterable[str]) -> str:
    """Return a digest that makes the op type unique, by which onnxruntime finds its gradient."""
    digest = hashlib.sha256()
    for node in nodes:
        digest.update(node.SerializeToString(deterministic=True))
    digest.update(" ".join(names).encode())
    return digest.hexdigest()[:12]


def _function(
    name: str, inputs: list[str], outputs: list[str], nodes: list[onnx.NodeProto], opset: int
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", opset)]
    if any(node.domain == CONTRIB for node in nodes):
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    return helper.make_function(LOWERED_DOMAIN, name, inputs, outputs, nodes, opsets)
