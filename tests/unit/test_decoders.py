"""Boxes from outputs, against the definitions written out box by box."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxqat.data import Preprocessing
from onnxqat.errors import ModelError, OptionError
from onnxqat.evaluation.decoders import DECODERS, Detector, decoder_of, read_decoder
from onnxqat.evaluation.decoders.suppression import Candidates, Selection, selected

SIZE = (64, 96)
CELLS = [(8, 12), (4, 6), (2, 3)]
TOTAL = sum(h * w for h, w in CELLS)
CLASSES = 3


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def outputs_of(name, rng, images=2):
    def scores(*shape):
        return rng.random(shape).astype(np.float32) ** 3

    if name == "nanodet":
        maps = [scores(images, h * w, CLASSES) for h, w in CELLS]
        return maps + [rng.normal(size=(images, h * w, 32)).astype(np.float32) for h, w in CELLS]
    count = 3 * TOTAL if name == "yolov5" else TOTAL
    boxes = rng.normal(size=(images, count, 4)).astype(np.float32)
    if name != "yolox":
        boxes = np.abs(boxes) * 20
    rest = scores(images, count, CLASSES + (name != "yolov8"))
    found = np.concatenate([boxes, rest], axis=2)
    return [found.transpose(0, 2, 1) if name == "yolov8" else found]


def boxes_of(name, outputs, image):
    """Yield corners and scores of each box, one after the other."""
    if name == "nanodet":
        for (rows, columns), stride, s, d in zip(
            CELLS, (8, 16, 32), outputs[:3], outputs[3:], strict=True
        ):
            for cell in range(rows * columns):
                x, y = (cell % columns + 0.5) * stride, (cell // columns + 0.5) * stride
                sides = []
                for logits in d[image, cell].reshape(4, 8).tolist():
                    powers = [math.exp(v) for v in logits]
                    sides.append(sum(i * p for i, p in enumerate(powers)) / sum(powers) * stride)
                left, top, right, bottom = sides
                corners = [max(x - left, 0), max(y - top, 0), min(x + right, 96),
                           min(y + bottom, 64)]  # fmt: skip
                yield corners, s[image, cell]
        return
    rows = outputs[0][image].T if name == "yolov8" else outputs[0][image]
    grid = [(x, y, s) for (h, w), s in zip(CELLS, (8, 16, 32), strict=True)
            for y in range(h) for x in range(w)]  # fmt: skip
    for i, row in enumerate(rows):
        x, y, w, h = row[:4].astype(float)
        if name == "yolox":
            column, line, stride = grid[i]
            x, y = (x + column) * stride, (y + line) * stride
            w, h = math.exp(w) * stride, math.exp(h) * stride
        scores = row[4:] if name == "yolov8" else row[5:] * row[4]
        yield [x - w / 2, y - h / 2, x + w / 2, y + h / 2], scores


def overlap(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return w * h / (sum(area) - w * h)


def kept(boxes, rule):
    """Greedy suppression as it is told: take the best, drop what overlaps it, again."""
    left = []
    for corners, scores in boxes:
        labels = [int(np.argmax(scores))] if rule.best_class_only else range(len(scores))
        left += [(float(scores[c]), c, corners) for c in labels if scores[c] > rule.min_score]
    left.sort(key=lambda one: -one[0])
    found = []
    while left and len(found) < rule.most:
        best, *left = left
        found.append(best)
        left = [one for one in left
                if one[1] != best[1] or overlap(one[2], best[2]) <= rule.max_overlap]  # fmt: skip
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_detections_are_those_of_the_definition(name, rng):
    outputs = outputs_of(name, rng)
    decoder = DECODERS[name]
    assert decoder_of(outputs, SIZE) is decoder
    found = Detector()(outputs, {"x": np.zeros((2, 3, *SIZE), np.float32)}, None)

    assert len(found) == 2
    for image, one in enumerate(found):
        expected = kept(boxes_of(name, outputs, image), decoder.selection)
        assert 20 < len(one.scores) == len(expected)
        assert one.classes.tolist() == [c for _, c, _ in expected]
        np.testing.assert_allclose(one.scores, [s for s, _, _ in expected], rtol=1e-6)
        np.testing.assert_allclose(one.corners, [c for _, _, c in expected], rtol=1e-4, atol=1e-3)


def test_only_the_surest_cells_of_a_map_are_looked_at(rng):
    size = (320, 320)  # 1,600 cells of the first map
    counts = [1600, 400, 100]
    outputs = [rng.random((1, n, 1)).astype(np.float32) for n in counts]
    outputs += [rng.normal(size=(1, n, 32)).astype(np.float32) for n in counts]
    found = DECODERS["nanodet"].candidates(outputs, size)[0]

    assert len(found.scores) == 1000 + 400 + 100
    np.testing.assert_array_equal(
        np.sort(found.scores[:1000, 0]), np.sort(outputs[0][0, :, 0])[600:]
    )


def test_boxes_without_area_and_equal_ones():
    corners = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, 4], [0, 0, 4, 4]], np.float32)
    scores = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    rule = Selection(min_score=0.6, max_overlap=0.5, most=10)

    assert selected(Candidates(corners, scores), rule).scores.tolist() == [
        np.float32(0.9), np.float32(0.8), np.float32(0.7), np.float32(0.6)
    ][:3]  # fmt: skip


def test_boxes_in_pixels_of_the_file(rng):
    outputs = outputs_of("yolov8", rng)
    inputs = {"x": np.zeros((2, *SIZE, 3), np.float32)}  # channels last
    plain = Detector()(outputs, inputs, None)
    scaled = Detector(preprocessing=Preprocessing(resize_dims=SIZE))(
        outputs, inputs, np.array([[128, 96], [64, 192]])
    )
    for one, other, factor in zip(plain, scaled, ([1, 2, 1, 2], [2, 1, 2, 1]), strict=True):
        limits = [96, 64, 96, 64] * np.array(factor)
        np.testing.assert_allclose(other.corners, np.clip(one.corners * factor, 0, limits))


def test_what_cannot_be_decoded_is_said(rng):
    inputs = {"x": np.zeros((2, 3, *SIZE), np.float32)}
    with pytest.raises(ModelError, match=r"No decoder fits outputs of the shapes \(2, 10\)"):
        Detector()([np.zeros((2, 10))], inputs, None)
    with pytest.raises(ModelError, match=r"--decode yolox: does not fit outputs of the shapes"):
        Detector(decoder=read_decoder("yolox"))(outputs_of("yolov5", rng), inputs, None)
    with pytest.raises(ModelError, match="one image input; this one has 0"):
        Detector()(outputs_of("yolox", rng), {"x": np.zeros((2, 3))}, None)
    with pytest.raises(OptionError, match=r"--decode 'yolo' is unknown. The nearest"):
        read_decoder("yolo")
    assert read_decoder("yolo11").name == "yolov8"
