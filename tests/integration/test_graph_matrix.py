"""The script that tries every rule on every graph says what it finds, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.networks import attention

ROOT = Path(__file__).parents[2]
RULES = ("onnxruntime-cpu", "ncnn")  # ncnn has nothing to quantize in a Relu


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    onnx.save(attention(), folder / "attention.onnx")
    (folder / "broken.onnx").write_bytes(b"\x00not an ONNX file")
    relu = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 4] y) '
        "{ y = Relu(x) }"
    )
    onnx.save(relu, folder / "relu.onnx")
    command = [sys.executable, str(ROOT / "scripts/graph_matrix.py"), str(folder)]
    command += ["--rules", *RULES]
    command += ["--json", str(folder / "out.json"), "--markdown", str(folder / "out.md")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = {row["graph"]: row for row in json.loads((folder / "out.json").read_text())}
    return done, rows, (folder / "out.md").read_text()


def test_a_graph_that_cannot_be_read_costs_its_row_alone(result):
    done, rows, text = result
    assert done.returncode == 1
    assert "not an ONNX file" in rows["broken"]["failure"]
    assert "| broken | - | - | - | - | failed | failed |" in text
    assert set(rows) == {"attention", "broken", "relu"}


def test_a_good_cell_has_passed_every_check(result):
    _, rows, _ = result
    cell = rows["attention"]["cells"]["onnxruntime-cpu"]
    names = ("accounted", "checker", "runtime", "strip", "sqnr")
    assert cell["checks"] == dict.fromkeys(names, "")
    assert cell["points"] > 0
    assert cell["sqnr_db"] > 20


def test_a_rule_without_anything_to_quantize_is_no_failure(result):
    done, rows, text = result
    assert "quantizes nothing" in rows["relu"]["cells"]["ncnn"]["refused"]
    assert "Rule ncnn quantizes nothing" in text
    assert "FAILED" not in done.stdout
