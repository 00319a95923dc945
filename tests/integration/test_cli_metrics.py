"""Metrics on the command line: built-in ones, the user's own, and the choice of the best epoch."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from onnxqat.quantized import load_model
from tests.integration.test_cli import LENET, MODELS, NORM, document, error, run
from tests.oracles import run_ort

SPANS = MODELS / "spans.onnx"
FEW = ("--samples", 32, "--threads", 1)
TRUTH = ("--truth", "start=starts", "--truth", "end=ends")
MINE = """
import numpy as np

def margin(outputs, data):
    found = []
    for values, batch in zip(outputs, data):
        ranked = np.sort(values["output"], axis=1)
        found += (ranked[:, -1] - ranked[:, -2]).tolist()
    return {"margin": np.mean(found), "least": min(found)}

def fails(outputs, data):
    raise ValueError("of mine")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    for source, name, count in (("digits-train", "digits", 96), ("spans-train", "texts", 64)):
        with np.load(MODELS / f"{source}.npz") as arrays:
            np.savez(folder / f"{name}.npz", **{n: a[:count] for n, a in arrays.items()})
    (folder / "margins.py").write_text(MINE)
    sets = ("--set", "weight.bits=3", "--set", "activation.bits=4")
    run(
        "insert",
        LENET,
        *sets,
        *NORM,
        "--data",
        folder / "digits.npz",
        *FEW,
        "-o",
        folder / "q.onnx",
    )
    run("insert", SPANS, *sets[:2], "--data", folder / "texts.npz", *FEW, "-o", folder / "s.onnx")
    return folder


def test_evaluate_prints_what_is_asked_for(work):
    words = ("evaluate", work / "q.onnx", work / "digits.npz", "--against", LENET)
    found = document(*words, "--metric", "sqnr", "--metric", "top5")
    table = run(*words, "--metric", "sqnr").splitlines()
    model, floats = load_model(work / "q.onnx"), load_model(LENET)
    with np.load(work / "digits.npz") as digits:
        x = (digits["images"].transpose(0, 3, 1, 2).astype(np.float32) - 128) / 128
    ours, theirs = (run_ort(m.to_proto(), {"input": x})[0] for m in (model, floats))
    sqnr = 20 * np.log10(np.linalg.norm(theirs) / np.linalg.norm(ours - theirs))

    assert found["metrics"].keys() == {"top1", "top5", "sqnr"}
    assert found["reference"].keys() == {"top1", "top5"}
    assert found["metrics"]["sqnr"] == pytest.approx(sqnr, abs=1e-3)
    assert f"{sqnr:.2f} dB" in next(line for line in table if line.startswith("sqnr"))


def test_a_function_of_the_user(work, monkeypatch):
    monkeypatch.chdir(work)
    words = ("evaluate", "q.onnx", "digits.npz", "--against", LENET)
    found = document(*words, "--metric", "margins:margin")

    assert found["metrics"]["margin"] > found["metrics"]["least"] >= 0
    assert found["reference"]["margin"] != found["metrics"]["margin"]
    assert "margins:fails: raised ValueError (of mine)" in error(
        *words, "--metric", "margins:fails"
    )


def test_answers_of_a_transformer(work):
    found = document("evaluate", SPANS, work / "texts.npz", "--metric", "f1", *TRUTH)
    with np.load(work / "texts.npz") as arrays:
        tokens, first, last = arrays["tokens"], arrays["starts"], arrays["ends"]
    start, end = run_ort(load_model(SPANS).to_proto(), {"tokens": tokens})
    pairs = [
        max(((i, j) for i in range(24) for j in range(i, 24)), key=lambda p: a[p[0]] + b[p[1]])
        for a, b in zip(start, end, strict=True)
    ]

    right = np.array(pairs) == np.stack([first, last], axis=1)
    assert found["metrics"]["exact_match"] == np.mean(right.all(axis=1))
    assert found["metrics"]["exact_match"] < found["metrics"]["f1"] < 1


def test_layers_are_ranked_by_what_a_metric_loses(work, monkeypatch):
    monkeypatch.chdir(work)
    texts = ("texts.npz", *TRUTH, "--metric", "f1", "--threads", 1)
    found = document("analyze", "s.onnx", *texts, "--samples", 64, "--batch-size", 64)
    whole = document("evaluate", "s.onnx", *texts, "--against", SPANS)
    digits = ("analyze", "q.onnx", "digits.npz", "--samples", 32, "--threads", 1)
    mine = run(*digits, "--metric", "margins:margin").splitlines()

    assert found["metric"] == "f1"
    lost = whole["reference"]["f1"] - whole["metrics"]["f1"]
    assert found["cost"] == pytest.approx(lost, abs=1e-9)
    assert any(line.startswith("margins:margin lost") for line in mine)
    assert "--metric sqnr: cannot be a cost" in error(*digits, "--metric", "sqnr")
    assert "unknown. The nearest: 'error'" in error(*digits, "--metric", "eror")


