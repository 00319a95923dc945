"""Job files by the command line: caching, interruption, broken jobs, tolerances, init."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from onnxqat.cli import main
from onnxqat.jobs import plan_jobs
from onnxqat.jobs.file import drafts
from onnxqat.jobs.job import make_job
from onnxqat.overrides import read_overrides
from tests.digits import write_digits
from tests.networks import convnet, detector, samples

pytestmark = pytest.mark.usefixtures("one_core")
MODELS = Path(__file__).parents[2] / "models"
EXAMPLES = Path(__file__).parents[2] / "scripts/examples"
JOB = """
model = "nets/lenet5.onnx"
threads = 1

[data]
train = "train.npz"
test = "test.npz"
mean = 128
scale = 0.0078125

[insert]
rules = "sophgo-bm1684x"
set = ["weight.bits=4", "weight.axis=none"]

[calibrate]
samples = 32
bias-correction = true

[finetune]
epochs = 5
batch-size = 8
checkpoint-every = "1steps"

[analyze]
samples = 8

[tolerance.tuned]
top1 = 0.5
"""
# would be imported by a Python that looks for modules in the current folder
HOSTILE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


def invoke(*words: Any) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def summary(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def states(job: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["state"] for step in job["steps"]}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, few digits, a job, and what came of the job."""
    folder = tmp_path_factory.mktemp("work")
    for split in ("train", "test"):
        write_digits(folder / f"{split}.npz", 96, split=split)
    (folder / "nets").mkdir()
    shutil.copy(MODELS / "lenet5.onnx", folder / "nets")
    (folder / "job.toml").write_text(JOB)
    for name in ("numpy", "onnx", "msgspec"):
        (folder / f"{name}.py").write_text(HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = invoke("run", "job.toml", "--json")
    assert result.exit_code == 0, result.output
    (folder / "first.json").write_text(result.stdout)
    return folder


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    """A copy of the folder, as the current one."""
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def first(work):
    (job,) = json.loads((work / "first.json").read_text())["jobs"]
    return job


def test_a_job_ends_with_figures_and_what_leaves_for_the_chip(work, first):
    tables = [
        work / "runs/job" / chip / "model_cali_table"
        for chip in ("chip", "chip-post-training", "chip-asymmetric")
    ]

    assert first["status"] == "done"
    assert list(first["figures"]) == [
        *("float", "post-training", "asymmetric", "repaired", "tuned", "integer")
    ]
    assert all(0 <= figures["top1"] <= 1 for figures in first["figures"].values())
    assert all(path.is_file() for path in tables)
    assert len({path.read_bytes() for path in tables}) == 3
    assert "--asymmetric" in (tables[2].parent / "compile.sh").read_text()
    assert "--asymmetric" not in (tables[1].parent / "compile.sh").read_text()
    assert (work / "runs/summary.html").read_text().count("<tr") == 2
    assert "| job | done | top1 |" in (work / "runs/summary.md").read_text()
    assert json.loads((work / "runs/job/analysis.json").read_text())["layers"]
    assert read_overrides(work / "runs/job/advice.toml")
    assert not list(work.glob("*.ran"))  # the job's folder holds modules that nobody named


def test_the_figures_are_those_of_the_commands(work, first, monkeypatch):
    monkeypatch.chdir(work)
    words = ("--against", "nets/lenet5.onnx", "--threads", 1, "--json")
    for variant, path in (
        ("post-training", "calibrate.post-training"),
        ("tuned", "finetune.tuned"),
    ):
        found = invoke("evaluate", f"runs/job/models/{path}.onnx", "test.npz", *words)
        assert summary(found)["metrics"]["top1"] == first["figures"][variant]["top1"]
        assert summary(found)["agreement"] == first["figures"][variant]["agreement"]


def test_what_is_finished_is_not_run_again(here, first):
    (again,) = summary(invoke("run", "job.toml", "--json"))["jobs"]

    assert set(states(again).values()) == {"cached"}
    assert again["figures"] == first["figures"]
    planned = plan_jobs(["job.toml"])
    assert {one.state for one in planned} == {"done"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("[tolerance.tuned]\ntop1 = 0.5", "[tolerance.tuned]\ntop1 = 0.4"), []),
        (("threads = 1", "threads = 2"), []),
        (("epochs = 5", "epochs = 1"), ["analyze.tuned", "evaluate.integer", "evaluate.tuned",
                                         "finetune.tuned", "strip.tuned"]),
        (("samples = 32", "samples = 16"), None),
    ],
)  # fmt: skip
def test_a_change_runs_what_depends_on_it(here, change, again):
    text = (here / "job.toml").read_text()
    assert change[0] in text
    (here / "job.toml").write_text(text.replace(*change))
    steps = {one.step: one.state for one in plan_jobs(["job.toml"])}
    run = sorted(name for name, state in steps.items() if state == "run")

    if again is None:  # all behind the calibration
        again = sorted(n for n in steps if n not in ("check", "evaluate.float")
                       and not n.startswith("insert"))  # fmt: skip
    assert run == again


