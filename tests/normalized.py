"""A network whose BatchNormalization has statistics measured by numpy and onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxqat.model import Model, from_proto
from tests.oracles import run_ort

__all__ = ["IMAGES", "MEAN", "SCALE", "graph", "network"]

RNG = np.random.default_rng(5)
# the images differ in brightness, like real ones
IMAGES = (RNG.normal(120, 45, (96, 1, 1, 1)) + RNG.normal(0, 45, (96, 8, 8, 3))).clip(0, 255)
MEAN, SCALE = (120.0, 121.0, 119.0), (0.016, 0.016, 0.016)
KERNEL = RNG.normal(size=(8, 3, 3, 3)).astype(np.float32)


def network(*, first: bool = True, between: str = "Identity", **batchnorm: Any) -> Model:
    """Return Conv, activation, BatchNormalization, with the statistics that training would have."""
    layers = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(between, ["c"], ["a"], name="between"),
    ]
    source = "a" if first else "x"
    head = layers if first else []
    pixels = (IMAGES.astype(np.float32) - np.float32(MEAN)) * np.float32(SCALE)
    (seen,) = run_ort(graph(head, source), {"x": pixels.transpose(0, 3, 1, 2)})
    arrays = {
        "scale": RNG.uniform(0.5, 2, seen.shape[1]),
        "shift": RNG.normal(size=seen.shape[1]),
        "mean": seen.mean((0, 2, 3)),
        "var": seen.var((0, 2, 3)),
    } | batchnorm
    names = ["scale", "shift", "mean", "var"]
    nodes = [
        *head,
        helper.make_node("BatchNormalization", [source, *names], ["b"], name="bn"),
        helper.make_node("Relu", ["b"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], name="pool"),
    ]
    floats = {n: np.asarray(v, np.float32) for n, v in arrays.items()}
    return from_proto(graph(nodes, "y", floats), name="net.onnx")


def graph(nodes: list[onnx.NodeProto], output: str, arrays: Any = None) -> onnx.ModelProto:
    if not nodes:  # onnxruntime needs a node
        nodes, output = [helper.make_node("Identity", ["x"], ["same"])], "same"
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in ({"w": KERNEL} | (arrays or {})).items()],
    )
    return helper.make_model(made, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
