"""Judge models by a metric in the simulator of Sophgo's compiler, and keep the best one.

    onnxqat finetune q.onnx DATA --keep-epochs 3 -o tuned.onnx
    ONNXQAT_TPU_MLIR=PYTHON python scripts/judge_in_simulator.py DATA tuned.epoch*.onnx -o best.onnx

PYTHON is the interpreter of an environment with tpu-mlir (docs/integer.md says how one is made).
Each Q/DQ model of a Sophgo rule is stripped, compiled by the script that strip writes, and run in
the compiler's simulator on the first SAMPLES samples of DATA, which the training must not have
seen. Prints one line for each model: the metric as it was trained, in our integers and in the
simulator. The best in the simulator is copied to BEST. Without the environment variable nothing is
done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sophgo_simulator import TOOL, compiled, simulated
from vendor_check import Environment

from onnxqat.data import DataSet, open_data
from onnxqat.evaluation import evaluate
from onnxqat.evaluation.metrics import Meters, Metric, fitted, read_metric
from onnxqat.outputs import outputs_of
from onnxqat.quantized import QuantizedModel, load_model, require_quantized
from onnxqat.settings import input_specs, stored_settings

BATCH = 32


class Simulated:
    """A model in the simulator, all samples run at once."""

    def __init__(self, model: QuantizedModel, python: str, inputs: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as name:
            environment = Environment(TOOL, python, Path(name))
            found = simulated(compiled(model, environment), environment, inputs, 0)
        count = len(next(iter(inputs.values())))
        self.outputs = [
            next(v for k, v in found.items() if k.startswith(t.name) and len(v) == count)
            for t in model.floats.graph.outputs
        ]

    def measure(self, metric: Metric, data: DataSet, model: QuantizedModel) -> float:
        """Return the first figure of a metric."""
        outputs = outputs_of(model.floats.graph)
        with Meters([metric], outputs, compared=False) as meters:
            for batch in data.batches(BATCH):
                rows = batch.indices
                shaped = [o[rows].reshape(len(rows), *_shape(o, t)) for o, t in
                          zip(self.outputs, outputs, strict=True)]  # fmt: skip
                meters.add(batch, shaped, None)
            found = meters.result()
        return found.metrics[found.first[metric.name]]


def _shape(values: np.ndarray, output: Any) -> tuple[int, ...]:
    """Return the shape of one sample, as the model has it: the simulator adds axes of length 1."""
    return tuple(output.shape[1:]) if output.shape else values.shape[1:]


def judge(path: Path, source: str, metric: str, samples: int, python: str) -> tuple[float, ...]:
    """Return a metric of a model: fake-quantized, in our integers, and in the simulator."""
    model = require_quantized(load_model(path))
    settings = stored_settings(model)
    with open_data(
        source,
        input_specs(model),
        preprocessing=settings.preprocessing(),
        label=settings.label,
        input_map=settings.input_map,
    ) as whole:
        names = [tensor.name for tensor in model.floats.graph.outputs]
        chosen = whole.subset(np.arange(min(samples, len(whole))))
        data, (wanted,) = fitted(chosen, [read_metric(metric)], names, compared=False)
        found = [evaluate(model, data.batches(BATCH), mode=mode, metrics=[wanted])
                 for mode in ("qdq", "integer")]  # fmt: skip
        ours = [one.metrics[one.first[wanted.name]] for one in found]
        (batch,) = data.batches(len(data))
        inputs = {name: np.asarray(values) for name, values in batch.inputs.items()}
        return *ours, Simulated(model, python, inputs).measure(wanted, data, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="samples that the training has not seen")
    parser.add_argument("models", type=Path, nargs="+", help="Q/DQ models of a Sophgo rule")
    parser.add_argument(
        "--metric", default="top1", help="a metric of evaluate (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=200, help="number of samples (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, help="copy the best model here")
    given = parser.parse_args()
    python = os.environ.get(TOOL.variable)
    if not python:
        sys.exit(f"skipped: {TOOL.variable} does not name the Python of a tpu-mlir environment")
    print(f"{given.metric:40} fake-quantized  integer  simulator")
    found = {}
    for path in given.models:
        ours, integer, theirs = judge(path, given.data, given.metric, given.samples, python)
        print(f"{path.name:40} {ours:14.4f} {integer:8.4f} {theirs:10.4f}", flush=True)
        found[path] = theirs
    best = max(found, key=found.__getitem__)
    print(f"best: {best}")
    if given.output:
        shutil.copy(best, given.output)


if __name__ == "__main__":
    main()
