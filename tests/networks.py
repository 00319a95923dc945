"""Small networks with the patterns that real exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.model import Model, from_proto
from onnxqat.overrides import parse_override
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import OPSET_OF_16_BITS, insert_pairs, needs_16_bits
from onnxqat.rules import bundled_rules, load_rule

W4A4 = ("weight.bits=4", "activation.bits=4", "first.bits=8", "last.bits=8")
RULES = bundled_rules()


class _Graph:
    """Collects nodes and random initializers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int, size: float = 0.3) -> str:
        values = self.rng.normal(scale=size, size=shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Any) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        node = helper.make_node(op_type, inputs, [output], name=f"n_{output}", **attributes)
        self.nodes.append(node)
        return output

    def model(self, shape: list[Any], classes: list[Any], opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, classes)],
            self.weights,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def convnet(
    *, seed: int = 0, activation: str = "Relu", opset: int = 17, kinks: bool = True
) -> onnx.ModelProto:
    """Return a network of convolutions, a residual Add, MaxPool, Concat, pooling and a Gemm.

    Without ``kinks``, no Relu or MaxPool follows a quantized tensor: values on a grid are often
    exactly zero or equal, where these ops have no derivative to compare with.
    """
    g = _Graph(seed)
    pads = {"pads": [1, 1, 1, 1]}
    g.node("Conv", ["input", g.weight("w1", 6, 3, 3, 3), g.weight("b1", 6)], "c1", **pads)
    alpha = {"alpha": 0.1} if activation == "LeakyRelu" else {}
    g.node(activation, ["c1"], "r1", **alpha)
    g.node("Conv", ["r1", g.weight("w2", 6, 1, 3, 3), g.weight("b2", 6)], "c2", group=6, **pads)
    limits = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    g.node("Clip", ["c2", *limits], "r2")
    g.node("Conv", ["r2", g.weight("w3", 6, 6, 1, 1)], "c3")
    g.node("Add", ["c3", "r1"], "a1")
    g.node("Relu" if kinks else "Tanh", ["a1"], "r3")
    pool = "MaxPool" if kinks else "AveragePool"
    g.node(pool, ["r3"], "p1", kernel_shape=[2, 2], strides=[2, 2])
    g.node("Conv", ["p1", g.weight("w4", 4, 6, 3, 3), g.weight("b4", 4)], "c4", **pads)
    g.node("Concat", ["p1", "c4"], "k1", axis=1)
    g.node("AveragePool", ["k1"], "v1", kernel_shape=[2, 2], strides=[2, 2])
    g.node("GlobalAveragePool", ["v1"], "v2")
    g.node("Flatten", ["v2"], "f1")
    g.node("Gemm", ["f1", g.weight("w5", 5, 10), g.weight("b5", 5)], "output", transB=1)
    return g.model(["N", 3, 8, 8], ["N", 5], opset)


def attention(*, seed: int = 0) -> onnx.ModelProto:
    """Return one self-attention block, with biases, Softmax and LayerNormalization."""
    g = _Graph(seed)
    for name in ("q", "k", "v"):
        g.node("MatMul", ["input", g.weight(f"w{name}", 8, 8)], f"{name}0")
        g.node("Add", [f"{name}0", g.weight(f"b{name}", 8)], name)
    g.node("Transpose", ["k"], "kt", perm=[0, 2, 1])
    g.node("MatMul", ["q", "kt"], "s0")
    g.node("Mul", ["s0", g.constant("scaling", np.float32(8**-0.5))], "s1")
    g.node("Softmax", ["s1"], "s2", axis=-1)
    g.node("MatMul", ["s2", "v"], "m")
    g.node("Add", ["m", "input"], "a")
    ln = [g.constant("gamma", np.ones(8, np.float32)), g.constant("beta", np.zeros(8, np.float32))]
    g.node("LayerNormalization", ["a", *ln], "l", axis=-1)
    g.node("ReduceMean", ["l"], "p", axes=[1], keepdims=0)
    g.node("Gemm", ["p", g.weight("wo", 8, 3), g.weight("bo", 3)], "output")
    return g.model(["N", 6, 8], ["N", 3])


