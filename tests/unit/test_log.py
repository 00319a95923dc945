"""What is logged, read back by somebody else: csv, TensorBoard's own reader, XML."""

from __future__ import annotations

import csv
import logging
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest

from onnxqat.errors import DataError, OnnxQatError, TrainingError
from onnxqat.train import (
    Checkpoints,
    Config,
    TrainingLog,
    check_event_folder,
    check_plotting,
    finetune,
    read_log,
    write_report,
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
    assert report_of(found, tmp_path / "a.html") == report_of(events, tmp_path / "b.html")
    once = {name: list(dict.fromkeys(c)) for name, c in shown(tmp_path / "board").items()}
    assert once == {n: list(dict.fromkeys(c)) for n, c in as_float32(scalars(events)).items()}


def test_training_that_starts_again_withdraws_what_was_logged(model, data, tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(epochs=9, threads=1, lr=1.0, scale_lr=0.5, loss="kl")
    result = run(model, data, (tmp_path / "log.jsonl", tmp_path / "board"), config=config)
    found = read_log(tmp_path / "log.jsonl")
    numbers = [e.step for e in found if isinstance(e, Step)]

    assert "starting again" in result.notes[0]
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
        ("used", "already holds a run's event files"),
    ):
        with pytest.raises(OnnxQatError, match=message):
            check_event_folder(tmp_path / name, force=False)
    check_event_folder(tmp_path / "used", force=True)
    check_event_folder(tmp_path / "new", force=False)


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(OnnxQatError, match=r"pip install 'onnxqat\[tensorboard\]'"):
        check_event_folder(tmp_path, force=False)
    with pytest.raises(OnnxQatError, match=r"pip install 'onnxqat\[report\]'"):
        check_plotting()


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

    refused = [f"{p}: cannot be written (File too large). Training goes on" for p in paths]
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
        ("", "holds no run from its start"),
        ('{"event":"start"}', "holds no run"),  # its line is still being written
        ('{"event":"step","step":3,"epoch":1,"loss":1.0,"lr":0,"scale_lr":0}\n', "holds no run"),
        ("step,epoch,name,value\n", "line 1 is not of a log"),
        ('{"event":"start"}\n{"event":"stop"}\n', "line 2 is not of a log"),
        ('{"event":"start"}\n{"event":"note","step":-1,"note":""}\n', "line 2 is not"),
        ('{"event":"start"}\n{"event":"note","step":1e99,"note":""}\n', "line 2 is not"),
        ('{"event":"start","schema":"onnxqat.log/2"}\n', "line 1 is not"),
        ("[" * 100_000 + "\n", "line 1 is not"),
        ("\udcff\n", "line 1 is not"),
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


class Page(HTMLParser):
    """The cells of every table by its id, and what else is written."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.cell, self.text, self.tags = {}, None, "", set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "table":
            self.rows = self.tables[dict(attrs)["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell += data


def curves(text):
    """Return the points of every curve in the units of the picture, by figure and name."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
            if "/" in group.get("id", ""):
                path = group.find("{http://www.w3.org/2000/svg}path").get("d")
                numbers = re.findall(r"[ML] (\S+) (\S+)", path)
                found[group.get("id")] = np.array(numbers, np.float64)
    return found


def report_of(events, path, **how):
    pytest.importorskip("matplotlib")
    write_report(path, events, title="run", **how)
    return path.read_text(encoding="utf-8")


def same_up_to_axes(drawn, logged):
    """Compare the curves of a figure with what was logged; its axes have units of their own."""
    assert [len(d) for d in drawn] == [len(curve) for curve in logged]
    found, expected = np.concatenate(drawn), np.concatenate(logged).astype(np.float64)
    for axis in range(2):
        values, places = expected[:, axis], found[:, axis]
        first, last = np.argmin(values), np.argmax(values)
        ratio = (places[last] - places[first]) / (np.ptp(values) or 1.0)
        drawn_at = places[first] + ratio * (values - values[first])
        np.testing.assert_allclose(places, drawn_at, rtol=0, atol=1e-3)
        assert abs(places[last] - places[first]) > 50 or np.ptp(values) == 0  # of the picture


def test_the_curves_of_a_report_are_those_of_the_log(events, tmp_path):
    drawn, logged = curves(report_of(events, tmp_path / "r.html")), scalars(events[1:])
    logged["loss"] = sorted(dict(logged["loss"]).items())  # once where an epoch ends at a step
    kinds = {name.partition("/")[0] for name in logged}
    names = {kind: [n for n in logged if n.startswith(f"{kind}/")] for kind in kinds}
    for kind in ("scale_drift", "clipped"):
        names[kind] = sorted(names[kind], key=lambda n: -abs(logged[n][-1][1]))[:8]
    expected = {
        "Loss": ["loss"],
        "Learning rates": ["lr", "scale_lr"],
        "Held-out data": ["metrics/top1", "metrics/top5", "metrics/agreement"],
        "Held-out data: max_abs_diff": ["metrics/max_abs_diff"],
        "Held-out data: loss": ["metrics/loss"],
        "Scale drift": names["scale_drift"],
        "Clipped values": names["clipped"],
    }

    assert len(names["metrics"]) == 5
    for figure, shown_names in expected.items():
        found = [drawn.pop(f"{figure}/{n.partition('/')[2] or n}") for n in shown_names]
        same_up_to_axes(found, [logged[n] for n in shown_names])
    assert drawn == {}


def test_the_tables_of_a_report_are_those_of_the_log(events, tmp_path):
    page = Page(report_of(events, tmp_path / "r.html"))
    epochs = [e for e in events if isinstance(e, Epoch)]
    last = epochs[-1]

    assert page.tables["epochs"][0] == ["epoch", "loss", *last.metrics]
    assert page.tables["epochs"][1:] == [
        [str(e.epoch), f"{e.loss:.6g}", *(f"{v:.6g}" for v in e.metrics.values())] for e in epochs
    ]
    cells = {name: values for name, *values in page.tables["points"][1:]}
    assert cells.keys() == last.scale_drift.keys() | last.clipped.keys()
    for name, (drift, clipped) in cells.items():
        assert drift == (f"{last.scale_drift[name]:.6g}" if name in last.scale_drift else "")
        assert clipped == (f"{last.clipped[name]:.6g}" if name in last.clipped else "")
    order = [abs(float(row[1] or 0)) for row in page.tables["points"][1:]]
    assert order == sorted(order, reverse=True)


NAMES = ["<script>alert(1)</script>", "_hidden", "$a_{", "卷积/輸出", 'a"b&c', "x" * 200]


def test_names_stand_in_a_report_as_they_are(tmp_path):
    values = {name: float(i) for i, name in enumerate(NAMES)}
    where = {"step": 5, "epoch": 1, "loss": 1.0, "metrics": {"top1": None}}
    events = [Start(), Note(step=1, note="<b>again</b>")]
    events.append(Epoch(**where, scale_drift=values, clipped={}))
    text = report_of(events, tmp_path / "r.html")
    page = Page(text)

    assert {row[0] for row in page.tables["points"][1:]} == set(NAMES)
    assert "<b>again</b> (step 1)" in page.text
    assert page.tags.isdisjoint({"script", "b"})
    assert {f"Scale drift/{name}" for name in NAMES} <= curves(text).keys()
    assert " _hidden" in page.text


def test_a_report_refers_to_nothing_and_is_the_same_each_time(events, tmp_path):
    text = report_of(events, tmp_path / "r.html")

    assert text == report_of(events, tmp_path / "again.html")
    assert not re.search(r"(src|href)=\"(?!#)", text)
    with pytest.raises(OnnxQatError, match="already exists"):
        report_of(events, tmp_path / "r.html")
    assert report_of(events, tmp_path / "r.html", force=True) == text


def test_a_report_of_a_run_that_just_began_has_no_curves(tmp_path):
    page = Page(report_of([Start()], tmp_path / "r.html"))

    assert ("0 steps, 0 epochs" in page.text, "svg" in page.tags) == (True, False)


def test_a_report_reads_no_settings_of_the_current_folder(events, tmp_path):
    pytest.importorskip("matplotlib")
    write_report(tmp_path / "usual.html", events[:4], title="run")
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 77\nno.such.key: 1\n")
    code = (
        "import msgspec, sys\n"
        "from onnxqat.train import read_log, write_report\n"
        "write_report('here.html', read_log('log'), title='run')\n"
    )
    lines = [msgspec.json.encode(event) + b"\n" for event in events[:4]]
    (tmp_path / "log").write_bytes(b"".join(lines))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stderr == ""
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "usual.html").read_bytes()
