"""Measure float, post-training and fine-tuned mAP of NanoDet by the command line; print a table.

    python scripts/detection.py --models DIR --data DIR --work DIR [--cases NAME,...] [--seeds N]

Also needs ``pip install pycocotools``. The models and data are those of the development set
(``nanodet-m-416.onnx`` and ``coco128``). Training uses only the 128 training images, without their
boxes: the float model is the teacher. Results are kept in WORK/results.json, so that nothing is
measured twice.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from onnxqat.data import open_data
from onnxqat.evaluation.run import model_session
from onnxqat.quantized import load_model
from onnxqat.settings import Settings, input_specs, settle

Array = NDArray[Any]

SIZE, STRIDES, BINS = 416, (8, 16, 32), 8
MIN_SCORE, MAX_OVERLAP, CANDIDATES, MAX_BOXES = 0.05, 0.6, 1000, 100
MEAN, SCALE = (103.53, 116.28, 123.675), (0.0174292, 0.017507, 0.0171248)  # blue, green, red


class Case(NamedTuple):
    """A quantization of the network, and its training."""

    name: str
    overrides: tuple[str, ...]
    training: tuple[str, ...]


CASES = (
    Case("W8A8 per-tensor", ("weight.axis=none",), ("--accumulate", "1")),
    Case("W4A8 per-axis", ("weight.bits=4",), ("--accumulate", "4")),
)
OBSERVERS = ("mse", "minmax", "percentile")
TRAINING = ("--epochs", "3")
PREPROCESSING = (
    *("--keep-aspect-ratio", "--pixel-format", "bgr"),
    *("--mean", ",".join(map(str, MEAN)), "--scale", ",".join(map(str, SCALE))),
)


# --- from the network's outputs to boxes ------------------------------------------------------


def decoded(outputs: list[Array]) -> tuple[Array, Array]:
    """Return boxes (N, 4) as x, y of two corners in pixels of the input, and scores (N, 80).

    The outputs are the scores of three maps, then the distances of each map: from a cell's centre
    to the left, top, right and bottom of the box, in strides, as logits of a distribution over 0 to
    7 (generalized focal loss: Li et al. 2020, https://arxiv.org/abs/2006.04388; RangiLyu/nanodet,
    nanodet/model/head/gfl_head.py: get_bboxes_single). The ``CANDIDATES`` best cells of each map
    are kept.
    """
    boxes, scores = [], []
    for stride, score, logits in zip(STRIDES, outputs[:3], outputs[3:], strict=True):
        cells = SIZE // stride
        best = np.argsort(-score[0].max(axis=1), kind="stable")[:CANDIDATES]
        y, x = np.divmod(best, cells)
        centre = (np.stack([x, y], axis=1) + 0.5) * stride
        powers = np.exp(logits[0][best].reshape(-1, 4, BINS).astype(np.float64))
        distance = powers @ np.arange(BINS) / powers.sum(axis=2) * stride
        corners = np.hstack([centre - distance[:, :2], centre + distance[:, 2:]])
        boxes.append(np.clip(corners, 0, SIZE))
        scores.append(score[0][best])
    return np.concatenate(boxes), np.concatenate(scores)


def suppressed(boxes: Array, scores: Array) -> Array:
    """Return the indices that greedy non-maximum suppression keeps, the best first."""
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    left, kept = np.argsort(-scores, kind="stable"), []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        union = area[best] + area[left] - common
        left = left[common <= MAX_OVERLAP * union]
    return np.array(kept, int)


def detections(outputs: list[Array]) -> list[tuple[int, float, Array]]:
    """Return the best boxes of an image as class, score and corners."""
    boxes, scores = decoded(outputs)
    found = []
    for label in np.flatnonzero((scores > MIN_SCORE).any(axis=0)):
        chosen = np.flatnonzero(scores[:, label] > MIN_SCORE)
        kept = chosen[suppressed(boxes[chosen], scores[chosen, label])]
        found += [(int(label), float(scores[i, label]), boxes[i]) for i in kept]
    return sorted(found, key=lambda one: -one[1])[:MAX_BOXES]


def out_of_letterbox(corners: Array, width: int, height: int) -> list[float]:
    """Return x, y, width and height in pixels of the image, which is centred in the input."""
    factor = SIZE / max(width, height)
    margin = (SIZE - np.floor(np.array([width, height]) * factor + 1e-9)) // 2
    low, high = (np.clip((c - margin) / factor, 0, (width, height)) for c in np.split(corners, 2))
    return [*low.tolist(), *(high - low).tolist()]


# --- mAP --------------------------------------------------------------------------------------


def truth(folder: Path, boxes: Path) -> COCO:
    """Return the true boxes of a folder's images for pycocotools."""
    sizes = [Image.open(path).size for path in sorted(folder.iterdir())]
    annotations = []
    for number, (image, label, *box) in enumerate(np.load(boxes).astype(np.float64), start=1):
        x, y, width, height = np.array(box) * (sizes[int(image)] * 2)
        annotations.append(
            {
                "id": number,
                "image_id": int(image),
                "category_id": int(label),
                "bbox": [x - width / 2, y - height / 2, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "width": w, "height": h} for i, (w, h) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(80)],
    }
    coco.createIndex()
    return coco


