"""Find out what the values of an output mean, from the operators at the end of the graph.

The last operators and the shape distinguish class scores from everything else (boxes, grids,
features, images). An output contains class scores if

- it ends in Softmax, LogSoftmax or Sigmoid, possibly followed by operators that move values;
- a Softmax, LogSoftmax or ArgMax also reads it;
- it has the shape (N, classes) with two classes or more, unless it ends in an operator in which
  scores do not end, or another output of the model ends in a Softmax or Sigmoid: then the exporter
  writes probabilities, and this output is a regression;
- it is a matrix product of shape (N, positions, classes), in a model that reads integers (tokens).

In case of doubt, an output contains values, not scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnxqat.nodes import may_be_float32
from onnxqat.operators import MATRIX_PRODUCTS, moving

__all__ = ["Joined", "Output", "OutputTracer", "Scores", "outputs_of"]

PAIR = {"QuantizeLinear", "DequantizeLinear"}
MOVES = set(moving("axes"))  # operators through which an axis can be followed
ARITHMETIC = {"Add", "BatchNormalization", "Cast", "Div", "Mul", "Sub"}  # with constants
# Scores (N, classes) do not end in these operators, which squash, clip, normalize or reduce.
NOT_SCORES = {
    *("Abs", "Clip", "Concat", "Div", "Elu", "Exp", "Floor", "HardSigmoid", "HardSwish", "Log"),
    *("LayerNormalization", "LeakyRelu", "LpNormalization", "Pow", "Relu", "Round", "Softplus"),
    *("Sqrt", "Tanh"),
}
INTEGERS = {TensorProto.INT32, TensorProto.INT64}
GRID = 4  # axes of (N, classes, height, width)

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Class scores.

    Attributes
    ----------
    kind : {"logits", "log-probabilities", "probabilities", "independent"}
        ``independent``: each value is the probability of one class alone, from a Sigmoid.
    axis : int
        The axis of the classes, counted from 0.
    """

    kind: Literal["logits", "log-probabilities", "probabilities", "independent"]
    axis: int


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The parts of an output that a Concat joins, such as boxes and scores.

    Attributes
    ----------
    axis : int
        Axis of the output, counted from 0.
    sizes : tuple of int
        The length of each part.
    """

    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output of a model.

    Attributes
    ----------
    name : str
        Its name in the graph.
    learned : bool
        Whether it is float32, so that it can have a gradient.
    shape : tuple or None
        The shape that the file states.
    scores : Scores or None
        The class scores; None if it contains other values.
    source : str or None
        For an output of another type, the nearest float32 tensor it is computed from; else None.
    source_scores : Scores or None
        The class scores of ``source``.
    joined : tuple of Joined
        The parts that it is concatenated from, if any.
    """

    name: str
    learned: bool
    shape: Shape | None
    scores: Scores | None
    source: str | None = None
    source_scores: Scores | None = None
    joined: tuple[Joined, ...] = ()


def outputs_of(graph: gs.Graph) -> tuple[Output, ...]:
    """Return a description of each output of a model, in order."""
    tracer = OutputTracer(_without_weights(graph))
    found = [_output(tensor, tracer) for tensor in graph.outputs]
    if not any(tracer.explicit(output.name) for output in found):
        return tuple(found)
    return tuple(
        output if tracer.explicit(output.name) or tracer.readers_axis(output.name) is not None
        else replace(output, scores=None)
        for output in found
    )  # fmt: skip


def _output(tensor: gs.Tensor, tracer: OutputTracer) -> Output:
    learned = may_be_float32(tensor)
    source = None if learned else _float_before(tensor)
    return Output(
        name=tensor.name,
        learned=learned,
        shape=None if tensor.shape is None else tuple(tensor.shape),
        scores=tracer.scores(tensor.name) if learned else None,
        source=source,
        source_scores=tracer.scores(source) if source else None,
        joined=tracer.joined(tensor.name),
    )


def _float_before(tensor: gs.Tensor) -> str | None:
    """Return the nearest float32 tensor that a node computes, before its quantization."""
    waiting, seen = [tensor], {tensor.name}
    for one in waiting:
        floats = isinstance(one, gs.Variable) and one.dtype == np.float32
        if floats and one.inputs and one.inputs[0].op not in PAIR:
            return str(one.name)
        before = [t for node in one.inputs for t in node.inputs if t.name not in seen]
        seen.update(t.name for t in before)
        waiting += before
    return None


