"""Compare an exported model in another runtime with the Q/DQ model in the installed onnxruntime.

    python scripts/check_runtime.py openvino|onnxruntime QDQ DATA [--python OTHER]

OTHER is the Python of an environment with the runtime: OpenVINO, or another release of onnxruntime.
The script compares the predicted classes of the whole model on the samples of DATA. It also runs
each layer between two quantized tensors alone, on identical inputs, and compares its output in
levels. Exits with 1 if a layer is more than one level off, fewer than 99 % of the classes agree, or
a convolution or matrix product does not run in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.utils import Extractor

from onnxqat.data import open_data
from onnxqat.formats import EXPORTS
from onnxqat.model import Model
from onnxqat.quantized import AnyModel, QuantizedModel, load_model
from onnxqat.runtime import open_session
from onnxqat.settings import input_specs, stored_settings

Feeds = dict[str, np.ndarray[Any, Any]]
SAMPLES = 256  # for single layers

LOOP = """
import json, sys
from pathlib import Path
import numpy as np

layers = {{}}
{prepare}
for path in sorted(Path(sys.argv[1]).glob("*.onnx")):
    run, kinds = load(path)
    ((name, values),) = np.load(path.with_suffix(".npz")).items()
    parts = np.array_split(values, max(1, len(values) // 50))
    np.save(path.with_suffix(".npy"), np.concatenate([run(name, part) for part in parts]))
    for kind in kinds if path.stem == "whole" else ():
        layers[kind] = layers.get(kind, 0) + 1
print(json.dumps({{"version": version, "layers": layers}}))
"""
RUNNERS = {
    "openvino": """
import openvino
version = openvino.__version__

def load(path):
    # f32 keeps what is not quantized from running in bfloat16
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", hint)
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [f"{i['layerType'].value} {i['runtimePrecision'].value}" for i in infos]
    return lambda _, part: compiled(part)[compiled.output(0)].copy(), kinds
""",
    "onnxruntime": """
import onnx, onnxruntime
version = onnxruntime.__version__

def load(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(path.with_suffix(".optimized"), format="protobuf")
    kinds = [node.op_type for node in optimized.graph.node]
    return lambda name, part: session.run(None, {name: part})[0], kinds
""",
}
# Names of convolutions and matrix products that do not run in 8 bits.
FLOAT_LAYER = r"(Conv|Gemm|MatMul|Convolution (?![iu]8).*|FullyConnected (?![iu]8).*)"


def feeds_of(model: AnyModel, source: str) -> Feeds:
    """Return all samples of DATA as one batch."""
    settings = stored_settings(model)
    data = open_data(
        source,
        input_specs(model),
        preprocessing=settings.preprocessing(),
        label=settings.label,
        input_map=settings.input_map,
    )
    with data:
        return next(iter(data.batches(len(data)))).inputs


def layers_of(model: QuantizedModel) -> Iterator[tuple[str, str, float]]:
    """Yield input, output and output scale of each layer between two quantized tensors."""
    plan, params = model.plan, model.params
    points = {p.tensor: p for p in plan.grid_points() if p.role == "activation"}
    nodes = {n.name: n for n in model.floats.graph.nodes}
    ends = {chain[0]: chain[-1] for chain in plan.chains}
    outputs = {t.name for t in model.floats.graph.outputs}
    for name, point in points.items():
        for edge in point.consumers:
            if edge.node and nodes[edge.node].op in ("Conv", "Gemm"):
                end = nodes[ends.get(edge.node, edge.node)]
                target = end.outputs[0].name.removesuffix("/float")
                if target in points:
                    scale = float(params[points[target].parameters].scale)
                    yield name, target if target in outputs else f"{target}/dequantized", scale


def values_of(model: onnx.ModelProto, names: set[str], feeds: Feeds) -> Feeds:
    """Return the values of tensors of a model."""
    found = {name: feeds[name] for name in names & feeds.keys()}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for name in sorted(names - feeds.keys()):
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    outputs = [t.name for t in probe.graph.output]
    if outputs:
        run = open_session(probe, optimization="none").run(None, feeds)
        found |= zip(outputs, run, strict=True)
    return found


def in_other(folder: str, runtime: str, python: str) -> dict[str, Any]:
    """Run every model in a folder; return the runtime's version and the whole model's layers."""
    code = LOOP.format(prepare=RUNNERS[runtime])
    result = subprocess.run([python, "-c", code, folder], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{runtime} did not run: {(result.stderr.strip() or '?').splitlines()[-1]}")
    report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return report


def compare(model: Model, feeds: Feeds, runtime: str, python: str) -> bool:
    """Print the comparison; return whether it passed."""
    trained, exported = model.to_proto(), EXPORTS[runtime](model).to_proto()
    whole = open_session(trained, optimization="none").run(None, feeds)[0]
    layers = list(layers_of(model))
    few = {k: v[:SAMPLES] for k, v in feeds.items()}
    values = values_of(trained, {x for x, _, _ in layers}, few)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(exported, str(folder / "whole.onnx"))
        np.savez(folder / "whole.npz", **feeds)
        for i, (x, y, _) in enumerate(layers):
            onnx.save(Extractor(exported).extract_model([x], [y]), str(folder / f"{i:04}.onnx"))
            np.savez(folder / f"{i:04}.npz", **{x: values[x]})
        report = in_other(name, runtime, python)
        found = np.load(folder / "whole.npy")
        worst = 0.0
        for i, (x, y, scale) in enumerate(layers):
            part = open_session(Extractor(trained).extract_model([x], [y]), optimization="none")
            off = np.load(folder / f"{i:04}.npy") - part.run(None, {x: values[x]})[0]
            worst = max(worst, float(np.abs(off).max()) / scale)
    agreement = float((found.argmax(-1) == whole.argmax(-1)).mean())
    print(f"{runtime} {report['version']}: top-1 agreement {agreement:.4f}, {len(found)} samples, "
          f"largest difference {np.abs(found - whole).max():.6g}; {len(layers)} layers alone: "
          f"at most {worst:.3f} levels off; {json.dumps(report['layers'])}")  # fmt: skip
    integer = not any(re.fullmatch(FLOAT_LAYER, kind) for kind in report["layers"])
    return agreement >= 0.99 and worst <= 1.001 and integer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=RUNNERS)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    model = load_model(given.model)
    feeds = feeds_of(model, given.data)
    sys.exit(0 if compare(model, feeds, given.runtime, given.python) else 1)


if __name__ == "__main__":
    main()
