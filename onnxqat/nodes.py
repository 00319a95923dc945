"""Functions that answer questions about one node, from `onnxqat.operators` and the node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.operators import (
    CONVOLUTIONS,
    ONNX_DOMAINS,
    OPERATORS,
    RECURRENT,
    Role,
    convolution_channels,
    role_of,
)

__all__ = [
    "along_channels",
    "attribute",
    "bias_channels",
    "bias_index",
    "biased_node",
    "channel_axis",
    "clips_from_zero",
    "data_inputs",
    "input_role",
    "is_bias_add",
    "is_cell",
    "is_constant",
    "is_convolution",
    "is_depthwise",
    "is_empty",
    "is_float",
    "is_op",
    "is_plain_product",
    "keeps_grid",
    "kernel_size",
    "may_be_float32",
    "output_channels",
    "runs_along",
    "state_attributes",
    "takes_grid",
    "weight_index",
]

# Inputs that a chip may read as integers with their own parameters.
GRID_ROLES: tuple[Role, ...] = ("data", "factor", "weight", "scale", "gate")
WEIGHTS: tuple[Role, ...] = ("factor", "weight", "gate")
CELL = 2  # the output of an LSTM that holds its cell


def is_op(node: gs.Node, *ops: str) -> bool:
    """Return whether a node is one of these operators of the default domain."""
    return node.op in ops and node.domain in ONNX_DOMAINS


def is_float(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is known to hold float32."""
    # graphsurgeon keeps a type that numpy lacks as onnx's number
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return False
    return bool(np.dtype(tensor.dtype) == np.float32)


