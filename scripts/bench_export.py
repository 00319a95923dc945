"""Time an export with integer weights against its float model, in turn, in one process.

    python scripts/bench_export.py onnxruntime|openvino FLOAT.onnx EXPORT.onnx [--batch 1]

Run it with the Python of an environment that has the runtime and numpy; it needs nothing else. It
prints the median time of 30 runs of each in milliseconds, and the sizes of the files.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RUNS, WARM_UP = 30, 5


def with_onnxruntime(path: str, batch: int) -> Callable[[], object]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {value.name: random_input([batch, *value.shape[1:]]) for value in session.get_inputs()}
    return lambda: session.run(None, feeds)


def with_openvino(path: str, batch: int) -> Callable[[], object]:
    import openvino

    model = openvino.Core().read_model(path)
    shapes = {
        i: [batch, *[d.get_length() for d in list(i.partial_shape)[1:]]] for i in model.inputs
    }
    model.reshape(shapes)
    compiled = openvino.Core().compile_model(model, "CPU")
    feeds = [random_input(shape) for shape in shapes.values()]
    return lambda: compiled(feeds)


def random_input(shape: list[int]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=["onnxruntime", "openvino"])
    parser.add_argument("models", nargs=2, metavar="MODEL")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    load = with_onnxruntime if arguments.runtime == "onnxruntime" else with_openvino
    runs = [load(path, arguments.batch) for path in arguments.models]
    times: list[list[float]] = [[], []]
    for i in range(WARM_UP + RUNS):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if i >= WARM_UP:
                found.append(1000 * (time.perf_counter() - start))
    for path, found in zip(arguments.models, times, strict=True):
        size = Path(path).stat().st_size / 1000
        print(f"{statistics.median(found):8.2f} ms  {size:10.0f} kB  {path}")


if __name__ == "__main__":
    main()
