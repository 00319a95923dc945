from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxqat.data import open_data
from onnxqat.errors import DataError, TrainingError
from onnxqat.evaluation import evaluate
from onnxqat.model import from_proto
from onnxqat.preparation import prepare
from onnxqat.qparams import fake_quantize
from onnxqat.quantized import load_model
from onnxqat.train import Config, DivergedError, finetune
from tests.contents import as_bytes
from tests.digits import INPUT, MODELS, PIXELS, calibrated_lenet, training_digits
from tests.oracles import run_ort

FAST = {"epochs": 2, "batch_size": 16, "threads": 1}


@pytest.fixture(scope="module")
def data():
    with training_digits(600) as opened:
        yield opened


@pytest.fixture(scope="module")
def unseen():
    with open_data(MODELS / "digits-test.npz", [INPUT], preprocessing=PIXELS) as opened:
        yield next(iter(opened.subset(np.arange(400)).batches(400)))


@pytest.fixture(scope="module")
def network():
    return onnx.load(MODELS / "lenet5.onnx")


@pytest.fixture(scope="module")
def coarse(data):
    """LeNet-5 with 2-bit weights: far from the float network."""
    return calibrated_lenet(data, "weight.bits=2")


@pytest.fixture(scope="module")
def tuned(coarse, data):
    return finetune(coarse, data, config=Config(**FAST))


def kl_to_teacher(model, network, inputs):
    def log_softmax(scores):
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    q = log_softmax(run_ort(model.to_proto(), inputs)[0].astype(np.float64))
    p = log_softmax(run_ort(network, inputs)[0].astype(np.float64))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("method", ["lsq", "ste"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fine_tuning_comes_nearer_to_the_teacher(coarse, data, network, unseen, method, optimizer):
    lr = 2e-3 if optimizer == "adamw" else 1e-4
    config = Config(**FAST, method=method, optimizer=optimizer, lr=lr)
    result = finetune(coarse, data, config=config)

    assert result.model.state == "finetuned"
    before = kl_to_teacher(coarse, network, unseen.inputs)
    assert kl_to_teacher(result.model, network, unseen.inputs) < 0.7 * before


def test_the_best_state_is_never_worse_than_the_start(coarse, data):
    wild = Config(**FAST, lr=10.0, scale_lr=3.0)
    try:
        result = finetune(coarse, data, config=wild)
    except DivergedError as error:
        assert as_bytes(error.outcome.model)  # noqa: PT017 (either outcome is allowed, both are checked)
    else:
        assert result.after.metrics["top1"] >= result.before.metrics["top1"]


def test_rising_loss_backs_off_and_says_so(data):
    """At 8 bits the start is good, so that a rate of 1 can only make it worse."""
    good = calibrated_lenet(data)
    config = Config(epochs=3, batch_size=16, threads=1, lr=1.0, scale_lr=0.5, loss="kl")
    result = finetune(good, data, config=config)

    assert "the loss rose; restarting with 0.25 times the learning rate" in result.notes
    assert result.after.agreement >= result.before.agreement


def test_seed_makes_a_run_reproducible_bit_for_bit(coarse, data, tuned):
    again = finetune(coarse, data, config=Config(**FAST))
    other = finetune(coarse, data, config=Config(**FAST, seed=4))

    assert as_bytes(again.model) == as_bytes(tuned.model)
    assert as_bytes(other.model) != as_bytes(tuned.model)


def test_ste_keeps_the_scales(coarse, data):
    result = finetune(coarse, data, config=Config(**FAST, method="ste"))
    before, after = coarse.params, result.model.params

    assert result.best_epoch > 0
    assert all(before[name].same_as(after[name]) for name in before)


def test_scales_stay_positive_and_zero_points_stay(coarse, data):
    result = finetune(coarse, data, config=Config(**FAST, scale_lr=0.1))
    before, after = coarse.params, result.model.params

    assert all((p.scale > 0).all() for p in after.values())
    for name, params in before.items():
        np.testing.assert_array_equal(params.zero_point, after[name].zero_point)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_scales_that_are_powers_of_two_stay_so_and_move(data, ema):
    powers = ("weight.bits=2", "activation.power_of_two=true", "weight.power_of_two=true")
    start = calibrated_lenet(data, *powers)
    # every scale twice too large, which the straight-through gradient sees
    params = {name: replace(p, scale=p.scale * np.float32(2)) for name, p in start.params.items()}
    start = start.with_params(params, state="calibrated")
    config = Config(**FAST, scale_lr=0.05, ema=ema)
    tuned = finetune(start, data, config=config).model.params

    moved = 0
    for name, before in params.items():
        mantissas, _ = np.frexp(tuned[name].scale)
        assert np.all(mantissas == 0.5), name
        moved += np.count_nonzero(tuned[name].scale != before.scale)
    assert moved > 0


def test_inputs_are_not_changed(coarse, data):
    before = as_bytes(coarse)
    finetune(coarse, data.subset(np.arange(100)), config=Config(**FAST | {"epochs": 1}))

    assert as_bytes(coarse) == before


def test_saved_model_evaluates_to_the_reported_figures(coarse, data, tmp_path):
    result = finetune(coarse, data, validation=data, config=Config(**FAST | {"epochs": 1}))
    result.model.save(tmp_path / "qat.onnx")
    again = evaluate(load_model(tmp_path / "qat.onnx"), data.batches(16), threads=1)

    assert again.metrics == result.after.metrics


def test_weights_are_tuned_and_written_back(coarse, tuned):
    plan, params = coarse.plan, tuned.model.params
    before, after = coarse.floats.graph.tensors(), tuned.model.floats.graph.tensors()
    weights = [p for p in plan.points if p.role == "weight"]

    assert tuned.best_epoch > 0
    for point in weights:
        values = after[point.tensor].values
        grid = fake_quantize(values, params[point.parameters], point.spec)

        assert not np.array_equal(before[point.tensor].values, values)
        if point.spec.axis is None:
            assert len(np.unique(grid)) <= 4  # two bits


@pytest.fixture
def unlabelled(tmp_path):
    with np.load(MODELS / "digits-train.npz") as arrays:
        np.savez(tmp_path / "plain.npz", images=arrays["images"][:300])
    with open_data(tmp_path / "plain.npz", [INPUT], preprocessing=PIXELS) as opened:
        yield opened


def test_nothing_to_teach_is_an_error(coarse, unlabelled):
    with pytest.raises(TrainingError, match="needs labels"):
        finetune(coarse, unlabelled, config=Config(loss="cross-entropy"))
    with pytest.raises(TrainingError, match="too few"):
        finetune(coarse, unlabelled, config=Config(batch_size=512))
    with pytest.raises(TrainingError, match="Unknown loss 'entropy'"):
        finetune(coarse, unlabelled, config=Config(loss="entropy"))


def test_tuned_model_needs_its_teacher(data, network, tuned):
    config = Config(**FAST | {"epochs": 1})
    with pytest.raises(TrainingError, match="--teacher"):
        finetune(tuned.model, data, config=config)
    again = finetune(tuned.model, data, teacher=prepare(from_proto(network)), config=config)

    assert again.after.metrics["top1"] >= again.before.metrics["top1"]


def test_distillation_needs_no_labels(coarse, network, unlabelled, unseen):
    result = finetune(coarse, unlabelled, config=Config(**FAST))

    assert result.after.metrics == {}
    before = kl_to_teacher(coarse, network, unseen.inputs)
    assert kl_to_teacher(result.model, network, unseen.inputs) < 0.7 * before


def test_not_finite_loss_stops_and_keeps_the_best(coarse, data, monkeypatch):
    from onnxqat.train import engine

    def run(_self, _feeds):
        return float("nan")

    monkeypatch.setattr(engine.StepSession, "run", run)
    with pytest.raises(DivergedError, match="nan at step 1: nothing was trained yet") as caught:
        finetune(coarse, data, config=Config(**FAST))

    assert as_bytes(caught.value.outcome.model) == as_bytes(coarse)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["fc3.weight"], "Step 1: only the gradient of 'fc3.weight' is not finite"),
        (["conv1.weight", "fc1.weight"], "of 2 tensors are not finite, from 'fc1.weight' back"),
    ],
)
def test_not_finite_gradient_names_its_tensor(coarse, data, monkeypatch, names, said):
    from onnxqat.train import engine

    run = engine.StepSession.run

    def spoiled(self, feeds):
        loss = run(self, feeds)
        for name in names:
            self.gradients.views[name][...] = np.inf
        return loss

    monkeypatch.setattr(engine.StepSession, "run", spoiled)
    with pytest.raises(DivergedError, match=said) as caught:
        finetune(coarse, data, config=Config(**FAST))
    assert as_bytes(caught.value.outcome.model) == as_bytes(coarse)

    frozen = tuple(f"tensor:{name}.freeze=true" for name in names)
    result = finetune(coarse, data, config=Config(**FAST | {"epochs": 1}, groups=frozen))
    values, before = (m.floats.graph.tensors() for m in (result.model, coarse))
    assert all(np.array_equal(values[n].values, before[n].values) for n in names)
    assert all(np.isfinite(values[n].values).all() for n in ("fc2.weight", "conv2.bias"))