def may_be_float32(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is float32, or its type is not known: then it takes a gradient.

    ``dtype in (None, np.float32)`` holds for float64, too: numpy takes None for it.
    """
    return tensor.dtype is None or bool(tensor.dtype == np.float32)


def is_constant(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is an initializer."""
    return isinstance(tensor, gs.Constant)


def is_empty(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is known to be empty: one of its axes has length 0."""
    return tensor.shape is not None and 0 in tuple(tensor.shape)


def input_role(node: gs.Node, index: int) -> Role:
    """Return the role of input ``index``; inputs of operators outside ONNX are data."""
    return role_of(node.op, index) if node.domain in ONNX_DOMAINS else "data"


def takes_grid(node: gs.Node, index: int) -> bool:
    """Return whether a chip may read an input as integers with their own parameters.

    This is false for a bias, whose scale follows from others, a slope, a statistic or a setting;
    and for peepholes and initial states, which chips store with more bits.
    """
    return input_role(node, index) in GRID_ROLES


def is_cell(node: gs.Node, index: int) -> bool:
    """Return whether an output is the cell of an LSTM, which chips keep wider than activations."""
    return is_op(node, "LSTM") and index == CELL


def data_inputs(node: gs.Node) -> list[gs.Tensor]:
    """Return the data inputs of a node, without weights, biases, settings and similar inputs."""
    return [t for i, t in enumerate(node.inputs) if input_role(node, i) in ("data", "factor")]


def weight_index(node: gs.Node) -> int | None:
    """Return the index of a node's constant weight (the last one of several), or None."""
    found = [
        i
        for i, tensor in enumerate(node.inputs)
        if input_role(node, i) in WEIGHTS and is_constant(tensor) and is_float(tensor)
    ]
    return found[-1] if found else None


def bias_index(node: gs.Node) -> int | None:
    """Return the index of the bias input, or None if the operator has none."""
    roles = OPERATORS[node.op].inputs if is_op(node, *OPERATORS) else ()
    return roles.index("bias") if "bias" in roles else None


def channel_axis(node: gs.Node, index: int, rank: int) -> int | None:
    """Return the axis of the output channels in constant operand ``index``, of rank ``rank``.

    Returns None for an operand that is not a weight. Also, for a MatMul, None for a vector, which
    has no output channels, and for a stack of matrices, for which the fused kernels of runtimes
    need a single scale (QLinearMatMul of onnxruntime 1.19.2 does not run with more).
    """
    if input_role(node, index) not in WEIGHTS:
        return None
    if node.op == "Gemm":
        flipped = bool(node.attrs.get("transB" if index else "transA", 0))
        return index ^ flipped  # the rows of A, the columns of B
    if node.op == "MatMul":
        return index if rank == 2 else None
    return OPERATORS[node.op].channel_axis


def output_channels(node: gs.Node, shape: Sequence[int]) -> int | None:
    """Return the number of output channels of a node whose weight or right operand has ``shape``.

    Returns None for a MatMul with a vector, and for a recurrent layer.
    """
    if is_op(node, *RECURRENT):
        return None
    if is_convolution(node):
        return convolution_channels(node.op, shape, int(node.attrs.get("group", 1)))
    axis = channel_axis(node, 1, 2)  # the axis of each matrix, if there is a stack of them
    return None if axis is None or len(shape) < 2 else shape[axis - 2]


def is_plain_product(node: gs.Node) -> bool:
    """Return whether a node does not scale its product or its bias, as a Gemm can."""
    return node.op != "Gemm" or (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) == (
        1,
        1,
    )


def bias_channels(node: gs.Node, shape: Sequence[int]) -> int | None:
    """Return the number of channels of the bias of a node whose right operand has ``shape``.

    Returns None if the bias cannot be integers with the scale s_x * s_w, because the operand is a
    vector, a Gemm scales its product or its bias, or a recurrent layer adds two products.
    """
    return output_channels(node, shape) if is_plain_product(node) else None


def biased_node(node: gs.Node, index: int) -> gs.Node | None:
    """Return the node whose bias is input ``index`` of ``node``, or None.

    It is the node itself, or the MatMul whose product is the other operand of an Add.
    """
    if input_role(node, index) == "bias":
        return node
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    producers = node.inputs[1 - index].inputs
    return producers[0] if producers and producers[0].op == "MatMul" else None


def is_bias_add(node: gs.Node) -> bool:
    """Return whether a node adds a constant vector."""
    constants = [t for t in node.inputs if is_constant(t)]
    return node.op == "Add" and len(constants) == 1 and len(constants[0].shape) == 1


def runs_along(shape: Sequence[int], channels: int) -> bool:
    """Return whether a bias of ``shape`` has one value per channel, or one for all of them."""
    return all(n == 1 for n in shape[:-1]) and tuple(shape[-1:]) in ((), (1,), (channels,))


def along_channels(bias: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return a bias of shape (), (1,), (N,), (1, 1) or (1, N) as an array of shape (N,)."""
    return np.broadcast_to(bias.reshape(bias.shape[-1:]), (channels,))


def attribute(node: gs.Node, name: str, opset: int) -> Any:
    """Return the value of an attribute: the default of the op if the node does not state it.

    Returns
    -------
    value : int, float, str, list or None
        None if there is no default.

    Raises
    ------
    KeyError
        The op has no such attribute.
    """
    value = node.attrs.get(name)
    if value is None:
        default = onnx.defs.get_schema(node.op, opset).attributes[name].default_value
        value = onnx.helper.get_attribute_value(default) if default.name else None
        value = value.decode() if isinstance(value, bytes) else value
    if value is None and name in ("strides", "dilations") and (kernel := kernel_size(node)):
        value = [1] * len(kernel)  # the schema states these defaults in words only
    return value


def state_attributes(graph: gs.Graph, stated: Mapping[str, tuple[str, ...]]) -> None:
    """Write out attributes that nodes leave out; the network stays the same.

    Parameters
    ----------
    stated : mapping of str to tuple of str
        Names of attributes, by op type.
    """
    for node in graph.nodes:
        for name in stated[node.op] if is_op(node, *stated) else ():
            value = attribute(node, name, graph.opset)
            if value is not None:
                node.attrs[name] = value


def is_convolution(node: gs.Node) -> bool:
    """Return whether a node is a Conv or a ConvTranspose."""
    return is_op(node, *CONVOLUTIONS)


def kernel_size(node: gs.Node) -> tuple[int, ...]:
    """Return the spatial size of a node's kernel, or () if it has none."""
    if "kernel_shape" in node.attrs:
        return tuple(node.attrs["kernel_shape"])
    if is_convolution(node) and is_constant(node.inputs[1]):
        return tuple(node.inputs[1].shape[2:])
    return ()


def is_depthwise(node: gs.Node) -> bool:
    """Return whether a convolution has several groups, of one input channel each."""
    group = node.attrs.get("group", 1)
    if not is_convolution(node) or group == 1 or not is_constant(node.inputs[1]):
        return False
    # weight: (M, C / group, ...) of Conv, (C, M / group, ...) of ConvTranspose
    shape = node.inputs[1].shape
    return bool(shape[1] == 1 if node.op == "Conv" else shape[0] == group)


def clips_from_zero(node: gs.Node) -> bool:
    """Return whether a node is a Clip whose lower limit is 0 or more."""
    if node.op != "Clip" or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
        return False
    return bool(np.all(node.inputs[1].values >= 0))


def keeps_grid(node: gs.Node) -> bool:
    """Return whether the output of a node lies on the same grid as its data input.

    Such a node moves or selects values, and the only value that it adds is zero (Relu, Pad), which
    lies on every grid. A Resize must use the nearest value; other modes of Pad copy values.
    """
    if not is_op(node, *OPERATORS) or OPERATORS[node.op].movement is None:
        return False
    if node.op == "Resize":
        outside = node.attrs.get("extrapolation_value", 0)
        return bool(node.attrs.get("mode", "nearest") == "nearest" and not outside)
    if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
        fill = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        return fill is None or (is_constant(fill) and not np.any(fill.values))
    return True
