"""Exact integer sums of products, computed in floating point without rounding.

A float32 sum of integers is exact in any order, as long as no partial sum exceeds 2**24 in
magnitude; a float64 sum, as long as none exceeds 2**53. onnxruntime's float convolution (im2col or
direct, no Winograd) then gives the same integers as an int32 accumulator.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxqat.errors import ModelError
from onnxqat.evaluation.integer.rounding import Int64Array
from onnxqat.runtime import open_session

__all__ = ["ExactConvolution", "SplitConvolution", "exact_matmul"]

EXACT_FLOAT32 = 2**24
BYTE = 8  # bits
HALF = 128


class ExactConvolution:
    """A Conv or ConvTranspose of integers.

    Parameters
    ----------
    node : onnx.NodeProto
        The node; its inputs are renamed in a copy.
    weight : int32
        Centered integers, in the layout of the node.
    largest : int
        Largest magnitude of a centered input.
    opset : int
        ONNX opset of the node.
    """

    def __init__(
        self,
        node: onnx.NodeProto,
        weight: NDArray[np.int32],
        largest: int,
        opset: int,
        threads: int,
    ) -> None:
        parts = _exact_parts(weight, largest, 1 if node.op_type == "Conv" else 0, node.name)
        nodes, names = [], [f"sums{i}" for i in range(len(parts))]
        for i, name in enumerate(names):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:], copy.output[:] = ["x", f"w{i}"], [name]
            copy.name = name
            nodes.append(copy)
        graph = onnx.helper.make_graph(
            nodes,
            "exact",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names],
            [
                onnx.numpy_helper.from_array(part.astype(np.float32), f"w{i}")
                for i, part in enumerate(parts)
            ],
        )
        opsets = [onnx.helper.make_opsetid("", opset)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
        self.session = open_session(model, optimization="all", threads=threads)

    def __call__(self, centered: NDArray[np.int32]) -> Int64Array:
        """Return the int64 sums of centered inputs."""
        sums = self.session.run(None, {"x": centered.astype(np.float32)})
        total: Int64Array = sums[0].astype(np.int64)
        for part in sums[1:]:
            total += part.astype(np.int64)
        return total


class SplitConvolution:
    """A Conv or ConvTranspose of activations of 16 bits, as convolutions of halves of 8 bits.

    The parameters are those of `ExactConvolution`. A weight of more than 8 bits is also split. The
    sums are exact, although a chip's own sums may be narrower.
    """

    def __init__(
        self,
        node: onnx.NodeProto,
        weight: NDArray[np.int32],
        largest: int,
        opset: int,
        threads: int,
    ) -> None:
        parts = _halves(weight) if np.abs(weight).max(initial=0) >> BYTE else (weight,)
        half = max((largest + HALF) >> BYTE, HALF)
        self.kernels = [ExactConvolution(node, part, half, opset, threads) for part in parts]

    def __call__(self, centered: NDArray[np.int32]) -> Int64Array:
        """Return the int64 sums of centered inputs."""
        high, low = _halves(centered)
        total = np.zeros((), np.int64)
        for kernel in self.kernels:
            total = (total << BYTE) + (kernel(high) << BYTE) + kernel(low)
        return total


def _halves(integers: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (high, low) with integers = 256 * high + low, and low from -128 to 127."""
    high = (integers + HALF) >> BYTE
    return high, integers - (high << BYTE)


def _exact_parts(
    weight: NDArray[np.int32], largest: int, axis: int, name: str
) -> list[NDArray[np.int32]]:
    """Split a weight along its input channels so that no sum over a part exceeds 2**24."""
    other = tuple(i for i in range(weight.ndim) if i not in (axis, 1 - axis))
    magnitudes = np.abs(weight.astype(np.int64)).sum(axis=other)  # (O, I) or (I, O)
    per_channel = magnitudes.max(axis=1 - axis) * largest
    if per_channel.max(initial=0) > EXACT_FLOAT32:
        raise ModelError(
            f"Node '{name}': its kernel is too large for exact integer sums. Evaluate with "
            "--mode qdq."
        )
    summed = np.concatenate(
        [np.zeros_like(magnitudes.take([0], axis)), magnitudes.cumsum(axis=axis)], axis
    )
    bounds = [0]
    for i in range(weight.shape[axis]):
        total = (summed.take(i + 1, axis) - summed.take(bounds[-1], axis)).max() * largest
        if total > EXACT_FLOAT32:
            bounds.append(i)
    bounds.append(weight.shape[axis])
    parts = []
    for low, high in pairwise(bounds):
        part = np.zeros_like(weight)
        index = (slice(None),) * axis + (slice(low, high),)
        part[index] = weight[index]
        parts.append(part)
    return parts


def exact_matmul(a: NDArray[np.int32], b: NDArray[np.int32]) -> Int64Array:
    """Return ``a @ b`` as int64, for integers of at most 16 bits."""
    return np.asarray(np.matmul(a.astype(np.float64), b.astype(np.float64))).astype(np.int64)