def test_other_contents_and_lost_or_edited_files_run_again(here):
    def to_run() -> set[str]:
        return {one.step for one in plan_jobs(["job.toml"]) if one.state == "run"}

    with np.load("test.npz") as arrays:
        np.savez("test.npz", images=arrays["images"], label=arrays["label"][::-1])
    assert to_run() == {f"evaluate.{v}" for v in ("float", "post-training", "asymmetric",
                                                  "repaired", "tuned", "integer")}  # fmt: skip
    with (here / "runs/job/chip/model_cali_table").open("a") as table:
        table.write("edited\n")
    (here / "runs/job/steps/check.json").write_text("{")
    assert {"strip.tuned", "check"} <= to_run()
    shutil.copy(MODELS / "mobilenet-digits.onnx", here / "nets/lenet5.onnx")
    assert to_run() == {one.step for one in plan_jobs(["job.toml"])}


def process(*words: Any) -> subprocess.Popen[bytes]:
    code = "from onnxqat.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_for(found: Any, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return value


def test_a_killed_run_goes_on_to_the_same_result(here, work):
    folder = here / "runs/job"
    for step in ("calibrate.repaired", "finetune.tuned", "strip.tuned"):
        for path in folder.glob(f"*/{step}.*"):
            path.unlink()
    shutil.rmtree(folder / "chip")
    running = process("run", "job.toml")
    wait_for(lambda: list((folder / "models").glob("finetune.tuned.*.checkpoint")))
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    assert not (folder / "models/finetune.tuned.onnx").exists()
    result = invoke("run", "job.toml", "--json")
    (job,) = summary(result)["jobs"]
    log = [json.loads(line) for line in (folder / "finetune.jsonl").read_text().splitlines()]

    assert result.exit_code == 0
    assert states(job)["calibrate.repaired"] == "cached"
    assert states(job)["finetune.tuned"] == "done"
    assert "resume" in [event["event"] for event in log]
    for name in ("models/finetune.tuned.onnx", "chip/model.onnx", "chip/model_cali_table"):
        assert (folder / name).read_bytes() == (work / "runs/job" / name).read_bytes()
    assert not list((folder / "models").glob("*.checkpoint"))


MATRIX = """
extends = "job.toml"
model = "nets/${model}.onnx"
skip = ["finetune"]

[insert]
rules = "${rules}"
set = []

[calibrate]
bias-correction = false

[matrix]
model = ["lenet5", "broken"]
rules = ["tensorrt"]

[tolerance.post-training]
top1 = 0.5
"""


def test_broken_jobs_do_not_stop_the_others(here):
    (here / "matrix.toml").write_text(MATRIX)
    (here / "nets/broken.onnx").write_bytes(b"no model")
    (here / "wrong.toml").write_text("modell = 'a.onnx'")
    result = invoke("run", "matrix.toml", "wrong.toml", "--jobs", 2, "--json")
    jobs = {job["name"]: job for job in summary(result)["jobs"]}

    assert result.exit_code == 1
    assert [job["status"] for job in jobs.values()] == ["missed", "failed", "failed"]
    good, bad = jobs["matrix-lenet5-tensorrt"], jobs["matrix-broken-tensorrt"]
    limits = {one["variant"]: one["held"] for one in good["tolerances"]}
    assert limits == {"tuned": False, "post-training": True}  # that of job.toml: not measured
    assert list(good["figures"]) == ["float", "post-training", "integer"]
    assert "broken.onnx" in bad["message"]
    assert "'modell' is unknown. The nearest: 'model'" in jobs["wrong"]["message"]
    assert "3 of 3 jobs did not succeed: 'matrix-lenet5-tensorrt' missed" in result.stderr


def test_a_crash_is_one_failed_job(here, monkeypatch):
    (here / "crash.py").write_text("import os\ndef data():\n    os.kill(os.getpid(), 11)\n")
    text = JOB.replace('"train.npz"', '"crash:data"').replace("[finetune]", "[analyze]")
    text = text[: text.index("epochs")].replace("[calibrate]", "[calibrate]\nseed = 1")
    (here / "crash.toml").write_text(text)
    result = invoke("run", "crash.toml", "--json")
    (job,) = summary(result)["jobs"]

    assert result.exit_code == 1
    assert job["status"] == "failed"
    assert "was ended by SIGSEGV" in job["message"]
    assert states(job)["insert.post-training"] == "done"


def test_question_answering_passes_the_fast_test(tmp_path):
    name = "question-answering"  # a page in the docs runs the classifier
    result = invoke("run", EXAMPLES / f"{name}.toml", "--fast-test", "-o", tmp_path, "--json")
    (job,) = summary(result)["jobs"]
    record = json.loads(
        (tmp_path / f"{name}.fast-test/steps/calibrate.post-training.json").read_text()
    )

    assert result.exit_code == 0, result.output
    assert job["name"] == f"{name}.fast-test"
    assert record["figures"]["samples"] == 30
    assert job["tolerances"] == []
    report = tmp_path / f"{name}.fast-test/report.html"
    assert report.read_text().startswith("<!doctype html>")
    assert (tmp_path / f"{name}.fast-test/chip/model.onnx").is_file()
    assert {"float", "post-training", "tuned", "integer"} <= job["figures"].keys()


