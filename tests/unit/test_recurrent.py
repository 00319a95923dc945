"""Recurrent layers from the plan to the chip: which weights are quantized, trained and written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxqat import Config, finetune
from onnxqat.calibration import placeholder_params
from onnxqat.deploy import write_deployment
from onnxqat.errors import FormatError, RuleError, TrainingError
from onnxqat.evaluation import IntegerProgram
from onnxqat.formats import FORMATS
from onnxqat.formats.format import Calibrated, Table
from onnxqat.formats.onnxruntime_qdq import integer_model
from onnxqat.nodes import bias_channels
from onnxqat.quantized import insert_pairs
from onnxqat.train import engine
from onnxqat.train.engine import StepSession, forward_session
from onnxqat.train.form import training_form, untrainable_nodes
from onnxqat.train.losses import read_loss, teacher_input
from onnxqat.train.lowering import with_steps
from tests.networks import RULES, planned, quantized, samples, spotter
from tests.oracles import run_ort

# By rule, the axis of the scales of W and R, None for per-tensor, and the layers: LSTM, GRU.
QUANTIZED = {
    "esp32-p4": (None, "12"),
    "esp32-s3": (None, "12"),
    "ncnn": (1, "12"),
    "onnxruntime-cpu": (1, "1"),
    "openvino": (1, "12"),
    "qnn-htp": (None, "12"),
    "qnn-htp-16": (None, "12"),
    "tflite": (None, "1"),
}
RUN_TIME = ("ncnn", "onnxruntime-cpu")  # rules whose targets round the inputs at run time


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_quantized_where_the_sources_of_a_rule_say_so(rule):
    _, plan = planned(spotter(), rule)
    points = {p.tensor: p for p in plan.points}
    axes = {name: p.spec.axis for name, p in points.items() if p.role == "weight"}
    axes.pop("w3", None)
    axis, layers = QUANTIZED.get(rule, (None, ""))
    readers = {(e.node, e.index) for p in points.values() for e in p.consumers}

    assert axes == {f"{kind}{layer}": axis for layer in layers for kind in "wr"}
    assert not points.keys() & {"b1", "b2"}  # two products add up: no scale is that of a bias
    if rule in QUANTIZED and rule not in RUN_TIME:
        assert ("n_h1", 0) in readers


def test_no_bias_of_a_layer_has_the_scale_of_one_product():
    """With 8 inputs and 1 unit, an LSTM has as many biases as inputs."""
    node = gs.Node("LSTM", "lstm", {"hidden_size": 1}, [gs.Variable(n) for n in "xwrb"], [])

    assert bias_channels(node, (1, 4, 8)) is None


def test_the_first_weights_of_a_spotter_are_those_of_its_recurrent_layer():
    _, plan = planned(spotter(), "openvino", ("first.bits=6",))

    bits = {p.tensor: p.spec.bits for p in plan.points if p.role == "weight"}
    assert bits == {"w1": 6, "r1": 6, "w2": 8, "r2": 8, "w3": 8}


def test_a_cell_gets_no_point_although_it_is_read():
    model = spotter()
    model.graph.node[1].output.extend(["", "cell"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("cell", 1, [2, "N", 4]))
    _, plan = planned(model, "tflite")

    assert "h1" in {p.tensor for p in plan.points}
    assert "cell" not in {p.tensor for p in plan.points}


@pytest.fixture(scope="module")
def trained():
    """Return what the file and the training form compute, and the gradients, by rule."""
    network = spotter()
    x = samples(network, 8, seed=7)
    found = {}
    for rule in ("ncnn", "qnn-htp"):
        _, qdq = quantized(network, rule, ("weight.bits=4",))
        form = training_form(qdq)
        actual = forward_session(form, threads=1).run(None, {"input": x, **form.parameters})[0]
        found[rule] = qdq, form, run_ort(qdq.to_proto(), {"input": x})[0], actual
    return found


@pytest.mark.parametrize(("rule", "levels"), [("ncnn", 0), ("qnn-htp", 1)])
def test_training_computes_what_the_file_computes(trained, rule, levels):
    qdq, _, expected, actual = trained[rule]
    step = float(qdq.params["output"].scale) if "output" in qdq.params else 0.0

    assert np.abs(actual - expected).max() <= levels * step + 16 * np.spacing(
        np.abs(expected).max()
    )


@pytest.mark.parametrize("kernels", ["installed", "none"])
def test_every_parameter_gets_a_gradient_from_both_engines(trained, kernels, monkeypatch):
    if kernels == "none":
        monkeypatch.setattr(engine, "installed_kernels", frozenset)
    _, form, expected, _ = trained["qnn-htp"]
    session = StepSession(form, read_loss("mse"), batch_size=8, threads=1)
    x = samples(spotter(), 8, seed=7)
    session.run({"input": x, teacher_input("output"): np.zeros_like(expected)})
    gradients = session.gradients.views

    wanted = {f"{kind}{i}" for i in (1, 2) for kind in "wrb"}
    assert wanted <= form.weights.keys()
    assert {"w1/scale", "r2/scale", "h1/scale"} <= gradients.keys()
    assert all(np.any(gradient) for gradient in gradients.values())


def test_sequences_of_unknown_length_take_that_of_the_data():
    network = spotter(length="T")
    floats, plan = planned(network, "qnn-htp")
    calibrated = insert_pairs(floats, plan, placeholder_params(floats, plan), state="calibrated")
    message = r"'n_h1' \(LSTM: the length of its sequences, axis 0 of 't', is not fixed; export"
    with pytest.raises(TrainingError, match=message):
        training_form(calibrated)
    fixed = replace(calibrated, floats=with_steps(floats, {"input": (1, 7, 3)}))
    form = training_form(fixed)
    x = {"input": np.ones((2, 7, 3), np.float32)}
    (found,) = forward_session(form, threads=1).run(None, x | form.parameters)

    assert untrainable_nodes(floats, plan) == []
    assert floats.graph.inputs[0].shape[1] == "T"  # the model that is kept is as it was
    assert np.abs(found - run_ort(calibrated.to_proto(), x)[0]).max() <= float(
        calibrated.params["output"].scale
    )


def test_fine_tuning_unrolls_as_many_steps_as_the_data_have():
    floats, plan = planned(spotter(length="T"), "onnxruntime-cpu")
    model = insert_pairs(floats, plan, placeholder_params(floats, plan), state="calibrated")
    x = np.random.default_rng(0).normal(size=(24, 6, 3)).astype(np.float32)
    tuned = finetune(model, {"input": x}, config=Config(epochs=1, batch_size=8, threads=1))

    assert tuned.epochs == len(tuned.tried) == 1
    assert tuned.model.floats.graph.inputs[0].shape == ["N", "T", 3]


def test_the_deployed_graph_keeps_its_layers_and_their_weights_are_integers(trained, tmp_path):
    qdq, _, expected, _ = trained["qnn-htp"]
    deployment = write_deployment(qdq, tmp_path)
    ops = [node.op_type for node in onnx.load(deployment.files["model"]).graph.node]
    exported = integer_model(qdq).to_proto()
    stored = {t.name: t.data_type for t in exported.graph.initializer}
    x = {"input": samples(spotter(), 8, seed=7)}

    assert ops.count("LSTM") == ops.count("GRU") == 1
    assert not {"QuantizeLinear", "DequantizeLinear"} & {*ops}
    for name in ("w1", "r1", "w2", "r2"):
        assert stored[f"{name}/integers"] == onnx.TensorProto.INT8
    np.testing.assert_array_equal(run_ort(exported, x)[0], expected)


def test_ncnn_has_the_gates_in_its_own_order_and_each_direction():
    _, qdq = quantized(spotter(), "ncnn")
    table = FORMATS["ncnn"].write(Calibrated(qdq)).files["table"]
    lines = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in table.splitlines()}
    w1, r2 = (1 / qdq.params[name].scale.astype(np.float64) for name in ("w1", "r2"))
    i, o, f, c = np.split(w1, 4)
    z, r, h = np.split(r2, 3)

    np.testing.assert_array_equal(lines["n_h1_param_0"], [*i, *f, *o, *c] * 2)
    np.testing.assert_array_equal(lines["n_last_param_1"], [*r, *z, *h])
    assert not {"n_h1", "n_last"} & lines.keys()  # it rounds what comes at run time


def test_directions_of_an_ncnn_table_that_differ_are_refused():
    floats, qdq = quantized(spotter(), "ncnn")
    table = FORMATS["ncnn"].write(Calibrated(qdq)).files["table"]
    head, *rest = table.splitlines()
    *numbers, last = head.split()
    data = "\n".join([" ".join([*numbers, str(2 * float(last))]), *rest]).encode()
    with pytest.raises(FormatError, match="'n_h1_param_0' has 32 scales; its tensor takes 16"):
        FORMATS["ncnn"].read(Table(name="t", data=data), floats.graph, qdq.plan)


def test_integers_of_a_layer_are_unknown_or_float_as_the_rule_says():
    x = {"input": samples(spotter(), 8, seed=7)}
    _, qdq = quantized(spotter(), "tflite")
    with pytest.raises(RuleError, match=r"node 'n_h1' \(LSTM\): the arithmetic of LSTM is unknown"):
        IntegerProgram(qdq)
    _, qdq = quantized(spotter(), "onnxruntime-cpu")
    found = IntegerProgram(qdq).run(None, x)[0]

    step = float(qdq.params["output"].scale)
    assert np.abs(found - run_ort(qdq.to_proto(), x)[0]).max() <= 1.001 * step
