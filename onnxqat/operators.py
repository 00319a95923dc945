"""Facts about the ONNX operators that several stages need; they hold for any chip.

Each `Operator` is one row of a table; for its definition see https://onnx.ai/onnx/operators. All
inputs of an operator without a row are data, and its output is computed.

=============  ====================================================================================
role           the meaning of an input
=============  ====================================================================================
``data``       an activation, or a constant in its place
``factor``     data of a product; a constant factor is the weight (the right one if both are)
``weight``     the kernel of a convolution
``bias``       the summand of each channel
``scale``      the factor of each channel in a normalization
``statistic``  mean or variance that a normalization learned in training
``slope``      the factor of negative values in PRelu
``gate``       a weight of the gates of a recurrent layer: (directions, gates * units, ...)
``peephole``   the factors of the cell in the gates of an LSTM
``state``      the initial state of a recurrent layer
``setting``    not data: a shape, axes, indices, sizes, limits, a fill value
=============  ====================================================================================

=============  ====================================================================================
movement       the content of an output
=============  ====================================================================================
``axes``       the values of the first input, each once; axes are permuted, merged or split
``blocks``     the same, but blocks of one axis become parts of others
``repeats``    the same, but each value may occur several times
``picks``      some values of the first input, selected by their positions
``joins``      the values of all inputs, side by side
``extremes``   values of the data, or zero, selected by their size
``fills``      values of the first input and, depending on attributes, others around or between
=============  ====================================================================================

=============  ====================================================================================
homogeneous    the part of x in which f(s * x) = s * f(x) holds for each number s > 0
=============  ====================================================================================
``values``     each single value of the first input
``windows``    the spatial axes of the first input, for each channel separately
``axes``       some axes of the first input
``operands``   all inputs, broadcast to one shape
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

Role = Literal[
    "data", "factor", "weight", "bias", "scale", "statistic", "slope", "gate", "peephole", "state",
    "setting",
]  # fmt: skip
Homogeneity = Literal["values", "windows", "axes", "operands"]
Movement = Literal["axes", "blocks", "repeats", "picks", "joins", "extremes", "fills"]

ONNX_DOMAINS = (None, "", "ai.onnx")  # onnxruntime defines its own Conv and Gelu elsewhere
# Functions that exporters write as several nodes and chips run as one, see `onnxqat.plan.patterns`.
PATTERN_NAMES = ("SiLU", "HardSwish", "Mish", "Gelu", "LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Facts that hold for every use of an operator.

    Attributes
    ----------
    inputs : tuple of Role
        The role of each input, by index; the last one applies to all further inputs.
    movement : Movement or None
        How values move; None if the operator computes its output.
    homogeneous : Homogeneity or None
        How scaling the inputs scales the outputs; None if it does not, or if that depends on the
        node. For operators that only move values, ``movement`` is more precise.
    channel_axis : int or None
        The axis of the output channels of a ``weight``; with groups, of one group's channels. Of a
        ``gate``, the axis of the rows of all gates.
    window : bool
        Whether a window slides over the spatial axes: ``kernel_shape``, ``pads``, ``auto_pad``.
    nonnegative : bool
        Whether a plan may assume that the output has no negative values. For other operators, such
        as Softplus, calibration decides.
    gates : int
        The number of gates in the weights of a recurrent layer; 0 for other operators.
    subgraphs : bool
        Whether the operator runs graphs in its attributes.
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
_RECURRENT: tuple[Role, ...] = ("data", "gate", "gate", "bias", "setting", "state")

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
    # operators that move or select values
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
    # other operators about which some stage needs a fact
    "Abs": Operator(nonnegative=True, homogeneous="values"),
    "Add": Operator(homogeneous="operands"),
    "AveragePool": Operator(window=True, homogeneous="windows"),
    "Clip": Operator(inputs=_SETTINGS),
    "GRU": Operator(inputs=_RECURRENT, channel_axis=1, gates=3),
    "GlobalAveragePool": Operator(homogeneous="windows"),
    "HardSigmoid": Operator(nonnegative=True),
    "If": Operator(subgraphs=True),
    "LSTM": Operator(inputs=(*_RECURRENT, "state", "peephole"), channel_axis=1, gates=4),
    "LeakyRelu": Operator(homogeneous="values"),
    "Loop": Operator(subgraphs=True),
    "LpPool": Operator(window=True),
    "Neg": Operator(homogeneous="values"),
    "PRelu": Operator(inputs=("data", "slope"), homogeneous="values"),
    "RNN": Operator(inputs=_RECURRENT, channel_axis=1, gates=1),
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
    """Return the number of output channels M of a convolution, from the shape of its weight.

    The weight of a Conv is (M, C / group, ...), that of a ConvTranspose (C, M / group, ...).
    """
    return weight[0] if op_type == "Conv" else weight[1] * group


def role_of(op_type: str, index: int) -> Role:
    """Return the role of input ``index`` of an operator."""
    roles = OPERATORS.get(op_type, _COMPUTED).inputs
    return roles[min(index, len(roles) - 1)]


def homogeneous(kind: Homogeneity) -> tuple[str, ...]:
    """Return the operators with this kind of homogeneity."""
    return tuple(op for op, facts in OPERATORS.items() if facts.homogeneous == kind)


def moving(*movements: Movement) -> tuple[str, ...]:
    """Return the operators with one of these movements."""
    return tuple(op for op, facts in OPERATORS.items() if facts.movement in movements)
