"""Compare a model with its table in MNN with the Q/DQ model in onnxruntime.

    ONNXQAT_MNN=PYTHON python scripts/check_mnn.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with MNN 3.6.1. QDQ is a calibrated or fine-tuned model
with int8 activations and zero points of 0, for example of the rule sophgo-cv183x. The script strips
it, converts it with the table that strip writes for MNN, and runs it in MNN's interpreter on the
CPU. scripts/vendor_check.py describes the form.

Fails if a layer in the table is off by more than one level or in more than 1 % of its values, if
fewer than 99 % of the predictions agree, or if the table has no effect.

MNN's own commands update packages when they start. Therefore only its converter and interpreter are
called, from Python.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from vendor_check import (
    Environment,
    FakeQuantized,
    Feeds,
    Findings,
    Tolerance,
    Tool,
    agreement,
    compare,
    layers_of,
    main,
)

from onnxqat.deploy import write_deployment
from onnxqat.quantized import QuantizedModel

TOOL = Tool("MNN", "ONNXQAT_MNN", "MNN")
TOLERANCE = Tolerance(differing=0.01, levels=1, predictions=0.99)
LOAD = """
import sys
import numpy as np
import _tools, MNN

def load(path):
    words = ["convert", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", f"{path}.mnn"]
    words += ["--bizCode", "check", "--keepInputFormat", "1"]
    _tools.mnnconvert(words + ([] if path.stem == "float"
                               else ["--compressionParamsFile", sys.argv[1]]))
    net = MNN.Interpreter(f"{path}.mnn")
    return lambda feeds: run(net, *feeds.values())

def run(net, samples):
    session = net.createSession({"backend": "CPU", "numThread": 1})
    source = net.getSessionInput(session)
    shape = (1, *samples.shape[1:])
    net.resizeTensor(source, shape)
    net.resizeSession(session)
    kind, layout, found = MNN.Halide_Type_Float, MNN.Tensor_DimensionType_Caffe, []
    for sample in samples:
        values = np.ascontiguousarray(sample[None], np.float32)
        source.copyFrom(MNN.Tensor(shape, kind, values, layout))
        net.runSession(session)
        output = net.getSessionOutput(session)
        ours = output.getShape()
        host = MNN.Tensor(ours, kind, np.zeros(ours, np.float32), layout)
        output.copyToHostTensor(host)
        found.append(np.array(host.getNumpyData()).reshape(ours))
    return np.concatenate(found)
"""


def layer_names(table: Path) -> set[str]:
    """Return the names of all outputs in a table."""
    (algorithm,) = json.loads(table.read_text())["algo"]
    return {layer["output"][0]["name"] for layer in algorithm["quantParams"]["layer"]}


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the stripped model in MNN, with its table and without it."""
    files = write_deployment(model, environment.folder / "chip", table="mnn").files
    floats, names = onnx.load(files["model"]), layer_names(files["table"])
    layers = [layer for layer in layers_of(model) if layer.output in names]
    environment.put("float", floats, feeds)
    table = files["table"]
    findings = compare(environment, model, floats, feeds, LOAD, table, layers=layers)
    ours, without = FakeQuantized(model).whole(feeds), environment.result("float")
    findings.more |= {
        "predictions_without_table": agreement(without, ours),
        "largest_difference_without_table": float(np.abs(without - ours).max()),
    }
    if np.array_equal(without, environment.result("whole")):
        findings.faults.append("the table has no effect")
    return findings


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
