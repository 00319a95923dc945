"""The commands that look at rules and plans: check, rules, insert --plan-only, --overrides."""

from __future__ import annotations

import json

import onnx

from tests.integration.test_cli import LENET, MOBILENET, document, invoke, run


def test_check_says_what_the_chip_cannot_run():
    result = invoke("check", MOBILENET, "--rules", "horizon-bernoulli2")

    assert result.exit_code == 1
    assert "unsupported  Gemm  1      /classifier/Gemm  there is no Linear" in result.stdout
    assert result.stderr == "Error: 1 node cannot run on horizon-bernoulli2.\n"


def test_check_says_what_runs_in_float():
    result = run("check", LENET, "--rules", "tensorrt")

    assert "float    MaxPool  2      /pool1/MaxPool    rule tensorrt leaves MaxPool" in result
    assert result.endswith("10 tensors quantized; 7 nodes in float, 0 unsupported\n")


def test_check_says_what_keeps_a_model_from_being_fine_tuned(tmp_path):
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2,1,2,4] x) => (float[2,1,1,1] y) '
        "<float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[2,1,1,2] p = {0,0.5,-0.5,0}> "
        "{h = MatMul(x, w) y = GridSample(h, p)}"
    )
    path = tmp_path / "sampled.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    result = invoke("check", path, "--rules", "tensorrt", "--train")

    assert result.exit_code == 1
    assert "untrainable  GridSample" in result.stdout
    assert (
        "Error: The model cannot be fine-tuned because of 1 node. Keep earlier layers"
        in result.stderr
    )
    assert document("check", LENET, "--train")["untrainable"] == []


def test_check_as_json_has_points_skips_and_unsupported():
    result = invoke("check", MOBILENET, "--rules", "horizon-bernoulli2", "--json")
    found = json.loads(result.stdout)

    assert found["schema"] == "onnxqat.check/1"
    assert [skip["node"] for skip in found["unsupported"]] == ["/classifier/Gemm"]
    assert found["points"]
    assert found["skips"] == found["unsupported"]


def test_overrides_file_lies_under_the_options(tmp_path):
    path = tmp_path / "o.toml"
    path.write_text("[weight]\nbits = 4\n[activation]\nbits = 4\n")
    found = document("insert", LENET, "--plan-only", "--overrides", path, "--set", "weight.bits=8")
    bits = {point["role"]: point["spec"]["bits"] for point in found["points"]}

    assert bits == {"activation": 4, "weight": 8, "bias": 32}
    assert found["unsupported"] == []


def test_rule_is_validated(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "tflite"\nname = "mine"\n[specs]\nweight = { bitz = 4 }\n')
    result = invoke("rules", "validate", path)

    assert result.exit_code == 1
    assert f"{path}:4 [specs.weight]: Object contains unknown field `bitz`" in result.stdout
    path.write_text('extends = "tflite"\nname = "mine"\n[specs]\nweight = { bits = 4 }\n')

    assert document("rules", "validate", path)["problems"] == []


def test_schema_of_rules_is_json():
    assert json.loads(run("rules", "schema"))["$ref"] == "#/$defs/HardwareRule"
