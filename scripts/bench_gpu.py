"""Time training on a GPU next to PyTorch's, check its gradients, and fine-tune from end to end.

    python scripts/bench_gpu.py [--python TORCH_PYTHON] [--only NAME ...]
    python scripts/bench_gpu.py --cpu --python TORCH_PYTHON       tiny networks, to try the script

It takes under 4 minutes and needs no internet; it makes the graphs itself, with seeded random
weights. The machine must have PyTorch (torch.onnx and torch.ao.quantization; no torchvision) and
onnxruntime-gpu, in one environment, or in two with ``--python``. Copy these wheels to it, for
CPython 3.11 on x86-64 Linux, and the checkout (``pip install --no-deps .``, 1 MB):

    onnx 1.23 9 MB, numpy 2.4 17 MB, onnx_graphsurgeon 0.1 MB, protobuf 0.3 MB, ml_dtypes 0.4 MB,
    typing_extensions 0.1 MB, msgspec 0.2 MB, click 0.1 MB, pillow 7 MB, pyyaml 0.8 MB,
    rich 0.3 MB and its pygments 1.3 MB, markdown_it_py 0.1 MB, mdurl: 37 MB in all
    onnxruntime-gpu 1.31 (CUDA 13) where it is missing: 256 MB, with flatbuffers and packaging; and
    cuDNN 9 and the libraries of CUDA 13, which PyTorch's own wheels for CUDA 13 include (otherwise
    ``onnxruntime-gpu[cuda,cudnn]`` brings them: 1,310 MB more)

The script measures, in this order:

1. For each network, the milliseconds of a step on resident data, updates included (SGD with
   momentum): ours float and LSQ (rule onnxruntime-cpu, per-tensor weights), PyTorch's float and FX
   QAT with learnable fake-quantize; TF32 on both sides, medians. BatchNormalization is folded in
   ours, as in every fine-tuning of an exported model; PyTorch trains it. And the nodes of our LSQ
   step that onnxruntime placed on the CPU.
2. ``onnxqat finetune --device cuda`` of resnet18 on a folder of generated images: samples per
   second, and the share of time spent waiting for data.
3. For each network, gradients in float32 of two samples on the GPU against the CPU's: for each
   parameter the norm of the difference divided by the norm of the gradient. With float activations
   (float weights, and weights with LSQ), more than 1e-3 fails, except for 5 % of the parameters.
   With quantized activations, a value that another order of summation rounds to another level
   changes all that follow: already noise of 1e-6 in the images changes most gradients by percents,
   on the CPU alone. So the median may be at most three times the change by such noise.
4. The LSQ step of each network as a CUDA graph, if onnxruntime captures it; a replay's gradients
   for other data and parameters are compared with those of a plain run first.

The exit code is 1 if a gradient differed, a part failed, or not everything ran within
``--seconds``.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
SEED, CHECKED, TOLERANCE = 0, 2, 1e-3
WEIGHTS = "LSQ of weights alone"
# a Relu at 0 or a tie of a MaxPool, which another order of summation decides differently, changes
# the gradients of a few parameters by more than the tolerance
SHARE = 0.95
NOISE = 1e-6
WARM_UP, STEPS = 5, 20
# times the median norm: smaller gradients are only noise, such as those of a key's bias
SMALLEST = 1e-4
# gradients of a replay that reads old data or parameters are this far from the right ones, or more;
# those of two plain runs may differ where TF32 rounds to another level
FAR, GROWN = 0.2, np.float32(1.05)
IMAGES, CLASSES = 512, 8


@dataclass(frozen=True)
class Case:
    """One network, as described in `gpu_networks`, without torch."""

    name: str
    size: int
    batch: int
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        """Return images, and labels or targets, by the names that a loss reads them as."""
        from onnxqat.train.losses import LABELS, teacher_input

        rng = np.random.default_rng(SEED)
        images = rng.normal(size=(batch, 3, self.size, self.size)).astype(np.float32)
        if len(self.outputs) == 1:
            return {"input": images, LABELS: rng.integers(0, self.shapes[0][1], batch)}
        targets = {
            teacher_input(name): rng.normal(size=(batch, *shape[1:])).astype(np.float32)
            for name, shape in zip(self.outputs, self.shapes, strict=True)
        }
        return {"input": images} | targets

    @property
    def loss(self) -> str:
        if len(self.outputs) == 1:
            return "cross-entropy"
        return "+".join(f"mse:{name}" for name in self.outputs)


# --- PyTorch's side, in a separate process


def run_peer(folder: Path, names: list[str], *, tiny: bool) -> None:
    """Export and time every network; write each result to ``peer.json`` at once."""
    import torch
    from gpu_networks import NETWORKS

    warnings.filterwarnings("ignore")  # of the exporter
    place = torch.device("cpu" if tiny else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    said: dict[str, Any] = {"torch": torch.__version__, "cases": {}, "ms": {}, "errors": {}}
    if not tiny:
        said["gpu"] = torch.cuda.get_device_name()
    for name in names:
        network = NETWORKS[name]
        torch.manual_seed(SEED)
        model = network.tiny() if tiny else network.usual()
        size, batch = (
            (network.tiny_size, network.tiny_batch) if tiny else (network.size, network.batch)
        )
        settle(model.to(place), size, place)
        shapes = export(model.cpu(), folder / name, size, batch, network.outputs)
        said["cases"][name] = {
            "name": name, "size": size, "batch": batch, "outputs": network.outputs, "shapes": shapes
        }  # fmt: skip
    for name in names:
        case = said["cases"][name]
        for kind in ("float", "QAT"):
            network = NETWORKS[name]
            torch.manual_seed(SEED)
            model = (network.tiny() if tiny else network.usual()).to(place)
            try:
                step = torch_step(model, kind, case, place)
                said["ms"][f"{name} {kind}"] = timed(step, lambda: synchronize(place), tiny=tiny)
            except Exception as error:  # continue with the others
                said["errors"][f"{name} {kind}"] = repr(error)[:300]
            (folder / "peer.json").write_text(json.dumps(said))
            del model
            if not tiny:
                torch.cuda.empty_cache()


def settle(model: Any, size: int, place: Any) -> None:
    """Let batch normalization gather its statistics, and leave the model in evaluation mode."""
    import torch

    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(torch.randn(8, 3, size, size, device=place))
    model.eval()


def export(
    model: Any, path: Path, size: int, batch: int, outputs: tuple[str, ...]
) -> list[list[int]]:
    """Write the graph for a step and for the check, and return the shapes of its outputs."""
    import torch

    for count, ending in ((batch, ""), (CHECKED, ".check")):
        images = torch.randn(count, 3, size, size)
        torch.onnx.export(model, (images,), f"{path}{ending}.onnx", dynamo=False, opset_version=17,
                          input_names=["input"], output_names=list(outputs))  # fmt: skip
    with torch.no_grad():
        found = model(images)
    return [list(o.shape) for o in (found if isinstance(found, tuple) else (found,))]


def torch_step(model: Any, kind: str, case: dict[str, Any], place: Any) -> Callable[[], Any]:
    """Return PyTorch's training step on data on the device."""
    import torch
    from torch import nn
    from torch_qat import quantized

    size, batch = case["size"], case["batch"]
    images = torch.randn(batch, 3, size, size, device=place)
    model = model.train()
    if kind == "QAT":
        model = quantized(model, images).to(place)
        with torch.no_grad():
            model(images)  # initializes observers and learned scales
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if len(case["outputs"]) == 1:
        labels = torch.randint(0, case["shapes"][0][1], (batch,), device=place)
        one = nn.CrossEntropyLoss()

        def loss(found: Any) -> Any:
            return one(found, labels)

    else:
        targets = [torch.randn(batch, *shape[1:], device=place) for shape in case["shapes"]]

        def loss(found: Any) -> Any:
            pairs = zip(found, targets, strict=True)
            return sum(nn.functional.mse_loss(ours, target) for ours, target in pairs)

    def step() -> float:
        optimizer.zero_grad()
        value = loss(model(images))
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def synchronize(place: Any) -> None:
    import torch

    if place.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], wait: Callable[[], None], *, tiny: bool) -> float:
    """Return the median time of a step in milliseconds."""
    times = []
    for _ in range(3 if tiny else WARM_UP + STEPS):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1 if tiny else WARM_UP :])


# --- our side


def prepared(path: Path, kind: str, images: np.ndarray, device: Any) -> Any:
    """Return the Q/DQ model; for ``float``, the model without quantization points."""
    from onnxqat.calibration import calibrate, placeholder_params
    from onnxqat.overrides import parse_override
    from onnxqat.plan import QuantPlan, make_plan
    from onnxqat.preparation import prepare
    from onnxqat.quantized import insert_pairs, load_model
    from onnxqat.rules import load_rule

    floats = prepare(load_model(path))
    overrides = ["weight.axis=none", *(["activation.quantize=false"] * (kind == WEIGHTS))]
    plan = make_plan(
        floats.graph, load_rule("onnxruntime-cpu"), list(map(parse_override, overrides))
    )
    if kind == "float":
        nothing = QuantPlan(rule=plan.rule, points=(), skips=())
        return insert_pairs(floats, nothing, {}, state="calibrated")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    return calibrate(empty, [{"input": images}], observer="minmax", device=device)


def trained(model: Any, case: Case, batch: int, device: Any) -> Any:
    """Return the training state of a model, with SGD."""
    from onnxqat.parallel import Workers
    from onnxqat.train import Config
    from onnxqat.train.form import training_form
    from onnxqat.train.losses import read_loss
    from onnxqat.train.opening import open_descent

    return open_descent(
        training_form(model),
        None,
        model,
        loss=read_loss(case.loss),
        arrays=None,
        config=Config(optimizer="sgd", lr=1e-4, batch_size=batch),
        workers=Workers(),
        device=device,
    )[0]


