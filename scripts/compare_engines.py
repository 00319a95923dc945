"""Fine-tune the same models on two installations of onnxruntime, and compare their accuracy.

    python scripts/compare_engines.py --models DIR --data DIR --work DIR --other PYTHON

PYTHON has onnxqat and another onnxruntime. The models and data are those of the development set.
Each case is inserted and calibrated once, then fine-tuned from the same file on both engines with
three seeds: CIFAR-10 networks for one epoch of 4,800 images, MobileNet for four epochs of all
images, without labels. Results are kept in WORK/engines.json, so that nothing is measured twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from accuracy import MODELS, PER_TENSOR, W4A4

IMAGES, CALIBRATION = 4800, 512
SEEDS = (0, 1, 2)
CASES = {  # name: model, overrides, options of finetune
    "resnet8-cifar10 W4A4": ("resnet8-cifar10", W4A4, ["--epochs", "1"]),
    "resnet20-cifar10 W4A4": ("resnet20-cifar10", W4A4, ["--epochs", "1"]),
    "mobilenetv1-025-imagenet W8A8": (
        "mobilenetv1-025-imagenet",
        [],
        ["--loss", "kl", "--epochs", "4"],
    ),
}


def onnxqat(python: str, *arguments: str) -> dict:
    """Run a command of onnxqat in an environment, and return its JSON document."""
    command = [python, "-c", "from onnxqat.cli import main; main()", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def training_images(source: Path, work: Path) -> Path:
    """Return a file with the first images of an array file; return a folder unchanged."""
    if source.is_dir():
        return source
    path = work / "train.npz"
    if not path.exists():
        with np.load(source) as arrays:
            np.savez(path, **{name: arrays[name][:IMAGES] for name in arrays.files})
    return path


def measure(name: str, python: str, seed: int, paths: argparse.Namespace) -> float:
    """Return the top-1 of one fine-tuning, in percent."""
    model, overrides, options = CASES[name]
    (train, test), norm = MODELS[model]
    images = str(training_images(paths.data / train, paths.work))
    start, tuned = (paths.work / f"{model}.{end}.onnx" for end in ("qdq", "qat"))
    if not start.exists():
        sets = [word for override in PER_TENSOR + overrides for word in ("--set", override)]
        onnxqat(sys.executable, "insert", str(paths.models / f"{model}.onnx"), *norm, *sets,
                "--rules", "onnxruntime-cpu", "--data", images, "--samples", str(CALIBRATION),
                "-o", str(start))  # fmt: skip
    onnxqat(python, "finetune", str(start), images, *options, "--seed", str(seed),
            "-o", str(tuned), "--force")  # fmt: skip
    found = onnxqat(sys.executable, "evaluate", str(tuned), str(paths.data / test))
    return 100 * found["metrics"]["top1"]


def row(name: str, results: dict[str, float]) -> str:
    """Return a line of the table: each seed on both engines, and the difference of the means."""
    first, other = ([results[f"{name} {e} {s}"] for s in SEEDS] for e in ("ours", "other"))
    cells = [", ".join(f"{value:.2f}" for value in values) for values in (first, other)]
    difference = statistics.mean(other) - statistics.mean(first)
    return f"| {name} | {cells[0]} | {cells[1]} | {difference:+.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for folder in ("models", "data", "work"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--other", required=True, help="Python of the other environment")
    paths = parser.parse_args()
    paths.work.mkdir(parents=True, exist_ok=True)
    kept = paths.work / "engines.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    print("| case | this engine, by seed | the other | other - this |\n|---|---|---|---|")
    for name in CASES:
        for seed in SEEDS:
            for engine, python in (("ours", sys.executable), ("other", paths.other)):
                if (key := f"{name} {engine} {seed}") not in results:
                    results[key] = measure(name, python, seed, paths)
                    kept.write_text(json.dumps(results, indent=1))
        print(row(name, results), flush=True)


if __name__ == "__main__":
    main()
