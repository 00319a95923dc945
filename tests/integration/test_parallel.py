"""Processes that train together do what one does with as many times larger batches."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxqat.cli import main
from onnxqat.device import Device
from onnxqat.errors import TrainingError
from onnxqat.evaluation.run import model_session
from onnxqat.parallel import Workers, join_workers
from onnxqat.quantized import load_model
from onnxqat.settings import Settings
from onnxqat.train import Config, given
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.engine import StepSession
from onnxqat.train.form import training_form
from onnxqat.train.losses import read_loss
from onnxqat.verbs.listener import Listener
from onnxqat.verbs.opening import opened
from tests.contents import content

MODELS = Path(__file__).parents[2] / "models"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MPIRUN = shutil.which("mpirun", path=PATH)
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="mpi4py or mpirun is not installed (pip install 'onnxqat[mpi]')",
)
EACH = pytest.mark.parametrize("workers", [2, 4])
TUNE = ("finetune", "qdq.onnx", "train.npz", "--epochs", "2", "--threads", "1")
SGD = ("--optimizer", "sgd", "--lr", "1e-4")
BATCH = 16
# one step of all samples, whose result is kept
STEP = (
    *("finetune", "qdq.onnx", "one.npz", "--val-data", "one.npz", "--select", "loss"),
    *("--epochs", "1", "--threads", "1", "--schedule", "constant", "--warmup", "0", *SGD),
)
RATE = 1e-4
UNIT = 2.0**-24  # of rounding to float32


def onnxqat(
    folder: Path, *words: str, workers: int = 1, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in so many processes, which do something before; one is that of the test."""
    if workers == 1:
        with contextlib.chdir(folder):
            done = CliRunner().invoke(main, words)
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)
    code = f"{before}from onnxqat.cli import main; main()"
    command = [str(MPIRUN), "-n", str(workers), sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    with np.load(MODELS / "digits-train.npz") as digits:
        images, labels = digits["images"][:300], digits["label"][:300]
    np.savez(folder / "train.npz", images=images, label=labels)
    np.savez(folder / "one.npz", images=images[:BATCH], label=labels[:BATCH])
    rule = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=2")
    norm = ("--mean", "128", "--scale", "0.0078125")
    model = str(MODELS / "mobilenet-digits.onnx")
    calibrated = (*norm, "--data", "train.npz")
    follow = ("--set", "activation.method=moving-average")
    for words in (
        (*norm, "-o", "empty.onnx"),
        (*calibrated, "-o", "qdq.onnx"),
        (*calibrated, *follow, "-o", "ranges.onnx"),
    ):
        result = onnxqat(folder, "insert", model, *rule, *words)
        assert result.returncode == 0, result.stderr
    return folder


def parameters(path: Path) -> dict[str, np.ndarray]:
    """Return trained tensors, and the scales under the names that training gives them."""
    model = load_model(path)
    tensors = model.floats.graph.tensors()
    weights = {
        p.tensor: tensors[p.tensor].values for p in model.plan.points if p.role != "activation"
    }
    return weights | {f"{name}/scale": p.scale for name, p in model.params.items()}


def sample_gradients(work: Path) -> dict[str, np.ndarray]:
    """Return the mean magnitude of the gradients that single samples give, in float64."""
    model = load_model(work / "qdq.onnx")
    config = Config(batch_size=1, accumulate=BATCH, threads=1)
    form, loss = training_form(model), read_loss("cross-entropy+kl")
    with opened(model, work / "one.npz", Settings(), Listener()) as data:
        session = StepSession(form, loss, batch_size=1, threads=1, arrays=data)
        teacher = model_session(model.floats, "float")
        (step,) = TrainingBatches(model.floats, data, teacher, config, Workers()).epoch(1)
        total = dict.fromkeys(session.gradients.views, 0.0)
        for feeds in step:
            session.run(feeds)
            for name, gradient in session.gradients.views.items():
                total[name] = total[name] + np.abs(gradient, dtype=np.float64)
    return {name: value / BATCH for name, value in total.items()}


# Lets training keep its arrays on a device as on a GPU, which is the CPU.
RESIDENT = (
    "from onnxqat.device import Device; from onnxqat.train import given; "
    "given.find_device = lambda *_, **__: Device(resident=True); "
)


@needs_mpi
def test_processes_that_keep_arrays_on_a_device_average_them_too(work, monkeypatch):
    words = (*TUNE, *SGD, "--force", "--batch-size", str(BATCH // 2))
    together = onnxqat(work, *words, "-o", "d2.onnx", workers=2, before=RESIDENT)
    monkeypatch.setattr(given, "find_device", lambda *_, **__: Device(resident=True))
    alone = onnxqat(work, *words, "--accumulate", "2", "-o", "d1x2.onnx")

    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    assert "best 2" in together.stdout
    assert content(work / "d2.onnx") == content(work / "d1x2.onnx")


@needs_mpi
@pytest.mark.parametrize(
    ("model", "workers"), [("qdq.onnx", 2), ("qdq.onnx", 4), ("ranges.onnx", 2)]
)
def test_processes_are_one_that_accumulates_bit_for_bit(work, model, workers):
    words = ("finetune", model, *TUNE[2:], *SGD, "--force", "--batch-size", str(BATCH // workers))
    words += ("--averaging-constant", "0.1")
    result = onnxqat(work, *words, "-o", f"{workers}.onnx", workers=workers)
    alone = onnxqat(work, *words, "--accumulate", str(workers), "-o", f"1x{workers}.onnx")

    assert (alone.returncode, result.returncode) == (0, 0), result.stderr
    assert result.stdout.count("top1 after") == 1
    assert "best 2" in result.stdout
    assert content(work / f"{workers}.onnx") == content(work / f"1x{workers}.onnx")


@needs_mpi
@EACH
def test_a_step_of_processes_is_one_with_a_larger_batch(work, workers):
    """Up to the order of the sum over the batch, which no float32 sum of it can be held to.

    Two sums of n terms in other orders differ by 2 (n - 1) u times the sum of the magnitudes at
    most (Higham 2002, section 4.2), the terms being the gradients of the samples; each run then
    rounds the parameter once. Scales move by their logarithm, so little that even a gradient that
    is off by 2^-14 of itself moves them by less than a unit in the last place.
    """
    start = parameters(work / "qdq.onnx")
    for name, size, count in (
        ("b16.onnx", BATCH, 1),
        (f"b{workers}.onnx", BATCH // workers, workers),
    ):
        result = onnxqat(
            work, *STEP, "--batch-size", str(size), "-o", name, "--force", workers=count
        )
        assert result.returncode == 0, result.stderr
    found, expected = parameters(work / f"b{workers}.onnx"), parameters(work / "b16.onnx")
    gradients = sample_gradients(work)

    for name, value in expected.items():
        ulp = np.spacing(np.maximum(np.abs(value), np.abs(start[name])))
        moved = np.abs(value.astype(np.float64) - start[name]) / np.abs(start[name])
        off = np.abs(value.astype(np.float64) - found[name])
        if name.endswith("/scale"):
            assert moved.max() < 2.0**-10
            assert np.all(off <= ulp), name
        else:
            bound = RATE * 2 * (BATCH - 1) * UNIT * gradients[name]
            assert np.all(off <= ulp + bound), name
    # a sample left out would be seen
    assert max(np.abs(expected[n] - start[n]).max() for n in expected) > 1e-3


@needs_mpi
@pytest.mark.parametrize("observer", ["minmax", "moving-average", "percentile", "mse"])
def test_processes_calibrate_what_one_does_bit_for_bit(work, observer):
    """299 samples are 29 batches and a part of one."""
    words = ("calibrate", "empty.onnx", "train.npz", "--observer", observer, "--threads", "1")
    words += ("--samples", "299", "--batch-size", "10")
    found = []
    for workers in (1, 2, 4):
        name = f"{observer}-{workers}.onnx"
        result = onnxqat(work, *words, "-o", name, workers=workers)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("299") == 1
        found.append((work / name).read_bytes())

    assert found[0] == found[1] == found[2]


@needs_mpi
def test_processes_without_a_batch_to_calibrate_on_help_nobody_and_harm_nothing(work):
    rule = ("--rules", "sophgo-bm1684x", "--mean", "128", "--scale", "0.0078125", "--threads", "1")
    few = ("--data", "train.npz", "--samples", "20", "--batch-size", "16")
    few += ("--set", "weight.bits=2")
    model = str(MODELS / "mobilenet-digits.onnx")
    alone = onnxqat(work, "insert", model, *rule, *few, "-o", "few1.onnx")
    result = onnxqat(work, "insert", model, *rule, *few, "-o", "few4.onnx", workers=4)

    assert (alone.returncode, result.returncode) == (0, 0), result.stderr
    assert result.stdout.count("few4.onnx") == 1
    assert result.stderr.count("2 bits for weights are for study only") == 1
    assert (work / "few4.onnx").read_bytes() == (work / "few1.onnx").read_bytes()


@needs_mpi
def test_processes_share_the_batches_of_a_model_that_is_fixed_to_one(work):
    """A step has 16 samples of all together, up to the order of summation those of one process."""
    model = onnx.load(work / "qdq.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, work / "single.onnx")
    words = ("finetune", "single.onnx", "train.npz", "--epochs", "1", "--threads", "1", *SGD)
    files = []
    for workers in (1, 2):
        files.append(f"single-{workers}.onnx")
        log = f"single-{workers}.jsonl"
        result = onnxqat(
            work, *words, "--select", "loss", "--log", log, "-o", files[-1], workers=workers
        )
        assert result.returncode == 0, result.stderr
        steps = [json.loads(line) for line in (work / log).read_text().splitlines()]
        assert max(line.get("step", 0) for line in steps) == 270 // 16
    one, two = (parameters(work / name) for name in files)
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=0, atol=1e-5, err_msg=name)


@needs_mpi
def test_processes_calibrate_before_they_train(work):
    words = ("empty.onnx", "train.npz", *TUNE[3:], *SGD, "--batch-size", "8")
    alone = onnxqat(work, "finetune", *words, "--accumulate", "2", "-o", "alone.onnx")
    result = onnxqat(work, "finetune", *words, "-o", "together.onnx", workers=2)

    assert (alone.returncode, result.returncode) == (0, 0), result.stderr
    assert content(work / "together.onnx") == content(work / "alone.onnx")


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
    assert "A label is 11, but the model has 10 classes" in result.stderr
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
    with pytest.raises(TrainingError, match=r"started 2 processes, but mpi4py is not installed"):
        join_workers()


@needs_mpi
def test_another_mpis_mpirun_is_an_error(work):
    code = "import os; os.environ['PMI_SIZE'] = '1'; os.environ['OMPI_COMM_WORLD_SIZE'] = '3'; "
    code += "from onnxqat.cli import main; main()"
    command = [sys.executable, "-c", code, *TUNE, "-o", "other.onnx"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert "started 3 processes, but mpi4py finds 1" in result.stderr