def test_the_best_epoch_is_chosen_by_a_metric(work, monkeypatch):
    monkeypatch.chdir(work)
    words = ("finetune", "q.onnx", "digits.npz", "--val-data", "digits.npz", "--threads", 1)
    found = document(*words, "--epochs", 2, "--select", "margins:margin", "-o", "m.onnx")
    check = document("evaluate", "m.onnx", "digits.npz", "--metric", "margins:margin")

    assert found["chosen_by"]["figure"] == "margins:margin"
    assert found["after"]["margin"] == pytest.approx(check["metrics"]["margin"], rel=1e-5)
    assert found["after"]["margin"] >= found["before"]["margin"]
    texts = document("finetune", "s.onnx", "texts.npz", "--val-data", "texts.npz", "--select", "f1",
                     *TRUTH, "--epochs", 1, "--threads", 1, "-o", "f.onnx")  # fmt: skip
    assert texts["after"]["f1"] >= texts["before"]["f1"]
    assert "the array of true values in" in error(
        *("finetune", "s.onnx", "texts.npz", "--select", "f1", "-o", "g.onnx")
    )


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A network that always finds the same two boxes, and three images with labels beside them."""
    folder = tmp_path_factory.mktemp("detector")
    found = np.zeros((1, 6, 126), np.float32)  # YOLOv8's form: two classes, an input of 64 x 96
    found[0, :, 0] = [48, 32, 48, 32, 0.9, 0]
    found[0, :, 7] = [24, 16, 24, 16, 0, 0.8]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("Mul", ["flat", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "found"], ["y"]),
    ]
    constants = {"shape": np.array([-1, 1, 1]), "zero": np.float32(0), "found": found}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 64, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 126])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "d.onnx")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(3):
        Image.new("RGB", (120, 50)).save(folder / "images" / f"{number}.png")
        lines = "0 0.5 0.5 0.5 0.5\n" + ("1 0.25 0.25 0.25 0.25\n" if number else "")
        (folder / "labels" / f"{number}.txt").write_text(lines)
    return folder


def test_map_of_a_detector(detector, caplog):
    pytest.importorskip("pycocotools")
    words = ("evaluate", detector / "d.onnx", detector / "images", "--metric", "map")
    with caplog.at_level("INFO"):
        found = document(*words)
    told = [record.message for record in caplog.records]

    assert "The outputs are decoded as yolov8, chosen by their shapes." in told
    assert document(*words, "--decode", "yolo11")["metrics"] == found["metrics"]
    # the second class: three found, the first of them, as sure as the others, in no label
    assert found["metrics"]["map50"] == pytest.approx((1 + 2 / 3) / 2, abs=0.01)
    assert "--decode yolox: does not fit outputs of the shapes (3, 6, 126)" in error(
        *words, "--decode", "yolox"
    )


def test_the_best_epoch_is_chosen_in_the_chip_s_integers(work):
    words = ("finetune", work / "q.onnx", work / "digits.npz", "--val-data", work / "digits.npz",
             "--threads", 1, "--epochs", 2)  # fmt: skip
    found = document(*words, "--select", "integer:top1", "-o", work / "i.onnx")
    integer = document("evaluate", work / "i.onnx", work / "digits.npz", "--mode", "integer")

    assert found["chosen_by"]["figure"] == "integer:top1"
    assert found["after"]["integer:top1"] == integer["metrics"]["top1"]
    assert found["after"]["integer:top1"] >= found["before"]["integer:top1"]
    assert "no figure 'integer:top7'" in error(
        *words, "--select", "integer:top7", "-o", work / "j.onnx"
    )


def test_the_best_epochs_are_kept_as_files(work):
    words = ("finetune", work / "q.onnx", work / "digits.npz", "--val-data", work / "digits.npz",
             "--threads", 1, "--epochs", 3, "--select", "agreement", "--log", work / "k.jsonl",
             "--keep-epochs", 2, "-o", work / "k.onnx")  # fmt: skip
    found = document(*words)
    rows = [json.loads(line) for line in (work / "k.jsonl").read_text().splitlines()]
    by_epoch = {
        row["epoch"]: row["metrics"]["agreement"]
        for row in rows
        if row.get("metrics") and row.get("epoch")
    }
    best = sorted(by_epoch, key=lambda epoch: -by_epoch[epoch])
    files = sorted(path.name for path in work.glob("k.epoch*.onnx"))

    assert len(by_epoch) == 3
    assert len(files) == len(found["epoch_files"]) == 2
    kept = [int(name.split("epoch")[1].split(".")[0]) for name in files]
    assert min(by_epoch[e] for e in kept) >= by_epoch[best[1]]
    for epoch in kept:
        words_of = ("evaluate", work / f"k.epoch{epoch}.onnx", work / "digits.npz")
        again = document(*words_of, "--against", LENET)
        assert again["agreement"] == pytest.approx(by_epoch[epoch], abs=1e-6)
    (work / "k.onnx").unlink()
    (work / "k.jsonl").unlink()
    assert "already exists. Pass --force" in error(*words)