def test_label_beyond_the_classes_is_refused_before_it_is_read(coarse, data, tmp_path):
    """onnxruntime would read behind the scores; the held-out data are clean."""
    with np.load(MODELS / "digits-train.npz") as arrays:
        images, labels = arrays["images"][:64], arrays["label"][:64].copy()
    labels[5] = 10
    np.savez(tmp_path / "wrong.npz", images=images, label=labels)
    with (
        open_data(tmp_path / "wrong.npz", [INPUT], preprocessing=PIXELS) as wrong,
        pytest.raises(DataError, match="A label is 10, but the model has 10 classes, 0 to 9"),
    ):
        finetune(coarse, wrong, validation=data, config=Config(**FAST))


def values(model):
    """Return the trained weights and scales in one vector."""
    tensors = model.floats.graph.tensors()
    weights = [p.tensor for p in model.plan.points if p.role != "activation"]
    scales = [p.scale for p in model.params.values()]
    return np.concatenate([np.ravel(a) for a in [*(tensors[n].values for n in weights), *scales]])


def test_accumulated_batches_are_one_larger_batch(coarse, data):
    """Up to the order of summation; plain descent, since Adam's directions amplify noise."""
    few = {"epochs": 1, "threads": 1, "optimizer": "sgd", "lr": 1e-4, "validation": 0.2}
    large = finetune(coarse, data, config=Config(**few, batch_size=32))
    small = finetune(coarse, data, config=Config(**few, batch_size=8, accumulate=4))
    moved = np.abs(values(large.model) - values(coarse))

    assert large.best_epoch == small.best_epoch == 1
    assert moved.max() > 1e-3
    np.testing.assert_allclose(values(small.model), values(large.model), rtol=0, atol=1e-5)


def test_a_model_of_fixed_batch_takes_larger_steps(coarse, data):
    single = replace(coarse, floats=coarse.floats.copy())
    for tensor in (*single.floats.graph.inputs, *single.floats.graph.outputs):
        tensor.shape = [1, *tensor.shape[1:]]
    few = {"epochs": 1, "threads": 1, "optimizer": "sgd", "lr": 1e-4}
    config = Config(**few)  # of one sample, 16 to a step
    small = finetune(single, data.subset(np.arange(400)), config=config)
    large = finetune(coarse, data.subset(np.arange(400)), config=Config(**few, batch_size=16))

    assert small.best_epoch == large.best_epoch == 1
    np.testing.assert_allclose(values(small.model), values(large.model), rtol=0, atol=1e-5)


def test_a_batch_size_that_the_model_does_not_take_is_refused(coarse, data):
    fixed = replace(coarse, floats=coarse.floats.copy())
    fixed.floats.graph.inputs[0].shape = [1, 1, 28, 28]
    with pytest.raises(DataError, match=r"--batch-size 16: model input 'input' takes batches of 1"):
        finetune(fixed, data, config=Config(**FAST))
