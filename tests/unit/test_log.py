"""What is logged, read back by somebody else: csv, TensorBoard's own reader."""

from __future__ import annotations

import csv
import logging
import resource
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from onnxqat.errors import DataError, OnnxQatError, TrainingError
from onnxqat.reporting import log_of
from onnxqat.train import (
    Checkpoints,
    Config,
    TrainingLog,
    check_event_folder,
    finetune,
    read_log,
)
from onnxqat.train.monitoring.events import Epoch, Note, Resume, Start, Step, figures
from onnxqat.train.monitoring.writers import file_writer
from tests.digits import calibrated_lenet, training_digits

CONFIG = Config(epochs=2, threads=1)  # 200 samples are 11 steps an epoch


@pytest.fixture(scope="module")
def data():
    with training_digits(200) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(data):
    return calibrated_lenet(data, "weight.bits=3")


class KilledError(Exception):
    pass


def run(model, data, *outputs, kill=None, config=CONFIG, checkpoint=None, resume=False, steps=5):
    """Train, logging to (path, folder of event files or None) each; ``kill`` is a step."""
    batch = next(iter(data.batches(16))).inputs
    how = {"every": 3, "threads": 1, "resume": resume}
    logs = [TrainingLog(p, model, batch, tensorboard=t, **how) for p, t in outputs]

    def report(progress):
        for log in logs:
            log(progress)
        if (progress.step, progress.validation) == (kill, None):
            raise KilledError

    saved = checkpoint and Checkpoints(checkpoint, steps=steps, resume=resume)
    try:
        return finetune(model, data, config=config, report=report, checkpoints=saved)
    finally:
        for log in logs:
            log.__exit__(None, None, None)


