"""Steps for convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxqat.errors import PlanError, RuleError
from onnxqat.evaluation.integer.bpu import sum_factors
from onnxqat.evaluation.integer.context import Context, FusedOp, Operand, is_bias
from onnxqat.evaluation.integer.epilogue import added, float_limits, make_target
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.hmx import convert_sums
from onnxqat.evaluation.integer.products import (
    ExactConvolution,
    SplitConvolution,
    exact_matmul,
)
from onnxqat.evaluation.integer.qdm import compile_product
from onnxqat.evaluation.integer.requantize import (
    Requantizer,
    dequantizer,
    gemmlowp,
    in_float64,
    ratio,
    requantizer,
)
from onnxqat.evaluation.integer.rounding import Int64Array, round_levels
from onnxqat.evaluation.integer.steps import Addend, FloatTarget, ProductStep, Target
from onnxqat.nodes import is_convolution, is_depthwise, is_plain_product
from onnxqat.rules import Arithmetic

__all__ = ["build_product"]

BYTE = 8
LEAST_ON_VECTORS = 2.0**-16  # measured on the HTP emulator: between 1.43e-5 and 1.69e-5


def build_product(context: Context, group: FusedOp, operands: Sequence[Operand]) -> ProductStep:
    """Return the step of a Conv, ConvTranspose, Gemm or MatMul with its fused ops."""
    node, arithmetic = group.nodes[0], context.arithmetic
    pair = [o for o in operands if o.node == node.name and o.index < 2]
    grids = [context.grids[o.tensor] for o in pair]
    _check(node, grids, arithmetic.product_bits)
    if arithmetic.requantize == "qdm":
        return _compiled_product(context, group, pair, grids)
    activations = [i for i, o in enumerate(pair) if o.values is None]
    spread = _spreader(node, pair)
    first, second = (spread(g.scale, g is grids[1]) for g in grids)
    values = _bias_values(context, group, spread)
    floats = values if context.rule.bias == "float" and arithmetic.bias == "plan" else None
    bias, error = (
        (None, None)
        if values is None or floats is not None
        else _integer_bias(context, values, first, second)
    )
    target = make_target(context, group) or FloatTarget(
        tensor=group.outputs[0],
        limits=float_limits(group),
        dequantize=dequantizer(arithmetic, (first, second), None if floats is None else floats[1]),
    )
    requantize: Requantizer | None = None
    if isinstance(target, Target):
        scale = ratio(arithmetic, first, second, divisor=target.grid.scale)
        if arithmetic.requantize == "hmx" and not _is_on_vectors(node, scale):
            offsets = _offsets(node, pair, grids)
            requantize = convert_sums(
                scale,
                target.grid,
                bias=bias,
                offsets=None if offsets is None else spread(offsets, True),
            )
        else:
            requantize = _requantizer(
                arithmetic,
                node.op,
                (first, second),
                target.grid,
                constant=len(activations) == 1,
                offset=None if floats is None else floats[1] / target.grid.scale,
            )
    return ProductStep(
        sources=tuple(pair[i].tensor for i in activations),
        grids=tuple(grids[i] for i in activations),
        sums=_sums(context, node, pair, grids),
        bias=bias,
        bias_error=error,
        addend=_addend(group, operands, np.asarray(first * second, np.float32)),
        scale=np.asarray(first, np.float64) * np.asarray(second, np.float64),
        requantize=requantize,
        target=target,
    )


def _compiled_product(
    context: Context, group: FusedOp, pair: Sequence[Operand], grids: Sequence[Grid]
) -> ProductStep:
    """Return the step of a product whose weight and bias the compiler of the CV18xx quantizes."""
    node, arithmetic = group.nodes[0], context.arithmetic
    target, (data, weight) = make_target(context, group), pair
    grouped = node.op == "ConvTranspose" and int(node.attrs.get("group", 1)) > 1
    if target is None or data.values is not None or weight.values is None or grouped:
        why = "the chip computes it in bfloat16, unless only the second operand is constant"
        if target is None:
            why = "the chip computes it in bfloat16, because its output stays float"
        elif grouped:
            why = "no source says how the chip computes a ConvTranspose with groups"
        raise RuleError(f"Node '{node.name}': {why}. Evaluate with --mode qdq.")
    trained, spread = grids[1], _spreader(node, pair)
    stripped = trained.dequantize(trained.quantize(weight.values, "half-even"))
    bias = _bias_values(context, group, spread)
    axis = (1 if node.op == "ConvTranspose" else 0) if is_convolution(node) else None
    compiled = compile_product(
        stripped,
        None if bias is None else bias[1],
        axis,
        source=grids[0].scale,
        output=target.grid.scale,
        # only ConvLowering reads the table's scales of weights, if it has one for each channel
        scales=trained.scale
        if node.op == "Conv" and trained.scale.shape == stripped.shape[:1]
        else None,
    )
    scale = np.asarray(grids[0].scale * spread(compiled.scale, True), np.float64)
    return ProductStep(
        sources=(data.tensor,),
        grids=(grids[0],),
        sums=_sums(context, node, pair, grids, weight=compiled.levels),
        bias=compiled.bias,
        bias_error=None
        if compiled.bias is None or bias is None
        else compiled.bias - bias[1] / scale,
        addend=None,
        scale=scale,
        requantize=gemmlowp(
            spread(compiled.multiplier, True),
            spread(compiled.exponent, True),
            arithmetic.product_rounding or arithmetic.rounding,
        ),
        target=target,
    )


def _requantizer(
    arithmetic: Arithmetic,
    op: str,
    scales: Sequence[NDArray[Any]],
    output: Grid,
    *,
    constant: bool,
    offset: NDArray[Any] | None,
) -> Requantizer:
    scale = ratio(arithmetic, *scales, divisor=output.scale)
    if constant and op in arithmetic.in_float64:
        return in_float64(scale)
    if not constant and arithmetic.requantize == "gemmlowp":
        # the product is float32 in GetQuantizedConvolutionMultipler without a bias
        # (google-ai-edge/LiteRT tflite/kernels/kernel_util.cc), which BATCH_MATMUL calls
        product = np.asarray(scales[0] * scales[1], np.float32)
        scale = ratio(arithmetic, product, divisor=output.scale)
    return requantizer(
        arithmetic,
        scale,
        arithmetic.multiplier_bits,
        rounding=arithmetic.product_rounding,
        offset=offset,
    )


def _is_on_vectors(node: gs.Node, scale: NDArray[Any]) -> bool:
    """Return whether the HTP rounds a convolution only once, which its matrix unit does not."""
    strided = is_depthwise(node) and any(stride > 1 for stride in node.attrs.get("strides", ()))
    return strided and bool(scale.min() >= LEAST_ON_VECTORS)


def _offsets(node: gs.Node, pair: Sequence[Operand], grids: Sequence[Grid]) -> Int64Array | None:
    """Return the zero point of the input times the sum of each output's weights, shape (O,).

    None if there is no constant weight, or in a ConvTranspose, whose borders sum fewer of them.
    """
    weight = pair[1].values
    if weight is None or node.op == "ConvTranspose":
        return None
    levels = grids[1].centered(grids[1].quantize(weight, "half-even")).astype(np.int64)
    if is_convolution(node):
        sums = levels.sum(axis=tuple(range(1, levels.ndim)))
    else:
        sums = levels.sum(axis=-1 if node.attrs.get("transB", 0) else 0)
    return np.asarray(sums * np.int64(grids[0].params.zero_point))


def _check(node: gs.Node, grids: Sequence[Grid], most: int) -> None:
    if any(g.spec.bits > most for g in grids):  # the sums may overflow int32
        raise RuleError(
            f"Node '{node.name}': integer evaluation supports at most {most} bits under this rule. "
            "Evaluate with --mode qdq."
        )
    if not is_plain_product(node):
        raise RuleError(
            f"Node '{node.name}': the integer arithmetic of a Gemm with alpha or beta is unknown. "
            "Evaluate with --mode qdq."
        )


def _spreader(
    node: gs.Node, pair: Sequence[Operand]
) -> Callable[[NDArray[Any], bool], NDArray[Any]]:
    """Return a function that shapes per-channel values so that they broadcast to the sums."""
    group = int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
    rank = len(pair[1].values.shape) if pair[1].values is not None else 0
    by_vector = node.inputs[1].shape is not None and len(node.inputs[1].shape) == 1

    def spread(values: NDArray[Any], of_weight: bool) -> NDArray[Any]:
        if values.ndim == 0:
            return values
        if is_convolution(node):
            repeated = np.tile(values, group) if of_weight else values
            return repeated.reshape(-1, *[1] * (rank - 2))
        # a constant on the left has a scale per row; with a vector the rows are the last axis
        return values if of_weight or by_vector else values.reshape(-1, 1)

    return spread


Bias: TypeAlias = tuple[str, NDArray[np.float64]]  # name, and values that broadcast to the sums


def _bias_values(
    context: Context, group: FusedOp, spread: Callable[[NDArray[Any], bool], NDArray[Any]]
) -> Bias | None:
    """Return the bias that the chip adds to the sums or to their floats, if there is one."""
    found = [
        (node, tensor)
        for node in group.nodes
        for index, tensor in enumerate(node.inputs)
        if (node.name, index) in context.biases
        or (context.keeps_biases and is_bias(group, node, index))
    ]
    if not found:
        return None
    ((node, tensor),) = found
    values = np.asarray(tensor.values, np.float64)
    return tensor.name, spread(values, False) if is_convolution(node) else values


def _integer_bias(
    context: Context, bias: Bias, first: NDArray[Any], second: NDArray[Any]
) -> tuple[Int64Array, NDArray[np.float64]]:
    """Return the int32 bias and its rounding error, both broadcastable to the sums."""
    name, values = bias
    dtype = np.float32 if context.arithmetic.requantize == "float" else np.float64
    exact = values / (np.asarray(first, dtype) * np.asarray(second, dtype))
    limit = 2 ** (context.rule.bias_bits - 1)
    if np.abs(exact).max(initial=0) >= limit:
        raise PlanError(
            f"Bias '{name}': bias / (s_x * s_w) reaches {np.abs(exact).max():.3g}, beyond "
            f"{context.rule.bias_bits} bits. The weights of this layer are almost zero; calibrate "
            "again."
        )
    integers = round_levels(exact, context.arithmetic.bias_rounding)
    return integers, integers - exact


def _addend(
    group: FusedOp, operands: Sequence[Operand], scale: NDArray[np.float32]
) -> Addend | None:
    """Return the activation that a fused Add adds to the sums, whose scale is given."""
    node = added(group)
    if node is None:
        return None
    (operand,) = (o for o in operands if o.node == node.name)
    if operand.grid is None or operand.values is not None:
        raise RuleError(
            f"Node '{node.name}': no source says how the chip adds a constant or a float to the "
            "sums of a product. Evaluate with --mode qdq."
        )
    multiplier, shift = sum_factors(np.asarray(operand.grid.scale / scale))
    return Addend(source=operand.tensor, grid=operand.grid, multiplier=multiplier, shift=shift)


def _sums(
    context: Context,
    node: gs.Node,
    pair: Sequence[Operand],
    grids: Sequence[Grid],
    *,
    weight: NDArray[np.int8] | None = None,
) -> Callable[..., Int64Array]:
    """Return the function for sums; ``weight``: integers that replace those of the second grid."""
    constants = [
        None if o.values is None else g.centered(g.quantize(o.values, "half-even"))
        for o, g in zip(pair, grids, strict=True)
    ]
    if weight is not None:
        constants[1] = weight.astype(np.int32)
    if is_convolution(node):
        kernel = constants[1]
        if kernel is None:
            raise RuleError(
                f"Node '{node.name}': its kernel is not a constant. Evaluate with --mode qdq."
            )
        low, high = grids[0].limits
        zero_point = int(grids[0].params.zero_point)
        largest = max(zero_point - low, high - zero_point)
        wide = any(grid.spec.bits > BYTE for grid in grids)
        kind: type[ExactConvolution | SplitConvolution]
        kind = SplitConvolution if wide else ExactConvolution
        return kind(context.protos[node.name], kernel, largest, context.opset, context.threads)
    return _matmul(node, constants)


def _matmul(
    node: gs.Node, constants: Sequence[NDArray[np.int32] | None]
) -> Callable[..., Int64Array]:
    flips = [bool(node.attrs.get(key, 0)) and node.op == "Gemm" for key in ("transA", "transB")]

    def sums(*activations: NDArray[np.int32]) -> Int64Array:
        fed = iter(activations)
        both = [next(fed) if c is None else c for c in constants]
        a, b = (v.T if flip else v for v, flip in zip(both, flips, strict=True))
        return exact_matmul(a, b)

    return sums
