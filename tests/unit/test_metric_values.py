"""What each built-in metric returns, against another implementation of its definition."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from onnxqat.data import Preprocessing
from onnxqat.errors import DataError
from onnxqat.evaluation.metrics import MetricBatch, read_metric
from onnxqat.outputs import Output, Scores


def run(name, outputs, *, size=3, labels=None, truth=None, reference=None, meanings=()):
    """Return the figures of arrays, given in batches."""
    count = len(next(iter(outputs.values())))

    def cut(arrays, i):
        return {name: values[i : i + size] for name, values in arrays.items()}

    starts = range(0, count, size)
    values = (cut(outputs, i) for i in starts)
    batches = (
        MetricBatch(
            inputs={},
            labels=None if labels is None else labels[i : i + size],
            indices=np.arange(count)[i : i + size],
            truth=cut(truth or {}, i),
            reference=None if reference is None else cut(reference, i),
            outputs={output.name: output for output in meanings},
        )
        for i in starts
    )
    return read_metric(name).function(values, batches)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_top1_and_top5(rng):
    scores, labels = rng.normal(size=(50, 12)).astype(np.float32), rng.integers(0, 12, 50)
    ranks = [sorted(range(12), key=lambda c: -row[c]).index(x) for row, x in zip(scores, labels)]  # noqa: B905

    assert run("top1", {"y": scores}, labels=labels) == {"top1": np.mean(np.array(ranks) == 0)}
    assert run("top5", {"y": scores}, labels=labels) == {"top5": np.mean(np.array(ranks) < 5)}
    with pytest.raises(DataError, match="fewer than ten classes"):
        run("top5", {"y": scores[:, :9]}, labels=labels % 9)
    with pytest.raises(DataError, match="the data have no labels"):
        run("top1", {"y": scores})


def test_agreement_is_the_mean_over_outputs_of_classes(rng):
    a, b = rng.normal(size=(2, 20, 4)).astype(np.float32)
    c, d = rng.integers(0, 3, (2, 20, 5))
    meanings = [
        Output(name="a", learned=True, shape=("n", 4), scores=Scores(kind="logits", axis=1)),
        Output(name="c", learned=False, shape=("n", 5), scores=None),
    ]
    found = run("agreement", {"a": a, "c": c}, reference={"a": b, "c": d}, meanings=meanings)
    first, second = np.mean(a.argmax(1) == b.argmax(1)), np.mean(c == d)

    assert found == pytest.approx(
        {"agreement": (first + second) / 2, "agreement:a": first, "agreement:c": second}
    )


def test_cosine_and_sqnr_of_each_output(rng):
    a, c = rng.normal(size=(10, 7)).astype(np.float32), rng.normal(size=(10, 2, 3))
    b, d = a + rng.normal(size=a.shape) / 100, c + rng.normal(size=c.shape) / 10
    outputs, reference = {"a": b, "c": d}, {"a": a, "c": c}

    def cosine(x, y):
        return np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)

    def sqnr(x, y):
        return 20 * np.log10(np.linalg.norm(x) / np.linalg.norm(x - y))

    for name, figure in (("cosine", cosine), ("sqnr", sqnr)):
        first, second = figure(a, b), figure(c, d)
        assert first > second
        assert run(name, outputs, reference=reference) == pytest.approx(
            {name: second, f"{name}:a": first, f"{name}:c": second}, rel=1e-6
        )
    assert run("sqnr", {"a": a}, reference={"a": a}) == {"sqnr": math.inf}
    assert run("cosine", {"a": a}, reference={"a": a}) == {"cosine": 1.0}
    with pytest.raises(DataError, match="its size depends on the data"):
        run("cosine", {"a": a[:, :5]}, reference={"a": a})


def jaccard(found, mask, classes):
    """The mean over classes of the intersection over union of sets of pixels."""
    kept = [(i, f, m) for i, (f, m) in enumerate(zip(found.flat, mask.flat, strict=True))
            if 0 <= m < 255]  # fmt: skip
    shares = []
    for c in range(classes):
        ours, true = {i for i, f, _ in kept if f == c}, {i for i, _, m in kept if m == c}
        if ours | true:
            shares.append(len(ours & true) / len(ours | true))
    return np.mean(shares)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_mean_iou_over_all_pixels(rng, dtype):
    scores = rng.normal(size=(7, 5, 4, 6)).astype(np.float32)
    scores[:, 4] -= 100  # a class that is nowhere
    mask = rng.choice([0, 1, 2, 255], size=(7, 4, 6)).astype(dtype)
    if dtype == np.int64:
        mask[0, 0] = -1
    expected = jaccard(scores.argmax(1), mask, 5)

    assert run("mean-iou", {"y": scores}, truth={"y": mask})["mean_iou"] == pytest.approx(expected)
    classes = scores.argmax(1)
    for found in (classes, classes[:, None]):
        result = run("mean-iou", {"y": found.astype(np.int32)}, truth={"y": mask[:, None]})
        assert result["mean_iou"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "mask", "said"),
    [
        ((3, 4, 2, 2), np.zeros((3, 2, 1), int), "has classes of shape"),
        ((3, 4, 2, 2), np.zeros((3, 2, 2)), "Store integer masks"),
        ((3, 4, 2, 2), np.full((3, 2, 2), 4), "has the class 4, but the output has 4 classes"),
        ((3, 4, 2, 2), np.full((3, 2, 2), 255), "all pixels of the masks are ignored"),
        ((3, 4), np.zeros((3, 4), int), "has the shape"),
    ],
)
def test_masks_that_do_not_fit(scores, mask, said):
    with pytest.raises(DataError, match=said):
        run("mean-iou", {"y": np.zeros(scores, np.float32)}, truth={"y": mask})


def test_psnr_is_the_mean_over_images(rng):
    truth = rng.random((5, 3, 4, 4)).astype(np.float32)
    y = truth + rng.normal(size=truth.shape).astype(np.float32) / 10
    each = [10 * math.log10(1 / np.mean((np.clip(a, 0, 1) - b) ** 2)) for a, b in zip(y, truth)]  # noqa: B905

    assert run("psnr", {"y": y}, truth={"y": truth})["psnr"] == pytest.approx(np.mean(each))
    pixels = (truth * 255).astype(np.uint8)
    found = run("psnr", {"y": pixels.astype(np.float32) + 2}, truth={"y": pixels})
    each = [10 * math.log10(255**2 / np.mean((np.minimum(x + 2.0, 255) - x) ** 2)) for x in pixels]
    assert found["psnr"] == pytest.approx(np.mean(each))
    assert run("psnr", {"y": truth}, truth={"y": truth}) == {"psnr": math.inf}


@pytest.mark.parametrize(
    ("truth", "said"),
    [(np.full((2, 3), 2.0), "range from 2 to 2"), (np.zeros((2, 4)), "Store them in the output's")],
)
def test_images_that_do_not_fit(truth, said):
    with pytest.raises(DataError, match=said):
        run("psnr", {"y": np.zeros((2, 3), np.float32)}, truth={"y": truth})


# --- SQuAD's own definitions, of texts whose words all differ ---------------------------------


def squad_f1(prediction, truth):
    """As compute_f1 of SQuAD's evaluate-v2.0.py, for words without articles and punctuation."""
    ours, theirs = prediction.split(), truth.split()
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def test_exact_match_and_f1_are_those_of_squad(rng):
    words = [f"w{i}" for i in range(9)]
    start, end = rng.normal(size=(2, 200, 9)).astype(np.float32)
    first = rng.integers(0, 9, (200, 2))
    last = np.minimum(first + rng.integers(0, 4, (200, 2)), 8)
    first[::3, 1] = last[::3, 1] = -1  # one answer only
    exact, f1 = [], []
    for i in range(200):
        _, a, b = max((start[i, a] + end[i, b], a, b) for a in range(9) for b in range(a, 9))
        said = " ".join(words[a : b + 1])
        answers = [
            " ".join(words[x : y + 1]) for x, y in zip(first[i], last[i], strict=True) if x >= 0
        ]
        exact.append(max(said == answer for answer in answers))
        f1.append(max(squad_f1(said, answer) for answer in answers))
    truth = {"s": first, "e": last}
    found = run("f1", {"s": start, "e": end}, truth=truth, size=64)

    assert list(found) == ["f1", "exact_match"]
    assert found == pytest.approx({"f1": np.mean(f1), "exact_match": np.mean(exact)})
    assert 0 < found["exact_match"] < found["f1"] < 1
    alone = {"s": first[:, 0], "e": last[:, 0]}
    assert run("exact-match", {"s": start, "e": end}, truth=alone)["exact_match"] == np.mean(
        [
            max((start[i, a] + end[i, b], a, b) for a in range(9) for b in range(a, 9))[1:]
            == (first[i, 0], last[i, 0])
            for i in range(200)
        ]
    )


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        ([3, 1], [2, 1], "the first not after the last"),
        ([0, -1], [1, -1], "at least one pair"),
        ([0, 1], [1, 4], "from 0 to 3"),
        ([0.0, 1.0], [1.0, 1.0], "Store integers"),
    ],
)
def test_positions_that_do_not_fit(first, last, said):
    outputs = {name: np.zeros((2, 4), np.float32) for name in ("s", "e")}
    with pytest.raises(DataError, match=said):
        run("f1", outputs, truth={"s": np.array(first), "e": np.array(last)})
    with pytest.raises(DataError, match="needs two outputs"):
        run("f1", outputs, truth={"s": np.array([1, 2])})


