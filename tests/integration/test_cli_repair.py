"""Equalization by the command line, on the bundled MobileNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from onnxqat.quantized import load_model, weights_hash
from onnxqat.repair import original
from tests.digits import write_digits

MODELS = Path(__file__).parents[2] / "models"
LENET, MOBILENET = MODELS / "lenet5.onnx", MODELS / "mobilenet-digits.onnx"
NORM = ("--mean", 128, "--scale", 0.0078125)


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def document(*words: Any) -> dict[str, Any]:
    result = invoke(*words, "--json")

    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", 48)


def test_an_equalized_model_has_the_names_and_outputs_of_the_users(tmp_path):
    target = tmp_path / "equalized.onnx"

    found = document("equalize", MOBILENET, "-o", target)

    before, after = onnx.load(MOBILENET), onnx.load(target)
    for field in ("input", "output"):
        assert list(getattr(before.graph, field)) == list(getattr(after.graph, field))
    assert not after.metadata_props or all(
        not entry.key.startswith("onnxqat.") for entry in after.metadata_props
    )
    values = np.random.default_rng(3).normal(size=(4, 1, 28, 28)).astype(np.float32)
    outputs = [
        ort.InferenceSession(str(path)).run(None, {before.graph.input[0].name: values})[0]
        for path in (MOBILENET, target)
    ]
    assert np.abs(outputs[0] - outputs[1]).max() <= 2e-5 * np.abs(outputs[0]).max()
    assert len(found["layers"]) == 16
    assert found["relu6"] == []
    assert {skip["node"] for skip in found["skips"]} > {"/stem/conv/Conv", "/classifier/Gemm"}


def test_outputs_are_compared_on_the_data_that_is_given(digits, tmp_path):
    words = ("equalize", MOBILENET, "--relu6", "keep")
    on_data = document(*words, "--data", digits, *NORM, "-o", tmp_path / "a.onnx")
    on_noise = document(*words, "-o", tmp_path / "b.onnx")

    assert on_data["differences"] != on_noise["differences"]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_insert_tells_what_equalization_did_and_the_result_teaches_itself(tmp_path):
    result = invoke("insert", MOBILENET, "--equalize", "-o", tmp_path / "m.qdq.onnx")

    assert result.exit_code == 0, result.output
    assert "Equalized 16 layers." in result.stderr
    assert "on random values" in result.stderr
    model = load_model(tmp_path / "m.qdq.onnx")
    assert model.source == weights_hash(model.floats.graph)


@pytest.mark.parametrize(("axis", "warns"), [("channel", True), ("none", False)])
def test_insert_warns_where_equalization_can_cost_accuracy(tmp_path, axis, warns):
    words = ("--equalize", "--set", f"weight.axis={axis}", "-o", tmp_path / "m.qdq.onnx")
    result = invoke("insert", MOBILENET, *words)

    assert result.exit_code == 0, result.output
    assert ("16 of these layers have a scale per channel" in result.stderr) == warns


def test_insert_fits_activations_to_the_power_of_two_scales_of_a_chip(digits, tmp_path):
    words = ("insert", LENET, "--equalize", "--data", digits, *NORM, "--samples", 16, "-o")

    fitted = invoke(*words, tmp_path / "a.onnx", "--rules", "esp32-p4")
    usual = invoke(*words, tmp_path / "b.onnx")

    assert fitted.exit_code == usual.exit_code == 0, fitted.output
    assert "Fitted 4 activations to scales that are powers of two." in fitted.stderr
    assert "Fitted" not in usual.stderr
    assert load_model(tmp_path / "a.onnx").history[0].figures["fitted"] == 4


def test_a_replaced_relu6_needs_the_users_model_as_teacher(digits, tmp_path):
    inserted, tuned = tmp_path / "m.qdq.onnx", tmp_path / "m.qat.onnx"
    result = invoke("insert", MOBILENET, "--equalize", "--relu6", "replace", "-o", inserted)
    tune = ("finetune", inserted, digits, *NORM, "--epochs", 1, "-o", tuned)

    alone, taught = invoke(*tune), invoke(*tune, "--teacher", MOBILENET)

    assert "2 ReLU6 became Relu." in result.stderr
    assert "Pass your float model as --teacher" in result.stderr
    assert alone.exit_code == 1
    assert "Pass the float model with --teacher" in alone.stderr
    assert taught.exit_code == 0, taught.output


def test_relu6_does_nothing_without_equalization(tmp_path):
    result = invoke("insert", LENET, "--relu6", "replace", "-o", tmp_path / "m.onnx")

    assert result.exit_code == 2
    assert "--relu6 needs --equalize" in result.stderr


def test_insert_and_check_advise_it_where_channels_are_uneven_only(tmp_path):
    even = invoke("insert", LENET, "-o", tmp_path / "a.onnx")
    uneven = invoke("insert", MOBILENET, "-o", tmp_path / "b.onnx")

    assert "qualize" not in even.stderr
    assert "The channels of 1 weight have very different ranges" in uneven.stderr
    assert f"onnxqat insert {MOBILENET} --equalize" in uneven.stderr
    assert "'/blocks/blocks.4/depthwise/conv/Conv'" in uneven.stderr
    assert document("check", LENET)["advice"] == []
    assert len(document("check", MOBILENET)["advice"]) == 1


def test_an_equalized_model_needs_no_advice(tmp_path):
    invoke("equalize", MOBILENET, "-o", tmp_path / "m.onnx")

    assert document("check", tmp_path / "m.onnx")["advice"] == []


def test_biases_are_corrected_on_the_calibration_data(digits, tmp_path):
    plain, corrected = tmp_path / "plain.onnx", tmp_path / "corrected.onnx"
    words = ("insert", LENET, "--data", digits, *NORM, "--set", "weight.bits=4")

    invoke(*words, "-o", plain)
    result = invoke(*words, "--bias-correction", "-o", corrected)

    assert "Corrected the biases of 5 layers; 0 are unchanged." in result.stderr
    before, after = load_model(plain), load_model(corrected)
    assert all(params.same_as(after.params[name]) for name, params in before.params.items())
    assert before.source == after.source != weights_hash(after.floats.graph)
    tune = invoke("finetune", corrected, digits, "--epochs", 1, "-o", tmp_path / "tuned.onnx")
    assert tune.exit_code == 0, tune.output  # by the biases that it remembers


def test_biases_are_corrected_by_what_normalizations_remember(digits, tmp_path):
    words = ("--data", digits, *NORM, "--analytic-bias-correction", "-o")
    result = invoke("insert", MOBILENET, *words, tmp_path / "corrected.onnx")
    nothing = invoke("insert", LENET, *words, tmp_path / "lenet.onnx")

    assert result.exit_code == nothing.exit_code == 0
    assert "Corrected the biases of 17 layers; 1 are unchanged." in result.stderr
    after = load_model(tmp_path / "corrected.onnx")
    assert after.source != weights_hash(after.floats.graph)
    assert after.source == weights_hash(original(after.floats).graph)
    assert after.history[-1].settings["bias_correction"] == "analytic"
    assert "does not follow from a BatchNormalization" in nothing.stderr


def test_data_decide_whether_relu6_is_replaced(digits, tmp_path):
    words = ("insert", MOBILENET, "--equalize", *NORM)

    with_data = invoke(*words, "--data", digits, "-o", tmp_path / "a.onnx")
    without = invoke(*words, "-o", tmp_path / "b.onnx")

    assert "2 ReLU6 became Relu." in with_data.stderr
    assert "Without ReLU6, output 'output': largest difference" in with_data.stderr
    assert "Outputs were compared on at most 64 samples." in with_data.stderr
    assert "Clip" not in {node.op for node in load_model(tmp_path / "a.onnx").floats.graph.nodes}
    assert (
        "2 ReLU6 were kept, so the layers before and after each one were not equalized"
        in without.stderr
    )
    assert load_model(tmp_path / "b.onnx").source


def test_biases_are_corrected_on_data_only(tmp_path):
    result = invoke("insert", LENET, "--bias-correction", "-o", tmp_path / "m.onnx")

    assert result.exit_code == 2
    assert "--bias-correction needs --data" in result.stderr
