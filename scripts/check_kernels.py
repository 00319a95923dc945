"""Show which nodes onnxruntime runs as integer kernels after `export --format onnxruntime`.

    python scripts/check_kernels.py MODEL.onnx...

Each float model is quantized under the rule onnxruntime-cpu, calibrated on random inputs, exported,
and optimized by onnxruntime (extended level). The script prints the integer kernels that
onnxruntime chose, and every Conv, Gemm, MatMul, Add or pooling that stays float. Exits with 1 if
the plan does not explain why one of them stays float.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.model import Model
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule

HEAVY = ("Conv", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool", "MaxPool")


def quantized(path: str) -> tuple[Model, QuantPlan]:
    floats = prepare(load_model(path))
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    rng = np.random.default_rng(0)
    shapes = {
        t.name: [d if isinstance(d, int) and d > 0 else 1 for d in t.shape]
        for t in floats.graph.inputs
    }
    batches = [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}] * 2
    return integer_model(calibrate(empty, batches, observer="minmax")), plan


def optimized(model: Model) -> onnx.ModelProto:
    """Return the graph that onnxruntime runs after its optimization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(
            model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(options.optimized_model_filepath)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    unexplained = 0
    for path in parser.parse_args().models:
        model, plan = quantized(path)
        nodes = optimized(model).graph.node
        explained = {skip.node for skip in plan.skips}
        left = [n for n in nodes if n.op_type in HEAVY and n.name not in explained]
        # a MaxPool on integers keeps its op type
        integers = {n.output[0] for n in nodes if n.op_type.startswith(("QLinear", "Quantize"))}
        left = [n for n in left if not (n.op_type == "MaxPool" and n.input[0] in integers)]
        counts = Counter(n.op_type for n in nodes)
        print(f"{Path(path).name}: {dict(sorted(counts.items()))}")
        for node in left:
            print(f"  float: {node.name} ({node.op_type})")
        unexplained += len(left)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
