"""An LSTM that spots keywords loses accuracy at W4A8, and fine-tuning regains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from onnxqat.cli import main

MODELS = Path(__file__).parents[2] / "models"
FLOAT, TRAIN, TEST = (MODELS / f"keywords{end}" for end in (".onnx", "-train.npz", "-test.npz"))
ONE = ("--threads", 1)


def invoke(*words: Any) -> Any:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def top1(model: Path) -> float:
    found = json.loads(invoke("evaluate", model, TEST, *ONE, "--json").stdout)
    return float(found["metrics"]["top1"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keywords")
    words = ("--rules", "tflite", "--set", "weight.bits=4", "--data", TRAIN, *ONE)
    invoke("insert", FLOAT, *words, "-o", folder / "qdq.onnx")
    invoke("finetune", folder / "qdq.onnx", TRAIN, "--epochs", 4, *ONE, "-o", folder / "qat.onnx")
    return folder


def test_fine_tuning_regains_four_fifths_of_what_four_bits_lose(work):
    whole, before, after = (top1(work / n) for n in (FLOAT, "qdq.onnx", "qat.onnx"))

    assert whole > 0.9
    assert whole - before > 0.05
    assert after - before >= 0.8 * (whole - before)


def test_what_leaves_for_the_chip_has_the_layer_and_its_scales(work):
    invoke("strip", work / "qat.onnx", "-o", work / "chip")
    nodes = onnx.load(work / "chip" / "model.onnx").graph.node
    table = json.loads((work / "chip" / "model_onnxqat.json").read_text())

    assert [node.op_type for node in nodes].count("LSTM") == 1
    assert "lstm.R" in json.dumps(table)
