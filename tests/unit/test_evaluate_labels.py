"""Labels that a classifier hardly ever meets: told from its own, by count and by confidence."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat import verbs
from onnxqat.data import open_data
from onnxqat.errors import TrainingError
from onnxqat.evaluation import evaluate
from onnxqat.evaluation.labels import Hits, doubt
from onnxqat.model import from_proto
from onnxqat.quantized import load_model
from onnxqat.train import Config, finetune
from onnxqat.verbs import Listener
from tests.digits import INPUT, MODELS, PIXELS, calibrated_lenet, training_digits
from tests.networks import convnet, samples


def reference_bound(hits, count):
    """Solve |p - hits / count| = z sqrt(p (1 - p) / count) for its larger p."""
    z2, p = 1.959963984540054**2, hits / count
    roots = np.roots([1 + z2 / count, -2 * p - z2 / count, p * p])
    return float(max(roots.real))


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 20, 1000])
@pytest.mark.parametrize("count", [100, 700])
def test_an_accuracy_is_doubted_up_to_its_limit(classes, count):
    limit = {2: 0.6, 3: 1 / 3 + 0.1, 5: 0.3, 10: 0.2}.get(classes, 0.1)
    found = [doubt(hits / count, count, classes, None) is not None for hits in range(count + 1)]
    expected = [reference_bound(hits, count) < limit for hits in range(count + 1)]
    assert found == expected
    assert True in expected
    assert False in expected


def test_an_accuracy_is_doubted_up_to_a_quarter_of_the_confidence():
    hits = np.arange(401)
    found = [doubt(k / 400, 400, 1000, 0.99) is not None for k in hits]
    assert found == [reference_bound(k, 400) < 0.99 / 4 for k in hits]
    assert doubt(0.15, 400, 1000, 0.6) is None
    assert doubt(0.0, 99, 10, 1.0) is None  # too few


@pytest.mark.parametrize("kind", ["logits", "log-probabilities", "probabilities"])
def test_confidence_is_that_of_numpy_whatever_the_outputs_are(kind):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(50, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    hits = Hits()
    scores = {"logits": logits + 5, "log-probabilities": np.log(p), "probabilities": p}[kind]
    labels = rng.integers(0, 7, 50)
    hits.add(scores[:20], labels[:20])
    hits.add(scores[20:], labels[20:])
    assert hits.confidence == pytest.approx(p.max(1).mean(), rel=1e-12)
    assert hits.fractions == {"top1": np.mean(logits.argmax(1) == labels)}


def test_scores_that_are_no_numbers_have_no_confidence():
    hits = Hits()
    assert hits.confidence is None
    hits.add(np.full((3, 4), np.nan), np.zeros(3, np.int64))
    assert hits.confidence is None
    infinite = Hits()
    infinite.add(np.full((3, 4), np.inf), np.zeros(3, np.int64))
    assert infinite.confidence is None


@pytest.fixture(scope="module")
def wrong_labels(tmp_path_factory):
    """Digits whose label is one too large."""
    path = tmp_path_factory.mktemp("labels") / "wrong.npz"
    with np.load(MODELS / "digits-train.npz") as arrays:
        images, labels = arrays["images"][:1200], arrays["label"][:1200]
    np.savez(path, images=images, label=(labels + 1) % 10)
    with open_data(path, [INPUT], preprocessing=PIXELS) as data:
        yield data


def test_evaluation_doubts_wrong_labels_and_wrong_pixels(wrong_labels):
    floats = load_model(MODELS / "lenet5.onnx")
    with training_digits(200) as data:
        assert evaluate(floats, data.batches(100)).doubt is None
        dark = ({n: v * np.float32(1e-4) for n, v in b.inputs.items()} for b in data.batches(100))
        batches = zip(dark, data.batches(100), strict=True)
        found = evaluate(floats, (_Batch(inputs, b.labels) for inputs, b in batches))
    assert found.doubt is not None
    wrong = evaluate(floats, wrong_labels.batches(100), against=floats)
    assert wrong.doubt is not None
    assert f"right on {wrong.metrics['top1']:.2%} of 1200 labels" in wrong.doubt


class _Batch:
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels


def test_training_on_wrong_labels_stops_unless_it_is_forced(wrong_labels, caplog):
    caplog.set_level("INFO", "onnxqat.train.validation")
    with training_digits(200) as right:
        model = calibrated_lenet(right)
    settings = {"epochs": 1, "batch_size": 100, "threads": 1}
    steps = []
    with pytest.raises(TrainingError, match=r"right on .* of 120 labels .* --force-labels"):
        finetune(model, wrong_labels, config=Config(**settings), report=steps.append)
    assert steps == []
    result = finetune(model, wrong_labels, config=Config(**settings, force_labels=True))
    assert result.epochs == 1
    told = f"right on {100 * result.before.reference['top1']:.2f} % of 120 held-out labels"
    assert told in caplog.text


@pytest.mark.parametrize(
    ("array", "said"), [("other", "has no class labels"), ("boxes", "pass --metric map")]
)
def test_missing_figures_are_explained(array, said):
    told = []

    class Told(Listener):
        def note(self, text):
            told.append(text)

    data = {"input": samples(convnet(), 2), array: np.zeros((2, 1, 5), np.float32)}
    verbs.evaluate(from_proto(convnet()), data, mode="float", listener=Told())
    silent = len(told)
    verbs.evaluate(
        from_proto(convnet()), data, mode="float", against=from_proto(convnet()), listener=Told()
    )

    assert said in told[-1]
    assert len(told) == silent
