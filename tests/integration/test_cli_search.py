"""The command that gives each weight a width, on a bundled model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.integration.test_cli import LENET, MODELS, NORM, document, error, run

QUICK = ("--samples", 16, "--threads", 1, "--seed", 3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a calibrated model, and digits that rank, and others that measure."""
    folder = tmp_path_factory.mktemp("search")
    with np.load(MODELS / "digits-train.npz") as digits:
        for name, part in (("train", slice(0, 64)), ("val", slice(64, 164))):
            np.savez(folder / f"{name}.npz", **{k: v[part] for k, v in digits.items()})
    run("insert", LENET, *NORM, "--set", "weight.axis=none", "--observer", "minmax",
        "--data", folder / "train.npz", "-o", folder / "q.onnx")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(work):
    words = ("search", work / "q.onnx", work / "train.npz", "--val-data", work / "val.npz")
    return document(*words, "--widths", "2,3,8", "--bits", 2.6, *QUICK, "-o", work / "mixed.toml")


def test_insert_gives_the_model_that_was_measured(found, work):
    run("insert", LENET, *NORM, "--overrides", work / "mixed.toml", "--observer", "minmax",
        "--data", work / "train.npz", "-o", work / "mixed.onnx")  # fmt: skip
    plan = document("insert", LENET, "--plan-only", "--overrides", work / "mixed.toml")
    bits = {p["tensor"]: p["spec"]["bits"] for p in plan["points"] if p["role"] == "weight"}
    size = sum(w["elements"] for w in found["weights"])
    figures = document("evaluate", work / "mixed.onnx", work / "val.npz", "--against", LENET)

    assert bits == {w["tensor"]: w["bits"] for w in found["weights"]}
    assert len(set(bits.values())) > 1
    assert {p["spec"]["axis"] for p in plan["points"]} == {None}
    assert found["bits"] == sum(w["bits"] * w["elements"] for w in found["weights"]) / size <= 2.6
    lost = figures["reference"]["top1"] - figures["metrics"]["top1"]
    assert found["points"] == pytest.approx(100 * lost, abs=1e-9)


def test_the_document_has_what_each_width_costs(found):
    assert found["schema"] == "onnxqat.search/1"
    assert (found["metric"], found["ranking"], found["samples"]) == ("top1", "error", 16)
    assert found["val_samples"] == 100
    assert [one["width"] for one in found["uniform"]] == [2, 3, 8]
    assert all(one["bits"] == one["width"] for one in found["uniform"])
    assert all(w["costs"].keys() == {"2", "3"} for w in found["weights"])
    assert found["points"] <= found["uniform"][0]["points"]
    assert found["overrides"][0] == "weight.axis=none"


def test_a_budget_of_accuracy_is_kept(work):
    out = run("search", work / "q.onnx", work / "train.npz", "--widths", "2,3,8", "--metric",
              "agreement", "--max-loss", 10, *QUICK)  # fmt: skip
    row = next(line for line in out.splitlines() if line.startswith("found"))
    average, points = float(row.split()[1]), float(row.split()[5])

    assert points <= 10
    assert 2 <= average < 8
    assert "16 to rank weights, 48 to measure models" in out
    assert "--set 'tensor:fc1\\.weight.bits=" in out


def test_what_is_missing_is_told(work):
    words = ("search", work / "q.onnx", work / "train.npz")

    assert "Give either --max-loss or --bits." in error(*words, code=2)
    assert "only weights of 8 bits" in error(*words, "--bits", 6)
    assert "'4;8' is not a list" in error(*words, "--bits", 6, "--widths", "4;8", code=2)
