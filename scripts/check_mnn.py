"""Compare a model with its table in MNN against the Q/DQ model in onnxruntime.

    ONNXQAT_MNN=PYTHON python scripts/check_mnn.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of a separate environment with MNN 3.6.1. QDQ is a calibrated or
fine-tuned model with int8 activations and zero points of 0, for example of the rule sophgo-cv183x.
The script strips it, converts it with the table that strip writes for MNN, and runs it in MNN's
interpreter on the CPU. Without the environment variable it prints a message and does nothing.

Prints one JSON document. For the whole model on SAMPLES samples (500): the fraction of predictions
that agree, with the table and without it. For each layer in the table, run alone on identical
inputs: the fraction of values that differ, and by how many levels. Exits with 1 if a layer is off
by more than one level or in more than 1 % of its values, if fewer than 99 % of the predictions
agree, or if the table has no effect.

MNN's own commands update packages when they start. Therefore only its converter and interpreter are
called, from Python, with a ``pip`` on the path that always fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from check_runtime import Feeds, feeds_of, layers_of, values_of
from onnx.utils import Extractor

from onnxqat.deploy import write_deployment
from onnxqat.model import Model
from onnxqat.quantized import load_model
from onnxqat.runtime import open_session

VARIABLE = "ONNXQAT_MNN"
LAYER_SAMPLES = 64
RUN = """
import sys
from pathlib import Path
import numpy as np
import _tools, MNN

def converted(path, table):
    words = ["convert", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", f"{path}.mnn"]
    words += ["--bizCode", "check", "--keepInputFormat", "1"]
    _tools.mnnconvert(words + (["--compressionParamsFile", table] if table else []))
    return MNN.Interpreter(f"{path}.mnn")

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

table = sys.argv[2]
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    samples = np.load(path.with_suffix(".npy"))
    np.save(f"{path}.npy", run(converted(path, "" if path.stem == "float" else table), samples))
"""


def run_in_mnn(python: str, folder: Path, table: Path) -> None:
    """Convert and run every model in a folder on the samples beside it."""
    refusing = folder / "bin"
    refusing.mkdir()
    for name in ("pip", "pip3"):
        (refusing / name).write_text("#!/bin/sh\nexit 1\n")
        (refusing / name).chmod(0o755)
    path = os.pathsep.join([str(refusing), os.environ.get("PATH", "")])
    words = [python, "-c", RUN, str(folder), str(table)]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PATH": path, "PIP_NO_INDEX": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"MNN did not run:\n{done.stdout[-3000:]}")


def layer_names(table: Path) -> set[str]:
    """Return the names of all outputs in a table."""
    (algorithm,) = json.loads(table.read_text())["algo"]
    return {layer["output"][0]["name"] for layer in algorithm["quantParams"]["layer"]}


def compare(model: Model, feeds: Feeds, python: str) -> dict[str, Any]:
    """Return the differences between MNN and the Q/DQ model."""
    trained = model.to_proto()
    ((name, samples),) = feeds.items()
    few = {name: samples[:LAYER_SAMPLES]}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        files = write_deployment(model, folder / "chip", table="mnn").files
        floats, names = onnx.load(files["model"]), layer_names(files["table"])
        layers = [one for one in layers_of(model) if one[1].removesuffix("/dequantized") in names]
        values = values_of(trained, {x for x, _, _ in layers}, few)
        for stem in ("whole", "float"):
            onnx.save(floats, str(folder / f"{stem}.onnx"))
            np.save(folder / f"{stem}.npy", samples)
        for i, (x, y, _) in enumerate(layers):
            part = Extractor(floats).extract_model([x], [y.removesuffix("/dequantized")])
            onnx.save(part, str(folder / f"{i:04}.onnx"))
            np.save(folder / f"{i:04}.npy", values[x])
        run_in_mnn(python, folder, files["table"])
        found = {p.name.removesuffix(".onnx.npy"): np.load(p) for p in folder.glob("*.onnx.npy")}
    ours = open_session(trained, optimization="none").run(None, feeds)[0]
    alone = {}
    for i, (x, y, scale) in enumerate(layers):
        session = open_session(Extractor(trained).extract_model([x], [y]), optimization="none")
        off = np.abs(found[f"{i:04}"] - session.run(None, {x: values[x]})[0]) / scale
        alone[y.removesuffix("/dequantized")] = [float((off > 0.5).mean()), float(off.max())]
    return {
        "rule": model.plan.rule,
        "samples": len(samples),
        "predictions": agreement(found["whole"], ours),
        "predictions_without_table": agreement(found["float"], ours),
        "largest_difference": float(np.abs(found["whole"] - ours).max()),
        "largest_difference_without_table": float(np.abs(found["float"] - ours).max()),
        "layers": alone,
    }


def agreement(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).mean())


def main(path: str, data: str, samples: int = 500) -> None:
    python = os.environ.get(VARIABLE)
    if not python:
        print(f"skipped: {VARIABLE} does not name the Python of an environment with MNN")
        return
    model = load_model(path)
    feeds = {name: np.asarray(x)[:samples] for name, x in feeds_of(model, data).items()}
    report = compare(model, feeds, python)
    print(json.dumps(report, indent=2))
    exact = all(share <= 0.01 and levels <= 1.001 for share, levels in report["layers"].values())
    used = report["largest_difference"] != report["largest_difference_without_table"]
    sys.exit(0 if exact and used and report["predictions"] >= 0.99 else 1)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
