"""Compare an exported model in RKNN-Toolkit2's simulator with the integer evaluation.

    ONNXQAT_RKNN=PYTHON python scripts/check_rknn.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with rknn_toolkit2 2.5.0. QDQ is a model of a rockchip
rule. The script strips it, compiles it with the script that strip writes, and runs the Q/DQ model
that strip writes in the toolkit's simulator of the chip, at the same optimization level.
scripts/vendor_check.py describes the form. Layers are those that begin with one of `OPS`;
``predictions_qdq`` is the share that agrees with the Q/DQ model instead of the integer evaluation.

Fails if a weight differs, if a layer is off by more than one level or in more than 0.1 % of its
values, or if fewer than 99 % of the predictions agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from vendor_check import (
    Environment,
    FakeQuantized,
    Feeds,
    Findings,
    Integers,
    Tolerance,
    Tool,
    agreement,
    compare,
    layers_of,
    main,
)

from onnxqat.deploy import write_deployment
from onnxqat.pairs import dequantized_name
from onnxqat.qparams import aligned, quantize
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import load_rule

TOOL = Tool("RKNN-Toolkit2", "ONNXQAT_RKNN", "rknn_toolkit2")
TOLERANCE = Tolerance(differing=0.001, levels=1, predictions=0.99)
LEVEL = "2"  # of optimization, as in the script that strip writes
OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool")
LOAD = """
import sys
import numpy as np
from rknn.api import RKNN

def load(path):
    return lambda feeds: run(path, feeds)

def run(path, feeds):
    tool = RKNN(verbose=False)
    tool.config(target_platform=sys.argv[1], optimization_level=int(sys.argv[2]))
    shapes = [[1, *x.shape[1:]] for x in feeds.values()]
    for code in (tool.load_onnx(model=str(path), inputs=list(feeds), input_size_list=shapes),
                 tool.build(do_quantization=False), tool.init_runtime()):
        assert code == 0, path
    if path.stem != "whole":  # there, weights may be permuted
        write_weights(path, tool.rknn_base)
    layouts = ["nchw" if x.ndim == 4 else "undefined" for x in feeds.values()]
    found = []
    for i in range(len(next(iter(feeds.values())))):
        one = [np.ascontiguousarray(x[i : i + 1], np.float32) for x in feeds.values()]
        found.append(np.array(tool.inference(inputs=one, data_format=layouts)[0]))
    tool.release()
    return np.stack(found)

def write_weights(path, inner):
    table = inner.simulator.quant_tab
    weights = {name: x for name, x in inner.ir.initializer_dat.items() if name in table}
    scales = {f"{name}/scale": np.float32(table[name]["scale"]) for name in weights}
    np.savez(path.with_suffix(".weights.npz"), **weights, **scales)
"""


def compare_weights(model: QuantizedModel, environment: Environment) -> dict[str, Any]:
    """Return the number of integer weights, how many differ, and which were not found."""
    stored: dict[str, Any] = {}
    for path in environment.folder.glob("*.weights.npz"):
        with np.load(path) as part:
            stored |= part
    tensors, params = model.floats.graph.tensors(), model.params
    found: dict[str, Any] = {"weights": 0, "weights_differing": 0, "weights_not_found": []}
    for point in model.plan.grid_points():
        name, own = dequantized_name(point.tensor), params[point.parameters]
        if point.role != "weight":
            continue
        if name not in stored:
            found["weights_not_found"].append(point.tensor)
            continue
        ours = quantize(tensors[point.tensor].values, own, point.spec).astype(np.int32)
        ours -= aligned(own.zero_point, ours.ndim, point.spec.axis).astype(np.int32)
        scale = stored[f"{name}/scale"].reshape(own.scale.shape)
        theirs = stored[name].reshape(ours.shape) / aligned(scale, ours.ndim, point.spec.axis)
        found["weights"] += ours.size
        found["weights_differing"] += int(np.count_nonzero(np.rint(theirs) != ours))
    return found


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Strip the model, compile it, and run it in the simulator."""
    files = write_deployment(model, environment.folder / "chip").files
    environment.run([environment.python, files["compile.py"]])
    chip = load_rule(model.plan.rule).target or ""
    subject = onnx.load(files["table"])
    findings = compare(
        environment, model, subject, feeds, LOAD, chip, LEVEL,
        layers=layers_of(model, OPS), reference=Integers(model),
    )  # fmt: skip
    weights = compare_weights(model, environment)
    qdq = agreement(environment.result("whole"), FakeQuantized(model).whole(feeds))
    findings.more |= {"platform": chip, "predictions_qdq": qdq, **weights}
    if weights["weights_differing"]:
        findings.faults.append(f"{weights['weights_differing']} weights differ")
    return findings


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