def _without_weights(graph: gs.Graph) -> onnx.GraphProto:
    """Return the nodes and shapes of a graph."""
    result = onnx.GraphProto()
    for node in graph.nodes:
        kept = {k: v for k, v in node.attrs.items() if k in ("axis", "perm")}
        names = [t.name for t in node.inputs], [t.name for t in node.outputs]
        result.node.append(helper.make_node(node.op, *names, domain=node.domain or "", **kept))
    for tensor in graph.tensors().values():
        if (
            isinstance(tensor, gs.Variable)
            and tensor.dtype is not None
            and tensor.shape is not None
        ):
            result.value_info.append(_info(tensor))
    result.input.extend(_info(tensor) for tensor in graph.inputs)
    return result


def _info(tensor: gs.Variable) -> onnx.ValueInfoProto:
    kind = TensorProto.UNDEFINED
    if tensor.dtype is not None:
        # graphsurgeon keeps a type that numpy lacks as onnx's number
        known = isinstance(tensor.dtype, int)
        kind = tensor.dtype if known else helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, tensor.shape)


class OutputTracer:
    """Follows the values of a graph back from its end.

    Parameters
    ----------
    graph : onnx.GraphProto
        The graph, with the known shapes. It need not contain weights.
    rounding : str
        The domain of operators that round their first input and keep its meaning.
    """

    def __init__(self, graph: onnx.GraphProto, rounding: str | None = None) -> None:
        self._rounding = rounding
        self._producers = {o: n for n in graph.node for o in n.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        values = (*graph.value_info, *graph.input, *graph.output)
        self._shapes = {v.name: _shape(v) for v in values if v.type.tensor_type.HasField("shape")}
        self._reads_integers = any(v.type.tensor_type.elem_type in INTEGERS for v in graph.input)

    def scores(self, name: str) -> Scores | None:
        """Return the class scores in a float tensor, or None for other values."""
        shape = self._shapes.get(name, ())
        if len(shape) < 2:
            return None
        return self.explicit(name) or self._read(name) or self._bare(name, shape)

    def explicit(self, name: str) -> Scores | None:
        """Return the scores of a tensor that ends in Softmax, LogSoftmax or Sigmoid."""
        path, node = self._path(name)
        rank = len(self._shapes.get(name, ()))
        if node is None:
            return None
        if node.op_type == "Sigmoid":
            return Scores(kind="independent", axis=self._channels(path, node, rank))
        if node.op_type not in ("Softmax", "LogSoftmax"):
            return None
        axis = self._class_axis(path, _attribute(node, "axis", -1))
        kind: Any = "probabilities" if node.op_type == "Softmax" else "log-probabilities"
        return None if axis is None else Scores(kind=kind, axis=axis)

    def _channels(self, path: list[str], sigmoid: onnx.NodeProto, rank: int) -> int:
        """Return the axis of the classes: the channels of a grid, or else the usual axis."""
        before, _ = self._path(sigmoid.input[0])
        if len(self._shapes.get(before[-1], ())) >= GRID:
            found = self._axis([*path, *before], 1)
            if found is not None:
                return found
        return 1 if rank >= GRID else max(rank - 1, 0)

    def readers_axis(self, name: str) -> int | None:
        """Return the axis along which a Softmax, LogSoftmax or ArgMax reads a tensor."""
        path, _ = self._path(name)
        for i, tensor in enumerate(path):
            for node in self._rounded_readers(tensor):
                if node.op_type in ("Softmax", "LogSoftmax", "ArgMax"):
                    default = 0 if node.op_type == "ArgMax" else -1
                    return self._class_axis(path[: i + 1], _attribute(node, "axis", default))
        return None

    def joined(self, name: str) -> tuple[Joined, ...]:
        """Return the parts that the last Concats join, as axes and sizes of the output.

        Only the first input of each Concat is followed further back: the others are similar.
        """
        path: list[str] = [name]
        found: dict[int, Joined] = {}  # by axis: the outermost Concat, which has all parts
        node = self._producers.get(name)
        while node is not None and (self._moves(node) or node.op_type == "Concat"):
            if node.op_type == "Concat":
                parts = self._parts(node, path)
                if parts is not None:
                    found.setdefault(parts.axis, parts)
            path.append(next((i for i in node.input if i), ""))
            node = self._producers.get(path[-1])
        return tuple(found.values())

    def _parts(self, node: onnx.NodeProto, path: list[str]) -> Joined | None:
        shapes = [self._shapes.get(name) for name in node.input]
        if any(shape is None for shape in shapes):
            return None
        rank = len(shapes[0] or ())
        inner = _attribute(node, "axis", 0) % rank
        sizes = tuple(shape[inner] for shape in shapes if shape is not None)
        lengths = tuple(size for size in sizes if isinstance(size, int))
        axis = self._axis(path, inner)
        if len(lengths) != len(sizes) or not axis:  # not along the samples
            return None
        return Joined(axis=axis, sizes=lengths)

    def _read(self, name: str) -> Scores | None:
        axis = self.readers_axis(name)
        return None if axis is None else Scores(kind="logits", axis=axis)

    def _bare(self, name: str, shape: Shape) -> Scores | None:
        """Return the logits in a tensor that no operator reads, judged by shape and operator."""
        _, node = self._path(name)
        last = "" if node is None else node.op_type
        if shape[-1] == 1:
            return None
        if len(shape) == 2:
            return None if last in NOT_SCORES else Scores(kind="logits", axis=1)
        product = self._product(name)
        if len(shape) == 3 and self._reads_integers and product:
            return Scores(kind="logits", axis=2)
        return None

    def _product(self, name: str) -> bool:
        """Whether a tensor is a matrix product, possibly plus or times constants."""
        node = self._producers.get(name)
        while node is not None and (self._moves(node) or node.op_type in ARITHMETIC):
            sources = [i for i in node.input if not self._constant(i)]
            if len(sources) != 1 and node.op_type in ARITHMETIC:
                return False
            node = self._producers.get(sources[0]) if sources else None
        return node is not None and node.op_type in MATRIX_PRODUCTS

    def _path(self, name: str) -> tuple[list[str], onnx.NodeProto | None]:
        """Return the tensors back from ``name`` over moves and rounding, and the node before."""
        path, node = [name], self._producers.get(name)
        while node is not None and self._moves(node):
            path.append(next((i for i in node.input if i), ""))
            node = self._producers.get(path[-1])
        return path, node

    def _moves(self, node: onnx.NodeProto) -> bool:
        """Whether a node moves values or rounds them, in a training form or in a Q/DQ file."""
        before = self._producers.get(node.input[0]) if node.input else None
        if node.op_type == "Clip":  # part of a pair of fewer than 8 bits
            return before is not None and before.op_type == "QuantizeLinear"
        rounds = self._rounding is not None and node.domain == self._rounding
        return rounds or node.op_type in PAIR | MOVES

    def _constant(self, name: str) -> bool:
        """Whether a tensor is a constant, possibly rounded."""
        node = self._producers.get(name)
        while node is not None and self._moves(node):
            name = node.input[0]
            node = self._producers.get(name)
        return node is None or node.op_type == "Constant"

    def _rounded_readers(self, name: str) -> list[onnx.NodeProto]:
        """Return the readers of a tensor, including those behind its Q/DQ pair."""
        found, waiting = [], [name]
        while waiting:
            for node in self._readers.get(waiting.pop(), []):
                moves = node.op_type not in MOVES and self._moves(node)
                waiting += node.output[:1] if moves else []
                found += [] if moves else [node]
        return found

    def _axis(self, path: list[str], axis: int) -> int | None:
        """Follow an axis from the last tensor of a path to the first; None if it is lost."""
        shape = self._shapes.get(path[-1])
        found: int | None = axis
        if shape is not None:
            found = axis % len(shape)
        for before, after in zip(path[:0:-1], path[-2::-1], strict=True):
            found = self._moved(before, after, found)
        rank = len(self._shapes.get(path[0], ()))
        return found if found is None or found >= 0 else found + rank

    def _class_axis(self, path: list[str], axis: int) -> int | None:
        """Follow the axis of the classes; for (N, classes) it is always the last one."""
        rank = len(self._shapes.get(path[0], ()))
        return 1 if rank == 2 else self._axis(path, axis)

    def _moved(self, before: str, after: str, axis: int | None) -> int | None:
        """Return the index of an axis behind one node that moves values."""
        node = self._producers[after]
        if axis is None or node.op_type not in MOVES - {"Identity"}:
            return axis
        old, new = self._shapes.get(before), self._shapes.get(after)
        if node.op_type == "Transpose":
            rank = len(old or new or ())
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            perm = perm or list(range(rank))[::-1]
            return perm.index(axis % len(perm)) if perm else None
        if old is None or new is None:
            return axis if axis == -1 else None
        return _kept(old, new, axis % len(old))


def _kept(old: Shape, new: Shape, axis: int) -> int | None:
    """Return the axis of ``new`` with the length and the trailing size of ``axis`` in ``old``."""

    def behind(shape: Shape, i: int) -> int | None:
        lengths = [n for n in shape[i + 1 :] if isinstance(n, int)]
        return math.prod(lengths) if len(lengths) == len(shape) - i - 1 else None

    wanted = behind(old, axis)
    found = (i for i, n in enumerate(new) if n == old[axis] and behind(new, i) == wanted)
    return None if wanted is None else next(found, None)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
