"""The loss of scripts/yolov5_loss.py, against loops over boxes and targets."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from onnxqat.train.losses import read_loss
from scripts.yolov5_loss import BALANCE, STRIDES, Export, loss_of
from tests.losses import loss_and_gradients

SIZE, CLASSES = 32, 2
BOXES = 3 * sum((SIZE // stride) ** 2 for stride in STRIDES)
ANCHORS = np.array([6, 6, 9, 7, 7, 10, 12, 12, 14, 20, 20, 13, 22, 22, 30, 22, 24, 31], np.float32)
ANCHORS = ANCHORS.reshape(3, 3, 2)
MODEL = Export("found", SIZE, SIZE, BOXES, CLASSES)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    onnx.save(loss_of(MODEL, ANCHORS, "boxes", None), folder / "padded.onnx")
    onnx.save(loss_of(MODEL, ANCHORS, "boxes", "how many"), folder / "counted.onnx")
    return {path.stem: read_loss(str(path)) for path in folder.iterdir()}


def outputs(rng, images):
    """Return boxes near their cells, and probabilities."""
    rows = []
    for stride, sides in zip(STRIDES, ANCHORS, strict=True):
        side = SIZE // stride
        for anchor in sides:
            for y in range(side):
                rows += [((x + 0.5) * stride, (y + 0.5) * stride, *anchor) for x in range(side)]
    places = np.array(rows, np.float32)[None].repeat(images, 0)
    places *= rng.uniform(0.8, 1.2, places.shape)
    scores = rng.uniform(0.02, 0.98, (images, BOXES, 1 + CLASSES))
    return np.concatenate([places, scores], axis=2).astype(np.float32)


def targets(rng, images, most):
    centres, sides = (
        rng.uniform(0.1, 0.9, (images, most, 2)),
        rng.uniform(0.1, 0.9, (images, most, 2)),
    )
    labels = rng.integers(0, CLASSES, (images, most, 1))
    return np.concatenate([labels, centres, sides], axis=2).astype(np.float32)


def parts_of_ciou(found, true):
    """Return the IoU less the distance, the difference of the angles, and alpha."""
    ends = [[(box[i] - box[i + 2] / 2, box[i] + box[i + 2] / 2) for i in (0, 1)]
            for box in (found, true)]  # fmt: skip
    common, diagonal = 1.0, 0.0
    for (low, high), (true_low, true_high) in zip(*ends, strict=True):
        common *= max(min(high, true_high) - max(low, true_low), 0)
        diagonal += (max(high, true_high) - min(low, true_low)) ** 2
    iou = common / (found[2] * found[3] + true[2] * true[3] - common)
    distance = (found[0] - true[0]) ** 2 + (found[1] - true[1]) ** 2
    unlike = 4 / math.pi**2 * (math.atan(true[2] / true[3]) - math.atan(found[2] / found[3])) ** 2
    return iou - distance / diagonal, unlike, unlike / (1 - iou + unlike)


def cells_near(x, y, side):
    """Return the cells that a target is predicted in, as YOLOv5 chooses them."""
    yield int(x), int(y)
    if x % 1 < 0.5 and x > 1:
        yield int(x) - 1, int(y)
    if y % 1 < 0.5 and y > 1:
        yield int(x), int(y) - 1
    if (side - x) % 1 < 0.5 and side - x > 1:
        yield int(x + 0.5), int(y)
    if (side - y) % 1 < 0.5 and side - y > 1:
        yield int(x), int(y + 0.5)


def matches(boxes):
    """Yield map, image, number of the box and target in pixels, for each that is predicted."""
    start = 0
    for level, (stride, sides) in enumerate(zip(STRIDES, ANCHORS.tolist(), strict=True)):
        side = SIZE // stride
        for image, rows in enumerate(boxes):
            for label, *place in rows:
                x, y, w, h = (float(value) * SIZE for value in place)
                for a, (width, height) in enumerate(sides):
                    if max(w / width, width / w, h / height, height / h) < 4:
                        for column, row in cells_near(x / stride, y / stride, side):
                            number = start + (a * side + row) * side + column
                            yield level, image, number, int(label), (x, y, w, h)
        start += 3 * side**2


def cross_entropy(found, true):
    p = 1 / 512 + found * (1 - 2 / 512)
    return -true * np.log(p) - (1 - true) * np.log(1 - p)


def expected(boxes, start):
    """Return the loss as a function of the outputs; what passes no gradient is that of start."""
    found = list(matches(boxes))
    cious: dict[tuple[int, int], list[float]] = {}
    alphas = []
    for _, image, number, _, true in found:
        near, unlike, alpha = parts_of_ciou(start[image, number, :4].astype(np.float64), true)
        alphas.append(alpha)
        cious.setdefault((image, number), []).append(max(near - alpha * unlike, 0.0))
    wanted = np.zeros(start.shape[:2])
    for place, values in cious.items():
        wanted[place] = np.mean(values)

    def function(values):
        rows = values["found"]
        box, kind = [[], [], []], [[], [], []]
        for (level, image, number, label, true), alpha in zip(found, alphas, strict=True):
            one = rows[image, number]
            near, unlike, _ = parts_of_ciou(one[:4], true)
            box[level].append(1 - near + alpha * unlike)
            kind[level].append(cross_entropy(one[5:], np.eye(CLASSES)[label]).mean())
        total = sum(0.05 * np.mean(part) for part in box if part)
        total += sum(0.5 * CLASSES / 80 * np.mean(part) for part in kind if part)
        ends = np.cumsum([3 * (SIZE // stride) ** 2 for stride in STRIDES])[:-1]
        objectness = np.split(cross_entropy(rows[..., 4], wanted), ends, axis=1)
        return float(total) + sum(
            (SIZE / 640) ** 2 * weight * part.mean()
            for weight, part in zip(BALANCE, objectness, strict=True)
        )

    return function


def test_value_and_gradient_are_those_of_loops_over_boxes(losses):
    rng = np.random.default_rng(0)
    found, boxes = outputs(rng, 1), targets(rng, 1, 3)
    assert len({one[0] for one in matches(boxes)}) == 3

    function, doubles = expected(boxes, found), found.astype(np.float64)
    value, slopes = loss_and_gradients(losses["padded"], {"found": found}, arrays={"boxes": boxes})

    assert value == pytest.approx(function({"found": doubles}), rel=1e-5)
    matched = sorted({one[2] for one in matches(boxes)})
    largest, passing = float(np.abs(slopes["found"]).max()), 0
    for number in (*matched[::3], 0, BOXES - 1):
        for column in range(5 + CLASSES):
            ends = []
            for step in (1e-6, -1e-6):
                moved = doubles.copy()
                moved[0, number, column] += step
                ends.append(function({"found": moved}))
            slope = (ends[0] - ends[1]) / 2e-6
            assert slopes["found"][0, number, column] == pytest.approx(slope, abs=1e-4 * largest)
            passing += abs(slope) > 1e-2 * largest
    assert passing > 20


def test_what_stands_behind_the_count_is_not_read(losses):
    rng = np.random.default_rng(1)
    found, boxes, count = outputs(rng, 3), targets(rng, 3, 5), np.array([2, 0, 5])
    wanted = expected([rows[:n] for rows, n in zip(boxes, count, strict=True)], found)
    value, slopes = loss_and_gradients(
        losses["counted"], {"found": found}, arrays={"boxes": boxes, "how many": count}
    )
    boxes[0, 2:], boxes[1] = (-1, 0, 0, 0, 0), (-1, 7, -3, 0, 9)
    padded, same = loss_and_gradients(losses["padded"], {"found": found}, arrays={"boxes": boxes})

    assert value == pytest.approx(wanted({"found": found.astype(np.float64)}), rel=1e-5)
    assert padded == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(same["found"], slopes["found"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("x", [8.0, 12.0, 16.0, 31.9, 0.5])
def test_a_centre_on_the_edge_of_a_cell_is_predicted_as_in_yolov5(losses, x):
    found = outputs(np.random.default_rng(2), 1)
    boxes = np.array([[[1, x / SIZE, 0.4, 0.3, 0.3]]], np.float32)
    value, _ = loss_and_gradients(losses["padded"], {"found": found}, arrays={"boxes": boxes})

    wanted = expected(boxes, found)
    assert value == pytest.approx(wanted({"found": found.astype(np.float64)}), rel=1e-5)


def test_pictures_without_targets_have_a_loss(losses):
    found = outputs(np.random.default_rng(3), 2)
    boxes = np.full((2, 1, 5), -1, np.float32)
    value, slopes = loss_and_gradients(losses["padded"], {"found": found}, arrays={"boxes": boxes})

    wanted = expected(boxes[:, :0], found)
    assert value == pytest.approx(wanted({"found": found.astype(np.float64)}), rel=1e-5)
    assert np.isfinite(slopes["found"]).all()
    assert not slopes["found"][..., :4].any()
