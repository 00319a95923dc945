"""Compare the integer evaluation with Espressif's esp-ppq, whose simulation is that of ESP-DL.

    ONNXQAT_ESP=PYTHON python scripts/check_esp.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of an environment with esp_ppq 1.3.12 and torch. QDQ is a calibrated or
fine-tuned model of the rule esp32-p4 or esp32-s3. The script strips it with a batch of 1. esp-ppq
then quantizes the float model with its own settings and passes (espdl_setting), fusion and
alignment included; only its calibration is replaced: the scales come from the table that strip
wrote. Where esp-ppq aligns tensors, its own scale is used. scripts/vendor_check.py describes the
form.

``edges`` counts the quantized inputs and outputs of all ops, ``edges_differing`` those whose scale
in esp-ppq is not that of the table, and ``not_in_table`` names tensors that esp-ppq would quantize
and the table leaves float; they stay float. Each step of the integer evaluation is run alone, on
the integers of esp-ppq, and ``end`` compares the whole program with esp-ppq's whole simulation, on
the first 32 samples. Fails if a scale or a value differs, or if fewer than 99.5 % of the
predictions agree.

Not used: changes of the network before quantization (equalization, fusion of attention blocks), and
the export to the file of ESP-DL. Not simulated by esp-ppq: the kernels of the chip.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from vendor_check import (
    Array,
    Environment,
    Feeds,
    Findings,
    Integers,
    Tolerance,
    Tool,
    agreement,
    levels_between,
    main,
)

from onnxqat.deploy import write_deployment
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.steps import Values
from onnxqat.quantized import QuantizedModel

TOOL = Tool("esp-ppq", "ONNXQAT_ESP", "esp_ppq")
TOLERANCE = Tolerance(differing=0.0, levels=0, predictions=0.995)
TARGETS = {"esp32-p4": "esp32p4", "esp32-s3": "esp32s3"}
TENSOR_SAMPLES = 32
SIMULATE = """
import json, sys
import numpy as np, torch
import esp_ppq.lib as PFL
from esp_ppq.api import get_target_platform, load_onnx_graph
from esp_ppq.api.interface import dispatch_graph
from esp_ppq.api.setting import QuantizationSettingFactory
from esp_ppq.core import QuantizationStates as States
from esp_ppq.executor import TorchExecutor
from esp_ppq.IR import QuantableOperation
from esp_ppq.quantization.optim import (
    ParameterQuantizePass, QuantizationOptimizationPass, RuntimeCalibrationPass)

count, target = int(sys.argv[1]), sys.argv[2]
table = json.load(open("chip/model_onnxqat.json"))
entries = {point["tensor"]: point for point in table["points"]}
edges = {(e["node"], e["index"]): point for point in table["points"] for e in point["consumers"]}
missing = set()

def quantized(graph):
    for op in graph.operations.values():
        if isinstance(op, QuantableOperation):
            for i, config in enumerate(op.config.input_quantization_config):
                yield op, i, config, op.inputs[i].name
            for config, output in zip(op.config.output_quantization_config, op.outputs):
                yield op, None, config, output.name

class Import(QuantizationOptimizationPass):
    def __init__(self):
        super().__init__(name="import of scales")

    def optimize(self, graph, **_):
        for op, i, config, name in quantized(graph):
            if config.state != States.INITIAL or config.dominated_by is not config:
                continue
            entry = entries.get(name) or edges.get((op.name, i))
            if entry is None:
                missing.add(name)
                config.state = States.FP32
                continue
            scale = entry["scale"] if entry["axis"] is not None else entry["scale"][0]
            config.scale = torch.tensor(scale, dtype=torch.float32)
            config.offset = torch.zeros_like(config.scale)
            config.state = States.ACTIVATED

platform = get_target_platform(target)
setting = QuantizationSettingFactory.espdl_setting()
setting.espdl_attention_fusion = False
graph = dispatch_graph(load_onnx_graph("chip/model.onnx"), platform=platform,
                       dispatcher=setting.dispatcher, dispatching_table=setting.dispatching_table)