def upsampling(*, seed: int = 0) -> onnx.ModelProto:
    """Return a network with ops of detectors and segmenters that training has to replace.

    They are Softplus, InstanceNormalization, squeeze and excite with HardSigmoid, ConvTranspose,
    linear Resize, reflect Pad, DepthToSpace, Einsum and Mish. No op with a kink follows a
    quantized tensor.
    """
    g = _Graph(seed)
    pads = {"pads": [1, 1, 1, 1]}
    g.node("Conv", ["input", g.weight("w1", 6, 3, 3, 3), g.weight("b1", 6)], "c1", **pads)
    g.node("Softplus", ["c1"], "h1")
    norm = [g.weight("gamma", 6, size=1), g.weight("beta", 6)]
    g.node("InstanceNormalization", ["h1", *norm], "i1")
    g.node("GlobalAveragePool", ["i1"], "v1")
    g.node("Conv", ["v1", g.weight("w2", 6, 6, 1, 1)], "c2")
    g.node("HardSigmoid", ["c2"], "s2")
    g.node("Mul", ["i1", "s2"], "m1")
    upwards = {"strides": [2, 2], "kernel_shape": [2, 2]}
    g.node("ConvTranspose", ["m1", g.weight("w3", 6, 4, 2, 2), g.weight("b3", 4)], "t1", **upwards)
    scales = g.constant("scales", np.float32([1, 1, 2, 2]))
    g.node("Resize", ["m1", "", scales], "z1", mode="linear")
    g.node("Concat", ["t1", "z1"], "k1", axis=1)
    g.node("Pad", ["k1", g.constant("pads", np.int64([0, 0, 1, 1] * 2))], "e1", mode="reflect")
    g.node("Conv", ["e1", g.weight("w4", 8, 10, 3, 3)], "c4")
    g.node("DepthToSpace", ["c4"], "d1", blocksize=2)
    g.node("Einsum", ["d1", g.weight("w5", 2, 4)], "x1", equation="bchw,cd->bdhw")
    g.node("Mish", ["x1"], "y1")
    g.node("GlobalAveragePool", ["y1"], "v2")
    g.node("Flatten", ["v2"], "output", axis=1)
    return g.model(["N", 3, 4, 4], ["N", 4], 18)


def detector(*, seed: int = 0) -> onnx.ModelProto:
    """Return a detector: convolutions to a grid with one objectness logit and four box channels."""
    g = _Graph(seed)
    down = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    g.node("Conv", ["input", g.weight("w1", 16, 3, 3, 3), g.weight("b1", 16)], "c1", **down)
    g.node("Relu", ["c1"], "r1")
    g.node("Conv", ["r1", g.weight("w2", 32, 16, 3, 3, size=0.1), g.weight("b2", 32)], "c2", **down)
    g.node("Relu", ["c2"], "r2")
    g.node("Conv", ["r2", g.weight("w3", 5, 32, 1, 1), g.weight("b3", 5)], "output")
    return g.model(["N", 3, 16, 16], ["N", 5, 4, 4])


def answering(*, seed: int = 0) -> onnx.ModelProto:
    """Return a question answering network: logits of the start and the end of the answer."""
    g = _Graph(seed)
    g.node("MatMul", ["input", g.weight("w1", 16, 64)], "m1")
    g.node("Add", ["m1", g.weight("b1", 64)], "a1")
    g.node("Tanh", ["a1"], "t1")
    g.node("MatMul", ["t1", g.weight("w2", 64, 64, size=0.2)], "m2")
    g.node("Add", ["m2", g.weight("b2", 64)], "a2")
    g.node("Tanh", ["a2"], "t2")
    g.node("MatMul", ["t2", g.weight("w3", 64, 2)], "m3")
    g.node("Add", ["m3", g.weight("b3", 2)], "a3")
    split = helper.make_node("Split", ["a3"], ["s", "e"], name="n_split", axis=-1)
    g.nodes.append(split)
    axis = g.constant("axis", np.int64([-1]))
    g.node("Squeeze", ["s", axis], "output")
    g.node("Squeeze", ["e", axis], "end")
    model = g.model(["N", 12, 16], ["N", 12])
    end = helper.make_tensor_value_info("end", TensorProto.FLOAT, ["N", 12])
    model.graph.output.append(end)
    return model


