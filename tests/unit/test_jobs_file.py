"""Job files: inheritance, variables and matrices, and what is wrong with them."""

from __future__ import annotations

import os

import pytest

from onnxqat import toml_files
from onnxqat.errors import JobError
from onnxqat.jobs.file import drafts, read_variable


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "job.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def test_a_file_is_one_job_of_its_name(write):
    (found,) = drafts(write('model = "a.onnx"\n[insert]\nrules = "tensorrt"'))

    assert found.name == "job"
    assert found.table == {"model": "a.onnx", "insert": {"rules": "tensorrt"}}


def test_a_child_changes_keys_of_what_it_extends(write):
    write('model = "a.onnx"\n[insert]\nrules = "tensorrt"\nset = ["weight.bits=4"]', "base.toml")
    (found,) = drafts(write('extends = "base.toml"\n[insert]\nrules = "ncnn"\n[finetune]\nlr = 1'))

    assert found.table == {
        "model": "a.onnx",
        "insert": {"rules": "ncnn", "set": ["weight.bits=4"]},
        "finetune": {"lr": 1},
    }


def test_variables_fill_texts_and_keep_their_type_alone(write):
    text = """
    model = "${folder}/${net}.onnx"
    [variables]
    net = "a"
    folder = "nets/${net}"
    epochs = 3
    [insert]
    set = ["weight.bits=${epochs}", "name:$${x}.quantize=false"]
    [finetune]
    epochs = "${epochs}"
    """
    (found,) = drafts(write(text))
    (given,) = drafts(write(text), {"net": "b"})

    assert found.table["model"] == "nets/a/a.onnx"
    assert found.table["finetune"] == {"epochs": 3}
    assert found.table["insert"]["set"] == ["weight.bits=3", "name:${x}.quantize=false"]
    assert given.table["model"] == "nets/b/b.onnx"


def test_a_matrix_is_a_job_for_each_choice(write):
    text = """
    model = "${model}"
    [insert]
    rules = "${rules}"
    set = ["weight.bits=${bits}"]
    [matrix]
    model = ["nets/a.onnx", {name = "b", model = "nets/b.onnx", data = {mean = 128}}]
    rules = ["tensorrt", "ncnn"]
    bits = [8, 4]
    """
    found = drafts(write(text))

    assert [one.name for one in found[:3]] == [
        "job-a-tensorrt-8",
        "job-a-tensorrt-4",
        "job-a-ncnn-8",
    ]
    assert len(found) == 8
    assert found[1].table["insert"] == {"rules": "tensorrt", "set": ["weight.bits=4"]}
    assert found[0].table["model"] == "nets/a.onnx"
    assert "data" not in found[0].table
    assert found[7].table["model"] == "nets/b.onnx"
    assert found[7].table["data"] == {"mean": 128}


def test_an_entry_with_nothing_but_a_name_is_the_job_unchanged(write):
    path = write('model = "m.onnx"\n[matrix]\nkind = [{name = "as-is"}, {name = "b", seed = 1}]')
    found = drafts(path)

    assert [draft.name for draft in found] == ["job-as-is", "job-b"]
    assert [draft.table.get("seed") for draft in found] == [None, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = ", "not valid TOML"),
        ('extends = ["a"]', "'extends' is ['a']. Name one file."),
        ('extends = "job.toml"', "'extends' forms a circle"),
        ('extends = "none.toml"', "none.toml: no such file."),
        ("variables = 1", "'variables' is 1. Write a table."),
        ('variables = {a = ["x"]}', "variable 'a' is ['x']. Give a string or a number."),
        ('model = "${nett}"\nvariables = {net = "a"}', "'nett' is unknown. The nearest: 'net'."),
        ("[matrix]\nbits = 4", "[matrix] 'bits' is 4. Write a list of values."),
        ("[matrix]\nbits = [4, 8]", "[matrix] 'bits': no key uses it. Write ${bits}"),
        ("[matrix]\nbits = [{data = {}}]", "has a table without a name"),
        ("[matrix]\nbits = [[1]]", "'bits' holds [1]"),
        ('model = "${m}"\nmatrix = {m = ["a/x", "b/x"]}', "two jobs of the matrix have the name"),
        ('name = "../up"', "the job's name '../up' cannot be the name of a folder"),
        ('name = ".."', "the job's name '..' cannot be the name of a folder"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(write, text, said):
    with pytest.raises(JobError) as caught:
        drafts(write(text))

    assert said in str(caught.value)
    assert ".toml: " in str(caught.value)


def test_hostile_files_take_neither_time_nor_memory(write, monkeypatch, tmp_path):
    doubling = "\n".join(f'v{i} = "${{v{i - 1}}}${{v{i - 1}}}"' for i in range(1, 60))
    with pytest.raises(JobError, match="longer than 10000 characters after"):
        drafts(write(f'model = "${{v59}}"\n[variables]\nv0 = "xxxxxxxx"\n{doubling}'))
    axes = "\n".join(f"a{i} = [{', '.join(map(str, range(50)))}]" for i in range(8))
    with pytest.raises(JobError, match="Define at most 1000"):
        drafts(write(f"[matrix]\n{axes}"))
    with pytest.raises(JobError, match=r"is nested too deeply|not valid TOML"):
        drafts(write(f"a = {'[' * 5000}{']' * 5000}"))
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(JobError, match="not a regular file"):
        drafts(tmp_path / "pipe.toml")
    monkeypatch.setattr(toml_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(JobError, match="larger than 10 bytes"):
        drafts(write('model = "a.onnx"'))


def test_a_variable_on_the_command_line_is_toml_or_text():
    assert read_variable("bits=4") == ("bits", 4)
    assert read_variable("rules=my-chip.toml") == ("rules", "my-chip.toml")
    assert read_variable("a=b=c") == ("a", "b=c")
    with pytest.raises(JobError, match="not of the form NAME=VALUE"):
        read_variable("bits")