SHORTER = """
[calibrate]
bias-correction = false

[finetune]
epochs = 1

[matrix]
learns = [{{name = "labels", finetune = {{loss = "{loss}"}}}}]
"""


def test_the_detector_passes_the_fast_test(tmp_path):
    pytest.importorskip("pycocotools")
    job_file = EXAMPLES / "detector.toml"
    variants = [draft.table for draft in drafts(job_file)]
    text = job_file.read_text().replace("../../models", str(MODELS))
    (tmp_path / "whole.toml").write_text(text)
    shorter = SHORTER.format(loss=MODELS / "shapes-loss.onnx")
    (tmp_path / "detector.toml").write_text(f'extends = "whole.toml"\n{shorter}')
    result = invoke("run", tmp_path / "detector.toml", "--fast-test", "-o", tmp_path, "--json")
    (job,) = summary(result)["jobs"]
    figures = {variant: found["map"] for variant, found in job["figures"].items()}

    assert result.exit_code == 0, result.output
    assert [table["finetune"].get("loss") for table in variants] == [
        "../../models/shapes-loss.onnx",
        None,
    ]
    assert list(figures) == ["float", "post-training", "tuned", "integer"]
    assert figures["float"] > figures["post-training"] + 0.02
    assert min(figures.values()) > 0.4
    assert (tmp_path / "detector-labels.fast-test/chip/compile.sh").is_file()


def test_init_writes_a_job_from_what_it_finds(here):
    for split in ("train", "test"):
        Path(f"{split}.npz").rename(f"digits-{split}.npz")
    words = ("init", "nets/lenet5.onnx", "digits-train.npz", "--rules", "sophgo-bm1684x")
    said = summary(invoke(*words, "-o", "nets/first.toml", "--json"))
    text = (here / "nets/first.toml").read_text()
    (draft,) = drafts("nets/first.toml")
    job = make_job(draft)

    assert said["output"] == "nets/first.toml"
    assert len(said["guesses"]) == text.count("# guess: ") == 3
    assert (job.model, job.split("train")) == ("lenet5.onnx", "../digits-train.npz")
    assert job.split("test") == "../digits-test.npz"
    assert job.data["mean"] in ((127.5,), (128.0,))  # that of its training, or nearly
    assert job.tolerance == {"tuned": {"top1": 0.01}}
    assert {one.state for one in plan_jobs(["nets/first.toml"])} == {"run"}
    refused = invoke(*words, "-o", "nets/first.toml")
    assert (refused.exit_code, "already exists" in refused.stderr) == (1, True)


def test_init_finds_the_preprocessing_of_a_detector_by_its_training_images(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    with np.load(MODELS / "shapes-train.npz") as shapes:
        images, boxes = shapes["images"][:12], shapes["boxes"][:12]
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
    for number, (image, rows) in enumerate(zip(images, boxes, strict=True)):
        Image.fromarray(image).save(tmp_path / f"images/train/{number:02}.png")
        text = "".join(f"{int(c)} {x} {y} {w} {h}\n" for c, x, y, w, h in rows if c >= 0)
        (tmp_path / f"labels/train/{number:02}.txt").write_text(text)
    (tmp_path / "images/val/0.png").write_bytes(b"broken: it is read by no guess")
    Path("data.yaml").write_text("train: images/train\nval: images/val\nnames: [e, r, t]\n")
    said = invoke("init", MODELS / "shapes.onnx", "data.yaml", "--rules", "sophgo-bm1684x")
    (draft,) = drafts("job.toml")
    job = make_job(draft)

    assert said.exit_code == 0, said.output
    assert (job.data["scale"], job.data["keep_aspect_ratio"]) == ((1 / 255,), True)
    assert job.options["evaluate"]["metrics"] == ("map",)
    assert job.tolerance == {"tuned": {"map": 0.01}}


@pytest.mark.parametrize(
    ("name", "tolerance", "metrics"),
    [("scores", {"agreement": 0.05}, ()), ("boxes", {"cosine": 0.01}, ("cosine",))],
)
def test_init_judges_by_what_can_be_measured_without_labels(
    name, tolerance, metrics, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = convnet() if name == "scores" else detector()
    onnx.save(model, "m.onnx")
    np.savez("data.npz", input=samples(model, 4))
    said = invoke("init", "m.onnx", "data.npz", "--rules", "sophgo-bm1684x")
    (draft,) = drafts("job.toml")
    job = make_job(draft)

    assert said.exit_code == 0, said.output
    assert job.tolerance == {"tuned": tolerance}
    assert job.options["evaluate"]["metrics"] == metrics
    assert "mean" in Path("job.toml").read_text()  # as a comment, for images
    assert job.data["mean"] is None
