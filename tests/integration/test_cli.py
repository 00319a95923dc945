"""The main job by the command line, on the bundled models and digits."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from onnxqat.cli import main
from onnxqat.errors import OnnxQatError
from onnxqat.quantized import load_model
from onnxqat.rules import HardwareRule, load_rule
from onnxqat.train import validation
from tests.contents import content
from tests.digits import write_digits
from tests.networks import attention
from tests.oracles import run_ort

MODELS = Path(__file__).parents[2] / "models"
LENET, MOBILENET = MODELS / "lenet5.onnx", MODELS / "mobilenet-digits.onnx"
NORM = ("--mean", 128, "--scale", 0.0078125)
RULE = ("--rules", "sophgo-bm1684x")
W4A4_TEXTS = ("weight.bits=4", "activation.bits=4", "first.bits=8", "last.bits=8")
W4A4 = tuple(w for text in (*W4A4_TEXTS, "weight.axis=none") for w in ("--set", text))
TUNE = ("--epochs", 1, "--batch-size", 16, "--threads", 1)


def invoke(*words: Any) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*words: Any) -> str:
    """Run a command that must succeed; return its stdout."""
    result = invoke(*words)

    assert result.exit_code == 0, result.output
    return result.stdout


def document(*words: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def error(*words: Any, code: int = 1) -> str:
    """Run a command that must fail with one line on stderr; return that line."""
    result = invoke(*words)

    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def process(*words: Any) -> list[str]:
    code = "from onnxqat.cli import main; main()"
    return [sys.executable, "-c", code, *(str(word) for word in words)]


def outputs(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32)
    return run_ort(onnx.load(str(path)), {"input": (pixels - 128) * np.float32(0.0078125)})[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the models, 300 digits to train on and 200 to test, and Q/DQ models."""
    folder = tmp_path_factory.mktemp("work")
    for split, count in (("train", 300), ("test", 200)):
        write_digits(folder / f"{split}.npz", count, split=split)
    train = folder / "train.npz"
    run("insert", LENET, *RULE, "-o", folder / "empty.onnx")
    run("insert", LENET, *RULE, "--data", train, *NORM, "-o", folder / "lenet.qdq.onnx")
    run("insert", MOBILENET, *RULE, *W4A4, "--data", train, *NORM, "-o", folder / "w4.qdq.onnx")
    run("finetune", folder / "w4.qdq.onnx", train, *TUNE, "-o", folder / "w4.qat.onnx")
    run("strip", folder / "w4.qat.onnx", "-o", folder / "chip")
    return folder


@pytest.fixture(scope="module")
def digits(work):
    with np.load(work / "test.npz") as arrays:
        return dict(arrays)


# --- the main job -----------------------------------------------------------------------------


def test_insert_without_data_is_a_complete_command(tmp_path):
    shutil.copy(LENET, tmp_path / "model.onnx")
    text = run("insert", tmp_path / "model.onnx")

    assert "onnxruntime-cpu" in text
    assert load_model(tmp_path / "model.qdq.onnx").state == "uncalibrated"


