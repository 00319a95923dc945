"""A mixture of packages is one line that says how to mend it, whatever the command."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from onnxqat import __main__, environment
from onnxqat.cli import main
from onnxqat.environment import check_packages
from onnxqat.errors import OnnxQatError

TRAINING = "pip install onnxruntime-training-cpu==1.19.2"
if not environment.HAS_TRAINING_BUILD:
    TRAINING = "pip install 'onnxruntime>=1.23'"
ROOT = Path(__file__).parents[2]
PAGE = "import sys; sys.stderr.write('a page\\nof text\\n'); "


def package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)


def distribution(folder: Path, name: str, module: str = "onnxruntime") -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{module}/capi/x.so,,\n{module}/__init__.py,,\n")


def run(*words: str, path: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
    code = "from onnxqat.cli import main; main()"
    places = os.pathsep.join(map(str, (*path, Path(__file__).parents[2])))
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("others", "removed"),
    [
        (("onnxruntime-gpu",), "onnxruntime-gpu onnxruntime-training-cpu"),
        (
            ("onnxruntime-directml", "onnxruntime-openvino"),
            "onnxruntime-directml onnxruntime-openvino onnxruntime-training-cpu",
        ),
    ],
)
def test_two_distributions_are_named_with_the_commands_that_leave_one(tmp_path, others, removed):
    package(tmp_path, "onnxruntime", "")
    for name in ("onnxruntime-training-cpu", *others):
        distribution(tmp_path, name)
    titles = " and ".join(f"{name} 1.0" for name in removed.split())
    result = run("rules", "list", path=(tmp_path,))

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: {titles} overwrite each other's files. "
        f"Run: pip uninstall -y {removed} && {TRAINING}\n"
    )


def test_what_does_not_overlie_is_right(tmp_path):
    for folder in ("environment", "system"):
        package(tmp_path / folder, "onnxruntime", "")
    distribution(tmp_path / "environment", "onnxruntime-training-cpu")
    distribution(tmp_path / "environment", "onnxruntime-extensions", "onnxruntime_extensions")
    distribution(tmp_path / "system", "onnxruntime")
    path = (tmp_path / "environment", tmp_path / "system")

    assert run("rules", "list", path=path).returncode == 0


BROKEN = {
    "attributes": ("onnxruntime", "", "onnxruntime lacks InferenceSession", TRAINING),
    "binary": (
        "onnxruntime",
        PAGE + "raise ImportError('numpy.core.multiarray\\nfailed to import')",
        "onnxruntime cannot be imported (numpy.core.multiarray failed to import).",
        TRAINING,
    ),
    "protobuf": (
        "onnx",
        PAGE + "raise ImportError(\"cannot import name 'builder'\")",
        "onnx cannot be imported (cannot import name 'builder').",
        "pip install --upgrade --force-reinstall 'onnx>=1.17' protobuf",
    ),
    "numpy": (
        "numpy",
        "raise ImportError('Error importing numpy')",
        "numpy cannot be imported (Error importing numpy).",
        "pip install --upgrade --force-reinstall 'numpy>=1.26'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_imported_is_one_line_with_the_commands_that_mend_it(tmp_path, name):
    module, code, told, mended = BROKEN[name]
    package(tmp_path, module, code)
    result = run("check", "none.onnx", path=(tmp_path,))

    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"Error: {told}")
    assert result.stderr.endswith(f"{mended}\n")


def test_a_module_that_lost_its_files_is_named(tmp_path, monkeypatch):
    distribution(tmp_path, "ort-nightly")
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    left = ModuleSpec("onnxruntime", None, is_package=True)
    left.submodule_search_locations = [str(tmp_path / "onnxruntime")]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: left)
    with pytest.raises(OnnxQatError) as raised:
        check_packages()
    mended = f"Run: pip uninstall -y ort-nightly && {TRAINING}"
    assert str(raised.value) == f"onnxruntime lacks files. {mended}"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(OnnxQatError, match=f"onnxruntime is not installed. Run: {TRAINING}"):
        check_packages()


MACHINES = {
    ("3.11", "linux", "x86_64"): "onnxruntime-training-cpu",
    ("3.12", "linux", "x86_64"): "onnxruntime-training-cpu",
    ("3.13", "linux", "x86_64"): "onnxruntime",
    ("3.14", "linux", "x86_64"): "onnxruntime",
    ("3.11", "linux", "aarch64"): "onnxruntime",
    ("3.12", "darwin", "arm64"): "onnxruntime-training-cpu",
    ("3.13", "darwin", "arm64"): "onnxruntime",
    ("3.12", "win32", "AMD64"): "onnxruntime-training-cpu",
    ("3.12", "win32", "ARM64"): "onnxruntime",
}


@pytest.mark.parametrize(("machine", "expected"), MACHINES.items(), ids=str)
def test_each_machine_gets_the_one_distribution_that_has_wheels_for_it(machine, expected):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    facts = dict(zip(("python_version", "sys_platform", "platform_machine"), machine, strict=True))
    wanted = [Requirement(r) for r in project["dependencies"] if r.startswith("onnxruntime")]
    installed = [r.name for r in wanted if r.marker is None or r.marker.evaluate(facts)]

    assert installed == [expected]
    assert machine[0] in SpecifierSet(project["requires-python"])


def test_the_commands_that_mend_name_the_distribution_of_this_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(r) for r in project["dependencies"] if r.startswith("onnxruntime")]

    assert [r.name for r in wanted if r.marker.evaluate()] == [environment.ENGINE]


def test_help_is_given_in_a_broken_environment(tmp_path):
    package(tmp_path, "onnxruntime", "")
    result = run("insert", "--help", path=(tmp_path,))

    assert (result.returncode, result.stderr) == (0, "")


def test_an_interruption_acts_when_the_packages_are_imported(tmp_path, monkeypatch):
    code = "import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n"
    (tmp_path / "interrupted_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("interrupted_package", *environment.IMPORTED)
    monkeypatch.setattr(environment, "IMPORTED", names)
    result = CliRunner().invoke(main, ["check", "none.onnx"])

    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "Interrupted. No partly written file is left.\n"
    assert sys.modules.pop("interrupted_package").whole


@pytest.mark.parametrize("wrapped", [RuntimeError, OnnxQatError])
def test_an_interruption_that_became_another_error_is_told_as_one(monkeypatch, wrapped):
    def check(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise wrapped("Error calling __set_name__ on 'Field' instance 'ops'") from error

    monkeypatch.setattr(environment, "_distributions", check)
    result = CliRunner().invoke(main, ["rules", "list"])

    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "Interrupted. No partly written file is left.\n"


def test_an_interruption_while_the_commands_are_imported_is_one_line(monkeypatch, capsys):
    class Interrupted(ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "onnxqat.cli", Interrupted("onnxqat.cli"))
    with pytest.raises(SystemExit) as ended:
        __main__.main()

    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"
