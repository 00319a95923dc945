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
from tests.digits import write_digits

MODELS = Path(__file__).parents[2] / "models"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
MPIRUN = shutil.which("mpirun", path=PATH)
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="mpi4py or mpirun is not installed (pip install 'onnxqat[mpi]')",
)
EACH = pytest.mark.parametrize("workers", [2, 4])
MODEL = str(MODELS / "lenet5.onnx")
RULE = ("--rules", "sophgo-bm1684x", "--set", "weight.bits=2")
NORM = ("--mean", "128", "--scale", "0.0078125")
TUNE = ("finetune", "qdq.onnx", "train.npz", "--epochs", "2", "--threads", "1")
SGD = ("--optimizer", "sgd", "--lr", "1e-4")
BATCH = 16
# one step of all samples, whose result is kept
STEP = (
    *("finetune", "qdq.onnx", "one.npz", "--val-data", "one.npz", "--select", "loss"),
    *("--epochs", "1", "--threads", "1", "--schedule", "constant", "--warmup", "0", *SGD),
)
SINGLE = (
    *("finetune", "single.onnx", "train.npz", "--epochs", "1", "--threads", "1", *SGD),
    *("--select", "loss"),
)
FEW = (
    *("insert", MODEL, *RULE, *NORM, "--threads", "1"),
    *("--data", "train.npz", "--samples", "20", "--batch-size", "16"),
)
WHOLE = (*TUNE, "--epochs", "5", "--batch-size", "8", "--augment", "crop")
OBSERVERS = ("minmax", "moving-average", "percentile", "mse")
RATE = 1e-4
UNIT = 2.0**-24  # of rounding to float32


def tuned(model: str) -> tuple[str, ...]:
    return ("finetune", model, *TUNE[2:], *SGD, "--averaging-constant", "0.1")


def calibrated(observer: str) -> tuple[str, ...]:
    """299 samples are 29 batches and a part of one."""
    words = ("calibrate", "empty.onnx", "train.npz", "--observer", observer, "--threads", "1")
    return (*words, "--samples", "299", "--batch-size", "10")


