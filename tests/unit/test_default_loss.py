"""The loss of a run that names none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import TrainingError
from onnxqat.model import to_proto
from onnxqat.outputs import Output, Scores
from onnxqat.train import Config, finetune
from onnxqat.train.losses import default_loss, variances
from tests.networks import detector, quantized, samples
from tests.oracles import run_ort

CLASSES = Output(name="y", learned=True, shape=("N", 5), scores=Scores(kind="logits", axis=1))
BOXES = Output(name="boxes", learned=True, shape=("N", 9, 320), scores=None)
INDICES = Output(name="kept", learned=False, shape=("K", 3), scores=None)


def chosen(*outputs, labelled=False, **variance):
    loss, parts = default_loss(outputs, labelled=labelled, measured=lambda _: variance)
    return [(t.kind, t.output, t.weight) for t in loss.terms], parts


def test_each_output_has_the_kind_of_its_meaning():
    terms, parts = chosen(BOXES, CLASSES, INDICES, boxes=400.0)

    assert terms == [("mse", "boxes", 0.0025), ("kl", "y", 1.0)]
    assert [p.kind for p in parts] == ["mse", "kl", None]
    assert str(parts[2]).startswith("'kept' left out: it holds no float32")
    assert str(parts[1]) == "kl of 'y': 5 class scores along axis 1 of its shape"


def test_labels_are_of_the_first_output():
    assert chosen(CLASSES, BOXES, labelled=True, boxes=4.0)[0] == [
        ("cross-entropy", "y", 1.0),
        ("kl", "y", 1.0),
        ("mse", "boxes", 0.25),
    ]


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
    with pytest.raises(TrainingError, match="--label-smoothing is of cross-entropy"):
        default_loss([CLASSES], labelled=False, measured=lambda _: {}, label_smoothing=0.1)


def test_variances_over_batches_are_those_of_all_values():
    """Against numpy, far from zero, where a difference of two sums would lose it."""
    values = (1e4 + np.random.default_rng(0).normal(size=(50, 3))).astype(np.float32)
    batches = [{"a": values[i : i + 7], "b": values[:0]} for i in range(0, 50, 7)]

    assert variances(batches) == {"a": pytest.approx(np.var(values.astype(np.float64)), rel=1e-12)}


# --- a detector -----------------------------------------------------------------------------------


def with_boxes() -> onnx.ModelProto:
    """A detector whose boxes are in pixels, flattened to rows of positions."""
    model = detector()
    pixels = np.array([1, 32, 32, 32, 32], np.float32).reshape(1, 5, 1, 1)
    constants = {"pixels": pixels, "sizes": np.array([0, 5, -1], np.int64)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    model.graph.node[-1].output[0] = "grid"
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["grid", "pixels"], ["scaled"], name="n_scaled"),
            helper.make_node("Reshape", ["scaled", "sizes"], ["output"], name="n_rows"),
        ]
    )
    del model.graph.output[:]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 5, 16])
    model.graph.output.append(output)
    return model


def box_error(network, model) -> float:
    """Return the mean distance of boxes from the float network's, in pixels, on unseen samples."""
    x = {"input": samples(network, 200, seed=6)}
    ours, theirs = run_ort(to_proto(model), x)[0], run_ort(network, x)[0]
    return float(np.abs(ours - theirs)[:, 1:].mean())


def test_a_detector_comes_nearer_with_nothing_set(tmp_path):
    network, path = with_boxes(), tmp_path / "data.npz"
    start = quantized(network, overrides=("weight.bits=4",))[1]
    np.savez(path, input=samples(network, 480, seed=5))
    spec = InputSpec(name="input", shape=("N", 3, 16, 16), dtype="float32")
    told: list[str] = []
    with open_data(path, [spec]) as data:
        result = finetune(
            start, data, config=Config(epochs=12, batch_size=16, threads=1), say=told.append
        )
    before, after = (box_error(network, m) for m in (start, result.model))
    (figures,) = result.after.outputs

    assert after < 0.8 * before  # kl, a softmax over positions, gains nothing
    assert [p.kind for p in result.parts] == ["mse"]
    assert result.selection.figure == "loss"
    assert "mse of 'output': values, not class scores" in told[0]
    assert figures.agreement is None  # not over positions
    assert figures.relative_error < result.before.outputs[0].relative_error
