"""Facts of the ONNX operators that more than one stage needs: of the standard, not of a chip.

Each `Operator` is one row, see https://onnx.ai/onnx/operators for its page. An operator without a
row has inputs that are all data, and computes what it writes.

=============  ====================================================================================
role           what an input is
=============  ====================================================================================
``data``       what the operator works on: an activation, or a constant in its place
``factor``     data; a constant factor is the weight, the right one if both are constant
``weight``     the kernel of a convolution
``bias``       what is added to each channel
``scale``      what each channel of a normalization is multiplied by
``statistic``  mean or variance that a normalization has from its training
``slope``      what PRelu multiplies negative values by
``setting``    no data: a shape, axes, indices, sizes, limits, a value to fill in
=============  ====================================================================================

=============  ====================================================================================
movement       what is in an output
=============  ====================================================================================
``axes``       the values of the first input, each once; axes are permuted, joined or parted
``blocks``     the same, but blocks of one axis become parts of others
``repeats``    the same, but each value may stand there several times
``picks``      some values of the first input, chosen by their positions
``joins``      the values of all inputs side by side
``extremes``   values of the data, or zero, chosen by their size
``fills``      values of the first input, and by its attributes others around or between them
=============  ====================================================================================

=============  ====================================================================================
homogeneous    where f(s * x) = s * f(x) for every number s > 0
=============  ====================================================================================
``values``     each value of the first input on its own
``windows``    over the spatial axes of the first input, each channel on its own
``axes``       over some axes of the first input
``operands``   over all inputs, broadcast to one shape
=============  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONVOLUTIONS",
    "MATRIX_PRODUCTS",
    "NONNEGATIVE",
    "ONNX_DOMAINS",
    "OPERATORS",
    "PATTERN_NAMES",
    "RECURRENT",
    "SUBGRAPHS",
    "WEIGHTED",
    "WINDOWED",
    "Homogeneity",
    "Movement",
    "Operator",
    "Role",
    "convolution_channels",
    "homogeneous",
    "moving",
    "role_of",
]

Role = Literal["data", "factor", "weight", "bias", "scale", "statistic", "slope", "setting"]
Homogeneity = Literal["values", "windows", "axes", "operands"]
Movement = Literal["axes", "blocks", "repeats", "picks", "joins", "extremes", "fills"]

ONNX_DOMAINS = (None, "", "ai.onnx")  # onnxruntime has a Conv and a Gelu of its own
# Functions that exporters write as several nodes and chips run as one, see `onnxqat.plan.patterns`.
PATTERN_NAMES = ("SiLU", "HardSwish", "Mish", "Gelu", "LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What is so of every use of an operator.

    Attributes
    ----------
    inputs : tuple of Role
        By index; the last one stands for all inputs behind it.
    movement : Movement or None
        None: it computes what it writes.
    homogeneous : Homogeneity or None
        Whether scaling the inputs scales the outputs; None where that depends on the node. For
        operators that only move values, ``movement`` says more.
    channel_axis : int or None
        The axis of the output channels of a ``weight``; with groups, of one group's channels.
    window : bool
        Whether a window slides over the spatial axes: ``kernel_shape``, ``pads``, ``auto_pad``.
    nonnegative : bool
        Whether a plan may assume that the output has no negative values. For other operators, such
        as Softplus, calibration finds out.
    gates : int
        How many gates the weights of a recurrent layer hold; 0 for every other operator.
    subgraphs : bool
        Whether it runs graphs that its attributes hold.
    """

    inputs: tuple[Role, ...] = ("data",)
    movement: Movement | None = None
    homogeneous: Homogeneity | None = None
    channel_axis: int | None = None
    window: bool = False
    nonnegative: bool = False
    gates: int = 0
    subgraphs: bool = False


_SETTINGS: tuple[Role, ...] = ("data", "setting")
_NORMALIZATION: tuple[Role, ...] = ("data", "scale", "bias")

