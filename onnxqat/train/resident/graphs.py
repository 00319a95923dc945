"""Graphs over the vectors of training: the optimizer's step, averages, sums.

The arithmetic is that of `onnxqat.train.optimization`, operation by operation, so both give the
same parameters within a few units in the last place. A vector may be both input and output of one
graph: the node that writes it depends on every node that reads it, so no node reads a value that
is already overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxqat.train.config import Config
from onnxqat.train.optimization.optimizers import Adam

__all__ = [
    "GraphBuilder",
    "Segment",
    "add_graph",
    "average_graph",
    "check_graph",
    "copy_graph",
    "mean_graph",
    "smallest_power",
    "update_graph",
]

OPSET, IR_VERSION = 17, 8
Role = Literal["weight", "scale", "zero_point"]
# the float32 powers of two, from the smallest normal number
POWERS = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Adjacent parameters in a vector that have the same update rule.

    Attributes
    ----------
    role : {"weight", "scale", "zero_point"}
        The role of the parameters; a bias counts as a weight.
    names : tuple of str
        The names of the parameters.
    lr, decay : float
        The learning rate and the weight decay.
    freeze_from : int or None
        The first step at which they no longer change.
    latent : bool
        Whether scales are powers of two; training then changes latent scales, and each scale is
        the power of two nearest to its latent scale.
    start, length : int
        Their position in the vector.
    """

    role: Role
    names: tuple[str, ...]
    lr: float
    decay: float
    freeze_from: int | None
    latent: bool
    start: int
    length: int


class GraphBuilder:
    """A graph that grows node by node."""

    def __init__(self) -> None:
        self.graph = onnx.GraphProto(name="training")

    def input(self, name: str, length: int | None = None, kind: int = TensorProto.FLOAT) -> str:
        """Add an input: a vector, or a scalar if no length is given."""
        shape = [] if length is None else [length]
        self.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: float | NDArray[Any]) -> str:
        """Add a constant; a Python float is a float32."""
        name = f"constant{len(self.graph.initializer)}"
        array = np.asarray(value, np.float32 if isinstance(value, float) else None)
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def op(
        self, op_type: str, *inputs: str | float | NDArray[Any], output: str = "", **attributes: Any
    ) -> str:
        """Add a node, and return the name of its output."""
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        name = output or f"value{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(op_type, names, [name], name=name, **attributes))
        return name

    def split(self, vector: str, names: Sequence[str], lengths: Sequence[int]) -> None:
        """Make consecutive parts of a vector outputs."""
        if len(names) == 1:
            self.op("Identity", vector, output=names[0])
        else:
            sizes = self.constant(np.array(lengths, np.int64))
            self.graph.node.append(helper.make_node("Split", [vector, sizes], names, axis=0))
        for name, length in zip(names, lengths, strict=True):
            self.output(name, length)

    def output(self, name: str, length: int) -> None:
        """Make a vector an output."""
        self.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [length]))

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(self.graph, opset_imports=opsets, ir_version=IR_VERSION)


def copy_graph(size: int) -> onnx.ModelProto:
    """Return ``target = source``."""
    b = GraphBuilder()
    b.op("Identity", b.input("source", size), output="target")
    b.output("target", size)
    return b.model()


def add_graph(size: int) -> onnx.ModelProto:
    """Return ``target = total + gradient``."""
    b = GraphBuilder()
    b.op("Add", b.input("total", size), b.input("gradient", size), output="target")
    b.output("target", size)
    return b.model()


def mean_graph(size: int, count: int) -> onnx.ModelProto:
    """Return ``target = total / count``."""
    b = GraphBuilder()
    b.op("Div", b.input("total", size), float(count), output="target")
    b.output("target", size)
    return b.model()


def average_graph(size: int, decay: float) -> onnx.ModelProto:
    """Return ``target = decay * average + (1 - decay) * values``."""
    b = GraphBuilder()
    kept = b.op("Mul", b.input("average", size), decay)
    added = b.op("Mul", b.input("values", size), float(1 - decay))
    b.op("Add", kept, added, output="target")
    b.output("target", size)
    return b.model()


