"""Exports in runtimes that are no dependency: where an environment of theirs is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_cli import MOBILENET, MODELS, NORM, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "rule"),
    [("openvino", "openvino"), ("openvino", "onnxruntime-cpu"), ("onnxruntime", "onnxruntime-cpu")],
)
def test_export_computes_the_same_elsewhere(runtime, rule, tmp_path):
    variable = f"ONNXQAT_{runtime.upper()}"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name the Python of an environment with {runtime}")
    qdq = tmp_path / "model.qdq.onnx"
    data = MODELS / "digits-train.npz"
    # without VNNI, products of 8-bit weights can saturate
    bits = ("--set", "weight.bits=7")
    run("insert", MOBILENET, "--rules", rule, *bits, *NORM, "--data", data, "-o", qdq)
    script = ROOT / f"scripts/check_{runtime}.py"
    done = subprocess.run(
        [sys.executable, script, qdq, MODELS / "digits-test.npz", "1200"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