quantizer = PFL.Quantizer(platform, graph)
build = quantizer.build_quant_pipeline

def build_with_import(setting):
    pipeline = build(setting)
    kept = [p for p in pipeline if not isinstance(p, RuntimeCalibrationPass)]
    pipeline._pipeline = [Import() if isinstance(p, ParameterQuantizePass) else p for p in kept]
    return pipeline

quantizer.build_quant_pipeline = build_with_import
executor = TorchExecutor(graph, device="cpu")
with np.load("inputs.npz") as found:
    inputs = {name: torch.from_numpy(found[name]) for name in found.files}
samples = [{name: x[i : i + 1] for name, x in inputs.items()}
           for i in range(len(next(iter(inputs.values()))))]
quantizer.quantize(inputs=samples[0], calib_dataloader=[], executor=executor, setting=setting)

checked, differing = 0, []
for op, i, config, name in quantized(graph):
    entry = edges.get((op.name, i)) or entries.get(name)
    if entry is None or config.state not in (States.ACTIVATED, States.PASSIVE, States.OVERLAPPED):
        continue
    checked += 1
    if not np.array_equal(config.scale.reshape(-1).numpy(), np.float32(entry["scale"])):
        differing.append([op.name, "output" if i is None else i, name])

names = [n for n, v in graph.variables.items() if v.source_op is not None and n in entries]
found = zip(*(executor.forward(x, names) for x in samples[:count]))
np.savez("tensors.npz", **{n: torch.cat(values).numpy() for n, values in zip(names, found)})
outputs = list(graph.outputs)[:1]
np.save("whole.npy", np.concatenate([executor.forward(x, outputs)[0].numpy() for x in samples]))
json.dump({"edges": checked, "edges_differing": differing, "not_in_table": sorted(missing)},
          open("report.json", "w"))
"""


def compare_steps(
    program: IntegerProgram, inputs: Feeds, theirs: Feeds
) -> dict[str, tuple[float, float]]:
    """Return, by tensor, how a step differs from esp-ppq if it reads the integers of esp-ppq."""
    values, found = Values(floats=dict(inputs)), {}
    for step in program.steps:
        result = step.run(values)
        for tensor, levels in result.levels.items():
            if tensor in theirs:
                integers = program.grids[tensor].quantize(theirs[tensor], "half-even")
                found[tensor] = levels_between(integers, levels)
                result.levels[tensor] = integers
        values.levels |= result.levels
        values.floats |= result.floats
    return found


def compare_whole(
    program: IntegerProgram, inputs: Feeds, theirs: Feeds
) -> dict[str, tuple[float, float]]:
    """Return, by tensor, how a run of the whole program differs from one of esp-ppq."""
    ours = program.tensors(inputs)
    return {
        name: levels_between(values, ours[name], float(program.grids[name].scale))
        for name, values in theirs.items()
    }


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the stripped model with its table in esp-ppq."""
    target = TARGETS.get(model.plan.rule)
    if target is None:
        sys.exit(f"The rule '{model.plan.rule}' is not one of {', '.join(TARGETS)}.")
    ours, folder = Integers(model), environment.folder
    write_deployment(model, folder / "chip", table="onnxqat", batch=1)
    np.savez(folder / "inputs.npz", **feeds)
    environment.run_code(SIMULATE, str(TENSOR_SAMPLES), target)
    first = {name: x[:TENSOR_SAMPLES] for name, x in feeds.items()}
    with np.load(folder / "tensors.npz") as saved:
        theirs: dict[str, Array] = {name: saved[name] for name in saved.files}
    report = json.loads((folder / "report.json").read_text())
    whole = compare_whole(ours.program, first, theirs)
    differing = {name: found for name, found in whole.items() if any(found)}
    faults = [f"the scales of {len(report['edges_differing'])} inputs or outputs differ"]
    faults = faults if report["edges_differing"] else []
    return Findings(
        agreement(np.load(folder / "whole.npy"), ours.whole(feeds)),
        compare_steps(ours.program, first, theirs),
        more={**report, "tensors": len(whole), "end": {"tensors_differing": differing}},
        faults=faults,
    )


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
