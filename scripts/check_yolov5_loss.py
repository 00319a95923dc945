"""Compare the loss that `yolov5_loss.py` writes with that of the package yolov5.

    python scripts/check_yolov5_loss.py

Runs where torch, yolov5 (7.0.14), onnx and onnxruntime are. Random outputs and targets, one target
an image: of several targets of one box, yolov5 takes one, and we their mean. Our doubt about
probabilities is set to 0. Prints the largest relative difference; above 1e-3 it exits with 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from yolov5.utils.loss import ComputeLoss
from yolov5_loss import BOX, CLASSES, COCO, OBJECTNESS, STRIDES, Export, loss_of

HEIGHT, WIDTH, KINDS, IMAGES, TRIALS = 128, 192, 4, 16, 20
LARGEST = 1e-3
ANCHORS = np.array(COCO, np.float32).reshape(3, 3, 2)


def decoded(logits: list[torch.Tensor]) -> torch.Tensor:
    """Return what YOLOv5's head gives for the logits of its maps (N, 3, rows, columns, values)."""
    found = []
    for level, (stride, x) in enumerate(zip(STRIDES, logits, strict=True)):
        rows, columns = x.shape[2:4]
        y, x_of = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        grid, p = torch.stack((x_of, y), 2), x.sigmoid()
        place = (p[..., :2] * 2 - 0.5 + grid) * stride
        length = (p[..., 2:4] * 2) ** 2 * torch.from_numpy(ANCHORS[level]).view(1, 3, 1, 1, 2)
        found.append(torch.cat((place, length, p[..., 4:]), 4).view(len(x), -1, 5 + KINDS))
    return torch.cat(found, 1)


def package() -> Any:
    """Return the package's loss, with the weights of its train.py."""
    strides = torch.tensor(STRIDES)
    head = SimpleNamespace(
        nl=3, na=3, nc=KINDS, stride=strides,
        anchors=torch.from_numpy(ANCHORS) / strides.view(3, 1, 1),
    )  # fmt: skip
    settings = {
        "box": BOX, "cls": CLASSES * KINDS / 80, "obj": OBJECTNESS * HEIGHT * WIDTH / 640**2,
        "cls_pw": 1.0, "obj_pw": 1.0, "fl_gamma": 0.0, "anchor_t": 4.0,
    }  # fmt: skip
    parameter = torch.zeros(1)
    return ComputeLoss(
        SimpleNamespace(hyp=settings, model=[head], parameters=lambda: iter([parameter]))
    )


def ours(folder: Path) -> onnxruntime.InferenceSession:
    """Return our loss without its doubt about probabilities."""
    boxes = 3 * sum(HEIGHT // s * (WIDTH // s) for s in STRIDES)
    loss = loss_of(Export("found", HEIGHT, WIDTH, boxes, KINDS), ANCHORS, "boxes", None)
    for constant in loss.graph.initializer:
        if constant.name in ("yolov5/sure", "yolov5/doubt"):
            value = np.array(float(constant.name == "yolov5/sure"), np.float32)
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))
    onnx.save(loss, folder / "loss.onnx")
    return onnxruntime.InferenceSession(folder / "loss.onnx", providers=["CPUExecutionProvider"])


def main(folder: Path) -> None:
    theirs, session, worst = package(), ours(folder), 0.0
    for seed in range(TRIALS):
        torch.manual_seed(seed)
        logits = [torch.randn(IMAGES, 3, HEIGHT // s, WIDTH // s, 5 + KINDS) for s in STRIDES]
        boxes = torch.rand(IMAGES, 1, 5) * 0.9 + 0.05
        boxes[..., 0] = torch.randint(KINDS, (IMAGES, 1))
        if seed % 2:  # centres on the edges of cells, and in their middles
            cells = torch.tensor([WIDTH, HEIGHT]) / 8
            boxes[..., 1:3] = (boxes[..., 1:3] * cells).round() / cells
        rows = torch.cat((torch.arange(IMAGES)[:, None, None], boxes), 2)[:, 0]
        wanted = float(theirs(logits, rows)[0]) / IMAGES
        feeds = {"found": decoded(logits).numpy(), "boxes": boxes.numpy()}
        found = float(session.run(None, feeds)[0])
        worst = max(worst, abs(found - wanted) / wanted)
    print(f"{TRIALS} batches of {IMAGES}: the largest relative difference is {worst:.1e}")
    sys.exit(worst > LARGEST)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
