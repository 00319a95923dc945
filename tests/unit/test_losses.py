"""Losses against numpy, in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from onnxqat.errors import TrainingError
from onnxqat.train.losses import LABELS, add_loss, parse_loss, read_loss, teacher_input
from tests.oracles import run_ort

Shape = tuple[int, ...]


def network(name: str, shape: Shape, last: str = "Identity") -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(last, ["x"], [name])],
        "g",
        [value("x", TensorProto.FLOAT, shape)],
        [value(name, TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def softmax(x):
    e = np.exp(x.astype(np.float64))
    return e / e.sum(axis=-1, keepdims=True)


def loss_of(model, terms, x, teacher, labels=None):
    feeds = {"x": x}
    name = model.graph.output[0].name
    with_loss = add_loss(model, read_loss("+".join(terms)))
    if any(term != "cross-entropy" for term in terms):
        feeds[teacher_input(name)] = teacher
    if labels is not None:
        feeds[LABELS] = labels
    return float(run_ort(with_loss, feeds)[0])


# names that the loss uses for its own values must not be mistaken for the model's
@pytest.mark.parametrize("name", ["output", "p", "mean", "log_q", "~p"])
@pytest.mark.parametrize("shape", [(4, 5), (3, 6, 5)], ids=["classes", "positions"])
def test_kl_is_the_mean_over_positions(name, shape):
    rng = np.random.default_rng(0)
    x, teacher = rng.normal(size=(2, *shape)).astype(np.float32)
    p, q = softmax(teacher), softmax(x)
    expected = (p * (np.log(p) - np.log(q))).sum(axis=-1).mean()

    assert loss_of(network(name, shape), ["kl"], x, teacher) == pytest.approx(expected, rel=1e-5)


def test_sum_of_all_three():
    rng = np.random.default_rng(1)
    x, teacher = rng.normal(size=(2, 6, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1])
    p, q = softmax(teacher), softmax(x)
    expected = -np.log(q[np.arange(6), labels]).mean()
    expected += (p * (np.log(p) - np.log(q))).sum(axis=-1).mean()
    expected += np.square(x.astype(np.float64) - teacher).mean()
    actual = loss_of(network("y", (6, 4)), ["cross-entropy", "kl", "mse"], x, teacher, labels)

    assert actual == pytest.approx(expected, rel=1e-5)


def test_a_model_that_ends_in_softmax_is_not_softmaxed_twice():
    rng = np.random.default_rng(2)
    x, teacher = rng.normal(size=(2, 6, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1])
    q, p = softmax(x), softmax(teacher).astype(np.float32)  # the teacher ends in Softmax too
    expected = -np.log(q[np.arange(6), labels]).mean()
    expected += (p * (np.log(p) - np.log(q))).sum(axis=-1).mean()
    model = network("y", (6, 4), last="Softmax")

    assert loss_of(model, ["cross-entropy", "kl"], x, p, labels) == pytest.approx(
        expected, rel=1e-5
    )


HEADER = '<ir_version: 8, opset_import: ["" : 17]> '
LEVELS = "<float step = {0.125}, uint8 zero = {0}, uint8 low = {0}, uint8 high = {8}> "


def written(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER + text)


@pytest.mark.parametrize(
    "text",
    [
        "net (float[6, 4] x) => (float[6, 4] y) { y = Sigmoid(x) }",
        "net (float[6, 4] x) => (float[6, 4] y) { " + "a = Transpose <perm = [1, 0]> (x) "
        "b = Sigmoid(a)  y = Transpose <perm = [1, 0]> (b) }",
        "net (float[6, 4] x) => (float[6, 4] y) " + LEVELS + "{ a = Sigmoid(x) "
        "b = QuantizeLinear(a, step, zero)  c = Clip(b, low, high) "
        "d = DequantizeLinear(c, step, zero)  y = Identity(d) }",
    ],
    ids=["last", "moved", "quantized"],
)
def test_probabilities_of_a_sigmoid_are_each_of_one_class(text):
    """Mixed with doubt, so that what is rounded to 0 or 1 has a finite loss."""
    rng = np.random.default_rng(3)
    x = (4 * rng.normal(size=(6, 4))).astype(np.float32)
    teacher = rng.uniform(size=(6, 4)).astype(np.float32)
    teacher[0, :2] = 0, 1
    (output,) = run_ort(written(text), {"x": x})
    q, p = ((1 - 2 / 512) * np.float64(values) + 1 / 512 for values in (output, teacher))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))

    assert loss_of(written(text), ["kl"], x, teacher) == pytest.approx(
        each.sum(axis=-1).mean(), rel=1e-5
    )


def test_a_softmax_behind_a_pair_in_a_file_is_not_softmaxed_twice():
    rng = np.random.default_rng(4)
    x, teacher = rng.normal(size=(2, 6, 4)).astype(np.float32)
    model = written(
        "net (float[6, 4] x) => (float[6, 4] y) " + LEVELS + "{ a = Softmax <axis = -1> (x) "
        "b = QuantizeLinear(a, step, zero)  c = Clip(b, low, high) "
        "y = DequantizeLinear(c, step, zero) }"
    )
    (output,) = run_ort(model, {"x": x})
    q, p = np.maximum(np.float64(output), 1e-4), softmax(teacher).astype(np.float32)
    q /= q.sum(axis=-1, keepdims=True)
    expected = (p * (np.log(p) - np.log(q))).sum(axis=-1).mean()

    assert loss_of(model, ["kl"], x, p) == pytest.approx(expected, rel=1e-5)


def test_shapes_that_a_loss_cannot_read_are_refused():
    with pytest.raises(TrainingError, match="kl needs"):
        add_loss(network("y", (1, 3, 8, 8)), read_loss("kl"))
    with pytest.raises(TrainingError, match="cross-entropy needs"):
        add_loss(network("y", (5,)), read_loss("cross-entropy"))
    with pytest.raises(TrainingError, match="Unknown loss 'hinge'"):
        parse_loss("kl+hinge")
