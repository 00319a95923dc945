"""What single stages of a job do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnxqat as oq
from onnxqat.errors import JobError
from onnxqat.jobs import stages
from onnxqat.jobs.file import Draft
from onnxqat.jobs.job import make_job
from onnxqat.jobs.records import key_of_step
from onnxqat.jobs.rows import steps_of
from onnxqat.jobs.work import Ending, Work
from onnxqat.overrides import read_overrides
from onnxqat.quantized import load_model
from tests.digits import write_digits

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.npz"
    with np.load(MODELS / "spans-train.npz") as arrays:
        np.savez(path, **{name: values[:48] for name, values in arrays.items()})
    return path


@pytest.fixture
def work(texts, tmp_path):
    def make(**tables):
        data = {"train": str(texts), "test": str(texts), "truth": ["start=starts", "end=ends"]}
        table = {"model": str(MODELS / "spans.onnx"), "data": data, "threads": 1} | tables
        job = make_job(Draft(name="job", file=tmp_path / "job.toml", table=table))
        return Work(job, tmp_path, lambda _: None, Ending())

    return make


def step_of(work: Work, name: str):
    return next(step for step in steps_of(work.job) if step.name == name)


def weights(model):
    return {name: t.values for name, t in model.graph.tensors().items() if hasattr(t, "values")}


def test_inserting_equalizes_with_the_data_of_the_job(work, texts):
    one = work(insert={"equalize": True})
    for variant in ("post-training", "repaired"):
        stages.insert(one, step_of(one, f"insert.{variant}"))
    plain, repaired = (
        load_model(one.folder / f"models/insert.{variant}.onnx")
        for variant in ("post-training", "repaired")
    )
    command = oq.insert(MODELS / "spans.onnx", data=texts, equalize=True)

    assert repaired.state == "uncalibrated"
    found, wanted, before = map(weights, (repaired.floats, command.floats, plain.floats))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    # ranges of a normalization move with data alone
    assert any(name in before and not np.array_equal(found[name], before[name]) for name in found)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", 32)


@pytest.mark.parametrize(("bits", "written"), [(8, True), (4, False)])
def test_a_baseline_in_the_other_mode_is_written_if_its_table_can_hold_it(
    bits, written, work, digits
):
    insert = {"rules": "sophgo-bm1684x", "set": [f"activation.bits={bits}", "first.bits=8"]}
    data = {"train": str(digits), "test": str(digits), "mean": 128, "scale": 0.0078125}
    one = work(model=str(MODELS / "lenet5.onnx"), data=data, insert=insert)
    for name in ("insert.asymmetric", "calibrate.asymmetric"):
        step = step_of(one, name)
        step.row.run(one, step)
    result = stages.strip(one, step_of(one, "strip.asymmetric"))
    model = load_model(one.folder / "models/calibrate.asymmetric.onnx")

    assert {p.spec.symmetric for p in model.plan.points if p.role == "activation"} == {False}
    assert {p.spec.symmetric for p in model.plan.points if p.role == "weight"} == {True}
    assert bool(result.files) == written
    assert [note for note in result.notes if "asymmetric: not written for the chip" in note] == (
        [] if written else list(result.notes)
    )


def test_what_equalizes_depends_on_the_data(work, texts):
    keys = {}
    for path in (texts, MODELS / "spans-test.npz"):
        one = work(insert={"equalize": True})
        one.job.data["train"] = str(path)
        for name in ("insert.post-training", "insert.repaired"):
            keys[name, path] = key_of_step(one.job, step_of(one, name), {})
    plain, repaired = (
        [key for (name, _), key in keys.items() if name == f"insert.{variant}"]
        for variant in ("post-training", "repaired")
    )

    assert plain[0] == plain[1]
    assert repaired[0] != repaired[1]


def test_a_search_writes_the_widths_that_another_job_takes(work, tmp_path):
    digits = str(write_digits(tmp_path / "digits.npz", 24))
    tables = {
        "model": str(MODELS / "lenet5.onnx"),
        "data": {"train": digits, "test": digits, "mean": 128, "scale": 0.0078125},
        "search": {"bits": 6, "widths": "4,8", "metric": "error", "samples": 8},
    }
    one = work(**tables)
    for name in ("insert.post-training", "calibrate.post-training"):
        step = step_of(one, name)
        step.row.run(one, step)
    found = stages.search(one, step_of(one, "search.post-training"))
    overrides = read_overrides(one.folder / "widths.toml")

    assert found.figures["average bits"] <= 6
    assert {override.key for override in overrides} == {"bits"}
    assert 4 in {override.value for override in overrides}
    both = work(**tables | {"search": tables["search"] | {"max-loss": 1}})
    with pytest.raises(JobError, match=r"\[search\] needs either 'max-loss' or 'bits'"):
        stages.search(both, step_of(both, "search.post-training"))
