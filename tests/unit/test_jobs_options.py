"""The tables of a job file mean what the options of the command line do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from onnxqat.cli import main
from onnxqat.errors import JobError
from onnxqat.jobs import json_schema
from onnxqat.jobs.file import Draft, drafts
from onnxqat.jobs.job import make_job
from onnxqat.jobs.rows import ROWS, steps_of

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "scripts/examples").glob("*.toml"))
# tables of stages, and the commands whose options they have
COMMANDS = {row.name: main.commands[row.name] for row in ROWS if row.name in main.commands}


def job_of(**tables: Any):
    table = {"model": "a.onnx", "data": {"train": "a.npz", "test": "b.npz"}} | tables
    return make_job(Draft(name="job", file=Path("job.toml"), table=table))


def test_values_are_parsed_as_the_command_line_does():
    given = {
        "lr": 0.01, "epochs": 2, "augment": ["flip", "crop"], "group": ["weight.lr=0.1"],
        "checkpoint-every": "7steps", "nesterov": True, "method": "lsq+", "force-labels": False,
    }  # fmt: skip
    words = ["--lr", "0.01", "--epochs", "2", "--augment", "flip,crop", "--group", "weight.lr=0.1"]
    words += ["--checkpoint-every", "7steps", "--nesterov", "--method", "lsq+"]
    context = main.commands["finetune"].make_context("finetune", ["m.onnx", "d.npz", *words])
    found = job_of(finetune=given).options["finetune"]

    assert found == {name: context.params[name] for name in found}
    assert found["augment"] == ("flip", "crop")
    assert found["checkpoint_every"] == {"steps": 7}


def test_data_are_parsed_as_the_command_line_does():
    data = {"train": "a", "test": "b", "mean": 128, "scale": [0.5, 1], "resize-dims": "8,9",
            "input": ["x=pixels"]}  # fmt: skip
    found = job_of(data=data).data

    assert found["mean"] == (128.0,)
    assert found["scale"] == (0.5, 1.0)
    assert found["resize_dims"] == (8, 9)
    assert found["input_map"] == {"x": "pixels"}
    assert found["train"] == "a"


def test_a_preset_stands_for_options_that_are_not_given():
    found = job_of(finetune={"preset": "horizon", "lr": 0.5}).options["finetune"]

    assert found["method"] == "moving-average"
    assert found["lr"] == 0.5


def test_seed_and_threads_are_of_all_stages_that_do_not_say():
    options = job_of(seed=5, threads=2, finetune={"seed": 6}).options

    assert options["calibrate"]["seed"] == 5
    assert options["finetune"]["seed"] == 6
    assert options["evaluate"]["threads"] == options["finetune"]["threads"] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_is_an_option_of_the_command(name):
    """Whatever stands in a table exists on the command line, under that name and type."""
    row = next(row for row in ROWS if row.name == name)
    options = {opt: param for param in COMMANDS[name].params for opt in param.opts}
    from onnxqat.jobs.tables import key_of, params_of

    for param in params_of(row.options, without=row.without):
        same = options[f"--{key_of(param)}"]
        assert (same.name, same.multiple, same.is_flag) == (
            param.name,
            param.multiple,
            param.is_flag,
        )


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"finetune": {"epoch": 1}}, "[finetune] has no key 'epoch'. The nearest: 'epochs'"),
        ({"finetun": {}}, "'finetun' is unknown. The nearest: 'finetune'"),
        ({"finetune": {"epochs": "many"}}, "[finetune] 'epochs': expected 'int', got 'str'."),
        ({"finetune": {"epochs": 0}}, "[finetune] 'epochs': expected 'int' >= 1."),
        ({"finetune": {"method": "lqs"}}, "[finetune] 'method': invalid enum value 'lqs'."),
        (
            {"finetune": {"augment": "flap"}},
            "[finetune] 'augment': 'flap' is not one of flip, crop",
        ),
        ({"finetune": {"preset": "none"}}, "[finetune] 'preset': No preset 'none'"),
        ({"finetune": {"resume": True}}, "[finetune] has no key 'resume'"),
        ({"finetune": 3}, "[finetune] is 3. Write a table."),
        ({"data": {"mean": "x", "train": "a", "test": "b"}}, "[data] 'mean': 'x' is not a list"),
        ({"data": {"train": "a"}}, "[data] 'test' is missing. Name the data."),
        ({"export": {}}, "[export] 'format': "),
        ({"skip": ["tune"]}, "'skip[0]': invalid enum value 'tune'"),
        ({"tolerance": {"tuned": {"top1": -1}}}, "'tolerance[...][...]': expected 'float' >= 0.0"),
        ({"model": ""}, "'model': expected 'str' of length >= 1"),
    ],
)
def test_what_is_wrong_is_named_with_file_table_and_key(tables, said):
    with pytest.raises(JobError) as caught:
        job_of(**tables)

    assert str(caught.value).startswith("job.toml: ")
    assert said in str(caught.value)


def test_a_model_is_needed():
    with pytest.raises(JobError, match=r"job.toml: 'model' is missing"):
        make_job(Draft(name="job", file=Path("job.toml"), table={}))


def test_steps_follow_from_the_tables():
    plain = [step.name for step in steps_of(job_of(skip=["symmetric"]))]
    whole = steps_of(job_of(insert={"equalize": True}, finetune={}, analyze={}, report={}))
    by_name = {step.name: step for step in whole}

    assert plain == [
        *("check", "insert.post-training", "calibrate.post-training", "evaluate.float"),
        *("evaluate.post-training", "evaluate.integer", "strip.post-training"),
    ]
    assert by_name["finetune.tuned"].source == "calibrate.repaired"
    assert by_name["evaluate.integer"].source == by_name["strip.tuned"].source == "finetune.tuned"
    assert by_name["evaluate.repaired"].source == "calibrate.repaired"
    assert by_name["strip.post-training"].source == "calibrate.post-training"
    assert by_name["analyze.tuned"].after == ("finetune.tuned",)
    assert whole[-1].name == "report.tuned"
    assert whole[-1].beside == ("calibrate.post-training", "calibrate.repaired")
    assert len(whole[-1].after) == len(whole) - 1


@pytest.mark.parametrize(
    ("rules", "baselines"),
    [
        ("onnxruntime-cpu", {"symmetric"}),
        ("sophgo-bm1684x", {"asymmetric"}),
        ("sophgo-cv183x", set()),
        ("tensorrt", set()),
        ("no-such-rule", set()),  # the stage that reads it says so
    ],
)
def test_a_chip_with_two_modes_has_a_baseline_in_each(rules, baselines):
    steps = steps_of(job_of(insert={"rules": rules, "equalize": True}, finetune={}))
    found = {name: {s.variant for s in steps if s.row.name == name} for name in
             ("insert", "calibrate", "finetune", "evaluate", "strip")}  # fmt: skip
    quantized = {"post-training", "repaired", *baselines}

    assert found["insert"] == found["calibrate"] == quantized
    assert found["finetune"] == {"tuned"}
    assert found["evaluate"] == {"float", "tuned", "integer", *quantized}
    assert found["strip"] == {"tuned", "post-training", *baselines}
    source = next(s.source for s in steps if s.name == "finetune.tuned")
    assert source == "calibrate.repaired"


def test_skipped_stages_do_not_run():
    steps = [step.name for step in steps_of(job_of(skip=["check", "evaluate"], finetune={}))]

    assert steps[0] == "insert.post-training"
    assert not any(name.startswith("evaluate") for name in steps)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_fit_the_schema(path):
    import tomllib

    jsonschema.validate(tomllib.loads(path.read_text()), json_schema())
    assert all(make_job(draft) for draft in drafts(path))


@pytest.mark.parametrize(
    "table",
    [
        {"finetune": {"epochs": 0}},
        {"finetune": {"epoch": 1}},
        {"insert": {"equalize": "yes"}},
        {"matrix": {"bits": []}},
        {"tuned": 1},
    ],
)
def test_the_schema_refuses_what_a_job_refuses(table):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, json_schema())


def test_the_schema_knows_variables_and_helps():
    schema = json_schema()
    jsonschema.validate({"finetune": {"epochs": "${epochs}"}}, schema)
    lr = schema["$defs"]["FinetuneTable"]["properties"]["lr"]

    (option,) = (p for p in main.commands["finetune"].params if p.name == "lr")
    assert lr["description"] == option.help
    assert msgspec.json.encode(schema)


def test_what_a_list_names_and_what_lies_beside_images_is_part_of_the_data(tmp_path):
    """So that a step runs again when they change."""
    from onnxqat.jobs.records import _digest

    job = make_job(
        Draft(
            name="job",
            file=tmp_path / "job.toml",
            table={"model": "a.onnx", "data": {"train": "list.txt", "test": "images"}},
        )
    )
    for name in ("images/a.png", "labels/a.txt", "masks/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    (tmp_path / "list.txt").write_text("images/a.png 3\n")

    def seen():
        return [_digest(job, job.split(name)) for name in ("train", "test")]

    first = seen()
    assert seen() == first
    (tmp_path / "labels/a.txt").write_text("22")
    second = seen()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False]
    (tmp_path / "masks/a.png").write_text("22")
    third = seen()
    assert [a == b for a, b in zip(second, third, strict=True)] == [True, False]
    (tmp_path / "images/a.png").write_text("22")
    assert [a == b for a, b in zip(third, seen(), strict=True)] == [False, False]


def test_a_first_job_finds_the_splits_of_a_folder(tmp_path):
    from onnxqat.jobs.first import _splits

    for name in ("images/train", "images/val", "labels/train"):
        (tmp_path / name).mkdir(parents=True)
    found, doubt = _splits(tmp_path)

    assert found == {name: tmp_path / "images" / split
                     for name, split in (("train", "train"), ("test", "val"))}  # fmt: skip
    assert "no test data were found" in doubt
