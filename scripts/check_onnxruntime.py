"""Compare an export in another onnxruntime with the Q/DQ model in the installed one.

    ONNXQAT_ONNXRUNTIME=PYTHON python scripts/check_onnxruntime.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with onnxruntime and onnx. The export is that of
``onnxqat export --format onnxruntime``, run on the CPU with extended optimizations.
scripts/vendor_check.py describes the form.

On a CPU without VNNI, sums of two products saturate, and layers differ by more. Weights of 7 bits
(``onnxqat insert --set weight.bits=7``) avoid it.

Fails if a layer is more than one level off, if fewer than 99 % of the predictions agree, or if a
convolution or matrix product does not run in 8 bits. ``kinds`` counts the nodes of the whole
model after optimization.
"""

from __future__ import annotations

import json

from vendor_check import Environment, Feeds, Findings, Tolerance, Tool, compare, main

from onnxqat.formats import EXPORTS
from onnxqat.quantized import QuantizedModel

TOOL = Tool("onnxruntime", "ONNXQAT_ONNXRUNTIME", "onnxruntime")
TOLERANCE = Tolerance(differing=1.0, levels=1, predictions=0.99)
LOAD = """
import json, onnx, onnxruntime
from pathlib import Path
import numpy as np

def load(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if path.stem == "whole":
        optimized = onnx.load(path.with_suffix(".optimized"), format="protobuf")
        kinds = [node.op_type for node in optimized.graph.node]
        Path("kinds.json").write_text(json.dumps({k: kinds.count(k) for k in sorted(set(kinds))}))
    def run(feeds):
        (name, values), = feeds.items()
        parts = np.array_split(values, max(1, len(values) // 50))
        return np.concatenate([session.run(None, {name: part})[0] for part in parts])
    return run
"""


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the export in the other onnxruntime."""
    exported = EXPORTS["onnxruntime"](model).to_proto()
    findings = compare(environment, model, exported, feeds, LOAD)
    kinds = json.loads((environment.folder / "kinds.json").read_text())
    findings.more["kinds"] = kinds
    findings.faults += [f"{k}: not in 8 bits" for k in ("Conv", "Gemm", "MatMul") if k in kinds]
    return findings


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
