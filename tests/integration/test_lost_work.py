"""What cannot be written costs no training, and no output overwrites what is read."""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from onnxqat.cli import main
from onnxqat.progress import FinetuneReport
from tests.digits import write_digits

MODELS = Path(__file__).parents[2] / "models"
LENET = MODELS / "lenet5.onnx"
NORM = ("--mean", 128, "--scale", 0.0078125)
TUNE = ("finetune", "qdq.onnx", "train.npz", "--epochs", 1, "--threads", 1)


def invoke(*words: Any) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error(*words: Any) -> str:
    """Run a command that must fail with one line; return it."""
    result = invoke(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a Q/DQ model, 100 digits, and the bytes that fine-tuning gives."""
    folder = tmp_path_factory.mktemp("work")
    write_digits(folder / "train.npz", 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("insert", LENET, "--set", "weight.bits=3", "--data", "train.npz", *NORM)
        assert invoke(*words, "-o", "qdq.onnx").exit_code == 0
        assert invoke(*TUNE, "-o", "whole.onnx").exit_code == 0
    return folder


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    """A fresh copy of the folder, as the current one."""
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def meanwhile(monkeypatch):
    """Return a function that lets something happen when the last epoch is over."""
    report = FinetuneReport.__call__

    def arrange(act: Callable[[], None]) -> None:
        def call(self: FinetuneReport, progress: Any) -> None:
            report(self, progress)
            if progress.validation is not None:
                act()

        monkeypatch.setattr(FinetuneReport, "__call__", call)

    return arrange


@pytest.fixture
def limit():
    """Return a function that lets the system refuse to write larger files than so many bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or usual[0], usual[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_file_that_appeared_leaves_the_result_in_the_checkpoint(here, meanwhile):
    meanwhile(lambda: (here / "o u t.onnx").write_text("appeared"))
    line = error(*TUNE, "-o", "o u t.onnx")
    meanwhile(lambda: pytest.fail("it was trained again"))
    told, _, command = line.partition(" with: ")
    words = shlex.split(command)

    assert "o u t.onnx: already exists." in told
    assert "The finished training is kept in o u t.onnx.checkpoint." in told
    assert (here / "o u t.onnx").read_text() == "appeared"
    assert words[0] == "onnxqat"
    assert words[-2:] == ["--resume", "--force"]
    assert invoke(*words[1:]).exit_code == 0
    assert (here / "o u t.onnx").read_bytes() == (here / "whole.onnx").read_bytes()
    names = {"qdq.onnx", "train.npz", "whole.onnx", "o u t.onnx"}
    assert {path.name for path in here.iterdir()} == names


def test_a_full_disk_after_a_checkpoint_keeps_it_and_says_so(here, meanwhile, limit):
    meanwhile(lambda: limit(10_000))
    line = error(*TUNE, "-o", "out.onnx", "--checkpoint-every", "2steps")
    limit(0)
    meanwhile(lambda: None)
    command = shlex.split(line.partition(" with: ")[2])

    assert "out.onnx: cannot be written (File too large)." in line
    assert "The result could not be kept elsewhere either" in line
    assert "or continue from the last checkpoint with: onnxqat finetune" in line
    assert invoke(*command[1:]).exit_code == 0
    assert (here / "out.onnx").read_bytes() == (here / "whole.onnx").read_bytes()


@pytest.mark.parametrize("every", ["5min", "never"])
def test_a_folder_that_is_gone_leaves_the_result_elsewhere(here, meanwhile, every):
    (here / "gone").mkdir()
    meanwhile(lambda: shutil.rmtree("gone"))
    line = error(*TUNE, "-o", "gone/out.onnx", "--checkpoint-every", every)
    kept = Path(line.partition("is kept in ")[2].partition(". Move")[0])

    assert "gone/out.onnx: directory 'gone' does not exist." in line
    assert kept.read_bytes() == (here / "whole.onnx").read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == ["out.onnx"]


ALIASES = ("train.npz", "./train.npz", "link", "hard", "sub/../train.npz", "qdq.onnx", "rule.toml")
COMMANDS = {
    "insert": ("insert", "qdq.onnx", "--data", "train.npz", "--overrides", "rule.toml", "-o"),
    "calibrate": ("calibrate", "qdq.onnx", "train.npz", "--input", "input=rule.toml", "-o"),
    "finetune": (*TUNE, "--teacher", "rule.toml", "-o"),
    "log": (*TUNE, "--teacher", "rule.toml", "--log"),
    "tensorboard": (*TUNE, "--teacher", "rule.toml", "--tensorboard"),
    "export": ("export", "qdq.onnx", "--format", "onnxruntime", "-o"),
    "import-table": ("import-table", "train.npz", "qdq.onnx", "--rules", "rule.toml", "-o"),
    "report": ("report", "qdq.onnx", "train.npz", "--log", "rule.toml", "-o"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_output_is_an_input(here, name):
    (here / "rule.toml").write_text("")
    (here / "link").symlink_to("train.npz")
    (here / "hard").hardlink_to("train.npz")
    (here / "sub").mkdir()
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    read = " ".join(map(str, COMMANDS[name]))
    for alias in ALIASES:
        path = {"qdq.onnx": "qdq.onnx", "rule.toml": "rule.toml"}.get(alias, "train.npz")
        if f" {path} " not in f"{read} ":
            continue
        line = error(*COMMANDS[name], alias, "--force")
        assert f"Error: {Path(alias)}: --" in line
        assert "would overwrite" in line
        assert f"'{path}'. Choose another --" in line

    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_outputs_are_apart_from_each_other_and_from_data_in_a_folder(here):
    (here / "data").mkdir()
    shutil.move("train.npz", "data")
    tune = ("finetune", "qdq.onnx", "data", "--force")
    for words, overwritten in (
        (("-o", "a.onnx", "--log", "a.onnx"), "--output 'a.onnx'"),
        (("-o", "a.onnx", "--log", "./a.onnx.checkpoint"), "the checkpoint 'a.onnx.checkpoint'"),
        (("-o", "a.onnx", "--log", "b", "--tensorboard", "data/../b"), "--log 'b'"),
        (("-o", "a.onnx", "--log", "data/train.npz"), "DATA 'data'"),
        (("-o", "data/train.npz"), "DATA 'data'"),
    ):
        assert f"would overwrite {overwritten}" in error(*tune, *words)
    shutil.copy("qdq.onnx", "data/model.onnx")
    line = error("strip", "data/model.onnx", "-o", "data", "--force")
    assert "data/model.onnx: the model.onnx would overwrite MODEL 'data/model.onnx'" in line


def test_a_second_run_on_the_same_files_is_refused(here):
    words = [str(w) for w in (*TUNE[:3], "--epochs", 500, "-o", "out.onnx", "--log", "log.csv")]
    code = "from onnxqat.cli import main; main()"
    first = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE)
    try:
        assert first.stderr is not None
        assert any(line.startswith(b"epoch ") for line in first.stderr)  # as far as the first one
        log = (here / "log.csv").read_bytes()
        for output, log_file, refused in (
            ("out.onnx", "other.csv", "out.onnx"),
            ("other.onnx", "log.csv", "log.csv"),
            ("out.onnx.checkpoint", "other.csv", "out.onnx.checkpoint"),
        ):
            line = error(*TUNE, "-o", output, "--log", log_file, "--force")
            assert f"{refused}: another run is writing it." in line
        assert (here / "log.csv").read_bytes().startswith(log)
    finally:
        first.kill()
        first.communicate()
    assert invoke(*TUNE, "-o", "out.onnx", "--log", "log.csv", "--force").exit_code == 0
    assert not list(here.glob(".onnxqat-*"))
