from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxqat.qparams import quantized_range
from onnxqat.train import Config, TrainingLog, finetune
from onnxqat.train.monitoring.drift import clipped_shares, scale_drift
from tests.digits import calibrated_lenet, training_digits
from tests.networks import convnet, quantized, samples


@pytest.fixture(scope="module")
def data():
    with training_digits(200) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(data):
    return calibrated_lenet(data)


def scaled(model, factors):
    """Return the model with its scales times ``factors``, one or one per parameters."""
    params = {}
    for index, (name, old) in enumerate(model.params.items()):
        factor = np.float32(factors if np.isscalar(factors) else factors[index])
        params[name] = replace(old, scale=old.scale * factor)
    return model.with_params(params, state="finetuned")


def test_drift_is_the_logarithm_of_the_ratio(model):
    count = len(model.params)
    factors = [2.0 ** (i - 2) for i in range(count)]
    found = scale_drift(model, scaled(model, factors))

    np.testing.assert_allclose(list(found.values()), [i - 2 for i in range(count)], atol=1e-6)


def test_drift_of_an_axis_is_that_of_the_channel_that_moved_furthest(model):
    params = dict(model.params)
    name = next(n for n, p in params.items() if p.scale.size > 2)
    scale = params[name].scale.copy()
    scale[0] *= 2
    scale[1] /= 8
    params[name] = replace(params[name], scale=scale)
    found = scale_drift(model, model.with_params(params, state="finetuned"))

    assert found.pop(name) == pytest.approx(-3)
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_clipped_shares_are_those_of_the_reference(model, data, factor):
    """ONNX's reference evaluator computes the activations, float64 the levels."""
    narrow = scaled(model, factor)
    inputs = next(iter(data.batches(4))).inputs
    found = clipped_shares(narrow, inputs, threads=1)
    proto, params = narrow.to_proto(), narrow.params
    nodes = {n.name: n for n in proto.graph.node}
    points = narrow.plan.grid_points()
    names = [nodes[f"{p.tensor}/QuantizeLinear"].input[0] for p in points]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    proto.opset_import[0].version = 21  # the evaluator has no older DequantizeLinear
    wanted = [n for n in names if n not in constants and n not in inputs]
    values = dict(zip(wanted, ReferenceEvaluator(proto).run(wanted, inputs), strict=True))
    values |= constants | inputs

    assert found.keys() == {p.tensor for p in points}
    for point, name in zip(points, names, strict=True):
        p, x = params[point.parameters], values[name].astype(np.float64)
        if point.spec.axis is not None:
            x = np.moveaxis(x, point.spec.axis, -1)
        qmin, qmax = quantized_range(point.spec, signed=p.signed)
        levels = np.rint(x / p.scale) + p.zero_point
        expected = np.mean((levels < qmin) | (levels > qmax))
        assert found[point.tensor] == pytest.approx(expected, abs=2e-3)  # ties of float32
    assert (max(found.values()) > 0.1) == (factor < 1)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_has_a_line_per_interval_and_epoch(model, data, tmp_path):
    batch = next(iter(data.batches(16))).inputs
    config = Config(epochs=2, threads=1, lr=1e-3, scale_lr=5e-4)  # 11 steps an epoch
    with TrainingLog(tmp_path / "l", model, batch, every=5, threads=1) as log:
        result = finetune(model, data, config=config, report=log)
    lines = read(tmp_path / "l")

    figures = lines[0].pop("metrics")
    assert lines[0].pop("engine").startswith("onnxruntime")
    where = {"device": "cpu", "precision": "fp32"}
    assert lines[0] == {"event": "start", "schema": "onnxqat.log/1", "step": 0, **where}
    assert figures["loss"] == result.before.loss
    assert figures["top1"] == result.before.metrics["top1"]
    assert [(line["event"], line["step"]) for line in lines[1:]] == [
        ("step", 5),
        ("step", 10),
        ("epoch", 11),
        ("step", 15),
        ("step", 20),
        ("epoch", 22),
    ]
    steps = [line for line in lines if line["event"] == "step"]
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert all(line["lr"] == 2 * line["scale_lr"] for line in steps)
    assert 0 < steps[-1]["lr"] < steps[0]["lr"] <= 1e-3
    best = epochs[result.best_epoch - 1] if result.best_epoch else {}
    assert best.get("metrics", result.before.metrics)["top1"] == result.after.metrics["top1"]
    points = model.plan.grid_points()
    for line in epochs:
        assert line["scale_drift"].keys() == {p.parameters for p in points}
        assert line["clipped"].keys() == {p.tensor for p in points}
    assert any(epochs[-1]["scale_drift"].values())


def test_shares_are_told_where_only_the_input_and_weights_are_quantized():
    _, qdq = quantized(convnet(), "ncnn", ("activation.quantize=false",))
    shares = clipped_shares(qdq, {"input": samples(convnet(), 2)})

    assert shares.keys() == {p.tensor for p in qdq.plan.grid_points()}


def test_a_log_goes_on_and_notes_what_happened(model, data, tmp_path):
    batch = next(iter(data.batches(16))).inputs
    config = Config(epochs=9, threads=1, lr=1.0, scale_lr=0.5, loss="kl")
    (tmp_path / "l").write_text('{"event": "start"}\n')
    with TrainingLog(tmp_path / "l", model, batch, every=9999, resume=True, threads=1) as log:
        result = finetune(model, data, config=config, report=log)
    lines = read(tmp_path / "l")

    assert [line["event"] for line in lines[:2]] == ["start", "resume"]
    notes = [line["note"] for line in lines if line["event"] == "note"]
    assert notes == list(result.notes[: len(notes)])
    assert "restarting with 0.25 times" in notes[0]
