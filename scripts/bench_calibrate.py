"""Time calibration on resnet18 at 224 x 224, next to onnxruntime.quantization's calibrators.

    python scripts/bench_calibrate.py [--images 512] [--batch-size 32] [--threads 1]

The network with random weights and the images are generated. Ours: `calibrate` under the rule
onnxruntime-cpu with the observers `minmax`, `mse` and `percentile`. Theirs: the MinMax, Percentile
and Entropy calibrators with their defaults, on the tensors around Conv, Add, MaxPool and Gemm. They
are fed batch by batch, because a call of `collect_data` keeps every tensor of all its images.

Each kind runs in a process of its own. The processes take batches in turn, so that other load on
the machine slows them equally. The script prints seconds, CPU seconds (of all threads) and the peak
memory of the process from the first batch on. The times do not include generating the model and the
images, nor (for theirs) creating the session; they include finding the ranges after the last batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    CalibrationMethod,
    create_calibrator,
)

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.model import from_proto
from onnxqat.plan import make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs
from onnxqat.rules import load_rule

SIZE, CLASSES = 224, 1000
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels, stride
OURS = ("minmax", "mse", "percentile")
THEIRS = ("MinMax", "Percentile", "Entropy")
OP_TYPES = ("Conv", "Add", "MaxPool", "Gemm")


class ResNet18:
    """resnet18 with folded batch normalization, as exporters write it (He et al. 2016, table 1)."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """Return a weight that preserves the variance through a Relu (He et al. 2015)."""
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1000
        values = self.rng.normal(scale=(2 / fan_in) ** 0.5, size=shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, channels: tuple[int, int], kernel: int, stride: int = 1) -> str:
        taken, given = channels
        weight, bias = self.weight(given, taken, kernel, kernel), self.weight(given)
        pads = [kernel // 2] * 4
        return self.node("Conv", x, weight, bias, strides=[stride] * 2, pads=pads)

    def block(self, x: str, taken: int, given: int, stride: int) -> str:
        y = self.node("Relu", self.conv(x, (taken, given), 3, stride))
        y = self.conv(y, (given, given), 3)
        skip = x if taken == given else self.conv(x, (taken, given), 1, stride)
        return self.node("Relu", self.node("Add", y, skip))

    def model(self) -> onnx.ModelProto:
        x = self.node("Relu", self.conv("input", (3, 64), 7, 2))
        x = self.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        taken = 64
        for given, stride in STAGES:
            x = self.block(x, taken, given, stride)
            x = self.block(x, given, given, 1)
            taken = given
        x = self.node("Flatten", self.node("GlobalAveragePool", x))
        x = self.node("Gemm", x, self.weight(CLASSES, taken), self.weight(CLASSES), transB=1)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "resnet18",
            [value("input", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
            [value(x, TensorProto.FLOAT, ["N", CLASSES])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def say(text: str) -> None:
    """Send a line to the parent process."""
    print(text, file=sys.__stdout__, flush=True)


class Clock:
    """Measures seconds and CPU seconds, without waiting and generating images."""

    def __init__(self) -> None:
        self.away = np.zeros(2)
        self.start = self._now()

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def batches(self, images: int, size: int) -> Iterator[np.ndarray]:
        """Yield batches of images; before each, wait until the parent gives this process a turn."""
        rng = np.random.default_rng(1)
        for first in range(0, images, size):
            left = self._now()
            if first:
                say("done")
            sys.stdin.readline()
            shape = (min(size, images - first), 3, SIZE, SIZE)
            batch = rng.standard_normal(shape, dtype=np.float32)
            self.away += self._now() - left
            yield batch

    def stop(self) -> None:
        """Send the times and the peak memory in GB to the parent."""
        seconds, cpu = self._now() - self.start - self.away
        peak = getrusage(RUSAGE_SELF).ru_maxrss / 2**20
        say(json.dumps([seconds, cpu, peak]))


class Reader(CalibrationDataReader):
    """One batch for onnxruntime's calibrators."""

    def __init__(self, batch: np.ndarray) -> None:
        self.feeds = [{"input": batch}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.feeds.pop() if self.feeds else None


def ours(observer: str, threads: int) -> Callable[[Iterator[np.ndarray]], object]:
    floats = prepare(from_proto(ResNet18().model()))
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"))
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return lambda batches: calibrate(
        empty, ({"input": x} for x in batches), observer=observer, threads=threads
    )


def theirs(method: str, threads: int) -> Callable[[Iterator[np.ndarray]], object]:
    with tempfile.TemporaryDirectory() as folder:
        path, augmented = Path(folder, "model.onnx"), Path(folder, "augmented.onnx")
        onnx.save(ResNet18().model(), path)
        kind = CalibrationMethod[method]
        calibrator = create_calibrator(path, OP_TYPES, str(augmented), kind)
        options = ort.SessionOptions()  # their defaults, except the number of threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        calibrator.infer_session = ort.InferenceSession(
            str(augmented), options, providers=["CPUExecutionProvider"]
        )

    def run(batches: Iterator[np.ndarray]) -> object:
        for batch in batches:
            calibrator.collect_data(Reader(batch))
        return calibrator.compute_data()

    return run


def work(arguments: argparse.Namespace) -> None:
    """Run as one of the processes."""
    kind = arguments.work
    run = (ours if kind in OURS else theirs)(kind, arguments.threads)
    sys.stdin.readline()  # wait until all processes are ready
    say("done")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts here
    clock = Clock()
    with redirect_stdout(sys.stderr):  # onnxruntime's calibrators print
        run(clock.batches(arguments.images, arguments.batch_size))
    clock.stop()


def measured(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds, CPU seconds and peak GB by kind."""
    processes = {
        kind: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--work", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for kind in arguments.only or (*OURS, *THEIRS)
    }
    found: dict[str, list[float]] = {}
    while len(found) < len(processes):
        for kind, process in processes.items():
            if kind in found:
                continue
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("next\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
            if not answer:
                sys.exit(f"{kind} ended with {process.wait()}")
            if answer != "done":
                found[kind] = json.loads(answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="threads of every session")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *THEIRS], help="measure these only")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
        return
    found = measured(arguments)
    print(f"resnet18, {arguments.images} images, batches of {arguments.batch_size}")
    print(f"{'':>22}{'seconds':>10}{'CPU s':>10}{'peak GB':>10}{'of minmax':>11}")
    for kind, (seconds, cpu, peak) in found.items():
        whose = "onnxqat" if kind in OURS else "onnxruntime"
        share = f"{cpu / found['minmax'][1]:.2f}" if "minmax" in found else ""
        print(f"{whose:<12}{kind:<10}{seconds:>10.1f}{cpu:>10.1f}{peak:>10.2f}{share:>11}")


if __name__ == "__main__":
    main()
