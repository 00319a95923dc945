"""Gradients of reductions, and of pooling by a maximum or a norm.

If several values share the maximum (frequent for quantized tensors), each gets an equal part of the
gradient, which is a subgradient. Axes must be constant.

====================  ==================================================
ReduceMax, ReduceMin  dy * mask / sum(mask), mask = (x == y)
ReduceL1, ReduceL2    dy * sign(x), dy * x / y (0 where y is 0)
ReduceSumSquare       2 * dy * x
ReduceSum, ReduceMean dy, dy / count
ReduceProd            dy * product of the other values, also if one is zero
ReduceLogSum          dy / sum(x) = dy * exp(-y)
ReduceLogSumExp       dy * exp(x - y)
GlobalMaxPool         ReduceMax over the spatial axes
GlobalLpPool, LpPool  sum over windows of dy * x * |x|^(p-2) * y^(1-p)
====================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxqat.preparation.editing import constant_values
from onnxqat.train.lowering.gradient import Gradient, Refusal, rank_of, static_shape

__all__ = ["REDUCTIONS", "global_pool", "lp_pool", "reduction"]

# Text that computes dx from x, and from y and dy with the reduced axes ({axes}) kept.
SHARED_MAXIMUM = """steep = Mul(distance, big) far = Clip(steep, zero, one) mask = Sub(one, far)
    count = ReduceSum<axes = {axes}, keepdims = 1>(mask) part = Div(dyk, count)
    dx = Mul(mask, part)"""
REDUCTIONS = {
    "ReduceMax": f"distance = Sub(yk, x) {SHARED_MAXIMUM}",
    "ReduceMin": f"distance = Sub(x, yk) {SHARED_MAXIMUM}",
    "ReduceL1": "sign = Sign(x) dx = Mul(dyk, sign)",
    "ReduceL2": "least = Max(yk, tiny) unit = Div(x, least) dx = Mul(dyk, unit)",
    "ReduceMean": """xs = Shape(x) all = Size(x) left = Size(y) n = Div(all, left)
    count = Cast<to = 1>(n) part = Div(dyk, count) dx = Expand(part, xs)""",
    "ReduceSum": "xs = Shape(x) dx = Expand(dyk, xs)",
    "ReduceSumSquare": "xx = Mul(x, two) dx = Mul(dyk, xx)",
    "ReduceProd": """a = Abs(x) steep = Mul(a, big) filled = Clip(steep, zero, one)
    empty = Sub(one, filled) factors = Add(x, empty)
    product = ReduceProd<axes = {axes}, keepdims = 1>(factors)
    zeros = ReduceSum<axes = {axes}, keepdims = 1>(empty) others = Sub(zeros, empty)
    none = Sub(one, others) kept = Clip(none, zero, one) ratio = Div(product, factors)
    d = Mul(ratio, kept) dx = Mul(dyk, d)""",
    "ReduceLogSum": """n = Neg(yk) e = Exp(n) column = Mul(dyk, e) zeros = Mul(x, zero)
    dx = Add(zeros, column)""",
    "ReduceLogSumExp": "d = Sub(x, yk) e = Exp(d) dx = Mul(dyk, e)",
}
TINY = 1e-30


def reduction(node: gs.Node) -> Gradient:
    """Return the gradient of an op in `REDUCTIONS`."""
    rank = rank_of(node.inputs[0], "input")
    axes, kept = _axes(node, rank), bool(node.attrs.get("keepdims", 1))
    return _reduction(node.op, axes, kept=kept, to_scalar=not kept and len(axes) == rank)


def _axes(node: gs.Node, rank: int) -> list[int]:
    given = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1].name:
        values = constant_values(node.inputs[1])
        if values is None:
            raise Refusal("its axes are not constant")
        given = values.tolist()
    if not given and node.attrs.get("noop_with_empty_axes", 0):
        raise Refusal("it has no axes to reduce (noop_with_empty_axes)")
    return [axis % rank for axis in given] if given else list(range(rank))


def _reduction(
    op_type: str, axes: Sequence[int], *, kept: bool, to_scalar: bool = False
) -> Gradient:
    listed = list(axes)
    keep = "Identity({0})" if kept else f"Unsqueeze<axes = {listed}>({{0}})"
    # onnxruntime's gradient of a scalar can have the shape (1,)
    kept_dy = "Reshape(dy, yks)" if to_scalar else keep.format("dy")
    text = f"yk = {keep.format('y')} {'yks = Shape(yk) ' * to_scalar}dyk = {kept_dy} "
    text += REDUCTIONS[op_type].format(axes=listed)
    return Gradient(inputs=("x", "axes"), text=text, constants={"tiny": TINY})


def global_pool(op_type: str) -> Callable[[gs.Node], Gradient]:
    """Return a function that makes the gradient of a pooling: ``op_type`` over spatial axes."""

    def make(node: gs.Node) -> Gradient:
        rank = rank_of(node.inputs[0], "input")
        if node.op == "GlobalLpPool" and node.attrs.get("p", 2) != 2:
            raise Refusal(f"its p is {node.attrs['p']}; only p = 2 is supported")
        return _reduction(op_type, range(2, rank), kept=True)

    return make


def lp_pool(node: gs.Node) -> Gradient:
    """Return the gradient of LpPool; the sum over windows is a ConvTranspose with ones."""
    shape, out = static_shape(node.inputs[0], "input"), static_shape(node.outputs[0], "output")
    kernel = list(node.attrs["kernel_shape"])
    ones = [1] * len(kernel)
    strides, pads = node.attrs.get("strides", ones), node.attrs.get("pads", [0, 0] * len(kernel))
    dilations = node.attrs.get("dilations", ones)
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or node.attrs.get("ceil_mode", 0):
        raise Refusal("it has auto_pad or ceil_mode")
    pairs = zip(shape[2:], out[2:], strides, kernel, dilations, pads, pads[len(kernel) :],
                strict=False)  # fmt: skip
    extra = [n + p + q - (m - 1) * s - (k - 1) * d - 1 for n, m, s, k, d, p, q in pairs]
    exponent = float(node.attrs.get("p", 2))
    text = f"""least = Max(y, tiny) power = Pow(least, y_exponent) spread = Mul(dy, power)
    summed = ConvTranspose<group = {shape[1]}, kernel_shape = {kernel}, strides = {list(strides)},
        pads = {list(pads)}, dilations = {list(dilations)}, output_padding = {extra}>(spread, ones)
    a = Abs(x) sign = Sign(x) grown = Pow(a, x_exponent) signed = Mul(sign, grown)
    dx = Mul(signed, summed)"""
    constants = {
        "ones": np.ones([shape[1], 1, *kernel], np.float32),
        "tiny": TINY,
        "x_exponent": exponent - 1,
        "y_exponent": 1 - exponent,
    }
    return Gradient(inputs=("x",), text=text, constants=constants)
