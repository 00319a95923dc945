"""The verbs in Python do what the commands do, to the last bit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxqat as oq
from onnxqat.cli import main
from tests.digits import write_digits

ROOT = Path(__file__).parents[2]
LENET = ROOT / "models" / "lenet5.onnx"
PIXELS = oq.Settings(mean=(128.0,), scale=(0.0078125,))
NORM = ("--mean", 128, "--scale", 0.0078125)
RULE = "sophgo-bm1684x"


def run(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])

    assert result.exit_code == 0, result.output
    return result.stdout


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the commands make of a small model and few samples."""
    folder = tmp_path_factory.mktemp("python")
    data = write_digits(folder / "data.npz", 120)
    run("insert", LENET, "--rules", RULE, *NORM, "--set", "last.bits=4", "-o", folder / "qdq.onnx")
    words = ("--samples", 40, "--seed", 3, "--observer", "minmax", "--threads", 1)
    run("calibrate", folder / "qdq.onnx", data, *words, "-o", folder / "calibrated.onnx")
    words = ("--epochs", 1, "--lr", 0.001, "--threads", 1, "-o", folder / "qat.onnx")
    run("finetune", folder / "calibrated.onnx", data, *words)
    run("strip", folder / "qat.onnx", "-o", folder / "chip")
    return folder


def inserted():
    return oq.insert(LENET, rules=RULE, overrides=["last.bits=4"], settings=PIXELS)


def calibrated(model, data):
    how = oq.Calibration(samples=40, seed=3, observer="minmax", threads=1)
    return oq.calibrate(model, data, calibration=how)


def tuned(model, data):
    return oq.finetune(model, data, config=oq.Config(epochs=1, lr=0.001, threads=1)).model


def table_of(folder):
    return oq.import_table(
        folder / "chip" / "model_cali_table", LENET, rules=RULE, overrides=["last.bits=4"]
    )