def gradients_of(descent: Any, feeds: dict[str, np.ndarray], device: Any) -> dict[str, np.ndarray]:
    """Return every gradient of a batch, by parameter."""
    from onnxqat.train.resident.feeds import Uploader

    if not device.resident:
        descent.gradient(iter([feeds]), 0)
        return {name: view.copy() for name, view in descent.session.gradients.views.items()}
    descent.gradient(iter([Uploader(device, None, descent.inputs)(feeds)]), 0)
    return dict(descent.layout.views(descent.gradients.get()))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the relative difference of each gradient, by parameter."""
    lengths = {name: float(np.linalg.norm(g)) for name, g in expected.items()}
    least = SMALLEST * statistics.median(lengths.values())
    return {
        name: float(np.linalg.norm(found[name] - g)) / max(lengths[name], least)
        for name, g in expected.items()
    }


def check(folder: Path, case: Case, kind: str, device: Any) -> tuple[bool, str]:
    """Compare the gradients on the device with the CPU's; return whether they agree, and text."""
    from onnxqat.device import CPU

    feeds = case.feeds(CHECKED)
    model = prepared(folder / f"{case.name}.check.onnx", kind, feeds["input"], CPU)
    found = gradients_of(trained(model, case, CHECKED, device), feeds, device)
    on_cpu = trained(model, case, CHECKED, CPU)
    expected = gradients_of(on_cpu, feeds, CPU)
    apart = differences(found, expected)
    if kind != "LSQ":
        most = float(np.quantile(list(apart.values()), SHARE))
        name = max(apart, key=lambda n: apart[n])
        text = f"{most:.1e} for {SHARE:.0%} of them; at most {apart[name]:.1e} ({name})"
        return most <= TOLERANCE, text
    noise = 1 + NOISE * np.random.default_rng(SEED).standard_normal(feeds["input"].shape)
    noisy = feeds | {"input": (feeds["input"] * noise).astype(np.float32)}
    own = statistics.median(differences(gradients_of(on_cpu, noisy, CPU), expected).values())
    median = statistics.median(apart.values())
    text = f"median {median:.1e}; {own:.1e} by noise of {NOISE:g} in the images, on the CPU alone"
    return median <= max(TOLERANCE, 3 * own), text


MODELS: dict[tuple[str, str], Any] = {}  # the prepared models, which several parts use


def own_step(folder: Path, case: Case, kind: str, device: Any) -> tuple[Any, Callable[[], Any]]:
    """Return the training state, and a step on data on the device."""
    from onnxqat.train.resident.feeds import Uploader

    feeds = case.feeds(case.batch)
    key = (case.name, kind)
    if key not in MODELS:
        MODELS[key] = prepared(folder / f"{case.name}.onnx", kind, feeds["input"], device)
    descent = trained(MODELS[key], case, case.batch, device)
    values = Uploader(device, None, descent.inputs)(feeds)

    def step() -> float:
        loss: float = descent.gradient(iter([values]), 0)
        descent.move(1.0, 0)
        return loss

    return descent, step


