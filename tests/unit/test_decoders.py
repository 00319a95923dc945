"""Boxes from outputs, against the definitions written out box by box."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from onnxqat.data import Preprocessing
from onnxqat.errors import ModelError, OptionError
from onnxqat.evaluation.decoders import DECODERS, Detector, decoder_of, read_decoder, ssd
from onnxqat.evaluation.decoders.suppression import Candidates, Selection, selected

SIZE = (64, 96)
CELLS = [(8, 12), (4, 6), (2, 3)]
TOTAL = sum(h * w for h, w in CELLS)
CLASSES = 3
SSDS = {  # size; for each map: cells, step, sizes of the squares, other aspect ratios
    "ssd": (300, [(38, 8, 21, 45, [2]), (19, 16, 45, 99, [2, 3]), (10, 32, 99, 153, [2, 3]),
                  (5, 64, 153, 207, [2, 3]), (3, 100, 207, 261, [2]), (1, 300, 261, 315, [2])]),
    "ssdlite": (320, [(20, 16, 64, 112, [2, 3]), (10, 32, 112, 160, [2, 3]),
                      (5, 64, 160, 208, [2, 3]), (3, 320 / 3, 208, 256, [2, 3]),
                      (2, 160, 256, 304, [2, 3]), (1, 320, 304, 320, [2, 3])]),
}  # fmt: skip


def default_boxes(name):
    """Section 2.2 of Liu et al. 2016, in pixels; no default box is larger than the image."""
    size, maps = SSDS[name]
    for cells, step, square, following, ratios in maps:
        for row in range(cells):
            for column in range(cells):
                sizes = [(square, square), (math.sqrt(square * following),) * 2]
                for a in ratios:
                    w, h = square * math.sqrt(a), square / math.sqrt(a)
                    sizes += [(w, h), (h, w)]
                for w, h in sizes:
                    yield (column + 0.5) * step, (row + 0.5) * step, min(w, size), min(h, size)


def size_of(name):
    return (SSDS[name][0],) * 2 if name in SSDS else SIZE


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def outputs_of(name, rng, images=2, classes=CLASSES):
    def scores(*shape):
        return rng.random(shape).astype(np.float32) ** 3

    if name == "nanodet":
        maps = [scores(images, h * w, CLASSES) for h, w in CELLS]
        return maps + [rng.normal(size=(images, h * w, 32)).astype(np.float32) for h, w in CELLS]
    if name in SSDS:
        count = sum(1 for _ in default_boxes(name))
        offsets = 3 * rng.normal(size=(images, count, 4)).astype(np.float32)
        offsets[:, ::7, 2:] += 30  # beyond the limit of sizes
        offsets[:, ::21, 0] = 800  # and so far away that the limit keeps them outside
        logits = rng.normal(size=(images, count, 1 + classes)).astype(np.float32)
        logits[:, :, 0] += 20 * (rng.random((images, count)) > 150 / count)  # background
        return [offsets, logits]
    count = 3 * TOTAL if name in ("yolov5", "yolov7") else TOTAL
    boxes = rng.normal(size=(images, count, 4)).astype(np.float32)
    if name != "yolox":
        boxes = np.abs(boxes) * 20
    rest = scores(images, count, classes + (name != "yolov8"))
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
    if name in SSDS:
        size = SSDS[name][0]
        for box, offset, logits in zip(
            default_boxes(name), outputs[0][image].tolist(), outputs[1][image].tolist(), strict=True
        ):
            powers = [math.exp(v) for v in logits]
            x, y = (box[i] + offset[i] / 10 * box[i + 2] for i in (0, 1))
            w, h = (box[i] * min(math.exp(offset[i] / 5), 62.5) for i in (2, 3))
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            yield (
                [min(max(one, 0), size) for one in corners],
                np.float32([one / sum(powers) for one in powers[1:]]),
            )
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
        if name == "yolov7" and len(row) == 6:
            scores = row[4:5]
        yield [x - w / 2, y - h / 2, x + w / 2, y + h / 2], scores


def overlap(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return w * h / max(sum(area) - w * h, 1e-9)


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


def check(name, rng, classes=CLASSES):
    outputs = outputs_of(name, rng, classes=classes)
    decoder, size = DECODERS[name], size_of(name)
    found = Detector(decoder=decoder)(outputs, {"x": np.zeros((2, 3, *size), np.float32)}, None)

    assert len(found) == 2
    for image, one in enumerate(found):
        expected = kept(boxes_of(name, outputs, image), decoder.selection)
        assert 20 < len(one.scores) == len(expected)
        assert one.classes.tolist() == [c for _, c, _ in expected]
        np.testing.assert_allclose(one.scores, [s for s, _, _ in expected], rtol=1e-6)
        np.testing.assert_allclose(one.corners, [c for _, _, c in expected], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_detections_are_those_of_the_definition(name, rng):
    check(name, rng)


@pytest.mark.parametrize("name", ["yolov5", "yolov7", "ssdlite"])
def test_detections_of_one_class(name, rng):
    check(name, rng, classes=1)


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_chosen_by_the_shapes(name, rng):
    found = decoder_of(outputs_of(name, rng), size_of(name))
    assert found is DECODERS["yolov5" if name == "yolov7" else name]  # the same shapes


def test_ssd_has_the_categories_of_coco(rng):
    """The 80 categories of COCO have the ids 1 to 90 with gaps."""
    ids = [*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70,
           *range(72, 83), *range(84, 91)]  # fmt: skip
    for labels, categories in ((91, ids), (90, range(1, 90))):
        offsets, logits = np.zeros((1, 3234, 4)), np.zeros((1, 3234, labels), np.float32)
        logits[0, np.arange(labels), np.arange(labels)] = 9
        (found,) = DECODERS["ssdlite"].candidates([offsets, logits], (320, 320))
        assert found.scores[list(categories)].argmax(axis=1).tolist() == [*range(len(categories))]
        assert found.scores.shape == (3234, len(categories))


def test_ssd_takes_the_surest_boxes_of_each_class(rng):
    network = replace(ssd.SSDLITE320, most_of_class=5)
    outputs = outputs_of("ssdlite", rng, images=1)
    (found,) = network.candidates(outputs, (320, 320))
    powers = np.exp(outputs[1][0].astype(np.float64))
    scores = (powers / powers.sum(axis=1, keepdims=True))[:, 1:]
    for label in range(CLASSES):
        best = sorted(range(3234), key=lambda i: -scores[i, label])[:5]
        assert sorted(np.flatnonzero(found.scores[:, label])) == sorted(best)
        np.testing.assert_allclose(found.scores[best, label], scores[best, label], rtol=1e-6)


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