OPERATORS: dict[str, Operator] = {
    # products with a weight
    "Conv": Operator(inputs=("data", "weight", "bias"), channel_axis=0, window=True),
    "ConvTranspose": Operator(inputs=("data", "weight", "bias"), channel_axis=1, window=True),
    "Gemm": Operator(inputs=("factor", "factor", "bias")),
    "MatMul": Operator(inputs=("factor", "factor")),
    # normalizations
    "BatchNormalization": Operator(inputs=(*_NORMALIZATION, "statistic")),
    "GroupNormalization": Operator(inputs=_NORMALIZATION),
    "InstanceNormalization": Operator(inputs=_NORMALIZATION),
    "LayerNormalization": Operator(inputs=_NORMALIZATION),
    # what moves or chooses values
    "Concat": Operator(movement="joins"),
    "DepthToSpace": Operator(movement="blocks"),
    "Expand": Operator(inputs=_SETTINGS, movement="repeats"),
    "Flatten": Operator(movement="axes"),
    "Gather": Operator(inputs=_SETTINGS, movement="picks"),
    "GatherElements": Operator(inputs=_SETTINGS, movement="picks"),
    "GatherND": Operator(inputs=_SETTINGS, movement="picks"),
    "GlobalMaxPool": Operator(movement="extremes", homogeneous="windows"),
    "Identity": Operator(movement="axes"),
    "Max": Operator(movement="extremes", homogeneous="operands"),
    "MaxPool": Operator(movement="extremes", window=True, homogeneous="windows"),
    "Min": Operator(movement="extremes", homogeneous="operands"),
    "Pad": Operator(inputs=_SETTINGS, movement="fills"),
    "ReduceMax": Operator(inputs=_SETTINGS, movement="extremes", homogeneous="axes"),
    "ReduceMin": Operator(inputs=_SETTINGS, movement="extremes", homogeneous="axes"),
    "Relu": Operator(movement="extremes", nonnegative=True, homogeneous="values"),
    "Reshape": Operator(inputs=_SETTINGS, movement="axes"),
    "Resize": Operator(inputs=_SETTINGS, movement="fills"),
    "Slice": Operator(inputs=_SETTINGS, movement="picks"),
    "SpaceToDepth": Operator(movement="blocks"),
    "Split": Operator(inputs=_SETTINGS, movement="picks"),
    "Squeeze": Operator(inputs=_SETTINGS, movement="axes"),
    "Tile": Operator(inputs=_SETTINGS, movement="repeats"),
    "Transpose": Operator(movement="axes"),
    "Unsqueeze": Operator(inputs=_SETTINGS, movement="axes"),
    # of the others, those of which something is asked
    "Abs": Operator(nonnegative=True, homogeneous="values"),
    "Add": Operator(homogeneous="operands"),
    "AveragePool": Operator(window=True, homogeneous="windows"),
    "Clip": Operator(inputs=_SETTINGS),
    "GRU": Operator(gates=3),
    "GlobalAveragePool": Operator(homogeneous="windows"),
    "HardSigmoid": Operator(nonnegative=True),
    "If": Operator(subgraphs=True),
    "LSTM": Operator(gates=4),
    "LeakyRelu": Operator(homogeneous="values"),
    "Loop": Operator(subgraphs=True),
    "LpPool": Operator(window=True),
    "Neg": Operator(homogeneous="values"),
    "PRelu": Operator(inputs=("data", "slope"), homogeneous="values"),
    "RNN": Operator(gates=1),
    "ReduceMean": Operator(inputs=_SETTINGS, homogeneous="axes"),
    "ReduceSum": Operator(inputs=_SETTINGS, homogeneous="axes"),
    "Scan": Operator(subgraphs=True),
    "SequenceMap": Operator(subgraphs=True),
    "Sigmoid": Operator(nonnegative=True),
    "Softmax": Operator(nonnegative=True),
    "Sub": Operator(homogeneous="operands"),
    "Sum": Operator(homogeneous="operands"),
}
_COMPUTED = Operator()

CONVOLUTIONS = tuple(op for op, facts in OPERATORS.items() if "weight" in facts.inputs)
MATRIX_PRODUCTS = tuple(op for op, facts in OPERATORS.items() if "factor" in facts.inputs)
WEIGHTED = (*CONVOLUTIONS, *MATRIX_PRODUCTS)
WINDOWED = tuple(op for op, facts in OPERATORS.items() if facts.window)
NONNEGATIVE = tuple(op for op, facts in OPERATORS.items() if facts.nonnegative)
RECURRENT = tuple(op for op, facts in OPERATORS.items() if facts.gates)
SUBGRAPHS = tuple(op for op, facts in OPERATORS.items() if facts.subgraphs)


def convolution_channels(op_type: str, weight: Sequence[int], group: int) -> int:
    """Return how many channels a convolution writes whose weight has the shape ``weight``.

    That of a Conv is (M, C / group, ...), that of a ConvTranspose (C, M / group, ...).
    """
    return weight[0] if op_type == "Conv" else weight[1] * group


def role_of(op_type: str, index: int) -> Role:
    """Return what input ``index`` of an operator is."""
    roles = OPERATORS.get(op_type, _COMPUTED).inputs
    return roles[min(index, len(roles) - 1)]


def homogeneous(kind: Homogeneity) -> tuple[str, ...]:
    """Return the operators that are homogeneous in this way."""
    return tuple(op for op, facts in OPERATORS.items() if facts.homogeneous == kind)


def moving(*movements: Movement) -> tuple[str, ...]:
    """Return the operators that do one of these movements."""
    return tuple(op for op, facts in OPERATORS.items() if facts.movement in movements)