def recorded(make: Callable[[], T]) -> T:
    """Return what ``make`` returns; its sessions record where onnxruntime places nodes."""
    import onnxruntime as ort

    class Recording(ort.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_session_config_entry("session.record_ep_graph_assignment_info", "1")

    plain, ort.SessionOptions = ort.SessionOptions, Recording
    try:
        return make()
    finally:
        ort.SessionOptions = plain


def on_the_cpu(descent: Any) -> str:
    """Return how many nodes of a step onnxruntime placed on the CPU, by op."""
    session = descent._step._plain.session
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return "not known by this onnxruntime"
    counts: dict[bool, collections.Counter[str]] = {True: collections.Counter()}
    counts[False] = collections.Counter()
    for part in session.get_provider_graph_assignment_info():
        ops = [node.op_type for node in part.get_nodes()]
        counts[part.ep_name.startswith("CPU")].update(ops)
    text = ", ".join(f"{count} {op}" for op, count in counts[True].most_common(8))
    total = sum(counts[True].values()) + sum(counts[False].values())
    return f"{sum(counts[True].values())} of {total} nodes{': ' if text else ''}{text}"


def captured_step(folder: Path, case: Case, device: Any) -> Callable[[], Any] | None:
    """Return the LSQ step of `own_step`, replayed as a CUDA graph; None if it is not captured.

    Raises
    ------
    RuntimeError
        A replay does not see other parameters and data.
    """
    from onnxqat.train.resident.feeds import Uploader

    descent, step = own_step(folder, case, "LSQ", replace(device, captures=True))
    step()
    if descent._step._captured is None:
        return None
    other = {
        name: np.ascontiguousarray(array[::-1]) * (0.5 if array.dtype == np.float32 else 1)
        for name, array in case.feeds(case.batch).items()
    }
    values = Uploader(device, None, descent.inputs)(other)
    descent.values.set(GROWN * descent.values.get())
    descent._step.run(values)
    replayed = descent.gradients.get()
    descent._step._opened(device).run({n: values[n] for n in descent.inputs & values.keys()})
    plain = descent.gradients.get()
    apart = float(np.linalg.norm(replayed - plain) / np.linalg.norm(plain))
    if not apart < FAR:
        raise RuntimeError(f"a replay's gradients differ by {apart:.1e} from those of a plain run")
    return step


def end_to_end(folder: Path, case: Case, *, tiny: bool) -> str:
    """Fine-tune by the command line on generated images, and return its figures as text."""
    from PIL import Image

    images, rng = folder / "images", np.random.default_rng(SEED)
    count, side = (24, 80) if tiny else (IMAGES, 256)
    for index in range(count):
        target = images / str(index % CLASSES) / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(target)
    onnxqat = [sys.executable, "-m", "onnxqat"]
    quantized, tuned = folder / "e2e.qdq.onnx", folder / "e2e.qat.onnx"
    size = f"{case.size},{case.size}"
    run([*onnxqat, "insert", folder / f"{case.name}.onnx", "-o", quantized, "--mean", "128,128,128",
         "--scale", "0.01,0.01,0.01", "--resize-dims", size])  # fmt: skip
    start = time.perf_counter()
    said = run([*onnxqat, "finetune", quantized, images, "-o", tuned, "--epochs", "2", "--json",
                "--device", "cpu" if tiny else "cuda", "--force-labels", "--samples", "64",
                "--checkpoint-every", "never"])  # fmt: skip
    seconds = time.perf_counter() - start
    found = json.loads(said)
    return (
        f"{found['samples_per_second']:.0f} samples/s, waiting for data "
        f"{found['waiting_for_data']:.0%} of it; {found['device']}; "
        f"{seconds:.0f} s for {count} images, 2 epochs, in all"
    )


def run(command: list[Any]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[3]}: {done.stderr.strip()[-400:]}")
    return done.stdout


class Report:
    """Prints lines, and remembers whether a part failed."""

    def __init__(self, seconds: float) -> None:
        self.end, self.failed = time.monotonic() + seconds, False

    def say(self, text: str) -> None:
        print(text, flush=True)

    def measure(self, title: str, make: Callable[[], str]) -> None:
        """Print what ``make`` returns, or why it failed."""
        if time.monotonic() > self.end:
            self.failed = True
            self.say(f"  {title:<34} not run: out of time")
            return
        try:
            found = make()
        except Exception as error:  # continue with the other parts
            self.failed = True
            found = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc(limit=-3)
        self.say(f"  {title:<34} {found}")


def report_steps(
    report: Report, folder: Path, case: Case, peer: dict[str, Any], device: Any
) -> None:
    """Print the times of one network's steps, and which nodes are on the CPU."""
    tiny = device.kind == "cpu"
    report.say(f"{case.name}, batch {case.batch}, {case.size}x{case.size}")

    def milliseconds(other: str, step: Callable[[], Any]) -> str:
        ms = timed(step, lambda: None, tiny=tiny)
        theirs = peer["ms"].get(f"{case.name} {other}")
        if theirs is None:
            return f"{ms:8.2f} ms; PyTorch {other}: {peer['errors'].get(f'{case.name} {other}')}"
        return f"{ms:8.2f} ms; PyTorch {other} {theirs:8.2f} ms; {ms / theirs:.2f} of it"

    steps: list[Any] = []

    def timed_lsq() -> str:
        steps.extend(recorded(lambda: own_step(folder, case, "LSQ", device)))
        return milliseconds("QAT", steps[1])

    float_step = partial(own_step, folder, case, "float", device)
    report.measure("float, step", lambda: milliseconds("float", float_step()[1]))
    report.measure("LSQ, step", timed_lsq)
    if steps:
        report.measure("LSQ, placed on the CPU", lambda: on_the_cpu(steps[0]))


def report_gradients(report: Report, folder: Path, case: Case, exact: Any) -> None:
    """Print how far one network's gradients are from the CPU's."""

    def checked(kind: str) -> str:
        right, text = check(folder, case, kind, exact)
        report.failed = report.failed or not right
        return text if right else f"{text}  FAILED"

    for kind in ("float", WEIGHTS, "LSQ"):
        report.measure(f"{case.name}, {kind}", lambda k=kind: checked(k))


def report_captured(
    report: Report, folder: Path, case: Case, peer: dict[str, Any], device: Any
) -> None:
    """Print the time of the LSQ step as a CUDA graph."""

    def measure() -> str:
        step = captured_step(folder, case, device)
        if step is None:
            return "not captured; the reason is printed above"
        ms = timed(step, lambda: None, tiny=device.kind == "cpu")
        theirs = peer["ms"].get(f"{case.name} QAT", float("nan"))
        return f"{ms:8.2f} ms; PyTorch QAT {theirs:8.2f} ms; {ms / theirs:.2f} of it"

    failed = report.failed
    report.measure(f"{case.name}, LSQ", measure)
    report.failed = failed  # onnxruntime may not support it, which is no failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", default=sys.executable, help="Python of an environment with torch"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--seconds", type=float, default=220, help="begin no part after this time")
    names = ("resnet18", "mobilenet_v2", "yolov5s_like", "vit_tiny")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(arguments.peer, arguments.only, tiny=arguments.cpu)
        return
    from onnxqat.device import Device, find_device

    report = Report(arguments.seconds)
    if arguments.cpu:
        device = exact = Device(resident=True)
    else:
        device, exact = (
            replace(find_device("cuda", precision), captures=False)
            for precision in ("tf32", "fp32")
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peer_command = [arguments.python, __file__, "--peer", name, "--only", *arguments.only]
        peer_command += ["--cpu"] if arguments.cpu else []
        done = subprocess.run(peer_command, stdout=subprocess.DEVNULL, check=False)
        if not (folder / "peer.json").is_file():
            sys.exit(f"PyTorch's side ended with {done.returncode}, and made no graphs.")
        peer = json.loads((folder / "peer.json").read_text())
        from onnxqat.environment import runtime_distribution

        where = peer.get("gpu", "the CPU")
        report.say(f"{where}; torch {peer['torch']}; {runtime_distribution()}; {device}")
        cases = [Case(**case) for case in peer["cases"].values()]
        for case in cases:
            report_steps(report, folder, case, peer, device)
        report.say(f"{cases[0].name}, onnxqat finetune on a folder of images")
        report.measure("end to end", lambda: end_to_end(folder, cases[0], tiny=arguments.cpu))
        report.say("gradients against the CPU's")
        for case in cases:
            report_gradients(report, folder, case, exact)
        report.say("steps replayed as CUDA graphs")  # last, as a failure could end the process
        for case in cases:
            report_captured(report, folder, case, peer, device)
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
