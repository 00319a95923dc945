"""The form of the check scripts: skipping, running another Python, comparing, the exit code."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxqat.formats import EXPORTS, FORMATS
from onnxqat.rules import bundled_rules
from tests.networks import convnet, quantized, samples

ROOT = Path(__file__).parents[2]
SCRIPTS, DOCS = ROOT / "scripts", ROOT / "docs"
PROVEN = r"(simulator|compiler|runtime): .*\d.*|format only"
CHECKS = [p for p in sorted(SCRIPTS.glob("check_*.py")) if "ONNXQAT_" in p.read_text()]
VARIABLE = "ONNXQAT_TRIAL"
LOAD = """
import sys
import onnxruntime as ort

def load(path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    added = float(sys.argv[1]) * (path.stem != "whole")
    return lambda feeds: session.run(None, feeds)[0] + np.float32(added)
"""


@pytest.fixture(scope="module")
def form():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("vendor_check")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def environment(form, tmp_path):
    return form.Environment(form.Tool("trial", VARIABLE, "numpy"), sys.executable, tmp_path)


@pytest.fixture(scope="module")
def network():
    proto = convnet()
    return samples(proto, 20), quantized(proto, "onnxruntime-cpu")[1]


@pytest.fixture
def check(form, network, tmp_path, monkeypatch, capsys):
    """Run a script of the form; return its exit code, its document and what it reported."""
    x, model = network
    monkeypatch.setenv(VARIABLE, sys.executable)
    path, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(model.to_proto(), path)
    np.savez(data, input=x)
    monkeypatch.setattr(sys, "argv", ["check_trial.py", str(path), str(data), "16"])

    def run(added):
        def compare(model, feeds, environment):
            return form.compare(environment, model, model.to_proto(), feeds, LOAD, str(added))

        with pytest.raises(SystemExit) as ended:
            form.main(form.Tool("trial", VARIABLE, "numpy"), form.Tolerance(0.01, 1, 1), compare)
        return ended.value.code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("script", CHECKS, ids=lambda p: p.stem)
def test_a_script_without_its_environment_says_why_it_is_skipped(form, script, monkeypatch, capsys):
    name = f"ONNXQAT_{script.stem.removeprefix('check_').upper()}"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(script)])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")

    (line,) = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert line.startswith(f"skipped: {name} does not name the Python of an environment with ")
    assert f"    {name}=PYTHON python scripts/{script.name} QDQ DATA" in script.read_text()


def test_a_tool_that_computes_the_same_passes(check, form, network):
    code, document = check(0)

    assert (code, document["failed"]) == (0, [])
    assert (document["tool"], document["version"]) == ("trial", np.__version__)
    assert (document["rule"], document["samples"]) == ("onnxruntime-cpu", 16)
    assert (document["predictions"], document["largest_difference"]) == (1, 0)
    assert list(document["layers"]) == [layer.output for layer in form.layers_of(network[1])]
    assert len(document["layers"]) > 1
    assert all(x == {"differing": 0, "max_levels": 0} for x in document["layers"].values())


def test_a_tool_that_computes_otherwise_fails_and_each_layer_is_named(check, form, network):
    scales = {layer.output: layer.scale for layer in form.layers_of(network[1])}
    code, document = check(2 * max(scales.values()))

    assert code == 1
    assert len(document["failed"]) == len(scales)
    for name, found in document["layers"].items():
        assert found["differing"] == 1
        assert found["max_levels"] == pytest.approx(
            2 * max(scales.values()) / scales[name], rel=1e-4
        )


def test_the_integer_evaluation_computes_a_layer_as_in_the_whole(form, network):
    x, model = network
    reference = form.Integers(model)
    tensors = reference.program.tensors({"input": x})

    for layer in form.layers_of(model, ("Conv", "Gemm", "Add")):
        feeds = {name: tensors[name] for name in layer.inputs}
        assert np.array_equal(reference.layer(layer, feeds), tensors[layer.output])
    assert np.array_equal(
        reference.whole({"input": x}), reference.program.run(None, {"input": x})[0]
    )


def test_a_layer_reads_what_it_is_given(form, network):
    """One operand of the Add is computed from the other; both are given, of other samples."""
    x, model = network
    (layer,) = form.layers_of(model, ("Add",))
    values = form.inputs_of(model, [layer], {"input": x})
    feeds = {name: values[name][::step] for name, step in zip(layer.inputs, (1, -1), strict=True)}
    outputs = [one(model).layer(layer, feeds) for one in (form.Integers, form.FakeQuantized)]
    differing, levels = form.levels_between(*outputs, layer.scale)

    assert differing < 0.01
    assert levels < 1.5


def test_a_prediction_that_differs_fails(form):
    assert form.agreement(np.eye(4), np.eye(4)[[0, 1, 2, 2]]) == 0.75
    findings = form.Findings(0.75, {"y": (0.01, 1.0)})

    assert form.failures(findings, form.Tolerance(0.01, 1, 0.75)) == []
    (reason,) = form.failures(findings, form.Tolerance(0.01, 1, 0.76))
    assert "75.00%" in reason


@pytest.mark.parametrize(
    ("command", "code"), [("pip --version", 1), ("pip3 install numpy", 1), ("true", 0)]
)
def test_a_tool_cannot_change_its_environment(environment, command, code):
    printed = environment.run_code(f"import os; print(os.system('{command}') >> 8)")

    assert printed.splitlines()[-1] == str(code)


def test_a_tool_that_fails_or_hangs_ends_the_script(environment):
    with pytest.raises(SystemExit, match=r"(?s)trial did not run.*no module of mine"):
        environment.run_code("raise SystemExit('no module of mine')")
    with pytest.raises(SystemExit, match=r"trial did not finish in 0\.1 seconds"):
        environment.run(["sleep", "60"], limit=0.1)


def test_an_interrupt_ends_the_tool_too(environment, monkeypatch):
    def interrupted(process, timeout):
        started.append(process)
        raise KeyboardInterrupt

    started = []
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.run(["sleep", "60"])

    assert started[0].returncode == -signal.SIGKILL


def test_a_python_that_is_not_there_is_named(form, monkeypatch):
    monkeypatch.setenv(VARIABLE, "nowhere/python")
    monkeypatch.setattr(sys, "argv", ["check_trial.py", "model.onnx", "data.npz"])

    with pytest.raises(SystemExit, match="there is no program 'nowhere/python'"):
        form.main(form.Tool("trial", VARIABLE, "numpy"), form.Tolerance(0, 0, 1), None)


def rows(page, heading):
    """Return the cells of the first table behind a heading."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    table = re.search(r"(^\|.*\n)+", text, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table[2:]]


def test_pages_say_how_each_rule_table_and_export_was_proven():
    rules = [(name, row[1]) for row in rows("proof.md", "## Rules")
             for name in re.findall(r"`([^`]+)`", row[0])]  # fmt: skip
    tables = [(row[0].strip("` "), row[-1]) for row in rows("formats.md", "## Calibration tables")]
    exports = [(row[0].strip("` "), row[-1]) for row in rows("formats.md", "## Exports")]

    assert sorted(name for name, _ in rules) == sorted(bundled_rules())
    assert sorted(name for name, _ in tables) == sorted(FORMATS)
    assert sorted(name for name, _ in exports) == sorted(EXPORTS)
    for name, proof in (*rules, *tables, *exports):
        assert re.fullmatch(PROVEN, proof), name


def test_the_page_of_the_check_scripts_names_each_with_its_variable():
    named = [
        (row[0].strip("` "), row[1].split("`")[1])
        for row in rows("proof.md", "## The check scripts")
    ]

    assert sorted(named) == [
        (p.name, f"ONNXQAT_{p.stem.removeprefix('check_').upper()}") for p in CHECKS
    ]
