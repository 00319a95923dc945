"""Measure float, post-training and fine-tuned top-1 by the command line, and print one table.

    python scripts/accuracy.py --models DIR --data DIR --work DIR [--cases NAME,...]

The models and data are those of the development set (five trained networks, CIFAR-10 and ImageNet
images). Every figure comes from ``onnxqat evaluate --json`` on the whole test set with the default
hyper-parameters. Results are kept in WORK/results.json, so that nothing is measured twice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CIFAR = ("cifar10-train-20k.npz", "cifar10-test-10k.npz")
IMAGENET = ("imagenet224/train", "imagenet224/val")
IMAGENET_NORM = ["--mean", "123.675,116.28,103.53", "--scale", "0.0171248,0.017507,0.0174292"]
CIFAR_NORM = ["--mean", "125.307,122.961,113.8575", "--scale", "0.0193849,0.0196668,0.0195103"]
MODELS = {
    "resnet8-cifar10": (CIFAR, []),
    "resnet20-cifar10": (CIFAR, CIFAR_NORM),
    "shufflenetv2-x05-cifar10": (CIFAR, CIFAR_NORM),
    "vit-cifar10": (CIFAR, IMAGENET_NORM),
    "mobilenetv1-025-imagenet": (IMAGENET, IMAGENET_NORM),
}
W4A4 = ["weight.bits=4", "activation.bits=4", "first.bits=8", "last.bits=8"]
PER_TENSOR = ["weight.axis=none"]
OBSERVERS = ("mse", "minmax", "percentile")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    model: str
    rule: str
    label: str
    overrides: list[str]

    @property
    def name(self) -> str:
        """Name of the case in --cases and in the results."""
        return f"{self.model}/{self.rule}/{self.label}"


def cases() -> list[Case]:
    """Return every row, the quick ones first."""
    found = []
    for model in MODELS:
        if model.startswith("mobilenet"):
            rows = [("sophgo-bm1684x", "W8A8 per-axis", []),
                    ("sophgo-bm1684x", "W8A8 per-tensor", PER_TENSOR)]  # fmt: skip
        else:
            rows = [("sophgo-bm1690", "W8A8", []), ("sophgo-bm1690", "W4A4", W4A4),
                    ("onnxruntime-cpu", "W8A8 per-tensor", PER_TENSOR),
                    ("onnxruntime-cpu", "W4A4 per-tensor", PER_TENSOR + W4A4)]  # fmt: skip
        found += [Case(model=model, rule=r, label=n, overrides=o) for r, n, o in rows]
    return found


def onnxqat(*arguments: str) -> dict:
    """Run a command of onnxqat and return its JSON document."""
    command = [sys.executable, "-c", "from onnxqat.cli import main; main()", *arguments, "--json"]
    result = subprocess.run(command, check=True, capture_output=True)
    return json.loads(result.stdout)


def measure(case: Case, models: Path, data: Path, work: Path) -> dict:
    """Run insert, calibrate, finetune and evaluate for one case."""
    (train, test), norm = MODELS[case.model]
    model = str(models / f"{case.model}.onnx")
    train, test = str(data / train), str(data / test)
    stem = work / case.name.replace("/", "_").replace(" ", "_")
    sets = [word for override in case.overrides for word in ("--set", override)]

    def top1(path: str) -> float:
        return onnxqat("evaluate", path, test)["metrics"]["top1"]

    qdq, best, post = f"{stem}.qdq.onnx", "", -1.0
    for observer in OBSERVERS:
        path = f"{stem}.{observer}.onnx"
        onnxqat("insert", model, "--rules", case.rule, *sets, *norm, "--data", train,
                "--observer", observer, "-o", path, "--force")  # fmt: skip
        found = top1(path)
        if observer == "mse":
            start, qdq = found, path
        if found > post:
            post, best = found, observer
    started = time.monotonic()
    loss = ["--loss", "kl"] if case.model.startswith("mobilenet") else []  # without labels
    tuned = onnxqat("finetune", qdq, train, *loss, "-o", f"{stem}.qat.onnx", "--force")
    return {
        "float": onnxqat("evaluate", model, test, *norm)["metrics"]["top1"],
        "post": post,
        "observer": best,
        "start": start,
        "tuned": top1(f"{stem}.qat.onnx"),
        "epochs": tuned["epochs"],
        "minutes": (time.monotonic() - started) / 60,
    }


def table(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table, in points of top-1."""
    lines = [
        "| case | float | post-training (observer) | start | tuned | recovered | epochs | min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        if case.name in results:
            r = results[case.name]
            lost = r["float"] - r["post"]
            recovered = f"{100 * (r['tuned'] - r['post']) / lost:.0f} %" if lost > 0.01 else "-"
            lines.append(
                f"| {case.name} | {100 * r['float']:.2f} | {100 * r['post']:.2f} ({r['observer']}) "
                f"| {100 * r['start']:.2f} | {100 * r['tuned']:.2f} | {recovered} | {r['epochs']} "
                f"| {r['minutes']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", default="", help="comma-separated parts of case names")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    wanted = arguments.cases.split(",")
    for case in cases():
        if case.name not in results and any(part in case.name for part in wanted):
            results[case.name] = measure(case, arguments.models, arguments.data, arguments.work)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=2))
            temporary.replace(path)
            print(case.name, results[case.name], file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
