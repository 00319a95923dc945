"""Facts of the ONNX operators that planning needs: not of any chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

__all__ = [
    "BIAS_INPUT",
    "NONNEGATIVE_OPS",
    "ONNX_DOMAINS",
    "SINGLE_DATA_INPUT",
    "WEIGHTED_OPS",
    "along_channels",
    "bias_channels",
    "biased_node",
    "channel_axis",
    "clips_from_zero",
    "is_bias_add",
    "is_constant",
    "is_depthwise",
    "is_empty",
    "is_float",
    "kernel_size",
    "runs_along",
    "weight_index",
]

ONNX_DOMAINS = (None, "", "ai.onnx")  # onnxruntime has a Conv and a Gelu of its own
WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "LayerNormalization": 2}
NONNEGATIVE_OPS = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs")
# Ops whose inputs behind the first are parameters (shapes, limits, slopes), not data.
SINGLE_DATA_INPUT = (
    *("Clip", "Expand", "Gather", "PRelu", "Pad", "ReduceMean", "Reshape", "Resize", "Slice"),
    *("Split", "Squeeze", "Tile", "Unsqueeze"),
)


def channel_axis(node: gs.Node, index: int, rank: int) -> int | None:
    """Return the axis of the output channels in constant operand ``index``, of rank ``rank``.

    None in a MatMul for a vector, which is all contracted, and for a stack of matrices: the fused
    kernels of runtimes take one scale for it (QLinearMatMul of onnxruntime 1.19.2 does not run).
    """
    if node.op == "Gemm":
        flipped = bool(node.attrs.get("transB" if index else "transA", 0))
        return index ^ flipped  # of A the rows, of B the columns
    if node.op == "MatMul":
        return index if rank == 2 else None
    return 1 if node.op == "ConvTranspose" else 0


def bias_channels(node: gs.Node, shape: Sequence[int]) -> int | None:
    """Return how many channels the bias of a node runs along, whose right operand has ``shape``.

    None where no integers of scale s_x * s_w stand for the bias: the operand is a vector, or a Gemm
    multiplies the product or the bias.
    """
    if node.op == "Gemm":
        if (node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)) != (1.0, 1.0):
            return None
        return shape[0 if node.attrs.get("transB", 0) else 1]
    if node.op == "MatMul":
        return None if len(shape) < 2 else shape[-1]
    return shape[1] * int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else shape[0]


def biased_node(node: gs.Node, index: int) -> gs.Node | None:
    """Return the weighted node whose bias is input ``index`` of ``node``, if there is one.

    It is the node itself, or the MatMul whose product an Add takes.
    """
    if index == BIAS_INPUT.get(node.op):
        return node
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    producers = node.inputs[1 - index].inputs
    return producers[0] if producers and producers[0].op == "MatMul" else None


def runs_along(shape: Sequence[int], channels: int) -> bool:
    """Return whether a bias of ``shape`` has one value per channel, or one for all of them."""
    return all(n == 1 for n in shape[:-1]) and tuple(shape[-1:]) in ((), (1,), (channels,))


def along_channels(bias: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return a bias of shape (), (1,), (N,), (1, 1) or (1, N) as an array of shape (N,)."""
    return np.broadcast_to(bias.reshape(bias.shape[-1:]), (channels,))


def is_float(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is known to hold float32."""
    # graphsurgeon holds a type that numpy lacks as onnx's number
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return False
    return bool(np.dtype(tensor.dtype) == np.float32)


def is_constant(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is an initializer."""
    return isinstance(tensor, gs.Constant)


def is_empty(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is known to hold no values: an axis of it has the length 0."""
    return tensor.shape is not None and 0 in tuple(tensor.shape)


def is_bias_add(node: gs.Node) -> bool:
    """Return whether a node adds a constant vector."""
    constants = [t for t in node.inputs if is_constant(t)]
    return node.op == "Add" and len(constants) == 1 and len(constants[0].shape) == 1


def clips_from_zero(node: gs.Node) -> bool:
    """Return whether a node is a Clip that lets nothing negative through."""
    if node.op != "Clip" or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
        return False
    return bool(np.all(node.inputs[1].values >= 0))


def kernel_size(node: gs.Node) -> tuple[int, ...]:
    """Return the spatial size of a kernel, () where there is none."""
    if "kernel_shape" in node.attrs:
        return tuple(node.attrs["kernel_shape"])
    if node.op in ("Conv", "ConvTranspose") and is_constant(node.inputs[1]):
        return tuple(node.inputs[1].shape[2:])
    return ()


def is_depthwise(node: gs.Node) -> bool:
    """Return whether each group of a convolution has one input channel, and there are several."""
    group = node.attrs.get("group", 1)
    if node.op not in ("Conv", "ConvTranspose") or group == 1 or not is_constant(node.inputs[1]):
        return False
    # weight: (M, C / group, ...) of Conv, (C, M / group, ...) of ConvTranspose
    shape = node.inputs[1].shape
    return bool(shape[1] == 1 if node.op == "Conv" else shape[0] == group)


def weight_index(node: gs.Node) -> int | None:
    """Return which input of a weighted op is its constant weight, if one is."""
    if node.op not in WEIGHTED_OPS or node.domain not in ONNX_DOMAINS:
        return None
    found = [i for i, t in enumerate(node.inputs[:2]) if is_constant(t) and is_float(t)]
    return found[-1] if found else None
