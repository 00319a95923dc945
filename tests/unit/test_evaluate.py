from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqat.calibration import placeholder_params
from onnxqat.deploy import deployed_model
from onnxqat.errors import DataError, ModelError, PlanError
from onnxqat.evaluation import check_interface, evaluate
from onnxqat.evaluation.run import model_session
from onnxqat.formats import EXPORTS
from onnxqat.model import from_proto
from onnxqat.quantized import insert_pairs
from tests.networks import W4A4, convnet, planned, quantized, samples
from tests.oracles import run_ort


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Any]
    labels: Any = None


def batches(x, labels=None, size=16):
    for i in range(0, len(x), size):
        part = None if labels is None else labels[i : i + size]
        yield Batch({"input": x[i : i + size]}, part)


def table_model(scores, name="input", output="output"):
    """Return a model whose input is a row number and whose output that row of ``scores``."""
    node = helper.make_node("Gather", ["scores", name], [output], axis=0)
    kind = helper.np_dtype_to_tensor_dtype(scores.dtype)
    graph = helper.make_graph(
        [node],
        "table",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info(output, kind, ["N", *scores.shape[1:]])],
        [numpy_helper.from_array(scores, "scores")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return from_proto(model)


def figures(scores, labels=None, against=None, *, size=16):
    rows = np.arange(len(scores))
    reference = None if against is None else table_model(against)
    return evaluate(table_model(scores), batches(rows, labels, size), against=reference, threads=1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_metrics_are_those_of_numpy(rng, size):
    scores = rng.normal(size=(50, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 50)
    found = figures(scores, labels, size=size)
    order = np.argsort(-scores, axis=1)
    top1 = np.mean(order[:, 0] == labels)
    top5 = np.mean([label in row for label, row in zip(labels, order[:, :5], strict=True)])

    assert found.samples == 50
    assert found.metrics == {"top1": top1, "top5": top5}
    assert (found.reference, found.agreement, found.max_abs_diff) == ({}, None, None)


def test_top5_is_told_from_ten_classes_on(rng):
    labels = np.zeros(4, np.int64)
    few, many = (figures(np.eye(4, n, dtype=np.float32), labels).metrics for n in (9, 10))

    assert few.keys() == {"top1"}
    assert many.keys() == {"top1", "top5"}


def test_without_labels_there_are_no_metrics():
    assert figures(np.eye(3, dtype=np.float32)).metrics == {}


def test_agreement_and_largest_difference(rng):
    ours, theirs = (rng.normal(size=(40, 6)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, 6, 40)
    found = figures(ours, labels, theirs)

    assert found.agreement == np.mean(ours.argmax(1) == theirs.argmax(1))
    assert found.max_abs_diff == np.abs(ours.astype(np.float64) - theirs).max()
    assert found.reference == {"top1": np.mean(theirs.argmax(1) == labels)}


def compared(nodes, ours, theirs, shape, kind=TensorProto.FLOAT):
    """Return the figures of the only output of two tables behind some nodes."""
    models = [table_model(scores, output="row") for scores in (ours, theirs)]
    for i, model in enumerate(models):
        proto = model.to_proto()
        proto.graph.node.extend(nodes)
        del proto.graph.output[:]
        proto.graph.output.append(helper.make_tensor_value_info("out", kind, shape))
        models[i] = from_proto(proto)
    found = evaluate(models[0], batches(np.arange(len(ours)), None, 4), against=models[1])
    assert found.agreement == found.outputs[0].agreement
    return found.outputs[0]


def test_agreement_is_a_mean_over_positions_along_the_axis_of_the_classes(rng):
    ours, theirs = (rng.normal(size=(9, 4, 3, 5)).astype(np.float32) for _ in range(2))
    node = helper.make_node("Softmax", ["row"], ["out"], axis=1)
    found = compared([node], ours, theirs, ["N", 4, 3, 5])

    assert found.agreement == pytest.approx(np.mean(ours.argmax(1) == theirs.argmax(1)), abs=1e-15)
    assert (found.kind, found.classes, found.positions) == ("classes", 4, 15)
    assert found.meaning == (
        "of the positions (15 per sample) have the same top class of 'out' (4 classes) as the "
        "reference model"
    )


@pytest.mark.parametrize("shape", [(9, 320), (5, 4, 4), (1,)], ids=["boxes", "grid", "one"])
def test_values_have_an_error_and_no_agreement(rng, shape):
    """By the standard deviation of all of the reference's values, over batches of other sizes."""
    ours, theirs = (100 + rng.normal(size=(10, *shape)).astype(np.float32) for _ in range(2))
    node = helper.make_node("Identity", ["row"], ["out"])
    found = compared([node], ours, theirs, ["N", *shape])
    difference = ours.astype(np.float64) - theirs
    expected = np.sqrt(np.mean(difference**2) / np.var(theirs.astype(np.float64)))

    assert found.agreement is None
    assert found.relative_error == pytest.approx(expected, rel=1e-9)
    assert found.max_abs_diff == np.abs(difference).max()
    assert found.meaning == "root mean square error of 'out', relative to its standard deviation"


def test_a_constant_reference_has_no_relative_error():
    ours = np.ones((4, 3, 3), np.float32)
    node = helper.make_node("Identity", ["row"], ["out"])

    assert compared([node], ours, 0 * ours, ["N", 3, 3]).relative_error is None


def test_integers_agree_where_they_are_equal(rng):
    ours, theirs = (rng.normal(size=(9, 4, 6)).astype(np.float32) for _ in range(2))
    node = helper.make_node("ArgMax", ["row"], ["out"], axis=1, keepdims=0)
    found = compared([node], ours, theirs, ["N", 6], TensorProto.INT64)

    assert found.agreement == pytest.approx(np.mean(ours.argmax(1) == theirs.argmax(1)), abs=1e-15)
    assert (found.kind, found.relative_error) == ("integers", None)
    assert found.meaning == "of the integers of 'out' equal those of the reference model"


def test_how_many_values_there_are_may_depend_on_them():
    """As with the boxes that a suppression keeps: they are not compared, and nothing stops."""
    ours, theirs = np.float32([[0, 1, 1], [1, 1, 1]]), np.float32([[0, 0, 1], [1, 1, 1]])
    node = helper.make_node("NonZero", ["row"], ["out"])
    found = compared([node], ours, theirs, [2, "K"], TensorProto.INT64)

    assert (found.agreement, found.max_abs_diff) == (None, None)


def test_independent_scores_of_many_places_have_an_error(rng):
    """Most places of a detector show nothing, where the largest of tiny scores is noise."""
    ours, theirs = (rng.normal(size=(5, 20, 8)).astype(np.float32) for _ in range(2))
    node = helper.make_node("Sigmoid", ["row"], ["out"])

    assert compared([node], ours, theirs, ["N", 20, 8]).kind == "values"


def test_one_value_per_sample_has_a_difference_alone(rng):
    ours = rng.normal(size=7).astype(np.float32)
    found = figures(ours, None, ours + np.float32(1))

    assert (found.samples, found.agreement) == (7, None)
    assert found.max_abs_diff == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_])
def test_integers_differ_by_what_they_differ(dtype):
    ours, theirs = np.array([[0, 1]], dtype), np.array([[1, 0]], dtype)

    assert figures(ours, None, theirs).max_abs_diff == 1


def test_not_a_number_is_not_lost():
    ours = np.zeros((32, 2), np.float32)
    theirs = ours.copy()
    ours[3, 1] = np.nan
    equal = np.full((4, 2), -np.inf, np.float32)

    assert np.isnan(figures(ours, None, theirs).max_abs_diff)
    assert figures(equal, None, equal).max_abs_diff == 0


def test_ties_go_to_the_first_class():
    found = figures(np.zeros((4, 3), np.float32), np.array([0, 0, 1, 2]))

    assert found.metrics == {"top1": 0.5}


@pytest.mark.parametrize("label", [-1, 3])
def test_label_outside_of_the_classes_is_an_error(label):
    with pytest.raises(DataError, match="the model has 3 classes, 0 to 2"):
        figures(np.eye(3, dtype=np.float32), np.array([0, 1, label]))


def test_labels_need_one_row_of_scores_per_sample():
    with pytest.raises(DataError, match=r"Top-1 needs an output of shape \(N, classes\)"):
        figures(np.zeros((2, 3, 4), np.float32), np.array([0, 1]))


def test_no_samples_is_an_error():
    with pytest.raises(DataError, match="no samples"):
        evaluate(table_model(np.eye(3, dtype=np.float32)), [])


# --- modes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return convnet()


@pytest.fixture(scope="module")
def qdq(network):
    return quantized(network, overrides=W4A4)[1]


def test_float_mode_is_the_stripped_model(network, qdq):
    x = samples(network, 48)
    stripped = deployed_model(qdq, weights="tuned")
    session = model_session(qdq, "float", threads=1)
    expected = model_session(stripped, "qdq", threads=1).run(None, {"input": x})[0]

    np.testing.assert_array_equal(session.run(None, {"input": x})[0], expected)
    assert evaluate(qdq, batches(x), mode="float", against=stripped, threads=1).max_abs_diff == 0
    assert evaluate(qdq, batches(x), mode="qdq", against=stripped, threads=1).max_abs_diff > 0


def test_qdq_mode_is_the_file_run_node_by_node(network, qdq):
    x = samples(network, 16)
    found = model_session(qdq, "qdq", threads=1).run(None, {"input": x})[0]

    np.testing.assert_array_equal(found, run_ort(qdq.to_proto(), {"input": x})[0])


def test_models_are_not_changed_and_progress_is_told(network, qdq):
    before = qdq.to_proto().SerializeToString(deterministic=True)
    told = []
    x = samples(network, 33)
    evaluate(qdq, batches(x), mode="float", threads=1, progress=lambda: told.append(1))

    assert qdq.to_proto().SerializeToString(deterministic=True) == before
    assert len(told) == 3


# --- models that cannot be compared -------------------------------------------------------------


def test_other_inputs_or_outputs_are_refused():
    scores = np.eye(3, dtype=np.float32)
    ours, renamed = table_model(scores), table_model(scores, output="logits")
    other = table_model(scores, name="rows")
    two = onnx.ModelProto.FromString(ours.to_proto().SerializeToString())
    two.graph.node.append(helper.make_node("Neg", ["output"], ["second"]))
    two.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["N", 3]))

    check_interface(ours, renamed)
    with pytest.raises(ModelError, match="has the outputs 'logits', model has 'output'"):
        check_interface(ours, renamed, output_names=True)
    with pytest.raises(ModelError, match="has the inputs 'rows', model has 'input'"):
        evaluate(ours, [], against=other)
    with pytest.raises(ModelError, match="has the outputs 'output', 'second'"):
        evaluate(ours, [], against=from_proto(two))


def test_other_shapes_are_refused():
    with pytest.raises(ModelError, match=r"shapes \(3, 3\) and \(3, 1\)"):
        figures(np.eye(3, dtype=np.float32), None, np.zeros((3, 1), np.float32))


def test_data_the_model_cannot_take_are_an_error(qdq):
    with pytest.raises(DataError, match="model: does not run on the data"):
        evaluate(qdq, batches(np.zeros((2, 3, 8), np.float32)), threads=1)


def test_placeholder_scales_are_not_evaluated():
    network = convnet()
    floats, plan = planned(network, "onnxruntime-cpu")
    empty = insert_pairs(floats, plan, placeholder_params(floats, plan), state="uncalibrated")
    batches = [Batch({"input": samples(network, 4)})]
    refused = pytest.raises(PlanError, match="is not calibrated")
    with refused:
        evaluate(empty, batches)
    with refused:
        evaluate(floats, batches, against=empty)
    with refused:
        evaluate(empty, batches, mode="integer")
    with refused:
        deployed_model(empty, weights="snapped")
    for export in EXPORTS.values():
        with refused:
            export(empty)

    assert evaluate(empty, batches, mode="float").samples == 4
