"""After `export`, onnxruntime's own optimizer makes integer kernels of every heavy node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx

from tests.exported import exported

ROOT = Path(__file__).parents[2]


def test_no_heavy_node_falls_back_to_float(tmp_path):
    for name in ("efficientnet_b0-dynamo", "shufflenet_v2-torchscript"):
        onnx.save(exported(name), tmp_path / f"{name}.onnx")
    paths = [*tmp_path.glob("*.onnx"), ROOT / "models/mobilenet-digits.onnx"]
    command = [sys.executable, ROOT / "scripts/check_kernels.py", *paths]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("QLinearConv") == 3
    assert "float:" not in done.stdout