# --- boxes ------------------------------------------------------------------------------------


def average_precision(found, wanted, overlap):
    """COCO's area under the curve of one class: 101 points of recall, greedy matching."""
    hits, total = [], sum(len(boxes) for boxes in wanted)
    taken = [set() for _ in wanted]
    for image, box in ((i, b) for _, i, b in sorted(found, key=lambda one: -one[0])):
        shares = [(iou(box, w), j) for j, w in enumerate(wanted[image]) if j not in taken[image]]
        best, j = max(shares, default=(0, None))
        hits.append(best >= overlap)
        if best >= overlap:
            taken[image].add(j)
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    above = [precision[recall >= r - 1e-12] for r in np.linspace(0, 1, 101)]
    return np.mean([part.max(initial=0) for part in above])


def iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def test_map_is_coco_s(rng):
    """Boxes of yolov8's form, near the true ones; against the definition, class by class."""
    pytest.importorskip("pycocotools")
    height, width, cells = 64, 96, 96 + 24 + 6
    sizes = np.array([[128, 192], [64, 96], [200, 96], [90, 96]])
    truth = np.full((4, 5, 6), -1.0)
    outputs = np.zeros((4, 4 + 2, cells), np.float32)
    for i, count in enumerate((3, 5, 0, 2)):
        for j in range(count):
            box = [*rng.uniform(0.3, 0.7, 2), *rng.uniform(0.2, 0.5, 2)]
            truth[i, j] = [rng.integers(2), *box, 0]
    scale = np.array([width, height] * 2)
    for i in range(4):
        for k in range(30):
            source = truth[i, k % 5] if truth[i, k % 5, 0] >= 0 else np.full(6, 0.5)
            outputs[i, :4, k] = (source[1:5] * rng.uniform(0.85, 1.18, 4)) * scale
            outputs[i, 4 + rng.integers(2), k] = rng.random()
    metric = read_metric("map")
    metric.detector.preprocessing = Preprocessing(resize_dims=(height, width))
    batch = MetricBatch(
        inputs={"x": np.zeros((4, 3, height, width), np.float32)},
        labels=None,
        indices=np.arange(4),
        arrays={"boxes": truth, "size": sizes},
        detector=metric.detector,
    )
    found = metric.function(iter([{"y": outputs}]), iter([batch]))
    detections = batch.detections({"y": outputs})
    wanted = []
    for rows, (h, w) in zip(truth, sizes, strict=True):
        wanted.append([])
        for label, x, y, bw, bh, _ in rows[rows[:, 0] >= 0]:
            corners = [(x - bw / 2) * w, (y - bh / 2) * h, (x + bw / 2) * w, (y + bh / 2) * h]
            wanted[-1].append((int(label), corners))
    table = {}
    for overlap in np.linspace(0.5, 0.95, 10):
        each = []
        for label in (0, 1):
            ours = [(float(s), i, c.tolist()) for i, one in enumerate(detections)
                    for c, s, k in zip(*one, strict=True) if k == label]  # fmt: skip
            true = [[corners for k, corners in rows if k == label] for rows in wanted]
            each.append(average_precision(ours, true, overlap))
        table[round(float(overlap), 2)] = np.mean(each)

    assert found["map50"] == pytest.approx(table[0.5], abs=1e-9)
    assert found["map75"] == pytest.approx(table[0.75], abs=1e-9)
    assert found["map"] == pytest.approx(np.mean(list(table.values())), abs=1e-9)
    assert 0.05 < found["map"] < found["map50"] < 0.95


def test_map_without_boxes_or_without_detections():
    pytest.importorskip("pycocotools")
    metric = read_metric("map")

    def of(truth):
        batch = MetricBatch(
            inputs={"x": np.zeros((1, 3, 64, 96), np.float32)},
            labels=None,
            indices=np.arange(1),
            arrays={"boxes": truth},
        )
        outputs = {"y": np.zeros((1, 6, 126), np.float32)}
        return metric.function(iter([outputs]), iter([batch]))

    assert of(np.array([[[0, 0.5, 0.5, 0.1, 0.1]]])) == {"map": 0, "map50": 0, "map75": 0}
    with pytest.raises(DataError, match="no image has a box"):
        of(np.array([[[-1, 0.5, 0.5, 0.1, 0.1]]]))
    with pytest.raises(DataError, match="array 'boxes' has samples of shape"):
        of(np.zeros((1, 4)))
