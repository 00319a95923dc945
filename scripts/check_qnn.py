"""Compare an export in Qualcomm's emulator of the HTP with the Q/DQ model in onnxruntime.

    ONNXQAT_QNN=PYTHON python scripts/check_qnn.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with onnxruntime-qnn 2.7.0 and onnxruntime 1.32.0, whose
package for x86-64 has the emulator (libQnnHtp.so). QDQ is a calibrated or fine-tuned model of the
rule qnn-htp or qnn-htp-16. The export is that of ``onnxqat export --format onnxruntime``, with a
batch of 1, as the HTP takes no free lengths. No node may run on the CPU: onnxruntime then refuses
the model. scripts/vendor_check.py describes the form.

``integer`` compares the emulator with the integer evaluation instead: the predictions, and the
same layers. Fails if a layer is more than two levels of 8 bits off the Q/DQ model, or if fewer than
99 % of the predictions agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from vendor_check import (
    KERNELS,
    LAYER_SAMPLES,
    Environment,
    Feeds,
    Findings,
    Integers,
    Layer,
    Tolerance,
    Tool,
    agreement,
    compare,
    inputs_of,
    layers_of,
    levels_between,
    main,
)

from onnxqat.formats import EXPORTS
from onnxqat.quantized import QuantizedModel

TOOL = Tool("Qualcomm HTP emulator", "ONNXQAT_QNN", "onnxruntime-qnn")
OPS = (*KERNELS, "MatMul")
LEVELS_PER_8_BITS = 256  # of 16 bits
TOLERANCE = Tolerance(differing=1.0, levels=2, predictions=0.99)
LOAD = """
from importlib.metadata import files
import numpy as np
import onnxruntime

found = {path.name: str(path.locate()) for path in files("onnxruntime-qnn")}
onnxruntime.register_execution_provider_library(
    "QNN", found["libonnxruntime_providers_qnn.so"])
device, *_ = [d for d in onnxruntime.get_ep_devices() if d.ep_name.startswith("QNN")]

def load(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices([device], {"backend_path": found["libQnnHtp.so"]})
    session = onnxruntime.InferenceSession(path, options)
    def run(feeds):
        count = len(next(iter(feeds.values())))
        parts = ({name: x[i : i + 1] for name, x in feeds.items()} for i in range(count))
        return np.concatenate([session.run(None, part)[0] for part in parts])
    return run
"""


def one_sample(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with a batch of 1, and the shapes of all tensors that follow from it."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in (*fixed.graph.input, *fixed.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    return onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)


def integer_findings(
    model: QuantizedModel, layers: Sequence[Layer], feeds: Feeds, environment: Environment
) -> dict[str, Any]:
    """Return how the emulator's results, which were computed, compare with integer evaluation."""
    ours = Integers(model)
    values = inputs_of(model, layers, {k: v[:LAYER_SAMPLES] for k, v in feeds.items()})
    alone = {}
    for i, layer in enumerate(layers):
        expected = ours.layer(layer, {name: values[name] for name in layer.inputs})
        found = levels_between(environment.result(f"{i:04}"), expected, layer.scale)
        alone[layer.output] = dict(zip(("differing", "max_levels"), found, strict=True))
    agreeing = agreement(environment.result("whole"), ours.whole(feeds))
    return {"predictions": agreeing, "layers": alone}


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the export in the emulator."""
    layers = layers_of(model, OPS)
    exported = one_sample(EXPORTS["onnxruntime"](model).to_proto())
    findings = compare(environment, model, exported, feeds, LOAD, layers=layers)
    findings.more["integer"] = integer_findings(model, layers, feeds, environment)
    if model.plan.rule == "qnn-htp-16":
        findings.layers = {
            name: (differing, levels / LEVELS_PER_8_BITS)
            for name, (differing, levels) in findings.layers.items()
        }
    return findings


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
