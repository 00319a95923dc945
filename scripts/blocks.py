"""Compare block reconstruction with end-to-end training; print a table.

    python scripts/blocks.py --models DIR --data DIR --work DIR [--cases NAME,...] [--seeds N]
        [--scopes blocks,network,both] [--options "--block-layers 6 ..."]

The models and data are those of the development set. NanoDet also needs ``pip install
pycocotools``. ``both`` stands for ``--scope blocks,network``. No labels are used. The options are
passed to every ``onnxqat finetune``. Results are kept in WORK/blocks.json by case, scope, options
and seed, so that nothing is measured twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from accuracy import CIFAR, CIFAR_NORM, IMAGENET, IMAGENET_NORM, PER_TENSOR, W4A4, onnxqat

SCOPES = {"network": "network", "blocks": "blocks", "both": "blocks,network"}
COCO = ("coco128/train", "coco128/val")


class Case(NamedTuple):
    """A network, its quantization, and its training."""

    name: str
    model: str
    data: tuple[str, str]
    inserted: list[str]
    trained: list[str]
    epochs: list[str]


def sets(overrides: list[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def cases() -> list[Case]:
    """Return every case, the quick ones first."""
    mobilenet, shufflenet = "mobilenetv1-025-imagenet", "shufflenetv2-x05-cifar10"
    per_tensor = [*IMAGENET_NORM, *sets(PER_TENSOR)]
    esp32 = [*IMAGENET_NORM, "--rules", "esp32-p4"]
    kl = ["--loss", "kl"]  # without labels
    w4a8 = sets([*PER_TENSOR, "weight.bits=4"])
    found = [
        Case("resnet8/W4A8 per-tensor", "resnet8-cifar10", CIFAR, w4a8, kl, []),
        Case("mobilenet/W8A8 per-tensor", mobilenet, IMAGENET, per_tensor, kl, []),
        Case("mobilenet/equalized", mobilenet, IMAGENET, [*per_tensor, "--equalize"], kl, []),
        Case("mobilenet/esp32-p4", mobilenet, IMAGENET, esp32, kl, []),
        Case("shufflenet/W4A4", shufflenet, CIFAR, [*CIFAR_NORM, *sets(PER_TENSOR + W4A4)], [], []),
    ]
    for name, override, accumulate in (
        ("W8A8 per-tensor", "weight.axis=none", "1"),
        ("W4A8 per-axis", "weight.bits=4", "4"),
    ):
        trained, epochs = ["--accumulate", accumulate], ["--epochs", "3"]
        found.append(
            Case(f"nanodet/{name}", "nanodet-m-416", COCO, sets([override]), trained, epochs)
        )
    return found


def figure(case: Case, path: str, data: Path) -> float:
    """Return top-1 (for the detector mAP) in points."""
    if case.data == COCO:
        from detection import mean_precision

        return mean_precision(Path(path), data)
    document = onnxqat("evaluate", path, str(data / case.data[1]))
    return 100 * float(document["metrics"]["top1"])


def started(case: Case, models: Path, data: Path, work: Path) -> str:
    """Return the path of the calibrated Q/DQ file; make it if needed."""
    path = work / f"{case.name.replace('/', '_').replace(' ', '_')}.onnx"
    if not path.exists():
        words = case.inserted
        if case.data == COCO:
            from detection import PREPROCESSING

            words = [*words, *PREPROCESSING]
        onnxqat("insert", str(models / f"{case.model}.onnx"), *words,
                "--data", str(data / case.data[0]), "-o", str(path))  # fmt: skip
    return str(path)


def tuned(case: Case, start: str, scope: str, seed: int, options: list[str], data: Path) -> Any:
    """Fine-tune with one seed; return the results."""
    path, began = start.replace(".onnx", f".{scope}.{seed}.onnx"), time.monotonic()
    words = case.trained + ([] if scope == "blocks" else case.epochs)
    document = onnxqat("finetune", start, str(data / case.data[0]), "--scope", SCOPES[scope],
                       *words, *options, "--seed", str(seed), "-o", path, "--force")  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    return {
        "figure": figure(case, path, data),
        "kept": document["kept"],
        "minutes": minutes,
        "notes": document["notes"],
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| case | scope | start | tuned, by seed | mean | kept | min |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        for way, by_seed in found["tuned"].items():
            runs = list(by_seed.values())
            figures = [run["figure"] for run in runs]
            kept = "; ".join(dict.fromkeys(run["kept"] for run in runs))
            minutes = statistics.mean(run["minutes"] for run in runs)
            listed = ", ".join(f"{one:.1f}" for one in figures)
            lines.append(
                f"| {name} | {way} | {found['start']:.1f} | {listed} "
                f"| {statistics.mean(figures):.1f} | {kept} | {minutes:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", default="", help="comma-separated parts of case names")
    parser.add_argument("--scopes", default=",".join(SCOPES))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, starting with 0")
    parser.add_argument("--options", default="", help="options for onnxqat finetune")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "blocks.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for case in cases():
        if not any(part in case.name for part in given.cases.split(",")):
            continue
        start = started(case, given.models, given.data, given.work)
        if case.name not in results:
            results[case.name] = {"start": figure(case, start, given.data), "tuned": {}}
        for scope in given.scopes.split(","):
            way = f"{scope} {given.options}".strip()
            by_seed = results[case.name]["tuned"].setdefault(way, {})
            for seed in range(given.seeds):
                if str(seed) not in by_seed:
                    options = shlex.split(given.options)
                    by_seed[str(seed)] = tuned(case, start, scope, seed, options, given.data)
                    path.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