def check_graph(size: int) -> onnx.ModelProto:
    """Return ``numbers``: the loss, and 0 where every gradient is finite, else NaN."""
    b = GraphBuilder()
    loss = b.op("Reshape", b.input("loss"), np.array([1], np.int64))
    nothing = b.op("Mul", b.input("gradient", size), 0.0)  # NaN times 0, infinity times 0: NaN
    total = b.op("ReduceSum", nothing, np.array([0], np.int64), keepdims=1)
    b.op("Concat", loss, total, output="numbers", axis=0)
    b.output("numbers", 2)
    return b.model()


def update_graph(segments: Sequence[Segment], config: Config) -> onnx.ModelProto:
    """Return the graph of one step of the optimizer.

    Inputs of segment ``i``, as far as it needs them; vectors have the length of the segment::

        i/gradient, i/value, i/latent, i/mean, i/square, i/velocity
        i/unit                    weights with Adam: the size of a step, see `Updater`
        i/factor, i/floor         scales: the factor of the gradient, the smallest scale
        i/factor, i/range, i/low, i/high     zero_points
        i/rate, i/keep, i/moving  numbers: learning rate, what weight decay leaves, and whether it
                                  is not frozen (of type bool)

    and ``mean_correction`` and ``square_correction`` of Adam. Outputs: ``i/value_out`` and so on,
    of every vector that changes.
    """
    b = GraphBuilder()
    for i, segment in enumerate(segments):
        b.input(f"{i}/gradient", segment.length)
        b.input(f"{i}/value", segment.length)
    gradients = [_prepared(b, i, segment, config) for i, segment in enumerate(segments)]
    if config.clip_norm is not None:
        factor = _shortening(b, gradients, config.clip_norm)
        gradients = [b.op("Mul", gradient, factor) for gradient in gradients]
    direct = _sgd if config.optimizer == "sgd" else _adam
    if direct is _adam:
        b.input("mean_correction")
        b.input("square_correction")
    for i, (segment, gradient) in enumerate(zip(segments, gradients, strict=True)):
        direction = direct(b, i, segment, gradient, config)
        _MOVES[segment.role](b, i, segment, direction, config)
        b.output(f"{i}/value_out", segment.length)
    return b.model()


def _prepared(b: GraphBuilder, i: int, segment: Segment, config: Config) -> str:
    """Return the gradient that the optimizer sees, as `Updater` prepares it."""
    gradient, value = f"{i}/gradient", f"{i}/value"
    if segment.role == "scale":  # into the log domain, with the LSQ factor
        factor = b.op("Mul", value, b.input(f"{i}/factor", segment.length))
        gradient = b.op("Mul", gradient, factor)
    elif segment.role == "zero_point":  # into units of the quantized range
        gradient = b.op("Mul", gradient, b.input(f"{i}/factor", segment.length))
    elif segment.decay and config.optimizer == "adam":
        gradient = b.op("Add", gradient, b.op("Mul", value, float(segment.decay)))
    if segment.freeze_from is not None:
        moving = b.input(f"{i}/moving", kind=TensorProto.BOOL)
        gradient = b.op("Where", moving, gradient, 0.0)
    if config.clip_value is not None:
        limit = float(config.clip_value)
        gradient = b.op("Clip", gradient, -limit, limit)
    return gradient


def _shortening(b: GraphBuilder, gradients: Sequence[str], norm: float) -> str:
    """Return the factor that limits the norm of all gradients together to ``norm``."""
    wide = [b.op("Cast", g, to=TensorProto.DOUBLE) for g in gradients]
    squares = [b.op("ReduceSumSquare", g, keepdims=0) for g in wide]
    total = b.op("Sum", *squares) if len(squares) > 1 else squares[0]
    length = b.op("Sqrt", total)
    limit = np.array(norm, np.float64)
    factor = b.op("Cast", b.op("Div", limit, length), to=TensorProto.FLOAT)
    return b.op("Where", b.op("Greater", length, limit), factor, 1.0)


