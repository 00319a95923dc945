"""The gradient of ConvTranspose.

A ConvTranspose is the adjoint of a Conv with the same weight, strides, pads, dilations and groups
(Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285, section 4)::

    y = conv_adjoint(x, w):   dx = conv(dy, w)
                              dw = the weight gradient of that Conv, whose input is dy
                                   and whose upstream gradient is x
                              db = sum of dy over samples and positions
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxqat.train.lowering.gradient import Gradient, Refusal, static_shape

__all__ = ["conv_transpose"]


def conv_transpose(node: gs.Node) -> Gradient:
    """Return the gradient of a ConvTranspose of any rank, group, stride, pad and dilation."""
    kernel = static_shape(node.inputs[1], "weight")[2:]
    ones = [1] * len(kernel)
    strides = list(node.attrs.get("strides", ones))
    dilations = list(node.attrs.get("dilations", ones))
    extra = list(node.attrs.get("output_padding", [0] * len(kernel)))
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        raise Refusal(f"its output_padding {extra} is not smaller than its strides {strides}")
    attributes = (
        f"group = {node.attrs.get('group', 1)}, kernel_shape = {kernel}, strides = {strides}, "
        f"dilations = {dilations}, pads = {_pads(node, kernel, strides, dilations, extra)}"
    )
    axes = [0, *range(2, 2 + len(kernel))]
    text = f"""
    dx = Conv<{attributes}>(dy, w)
    unused, dw = com.microsoft.ConvGrad<{attributes}>(x, dy, w)
    db = ReduceSum<axes = {axes}, keepdims = 0>(dy)"""
    return Gradient(inputs=("x", "w", "b"), text=text)


def _pads(
    node: gs.Node, kernel: list[int], strides: list[int], dilations: list[int], extra: list[int]
) -> list[int]:
    """Return the explicit pads, first all begins, then all ends.

    With ``output_shape`` or SAME, the pads follow from the output size
    (https://onnx.ai/onnx/operators/onnx__ConvTranspose.html).
    """
    mode, wanted = node.attrs.get("auto_pad", "NOTSET"), node.attrs.get("output_shape")
    if mode == "VALID":
        return [0] * (2 * len(kernel))
    if mode == "NOTSET" and not wanted:
        return list(node.attrs.get("pads", [0] * (2 * len(kernel))))
    shape, out = static_shape(node.inputs[0], "input"), static_shape(node.outputs[0], "output")
    begins, ends = [], []
    for n, m, k, s, d, e in zip(shape[2:], out[2:], kernel, strides, dilations, extra, strict=True):
        total = (n - 1) * s + e + (k - 1) * d + 1 - m
        begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
        begins.append(begin)
        ends.append(total - begin)
    if min((*begins, *ends)) < 0:
        raise Refusal(f"its output_shape {wanted} needs negative pads")
    return begins + ends
