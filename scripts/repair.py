"""Measure how much accuracy repair without training recovers, and how much fine-tuning adds.

    python scripts/repair.py --models DIR --data DIR --work DIR [--only TEXT,...] [--images N]
        [--minutes N] [--seeds N]

Prints two tables. The models and data are those of the development set (six trained networks,
CIFAR-10, ImageNet and COCO images). NanoDet needs ``pip install pycocotools``. Each figure is
written to WORK/repair.json as soon as it is known, so a run can be split with ``--minutes`` or by
interrupting it. ``--seeds 0``, the default, leaves out fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import onnxqat as oq

CIFAR = ("cifar10-train-20k.npz", "cifar10-test-10k.npz")
IMAGENET = ("imagenet224/train", "imagenet224/val")
COCO = ("coco128/train", "coco128/val")
IMAGENET_NORM = oq.Settings(mean=(123.675, 116.28, 103.53), scale=(0.0171248, 0.017507, 0.0174292))
CIFAR_NORM = oq.Settings(mean=(125.307, 122.961, 113.8575), scale=(0.0193849, 0.0196668, 0.0195103))
COCO_NORM = oq.Settings(
    mean=(103.53, 116.28, 123.675),
    scale=(0.0174292, 0.017507, 0.0171248),
    pixel_format="bgr",
    keep_aspect_ratio=True,
)
MODELS = {
    "resnet8-cifar10": (CIFAR, oq.Settings()),
    "resnet20-cifar10": (CIFAR, CIFAR_NORM),
    "shufflenetv2-x05-cifar10": (CIFAR, CIFAR_NORM),
    "vit-cifar10": (CIFAR, IMAGENET_NORM),
    "mobilenetv1-025-imagenet": (IMAGENET, IMAGENET_NORM),
    "nanodet-m-416": (COCO, COCO_NORM),
}
MOBILENET, NANODET = "mobilenetv1-025-imagenet", "nanodet-m-416"
WIDTHS = {"W8A8": (), "W4A8": ("weight.bits=4",)}
AXES = {"per-tensor": ("weight.axis=none",), "per-axis": ("weight.axis=channel",)}
# How each column is inserted: the arguments of `onnxqat.insert`, and how biases are corrected.
COLUMNS: dict[str, tuple[dict[str, Any], str | None]] = {
    "post-training": ({}, None),
    "+ equalization": ({"equalize": True}, None),
    "+ bias correction": ({"equalize": True}, "empirical"),
    "analytic instead": ({"equalize": True}, "analytic"),
}
TUNED = "+ fine-tuning"
EPOCHS = ("--loss", "kl")  # the labels number 150 classes, the outputs 1,000


class Row(NamedTuple):
    """One row of a table."""

    model: str
    rule: str
    width: str
    axis: str

    @property
    def name(self) -> str:
        """Name of the row in --only and in the results."""
        return "/".join(self)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides of the rule."""
        return (*WIDTHS[self.width], *AXES.get(self.axis, ()))


ROWS = [Row(m, "onnxruntime-cpu", w, a) for m in MODELS for w in WIDTHS for a in AXES]
TUNED_ROWS = [Row(MOBILENET, "onnxruntime-cpu", "W8A8", a) for a in AXES]
TUNED_ROWS.append(Row(MOBILENET, "esp32-p4", "W8A8", "the rule's"))


