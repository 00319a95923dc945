"""Lists of files, as text and as CSV, give what the files give by themselves."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, open_data
from onnxqat.errors import DataError

SPEC = InputSpec(name="input", shape=("n", 3, 4, 6), dtype="float32")
RNG = np.random.default_rng(1)
COUNT = 4


@pytest.fixture
def folder(tmp_path):
    """Images and arrays, whose names have spaces; and a folder for lists beside them."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "my images").mkdir()
    for number in range(COUNT):
        pixels = RNG.integers(0, 256, (4, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "my images" / f"{number}.png")
        np.save(tmp_path / f"{number}.npy", RNG.normal(size=(2, 3)).astype(np.float32))
    return tmp_path


def pixels_of(folder, *numbers):
    files = (folder / "my images" / f"{number}.png" for number in numbers)
    return np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)


def written(folder, text, name="list.txt"):
    path = folder / "lists" / name
    path.write_text(text, encoding="utf-8")
    return path


def read(path, *specs, **options):
    with open_data(path, specs or (SPEC,), **options) as data:
        (batch,) = data.batches(100)
        return data, batch


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_paths_and_labels(folder, absolute, end):
    start = f"{folder}/" if absolute else "../"
    lines = [f"{start}my images/{n}.png {label}" for n, label in ((3, 7), (0, 0), (3, 7))]
    _, batch = read(written(folder, end.join(["\ufeff" + lines[0], "", *lines[1:]]) + end))

    np.testing.assert_array_equal(batch.inputs["input"], pixels_of(folder, 3, 0, 3))
    np.testing.assert_array_equal(batch.labels, [7, 0, 7])


def test_lines_without_labels(folder):
    _, batch = read(written(folder, "../my images/1.png\n../my images/2.png"))

    np.testing.assert_array_equal(batch.inputs["input"], pixels_of(folder, 1, 2))
    assert batch.labels is None


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n../my images/1.png,ant\n../my images/0.png,cat\n",
        'class,filename\nant,"../my images/1.png"\ncat,../my images/0.png\n',
        "../my images/1.png,ant\n../my images/0.png,cat\n",
    ],
)
def test_tables_of_paths_and_names_of_classes(folder, text):
    classes = {"ant": 0, "bee": 1, "cat": 2}
    data, batch = read(written(folder, text, "list.csv"), classes=classes)

    np.testing.assert_array_equal(batch.inputs["input"], pixels_of(folder, 1, 0))
    np.testing.assert_array_equal(batch.labels, [0, 2])
    assert data.classes == classes


def test_names_need_a_list_of_classes_or_as_many_as_the_model_has(folder):
    path = written(folder, "path,label\n../my images/1.png,b\n../my images/0.png,a\n", "list.csv")
    _, batch = read(path, class_count=2)
    assert batch.labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"list\.csv: has 2 names \('a', 'b', \.\.\.\), but the"):
        read(path, class_count=3)


def test_a_column_for_each_input(folder):
    text = "input,feature,flag,label,remark\n"
    text += "".join(f"../my images/{n}.png,../{n}.npy,{n}.5,{n},none\n" for n in (2, 1))
    feature = InputSpec(name="feature", shape=("n", 2, 3), dtype="float32")
    flag = InputSpec(name="flag", shape=("n",), dtype="float32")
    data, batch = read(written(folder, text, "list.csv"), SPEC, feature, flag)

    np.testing.assert_array_equal(batch.inputs["input"], pixels_of(folder, 2, 1))
    features = np.stack([np.load(folder / f"{n}.npy") for n in (2, 1)])
    np.testing.assert_array_equal(batch.inputs["feature"], features)
    np.testing.assert_array_equal(batch.inputs["flag"], np.array([2.5, 1.5], np.float32))
    assert batch.labels.tolist() == [2, 1]
    assert "remark" not in data.array_names


def test_other_columns_are_arrays_for_metrics_and_losses(folder):
    text = "path,weight\n../my images/2.png,3\n../my images/0.png,4\n"
    with open_data(written(folder, text, "list.csv"), [SPEC]) as data:
        (batch,) = data.with_arrays({"w": ("weight", "int64")}).batches(2)

    np.testing.assert_array_equal(batch.arrays["w"], [3, 4])
    np.testing.assert_array_equal(batch.inputs["input"], pixels_of(folder, 2, 0))


def test_a_vanished_file_is_named_or_skipped(folder):
    path = written(folder, "../my images/1.png 1\n../gone.png 2\n../my images/0.png 0\n")
    with (
        open_data(path, [SPEC]) as data,
        pytest.raises(DataError, match=r"gone\.png: no such file"),
    ):
        list(data.batches(3))
    _, batch = read(path, skip_broken=True)
    assert batch.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", r"a\.txt: names no samples"),
        ("a.txt", "../0.npy 1\n../1.npy\n", r"'\.\./1\.npy' has no label, but other lines"),
        ("a.txt", "../secret.key\n", r"sample 1 is '\.\./secret\.key', which is neither an image"),
        ("a.txt", "../0.npy\n../my images/0.png\n", r"has images \('.*0\.png'\) and arrays"),
        ("a.txt", "\x00.png\n", "cannot be read"),
        ("a.csv", "path,path\nx.png,1\n", "the title 'path' is empty or appears twice"),
        ("a.csv", "a," * 2000 + "b\nx.png\n", "has 2001 columns. At most 1000 are read"),
        ("a.csv", "x.png,1,2\n", "has 3 columns without titles"),
        ("a.csv", "path,label\nx.png\n", "row 1 of the samples has 1 cells, but there are 2"),
        ("a.csv", 'path,label\n"x.png,1\n', "is not CSV"),
        ("a.csv", "other\n../my images/0.png\n", "of column 'other' feed no input"),
        ("a.csv", "path,input\n../my images/0.png,word\n", "sample 1 of column 'input' is 'word'"),
        ("a.csv", "path,label\n../my images/0.png,0.5\n", "labels 'label' are float64"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(folder, name, text, said):
    with pytest.raises(DataError, match=said) as caught:
        read(written(folder, text, name))
    assert "\n" not in str(caught.value)


def test_lists_are_bounded(folder, monkeypatch):
    path = written(folder, "../0.npy\n" * 20)
    monkeypatch.setattr("onnxqat.data.lists.MAX_LINES", 10)
    with pytest.raises(DataError, match="has more than 10 lines"):
        read(path)
    monkeypatch.setattr("onnxqat.data.lists.MAX_BYTES", 10)
    with pytest.raises(DataError, match="has more than 10 bytes"):
        read(path)
    monkeypatch.setattr("onnxqat.data.lists.MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"has more than 10 lines or .* cells"):
        read(written(folder, "path\n" + "../0.npy\n" * 20, "a.csv"))


def test_only_regular_files_of_a_list_are_read(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: is not a regular file"):
        read(written(folder, "../pipe.png\n"))
    (folder / "lists" / "latin.txt").write_bytes(b"\xe9.png\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read(folder / "lists" / "latin.txt")
