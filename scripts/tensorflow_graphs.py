"""Graphs as TensorFlow's ONNX converter (tf2onnx) writes them, built by hand.

TensorFlow stores images as NHWC and pads by ``SAME``. The converter puts a Transpose before and
after each convolution and keeps ``auto_pad``. Without its optimizer it also keeps the weights in
TensorFlow's layout, and the graph transposes them to ONNX's layout.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["TENSORFLOW_GRAPHS"]

TO_NCHW, TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]
TO_OIHW = [3, 2, 0, 1]  # permutation for a filter stored as HWIO
BN_EPSILON = 1e-3  # Keras
OPSET = 13


class _Graph:
    """Collects nodes and random weights; values have names in TensorFlow's style."""

    def __init__(self, pads: str, stored: Literal["initializer", "computed"]) -> None:
        self.rng = np.random.default_rng(0)
        self.pads = pads
        self.stored = stored
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = f"{name}:0"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def initializer(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def filter(self, name: str, height: int, inputs: int, outputs: int, *, depthwise: bool) -> str:
        """Return the name of a filter in ONNX's layout, stored as TensorFlow does."""
        shape = (height, height, inputs, outputs)
        spread = np.sqrt(2 / (height * height * (1 if depthwise else inputs)))
        values = self.rng.normal(scale=spread, size=shape).astype(np.float32)
        onnx_shape = (inputs, 1, height, height) if depthwise else (outputs, inputs, height, height)
        if self.stored == "initializer":
            return self.initializer(
                f"{name}/weights_fused", values.transpose(TO_OIHW).reshape(onnx_shape)
            )
        half = numpy_helper.from_array(values.astype(np.float16))
        x = self.node("Constant", [], f"{name}/ReadVariableOp", value=half)
        x = self.node("Cast", [x], f"{name}/Cast", to=TensorProto.FLOAT)
        x = self.node("Transpose", [x], f"{name}/kernel_transpose", perm=TO_OIHW)
        if not depthwise:
            return x
        # (1, inputs, h, w) of a depthwise filter becomes (inputs, 1, h, w)
        target = numpy_helper.from_array(np.array(onnx_shape, np.int64))
        shape_name = self.node("Constant", [], f"{name}/kernel_shape", value=target)
        return self.node("Reshape", [x, shape_name], f"{name}/kernel_reshape")

    def conv(
        self, x: str, name: str, kernel: int, inputs: int, outputs: int, stride: int = 1
    ) -> str:
        """Add a normalized convolution from NHWC to NHWC, depthwise if ``outputs`` is 0."""
        depthwise = not outputs
        channels = outputs or inputs
        weight = self.filter(name, kernel, inputs, outputs or 1, depthwise=depthwise)
        x = self.node("Transpose", [x], f"{name}__in", perm=TO_NCHW)
        x = self.node(
            "Conv",
            [x, weight],
            name,
            auto_pad=self.pads,
            strides=[stride, stride],
            kernel_shape=[kernel, kernel],
            dilations=[1, 1],
            group=inputs if depthwise else 1,
        )
        x = self.node(
            "BatchNormalization", [x, *self._norm(name, channels)], f"{name}/bn", epsilon=BN_EPSILON
        )
        return self.node("Transpose", [x], f"{name}__out", perm=TO_NHWC)

    def _norm(self, name: str, channels: int) -> list[str]:
        def draw(suffix: str, low: float, high: float) -> str:
            values = self.rng.uniform(low, high, channels).astype(np.float32)
            return self.initializer(f"{name}/bn/{suffix}", values)

        return [
            draw("gamma", 0.8, 1.2),
            draw("beta", -0.2, 0.2),
            draw("mean", -0.1, 0.1),
            draw("variance", 0.5, 1.5),
        ]

    def relu6(self, x: str, name: str) -> str:
        ends = []
        for suffix, value in (("min", 0.0), ("max", 6.0)):
            end = f"{name}/{suffix}"
            if self.stored == "computed":
                tensor = numpy_helper.from_array(np.array(value, np.float32))
                ends.append(self.node("Constant", [], end, value=tensor))
            else:
                ends.append(self.initializer(end, np.array(value, np.float32)))
        return self.node("Clip", [x, *ends], name)

    def pool(self, x: str, name: str, op_type: str) -> str:
        x = self.node("Transpose", [x], f"{name}__in", perm=TO_NCHW)
        x = self.node(op_type, [x], name, auto_pad=self.pads, kernel_shape=[3, 3], strides=[2, 2])
        return self.node("Transpose", [x], f"{name}__out", perm=TO_NHWC)

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        values = self.rng.normal(scale=inputs**-0.5, size=(outputs, inputs)).astype(np.float32)
        if self.stored == "computed":
            constant = numpy_helper.from_array(values)
            weight = self.node("Constant", [], f"{name}/ReadVariableOp", value=constant)
            weight = self.node("Transpose", [weight], f"{name}/transpose", perm=[1, 0])
        else:
            weight = self.initializer(f"{name}/kernel", np.ascontiguousarray(values.T))
        bias = self.initializer(
            f"{name}/bias", self.rng.normal(scale=0.1, size=outputs).astype(np.float32)
        )
        x = self.node("MatMul", [x, weight], f"{name}/MatMul")
        return self.node("Add", [x, bias], f"{name}/BiasAdd")


def _mobilenet(
    *, small: bool, pads: str, stored: Literal["initializer", "computed"]
) -> onnx.ModelProto:
    """Return a small MobileNet-like classifier; an odd image size makes ``SAME`` uneven."""
    width, side, blocks = (8, 33, 2) if small else (32, 225, 5)
    graph = _Graph(pads, stored)
    x = graph.relu6(graph.conv("input:0", "stem", 3, 3, width, 2), "stem/Relu6")
    x = graph.pool(x, "pool", "MaxPool")
    for index in range(blocks):
        name = f"block{index}"
        skip = x
        x = graph.relu6(graph.conv(x, f"{name}/expand", 1, width, 2 * width), f"{name}/Relu6")
        x = graph.relu6(graph.conv(x, f"{name}/depthwise", 3, 2 * width, 0), f"{name}/Relu6_1")
        x = graph.conv(x, f"{name}/project", 1, 2 * width, width)
        x = graph.node("Add", [skip, x], f"{name}/add")
    x = graph.pool(x, "avgpool", "AveragePool")
    x = graph.node("ReduceMean", [x], "Mean", axes=[1, 2], keepdims=0)
    x = graph.dense(x, "logits", width, 10)
    graph.node("Softmax", [x], "output", axis=-1)
    proto = helper.make_graph(
        graph.nodes,
        "tf2onnx",
        [helper.make_tensor_value_info("input:0", TensorProto.FLOAT, ["batch", side, side, 3])],
        [helper.make_tensor_value_info("output:0", TensorProto.FLOAT, ["batch", 10])],
        graph.weights,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="tf2onnx", ir_version=7)
    onnx.checker.check_model(model, full_check=True)
    return model


def same_upper(*, small: bool) -> onnx.ModelProto:
    return _mobilenet(small=small, pads="SAME_UPPER", stored="initializer")


def same_lower(*, small: bool) -> onnx.ModelProto:
    return _mobilenet(small=small, pads="SAME_LOWER", stored="initializer")


def computed_weights(*, small: bool) -> onnx.ModelProto:
    return _mobilenet(small=small, pads="SAME_UPPER", stored="computed")


TENSORFLOW_GRAPHS = {
    "tf_same_upper": same_upper,
    "tf_same_lower": same_lower,
    "tf_computed_weights": computed_weights,
}
