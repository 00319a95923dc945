"""strip, import-table and export on the command line, for formats other than Sophgo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from onnxqat.formats import EXPORTS, FORMATS

ROOT = Path(__file__).parents[2]
LENET, TRAIN = ROOT / "models" / "lenet5.onnx", ROOT / "models" / "digits-train.npz"
RULES = {"qnn-htp": "qnn", "ncnn": "ncnn", "tensorrt": "tensorrt", "rockchip-rk3588": "rockchip"}


def document(*words):
    result = CliRunner().invoke(main, [*(str(word) for word in words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with calibrated models, one of each rule."""
    folder = tmp_path_factory.mktemp("formats")
    data = ("--data", TRAIN, "--samples", 64, "--mean", 128, "--scale", 0.0078125)
    for rule in RULES:
        document("insert", LENET, "--rules", rule, *data, "-o", folder / f"{rule}.onnx")
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_strip_writes_the_table_of_the_rule_and_import_reads_it(work, rule, tmp_path):
    found = document("strip", work / f"{rule}.onnx", "-o", tmp_path / "chip")
    table, model = found["files"]["table"], found["files"]["model"]
    words = ("import-table", table, model, "--rules", rule, "-o", tmp_path / "again.onnx")
    document(*words)

    assert Path(table).name == f"model_{FORMATS[RULES[rule]].files['table']}"
    assert found.keys() == {"schema", "files", "left_out", "regridded"}
    assert (tmp_path / "again.onnx").is_file()


def test_strip_says_what_it_leaves_out(work, tmp_path):
    path = work / "tensorrt.onnx"
    found = document("strip", path, "-o", tmp_path / "chip")
    text = CliRunner().invoke(main, ["strip", str(path), "-o", str(tmp_path / "b")]).output

    assert len(found["left_out"]["weight scales"]) == 5
    assert "left out" in text
    assert "5 weight scales" in text
    assert bool(found["regridded"]) == ("regridded" in text)


def test_format_can_be_chosen_on_both_ways(work, tmp_path):
    found = document("strip", work / "ncnn.onnx", "--format", "onnxqat", "-o", tmp_path / "chip")
    words = ("import-table", found["files"]["table"], found["files"]["model"], "--rules", "ncnn")
    document(*words, "--format", "onnxqat", "-o", tmp_path / "again.onnx")

    assert found["left_out"] == {}
    assert Path(found["files"]["table"]).name == "model_onnxqat.json"


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_a_quarter_of_the_float_model(work, name, tmp_path):
    rule = {"tensorrt": "tensorrt", "rockchip": "rockchip-rk3588"}.get(name, "qnn-htp")
    words = ("export", work / f"{rule}.onnx", "--format", name, "-o", tmp_path / "out.onnx")
    found = document(*words)

    assert found["format"] == name
    assert 0.2 < found["bytes"] / LENET.stat().st_size < 0.31
