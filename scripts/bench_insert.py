"""Time `insert` against onnxruntime.quantization on transformers of 1,250 to 10,000 nodes.

    python scripts/bench_insert.py [--repeat 3]

Ours: prepare, plan and insert without calibration; the median time counts. The peer:
`quantize_model` of onnxruntime.quantization's QDQQuantizer, that is its graph rewriting with given
ranges. The peer takes minutes for 5,000 nodes, so it runs once and not on larger graphs. Both start
from the model in memory and run in turn in this process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from onnxqat.calibration import placeholder_params
from onnxqat.cli import GARBAGE_THRESHOLD
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule

LARGEST_FOR_PEER = 5000
WIDTH, HEADS, LENGTH = 32, 4, 8
OP_TYPES = ("MatMul", "Add", "Mul", "Softmax", "Transpose", "Reshape")


class _Transformer:
    """Builds a transformer of the given number of nodes, as exporters write it."""

    def __init__(self, nodes: int) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shape = self.constant("heads", np.array([0, LENGTH, HEADS, WIDTH // HEADS], np.int64))
        self.flat = self.constant("flat", np.array([0, LENGTH, WIDTH], np.int64))
        value = "input"
        while len(self.nodes) < nodes:
            value = self.layer(value)
        self.output = value

    def constant(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int) -> str:
        values = self.rng.normal(scale=0.2, size=shape).astype(np.float32)
        return self.constant(f"w{len(self.weights)}", values)

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def linear(self, value: str, rows: int, columns: int) -> str:
        product = self.node("MatMul", value, self.weight(rows, columns))
        return self.node("Add", product, self.weight(columns))

    def norm(self, value: str) -> str:
        scale, bias = self.weight(WIDTH), self.weight(WIDTH)
        return self.node("LayerNormalization", value, scale, bias, axis=-1)

    def layer(self, value: str) -> str:
        x = self.norm(value)
        parts = []
        for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
            split = self.node("Reshape", self.linear(x, WIDTH, WIDTH), self.shape)
            parts.append(self.node("Transpose", split, perm=list(perm)))
        scores = self.node("Mul", self.node("MatMul", parts[0], parts[1]), self.weight(1))
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), parts[2])
        merged = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.flat)
        value = self.node("Add", value, self.linear(merged, WIDTH, WIDTH))
        hidden = self.linear(self.norm(value), WIDTH, 2 * WIDTH)
        gate = self.node("Mul", hidden, self.node("Sigmoid", hidden))
        return self.node("Add", value, self.linear(gate, 2 * WIDTH, WIDTH))

    def model(self) -> onnx.ModelProto:
        shape = ["N", LENGTH, WIDTH]
        graph = helper.make_graph(
            self.nodes,
            "transformer",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, shape)],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ours(proto: onnx.ModelProto) -> int:
    model = prepare(from_proto(proto))
    plan = make_plan(model.graph, load_rule("onnxruntime-cpu"))
    result = insert_pairs(model, plan, placeholder_params(model, plan), state="uncalibrated")
    return len(result.qdq().graph.nodes)


def peer(proto: onnx.ModelProto) -> int:
    one = np.array(1, np.float32)
    ranges = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=-one, highest=one)
            for node in proto.graph.node
            for name in (*node.input, *node.output)
        },
    )
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(OP_TYPES),
        extra_options={},
    )
    return len(quantizer.quantize_model().graph.node)


def seconds(run: Callable[[onnx.ModelProto], int], proto: onnx.ModelProto) -> tuple[float, int]:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    start = time.perf_counter()
    nodes = run(copy)
    return time.perf_counter() - start, nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    gc.set_threshold(GARBAGE_THRESHOLD)  # as in the command line; applies to both
    print(f"{'nodes':>6}  {'ours, s':>8}  {'nodes out':>9}  {'peer, s':>8}  {'nodes out':>9}")
    for size in (1250, 2500, 5000, 10000):
        proto = _Transformer(size).model()
        runs = [seconds(ours, proto) for _ in range(repeat)]
        mine = statistics.median(run[0] for run in runs)
        print(f"{len(proto.graph.node):>6}  {mine:>8.2f}  {runs[0][1]:>9}", end="", flush=True)
        if size <= LARGEST_FOR_PEER:
            theirs, nodes = seconds(peer, proto)
            print(f"  {theirs:>8.2f}  {nodes:>9}", end="")
        print()


if __name__ == "__main__":
    main()
