"""Time one training step against PyTorch's, float and quantized, in turn, on two threads.

    python scripts/bench_step.py --python TORCH_PYTHON [--plain PYTHON] [--repeat 15]

TORCH_PYTHON has torch, torchvision and onnx. PYTHON has this package with another onnxruntime, so
that a training build and a plain build are timed in turn. Ours: the step of `finetune` under the
rule onnxruntime-cpu with per-tensor weights, cross-entropy and sgd; LSQ learns weights and scales.
The peer: `bench_step_peer.py`. Ours has BatchNormalization folded, as in every fine-tuning of an
exported model; PyTorch trains it.

Each model has a process of its own. The script prints the median seconds and CPU seconds of a step
(CPU seconds count all threads, and other load on the machine disturbs them less), and the peak
memory of the process during the steps. For our LSQ step it also prints the fraction of time spent
outside of convolution and matrix product kernels: in fake-quantize (with the products that sum the
gradient of its scale), copies, the optimizer, and the session between kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from step_server import serve

from onnxqat.calibration import calibrate, placeholder_params
from onnxqat.model import Model
from onnxqat.overrides import parse_override
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.preparation import prepare
from onnxqat.quantized import insert_pairs, load_model
from onnxqat.rules import load_rule
from onnxqat.train import Config
from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.losses import LABELS, read_loss
from onnxqat.train.optimization.updater import Updater

CASES = (
    ("resnet18", 224, 8),
    ("mobilenet_v2", 224, 8),
    ("resnet18", 32, 32),
    ("mobilenet_v2", 32, 32),
    ("vit_tiny", 224, 8),
    ("bert_mini", 128, 8),  # a length in tokens
)
WORDS = 30522
THREADS, WARM_UP, PROFILED = 2, 2, 5
PRODUCTS = {"Conv", "ConvGrad", "FusedMatMul", "Gemm", "MatMul"}
SUMS = "FakeQuantize"  # in the names of the products that sum the gradient of a scale


def prepared(path: Path, kind: str, inputs: np.ndarray) -> Model:
    """Return the Q/DQ model; for ``float`` a model without points."""
    floats = prepare(load_model(path))
    per_tensor = [parse_override("weight.axis=none")]
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"), per_tensor)
    if kind == "float":
        nothing = QuantPlan(rule=plan.rule, points=(), skips=())
        return insert_pairs(floats, nothing, {}, state="calibrated")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [{"input": inputs}], observer="minmax", threads=THREADS)


def step_of(path: Path, kind: str, case: int) -> tuple[StepSession, Callable[[], None]]:
    name, size, batch = CASES[case]
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(batch, 3, size, size)).astype(np.float32)
    if name == "bert_mini":
        inputs = rng.integers(0, WORDS, (batch, size))
    feeds = {"input": inputs, LABELS: rng.integers(0, 1000, batch)}
    model = prepared(path, kind, inputs)
    form = training_form(model)
    session = StepSession(form, read_loss("cross-entropy"), batch_size=batch, threads=THREADS)
    config = Config(optimizer="sgd", lr=1e-4)
    updater = Updater(form, session.values, session.gradients, model, config)

    def step() -> None:
        session.run(feeds)
        updater.step(1.0, 0)

    return session, step


class Profiled(ort.SessionOptions):
    """Options of a session that measures its kernels."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.enable_profiling = True
        self.profile_file_prefix = tempfile.mkdtemp(dir=self.folder) + "/kernels"


def print_share(path: Path, case: int) -> None:
    """Print the share of an LSQ step outside of the kernels of products."""
    Profiled.folder, ort.SessionOptions = path.parent, Profiled
    session, step = step_of(path, "qat", case)
    for _ in range(WARM_UP):
        step()
    start = time.perf_counter()
    for _ in range(PROFILED):
        step()
    seconds = time.perf_counter() - start
    events = json.loads(Path(session._session.end_profiling()).read_text(encoding="utf-8"))
    first = sorted(e["ts"] for e in events if e["name"] == "model_run")[WARM_UP]
    kernels = [e for e in events if e["name"].endswith("_kernel_time") and e["ts"] >= first]
    products = [e for e in kernels if e["args"]["op_name"] in PRODUCTS and SUMS not in e["name"]]
    print(1 - sum(e["dur"] for e in products) / 1e6 / seconds)


def started(commands: dict[str, list[str]]) -> dict[str, subprocess.Popen[str]]:
    """Start the processes in parallel; return them when all are ready to step."""
    pipe = subprocess.PIPE
    processes = {
        kind: subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        for kind, command in commands.items()
    }
    for process in processes.values():
        while answer(process) != "ready":
            pass
    return processes


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args!r} ended with {process.wait()}")
    return line.strip()


def measured(commands: dict[str, list[str]], repeat: int) -> dict[str, list[float]]:
    """Return seconds, CPU seconds and peak GB of a step, by kind."""
    processes = started(commands)
    times: dict[str, list[list[float]]] = {kind: [] for kind in commands}
    for _ in range(WARM_UP + repeat):
        for kind, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            times[kind].append([float(word) for word in answer(process).split()])
    found = {}
    for kind, process in processes.items():
        assert process.stdin is not None
        process.stdin.close()
        columns = zip(*times[kind][WARM_UP:], strict=True)
        found[kind] = [*map(statistics.median, columns), float(answer(process))]
        process.wait()
    return found


def compare(case: int, python: str, plain: str | None, repeat: int) -> None:
    """Measure one network and print its lines."""
    name, size, batch = CASES[case]
    peer = [python, str(Path(__file__).with_name("bench_step_peer.py")), name, str(size)]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        subprocess.run([*peer, str(batch), "export", path], check=True)
        mine = [__file__, "--case", str(case), "--model", path, "--work"]
        commands = {"float": [sys.executable, *mine, "float"]}
        commands["LSQ"] = [sys.executable, *mine, "qat"]
        if plain is not None:
            commands |= {"plain float": [plain, *mine, "float"], "plain LSQ": [plain, *mine, "qat"]}
        commands["peer float"] = [*peer, str(batch), "float"]
        commands["peer QAT"] = [*peer, str(batch), "qat"]
        found = measured(commands, repeat)
        command = [sys.executable, *mine, "share"]
        share = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(f"{name} {size}, batch {batch}".ljust(34) + "".join(f"{k:>12}" for k in found))
    for row, what in enumerate(("seconds", "CPU seconds", "peak GB")):
        print(f"  {what:<32}" + "".join(f"{figures[row]:>12.3f}" for figures in found.values()))
    print(f"  {'outside of products':<32}{'':>12}{float(share):>12.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="Python of an environment with torch")
    parser.add_argument("--plain", help="Python of an environment with another onnxruntime")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--case", type=int, choices=range(len(CASES)), help="measure only this one")
    for hidden in ("--model", "--work"):  # options for the process of one model
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        if arguments.work == "share":
            print_share(Path(arguments.model), arguments.case)
        else:
            serve(step_of(Path(arguments.model), arguments.work, arguments.case)[1])
        return
    if arguments.python is None:
        parser.error("--python is required")
    for case in range(len(CASES)) if arguments.case is None else [arguments.case]:
        compare(case, arguments.python, arguments.plain, arguments.repeat)


if __name__ == "__main__":
    main()
