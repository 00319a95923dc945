"""The loss of a run that names none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import TrainingError
from onnxqat.outputs import Joined, Output, Scores
from onnxqat.train import Config, finetune
from onnxqat.train.losses import default_loss, pieces, variances
from tests.losses import loss_and_gradients
from tests.networks import detector, quantized, samples
from tests.oracles import run_ort

CLASSES = Output(name="y", learned=True, shape=("N", 5), scores=Scores(kind="logits", axis=1))
BOXES = Output(name="boxes", learned=True, shape=("N", 9, 320), scores=None)
INDICES = Output(name="kept", learned=False, shape=("K", 3), scores=None)


def chosen(*outputs, labelled=False, **variance):
    spreads = {(name, None, 0): value for name, value in variance.items()}
    loss, parts = default_loss(outputs, labelled=labelled, measured=lambda _: spreads)
    return [(t.kind, t.output, t.weight) for t in loss.terms], parts


def test_each_output_has_the_kind_of_its_meaning():
    terms, parts = chosen(BOXES, CLASSES, INDICES, boxes=400.0)

    assert terms == [("mse", "boxes", 0.00125), ("kl", "y", 1.0)]
    assert [p.kind for p in parts] == ["mse", "kl", None]
    assert str(parts[2]).startswith("'kept' left out: it is not float32")
    assert str(parts[1]) == (
        "kl of 'y': 5 class scores along axis 1 of its shape (if not, pass --loss mse:y)"
    )


def test_labels_are_of_the_first_output():
    assert chosen(CLASSES, BOXES, labelled=True, boxes=4.0)[0] == [
        ("cross-entropy", "y", 1.0),
        ("kl", "y", 1.0),
        ("mse", "boxes", 0.125),
    ]


@pytest.mark.parametrize(("labels", "kinds"), [(2, ["kl"]), (3, ["cross-entropy", "kl"])])
def test_labels_of_few_classes_are_left_out(labels, kinds):
    loss, parts = default_loss([CLASSES], labelled=True, labels=labels, measured=lambda _: {})

    assert [term.kind for term in loss.terms] == kinds
    if labels == 2:
        assert str(parts[0]).startswith("'y' left out: the labels cover only 2 of its 5 classes")


def test_different_labels_are_counted():
    inputs = [InputSpec(name="x", shape=("N", 2), dtype="float32")]
    x = np.zeros((6, 2), np.float32)
    with open_data({"x": x, "label": np.array([0, 2, 2, 7, 0, 1])}, inputs) as data:
        assert data.label_count() == 4
        assert data.subset([1, 2]).label_count() == 1
    with open_data({"x": x}, inputs) as data:
        assert data.label_count() is None


def test_a_constant_output_says_nothing():
    terms, parts = chosen(BOXES, CLASSES, boxes=0.0)

    assert terms == [("kl", "y", 1.0)]
    assert "variance there is 0" in parts[0].reason


@pytest.mark.parametrize("outputs", [(INDICES,), (BOXES,)], ids=["integers", "constant"])
def test_nothing_to_learn_from_is_said_with_the_next_step(outputs):
    with pytest.raises(TrainingError, match=r"Nothing to learn from.*--loss mse:tensor/NAME"):
        chosen(*outputs, boxes=0.0)


def test_the_next_step_names_the_tensor_before_an_index():
    axis = Scores(kind="logits", axis=1)
    best = Output(
        name="best", learned=False, shape=("N",), scores=None, source="a+b", source_scores=axis
    )

    with pytest.raises(TrainingError, match=r'as in --loss kl:"tensor/a\+b"\.'):
        chosen(best)


def test_options_of_cross_entropy_need_labels():
    with pytest.raises(TrainingError, match="--label-smoothing needs cross-entropy"):
        default_loss([CLASSES], labelled=False, measured=lambda _: {}, label_smoothing=0.1)


def test_variances_over_batches_are_those_of_all_values():
    """Against numpy, far from zero, where a difference of two sums would lose it."""
    values = (1e4 + np.random.default_rng(0).normal(size=(50, 3))).astype(np.float32)
    a, b = ("a", None, 0), ("b", None, 0)
    batches = [{a: values[i : i + 7], b: values[:0]} for i in range(0, 50, 7)]

    assert variances(batches) == {a: pytest.approx(np.var(values.astype(np.float64)), rel=1e-12)}


# --- parts of an output -------------------------------------------------------------------------

JOINED = Joined(axis=1, sizes=(4, 5))


@pytest.mark.parametrize("size", [400.0, 4.0], ids=["pixels", "alike"])
def test_boxes_and_scores_in_one_output_weigh_alike(size):
    """The sum of two means of squares, each divided by its part's, where variances differ."""
    rng = np.random.default_rng(1)
    taught = rng.normal(size=(6, 9, 7)).astype(np.float32)
    taught[:, :4] *= size
    other = taught + rng.normal(size=taught.shape).astype(np.float32)
    output = replace(BOXES, shape=("N", 9, 7), joined=(JOINED,))
    spreads = variances([pieces(output, taught)])
    loss, parts = default_loss([output], labelled=False, measured=lambda _: spreads)
    square, boxes, scores = np.square(other - taught), taught[:, :4], taught[:, 4:]
    expected = {
        400.0: square[:, :4].mean() / 2 / boxes.var() + square[:, 4:].mean() / 2 / scores.var(),
        4.0: square.mean() / 2 / taught.var(),
    }

    assert (parts[0].balance is None) == (size == 4.0)
    value, gradients = loss_and_gradients(loss, {"boxes": other}, teacher={"boxes": taught})
    assert value == pytest.approx(expected[size], rel=0.01)  # weights have three digits
    if size == 400.0:
        slope = (other - taught)[:, 4:] / (6 * 5 * 7) / scores.var()
        np.testing.assert_allclose(gradients["boxes"][:, 4:], slope, rtol=0.01)


