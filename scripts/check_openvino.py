"""Compare an export in OpenVINO with the Q/DQ model in the installed onnxruntime.

    ONNXQAT_OPENVINO=PYTHON python scripts/check_openvino.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with openvino. The export is that of
``onnxqat export --format openvino``, run on the CPU. scripts/vendor_check.py describes the form.

On a CPU without VNNI, sums of two products saturate, and layers differ by more. Weights of 7 bits
(``onnxqat insert --set weight.bits=7``) avoid it.

Fails if a layer is more than one level off, if fewer than 99 % of the predictions agree, or if a
convolution or matrix product does not run in 8 bits. ``kinds`` counts the nodes that OpenVINO made
of the whole model, with their precisions.
"""

from __future__ import annotations

import json
import re

from vendor_check import Environment, Feeds, Findings, Tolerance, Tool, compare, main

from onnxqat.formats import EXPORTS
from onnxqat.quantized import QuantizedModel

TOOL = Tool("OpenVINO", "ONNXQAT_OPENVINO", "openvino")
TOLERANCE = Tolerance(differing=1.0, levels=1, predictions=0.99)
FLOAT_LAYER = r"(Convolution|FullyConnected) (?![iu]8).*"
LOAD = """
import json, openvino
from pathlib import Path
import numpy as np

def load(path):
    # f32 keeps what is not quantized from running in bfloat16
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", hint)
    if path.stem == "whole":
        infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        kinds = [f"{i['layerType'].value} {i['runtimePrecision'].value}" for i in infos]
        Path("kinds.json").write_text(json.dumps({k: kinds.count(k) for k in sorted(set(kinds))}))
    def run(feeds):
        (name, values), = feeds.items()
        parts = np.array_split(values, max(1, len(values) // 50))
        return np.concatenate([compiled({name: part})[compiled.output(0)] for part in parts])
    return run
"""


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the export in OpenVINO."""
    exported = EXPORTS["openvino"](model).to_proto()
    findings = compare(environment, model, exported, feeds, LOAD)
    kinds = json.loads((environment.folder / "kinds.json").read_text())
    findings.more["kinds"] = kinds
    findings.faults += [
        f"{kind}: not in 8 bits" for kind in kinds if re.fullmatch(FLOAT_LAYER, kind)
    ]
    return findings


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
