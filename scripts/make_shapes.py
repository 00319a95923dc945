"""Make the bundled pictures of shapes, train the bundled detector on such, and write its loss.

Needs what the package does not depend on, so run it from an environment of its own::

    pip install torch==2.14.0 onnx onnxruntime numpy pillow
    python scripts/make_shapes.py --out models

Everything is seeded: the same versions on the same kind of CPU give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from yolov5_loss import BALANCE, BOX, CLASSES, OBJECTNESS, STRIDES, loss_of, read_export
from yolov5_network import Anchors, Bottleneck, ConvSiLU, Detect

SIZE, KINDS = 64, ("ellipse", "rectangle", "triangle")
MOST, TRIES = 6, 8  # shapes of a picture, and how often one is placed anew where it hides another
SMALLEST, LARGEST, LONGEST = 8, 34, 2.0  # sides in pixels, and how many times as long as wide
HIDDEN = 0.3  # share of the smaller of two shapes that the other may hide
STEP, CONTRAST, BANDS, SPECKS = 16, 24, 8, 0.015  # of colours, of a gradient; share of the pixels
TRAINING, TEST = 512, 256  # pictures in the files
STEPS, BATCH = 2400, 32
ANCHORS: Anchors = (((8, 8), (10, 14), (14, 10)), ((15, 15), (16, 24), (24, 16)),
                    ((25, 25), (24, 33), (33, 24)))  # fmt: skip

Array = NDArray[Any]


class Split(NamedTuple):
    """Pictures, and what is in them.

    Attributes
    ----------
    images : uint8 of shape (N, SIZE, SIZE, 3)
        Red, green and blue.
    boxes : float32 of shape (N, MOST, 5)
        Class, cx, cy, w, h, relative to the picture; behind the last shape -1 and zeros.
    count : int64 of shape (N,)
        How many shapes there are.
    """

    images: Array
    boxes: Array
    count: Array


def pictures(count: int, seed: int) -> Split:
    """Draw pictures of ellipses, rectangles and triangles, over lines and a gradient."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    boxes = np.zeros((count, MOST, 5), np.float32)
    boxes[..., 0] = -1
    counts = np.empty(count, np.int64)
    for i in range(count):
        images[i], found = _picture(rng)
        counts[i] = len(found)
        boxes[i, : len(found)] = found
    return Split(images, boxes, counts)


