"""Fold BatchNormalization into the Conv, ConvTranspose or Gemm before it.

::

    x -> Conv(W, b) -> c -> BatchNormalization(scale, B, mean, var) -> y
    =>  x -> Conv(W', b') -> y

    f = scale / sqrt(var + epsilon)          per output channel
    W' = W * f,   b' = (b - mean) * f + B    (Jacob et al. 2018, arXiv:1712.05877, section 3.2;
    https://onnx.ai/onnx/operators/onnx__BatchNormalization.html)

computed in float64 and rounded once to the weight's type. f multiplies these entries of W:

=============  ===============================  =========================================
Conv           [C_out, C_in/g, k...]            axis 0, any number of groups g
ConvTranspose  [C_in, C_out/g, k...]            channel i*C_out/g + j is column j of the
                                                i-th of g blocks of rows
Gemm           [K, C_out], transB [C_out, K]    b is beta * C; beta becomes 1; alpha stays
=============  ===============================  =========================================

The layer keeps its name and writes y. W and b keep their names; if another node reads them too,
the layer gets its own copy, named after the layer. A new b is named after W (``conv.weight`` ->
``conv.bias``) or, if that is not possible, after the layer.

A BatchNormalization is not folded if it is in training mode, its parameters, W or b are not
constant, c has another reader (in a subgraph, too) or is a graph output, the C of a Gemm differs
between rows, or the result is not finite. Nothing is folded into a MatMul, which has no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.model import constant
from onnxqat.nodes import bias_index, channel_axis, is_op
from onnxqat.operators import WEIGHTED
from onnxqat.preparation.editing import (
    constant_values,
    own_name,
    pinned_names,
    remove_nodes,
    tensor_names,
    unique_name,
)

__all__ = ["fold_batchnorms", "read_statistics"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Affine:
    """The affine map of a BatchNormalization, per channel: x * factor + (bias - mean * factor)."""

    factor: Float64
    mean: Float64
    bias: Float64


def fold_batchnorms(graph: gs.Graph) -> int:
    """Fold BatchNormalization nodes into the layers before them; return their number."""
    pinned, taken = pinned_names(graph), tensor_names(graph)
    folded = []
    for node in graph.nodes:
        affine = _read_affine(node) if is_op(node, "BatchNormalization") else None
        layer = _layer_before(node, pinned) if affine else None
        if affine is None or layer is None:
            continue
        arrays = _fold(layer, affine)
        if arrays is not None:
            _set_parameters(layer, *arrays, pinned, taken)
            result = node.outputs[0]
            node.inputs.clear()
            node.outputs.clear()
            layer.outputs[0] = result
            folded.append(node)
    return remove_nodes(graph, folded)


def read_statistics(
    node: gs.Node,
) -> tuple[Float64, Float64, Float64, Float64, np.float64] | None:
    """Return scale, B, mean, var, each of shape (channels,), and epsilon.

    Returns None for a node in training mode.
    """
    outputs = [tensor for tensor in node.outputs if tensor.name]
    found = [values for values in map(_floats, node.inputs[1:5]) if values is not None]
    if node.attrs.get("training_mode", 0) or len(outputs) != 1 or len(found) != 4:
        return None
    scale, bias, mean, variance = found
    if scale.ndim != 1 or any(values.shape != scale.shape for values in found):
        return None
    # the file stores epsilon as a float32
    epsilon = np.float64(np.float32(node.attrs.get("epsilon", 1e-5)))
    if not np.all(variance + epsilon > 0):
        return None
    return scale, bias, mean, variance, epsilon


def _read_affine(node: gs.Node) -> _Affine | None:
    read = read_statistics(node)
    if read is None:
        return None
    scale, bias, mean, variance, epsilon = read
    return _Affine(factor=scale / np.sqrt(variance + epsilon), mean=mean, bias=bias)


def _floats(tensor: gs.Tensor) -> Float64 | None:
    values = constant_values(tensor)
    return values.astype(np.float64) if values is not None and values.dtype.kind == "f" else None


def _layer_before(node: gs.Node, pinned: set[str]) -> gs.Node | None:
    """Return the layer whose output only this node reads, if there is one."""
    tensor = node.inputs[0]
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or tensor.name in pinned:
        return None
    layer = tensor.inputs[0]
    return layer if is_op(layer, *WEIGHTED) and bias_index(layer) is not None else None


def _fold(layer: gs.Node, affine: _Affine) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the new weight and bias, in the weight's type."""
    stored = constant_values(layer.inputs[1])
    old_bias = _bias(layer, affine.factor.size)
    if stored is None or stored.dtype.kind != "f" or old_bias is None:
        return None
    weight = _scale_channels(layer, stored.astype(np.float64), affine.factor)
    bias = (old_bias - affine.mean) * affine.factor + affine.bias
    if weight is None:
        return None
    with np.errstate(over="ignore"):  # checked below
        arrays = weight.astype(stored.dtype), bias.astype(stored.dtype)
    return arrays if all(np.isfinite(array).all() for array in arrays) else None


def _bias(layer: gs.Node, channels: int) -> Float64 | None:
    """Return the bias that the layer adds, of shape (channels,)."""
    if not _has_bias(layer):
        return np.zeros(channels)
    bias = _floats(layer.inputs[2])
    if bias is None or bias.shape not in ((), (1,), (1, 1), (channels,), (1, channels)):
        return None
    beta = layer.attrs.get("beta", 1.0) if layer.op == "Gemm" else 1.0
    return np.broadcast_to(bias.reshape(-1) * beta, (channels,))


def _has_bias(layer: gs.Node) -> bool:
    return len(layer.inputs) > 2 and bool(layer.inputs[2].name)


def _scale_channels(layer: gs.Node, weight: Float64, factor: Float64) -> Float64 | None:
    """Multiply each output channel of the weight by its factor."""
    if layer.op == "ConvTranspose":
        groups = layer.attrs.get("group", 1)
        if factor.size % groups or weight.shape[0] % groups:
            return None
        spread = np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    else:
        spread = factor.reshape((1,) * (channel_axis(layer, 1, weight.ndim) or 0) + (-1,))
    if any(size not in (1, axis) for size, axis in zip(spread.shape, weight.shape, strict=False)):
        return None
    return weight * spread.reshape(spread.shape + (1,) * (weight.ndim - spread.ndim))


def _set_parameters(
    layer: gs.Node,
    weight: NDArray[Any],
    bias: NDArray[Any],
    pinned: set[str],
    taken: set[str],
) -> None:
    old_weight = layer.inputs[1]
    new_bias_name = f"{layer.name}.bias"
    if old_weight.name.endswith(".weight"):
        new_bias_name = old_weight.name.removesuffix(".weight") + ".bias"
    if _has_bias(layer):
        name = own_name(layer.inputs[2], f"{layer.name}.bias", pinned, taken)
        layer.inputs[2] = constant(name, bias)
    else:
        made = constant(unique_name(new_bias_name, taken), bias)
        layer.inputs = [*layer.inputs[:2], made]
    name = own_name(old_weight, f"{layer.name}.weight", pinned, taken)
    layer.inputs[1] = constant(name, weight)
    if layer.op == "Gemm":
        layer.attrs.pop("beta", None)
