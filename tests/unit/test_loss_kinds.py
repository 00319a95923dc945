"""Every kind of loss against numpy in float64: the value, and the gradient by differences."""

from __future__ import annotations

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.train.losses import parse_loss, read_loss
from tests.losses import check_loss, loss_and_gradients

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5)).astype(np.float32)
TAUGHT = RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([0, 4, 1, 2, 3, 1])
POSITIONS = RNG.normal(size=(3, 4, 5)).astype(np.float32)  # 4 classes at each of 5 positions
CLASSES = RNG.integers(0, 4, (3, 5))


def log_softmax(x, axis=-1):
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def cross_entropy(x, labels, *, smoothing=0.0, ignored=None):
    """As a sum over positions, one by one."""
    log_q = np.moveaxis(log_softmax(x, 1), 1, -1).reshape(-1, x.shape[1])
    terms = [
        -(1 - smoothing) * row[label] - smoothing * row.mean()
        for row, label in zip(log_q, labels.reshape(-1), strict=True)
        if label != ignored
    ]
    return float(np.mean(terms)) if terms else 0.0


def kl(x, t):
    p = np.exp(log_softmax(t.astype(np.float64)))
    return float((p * (log_softmax(t.astype(np.float64)) - log_softmax(x))).sum(-1).mean())


def smooth_l1(x, t):
    d = np.abs(x - t)
    return float(np.where(d < 1, d * d / 2, d - 0.5).mean())


def bce(x, t):
    q = 1 / (1 + np.exp(-x))
    return float(-(t * np.log(q) + (1 - t) * np.log(1 - q)).mean())


TEACHING = {
    "kl": kl,
    "mse": lambda x, t: float(np.square(x - t).mean()),
    "l1": lambda x, t: float(np.abs(x - t).mean()),
    "smooth-l1": smooth_l1,
}


@pytest.mark.parametrize("kind", TEACHING)
@pytest.mark.parametrize("opset", [13, 18, 21])
def test_kinds_that_compare_with_the_teacher(kind, opset):
    check_loss(
        read_loss(kind),
        lambda y: TEACHING[kind](y["y"], TAUGHT),
        {"y": LOGITS},
        teacher={"y": TAUGHT},
        opset=opset,
    )


def bernoulli_kl(x, t):
    q, p = (
        (1 - 2 / 512) / (1 + np.exp(-x)) + 1 / 512,
        (1 - 2 / 512) * t.astype(np.float64) + 1 / 512,
    )
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return float(each.sum(axis=-1).mean())


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)], ids=["classes", "positions"])
def test_kl_where_a_model_ends_in_sigmoid(shape):
    logits, taught = 3 * LOGITS.reshape(shape), 1 / (1 + np.exp(-3 * TAUGHT.reshape(shape)))
    check_loss(
        read_loss("kl"),
        lambda y: bernoulli_kl(y["y"], taught),
        {"y": logits},
        teacher={"y": taught},
        last="Sigmoid",
    )


@pytest.mark.parametrize("kind", TEACHING)
def test_an_array_takes_the_place_of_the_teacher(kind):
    other = 2 * RNG.normal(size=(6, 5))  # float64 in the file
    check_loss(
        read_loss(f"{kind}:y=wanted"),
        lambda y: TEACHING[kind](y["y"], other.astype(np.float32).astype(np.float64)),
        {"y": LOGITS},
        arrays={"wanted": other, "unread": np.zeros((6, 2))},
    )


def test_bce_is_right_at_zero_where_quantized_logits_often_are():
    logits = LOGITS.copy()
    logits[:2] = 0
    wanted = RNG.integers(0, 2, (6, 5))
    check_loss(
        read_loss("bce:y=wanted"), lambda y: bce(y["y"], wanted), {"y": logits},
        arrays={"wanted": wanted},
    )  # fmt: skip


def test_bce_of_large_logits_is_finite():
    logits = np.float32([[200.0, -200.0], [1000.0, -1000.0]])
    wanted = np.float32([[0, 0], [1, 1]])
    value, found = loss_and_gradients(
        read_loss("bce:y=wanted"), {"y": logits}, arrays={"wanted": wanted}
    )

    assert value == pytest.approx((200 + 0 + 0 + 1000) / 4)
    np.testing.assert_allclose(found["y"], [[0.25, 0], [0, -0.25]], atol=1e-7)


@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])
@pytest.mark.parametrize("ignored", [None, 1, -100])
@pytest.mark.parametrize(("logits", "labels"), [(LOGITS, LABELS), (POSITIONS, CLASSES)])
def test_cross_entropy(smoothing, ignored, logits, labels):
    labels = labels.copy()
    if ignored is not None:
        labels.reshape(-1)[::3] = ignored
    loss = read_loss("cross-entropy", label_smoothing=smoothing, ignore_index=ignored)
    check_loss(
        loss,
        lambda y: cross_entropy(y["y"], labels, smoothing=smoothing or 0.0, ignored=ignored),
        {"y": logits},
        labels=labels,
    )


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_a_batch_without_a_label_that_counts_teaches_nothing(smoothing):
    loss = read_loss("cross-entropy", label_smoothing=smoothing, ignore_index=7)
    value, found = loss_and_gradients(loss, {"y": LOGITS}, labels=np.full(6, 7))

    assert value == 0
    assert not found["y"].any()


def test_question_answering_has_two_outputs_with_two_arrays_of_labels():
    ends = {"start": LOGITS, "end": TAUGHT}
    starts, stops = LABELS, np.array([4, 4, 2, 7, 3, 1])  # 7 is beyond the text
    check_loss(
        read_loss("cross-entropy:start=starts+cross-entropy:end=stops", ignore_index=7),
        lambda y: cross_entropy(y["start"], starts) + cross_entropy(y["end"], stops, ignored=7),
        ends,
        arrays={"starts": starts.astype(np.int32), "stops": stops},
    )