class Results:
    """Figures by name, written to disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, figure: float) -> None:
        self.figures[name] = figure
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures, indent=2, sort_keys=True))
        temporary.replace(self._path)
        print(f"{name}: {figure:.2f}", file=sys.stderr, flush=True)


class Measurement:
    """The measurement: paths of models and data, and its time limit."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.models, self.data, self.work = given.models, given.data, given.work
        self.images, self.seeds = given.images, range(given.seeds)
        self.only = given.only.split(",")
        self.deadline = time.monotonic() + 60 * given.minutes
        self.results = Results(given.work / "repair.json")

    def run(self) -> None:
        for row in (*ROWS, *TUNED_ROWS):
            self._once(f"{row.model}/float", lambda row=row: self._metric(row, self._path(row)))
            for column in COLUMNS:
                self._once(f"{row.name}/{column}", lambda r=row, c=column: self._repaired(r, c))
        for row in TUNED_ROWS:
            for seed in self.seeds:
                name = f"{row.name}/{TUNED}/{seed}"
                self._once(name, lambda row=row, seed=seed: self._tuned(row, seed))

    def _once(self, name: str, measure: Any) -> None:
        left = time.monotonic() < self.deadline
        if left and name not in self.results.figures and any(part in name for part in self.only):
            figure = measure()
            if figure is not None:
                self.results.add(name, figure)

    def _path(self, row: Row) -> Path:
        return self.models / f"{row.model}.onnx"

    def _file(self, row: Row, column: str) -> Path:
        return self.work / f"{row.name}.{column}.onnx".replace("/", "_").replace(" ", "_")

    def _repaired(self, row: Row, column: str) -> float:
        (train, _), settings = MODELS[row.model]
        how, correction = COLUMNS[column]
        model = oq.insert(
            self._path(row),
            rules=row.rule,
            overrides=row.overrides,
            data=self.data / train,
            settings=settings,
            calibration=oq.Calibration(bias_correction=correction),
            **how,
        )
        path = self._file(row, column)
        model.save(path, force=True)
        return self._metric(row, path)

    def _metric(self, row: Row, path: Path) -> float:
        """Return top-1 or mAP in percent, with the file's Q/DQ."""
        if row.model == NANODET:
            from detection import mean_precision

            return mean_precision(path, self.data)
        (_, test), settings = MODELS[row.model]
        # a Q/DQ file stores its settings
        settings = settings if path == self._path(row) else oq.Settings()
        return 100 * oq.evaluate(path, self._test(test), settings=settings).metrics["top1"]

    def _test(self, name: str) -> Path:
        """Return the test data, or a file with their first images."""
        path = self.data / name
        if not self.images or path.suffix != ".npz":
            return path
        part = self.work / f"first-{self.images}-{name}"
        if not part.exists():
            with np.load(path) as arrays:
                np.savez(part, **{key: arrays[key][: self.images] for key in arrays.files})
        return part

    def _tuned(self, row: Row, seed: int) -> float | None:
        """Fine-tune the repaired model with the default settings; None if the time is up."""
        (train, _), _ = MODELS[row.model]
        start, target = self._file(row, "+ bias correction"), self._file(row, f"tuned-{seed}")
        if not start.exists():
            return None
        resume = "--resume" if Path(f"{target}.checkpoint").exists() else "--force"
        command = ["finetune", start, self.data / train, *EPOCHS, "--seed", seed, "-o", target]
        words = [sys.executable, "-m", "onnxqat", *map(str, command), resume]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(timeout=max(self.deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGINT)  # it saves a checkpoint
            process.wait()
            return None
        if code:
            raise SystemExit(code)
        return self._metric(row, target)


def tables(figures: dict[str, float]) -> Iterable[str]:
    """Yield the lines of the tables, in Markdown."""
    yield from _header("model", "width", "weights", "float", *COLUMNS)
    for row in ROWS:
        cells = [figures.get(f"{row.name}/{column}") for column in COLUMNS]
        if any(cell is not None for cell in cells):
            start = [row.model, row.width, row.axis, _cell(figures.get(f"{row.model}/float"))]
            yield _line(*start, *map(_cell, cells))
    yield ""
    yield from _header("MobileNetV1", "weights", *COLUMNS, TUNED)
    for row in TUNED_ROWS:
        cells = [_cell(figures.get(f"{row.name}/{column}")) for column in COLUMNS]
        tuned = [v for k, v in sorted(figures.items()) if k.startswith(f"{row.name}/{TUNED}/")]
        yield _line(row.rule, row.axis, *cells, ", ".join(map(_cell, tuned)))


def _header(*names: str) -> Iterable[str]:
    yield _line(*names)
    yield "|---" * len(names) + "|"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated parts of names, as printed")
    parser.add_argument("--images", type=int, default=0, help="CIFAR-10 test images (0: all)")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after this time")
    parser.add_argument("--seeds", type=int, default=0, help="number of fine-tunings per row")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(given)
    measurement.run()
    print("\n".join(tables(measurement.results.figures)))


if __name__ == "__main__":
    main()
