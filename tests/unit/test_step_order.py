"""The order in which a training step runs its nodes, which decides how much memory it takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.losses import LABELS, read_loss
from tests.networks import convnet, quantized, samples

FEW = 1000  # bytes; what gradients compute of parameters and labels may come early


@pytest.mark.parametrize("kernels", ["as installed", "none"])
def test_gradients_are_computed_after_the_forward_pass(kernels, tmp_path, monkeypatch):
    class Profiled(ort.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = str(tmp_path / "step")

    if kernels == "none":
        monkeypatch.setattr("onnxqat.train.engine.installed_kernels", frozenset)
    network = convnet()
    _, qdq = quantized(network, "onnxruntime-cpu", ("weight.axis=none",))
    form = training_form(qdq)
    monkeypatch.setattr(ort, "SessionOptions", Profiled)
    session = StepSession(form, read_loss("cross-entropy"), batch_size=8, threads=1)
    session.run({"input": samples(network, 8), LABELS: np.arange(8) % 5})
    events = json.loads(Path(session._session.end_profiling()).read_text(encoding="utf-8"))
    runs = [e for e in events if e["name"].endswith("_kernel_time")]
    runs.sort(key=lambda event: event["ts"])
    large = [e["name"] for e in runs if int(e["args"]["output_size"]) > FEW]
    backward = [name.startswith("gradient/") for name in large]

    assert 20 < sum(backward) < len(large)
    assert backward == sorted(backward)
