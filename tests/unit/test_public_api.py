from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onnxqat

HEAVY = (
    "msgspec",
    "numpy",
    "onnx",
    "onnx_graphsurgeon",
    "onnxruntime",
    "PIL",
    "rich",
    "tensorboardX",
)
VERBS = (
    *(
        "analyze",
        "calibrate",
        "check",
        "evaluate",
        "export",
        "finetune",
        "import_table",
        "insert",
        "report",
        "strip",
    ),
    "prepare",
)


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after ``code``."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", onnxqat.__all__)
def test_every_public_name_resolves(name):
    found = getattr(onnxqat, name)

    assert not isinstance(found, ModuleType)
    assert found is getattr(importlib.import_module(f"onnxqat.{onnxqat._HOMES[name]}"), name)


def test_names_are_sorted_and_documented():
    assert sorted(onnxqat.__all__) == onnxqat.__all__
    assert all(getattr(onnxqat, name).__doc__ for name in onnxqat.__all__)


def test_importing_modules_does_not_hide_the_verbs():
    code = (
        "import onnxqat.calibration, onnxqat.evaluation, onnxqat.preparation\n"
        "import onnxqat.train.finetune, onnxqat.cli, onnxqat.verbs.finetune\n"
        f"hidden = [name for name in {VERBS} if not callable(getattr(onnxqat, name))]\n"
        "assert not hidden, hidden\n"
        f"from onnxqat import {', '.join(VERBS)}\n"
        f"assert all(map(callable, ({', '.join(VERBS)})))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_type_checker_sees_every_name_where_the_interpreter_finds_it():
    tree = ast.parse(Path(onnxqat.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module.removeprefix("onnxqat.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("onnxqat.")
        for alias in node.names
    }

    assert seen == onnxqat._HOMES
    assert onnxqat.__all__ == list(onnxqat._HOMES)
    assert set(onnxqat.__all__) < set(dir(onnxqat))
    assert onnxqat.__version__ == importlib.metadata.version("onnxqat")


def test_the_package_is_a_program():
    words = [sys.executable, "-m", "onnxqat", "--version"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)

    assert found.stdout == f"onnxqat, version {onnxqat.__version__}\n"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = onnxqat.quantise


def test_importing_the_package_imports_nothing_heavy():
    assert not loaded_by("import onnxqat") & {*HEAVY, "click"}


@pytest.mark.parametrize("command", ["--help", "insert --help", "finetune --help"])
def test_help_imports_nothing_heavy(command):
    code = (
        "from onnxqat.cli import main\n"
        f"assert main({command.split()}, standalone_mode=False) in (0, None)"
    )
    found = loaded_by(code)

    assert "click" in found
    assert not found & set(HEAVY)
