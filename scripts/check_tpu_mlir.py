"""Compare the integer evaluation with Sophgo's compiler and its simulator of the chip.

    ONNXQAT_TPU_MLIR=PYTHON python scripts/check_tpu_mlir.py QDQ DATA [SAMPLES]

PYTHON is the interpreter of a Python 3.10 environment with tpu_mlir 1.30.2 and its dependencies
(docs/integer.md describes how to make it). QDQ is a calibrated or fine-tuned model of a Sophgo
rule. The script strips it, compiles it to int8 with the script that strip writes, and runs it in
tpu-mlir's simulator. scripts/vendor_check.py describes the form.

Each step of the integer evaluation is run alone, on the integers that the simulator computed for
the first 32 samples, and its output compared with the simulator's. ``not_found`` names the tensors
that the compiled model does not have, since the compiler fused the ops around them; the next step
then reads ours. Fails if a weight differs, if a tensor differs by more than one level or in more
than 0.1 % of its values, or if fewer than 99 % of the predictions agree. For a CV18xx, whose
compiler changes weights, those that differ from training's are only counted: the integer evaluation
changes them too, and its tensors are compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sophgo_simulator import TOOL, compiled, simulated
from vendor_check import (
    Array,
    Environment,
    Feeds,
    Findings,
    Integers,
    Tolerance,
    agreement,
    levels_between,
    main,
)

from onnxqat.evaluation.integer import IntegerProgram
from onnxqat.evaluation.integer.grid import Grid
from onnxqat.evaluation.integer.steps import Values
from onnxqat.qparams import quantize
from onnxqat.quantized import QuantizedModel
from onnxqat.rules import load_rule

TOLERANCE = Tolerance(differing=0.001, levels=1, predictions=0.99)
TENSOR_SAMPLES = 32
INT8 = ("_si8", "_ui8")


def compare_weights(model: QuantizedModel, folder: Path, name: str) -> dict[str, int]:
    """Return the number of integer weights, and how many of them differ."""
    (path,) = folder.glob(name.replace("_tpu.mlir", "_tpu*weights.npz"))
    params, tensors = model.params, model.floats.graph.tensors()
    counts = {"weights": 0, "weights_differing": 0, "weights_not_found": 0}
    with np.load(path) as weights:
        theirs = {k: weights[k] for k in weights.files if "_filter_" in k}
    nodes = {n.name: n.op for n in model.floats.graph.nodes}
    for point in model.plan.grid_points():
        op = nodes.get(point.consumers[0].node)
        if point.role != "weight" or op not in ("Conv", "Gemm", "MatMul"):
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


def integers_of(tensor: str, shape: tuple[int, ...], grid: Grid, theirs: Feeds) -> Array | None:
    """Return the simulator's integers of a tensor; None if the compiled model does not have it.

    If the tensor is float on the chip, the integers are those of its cast, ``<op><reader>_si8``.
    """
    names = [k for k in theirs if k == tensor or k.rsplit("_", 1)[0] == tensor]
    casts = [k for k in theirs for n in names if k != n and k.startswith(n) and k.endswith(INT8)]
    same = [theirs[k] for k in (*casts, *names) if theirs[k].size == np.prod(shape)]
    if not same:
        return None
    array = same[0].reshape(shape)
    whole = np.array_equal(array, np.rint(array))
    zero_point = int(grid.params.zero_point)
    levels = array if whole else np.clip(np.rint(array / grid.scale) + zero_point, *grid.limits)
    return levels.astype(grid.params.zero_point.dtype)


def compare_steps(
    program: IntegerProgram, inputs: Feeds, theirs: Feeds
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Return, by tensor, the share of values that differ and by how many levels, and the rest."""
    values, found, missing = Values(floats=dict(inputs)), {}, []
    for step in program.steps:
        result = step.run(values)
        for tensor, levels in result.levels.items():
            if tensor in inputs:  # the simulator returns inputs in float
                continue
            integers = integers_of(tensor, levels.shape, program.grids[tensor], theirs)
            if integers is None:
                missing.append(tensor)
            else:
                found[tensor] = levels_between(integers, levels)
                result.levels[tensor] = integers
        values.levels |= result.levels
        values.floats |= result.floats
    return found, missing


def check(model: QuantizedModel, feeds: Feeds, environment: Environment) -> Findings:
    """Run the stripped model in the simulator."""
    mlir, ours = compiled(model, environment), Integers(model)
    weights = compare_weights(model, environment.folder / "chip", mlir)
    samples = len(next(iter(feeds.values())))
    theirs = simulated(mlir, environment, feeds, TENSOR_SAMPLES)
    first = {name: x[:TENSOR_SAMPLES] for name, x in feeds.items()}
    few = {name: values[:TENSOR_SAMPLES] for name, values in theirs.items()}
    tensors, missing = compare_steps(ours.program, first, few)
    output = ours.program.outputs[0]
    scores = next(v for k, v in theirs.items() if len(v) == samples and k.startswith(output))
    shares = [differing for differing, _ in tensors.values()]
    mean = {"differing": float(np.mean(shares))} if shares else {}
    arithmetic = load_rule(model.plan.rule).arithmetic
    changes = arithmetic is not None and arithmetic.requantize == "qdm"
    wrong = 0 if changes else weights["weights_differing"]
    return Findings(
        agreement(scores, ours.whole(feeds)),
        tensors,
        more={**weights, **mean, "not_found": missing},
        faults=[f"{wrong} weights differ"] if wrong else [],
    )


if __name__ == "__main__":
    main(TOOL, TOLERANCE, check)
