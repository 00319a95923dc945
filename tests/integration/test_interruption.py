"""A killed or interrupted fine-tuning goes on, and ends with the bytes of one that was not."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from onnxqat.cli import main
from tests.digits import write_digits

MODELS = Path(__file__).parents[2] / "models"
NORM = ("--mean", "128", "--scale", "0.0078125")
TUNE = ("finetune", "qdq.onnx", "train.npz", "--epochs", "5", "--batch-size", "8", "--threads", "1")


def command(*words: str) -> list[str]:
    code = "from onnxqat.cli import main; main()"
    return [sys.executable, "-c", code, *words]


def here(folder: Path, *words: str) -> Result:
    """Run a command in the process of the test."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(main, words)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a coarse model, 300 digits, and the result of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("work")
    write_digits(folder / "train.npz", 300)
    words = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=2", *NORM, "--data", "train.npz")
    inserted = here(folder, "insert", str(MODELS / "lenet5.onnx"), *words, "-o", "qdq.onnx")
    assert inserted.exit_code == 0, inserted.output
    started = time.monotonic()
    run = command(*TUNE, "-o", "whole.onnx")
    subprocess.run(run, cwd=folder, check=True, capture_output=True)
    (folder / "seconds").write_text(str(time.monotonic() - started))
    return folder


def interrupt(work: Path, output: str, number: int, *words: str) -> tuple[int, str]:
    """Send a signal after the first epoch; return the exit code and what stderr ended with."""
    run = [*command(*TUNE, "-o", output), *words]
    with subprocess.Popen(run, cwd=work, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("epoch "):
                break
        time.sleep(0.05)  # the other epochs take ten times as long
        running.send_signal(number)
        rest = running.stderr.read()
    return running.returncode, rest


@pytest.mark.parametrize(
    ("number", "code", "goes_on"),
    [(signal.SIGINT, 130, "--resume"), (signal.SIGTERM, 143, "--force")],
)
def test_a_signal_saves_and_says_how_to_go_on(work, number, code, goes_on):
    output = f"{number}.onnx"
    found, rest = interrupt(work, output, number)

    assert found == code
    last = rest.splitlines()[-1]
    assert last.startswith("Interrupted at step ")
    assert f"saved in {output}.checkpoint. Continue with the same command and --resume." in last
    assert "Traceback" not in rest
    assert not (work / output).exists()
    again = here(work, *TUNE, "-o", output)
    assert again.exit_code == 1
    assert "Pass --resume to continue it, or --force to start again" in again.stderr
    assert here(work, *TUNE, "-o", output, goes_on).exit_code == 0
    assert (work / output).read_bytes() == (work / "whole.onnx").read_bytes()
    assert not (work / f"{output}.checkpoint").exists()


def test_without_checkpoints_nothing_is_left(work):
    before = set(work.iterdir())
    code, rest = interrupt(work, "none.onnx", signal.SIGINT, "--checkpoint-every", "never")

    assert code == 130
    assert rest.splitlines()[-1].endswith("Nothing was kept.")
    assert set(work.iterdir()) == before


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_bytes_are_the_same(work, kills):
    rng = random.Random(kills)
    output, checkpoint = f"{kills}.onnx", work / f"{kills}.onnx.checkpoint"
    seconds, done = float((work / "seconds").read_text()), 0
    while done < kills:
        resume = ("--resume",) if checkpoint.exists() else ()
        words = ("-o", output, "--checkpoint-every", "1steps", *resume)
        running = subprocess.Popen(command(*TUNE, *words), cwd=work, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        running.kill()
        done += running.wait() == -signal.SIGKILL
        if (work / output).exists():  # it came to its end: start over
            assert (work / output).read_bytes() == (work / "whole.onnx").read_bytes()
            (work / output).unlink()
    resume = ("--resume",) if checkpoint.exists() else ()
    assert here(work, *TUNE, "-o", output, *resume).exit_code == 0

    assert (work / output).read_bytes() == (work / "whole.onnx").read_bytes()
    assert list(work.glob(f"{output}.*")) == []
