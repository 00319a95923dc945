from __future__ import annotations

import numpy as np
import pytest

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import TrainingError
from onnxqat.evaluate import evaluate
from onnxqat.insert import plan_of, read_params, state_of, strip
from onnxqat.model import load_model, save_model, to_proto
from onnxqat.qparams import fake_quantize
from onnxqat.train import Config, DivergedError, finetune
from tests.networks import balanced, convnet, quantized, samples
from tests.oracles import run_ort

FAST = {"epochs": 8, "batch_size": 16, "threads": 1}


@pytest.fixture(scope="module")
def network():
    return balanced(convnet())


@pytest.fixture
def data(network, tmp_path):
    """Samples labelled by the float network itself, so that there is something to regain."""
    x = samples(network, 400)
    labels = run_ort(network, {"input": x})[0].argmax(axis=1)
    np.savez(tmp_path / "data.npz", input=x, label=labels)
    spec = InputSpec(name="input", shape=("N", 3, 8, 8), dtype="float32")
    with open_data(tmp_path / "data.npz", [spec]) as opened:
        yield opened


@pytest.fixture
def coarse(network):
    """3-bit weights: far from the float network."""
    return quantized(network, overrides=("weight.bits=3",))[1]


def as_bytes(model) -> bytes:
    return to_proto(model).SerializeToString(deterministic=True)


def kl_to_teacher(model, network, x):
    def log_softmax(scores):
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    q = log_softmax(run_ort(to_proto(model), {"input": x})[0].astype(np.float64))
    p = log_softmax(run_ort(network, {"input": x})[0].astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fine_tuning_comes_nearer_to_the_teacher(coarse, data, network, method, optimizer):
    config = Config(**FAST, method=method, optimizer=optimizer, lr=0.01, scale_lr=0.01, loss="kl")
    result = finetune(coarse, data, config=config)
    unseen = samples(network, 200, seed=99)

    assert state_of(result.model) == "finetuned"
    assert kl_to_teacher(result.model, network, unseen) < kl_to_teacher(coarse, network, unseen)


def test_the_best_state_is_never_worse_than_the_start(coarse, data):
    wild = Config(**FAST, lr=10.0, scale_lr=3.0)
    try:
        result = finetune(coarse, data, config=wild)
    except DivergedError as error:
        assert as_bytes(error.best)  # noqa: PT017 (either outcome is allowed, both are checked)
    else:
        assert result.after.metrics["top1"] >= result.before.metrics["top1"]


def test_rising_loss_backs_off_and_says_so(network, data):
    """At 8 bits the start is good, so that a rate of 1 can only make it worse."""
    _, good = quantized(network)
    config = Config(epochs=10, batch_size=8, threads=1, lr=1.0, scale_lr=0.5, loss="kl")
    try:
        notes = finetune(good, data, config=config).notes
    except DivergedError as error:
        notes = (str(error),)

    assert any("loss" in note for note in notes)


def test_seed_makes_a_run_reproducible_bit_for_bit(coarse, data):
    runs = [finetune(coarse, data, config=Config(**FAST, seed=3)) for _ in range(2)]
    other = finetune(coarse, data, config=Config(**FAST, seed=4))

    assert as_bytes(runs[0].model) == as_bytes(runs[1].model)
    assert as_bytes(runs[0].model) != as_bytes(other.model)


def test_ste_keeps_the_scales(coarse, data):
    result = finetune(coarse, data, config=Config(**FAST, method="ste", lr=0.01, loss="kl"))
    before, after = read_params(coarse), read_params(result.model)

    assert result.best_epoch > 0
    assert all(before[name].same_as(after[name]) for name in before)


def test_scales_stay_positive_and_zero_points_stay(coarse, data):
    result = finetune(coarse, data, config=Config(**FAST, lr=0.1, scale_lr=0.3))
    before, after = read_params(coarse), read_params(result.model)

    assert all((p.scale > 0).all() for p in after.values())
    for name, params in before.items():
        np.testing.assert_array_equal(params.zero_point, after[name].zero_point)


def test_inputs_are_not_changed(coarse, data):
    before = as_bytes(coarse)
    finetune(coarse, data, config=Config(epochs=1, batch_size=16, threads=1))

    assert as_bytes(coarse) == before


def test_saved_model_evaluates_to_the_reported_figures(coarse, data, tmp_path):
    result = finetune(coarse, data, validation=data, config=Config(**FAST))
    save_model(result.model, tmp_path / "qat.onnx")
    again = evaluate(load_model(tmp_path / "qat.onnx"), data.batches(16), threads=1)

    assert again.metrics == result.after.metrics


def test_weights_are_tuned_and_written_back(coarse, data):
    result = finetune(coarse, data, config=Config(**FAST, lr=0.01, loss="kl"))
    before = strip(coarse).graph.tensors()["w1"].values
    after = strip(result.model).graph.tensors()["w1"].values
    spec = next(p.spec for p in plan_of(coarse).points if p.tensor == "w1")
    params = read_params(result.model)["w1"]

    assert result.best_epoch > 0
    assert not np.array_equal(before, after)
    assert len(np.unique(fake_quantize(after, params, spec)[0])) <= 8


def test_nothing_to_teach_is_an_error(coarse, network, tmp_path):
    np.savez(tmp_path / "plain.npz", input=samples(network, 40))
    spec = InputSpec(name="input", shape=("N", 3, 8, 8), dtype="float32")
    with open_data(tmp_path / "plain.npz", [spec]) as plain:
        with pytest.raises(TrainingError, match="needs labels"):
            finetune(coarse, plain, config=Config(loss="cross-entropy"))
        with pytest.raises(TrainingError, match="too few"):
            finetune(coarse, plain, config=Config(batch_size=64))
        with pytest.raises(TrainingError, match="Unknown loss 'entropy'"):
            finetune(coarse, plain, config=Config(loss="entropy"))


def test_tuned_model_needs_its_teacher(coarse, data):
    tuned = finetune(coarse, data, config=Config(**FAST, lr=0.01, loss="kl")).model
    with pytest.raises(TrainingError, match="--teacher"):
        finetune(tuned, data, config=Config(**FAST))


def test_distillation_needs_no_labels(coarse, network, tmp_path):
    np.savez(tmp_path / "plain.npz", input=samples(network, 200))
    spec = InputSpec(name="input", shape=("N", 3, 8, 8), dtype="float32")
    with open_data(tmp_path / "plain.npz", [spec]) as plain:
        result = finetune(coarse, plain, config=Config(**FAST, lr=0.01))

    assert result.after.metrics == {}
    assert result.after.agreement >= result.before.agreement


def test_not_finite_loss_stops_and_keeps_the_best(coarse, data, monkeypatch):
    from onnxqat.train import engine

    def run(_self, _feeds):
        return float("nan")

    monkeypatch.setattr(engine.StepSession, "run", run)
    with pytest.raises(DivergedError, match="became nan at step 1") as caught:
        finetune(coarse, data, config=Config(**FAST))

    assert as_bytes(caught.value.best) == as_bytes(coarse)
