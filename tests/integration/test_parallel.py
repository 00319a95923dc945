"""Processes that train together do what one does with as many times larger batches."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from onnxqat.errors import TrainingError
from onnxqat.insert import plan_of, read_params, strip
from onnxqat.model import load_model
from onnxqat.train import join_workers

MODELS = Path(__file__).parents[2] / "models"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MPIRUN = shutil.which("mpirun", path=PATH)
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="mpi4py or mpirun is not installed (pip install 'onnxqat[mpi]')",
)
# plain descent, since Adam's directions amplify the noise of summation
TUNE = ("finetune", "qdq.onnx", "train.npz", "--epochs", "2", "--threads", "1")
SGD = ("--optimizer", "sgd", "--lr", "1e-4")


def onnxqat(folder: Path, *words: str, workers: int = 1) -> subprocess.CompletedProcess[str]:
    code = "from onnxqat.cli import main; main()"
    command = [sys.executable, "-c", code, *words]
    if workers > 1:
        command = [str(MPIRUN), "-n", str(workers), *command]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    with np.load(MODELS / "digits-train.npz") as digits:
        images, labels = digits["images"][:300], digits["label"][:300]
    np.savez(folder / "train.npz", images=images, label=labels)
    rule = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=2")
    norm = ("--mean", "128", "--scale", "0.0078125")
    model = str(MODELS / "mobilenet-digits.onnx")
    for words in ((*norm, "-o", "empty.onnx"), (*norm, "--data", "train.npz", "-o", "qdq.onnx")):
        result = onnxqat(folder, "insert", model, *rule, *words)
        assert result.returncode == 0, result.stderr
    return folder


def values(path: Path) -> np.ndarray:
    model = load_model(path)
    tensors = strip(model).graph.tensors()
    weights = [p.tensor for p in plan_of(model).points if p.role != "activation"]
    scales = [p.scale for p in read_params(model).values()]
    return np.concatenate([np.ravel(a) for a in [*(tensors[n].values for n in weights), *scales]])


@needs_mpi
def test_two_processes_are_one_with_twice_the_batch(work):
    result = onnxqat(work, *TUNE, *SGD, "--batch-size", "8", "-o", "two.onnx", workers=2)
    alone = (("16.onnx", "16", "1"), ("8.onnx", "8", "2"))
    for name, size, times in alone:
        words = (*SGD, "--batch-size", size, "--accumulate", times, "-o", name)
        assert onnxqat(work, *TUNE, *words).returncode == 0

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("top1 after") == 1
    assert (work / "two.onnx").read_bytes() == (work / "8.onnx").read_bytes()
    found, expected = values(work / "two.onnx"), values(work / "16.onnx")
    moved = np.abs(expected - values(work / "qdq.onnx")).max()
    assert moved > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2 * moved)


@needs_mpi
def test_two_processes_calibrate_what_one_does(work):
    words = ("empty.onnx", "train.npz", *TUNE[3:], *SGD, "--batch-size", "8")
    alone = onnxqat(work, "finetune", *words, "--accumulate", "2", "-o", "alone.onnx")
    result = onnxqat(work, "finetune", *words, "-o", "together.onnx", workers=2)

    assert (alone.returncode, result.returncode) == (0, 0), result.stderr
    assert (work / "together.onnx").read_bytes() == (work / "alone.onnx").read_bytes()


@needs_mpi
def test_two_processes_stop_and_go_on_together(work):
    words = (*TUNE, "--batch-size", "8", "--augment", "crop")
    whole = onnxqat(work, *words, "-o", "whole.onnx", workers=2)
    assert whole.returncode == 0, whole.stderr
    code = "from onnxqat.cli import main; main()"
    command = [str(MPIRUN), "-n", "2", sys.executable, "-c", code, *words, "-o", "part.onnx"]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("epoch 1/"):
                break
        time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read()
    resumed = onnxqat(work, *words, "-o", "part.onnx", "--resume", workers=2)

    assert running.returncode == 143
    assert rest.count("Interrupted at step") == 1
    assert resumed.returncode == 0, resumed.stderr
    assert (work / "part.onnx").read_bytes() == (work / "whole.onnx").read_bytes()


@needs_mpi
def test_an_error_of_one_process_ends_them_all(work):
    (work / "wrong.py").write_text(
        "import os, numpy as np\n"
        "def data():\n"
        "    with np.load('train.npz') as arrays:\n"
        "        images, labels = arrays['images'], arrays['label'].copy()\n"
        "    if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '1':\n"
        "        labels[:] = 11\n"
        "    return {'images': images, 'label': labels}\n"
    )
    words = ("finetune", "qdq.onnx", "wrong:data", *TUNE[3:], "-o", "wrong.onnx")
    result = onnxqat(work, *words, workers=2)

    assert result.returncode != 0
    assert "A label is 11; the model has 10 classes" in result.stderr
    assert not (work / "wrong.onnx").exists()


def test_without_mpirun_a_process_is_alone(monkeypatch):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    workers = join_workers()

    assert (workers.rank, workers.size) == (0, 1)


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_mpirun_without_mpi4py_is_an_error(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(TrainingError, match=r"started 2 processes, and mpi4py is not installed"):
        join_workers()


@needs_mpi
def test_another_mpis_mpirun_is_an_error(work):
    code = "import os; os.environ['PMI_SIZE'] = '1'; os.environ['OMPI_COMM_WORLD_SIZE'] = '3'; "
    code += "from onnxqat.cli import main; main()"
    command = [sys.executable, "-c", code, *TUNE, "-o", "other.onnx"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert "started 3 processes, and mpi4py knows of 1" in result.stderr