def joined_to_a_constant() -> onnx.ModelProto:
    """Return a network with a Concat of an activation and a constant of larger values (batch 4)."""
    g = _Graph(0)
    g.node("Conv", ["input", g.weight("w1", 4, 3, 1, 1)], "c1")
    g.node("Relu", ["c1"], "r1")
    g.node("Concat", ["r1", g.weight("k1", 4, 2, 8, 8, size=3.0)], "k2", axis=1)
    g.node("Conv", ["k2", g.weight("w2", 4, 6, 1, 1)], "c2")
    g.node("GlobalAveragePool", ["c2"], "output")
    return g.model([4, 3, 8, 8], [4, 4, 1, 1])


def spotter(*, seed: int = 0, length: Any = 5) -> onnx.ModelProto:
    """Sequences to classes: an LSTM of two directions, then a GRU, of which the last state counts.

    ``length`` is that of the sequences.
    """
    g = _Graph(seed)
    g.node("Transpose", ["input"], "t", perm=[1, 0, 2])
    lstm = [g.weight("w1", 2, 16, 3), g.weight("r1", 2, 16, 4), g.weight("b1", 2, 32)]
    g.node("LSTM", ["t", *lstm], "h1", hidden_size=4, direction="bidirectional")
    g.node("Transpose", ["h1"], "h2", perm=[0, 2, 1, 3])
    g.node("Reshape", ["h2", g.constant("shape", np.int64([0, 0, 8]))], "h3")
    gru = [g.weight("w2", 1, 15, 8), g.weight("r2", 1, 15, 5), g.weight("b2", 1, 30)]
    node = helper.make_node("GRU", ["h3", *gru], ["", "last"], name="n_last", hidden_size=5)
    g.nodes.append(node)
    g.node("Squeeze", ["last", g.constant("axis", np.int64([0]))], "s")
    g.node("Gemm", ["s", g.weight("w3", 5, 4), g.weight("b3", 4)], "output")
    return g.model(["N", length, 3], ["N", 4])


def samples(model: onnx.ModelProto, count: int, *, seed: int = 1) -> np.ndarray[Any, Any]:
    """Return random inputs of a network, float32."""
    dims = model.graph.input[0].type.tensor_type.shape.dim[1:]
    shape = (count, *(d.dim_value for d in dims))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def planned(
    network: onnx.ModelProto, rule: str, overrides: tuple[str, ...] = ()
) -> tuple[Model, QuantPlan]:
    """Return the prepared float model, at the opset its plan needs, and the plan."""
    parsed = [parse_override(o) for o in overrides]
    floats = prepare(from_proto(network))
    plan = make_plan(floats.graph, load_rule(rule), parsed)
    if needs_16_bits(plan):
        floats = prepare(from_proto(network), opset=OPSET_OF_16_BITS)
        plan = make_plan(floats.graph, load_rule(rule), parsed)
    return floats, plan


def quantized(
    network: onnx.ModelProto,
    rule: str = "sophgo-bm1684x",
    overrides: tuple[str, ...] = (),
    *,
    observer: str = "minmax",
) -> tuple[Model, Model]:
    """Return the prepared float model and its calibrated Q/DQ model."""
    floats, plan = planned(network, rule, overrides)
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    batches = [{"input": samples(network, 16, seed=s)} for s in range(2)]
    return floats, calibrate(empty, batches, observer=observer)