def _picture(rng: np.random.Generator) -> tuple[Array, list[tuple[float, ...]]]:
    ends = rng.integers(0, 256 // STEP, (2, 3)) * STEP
    bands = np.arange(SIZE) * BANDS // SIZE
    share = (bands[:, None] + bands * rng.integers(0, 2)) / (2 * BANDS)
    pixels = ends[0] + (ends[1] - ends[0]) * share[..., None]
    picture = Image.fromarray(np.rot90(pixels, rng.integers(4)).astype(np.uint8).copy())
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 4)):
        points, colour = rng.integers(0, SIZE, 4).tolist(), _colour(rng)
        draw.line(points, fill=colour, width=int(rng.integers(1, 3)))
    found: list[tuple[float, ...]] = []
    corners: list[tuple[int, int, int, int]] = []
    for _ in range(rng.integers(1, MOST + 1)):
        place = _place(rng, corners)
        if place is None:
            continue
        kind = int(rng.integers(len(KINDS)))
        _shape(draw, kind, place, _contrasting(rng, pixels.mean((0, 1))), rng)
        corners.append(place)
        x, y, x2, y2 = place
        found.append((kind, (x + x2) / 2 / SIZE, (y + y2) / 2 / SIZE, (x2 - x) / SIZE,
                      (y2 - y) / SIZE))  # fmt: skip
    image = np.array(picture)
    specks = rng.random((SIZE, SIZE)) < SPECKS
    image[specks] = rng.integers(0, 256 // STEP, (specks.sum(), 1)) * STEP
    return image, found


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple((rng.integers(0, 256 // STEP, 3) * STEP).tolist())


def _contrasting(rng: np.random.Generator, background: Array) -> tuple[int, ...]:
    """Return a colour that differs from the mean of the background."""
    while True:
        colour = _colour(rng)
        if np.abs(np.array(colour) - background).mean() >= CONTRAST:
            return colour


def _place(
    rng: np.random.Generator, others: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """Return corners for a shape that hides no other one, or nearly; None where none was found."""
    for _ in range(TRIES):
        width, height = rng.integers(SMALLEST, LARGEST + 1, 2).tolist()
        if max(width, height) > LONGEST * min(width, height):
            continue
        x, y = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
        place = (x, y, x + width, y + height)
        if all(_hidden(place, other) <= HIDDEN for other in others):
            return place
    return None


def _hidden(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Return the share of the smaller of two boxes that lies in the other."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return max(width, 0) * max(height, 0) / min(areas)


def _shape(
    draw: ImageDraw.ImageDraw, kind: int, place: tuple[int, int, int, int],
    colour: tuple[int, ...], rng: np.random.Generator,
) -> None:  # fmt: skip
    x, y, x2, y2 = place[0], place[1], place[2] - 1, place[3] - 1  # the last pixels themselves
    if kind == 0:
        draw.ellipse((x, y, x2, y2), fill=colour)
    elif kind == 1:
        draw.rectangle((x, y, x2, y2), fill=colour)
    else:
        base, top = (y2, y) if rng.integers(2) else (y, y2)
        draw.polygon([(x, base), (x2, base), ((x + x2) // 2, top)], fill=colour)


# --- network ----------------------------------------------------------------------------------


class Detector(nn.Module):
    """Strided convolutions with SiLU, a path back up with Concat, and YOLOv5's head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvSiLU(3, 12, 3, 2), ConvSiLU(12, 24, 3, 2))
        self.stage3 = nn.Sequential(ConvSiLU(24, 32, 3, 2), Bottleneck(32, shortcut=True))
        self.stage4 = nn.Sequential(ConvSiLU(32, 40, 3, 2), Bottleneck(40, shortcut=True))
        self.stage5 = ConvSiLU(40, 48, 3, 2)
        self.lateral5, self.lateral4 = ConvSiLU(48, 40), ConvSiLU(40, 32)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4, self.top3 = ConvSiLU(80, 40, 3), ConvSiLU(64, 32, 3)
        self.detect = Detect([32, 40, 48], len(KINDS), SIZE, ANCHORS)

    def forward(self, x: Tensor) -> Tensor:
        """Return boxes (N, 252, 8): centre and size in pixels, objectness, classes."""
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        n4 = self.top4(torch.cat((self.upsample(self.lateral5(p5)), p4), 1))
        n3 = self.top3(torch.cat((self.upsample(self.lateral4(n4)), p3), 1))
        found: Tensor = self.detect(n3, n4, p5)
        return found


def normalise(images: Array) -> Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255


# --- training ---------------------------------------------------------------------------------


class Loss(nn.Module):
    """The loss of `yolov5_loss`, computed of every box and every target."""

    def __init__(self) -> None:
        super().__init__()
        anchors, cells, strides, weights = [], [], [], []
        for sides, stride, balance in zip(ANCHORS, STRIDES, BALANCE, strict=True):
            side = SIZE // stride
            for anchor in sides:
                anchors += [anchor] * side**2
                cells += [(x, y) for y in range(side) for x in range(side)]
            strides += [stride] * 3 * side**2
            weights += [balance / (3 * side**2)] * 3 * side**2
        self.anchors, self.cells = torch.tensor(anchors).float(), torch.tensor(cells).float()
        self.strides, self.weights = torch.tensor(strides).float(), torch.tensor(weights)

    def forward(self, found: Tensor, boxes: Tensor) -> Tensor:
        """Return the loss of boxes (N, 252, 8) where there should be ``boxes`` (N, MOST, 5)."""
        places, lengths = boxes[:, :, None, 1:3] * SIZE, boxes[:, :, None, 3:] * SIZE
        ratio = lengths / self.anchors
        fits = torch.maximum(ratio, 1 / ratio.clamp_min(1e-9)).amax(3) < 4
        at = places / self.strides[:, None]
        own = at.floor() == self.cells
        near = (at - self.cells - 0.5).abs() < 1
        reached = (own[..., 0] & near[..., 1]) | (near[..., 0] & own[..., 1])
        image, target, box = torch.where(fits & reached & (boxes[:, :, :1] >= 0))
        one = found[image, box]
        ciou = _ciou(one[:, :4], boxes[image, target, 1:] * SIZE)
        kinds = functional.one_hot(boxes[image, target, 0].long(), len(KINDS)).float()
        kind = functional.binary_cross_entropy(one[:, 5:], kinds, reduction="none").mean(1)
        wanted = torch.zeros(found.shape[:2])
        wanted[image, box] = ciou.detach().clamp_min(0)
        objectness = functional.binary_cross_entropy(found[..., 4], wanted, reduction="none")
        total = OBJECTNESS * (SIZE / 640) ** 2 * (objectness * self.weights).sum(1).mean()
        for stride in STRIDES:
            here = self.strides[box] == stride
            if here.any():
                total = total + BOX * (1 - ciou[here]).mean()
                total = total + CLASSES * len(KINDS) / 80 * kind[here].mean()
        return total


def _ciou(found: Tensor, true: Tensor) -> Tensor:
    """Return the complete IoU of pairs of boxes, see `yolov5_loss`."""
    low, high = found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2
    true_low, true_high = true[:, :2] - true[:, 2:] / 2, true[:, :2] + true[:, 2:] / 2
    common = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).clamp_min(0).prod(1)
    iou = common / (found[:, 2:].prod(1) + true[:, 2:].prod(1) - common + 1e-7)
    around = torch.maximum(high, true_high) - torch.minimum(low, true_low)
    apart = (found[:, :2] - true[:, :2]).square().sum(1) / (around.square().sum(1) + 1e-7)
    angles = [torch.atan(b[:, 2] / (b[:, 3] + 1e-7)) for b in (found, true)]
    unlike = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    alpha = (unlike / (1 + 1e-7 - iou + unlike)).detach()
    return iou - apart - alpha * unlike


def train(net: Detector) -> None:
    """Train on pictures that never come again, with AdamW and one cycle of the learning rate."""
    with torch.no_grad():
        for conv in net.detect.convs:  # few boxes hold something
            conv.bias.view(3, -1)[:, 4] -= 4.0
    loss_of_boxes = Loss()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS)
    net.train()
    for step in range(STEPS):
        data = pictures(BATCH, seed=1000 + step)
        loss = loss_of_boxes(net(normalise(data.images)), torch.from_numpy(data.boxes))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    net.eval()


def export(net: Detector, path: Path, data: Split) -> None:
    """Write the ONNX file, and compare its outputs in onnxruntime with the network's."""
    x = normalise(data.images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter says that it is old
        torch.onnx.export(
            net,
            (x[:1],),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["images"],
            output_names=["output"],
            dynamic_axes={"images": {0: "N"}, "output": {0: "N"}},
        )
    model = onnx.load(path)  # the exporter does not know how many boxes there are
    sizes = (len(ANCHORS[0]) * sum((SIZE // stride) ** 2 for stride in STRIDES), 5 + len(KINDS))
    for dimension, size in zip(model.graph.output[0].type.tensor_type.shape.dim[1:], sizes,
                               strict=True):  # fmt: skip
        dimension.dim_value = size
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(
            session.run(None, {"images": x.numpy()})[0], net(x).numpy(), rtol=1e-4, atol=1e-3
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="directory to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums are split by thread: more threads, other last digits
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)

    train_data, test_data = pictures(TRAINING, seed=2), pictures(TEST, seed=3)
    np.savez_compressed(out / "shapes-train.npz", **train_data._asdict())
    np.savez_compressed(out / "shapes-test.npz", **test_data._asdict())
    net = Detector()
    train(net)
    export(net, out / "shapes.onnx", test_data)
    anchors = np.array(ANCHORS, np.float32)
    loss = loss_of(read_export(out / "shapes.onnx"), anchors, "boxes", "count")
    onnx.save(loss, out / "shapes-loss.onnx")
    for path in sorted(out.glob("shapes*")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.name}")


if __name__ == "__main__":
    main()
