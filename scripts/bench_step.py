"""Time one training step next to PyTorch's, float and quantized, in turn, on two threads.

    python scripts/bench_step.py --python TORCH_PYTHON [--repeat 15]

TORCH_PYTHON has torch, torchvision and onnx. Ours: the step of `finetune` under the rule
onnxruntime-cpu with per-tensor weights, cross-entropy, sgd; LSQ learns weights and scales. The
peer: `bench_step_peer.py`. BatchNormalization is folded in ours, as in every fine-tuning of an
exported model; PyTorch trains it. Printed are medians in seconds, and the peak memory of each
process, in which both of its models live.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxqat.calibrate import calibrate, placeholder_params
from onnxqat.insert import insert
from onnxqat.model import Model, load_model
from onnxqat.overrides import parse_override
from onnxqat.plan import QuantPlan, make_plan
from onnxqat.prepare import prepare
from onnxqat.rules import load_rule
from onnxqat.train import Config
from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.losses import LABELS, read_loss
from onnxqat.train.updater import Updater

CASES = (
    ("resnet18", 224, 8),
    ("mobilenet_v2", 224, 8),
    ("resnet18", 32, 32),
    ("mobilenet_v2", 32, 32),
)
THREADS, WARM_UP = 2, 2


def step_of(model: Model, feeds: dict[str, np.ndarray], batch: int) -> Callable[[], None]:
    form = training_form(model)
    loss = read_loss("cross-entropy")
    session = StepSession(form, loss, batch_size=batch, threads=THREADS)
    config = Config(optimizer="sgd", lr=1e-4)
    updater = Updater(form, session.values, session.gradients, model, config)

    def step() -> None:
        session.run(feeds)
        updater.step(1.0, 0)

    return step


def ours(path: Path, size: int, batch: int) -> dict[str, Callable[[], None]]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, 3, size, size)).astype(np.float32)
    feeds = {"input": images, LABELS: rng.integers(0, 1000, batch)}
    floats = prepare(load_model(path))
    per_tensor = [parse_override("weight.axis=none")]
    plan = make_plan(floats.graph, load_rule("onnxruntime-cpu"), per_tensor)
    empty = insert(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    quantized = calibrate(empty, [{"input": images}], observer="minmax", threads=THREADS)
    nothing = QuantPlan(rule=plan.rule, points=(), skips=())
    plain = insert(floats, nothing, {}, state="calibrated")
    return {"float": step_of(plain, feeds, batch), "qat": step_of(quantized, feeds, batch)}


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def run(name: str, size: int, batch: int, python: str, repeat: int) -> None:
    """Print the line of one network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        script = Path(__file__).with_name("bench_step_peer.py")
        command = [python, str(script), name, str(size), str(batch), str(path)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdin is not None
        assert peer.stdout is not None
        while peer.stdout.readline().strip() != "ready":
            if peer.poll() is not None:
                sys.exit(f"{script} ended with {peer.returncode}")
        steps, times = (
            ours(path, size, batch),
            {k: [] for k in ("float", "qat", "peer float", "peer qat")},
        )
        for i in range(WARM_UP + repeat):
            for kind in ("float", "qat"):
                mine = timed(steps[kind])
                peer.stdin.write(f"{kind}\n")
                peer.stdin.flush()
                theirs = float(peer.stdout.readline())
                if i >= WARM_UP:
                    times[kind].append(mine)
                    times[f"peer {kind}"].append(theirs)
        peer.stdin.close()
        peer.wait()
    medians = "  ".join(f"{statistics.median(t):>10.3f}" for t in times.values())
    memory = [
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(
        f"{f'{name} {size}x{size} b{batch}':<24}{medians}  {memory[0]:>8.2f}  {memory[1]:>8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with torch")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        run(*CASES[arguments.case], arguments.python, arguments.repeat)
        return
    heads = ("float, s", "LSQ, s", "peer float", "peer QAT")
    print(f"{'':<24}{'  '.join(f'{h:>10}' for h in heads)}  {'GB':>8}  {'peer GB':>8}", flush=True)
    for case in range(len(CASES)):  # each in a process of its own, for its peak memory
        words = [sys.executable, __file__, *sys.argv[1:], "--case", str(case)]
        subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
