"""What is printed cannot steer a terminal, and a stream that fails is no traceback."""

from __future__ import annotations

import errno
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from onnxqat.cli import main
from onnxqat.progress import FinetuneReport
from onnxqat.terminal import LineFormatter, guarded_streams, say, shown

# Colours, an 8-bit control sequence, both directions, another line, a bell, a lone surrogate.
HOSTILE = "a\x1b[31m\x9b2J\u202e\u2066\nError: b\r\x07\udcff\u2028"
ESCAPED = r"a\x1b[31m\x9b2J\u202e\u2066\nError: b\r\x07\udcff\u2028"
NAME = HOSTILE.replace("\udcff", "")  # which a model file cannot hold
ESCAPED_NAME = ESCAPED.replace(r"\udcff", "")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_names_are_escaped_and_letters_of_all_languages_stay() -> None:
    assert shown(HOSTILE) == ESCAPED
    for text in ("größe", "卷积层/输出", "слой:0", "a b", "\\x1b", "🎉"):
        assert shown(text) == text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Conv whose tensors and nodes all have hostile names, and one node that no rule knows."""
    info = helper.make_tensor_value_info
    weights = helper.make_tensor(f"w{NAME}", TensorProto.FLOAT, [2, 3, 1, 1], [0.5] * 6)
    nodes = [
        helper.make_node("Conv", [f"x{NAME}", f"w{NAME}"], [f"y{NAME}"], name=f"conv{NAME}"),
        helper.make_node("Erf", [f"y{NAME}"], [f"z{NAME}"], name=f"erf{NAME}"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info(f"x{NAME}", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [info(f"z{NAME}", TensorProto.FLOAT, ["N", 2, 4, 4])],
        [weights],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_tables_and_plans_show_names_escaped_and_json_exactly(model: Path) -> None:
    plan = invoke("insert", model, "--plan-only")
    assert plan.exit_code == 0
    assert printable(plan.output)
    assert f"x{ESCAPED_NAME} -> conv{ESCAPED_NAME}[0]" in plan.output
    check = invoke("check", model)
    assert printable(check.output)
    assert f"erf{ESCAPED_NAME}" in check.output
    document = json.loads(invoke("insert", model, "--plan-only", "--json").stdout)
    assert f"x{NAME}" in {point["tensor"] for point in document["points"]}


@pytest.mark.parametrize(
    "words",
    [
        ("insert", HOSTILE),
        ("report", HOSTILE),
        ("rules", "show", HOSTILE),
        (HOSTILE,),
        ("insert", "m.onnx", f"--{HOSTILE}"),
        ("insert", "m.onnx", "--mean", HOSTILE),
    ],
)
def test_errors_show_names_escaped_on_one_line(words: tuple[str, ...]) -> None:
    result = invoke(*words)
    assert result.exit_code in (1, 2)
    assert result.stderr.count("\n") == 1
    assert printable(result.stderr)
    assert r"\x1b[31m\x9b2J\u202e\u2066" in result.stderr


def test_logs_and_progress_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("n", logging.WARNING, "p", 1, "of %s", (HOSTILE,), None)
    assert LineFormatter("%(message)s").format(record) == f"of {ESCAPED}"
    FinetuneReport().say(HOSTILE)
    say(HOSTILE)
    assert capsys.readouterr() == (f"{ESCAPED}\n", f"{ESCAPED}\n")


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _text: str = "") -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = write  # type: ignore[assignment]


def test_a_full_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    with guarded_streams():
        say("an error", err=True)
        logging.getLogger("test").warning("a warning")
        with FinetuneReport() as report:
            report.say("a line")
    assert isinstance(sys.stderr, Full)


def test_errors_of_other_files_are_not_taken_for_those_of_stdout() -> None:
    with pytest.raises(FileNotFoundError), guarded_streams():
        Path("/none/at/all").read_text()


def run(words: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -c "from onnxqat.cli import main; main()" {words}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )


def test_a_full_stdout_is_one_line_and_a_closed_one_none() -> None:
    full = run("rules list > /dev/full")
    assert (full.returncode, full.stdout) == (1, "")
    assert full.stderr == "Error: stdout: cannot be written (No space left on device).\n"
    left = run("rules schema | head -0")
    assert (left.returncode, left.stdout, left.stderr) == (1, "", "")
    closed = run("rules list >&-")
    assert (closed.returncode, closed.stderr) == (0, "")
