"""The command that says where quantization hurts, on a bundled model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxqat.quantized import load_model
from tests.integration.test_cli import LENET, MODELS, NORM, document, error, invoke, run

SETS = ("--set", "weight.bits=3", "--set", "activation.bits=4", "--set", "weight.axis=none")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with 64 digits, with labels and without, and a model of few bits."""
    folder = tmp_path_factory.mktemp("analyze")
    with np.load(MODELS / "digits-train.npz") as digits:
        arrays = {name: values[:64] for name, values in digits.items()}
    np.savez(folder / "digits.npz", **arrays)
    arrays.pop("label")
    np.savez(folder / "unlabelled.npz", **arrays)
    run("insert", LENET, *SETS, *NORM, "--data", folder / "digits.npz", "-o", folder / "q.onnx")
    run("insert", LENET, *NORM, "-o", folder / "empty.onnx")
    return folder


@pytest.fixture(scope="module")
def found(work):
    words = ("analyze", work / "q.onnx", work / "digits.npz", "-o", work / "advice.toml")
    return document(*words, "--samples", 40, "--batch-size", 20, "--threads", 1)


def test_the_document_has_layers_points_outputs_and_advice(found, work):
    points = load_model(work / "q.onnx").plan.points
    alone = [layer["alone"] for layer in found["layers"]]
    advised = found["advice"]["layers"]

    assert found["schema"] == "onnxqat.analyze/1"
    assert (found["samples"], found["metric"], found["rule"]) == (40, "error", "onnxruntime-cpu")
    assert [p["tensor"] for p in found["points"]] == [p.tensor for p in points if p.role != "bias"]
    assert [b["tensor"] for b in found["biases"]] == [p.tensor for p in points if p.role == "bias"]
    assert [one["output"] for one in found["outputs"]] == ["output"]
    assert alone == sorted(alone, reverse=True)
    assert len(alone) == 5
    assert advised == [layer["node"] for layer in found["layers"]][: len(advised)]
    assert found["advice"]["cost"] < found["cost"]
    assert found["sessions"] >= 11 + len(advised) - 1
    assert (found["model"], found["state"], found["data"]) == (
        *("q.onnx", "calibrated", "digits.npz"),
    )


def test_histograms_are_those_of_the_worst(found):
    drawn = {p["tensor"]: p["histogram"] for p in found["points"] if p["histogram"]}
    ranked = sorted(found["points"], key=lambda p: p["alone_sqnr"])
    worst = {p["tensor"] for p in ranked[:10]}
    worst |= {name for one in found["layers"] for name in (*one["weights"], *one["inputs"])}
    weight = drawn["conv1.weight"]

    assert drawn.keys() == worst
    assert sum(weight["counts"]) == 6 * 25
    assert (weight["qmin"], weight["qmax"], weight["width"]) == (-4, 3, 1)


def test_insert_takes_the_file_that_is_advised(found, work):
    plan = document("insert", LENET, "--plan-only", "--overrides", work / "advice.toml")
    skipped = {skip["node"] for skip in plan["skips"]}
    bits = {p["spec"]["bits"] for p in plan["points"] if p["role"] == "weight"}

    assert set(found["advice"]["layers"]) <= skipped
    assert bits == {3}


def test_the_tables_are_ranked(found, work):
    result = run("analyze", work / "q.onnx", work / "digits.npz", "--samples", 40,
                 "--batch-size", 20, "--threads", 1)  # fmt: skip
    lines = result.splitlines()
    start = lines.index("the 5 of 5 layers that cost most:") + 2
    worst = min(found["points"], key=lambda p: p["alone_sqnr"])
    tensors = (
        next(i for i, line in enumerate(lines) if "with the largest error of their own" in line) + 2
    )

    assert [line.split()[0] for line in lines[start : start + 5]] == [
        layer["node"] for layer in found["layers"]
    ]
    assert lines[start].split()[2:4] == [f"{-10 * np.log10(found['layers'][0]['alone']):.1f}", "dB"]
    assert lines[tensors].split()[:2] == [worst["tensor"], worst["role"]]
    assert sum(line.startswith("  --set ") for line in lines) == len(found["advice"]["layers"])


def test_labels_are_asked_for_where_the_metric_needs_them(work):
    words = ("analyze", work / "q.onnx", work / "unlabelled.npz", "--metric", "top1")

    assert "--metric top1: needs class labels, and " in error(*words)
    found = document(*words[:2], work / "digits.npz", "--metric", "top1", "--samples", 20)
    assert found["metric"] == "top1"
    assert (20 * found["cost"]) % 1 == pytest.approx(0, abs=1e-9)


def test_another_float_model_and_an_uncalibrated_one_are_told(work):
    compared = document("analyze", work / "q.onnx", work / "digits.npz", "--against", LENET,
                        "--samples", 20)  # fmt: skip
    weights = {p["tensor"]: p for p in compared["points"] if p["role"] == "weight"}

    assert all(p["sqnr"] == p["alone_sqnr"] for p in weights.values())
    assert "is not calibrated" in error("analyze", work / "empty.onnx", work / "digits.npz")


def test_an_overrides_file_that_is_there_is_kept(work):
    path = work / "mine.toml"
    path.write_text("")
    words = ("analyze", work / "q.onnx", work / "digits.npz", "-o", path)

    assert "mine.toml" in error(*words)
    assert path.read_text() == ""
    assert json.loads(invoke(*words, "--force", "--json", "--samples", 20).stdout)["advice"][
        "output"
    ] == str(path)
