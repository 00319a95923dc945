"""Choose the gradient ops of onnxruntime's training build that are used if it is installed.

Every definition is written in ops that any onnxruntime has. Where a kernel of the training build is
faster, it is used instead. The table lists these kernels, with the measurements.
"""

from __future__ import annotations

import functools

from onnx import TensorProto, helper

from onnxqat.errors import OnnxQatError
from onnxqat.gradients.backward import CONTRIB
from onnxqat.runtime import open_session

__all__ = ["KERNELS", "installed_kernels"]

# Milliseconds of CPU time of forward and gradient, onnxruntime-training 1.19.2 on Zen 5 with
# AVX-512, one thread. First number: ops that any onnxruntime has; second: the kernel.
#
#   used                                          not used
#   ConvGrad, 3x3, 64 channels, 56x56   138  122  SoftmaxGrad_13, last of 4 axes       27  24
#   ConvGrad, 3x3 depthwise, 56x56      137   70  SoftmaxGrad_13, second of 4 axes     13  32
#   MaxPoolGrad, 3x3 with stride 2       82   72  LogSoftmaxGrad_13, second of 4 axes  18  31
#   GeluGrad, 1.6 million values         18   14  LayerNormalizationGrad              3.6 3.8
#   SigmoidGrad                          10    5  SoftmaxCrossEntropyLossGrad, dense   20  25
#   TanhGrad                              7    6  AveragePoolGrad                      17  17
#
# ConvGrad is not used for small feature maps, see `onnxqat.gradients.small_maps`.
#
# Without a kernel for SoftmaxCrossEntropyLoss, onnxruntime replaces the node by nodes that it runs
# last; a gradient that read their output would wait, and all tensors with it.
KERNELS = frozenset(
    ("ConvGrad", "GeluGrad", "MaxPoolGrad", "SigmoidGrad", "SoftmaxCrossEntropyLoss", "TanhGrad")
)
IR_VERSION = 8


@functools.cache
def installed_kernels() -> frozenset[str]:
    """Return the gradient ops to use: `KERNELS` with a training build, otherwise none."""
    value = helper.make_tensor_value_info
    node = helper.make_node("TanhGrad", ["dy", "y"], ["dx"], domain=CONTRIB)
    inputs = [value(name, TensorProto.FLOAT, [1]) for name in ("dy", "y")]
    graph = helper.make_graph([node], "probe", inputs, [value("dx", TensorProto.FLOAT, [1])])
    opsets = [helper.make_opsetid("", 16), helper.make_opsetid(CONTRIB, 1)]
    try:
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        open_session(model, optimization="none", threads=1)
    except OnnxQatError:
        return frozenset()
    return KERNELS