@pytest.fixture(scope="module")
def events(model, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "log.jsonl"
    run(model, data, (path, None))
    return read_log(path)


def scalars(events):
    """Return (step, value) by name, of what holds numbers."""
    found = {}
    for event in events:
        for name, value in figures(event):
            found.setdefault(name, []).append((event.step, value))
    return found


def shown(folder):
    """Return what TensorBoard reads."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {n: [(e.step, e.value) for e in reader.Scalars(n)] for n in reader.Tags()["scalars"]}


def as_float32(found):
    return {n: [(s, float(np.float32(v))) for s, v in c] for n, c in found.items()}


def test_a_log_reads_as_it_was_written(events):
    assert isinstance(events[0], Start)
    assert [(type(e), e.step) for e in events[1:]] == [
        *((Step, 3), (Step, 6), (Step, 9), (Epoch, 11)),
        *((Step, 12), (Step, 15), (Step, 18), (Step, 21), (Epoch, 22)),
    ]


def test_csv_holds_every_number_of_the_run(model, data, events, tmp_path):
    run(model, data, (tmp_path / "log.csv", None))
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        {
            "step": str(e.step),
            "epoch": str(getattr(e, "epoch", 0)),
            "name": name,
            "value": repr(value),
        }
        for e in events
        for name, value in figures(e)
    ]

    assert rows == expected
    assert {"loss", "lr", "metrics/top1"} <= {row["name"] for row in rows}


@pytest.mark.parametrize("kill", [8, 11])  # within an epoch, and before its evaluation
def test_a_killed_run_goes_on_in_its_logs(model, data, events, tmp_path, kill):
    pytest.importorskip("tensorboardX")
    outputs = (tmp_path / "log.jsonl", tmp_path / "board"), (tmp_path / "log.csv", None)
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(KilledError):
        run(model, data, *outputs, kill=kill, checkpoint=checkpoint)
    run(model, data, *outputs, checkpoint=checkpoint, resume=True)
    found = read_log(tmp_path / "log.jsonl")
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = [(int(r["step"]), r["name"], float(r["value"])) for r in csv.DictReader(file)]

    assert [e for e in found if not isinstance(e, Resume)] == events
    assert [e.step for e in found if isinstance(e, Resume)] == [kill // 5 * 5]
    assert shown(tmp_path / "board") == as_float32(scalars(events))
    assert len(list((tmp_path / "board").iterdir())) == 2
    expected = {(s, n): v for n, curve in scalars(events).items() for s, v in curve}
    assert {(s, n): v for s, n, v in rows} == expected


def test_the_end_of_an_epoch_that_comes_again_counts_once(model, data, events, tmp_path):
    """The checkpoint is of the last step of the epoch, before its evaluation."""
    pytest.importorskip("tensorboardX")
    outputs, checkpoint = (tmp_path / "log", tmp_path / "board"), tmp_path / "checkpoint"
    with pytest.raises(KilledError):
        run(model, data, outputs, kill=14, checkpoint=checkpoint, steps=11)
    run(model, data, outputs, checkpoint=checkpoint, steps=11, resume=True)
    found = read_log(tmp_path / "log")

    assert [e.step for e in found if isinstance(e, Epoch)] == [11, 11, 22]
    assert [e.step for e in found if isinstance(e, Resume)] == [11]
    assert log_of(found) == log_of(events)
    once = {name: list(dict.fromkeys(c)) for name, c in shown(tmp_path / "board").items()}
    assert once == {n: list(dict.fromkeys(c)) for n, c in as_float32(scalars(events)).items()}


def test_training_that_starts_again_withdraws_what_was_logged(model, data, tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(epochs=9, threads=1, lr=1.0, scale_lr=0.5, loss="kl")
    result = run(model, data, (tmp_path / "log.jsonl", tmp_path / "board"), config=config)
    found = read_log(tmp_path / "log.jsonl")
    numbers = [e.step for e in found if isinstance(e, Step)]

    assert "restarting" in result.notes[0]
    assert any(isinstance(e, Note) for e in found)
    assert numbers == sorted(set(numbers))
    assert shown(tmp_path / "board") == as_float32(scalars(found))


def test_a_new_run_replaces_the_event_files(model, data, events, tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        run(model, data, (None, tmp_path))

    assert shown(tmp_path) == as_float32(scalars(events))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_an_event_folder_is_said(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "events.out.tfevents.1.host").write_text("")
    for name, message in (
        ("file", "is not a directory"),
        ("none/board", "none' does not exist"),
        ("used", "already contains a run's event files"),
    ):
        with pytest.raises(OnnxQatError, match=message):
            check_event_folder(tmp_path / name, force=False)
    check_event_folder(tmp_path / "used", force=True)
    check_event_folder(tmp_path / "new", force=False)


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(OnnxQatError, match=r"pip install 'onnxqat\[tensorboard\]'"):
        check_event_folder(tmp_path, force=False)


@contextmanager
def largest_file(size):
    """Let the system refuse to make a file larger than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# tensorboardX cannot close a file that it cannot write
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_ends_a_log_and_not_the_training(model, data, events, tmp_path, caplog):
    pytest.importorskip("tensorboardX")
    paths = [tmp_path / name for name in ("log.jsonl", "log.csv", "board")]
    with largest_file(700):
        run(model, data, (paths[0], paths[2]), (paths[1], None))
    found = read_log(paths[0])

    refused = [f"{p}: cannot be written (File too large). Training continues" for p in paths]
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sorted(line.partition(" without")[0] for line in warned) == sorted(refused)
    assert 1 < len(found) < len(events)
    assert found == events[: len(found)]
    rows = paths[1].read_text().splitlines(keepends=True)
    assert rows[1] == f"0,0,metrics/top1,{events[0].metrics['top1']!r}\n"
    assert rows[-1].endswith("\n")
    assert rows[-1].count(",") == 3
    drawn = shown(paths[2])["loss"]
    assert drawn == as_float32(scalars(events))["loss"][: len(drawn)]


def test_the_half_line_of_a_killed_run_is_dropped(tmp_path):
    whole = b'{"event":"start"}\n' * 5000  # more than one block
    for name, before in (("a", whole + b"x" * 70_000), ("b", b"x"), ("c", b""), ("d", whole)):
        path = tmp_path / name
        path.write_bytes(before)
        writer = file_writer(path, option="--log", resume=True)
        writer.open()
        assert path.read_bytes() == (whole if before.startswith(whole) else b"")
        writer.write(Start())
        writer.close()
        assert path.read_bytes().startswith(whole if before.startswith(whole) else b"{")
        assert path.read_bytes().endswith(b"\n")


def test_a_run_that_is_refused_leaves_the_log_as_it_was(model, data, tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "log").write_text("earlier")
    for path in (tmp_path / "log", tmp_path / "new"):
        with pytest.raises(TrainingError, match="too few"):
            run(model, data, (path, tmp_path / "board"), config=Config(batch_size=500))
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
    assert (tmp_path / "log").read_text() == "earlier"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no run from its start"),
        ('{"event":"start"}', "contains no run"),  # its line is still being written
        ('{"event":"step","step":3,"epoch":1,"loss":1.0,"lr":0,"scale_lr":0}\n', "contains no run"),
        ("step,epoch,name,value\n", "line 1 does not belong to a log"),
        ('{"event":"start"}\n{"event":"stop"}\n', "line 2 does not belong to a log"),
        ('{"event":"start"}\n{"event":"note","step":-1,"note":""}\n', "line 2 does not belong"),
        ('{"event":"start"}\n{"event":"note","step":1e99,"note":""}\n', "line 2 does not belong"),
        ('{"event":"start","schema":"onnxqat.log/2"}\n', "line 1 does not belong"),
        ("[" * 100_000 + "\n", "line 1 does not belong"),
        ("\udcff\n", "line 1 does not belong"),
    ],
)
def test_what_is_not_a_log_is_said(tmp_path, text, message):
    path = tmp_path / "log.jsonl"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        read_log(path)


def test_a_log_that_is_not_there_or_too_large_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        read_log(tmp_path / "none")
    monkeypatch.setattr("onnxqat.train.monitoring.writers.LARGEST", 2**20)
    (tmp_path / "large").write_bytes(bytes(2**20 + 1))
    with pytest.raises(DataError, match="is larger than 1 MiB"):
        read_log(tmp_path / "large")
