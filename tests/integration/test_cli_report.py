"""The command that writes a page about a model, on a bundled one."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib import resources

import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from tests.digits import write_digits
from tests.integration.test_cli import LENET, NORM, document, error, invoke, run
from tests.pages import Page

RULE = ("--rules", "sophgo-bm1684x")
SETS = ("--set", "weight.bits=2", "--set", "activation.bits=4")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with 120 digits, and a model inserted, equalized, tuned and analyzed on them."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(LENET, folder / "lenet5.onnx")
    data = write_digits(folder / "digits.npz", 120)
    calibrated = ("--data", data, "--samples", 40, *RULE, *SETS, *NORM)
    run("insert", LENET, *calibrated, "-o", folder / "plain.onnx")
    run("insert", LENET, *calibrated, "--equalize", "-o", folder / "repaired.onnx")
    words = ("--epochs", 2, "--log", folder / "run.jsonl", "--log-every", 2)
    run("finetune", folder / "repaired.onnx", data, *words, "-o", folder / "lenet5.qat.onnx")
    found = document("analyze", folder / "lenet5.qat.onnx", data, "--samples", 20)
    (folder / "analysis.json").write_text(json.dumps(found))
    return folder


def test_figures_are_those_of_evaluate(work, tmp_path):
    tuned, data = work / "lenet5.qat.onnx", work / "digits.npz"
    others = ("--beside", work / "plain.onnx", "--beside", work / "repaired.onnx")
    found = document("report", tuned, data, "--against", LENET, *others, "-o", tmp_path / "r.html")
    models = {one["kind"]: one for one in found["figures"][0]["models"]}
    files = {"post-training": "plain.onnx", "repaired": "repaired.onnx", "tuned": tuned.name}

    assert list(models) == ["float", "post-training", "repaired", "tuned", "integer"]
    for kind, file in files.items():
        alone = document("evaluate", work / file, data, "--against", LENET)
        expected = alone["metrics"] | {"agreement": alone["agreement"]}
        assert models[kind] == {"kind": kind, "file": file, "figures": expected, "note": ""}
    integer = document("evaluate", tuned, data, "--mode", "integer", "--against", LENET)
    assert models["integer"]["figures"] == integer["metrics"] | {"agreement": integer["agreement"]}
    floats = document("evaluate", LENET, data, *NORM)
    assert models["float"]["figures"] == floats["metrics"]
    rows = Page((tmp_path / "r.html").read_text(encoding="utf-8")).table("On 120 samples of digits")
    top1 = rows[0].index("top-1")
    assert [row[top1] for row in rows[1:]] == [
        f"{100 * one['figures']['top1']:.2f} %" for one in found["figures"][0]["models"]
    ]


def test_a_page_has_the_log_and_the_analysis(work, tmp_path):
    words = ("--log", work / "run.jsonl", "--analysis", work / "analysis.json")
    run("report", work / "lenet5.qat.onnx", *words, "-o", tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    titles = [chart.title for chart in page.charts]

    assert {"training loss, mean of 20 steps", "learning rate"} < set(titles)
    assert {"conv1.weight", "fc3.weight"} < set(titles)
    assert not any("--log run.jsonl" in line or "analyze" in line for line in page.commands)


def test_the_commands_of_a_page_make_the_file_again(work, tmp_path, monkeypatch):
    run("report", work / "lenet5.qat.onnx", "-o", tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    for name in ("digits.npz", "lenet5.onnx"):
        shutil.copy(work / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [row[1] for row in page.table("Stages")[1:]]
    assert [shlex.split(line)[1] for line in lines] == ["insert", "finetune"]
    for line in lines:
        program, *words = shlex.split(line)
        result = CliRunner().invoke(main, words)
        assert (program, result.exit_code) == ("onnxqat", 0), result.output

    made = (tmp_path / "lenet5.qat.onnx").read_bytes()
    assert made == (work / "lenet5.qat.onnx").read_bytes()


def test_integers_that_are_not_documented_are_said(work, tmp_path):
    data, qdq, rule = work / "digits.npz", tmp_path / "q.onnx", tmp_path / "rule.toml"
    bundled = resources.files("onnxqat").joinpath("rules/ncnn.toml").read_text(encoding="utf-8")
    rule.write_text(bundled.split("[arithmetic]")[0].replace('"ncnn"', '"mine"', 1))
    run("insert", LENET, "--rules", rule, *NORM, "--data", data, "--samples", 40, "-o", qdq)
    found = document("report", qdq, data, "-o", tmp_path / "r.html")
    *_, calibrated, integer = found["figures"][0]["models"]

    assert (calibrated["kind"], integer["kind"]) == ("post-training", "integer")
    assert integer["figures"] == {}
    assert integer["note"] in error("evaluate", qdq, data, "--mode", "integer")
    assert integer["note"] in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_the_default_output_lies_beside_the_model(work, tmp_path):
    shutil.copy(work / "plain.onnx", tmp_path / "m.onnx")
    found = document("report", tmp_path / "m.onnx")

    assert found["output"] == str(tmp_path / "m.html")
    assert (found["schema"], found["figures"]) == ("onnxqat.report/1", [])
    assert any("onnxqat finetune m.onnx digits.npz" in a["commands"] for a in found["advice"])
    assert "already exists" in error("report", tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lenet5.onnx",), "lenet5.onnx: contains no quantization plan"),
        (("plain.onnx", "--log", "digits.npz"), "digits.npz: line 1 does not belong to a log"),
        (("plain.onnx", "--log", "none"), "none: cannot be read"),
        (("plain.onnx", "--analysis", "run.jsonl"), "run.jsonl: is not an analysis"),
        (
            ("repaired.onnx", "--analysis", "analysis.json"),
            "belongs to another model than repaired",
        ),
        (("plain.onnx", "digits.npz", "--against", "plain.onnx"), "already contains Q/DQ pairs"),
    ],
)
def test_what_cannot_be_shown_is_one_line(work, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(work)

    assert message in error("report", *words, "-o", tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_models_beside_need_data(work):
    result = invoke("report", work / "plain.onnx", "--beside", work / "repaired.onnx")

    assert (result.exit_code, "need DATA" in result.stderr) == (2, True)