def test_plan_only_prints_every_point_and_writes_nothing(tmp_path):
    shutil.copy(LENET, tmp_path / "model.onnx")
    text = run("insert", tmp_path / "model.onnx", *RULE, "--plan-only")
    found = document("insert", tmp_path / "model.onnx", *RULE, "--plan-only")

    assert found["schema"] == "onnxqat.insert/1"
    assert found["rule"] == "sophgo-bm1684x"
    assert len(text.splitlines()) == len(found["points"]) + len(found["skips"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_per_tensor_override_reaches_the_scales(work, tmp_path):
    words = ("insert", LENET, "--data", work / "train.npz", *NORM, "--set", "weight.axis=none")
    found = document(*words, "-o", tmp_path / "out.onnx")
    model = load_model(tmp_path / "out.onnx")
    weights = [p for p in model.plan.points if p.role == "weight"]

    assert (found["state"], found["output"]) == ("calibrated", str(tmp_path / "out.onnx"))
    assert weights
    assert all(model.params[p.parameters].scale.shape == () for p in weights)


def test_calibrating_later_gives_the_same_file_as_insert_with_data(work, tmp_path):
    words = (
        work / "empty.onnx",
        work / "train.npz",
        *NORM,
        "--samples",
        100,
        "--observer",
        "minmax",
    )
    found = document("calibrate", *words, "-o", tmp_path / "later.onnx")
    at_once = ("--data", work / "train.npz", *NORM, "--samples", 100, "--observer", "minmax")
    run("insert", LENET, *RULE, *at_once, "-o", tmp_path / "at-once.onnx")

    assert found == {
        "schema": "onnxqat.calibrate/1",
        "observer": "minmax",
        "samples": 100,
        "output": str(tmp_path / "later.onnx"),
    }
    assert content(tmp_path / "later.onnx") == content(tmp_path / "at-once.onnx")


def test_calibrate_says_how_many_samples_there_were(work, tmp_path):
    words = (work / "empty.onnx", work / "train.npz", *NORM, "--samples", 5000)

    assert document("calibrate", *words, "-o", tmp_path / "out.onnx")["samples"] == 300


def test_finetune_reports_both_states(work, tmp_path):
    words = ("finetune", work / "w4.qdq.onnx", work / "train.npz", *TUNE)
    found = document(*words, "--val-data", work / "test.npz", "-o", tmp_path / "out.onnx")
    again = document("evaluate", tmp_path / "out.onnx", work / "test.npz", "--threads", 1)

    assert found["schema"] == "onnxqat.finetune/1"
    assert (found["epochs"], found["best_epoch"], found["samples"]) == (1, 1, 200)
    assert found["before"].keys() == found["after"].keys() == {"top1", "top5", "agreement"}
    assert found["after"]["top1"] > found["before"]["top1"]
    assert found["seconds"] > 0
    assert found["output"] == str(tmp_path / "out.onnx")
    assert again["metrics"]["top1"] == found["after"]["top1"]


def test_finetune_calibrates_first_if_needed(work, tmp_path):
    words = (work / "empty.onnx", work / "train.npz", *NORM, *TUNE, "--method", "ste")
    run("finetune", *words, "--threads", 2, "-o", tmp_path / "out.onnx")

    assert load_model(tmp_path / "out.onnx").state in ("calibrated", "finetuned")


def test_another_teacher_is_learnt_from(work, tmp_path):
    words = ("finetune", work / "w4.qdq.onnx", work / "train.npz", *TUNE)
    for name, teacher in (("own", MOBILENET), ("other", LENET)):
        run(*words, "--teacher", teacher, "-o", tmp_path / f"{name}.onnx")
    made = {p.stem: content(p) for p in tmp_path.iterdir()}

    assert made["own"] == content(work / "w4.qat.onnx")
    assert made["other"] != made["own"]


def test_evaluate_has_the_keys_of_its_schema(work, digits):
    against = ("--against", MOBILENET, "--threads", 1)
    plain = document("evaluate", work / "w4.qat.onnx", work / "test.npz", "--threads", 1)
    found = document("evaluate", work / "w4.qat.onnx", work / "test.npz", *against)
    expected = outputs(work / "w4.qat.onnx", digits["images"])
    top1 = (expected.argmax(axis=1) == digits["label"]).mean()

    assert plain.keys() == {"schema", "samples", "mode", "metrics"}
    assert found.keys() == plain.keys() | {"reference", "agreement", "max_abs_diff", "outputs"}
    assert found["outputs"][0]["agreement"] == found["agreement"]
    assert (found["schema"], found["samples"], found["mode"]) == ("onnxqat.evaluate/1", 200, "qdq")
    assert found["metrics"]["top1"] == plain["metrics"]["top1"] == top1
    assert found["reference"]["top1"] > 0.9
    assert found["max_abs_diff"] > 0


@pytest.mark.parametrize(("limit", "code"), [(1.0, 0), (-1.0, 1)])
def test_max_drop_decides_the_exit_code(work, limit, code):
    words = ("evaluate", work / "w4.qat.onnx", work / "test.npz", "--against", MOBILENET)
    result = invoke(*words, "--max-drop", limit, "--json")

    assert result.exit_code == code
    assert json.loads(result.stdout)["samples"] == 200
    assert ("top1 dropped by" in result.stderr) == bool(code)


def test_strip_names_its_files(work, tmp_path):
    found = document("strip", work / "w4.qat.onnx", "-o", tmp_path / "a" / "chip")

    assert found["schema"] == "onnxqat.strip/1"
    assert found["files"].keys() == {"model", "table", "compile.sh"}
    assert sorted(Path(p).name for p in found["files"].values()) == [
        "compile.sh",
        "model.onnx",
        "model_cali_table",
    ]
    assert all(Path(p).is_file() for p in found["files"].values())


def test_table_and_stripped_model_give_back_the_fine_tuned_one(work, digits, tmp_path):
    chip, again = work / "chip", tmp_path / "again.onnx"
    table = (chip / "model_cali_table", chip / "model.onnx")
    imported = document("import-table", *table, *RULE, *W4A4, "-o", again)
    found = document("evaluate", again, work / "test.npz", *NORM, "--against", work / "w4.qat.onnx")

    assert imported.keys() == {"schema", "parameters", "output"}
    assert (found["max_abs_diff"], found["agreement"]) == (0, 1)
    np.testing.assert_array_equal(
        outputs(again, digits["images"]), outputs(work / "w4.qat.onnx", digits["images"])
    )


def test_widths_the_chip_lacks_are_said_to_be_for_study(tmp_path, caplog):
    run("insert", LENET, *RULE, *W4A4, "-o", tmp_path / "w4.onnx")

    assert (
        "4 bits for weights are for study only: rule sophgo-bm1684x supports only 8 bits."
        in caplog.messages
    )
    assert (
        "4 bits for activations are for study only: rule sophgo-bm1684x supports only 8 bits."
        in caplog.messages
    )


def test_export_is_small_and_predicts_the_same(work, digits, tmp_path):
    exported = document(
        "export", work / "lenet.qdq.onnx", "--format", "onnxruntime", "-o", tmp_path / "int8.onnx"
    )
    images = digits["images"]
    actual = outputs(tmp_path / "int8.onnx", images).argmax(axis=1)
    expected = outputs(work / "lenet.qdq.onnx", images).argmax(axis=1)

    assert exported["bytes"] == (tmp_path / "int8.onnx").stat().st_size
    assert exported["bytes"] < 0.3 * LENET.stat().st_size
    assert (actual == expected).mean() >= 0.995  # they differ by the rounding of the biases


def test_the_same_seed_gives_the_same_bytes(work, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = ("--data", work / "train.npz", *NORM, "--samples", 64, "--seed", seed)
        words += ("--set", "weight.bits=2")  # so coarse that training always helps
        run("insert", LENET, *RULE, *W4A4, *words, "-o", tmp_path / f"{name}.qdq.onnx")
        words = (work / "train.npz", *TUNE, "--seed", seed, "--augment", "crop")
        run("finetune", tmp_path / f"{name}.qdq.onnx", *words)
        run("strip", tmp_path / f"{name}.qat.onnx", "-o", tmp_path / name)

    def files(name):
        return [
            *(tmp_path / f"{name}.{state}.onnx" for state in ("qdq", "qat")),
            *sorted((tmp_path / name).glob("model*")),
        ]

    same = [a.read_bytes() == b.read_bytes() for a, b in zip(files("a"), files("b"), strict=True)]
    other = [a.read_bytes() == c.read_bytes() for a, c in zip(files("a"), files("c"), strict=True)]
    assert all(same)
    assert not any(other)


def test_stdout_is_one_json_document_whatever_libraries_log(work, tmp_path):
    words = ("finetune", work / "lenet.qdq.onnx", work / "train.npz", *TUNE, "--json")
    command = process("-v", *words, "-o", tmp_path / "out.onnx")
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    assert json.loads(result.stdout)["output"] == str(tmp_path / "out.onnx")
    epochs = [line for line in result.stderr.splitlines() if line.startswith("epoch 1/1")]
    assert len(epochs) == 1
    assert epochs[0].endswith("s left")
    assert len(epochs[0]) > 80


def test_rules_are_listed_and_shown():
    found = document("rules", "list")
    names = [rule["name"] for rule in found["rules"]]

    assert found["schema"] == "onnxqat.rules/1"
    assert {"onnxruntime-cpu", "sophgo-bm1684x", "sophgo-bm1690"} <= set(names)
    assert all(rule.keys() == {"name", "vendor", "summary"} for rule in found["rules"])
    assert run("rules", "show", "sophgo-bm1684x").startswith("sophgo-bm1684x: ")


def test_diverged_training_keeps_the_best_state_and_fails(work, tmp_path, monkeypatch):
    from onnxqat.train import engine

    monkeypatch.setattr(engine.StepSession, "run", lambda *_: float("nan"))
    words = ("finetune", work / "w4.qdq.onnx", work / "train.npz", *TUNE)
    result = invoke(*words, "-o", tmp_path / "out.onnx", "--json")

    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Written to {tmp_path / 'out.onnx'}." in result.stderr
    assert content(tmp_path / "out.onnx") == content(work / "w4.qdq.onnx")


# --- what is said once ------------------------------------------------------------------------


def test_options_given_at_insert_are_used_later(work):
    stored = document("evaluate", work / "lenet.qdq.onnx", work / "test.npz", "--threads", 2)
    said = ("evaluate", work / "lenet.qdq.onnx", work / "test.npz", *NORM, "--threads", 2)

    assert stored == document(*said)
    assert stored["metrics"]["top1"] > 0.9


def test_options_without_data_are_stored_too(work, tmp_path):
    run("insert", LENET, *RULE, *NORM, "-o", tmp_path / "empty.onnx")
    run("calibrate", tmp_path / "empty.onnx", work / "train.npz", "-o", tmp_path / "out.onnx")

    assert content(tmp_path / "out.onnx") == content(work / "lenet.qdq.onnx")


def test_reference_brings_its_settings_to_a_float_model(work):
    words = (LENET, work / "test.npz", "--against", work / "lenet.qdq.onnx")

    assert document("evaluate", *words)["metrics"]["top1"] > 0.9


def test_layout_belongs_to_the_data(work, digits, tmp_path):
    channels_first = digits["images"].transpose(0, 3, 1, 2)
    np.savez(tmp_path / "nchw.npz", images=channels_first, label=digits["label"])
    data = ("--data", work / "train.npz", *NORM, "--layout", "nhwc")
    run("insert", LENET, *RULE, *data, "-o", tmp_path / "out.onnx")
    found = [
        document("evaluate", tmp_path / "out.onnx", source, "--layout", layout, "--threads", 1)
        for source, layout in ((work / "test.npz", "nhwc"), (tmp_path / "nchw.npz", "nchw"))
    ]

    assert found[0] == found[1]


# --- image folders ----------------------------------------------------------------------------


def image_folder(folder: Path, digits: Any, classes: list[str]) -> Path:
    for index, (image, label) in enumerate(zip(digits["images"], digits["label"], strict=True)):
        target = folder / classes[label] / f"{index:03}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(target)
    return folder


def test_image_folder_gives_the_figures_of_the_arrays(work, digits, tmp_path):
    folder = image_folder(tmp_path / "numbers", digits, [str(n) for n in range(10)])
    words = ("evaluate", work / "lenet.qdq.onnx")
    from_images = document(*words, folder, "--threads", 1, "--batch-size", 200)

    assert from_images == document(*words, work / "test.npz", "--threads", 1, "--batch-size", 200)


def test_other_class_folders_than_stored_are_an_error(digits, tmp_path):
    names = [f"digit-{n}" for n in range(10)]
    first = image_folder(tmp_path / "first", digits, names)
    other = image_folder(tmp_path / "other", digits, [*names[:9], "nine"])
    model = tmp_path / "out.onnx"
    run("insert", LENET, *RULE, "--data", first, *NORM, "-o", model)
    message = error("evaluate", model, other)

    assert document("evaluate", model, first)["samples"] == 200
    assert str(other / "nine") in message
    assert "not in the list of 10 classes; the nearest name is 'digit-9'" in message


# --- wrong input ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(work, tmp_path_factory):
    """A folder of everything that is wrong with something."""
    folder = tmp_path_factory.mktemp("wrong")
    with np.load(work / "train.npz") as arrays:
        images, labels = arrays["images"], arrays["label"]
    floats = images.astype(np.float32)
    floats[7, 3, 3, 0] = np.nan
    np.savez(folder / "plain.npz", images=images)
    np.savez(folder / "nan.npz", images=floats, label=labels)
    np.savez(folder / "shape.npz", images=images[:, :20], label=labels)
    np.savez(folder / "labels.npz", images=images, label=labels + 5)
    (folder / "text.onnx").write_text("not a model\n")
    (folder / "text").write_text("text\n")
    table = (work / "chip" / "model_cali_table").read_text().splitlines(keepends=True)
    (folder / "malformed_table").write_text("".join([*table[:2], "name 1 2\n", *table[2:]]))
    model = onnx.load(str(LENET))
    model.ir_version = 99
    onnx.save(model, str(folder / "ir.onnx"))
    model.ir_version = 8
    model.opset_import[0].version = 99
    onnx.save(model, str(folder / "opset.onnx"))
    model.opset_import[0].version = 17
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(folder / "batch-1.onnx"))
    onnx.save(attention(), str(folder / "attention.onnx"))
    broken = onnx.load(str(work / "lenet.qdq.onnx"))
    for entry in broken.metadata_props:
        if entry.key == "onnxqat.data":
            entry.value = '{"mean": "many"}'
    onnx.save(broken, str(folder / "settings.onnx"))
    return folder


OUT = "-o {out}/out.onnx"
WRONG = [
    (f"insert {{wrong}}/none.onnx {OUT}", 1, "none.onnx: no such file"),
    (f"insert {{wrong}}/text.onnx {OUT}", 1, "not an ONNX file"),
    (f"insert {{wrong}}/ir.onnx {OUT}", 1, "IR version 99 is newer"),
    (f"insert {{wrong}}/opset.onnx {OUT}", 1, "opset 99 is not in the range"),
    (f"insert {{work}}/lenet.qdq.onnx {OUT}", 1, "already contains Q/DQ pairs"),
    (f"insert {{lenet}} --data {{wrong}}/none.npz {OUT}", 1, "none.npz: no such file or directory"),
    (f"insert {{lenet}} --data {{wrong}}/nan.npz {OUT}", 1, "sample 7 of array 'images' holds NaN"),
    (f"insert {{lenet}} --rules none {OUT}", 1, "Unknown rule 'none'"),
    (f"insert {{lenet}} --set op:Cnv.bits=4 {OUT}", 1, "'op:Cnv.bits=4' matches nothing"),
    (f"insert {{lenet}} --set weight.bits=1 {OUT}", 1, "Widths are 2 to 8"),
    (f"insert {{lenet}} --crop 9,9 --resize-dims 8,8 {OUT}", 1, "--crop: (9, 9) does not fit"),
    (f"insert {{lenet}} --mean 1,x {OUT}", 2, "'1,x' is not a list of numbers"),
    (f"insert {{lenet}} --mean nan {OUT}", 2, "not finite"),
    (f"insert {{lenet}} --resize-dims nan,8 {OUT}", 2, "'nan,8' is not height,width"),
    (f"insert {{lenet}} --crop 0,8 {OUT}", 2, "'0,8' is not a size"),
    (f"insert {{lenet}} --input images {OUT}", 2, "not of the form NAME=ARRAY"),
    (f"insert {{lenet}} --observer mse {OUT}", 2, "--observer needs --data"),
    (f"insert {{lenet}} --layout nchw {OUT}", 2, "--layout needs --data"),
    ("insert {lenet} -o {wrong}/text/out.onnx", 1, "directory '{wrong}/text' does not exist"),
    ("insert {lenet} -o {work}/empty.onnx", 1, "already exists. Pass --force"),
    (f"insert {{lenet}} {OUT} --colour red", 2, "--colour"),
    ("insert", 2, "Missing argument 'MODEL'. See 'main insert --help'"),
    ("dissolve {lenet}", 2, "No such command 'dissolve'"),
    (f"calibrate {{lenet}} {{data}} {OUT}", 1, "contains no quantization plan"),
    (
        f"calibrate {{work}}/empty.onnx {{wrong}}/shape.npz {OUT}",
        1,
        "do not fit model input 'input'",
    ),
    (f"calibrate {{work}}/w4.qat.onnx {{data}} {OUT}", 1, "is fine-tuned"),
    (f"calibrate {{wrong}}/settings.onnx {{data}} {OUT}", 1, "'onnxqat.data' cannot be read"),
    (f"finetune {{lenet}} {{data}} {OUT}", 1, "contains no quantization plan"),
    (f"finetune {{q}} {{wrong}}/plain.npz --loss cross-entropy {OUT}", 1, "needs labels"),
    (f"finetune {{q}} {{wrong}}/labels.npz {OUT}", 1, "the model has 10 classes, 0 to 9"),
    (f"finetune {{q}} {{data}} --loss entropy {OUT}", 1, "Unknown loss 'entropy'"),
    (f"finetune {{q}} {{data}} --batch-size 999 {OUT}", 1, "too few for batches of 999"),
    (f"finetune {{q}} {{data}} --val-data {{wrong}}/none.npz {OUT}", 1, "none.npz: no such file"),
    (f"finetune {{q}} {{data}} --teacher {{q}} {OUT}", 1, "Give a float model as --teacher"),
    (f"finetune {{q}} {{data}} --teacher {{wrong}}/none.onnx {OUT}", 1, "none.onnx: no such file"),
    (f"finetune {{q}} {{data}} --augment flop {OUT}", 2, "'flop' is not one of flip, crop"),
    (f"finetune {{work}}/w4.qat.onnx {{data}} {OUT}", 1, "--teacher"),
    ("evaluate {q} {data} --mean 1", 1, "--mean is 1.0 now, but was 128.0 when"),
    ("evaluate {q} {data} --max-drop 0.1", 2, "--max-drop needs --against"),
    (
        "evaluate {q} {wrong}/plain.npz --against {lenet} --max-drop 0.1",
        1,
        "has no labels, which are needed",
    ),
    ("evaluate {q} {wrong}/labels.npz", 1, "the model has 10 classes, 0 to 9"),
    ("evaluate {q} {data} --against {wrong}/none.onnx", 1, "none.onnx: no such file"),
    ("evaluate {q} {data} --against {wrong}/attention.onnx", 1, "does not run on the data"),
    ("evaluate {wrong}/batch-1.onnx {data} --batch-size 3", 1, "takes batches of 1 only"),
    ("strip {lenet} -o {out}/chip", 1, "contains no quantization plan"),
    ("strip {work}/empty.onnx -o {out}/chip", 1, "is not calibrated"),
    ("evaluate {work}/empty.onnx {data}", 1, "is not calibrated"),
    ("evaluate {lenet} {data} --against {work}/empty.onnx", 1, "is not calibrated"),
    ("strip {q} -o {wrong}/text", 1, "cannot be created"),
    ("strip {q} -o {wrong}/text/chip", 1, "cannot be created"),
    ("strip {q} -o {work}/chip", 1, "already exists. Pass --force"),
    (f"import-table {{wrong}}/none {{lenet}} --rules {RULE[1]} {OUT}", 1, "none: no such file"),
    (f"import-table {{table}} {{lenet}} --rules {RULE[1]} {OUT}", 1, "names that the model needs"),
    (f"import-table {{table}} {{lenet}} {OUT}", 1, "'onnxruntime-cpu' has no table format"),
    (
        f"import-table {{table}} {{lenet}} --format sophgo {OUT}",
        1,
        "but is asymmetric in the plan",
    ),
    (f"import-table {{table}} {{lenet}} --format tea {OUT}", 1, "Table 'tea' is unknown"),
    ("strip {q} -o {out}/chip --format tea", 1, "Table 'tea' is unknown"),
    (
        f"import-table {{wrong}}/malformed_table {{lenet}} --rules {RULE[1]} {OUT}",
        1,
        "malformed_table:3: 3 fields, expected 4",
    ),
]


@pytest.mark.parametrize(("command", "code", "message"), WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(work, wrong, tmp_path, command, code, message):
    places = {
        "work": work,
        "wrong": wrong,
        "out": tmp_path,
        "lenet": LENET,
        "q": work / "lenet.qdq.onnx",
        "data": work / "train.npz",
        "table": work / "chip" / "model_cali_table",
    }
    before = {p: p.stat().st_mtime_ns for f in (work, wrong) for p in f.rglob("*") if p.is_file()}
    found = error(*command.format(**places).split(), code=code)
    after = {p: p.stat().st_mtime_ns for f in (work, wrong) for p in f.rglob("*") if p.is_file()}

    assert message.format(**places) in found
    assert list(tmp_path.iterdir()) == []
    assert before == after


def test_force_replaces(work, tmp_path):
    (tmp_path / "out.onnx").write_text("old")
    run("insert", LENET, "-o", tmp_path / "out.onnx", "--force")

    assert load_model(tmp_path / "out.onnx").plan.rule == "onnxruntime-cpu"


def test_twice_verbose_shows_the_traceback(tmp_path):
    words = ("insert", str(tmp_path / "none.onnx"))
    loud, usual = (CliRunner().invoke(main, (*more, *words)) for more in (("-vv",), ()))

    assert isinstance(loud.exception, OnnxQatError)  # Python prints it
    assert isinstance(usual.exception, SystemExit)


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (["rules", "list"], "WARNING"),
        (["-v", "rules", "list"], "INFO"),
        (["rules", "list", "-v"], "INFO"),
        (["-v", "rules", "list", "-v"], "DEBUG"),
        (["rules", "list", "-q"], "ERROR"),
        (["-q", "rules", "list", "-vv"], "INFO"),
    ],
)
def test_verbosity_counts_before_and_behind_the_command(words, level):
    run(*words)

    assert logging.getLogger().level == logging.getLevelNamesMapping()[level]
    run("rules", "list")


def test_the_environment_sets_the_usual_level(monkeypatch):
    monkeypatch.setenv("ONNXQAT_LOG", "debug")
    run("rules", "list", "-q")
    assert logging.getLogger().level == logging.INFO

    monkeypatch.setenv("ONNXQAT_LOG", "loud")
    said = error("rules", "list", code=2)
    assert "ONNXQAT_LOG: 'loud' is not one of error, warning, info, debug." in said
    monkeypatch.delenv("ONNXQAT_LOG")
    run("rules", "list")


def test_quiet_hides_what_is_said_on_the_way(tmp_path, caplog):
    words = ("insert", LENET, *RULE, "--set", "weight.bits=5")
    loud = run(*words, "-o", tmp_path / "0.onnx")
    quiet = subprocess.run(
        process(*words, "-q", "-o", tmp_path / "1.onnx"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "5 bits" in caplog.text
    assert quiet.stderr == ""
    assert loud.replace("0.onnx", "1.onnx") == quiet.stdout


def test_rules_show_json_is_the_rule():
    found = document("rules", "show", "ncnn")

    assert found.pop("schema") == "onnxqat.rule/1"
    assert msgspec.convert(found, HardwareRule, strict=False) == load_rule("ncnn")


def test_how_right_the_float_model_is_on_the_labels_is_said_without_v():
    run("-vv", "rules", "list")
    assert validation.logger.isEnabledFor(logging.DEBUG)

    run("rules", "list")
    assert validation.logger.isEnabledFor(logging.INFO)
    assert not validation.logger.isEnabledFor(logging.DEBUG)
