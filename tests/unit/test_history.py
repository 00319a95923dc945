"""What a file tells of how it was made."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import onnx
import pytest

import onnxqat as oq
from onnxqat.quantized import load_model
from onnxqat.reporting.history import repaired
from onnxqat.train import DivergedError, engine
from onnxqat.train.selection import figures_of
from tests.digits import MODELS, write_digits

PIXELS = oq.Settings(mean=(128.0,), scale=(1 / 128,))
CONFIG = oq.Config(epochs=2, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("history") / "digits.npz", 200)


@pytest.fixture(scope="module")
def calibrated(data):
    return oq.insert(
        MODELS / "mobilenet-digits.onnx",
        overrides=["weight.bits=4"],
        equalize=True,
        relu6="keep",
        data=data,
        settings=PIXELS,
        calibration=oq.Calibration(samples=64, bias_correction="empirical", threads=1),
    )


@pytest.fixture(scope="module")
def lenet(data):
    how = oq.Calibration(samples=64, threads=1)
    sets = ["weight.bits=3"]
    return oq.insert(
        MODELS / "lenet5.onnx", overrides=sets, data=data, settings=PIXELS, calibration=how
    )


@pytest.fixture(scope="module")
def tuned(lenet, data):
    return oq.finetune(lenet, data, teacher=MODELS / "lenet5.onnx", config=CONFIG)


def test_files_are_named_without_their_folders(calibrated, tuned):
    insert, calibrate = calibrated.history

    assert insert.inputs == {"model": "mobilenet-digits.onnx", "data": "digits.npz"}
    assert calibrate.inputs == {"data": "digits.npz"}
    assert tuned.model.history[-1].inputs == {"data": "digits.npz", "teacher": "lenet5.onnx"}


def test_repairs_tell_what_they_changed(calibrated):
    insert, calibrate = calibrated.history
    found = oq.equalize(MODELS / "mobilenet-digits.onnx", relu6="keep")

    assert insert.figures == {
        "equalized": len(found.layers),
        "relu6_replaced": 0,
        "octaves.before": max(one.before for one in found.spreads),
        "octaves.after": max(one.after for one in found.spreads),
    }
    assert insert.settings["equalize"] is True
    assert calibrate.settings["bias_correction"] == "empirical"
    assert calibrate.figures["samples"] == 64
    assert calibrate.figures["corrected"] > 5


def test_a_report_names_every_repair():
    figures = {"equalized": 9.0, "relu6_replaced": 2.0, "migrated": 3.0, "absorbed": 4.0}
    inserted = oq.Stage(
        name="insert", settings={"equalize": True}, figures=figures | {"fitted": 5.0}
    )

    assert repaired([inserted]) == [
        "9 layers equalized",
        "2 ReLU6 replaced",
        "3 normalizations smoothed",
        "high biases of 4 layers absorbed",
        "5 activations fitted to powers of two",
    ]


def test_a_fine_tuning_tells_its_start_and_every_epoch(tuned):
    stage = tuned.model.history[-1]
    states = [tuned.before, *(evaluation for _, evaluation in tuned.tried)]

    assert [one.pop("epoch") for one in map(dict, stage.epochs)] == [0, 1, 2]
    assert [{k: v for k, v in one.items() if k != "epoch"} for one in stage.epochs] == [
        figures_of(state) for state in states
    ]
    assert stage.figures["float.top1"] == tuned.before.reference["top1"]
    assert stage.figures["held_out"] == tuned.before.samples == 20
    kept = stage.epochs[int(stage.figures["best_epoch"])]
    assert kept["top1"] == stage.figures["after.top1"] == tuned.after.metrics["top1"]
    assert any("was chosen by loss: 20 held-out samples are too few" in n for n in stage.notes)


def test_versions_are_those_of_the_packages(tuned):
    for stage in tuned.model.history:
        found = dict(stage.versions)
        assert found.pop("python") == platform.python_version()
        assert {"onnxqat", "numpy", "onnx"} < found.keys()
        assert any(name.startswith("onnxruntime") for name in found)
        assert found == {name: importlib.metadata.version(name) for name in found}


def test_a_diverged_run_tells_why(lenet, data, monkeypatch):
    run, steps = engine.StepSession.run, []

    def spoiled(self, feeds):
        steps.append(run(self, feeds))
        return steps[-1] if len(steps) < 15 else float("nan")

    monkeypatch.setattr(engine.StepSession, "run", spoiled)
    with pytest.raises(DivergedError, match="The loss became nan at step 15") as caught:
        oq.finetune(lenet, data, config=CONFIG)
    outcome = caught.value.outcome
    stage = outcome.model.history[-1]

    assert (stage.name, stage.figures["epochs"], len(stage.epochs)) == ("finetune", 1, 2)
    assert stage.notes[-1] == str(caught.value)
    assert stage.figures["after.loss"] == min(one["loss"] for one in stage.epochs)


def test_losses_name_files_without_their_folders(lenet, data, tmp_path):
    (tmp_path / "folder").mkdir()
    loss = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 13]>
        my (float[n,10] output) => (float loss) { loss = ReduceMean <keepdims=0> (output) }
    """)
    path = tmp_path / "folder" / "my.onnx"
    onnx.save(loss, path)
    text = f'0.001*"{path}"+kl'
    config = oq.Config(epochs=1, threads=1, loss=text)
    result = oq.finetune(lenet, data, config=config)

    assert result.model.history[-1].settings["loss"] == '0.001*"my.onnx"+kl'


def test_a_history_of_an_earlier_version_stays_as_it_is(lenet, tmp_path):
    lenet.save(tmp_path / "a.onnx")
    proto = onnx.load(tmp_path / "a.onnx")
    entry = next(e for e in proto.metadata_props if e.key == "onnxqat.history")
    stages = json.loads(entry.value)
    old = [{k: stage[k] for k in ("name", "settings", "figures")} for stage in stages]
    entry.value = json.dumps(old, separators=(",", ":"), sort_keys=True)
    text = entry.value
    onnx.save(proto, tmp_path / "old.onnx")
    load_model(tmp_path / "old.onnx").save(tmp_path / "again.onnx")
    again = {e.key: e.value for e in onnx.load(tmp_path / "again.onnx").metadata_props}

    assert {"inputs", "versions"} < stages[0].keys()
    assert again["onnxqat.history"] == text