def test_an_array_of_labels_is_of_the_first_output():
    check_loss(
        read_loss("cross-entropy=classes"),
        lambda y: cross_entropy(y["a"], LABELS),
        {"a": LOGITS, "b": TAUGHT},
        arrays={"classes": LABELS},
    )


def test_weights_outputs_and_tensors():
    maps = RNG.normal(size=(6, 2, 3)).astype(np.float32)
    teacher = {"a": TAUGHT, "b": maps[::-1].copy(), "tensor/h/b": 0.5 * maps}
    check_loss(
        read_loss("0.5*kl:a + mse + 1e1*l1:tensor/h/b"),
        lambda y: (
            0.5 * kl(y["a"], TAUGHT)
            + float(np.square(y["a"] - TAUGHT).mean())
            + float(np.square(y["b"] - maps[::-1]).mean())
            + 10 * float(np.abs(y["b"] - teacher["tensor/h/b"]).mean())
        ),
        {"a": LOGITS, "b": maps},
        teacher=teacher,
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kl", [("kl", 1, None, None)]),
        (" 0.5 * kl + cross-entropy ", [("kl", 0.5, None, None), ("cross-entropy", 1, None, None)]),
        ("1e+2*mse:out:0", [("mse", 100, "out:0", None)]),
        ('mse:"a+b"="x = y"+l1', [("mse", 1, "a+b", "x = y"), ("l1", 1, None, None)]),
        ("cross-entropy=ends", [("cross-entropy", 1, None, "ends")]),
        ("2*dir/my loss.onnx+kl", [("dir/my loss.onnx", 2, None, None), ("kl", 1, None, None)]),
        (r'"C:\a+b.onnx"', [(r"C:\a+b.onnx", 1, None, None)]),
        (".5*l1:tensor//a/b*c", [("l1", 0.5, "tensor//a/b*c", None)]),
    ],
)
def test_grammar(text, parts):
    read = [(term.kind, term.weight, term.output, term.array) for term in parse_loss(text)]

    assert read == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read '' at character 1"),
        ("kl+", "cannot read '' at character 4 of 'kl\\+'"),
        ("kl++mse", "cannot read '\\+mse' at character 4"),
        ("kl*2", r"cannot read 'kl\*2' at character 1"),
        ("kl:", "cannot read 'kl:' at character 1"),
        ("-1*kl", "Unknown loss|cannot read"),
        ("0*kl", "weight 0.0 at character 1 .* must be finite and above 0"),
        ("1e999*kl", "weight inf"),
        ("mse+smoth-l1", "Unknown loss 'smoth-l1' at character 5 .* The nearest: 'smooth-l1'"),
        ("kl+bce:y", "bce at character 4 .* Name it, as in bce:OUTPUT=ARRAY"),
        ("a.onnx:y", "'a.onnx' at character 1 .* is followed by an output or array"),
        ("kl+kl", "'kl' occurs twice"),
        ("x" * 5000, "5000 characters"),
    ],
)
def test_what_the_grammar_refuses(text, message):
    with pytest.raises(TrainingError, match=message):
        parse_loss(text)


def test_a_long_text_is_read_in_linear_time():
    with pytest.raises(TrainingError):
        parse_loss("a " * 2047 + "=")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl:logit", "no output 'logit'. The nearest: 'logits'.* tensors: .*'tensor/logits'"),
        ("kl:tensor/h", "no tensor 'h'.*'h/logits'"),
        ("mse:logits=want", "no array 'want'. The nearest: 'wanted'"),
        ("mse:logits=short", r"array 'short' has samples of shape \(4,\), but \(5,\) is needed"),
        ("cross-entropy=wanted", "'wanted' is float64, but int64 is needed"),
    ],
)
def test_what_a_loss_does_not_find(text, message):
    arrays = {"wanted": np.zeros((6, 5)), "short": np.zeros((6, 4))}
    with pytest.raises(TrainingError, match=message):
        loss_and_gradients(read_loss(text), {"logits": LOGITS}, arrays=arrays)


@pytest.mark.parametrize("option", ["label_smoothing", "ignore_index"])
def test_an_option_of_cross_entropy_without_it(option):
    with pytest.raises(TrainingError, match=f"--{option.replace('_', '-')} needs cross-entropy"):
        read_loss("kl", **{option: 0})


# --- where the graph says which axis the classes are ----------------------------------------------

IMAGES = RNG.normal(size=(2, 4, 3, 3)).astype(np.float32)  # 4 classes at 3 x 3 positions
TAUGHT_IMAGES = RNG.normal(size=(2, 4, 3, 3)).astype(np.float32)


def moved(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_kl_of_images_is_over_the_axis_of_the_softmax(last):
    """Logits are compared: the softmax of what a Softmax or LogSoftmax gives out is itself."""
    log_p = log_softmax(TAUGHT_IMAGES.astype(np.float64), 1)
    check_loss(
        read_loss("kl"),
        lambda y: kl(moved(y["y"]), moved(TAUGHT_IMAGES)),
        {"y": IMAGES},
        teacher={"y": (np.exp(log_p) if last == "Softmax" else log_p).astype(np.float32)},
        last=last,
        axis=1,
    )


def test_kl_of_a_sigmoid_takes_any_shape():
    taught = 1 / (1 + np.exp(-TAUGHT_IMAGES))
    check_loss(
        read_loss("kl"),
        lambda y: bernoulli_kl(moved(y["y"]), moved(taught)),
        {"y": IMAGES},
        teacher={"y": taught},
        last="Sigmoid",
    )