def mean_precision(path: Path, data: Path) -> float:
    """Return mAP at overlaps of 0.50 to 0.95 on the validation images, with the file's Q/DQ."""
    model = load_model(path)
    settings = settle(
        model, Settings(mean=MEAN, scale=SCALE, pixel_format="bgr", keep_aspect_ratio=True)
    )
    folder = data / "coco128" / "val"
    session, found = model_session(model, "qdq"), []
    with contextlib.redirect_stdout(io.StringIO()):
        wanted = truth(folder, data / "coco128" / "val-boxes.npy")
        with open_data(
            folder, input_specs(model), preprocessing=settings.preprocessing()
        ) as images:
            for number, batch in enumerate(images.batches(1)):
                size = wanted.imgs[number]["width"], wanted.imgs[number]["height"]
                for label, score, corners in detections(session.run(None, batch.inputs)):
                    box = out_of_letterbox(corners, *size)
                    found.append(
                        {"image_id": number, "category_id": label, "score": score, "bbox": box}
                    )
        if not found:
            return 0.0
        result = COCOeval(wanted, wanted.loadRes(found), "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return 100 * float(result.stats[0])


# --- what is measured -------------------------------------------------------------------------


def onnxqat(*arguments: str | Path) -> dict[str, Any]:
    """Run a command of onnxqat and return its JSON document."""
    command = [sys.executable, "-c", "from onnxqat.cli import main; main()", *arguments, "--json"]
    result = subprocess.run([str(word) for word in command], check=True, capture_output=True)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def measure(case: Case, models: Path, data: Path, work: Path, seeds: int) -> dict[str, Any]:
    """Run insert and finetune for one case, and evaluate every file."""
    model, train = models / "nanodet-m-416.onnx", data / "coco128" / "train"
    stem = case.name.replace(" ", "_")
    sets = [word for override in case.overrides for word in ("--set", override)]
    post = {}
    for observer in OBSERVERS:
        path = work / f"{stem}.{observer}.onnx"
        onnxqat(
            *("insert", model, *sets, *PREPROCESSING),
            *("--data", train, "--observer", observer, "-o", path, "--force"),
        )
        post[observer] = mean_precision(path, data)
    tuned, minutes = [], []
    for seed in range(seeds):
        path, started = work / f"{stem}.{seed}.onnx", time.monotonic()
        onnxqat(
            *("finetune", work / f"{stem}.mse.onnx", train, *TRAINING, *case.training),
            *("--seed", str(seed), "-o", path, "--force"),
        )
        minutes.append((time.monotonic() - started) / 60)
        tuned.append(mean_precision(path, data))
    return {"post": post, "tuned": tuned, "minutes": minutes, "float": mean_precision(model, data)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| case | float | post-training (observer) | start | tuned, by seed | recovered | min |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        observer = max(r["post"], key=r["post"].get)
        best, start, wanted = r["post"][observer], r["post"]["mse"], r["float"]
        tuned = ", ".join(f"{one:.1f}" for one in r["tuned"])
        share = (np.mean(r["tuned"]) - best) / (wanted - best)
        lines.append(
            f"| {name} | {wanted:.1f} | {best:.1f} ({observer}) | {start:.1f} | {tuned} "
            f"| {share:.0%} | {np.mean(r['minutes']):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cases", default="", help="comma-separated parts of case names")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, starting with 0")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for case in CASES:
        if case.name not in results and any(part in case.name for part in given.cases.split(",")):
            results[case.name] = measure(case, given.models, given.data, given.work, given.seeds)
            path.write_text(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