# --- a detector -----------------------------------------------------------------------------------


def with_boxes() -> onnx.ModelProto:
    """A detector as exporters write it: boxes in pixels and scores, in rows of positions."""
    model = detector()
    constants = {
        "pixels": np.float32(32),
        "sizes": np.array([0, 5, -1], np.int64),
        "split": np.array([1, 4], np.int64),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    model.graph.node[-1].output[0] = "grid"
    nodes = [
        ("Split", ["grid", "split"], ["logits", "offsets"], {"axis": 1}),
        ("Sigmoid", ["logits"], ["scores"], {}),
        ("Mul", ["offsets", "pixels"], ["boxes"], {}),
        ("Concat", ["scores", "boxes"], ["joined"], {"axis": 1}),
        ("Reshape", ["joined", "sizes"], ["output"], {}),
    ]
    for i, (op, inputs, results, attributes) in enumerate(nodes):
        node = helper.make_node(op, inputs, results, name=f"n_end{i}", **attributes)
        model.graph.node.append(node)
    del model.graph.output[:]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 5, 16])
    model.graph.output.append(output)
    return model


def distances(network, model) -> np.ndarray:
    """Return the mean distance of scores and of boxes from the float network's, unseen samples."""
    x = {"input": samples(network, 200, seed=6)}
    away = np.abs(run_ort(model.to_proto(), x)[0] - run_ort(network, x)[0])
    return np.array([away[:, :1].mean(), away[:, 1:].mean()])


def test_a_detector_comes_nearer_with_nothing_set(tmp_path):
    network, path = with_boxes(), tmp_path / "data.npz"
    ends = "name:n_end.*.quantize=false"  # one scale for both would leave nothing of the scores
    start = quantized(network, overrides=("weight.bits=4", ends))[1]
    np.savez(path, input=samples(network, 480, seed=5))
    spec = InputSpec(name="input", shape=("N", 3, 16, 16), dtype="float32")
    told: list[str] = []
    with open_data(path, [spec]) as data:
        result = finetune(
            start, data, config=Config(epochs=12, batch_size=16, threads=1), say=told.append
        )
    before, after = (distances(network, m) for m in (start, result.model))
    (figures,) = result.after.outputs

    assert (after < 0.85 * before).all()  # kl, a softmax over positions, gains nothing
    assert [(p.kind, p.balance.sizes) for p in result.parts] == [("mse", (1, 4))]
    assert result.selection.figure == "loss"
    assert "mse of 'output': values, not class scores" in told[0]
    assert figures.agreement is None  # not over positions
    assert figures.relative_error < result.before.outputs[0].relative_error
