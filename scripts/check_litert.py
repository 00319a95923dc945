"""Compare the integer evaluation of the rule tflite with LiteRT's interpreter.

    ONNXQAT_LITERT=PYTHON python scripts/check_litert.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of a Python 3.12 environment with litert-converter 0.5.0 and onnx2tf
2.6.9, which brings ai-edge-litert 2.1.2. QDQ is a calibrated or fine-tuned model of the rule
tflite. The script strips it, makes model.tflite with the script that strip writes, and runs it with
LiteRT's reference kernels and with its default kernels (XNNPACK). scripts/vendor_check.py describes
the form.

A layer alone is a step of the integer evaluation, on the integers that the reference kernels gave
its inputs. Ops that only move integers may use another layout in LiteRT, so they are compared
through the layers behind them. If the model has a Softmax or HardSwish, whose arithmetic is not
known, its predictions are compared with those of the Q/DQ model, and float ops behind such an op
are not compared.

Fails if a weight or a bias differs, if a value of a layer differs, or if fewer than 99 % of the
predictions agree. The figures of the default kernels are printed, and decide nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from vendor_check import (
    Array,
    Environment,
    FakeQuantized,
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
from onnxqat.errors import RuleError
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.steps import MoveStep, ProductStep, QuantizeStep, Values
from onnxqat.handoff.to_tflite import counterparts, sanitized
from onnxqat.qparams import quantize
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import HardwareRule, load_rule

TOOL = Tool("LiteRT", "ONNXQAT_LITERT", "ai-edge-litert")
TOLERANCE = Tolerance(differing=0, levels=0, predictions=0.99)
TENSOR_SAMPLES = 16
UNKNOWN = ("Softmax", "HardSwish")
CONVERT = """
import json, sys
from pathlib import Path
import to_tflite

made = to_tflite.float_tflite
def noted(model, folder):
    content, records = made(model, folder)
    Path("records.json").write_text(json.dumps(records))
    return content, records

to_tflite.float_tflite = noted
to_tflite.main(*sys.argv[1:])
"""
RUN = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

kernels, kept = sys.argv[1], int(sys.argv[2])
resolver = OpResolverType.BUILTIN_REF if kernels == "reference" else OpResolverType.AUTO
with np.load("inputs.npz") as file:
    feeds = dict(file)
outputs, tensors, scales, owners = [], {}, {}, {}  # a name may be that of several tensors

def opened(keep):
    net = Interpreter(model_path="chip/model.tflite", experimental_op_resolver_type=resolver,
                      num_threads=1, experimental_preserve_all_tensors=keep)
    net.allocate_tensors()
    return net

def run(net, sample):
    for detail in net.get_input_details():
        net.set_tensor(detail["index"], feeds[detail["name"]][sample : sample + 1])
    net.invoke()

net = opened(False)
for sample in range(len(next(iter(feeds.values())))):
    run(net, sample)
    outputs.append(net.get_tensor(net.get_output_details()[0]["index"]))
net = opened(True)
for sample in range(kept):
    run(net, sample)
    for detail in net.get_tensor_details():
        own = detail["quantization_parameters"]["scales"]
        name = "=" + detail["name"].replace("/", "|")
        if len(own) and owners.setdefault(name, detail["index"]) == detail["index"]:
            tensors.setdefault(name, []).append(net.get_tensor(detail["index"]).copy())
            scales[name] = own
np.savez(f"{kernels}-tensors.npz", **{name: np.stack(values) for name, values in tensors.items()})
np.savez(f"{kernels}-scales.npz", **scales)
np.save(f"{kernels}.npy", np.concatenate(outputs))
"""


def stored(path: Path) -> Feeds:
    """Return the arrays of a file by tensor."""
    with np.load(path) as file:
        return {name[1:].replace("|", "/"): file[name] for name in file.files}


def quantized_inputs(model: QuantizedModel, feeds: Feeds) -> Feeds:
    """Return the integers of the inputs, with channels last, as onnx2tf makes images."""
    found = {}
    for point in model.plan.grid_points():
        if point.tensor in feeds:
            x = quantize(feeds[point.tensor], model.params[point.parameters], point.spec)
            found[point.tensor] = np.moveaxis(x, 1, -1) if x.ndim >= 3 else x
    return found


def integers_of(names: list[str], levels: Array, theirs: Feeds) -> Array | None:
    """Return LiteRT's integers of a tensor in the layout of ONNX; None if it has no such tensor.

    If both layouts have the shape of the tensor, the nearer one is taken.
    """
    found = []
    for own, stacked in theirs.items():
        if not set(names).isdisjoint(own.split(";")):
            values = stacked.reshape(-1, *stacked.shape[2:])
            layouts = [values, np.moveaxis(values, -1, 1)] if values.ndim >= 3 else [values]
            found += [x for x in layouts if x.shape == levels.shape]
    if not found:
        return None
    return min(found, key=lambda x: levels_between(x, levels)[0])