def _adam(b: GraphBuilder, i: int, segment: Segment, gradient: str, config: Config) -> str:
    """Return the direction of `onnxqat.train.optimization.optimizers.Adam`."""
    del config
    usual = Adam(0)
    mean, square = (b.input(f"{i}/{n}", segment.length) for n in ("mean", "square"))
    mean = b.op("Mul", mean, usual.beta1)
    added = b.op("Mul", gradient, float(1 - usual.beta1))
    mean = b.op("Add", mean, added, output=f"{i}/mean_out")
    square = b.op("Mul", square, usual.beta2)
    added = b.op("Mul", b.op("Mul", gradient, float(1 - usual.beta2)), gradient)
    square = b.op("Add", square, added, output=f"{i}/square_out")
    for name in (mean, square):
        b.output(name, segment.length)
    root = b.op("Sqrt", b.op("Mul", square, "square_correction"))
    return b.op(
        "Div", b.op("Mul", mean, "mean_correction"), b.op("Add", root, float(usual.epsilon))
    )


def _sgd(b: GraphBuilder, i: int, segment: Segment, gradient: str, config: Config) -> str:
    """Return the direction of `onnxqat.train.optimization.optimizers.Sgd`."""
    velocity = b.op("Mul", b.input(f"{i}/velocity", segment.length), float(config.momentum))
    velocity = b.op("Add", velocity, gradient, output=f"{i}/velocity_out")
    b.output(velocity, segment.length)
    if not config.nesterov:
        return velocity
    return b.op("Add", gradient, b.op("Mul", velocity, float(config.momentum)))


def _move_weight(b: GraphBuilder, i: int, segment: Segment, direction: str, config: Config) -> None:
    value, rate = f"{i}/value", b.input(f"{i}/rate")
    if segment.decay and config.optimizer != "adam":
        value = b.op("Mul", value, b.input(f"{i}/keep"))
    if config.optimizer != "sgd":
        rate = b.op("Mul", b.input(f"{i}/unit", segment.length), rate)
    b.op("Sub", value, b.op("Mul", direction, rate), output=f"{i}/value_out")


def _move_zero_point(
    b: GraphBuilder, i: int, segment: Segment, direction: str, config: Config
) -> None:
    del config
    low, high, levels = (b.input(f"{i}/{n}", segment.length) for n in ("low", "high", "range"))
    rate = b.op("Mul", levels, b.input(f"{i}/rate"))
    moved = b.op("Sub", f"{i}/value", b.op("Mul", direction, rate))
    b.op("Min", b.op("Max", moved, low), high, output=f"{i}/value_out")


def _move_scale(b: GraphBuilder, i: int, segment: Segment, direction: str, config: Config) -> None:
    del config
    if segment.decay:
        direction = b.op("Add", direction, float(segment.decay))
    grown = b.op("Exp", b.op("Mul", direction, b.op("Neg", b.input(f"{i}/rate"))))
    floor = b.input(f"{i}/floor", segment.length)
    if not segment.latent:
        b.op("Max", b.op("Mul", f"{i}/value", grown), floor, output=f"{i}/value_out")
        return
    latent = b.op("Mul", b.input(f"{i}/latent", segment.length), grown)
    latent = b.op("Max", latent, floor, output=f"{i}/latent_out")
    b.output(latent, segment.length)
    reached = b.op("Mul", latent, np.array(0.5**0.5, np.float32))
    smallest_power(b, reached, output=f"{i}/value_out")


def smallest_power(b: GraphBuilder, values: str, *, output: str = "") -> str:
    """Return the smallest powers of two that reach the values, as `qparams.power_of_two` does."""
    column = b.op("Unsqueeze", values, np.array([1], np.int64))
    smaller = b.op("Cast", b.op("Greater", column, POWERS), to=TensorProto.FLOAT)
    count = b.op("ReduceSum", smaller, np.array([1], np.int64), keepdims=0)
    last = float(len(POWERS) - 1)
    index = b.op("Cast", b.op("Min", count, last), to=TensorProto.INT64)
    return b.op("Gather", POWERS, index, output=output)


_MOVES = {"weight": _move_weight, "scale": _move_scale, "zero_point": _move_zero_point}