# What processes do together, by the start of the output's name. The last command of two lets
# training keep its arrays on a device, as on a GPU, which is the CPU.
TOGETHER = {
    2: {
        "step": (*STEP, "--batch-size", str(BATCH // 2)),
        "ranges": (*tuned("ranges.onnx"), "--batch-size", "8"),
        "empty": (*tuned("empty.onnx"), "--batch-size", "8"),
        "single": (*SINGLE, "--log", "single-2.jsonl"),
        "whole": WHOLE,
        "resident": (*tuned("ranges.onnx"), "--batch-size", "8"),
    },
    4: {
        "step": (*STEP, "--batch-size", str(BATCH // 4)),
        "qdq": (*tuned("qdq.onnx"), "--batch-size", "4"),
        "few": FEW,
    },
}
# Runs commands one after the other: processes take longer to start than most commands to run.
SERIES = """
import json, sys
from onnxqat.cli import main
from onnxqat.device import Device
from onnxqat.parallel import _MpiWorkers, join_workers
from onnxqat.train import given

leave, _MpiWorkers.leave = _MpiWorkers.leave, lambda self: None
for words in json.loads(sys.argv[1]):
    if "resident-2.onnx" in words:
        given.find_device = lambda *_, **__: Device(resident=True)
    if join_workers().rank == 0:
        print("NEXT", flush=True)
        print("NEXT", file=sys.stderr, flush=True)
    main(words, standalone_mode=False)
leave(join_workers())
"""


def onnxqat(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the process of the test."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def mpirun(workers: int, *words: str, code: str = "") -> list[str]:
    """Return the command line that runs a command, or other code, in so many processes."""
    code = code or "from onnxqat.cli import main; main()"
    return [str(MPIRUN), "-n", str(workers), sys.executable, "-c", code, *words]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_digits(folder / "train.npz", 300)
    write_digits(folder / "one.npz", BATCH)
    calibrated = (*NORM, "--data", "train.npz")
    follow = ("--set", "activation.method=moving-average")
    for words in (
        (*NORM, "-o", "empty.onnx"),
        (*calibrated, "-o", "qdq.onnx"),
        (*calibrated, *follow, "-o", "ranges.onnx"),
    ):
        onnxqat(folder, "insert", MODEL, *RULE, *words)
    return folder


@pytest.fixture(scope="module")
def said(work):
    """Return what the commands of `TOGETHER` write: (stdout, stderr) by workers and name."""
    model = onnx.load(work / "qdq.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, work / "single.onnx")
    found = {}
    for workers, commands in TOGETHER.items():
        commands = {name: calibrated(name) for name in OBSERVERS} | commands
        words = [[*line, "-o", f"{name}-{workers}.onnx"] for name, line in commands.items()]
        series = mpirun(workers, json.dumps(words), code=SERIES)
        done = subprocess.run(series, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts = (text.split("NEXT\n")[1:] for text in (done.stdout, done.stderr))
        for name, *both in zip(commands, *texts, strict=True):
            found[workers, name] = tuple(both)
    return found


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


@needs_mpi
def test_processes_that_keep_arrays_on_a_device_average_them_too(work, said, monkeypatch):
    """Gradients are averaged, and the observed ranges cover the batches of both processes."""
    monkeypatch.setattr(given, "find_device", lambda *_, **__: Device(resident=True))
    words = (*tuned("ranges.onnx"), "--batch-size", "8", "--accumulate", "2")
    onnxqat(work, *words, "-o", "resident-1.onnx")

    assert "best 2" in said[2, "resident"][0]
    assert content(work / "resident-2.onnx") == content(work / "resident-1.onnx")


@needs_mpi
@pytest.mark.parametrize(("name", "workers"), [("ranges", 2), ("qdq", 4)])
def test_processes_are_one_that_accumulates_bit_for_bit(work, said, name, workers):
    size = ("--batch-size", str(BATCH // workers), "--accumulate", str(workers))
    onnxqat(work, *tuned(f"{name}.onnx"), *size, "-o", f"{name}-1.onnx")
    stdout, _ = said[workers, name]

    assert stdout.count("top1 after") == 1
    assert "best 2" in stdout
    assert content(work / f"{name}-{workers}.onnx") == content(work / f"{name}-1.onnx")


@pytest.fixture(scope="module")
def stepped(work):
    """Return the parameters after a step of one process, and the gradients of its samples."""
    onnxqat(work, *STEP, "--batch-size", str(BATCH), "-o", "step-1.onnx")
    return parameters(work / "step-1.onnx"), sample_gradients(work)


@needs_mpi
@EACH
def test_a_step_of_processes_is_one_with_a_larger_batch(work, said, stepped, workers):
    """Up to the order of the sum over the batch, which no float32 sum of it can be held to.

    Two sums of n terms in other orders differ by 2 (n - 1) u times the sum of the magnitudes at
    most (Higham 2002, section 4.2), the terms being the gradients of the samples; each run then
    rounds the parameter once. Scales move by their logarithm, so little that even a gradient that
    is off by 2^-14 of itself moves them by less than a unit in the last place.
    """
    start = parameters(work / "qdq.onnx")
    found, (expected, gradients) = parameters(work / f"step-{workers}.onnx"), stepped

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
    assert max(np.abs(expected[n] - start[n]).max() for n in expected) > 1e-4


@needs_mpi
@pytest.mark.parametrize("observer", OBSERVERS)
def test_processes_calibrate_what_one_does_bit_for_bit(work, said, observer):
    onnxqat(work, *calibrated(observer), "-o", f"{observer}-1.onnx")
    one, two, four = ((work / f"{observer}-{n}.onnx").read_bytes() for n in (1, 2, 4))

    assert [said[workers, observer][0].count("299") for workers in (2, 4)] == [1, 1]
    assert one == two == four


@needs_mpi
def test_processes_without_a_batch_to_calibrate_on_help_nobody_and_harm_nothing(work, said):
    onnxqat(work, *FEW, "-o", "few-1.onnx")
    stdout, stderr = said[4, "few"]

    assert stdout.count("few-4.onnx") == 1
    assert stderr.count("2 bits for weights are for study only") == 1
    assert (work / "few-4.onnx").read_bytes() == (work / "few-1.onnx").read_bytes()


@needs_mpi
def test_processes_share_the_batches_of_a_model_that_is_fixed_to_one(work, said):
    """A step has 16 samples of all together, up to the order of summation those of one process."""
    onnxqat(work, *SINGLE, "--log", "single-1.jsonl", "-o", "single-1.onnx")
    for workers in (1, 2):
        lines = (work / f"single-{workers}.jsonl").read_text().splitlines()
        assert max(json.loads(line).get("step", 0) for line in lines) == 270 // 16
    one, two = (parameters(work / f"single-{workers}.onnx") for workers in (1, 2))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=0, atol=1e-5, err_msg=name)


@needs_mpi
def test_processes_calibrate_before_they_train(work, said):
    size = ("--batch-size", "8", "--accumulate", "2")
    onnxqat(work, *tuned("empty.onnx"), *size, "-o", "empty-1.onnx")

    assert content(work / "empty-2.onnx") == content(work / "empty-1.onnx")


@needs_mpi
def test_two_processes_stop_and_go_on_together(work, said):
    command = mpirun(2, *WHOLE, "-o", "part.onnx")
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("epoch 1/"):
                break
        time.sleep(0.05)  # the other epochs take ten times as long
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read()
    resumed = subprocess.run(
        [*command, "--resume"], cwd=work, capture_output=True, text=True, check=False
    )

    assert running.returncode == 143
    assert rest.count("Interrupted at step") == 1
    assert resumed.returncode == 0, resumed.stderr
    assert (work / "part.onnx").read_bytes() == (work / "whole-2.onnx").read_bytes()


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
    result = subprocess.run(
        mpirun(2, *words), cwd=work, capture_output=True, text=True, check=False
    )

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
