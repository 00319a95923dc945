"""Compare fine-tuning with PyTorch's QAT, and with labels against without; print the tables.

    python scripts/convergence.py --models DIR --data DIR --work DIR --python TORCH_PYTHON
        [--cases PART,...] [--tools ours,peer,labels,kl,defaults] [--threads N]

The models and data are those of the development set. TORCH_PYTHON has torch, torchvision, onnx and
onnx2torch. Results are kept in WORK, so that nothing is measured twice. Several of these commands
may share WORK if they measure different cases or tools.

``ours`` and ``peer`` (`convergence_peer.py`) train the same network on the same images for the same
number of epochs, with the same tensors quantized to the same bits. The rule is onnxruntime-cpu,
changed so that a MatMul and the Add of its bias are fused, as in PyTorch. Weights are per-tensor,
except MobileNet's at 4 bits. The loss is cross-entropy on the labels, for MobileNet KL to the float
network. Each tool tries five learning rates with seed 0, chooses the one with the least loss on a
fifth of the test images, and runs two more seeds. (Training images would not do for this choice:
the float networks have memorized them.) The state after the last step is measured on the other test
images. ``kl`` and ``labels`` repeat ``ours`` at the same rate with the other loss. ``defaults`` is
``onnxqat finetune`` with no option except --seed, trained on 20,000 images; the state that it keeps
is measured on all test images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import MODELS, PER_TENSOR, W4A4, onnxqat
from PIL import Image

from onnxqat.data import DataSet, open_data
from onnxqat.evaluation import evaluate
from onnxqat.model import Model
from onnxqat.quantized import load_model
from onnxqat.settings import input_specs, stored_settings
from onnxqat.train import Config, Progress, finetune

TOOLS = ("ours", "peer", "labels", "kl", "defaults")
LABELS = "cross-entropy"
LOSSES = {"labels": LABELS, "kl": "kl"}  # losses of the tools that repeat ``ours``
RATES = {  # by tool and bits
    ("ours", 4): (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    ("ours", 8): (5e-5, 1e-4, 2e-4, 5e-4, 1e-3),
    ("peer", 4): (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    ("peer", 8): (3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
}
SCALE_RATE = 4e-3  # for both tools; the best of 0.001, 0.004 and 0.02 on ResNet-8 at 4 bits
SEEDS = (0, 1, 2)
CALIBRATION, BATCH = 512, 32
TRAIN_CIFAR, EPOCHS_CIFAR = 4800, 1
TRAIN_IMAGENET, EPOCHS_IMAGENET = 992, 4
SEPARATE = '    ["MatMul", "Relu"],\n'
FUSED = '    ["MatMul", "Add", "Relu"],\n    ["MatMul", "Add"],\n'


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network with one number of bits, and the paths of its files."""

    model: str
    bits: int
    models: Path
    data: Path
    work: Path
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}/W{self.bits}A{self.bits}"

    @property
    def imagenet(self) -> bool:
        return "imagenet" in self.model

    @property
    def loss(self) -> str:
        return "kl" if self.imagenet else LABELS

    @property
    def epochs(self) -> int:
        return EPOCHS_IMAGENET if self.imagenet else EPOCHS_CIFAR

    def result(self, tool: str) -> Path:
        """Return the path of a tool's results."""
        return self.work / f"{tool}-{self.model}-{self.bits}.json"

    @property
    def per_channel(self) -> bool:
        """Whether weights have a scale per channel; per-tensor, this network stays at chance."""
        return self.imagenet and self.bits == 4

    @property
    def path(self) -> Path:
        return self.models / f"{self.model}.onnx"

    def source(self, part: str) -> Path:
        """Return the images of a part, the same for both tools; write them if needed."""
        (train, test), _ = MODELS[self.model]
        if part.startswith("all"):
            return self.data / (train if part == "all-train" else test)
        path = self.work / f"{'imagenet' if self.imagenet else 'cifar'}-{part}.npz"
        if not path.exists():
            images, labels = arrays(self.data / (test if part in ("test", "held") else train))
            chosen = self._split(part, len(labels))
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, images=images[chosen], label=labels[chosen])
            temporary.replace(path)
        return path

    def _split(self, part: str, count: int) -> np.ndarray:
        order = np.random.default_rng(0).permutation(count)
        return {
            "calibration": order[:CALIBRATION],
            "train": order[: TRAIN_IMAGENET if self.imagenet else TRAIN_CIFAR],
            "held": order[: count // 5],
            "test": order[count // 5 :],
        }[part]

    @cached_property
    def quantized(self) -> Model:
        """The calibrated Q/DQ model that ``ours`` starts with."""
        path = self.work / f"{self.model}-{self.bits}.qdq.onnx"
        if not path.exists():
            granularity = [] if self.per_channel else PER_TENSOR
            overrides = granularity + (W4A4 if self.bits == 4 else [])
            sets = [word for override in overrides for word in ("--set", override)]
            onnxqat("insert", str(self.path), "--rules", str(self._rule()), *sets,
                    *MODELS[self.model][1], "--data", str(self.source("calibration")),
                    "--threads", str(self.threads), "-o", str(path))  # fmt: skip
        return load_model(path)

    def _rule(self) -> Path:
        path = self.work / "like-fx.toml"
        if not path.exists():
            text = (files("onnxqat.rules") / "onnxruntime-cpu.toml").read_text()
            path.write_text(text.replace(SEPARATE, FUSED))
        return path

    def opened(self, part: str) -> DataSet:
        model, settings = self.quantized, stored_settings(self.quantized)
        return open_data(
            self.source(part), input_specs(model), preprocessing=settings.preprocessing()
        )

    def top1(self, model: Model, part: str = "test") -> float:
        batches = self.opened(part).batches(100)
        return evaluate(model, batches, threads=self.threads).metrics["top1"]

    def ours(self) -> dict[str, Any]:
        """Fine-tune at every rate, then with the other seeds at the best rate."""
        found = {lr: self._tuned(self.loss, lr, 0) for lr in RATES["ours", self.bits]}
        best = min(found, key=lambda lr: found[lr][0])
        models = [found[best][1], *(self._tuned(self.loss, best, s)[1] for s in SEEDS[1:])]
        return {
            "start": self.top1(self.quantized),
            "held_loss": {str(lr): loss for lr, (loss, _) in found.items()},
            "lr": best,
            "tuned": [self.top1(model) for model in models],
        }

    def other(self, loss: str) -> dict[str, Any]:
        """Fine-tune with another loss, at the rate that ``ours`` found."""
        lr = json.loads(self.result("ours").read_text())["lr"]
        return {"tuned": [self.top1(self._tuned(loss, lr, seed)[1]) for seed in SEEDS]}

    def _tuned(self, loss: str, lr: float, seed: int) -> tuple[float, Model]:
        """Fine-tune; return the held-out loss after the last step, and the state."""
        config = Config(loss=loss, lr=lr, scale_lr=SCALE_RATE, seed=seed, epochs=self.epochs,
                        batch_size=BATCH, select="loss", threads=self.threads)  # fmt: skip
        states: list[Progress] = []
        finetune(self.quantized, self.opened("train"), validation=self.opened("held"),
                 config=config, report=lambda p: states.append(p) if p.model else None)  # fmt: skip
        return states[-1].validation.loss, states[-1].model

    def defaults(self) -> dict[str, Any]:
        """Fine-tune with the default settings and the next seed; measure the state it keeps."""
        path = self.result("defaults")
        known = json.loads(path.read_text()) if path.exists() else {"tuned": [], "notes": []}
        loss, seed = "kl" if self.imagenet else None, SEEDS[len(known["tuned"])]
        config = Config(loss=loss, seed=seed, threads=self.threads)
        done = finetune(self.quantized, self.opened("all-train"), config=config)
        return {
            "start": known.get("start") or self.top1(self.quantized, "all-test"),
            "tuned": [*known["tuned"], self.top1(done.model, "all-test")],
            "notes": [*known["notes"], f"epoch {done.best_epoch} of {done.epochs}", *done.notes],
        }

    def peer(self, python: str) -> dict[str, Any]:
        """Fine-tune with PyTorch in the same way as `ours`."""
        words = MODELS[self.model][1]
        norm = dict(zip(words[::2], words[1::2], strict=True))
        job = {
            "model": str(self.path),
            "mean": [float(v) for v in norm.get("--mean", "0,0,0").split(",")],
            "scale": [float(v) for v in norm.get("--scale", "1,1,1").split(",")],
            "bits": self.bits,
            "per_channel": self.per_channel,
            "rates": RATES["peer", self.bits],
            "scale_rate": SCALE_RATE,
            "seeds": SEEDS,
            "batch": BATCH,
            "epochs": self.epochs,
            "loss": self.loss,
            "threads": self.threads,
        } | {p: str(self.source(p)) for p in ("calibration", "train", "held", "test")}
        path = self.result("peer").with_suffix(".job")
        path.write_text(json.dumps(job))
        script = str(Path(__file__).with_name("convergence_peer.py"))
        done = subprocess.run([python, script, str(path)], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)


def arrays(source: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 (N, H, W, 3), and labels of an .npz file or image folder."""
    if source.is_file():
        with np.load(source) as found:
            return found["images"], found["label"]
    paths = sorted(source.glob("*/*"))
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in paths])
    return images, np.array([int(f.parent.name) for f in paths])


def mean(values: list[float], base: float = 0.0) -> str:
    """Return the mean of fractions in points, and their standard deviation."""
    points = [100 * (v - base) for v in values]
    spread = f" ± {statistics.pstdev(points):.2f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):.2f}{spread}"


def comparison(results: dict[tuple[str, str], dict]) -> str:
    """Return the table that compares both tools, top-1 in points."""
    lines = [
        "| case | float | start | ours | rate | PyTorch start | PyTorch | rate | ours - PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (tool, name), ours in results.items():
        if tool == "ours" and (theirs := results.get(("peer", name))):
            gap = 100 * (statistics.mean(ours["tuned"]) - statistics.mean(theirs["tuned"]))
            lines.append(
                f"| {name} | {100 * theirs['float']:.2f} | {100 * ours['start']:.2f} "
                f"| {mean(ours['tuned'])} | {ours['lr']:g} | {100 * theirs['start']:.2f} "
                f"| {mean(theirs['tuned'])} | {theirs['lr']:g} | {gap:+.2f} |"
            )
    return "\n".join(lines)


def without_labels(results: dict[tuple[str, str], dict]) -> str:
    """Return a table of the gain by distillation as a share of the gain by labels.

    ``ours`` is one of ``labels`` and ``kl``. Gains beyond the float network do not count.
    """
    lines = [
        "| case | float | start | with labels | without | share |",
        "|---|---|---|---|---|---|",
    ]
    for (tool, name), found in results.items():
        if tool in LOSSES:
            ours, best = results["ours", name], results["peer", name]["float"]
            labels, kl = (ours, found) if tool == "kl" else (found, ours)
            lost = min(statistics.mean(labels["tuned"]), best) - ours["start"]
            gain = statistics.mean(kl["tuned"]) - ours["start"]
            share = f"{100 * gain / lost:.0f} %" if lost > 0.005 else "-"
            lines.append(
                f"| {name} | {100 * best:.2f} | {100 * ours['start']:.2f} "
                f"| {mean(labels['tuned'])} | {mean(kl['tuned'])} | {share} |"
            )
    return "\n".join(lines)


def with_defaults(results: dict[tuple[str, str], dict]) -> str:
    """Return a table of fine-tuning with the default settings."""
    lines = ["| case | start | tuned | seeds | least gain | kept |", "|---|---|---|---|---|---|"]
    for (tool, name), found in results.items():
        if tool == "defaults":
            gain = 100 * (min(found["tuned"]) - found["start"])
            lines.append(
                f"| {name} | {100 * found['start']:.2f} | {mean(found['tuned'])} "
                f"| {len(found['tuned'])} | {gain:+.2f} | {'; '.join(found['notes'])} |"
            )
    return "\n".join(lines)


def measure(case: Case, tool: str, python: str) -> None:
    """Run a tool on a case, unless its result exists."""
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": case.ours,
        "labels": lambda: case.other(LOSSES["labels"]),
        "kl": lambda: case.other(LOSSES["kl"]),
        "peer": lambda: case.peer(python),
        "defaults": case.defaults,
    }
    if case.loss == LOSSES.get(tool):
        return  # ``ours`` is the same
    path = case.result(tool)
    while not (path.exists() and len(json.loads(path.read_text())["tuned"]) == len(SEEDS)):
        found = runs[tool]()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=2))
        temporary.replace(path)
        print(tool, case.name, found, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--python", required=True, help="Python of an environment with torch")
    parser.add_argument("--cases", default="", help="comma-separated parts of case names")
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated (none: print)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(model=model, bits=bits, models=given.models, data=given.data, work=given.work,
             threads=given.threads)
        for bits in (4, 8) for model in MODELS
    ]  # fmt: skip
    for case in cases:
        if any(part in case.name for part in given.cases.split(",")):
            for tool in given.tools.split(","):
                if tool:
                    measure(case, tool, given.python)
    results = {
        (tool, case.name): json.loads(case.result(tool).read_text())
        for tool in TOOLS for case in cases if case.result(tool).exists()
    }  # fmt: skip
    print(comparison(results), without_labels(results), with_defaults(results), sep="\n\n")


if __name__ == "__main__":
    main()