MADE = {
    "insert": (lambda _: inserted(), "qdq.onnx"),
    "calibrate": (lambda w: calibrated(w / "qdq.onnx", w / "data.npz"), "calibrated.onnx"),
    "finetune": (lambda w: tuned(w / "calibrated.onnx", w / "data.npz"), "qat.onnx"),
    "from object to object": (
        lambda w: tuned(calibrated(inserted(), w / "data.npz"), w / "data.npz"),
        "qat.onnx",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_verb_makes_the_file_that_its_command_makes(name, work, tmp_path):
    make, expected = MADE[name]
    make(work).save(tmp_path / "out.onnx")

    assert (tmp_path / "out.onnx").read_bytes() == (work / expected).read_bytes()


def test_import_table_makes_the_file_that_its_command_makes(work, tmp_path):
    table = work / "chip" / "model_cali_table"
    words = ("--rules", RULE, "--set", "last.bits=4", "-o", tmp_path / "cli.onnx")
    run("import-table", table, LENET, *words)
    table_of(work).save(tmp_path / "python.onnx")

    assert (tmp_path / "python.onnx").read_bytes() == (tmp_path / "cli.onnx").read_bytes()


def test_strip_writes_what_its_command_writes(work, tmp_path):
    oq.strip(oq.load_model(work / "qat.onnx"), tmp_path / "chip")

    assert files(tmp_path / "chip") == files(work / "chip")


@pytest.mark.parametrize("name", ["onnxruntime", "qoperator"])
def test_export_makes_the_file_that_its_command_makes(name, tmp_path, work):
    run("insert", LENET, "--data", work / "data.npz", *NORM, "-o", tmp_path / "qdq.onnx")
    run("export", tmp_path / "qdq.onnx", "--format", name, "-o", tmp_path / "cli.onnx")
    oq.export(tmp_path / "qdq.onnx", format_name=name).save(tmp_path / "python.onnx")

    assert (tmp_path / "python.onnx").read_bytes() == (tmp_path / "cli.onnx").read_bytes()


def test_equalize_makes_the_file_that_its_command_makes(tmp_path):
    run("equalize", ROOT / "models" / "mobilenet-digits.onnx", "-o", tmp_path / "cli.onnx")
    oq.equalize(ROOT / "models" / "mobilenet-digits.onnx").model.save(tmp_path / "python.onnx")

    assert (tmp_path / "python.onnx").read_bytes() == (tmp_path / "cli.onnx").read_bytes()


def test_analyze_finds_what_its_command_finds(work):
    words = ("--samples", 20, "--seed", 2, "--threads", 1, "--json")
    told = json.loads(run("analyze", work / "qat.onnx", work / "data.npz", *words))
    found = oq.analyze(work / "qat.onnx", work / "data.npz", samples=20, seed=2, threads=1)

    layers = {figures.layer.node: figures.alone for figures in found.layers}
    assert {layer["node"]: layer["alone"] for layer in told["layers"]} == layers
    assert len(layers) == 5


def test_evaluate_gives_the_figures_of_its_command(work):
    model, data = work / "qat.onnx", work / "data.npz"
    words = ("--threads", 1, "--against", LENET, "--json")
    said = json.loads(run("evaluate", model, data, *words))
    with np.load(data) as arrays:
        held = dict(arrays)
    batches = [{k: v[part] for k, v in held.items()} for part in (slice(50), slice(50, None))]
    for source in (data, held, batches):
        found = oq.evaluate(oq.load_model(model), source, against=LENET, threads=1)

        assert found.metrics == said["metrics"]
        assert found.reference == said["reference"]
        assert (found.agreement, found.max_abs_diff) == (said["agreement"], said["max_abs_diff"])


def test_check_finds_what_its_command_finds():
    said = json.loads(run("check", LENET, "--rules", RULE, "--train", "--json"))
    found = oq.check(LENET, rules=RULE, train=True)

    assert json.loads(found.plan.to_json()) == {
        k: said[k] for k in json.loads(found.plan.to_json())
    }
    assert (list(found.names), list(found.untrainable)) == (said["names"], said["untrainable"])
    assert found.passed


def test_a_verb_changes_no_model_that_it_is_given(work):
    floats = oq.load_model(LENET)
    before = floats.to_proto().SerializeToString(deterministic=True)
    model = oq.insert(floats, rules=RULE, data=work / "data.npz", settings=PIXELS)
    made = model.to_proto().SerializeToString(deterministic=True)
    oq.evaluate(model, work / "data.npz", settings=oq.Settings(label="label"))
    oq.evaluate(floats, work / "data.npz", settings=PIXELS)

    assert floats.to_proto().SerializeToString(deterministic=True) == before
    assert model.to_proto().SerializeToString(deterministic=True) == made


def test_a_model_remembers_what_an_open_data_set_was_opened_with(work):
    model = oq.load_model(LENET)
    pixels = oq.Preprocessing(mean=(128.0,), scale=(0.0078125,))
    with oq.open_data(work / "data.npz", oq.input_specs(model), preprocessing=pixels) as data:
        found = oq.insert(model, rules=RULE, data=data)
        with pytest.raises(oq.OnnxQatError, match="is already open"):
            oq.calibrate(found, data, settings=PIXELS)
    expected = oq.insert(model, rules=RULE, data=work / "data.npz", settings=PIXELS)

    assert found.to_proto() == expected.to_proto()


def test_what_a_console_shows_is_one_line(work):
    found = oq.evaluate(LENET, work / "data.npz", settings=PIXELS, threads=1)
    top1 = 100 * found.metrics["top1"]

    assert repr(found).startswith(f"Evaluation(120 samples, top1 {top1:.2f} %")
    assert repr(oq.check(LENET, rules=RULE)).startswith("Check(rule 'sophgo-bm1684x', ")
    assert repr(inserted().plan).startswith("QuantPlan(rule 'sophgo-bm1684x', ")


# --- the page about Python ----------------------------------------------------------------------


def script():
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return found


def test_the_script_of_the_page_runs_and_its_file_has_the_same_figures(tmp_path):
    (tmp_path / "models").mkdir()
    for split in ("train", "test"):
        write_digits(tmp_path / f"models/digits-{split}.npz", 120, split=split)
    shutil.copy(LENET, tmp_path / "models")
    words = [sys.executable, "-c", script()]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    test = tmp_path / "models" / "digits-test.npz"
    said = json.loads(run("evaluate", tmp_path / "lenet5.tuned.onnx", test, "--json"))

    assert len(script().splitlines()) < 15
    assert result.stdout == f"{said['metrics']}\n"
    assert {path.name for path in (tmp_path / "chip").iterdir()} == {
        "model.onnx",
        "model_cali_table",
        "compile.sh",
    }


@pytest.mark.slow
def test_the_script_of_the_page_is_typed(tmp_path):
    (tmp_path / "script.py").write_text(script())
    words = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "script.py"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout
