"""Which of the gradient ops that only a training build of onnxruntime has are used where it is.

Every definition is written in ops that any onnxruntime has. Where a kernel of the training build
is faster, it is used instead; the table says which, and how it was measured.
"""

from __future__ import annotations

import functools

from onnx import TensorProto, helper

from onnxqat.errors import OnnxQatError
from onnxqat.gradients.backward import CONTRIB
from onnxqat.runtime import open_session

__all__ = ["KERNELS", "installed_kernels"]

KERNELS = frozenset(
    (
        *("ConvGrad", "GeluGrad", "LayerNormalizationGrad", "LogSoftmaxGrad_13", "MaxPoolGrad"),
        *("SigmoidGrad", "SoftmaxCrossEntropyLossGrad", "SoftmaxGrad_13", "TanhGrad"),
    )
)
IR_VERSION = 8


@functools.cache
def installed_kernels() -> frozenset[str]:
    """Return the gradient ops to use with the installed runtime: those of `KERNELS`, or none."""
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