def compare_steps(
    program: IntegerProgram, inputs: Feeds, theirs: Feeds, names: dict[str, list[str]]
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Return the share of differing values and the levels, by tensor; and tensors LiteRT lacks."""
    values, found, missing = Values(floats=dict(inputs)), {}, []
    ours: set[str] = set()  # tensors whose integers are not LiteRT's
    for step in program.steps:
        result = step.run(values)
        read = getattr(step, "sources", ()) or getattr(step, "grids", ())
        if isinstance(step, MoveStep) and not ours.isdisjoint(read):
            ours |= result.levels.keys()
        for tensor, levels in () if isinstance(step, MoveStep) else result.levels.items():
            modelled = not isinstance(step, QuantizeStep) or tensor in inputs
            modelled = modelled and ours.isdisjoint(read)
            own = [*names.get(sanitized(tensor), ()), sanitized(tensor)]
            integers = integers_of(own, levels, theirs)
            if integers is None:
                missing.append(tensor)
                ours.add(tensor)
            else:
                if modelled:
                    found[tensor] = levels_between(integers, levels)
                result.levels[tensor] = integers
        values.levels |= result.levels
        values.floats |= result.floats
    return found, missing


def constants_missing(
    model: QuantizedModel, program: IntegerProgram, theirs: Feeds, scales: Feeds
) -> dict[str, list[str]]:
    """Return the weights and biases whose integers or scales LiteRT's model does not have."""
    weights = {
        (np.sort(x[0], axis=None).tobytes(), scales[name].astype(np.float32).tobytes())
        for name, x in theirs.items()
    }
    biases = {x[0].tobytes() for x in theirs.values() if x.dtype == np.int32}
    tensors, missing = model.floats.graph.tensors(), []
    for point in model.plan.grid_points():
        if point.role == "weight":
            params = model.params[point.parameters]
            ours = np.sort(quantize(tensors[point.tensor].values, params, point.spec), axis=None)
            if (ours.tobytes(), params.scale.tobytes()) not in weights:
                missing.append(point.tensor)
    wrong = [
        step.target.tensor
        for step in program.steps
        if isinstance(step, ProductStep) and step.bias is not None
        and step.bias.astype(np.int32).tobytes() not in biases
    ]  # fmt: skip
    return {"weights_differing": missing, "biases_differing": wrong}


def with_floats(rule: HardwareRule) -> HardwareRule:
    """Return the rule with the ops in float whose arithmetic is not known."""
    assert rule.arithmetic is not None
    kept = (*rule.arithmetic.kept_float, *UNKNOWN)
    arithmetic = msgspec.structs.replace(rule.arithmetic, kept_float=kept)
    return msgspec.structs.replace(rule, arithmetic=arithmetic)


def converted(model: QuantizedModel, environment: Environment) -> dict[str, list[str]]:
    """Make model.tflite; return the names that each tensor may have in it."""
    chip = environment.folder / "chip"
    write_deployment(model, chip)
    words = ["model.onnx", "model_onnxqat.json", "model.tflite"]
    start = f"import os, sys; os.chdir({str(chip)!r}); sys.path.insert(0, '.')\n"
    environment.run_code(start + CONVERT, *words)
    return counterparts(json.loads((chip / "records.json").read_text(encoding="utf-8")))


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the converted model in LiteRT's interpreter."""
    names = converted(model, environment)
    np.savez(environment.folder / "inputs.npz", **quantized_inputs(model, feeds))
    kept = min(TENSOR_SAMPLES, len(next(iter(feeds.values()))))
    for kernels in ("reference", "default"):
        environment.run_code(RUN, kernels, str(kept))
    theirs, scales = (stored(environment.folder / f"reference-{kind}.npz")
                      for kind in ("tensors", "scales"))  # fmt: skip
    few = {name: x[:kept] for name, x in feeds.items()}
    layers: dict[str, tuple[float, float]] = {}
    more: dict[str, Any] = {"reference": "Q/DQ model"}
    ours: Array = FakeQuantized(model).whole(feeds)
    try:
        integers = Integers(model)
    except RuleError as error:
        more["not_modelled"] = str(error)
        program = Integers(model, with_floats(load_rule(model.plan.rule))).program
    else:
        program, ours = integers.program, integers.whole(feeds)
        more["reference"] = "integer evaluation"
    layers, missing = compare_steps(program, few, theirs, names)
    more["not_found"] = missing
    wrong = constants_missing(model, program, theirs, scales)
    found, default = (np.load(environment.folder / f"{kernels}.npy")
                      for kernels in ("reference", "default"))  # fmt: skip
    return Findings(
        agreement(found, ours),
        layers,
        more=more | wrong | {"predictions_default_kernels": agreement(default, ours)},
        faults=[f"{kind}: {', '.join(tensors)}" for kind, tensors in wrong.items() if tensors],
    )


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
