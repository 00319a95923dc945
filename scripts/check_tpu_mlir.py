"""Compare the integer evaluation with Sophgo's compiler and its simulator of the chip.

    ONNXQAT_TPU_MLIR=PYTHON python scripts/check_tpu_mlir.py QDQ DATA [TENSOR_SAMPLES [SAMPLES]]

PYTHON is the interpreter of a Python 3.10 environment with tpu_mlir 1.30.2 and its dependencies
(docs/integer.md describes how to make it). QDQ is a calibrated or fine-tuned model of a Sophgo
rule. The script strips it, compiles it to int8 with the script that strip writes, and runs it in
tpu-mlir's simulator. Without the environment variable it prints a message and does nothing.

Prints one JSON document: the number of weights and biases that differ from onnxqat's, the fraction
of values that differ for each tensor on TENSOR_SAMPLES samples (32), and the fraction of
predictions that agree on SAMPLES samples (500). Exits with 1 if a weight differs, if an activation
differs by more than one level or in more than 0.1 % of its values, or if fewer than 99.5 % of the
predictions agree.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sophgo_simulator import VARIABLE, compiled, simulated

from onnxqat.data import open_data
from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.steps import Values
from onnxqat.model import Model
from onnxqat.qparams import quantize
from onnxqat.quantized import load_model
from onnxqat.settings import input_specs, stored_settings


def compare_weights(model: Model, folder: Path, name: str) -> dict[str, int]:
    """Return the number of integer weights, and how many of them differ."""
    (path,) = folder.glob(name.replace("_tpu.mlir", "_tpu*weights.npz"))
    params, tensors = model.params, model.floats.graph.tensors()
    counts = {"weights": 0, "weights_differing": 0, "weights_not_found": 0}
    with np.load(path) as weights:
        theirs = {k: weights[k] for k in weights.files if "_filter_" in k}
    nodes = {n.name: n.op for n in model.floats.graph.nodes}
    for point in model.plan.grid_points():
        if point.role != "weight" or nodes[point.consumers[0].node] not in (
            "Conv",
            "Gemm",
            "MatMul",
        ):
            continue
        ours = quantize(tensors[point.tensor].values, params[point.parameters], point.spec)
        same_size = [w for w in theirs.values() if w.size == ours.size]
        candidates = [ours.ravel(), *([ours.T.ravel()] if ours.ndim == 2 else [])]
        differing = [int(np.count_nonzero(w != c)) for w in same_size for c in candidates]
        counts["weights"] += ours.size
        if differing:
            counts["weights_differing"] += min(differing)
        else:
            counts["weights_not_found"] += ours.size
    return counts


def compare_tensors(
    program: IntegerProgram, inputs: dict[str, Any], theirs: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return, by tensor, the share of values that differ and by how many levels, and the rest."""
    values, found, missing = Values(floats=dict(inputs)), {}, []
    for step in program.steps:
        result = step.run(values)
        values.levels |= result.levels
        values.floats |= result.floats
        for tensor, levels in result.levels.items():
            if tensor in inputs:  # the simulator returns inputs in float
                continue
            names = [k for k in theirs if k == tensor or k.rsplit("_", 1)[0] == tensor]
            same = [k for k in names if theirs[k].size == levels.size]
            if not same:
                missing.append(tensor)
                continue
            grid = program.grids[tensor]
            array = theirs[same[0]].reshape(levels.shape)
            whole = np.array_equal(array, np.rint(array))
            integers = array if whole else np.clip(np.rint(array / grid.scale), *grid.limits)
            difference = np.abs(integers - levels)
            found[tensor] = [float(np.mean(difference > 0)), int(difference.max())]
    return found, missing


def main(path: str, data: str, count: int = 32, samples: int = 500) -> None:
    python = os.environ.get(VARIABLE)
    if not python:
        print(f"skipped: {VARIABLE} does not name the Python of a tpu-mlir environment")
        return
    model = load_model(path)
    settings = stored_settings(model)
    with open_data(
        data,
        input_specs(model),
        preprocessing=settings.preprocessing(),
        label=settings.label,
        input_map=settings.input_map,
    ) as source:
        batch = next(iter(source.batches(min(samples, len(source)))))
    inputs = {name: np.asarray(x) for name, x in batch.inputs.items()}
    program = IntegerProgram(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mlir, folder = compiled(model, python, folder), folder / "chip"
        weights = compare_weights(model, folder, mlir)
        theirs = simulated(mlir, python, folder, inputs, count)
    first = {name: x[:count] for name, x in inputs.items()}
    tensors, missing = compare_tensors(program, first, {k: v[:count] for k, v in theirs.items()})
    output = program.outputs[0]
    scores = next(v for k, v in theirs.items() if len(v) == len(next(iter(inputs.values())))
                  and k.startswith(output))  # fmt: skip
    ours = program.run(None, inputs)[0]
    agreement = float(np.mean(scores.reshape(ours.shape).argmax(-1) == ours.argmax(-1)))
    shares = [share for share, _ in tensors.values()]
    document = {
        **weights,
        "tensors": tensors,
        "not_found": missing,
        "differing": float(np.mean(shares)),
        "max_levels": max(levels for _, levels in tensors.values()),
        "predictions": agreement,
    }
    print(json.dumps(document, indent=2))
    good = not weights["weights_differing"] and document["max_levels"] <= 1
    sys.exit(0 if good and document["differing"] <= 1e-3 and agreement >= 0.995 else 1)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
