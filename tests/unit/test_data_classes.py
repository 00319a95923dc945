"""Which class a folder is: by number, by a list, or by order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, open_data, read_classes
from onnxqat.errors import DataError

SPEC = InputSpec(name="input", shape=("n", 3, 4, 4), dtype="float32")
ANIMALS = {"ant": 0, "bee": 1, "cat": 2}


def folders(parent: Path, *found: str) -> Path:
    for number, name in enumerate(found):
        (parent / name).mkdir(parents=True)
        pixels = np.full((4, 4, 3), number, np.uint8)
        Image.fromarray(pixels).save(parent / name / "image.png")
    return parent


def labels(folder: Path, **options: Any) -> Any:
    """Return the labels in the order of the images, which count up from 0 in that of folders."""
    with open_data(folder, [SPEC], **options) as data:
        (batch,) = data.batches(100)
    order = np.argsort(batch.inputs["input"][:, 0, 0, 0])
    return None if batch.labels is None else batch.labels[order].tolist()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "ant\nbee\r\n cat \n\n"),
        ("classes", "\ufeffant\nbee\ncat"),
        ("classes.csv", "ant,0\ncat,2\nbee, 1\n"),
        ("classes.csv", "index,name\r\n2,cat\r\n0,ant\r\n\r\n1,bee\r\n"),
        ("classes.csv", 'class,id\n"ant",0\n"bee",1\n"cat",2\n'),
        ("classes.json", '["ant", "bee", "cat"]'),
        ("classes.JSON", '{"ant": 0, "cat": 2, "bee": 1}'),
        ("classes.json", '{"0": "ant", "2": "cat", "1": "bee"}'),
        ("classes.json", '{"0": ["ant"], "1": ["bee"], "2": ["cat"]}'),
    ],
)
def test_every_form_of_a_list(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_classes(tmp_path / name) == ANIMALS


def test_several_names_of_a_class_count_where_they_are_clear(tmp_path: Path) -> None:
    both = {"0": ["n1", "crane", "bird"], "1": ["n2", "crane"], "2": ["n3", "bird", "n1"]}
    (tmp_path / "a.json").write_text(json.dumps(both | {"3": ["n4", "lorry"]}))
    assert read_classes(tmp_path / "a.json") == {"n1": 0, "n2": 1, "n3": 2, "n4": 3, "lorry": 3}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ant\nbee\nant\n", "'ant' appears twice"),
        ("a.txt", b"ant\n\nbee\n", "'' is not a name"),
        ("a.txt", b"", "'' is not a name"),
        ("a.txt", b"ant\n\xff\xfe", "is not UTF-8"),
        ("a.csv", b"ant,0\nbee,0\n", "index 0 appears twice"),
        ("a.csv", b"ant,0\nant,1\n", "'ant' appears twice"),
        ("a.csv", b"bee,1\nant,zero\ncat,2", "index of"),
        ("a.csv", b"ant,-1\n", "the index of 'ant' is '-1'"),
        ("a.csv", b"ant,0,x\n", "has 3 columns instead of 2"),
        ("a.csv", b'ant,"0\n', "not a list of classes"),
        ("a.csv", b"name,index\n", "holds no names"),
        ("a.json", b'{"ant": 0, "ant": 1}', "'ant' appears twice"),
        ("a.json", b'{"0": "ant", "0": "bee"}', "index 0 appears twice"),
        ("a.json", b'{"ant": 1.5}', "the index of"),
        ("a.json", b'{"ant": true}', "the index of 'ant' is 'True'"),
        ("a.json", b'{"ant": 99999999999}', "the index of 'ant' is"),
        ("a.json", b'{"ant": null}', "the index of"),
        ("a.json", b'{"0": []}', "'' is not a name"),
        ("a.json", b'{"0": ["ant", ["bee"]]}', "is not a name"),
        ("a.json", b'["ant", 3]', "'3' is not a name"),
        ("a.json", b'["\\ud800"]', "not a list of classes"),
        ("a.json", b"3", "of type 'int'"),
        ("a.json", b'["ant"', "not a list of classes"),
        ("a.json", b"[" * 100_000, "not a list of classes"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "not a list of classes"),
    ],
)
def test_what_is_no_list(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_classes(tmp_path / name)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_files_that_cannot_be_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(DataError, match=r"a directory|not a regular file|no such file"):
            read_classes(path)
    (tmp_path / "a.txt").write_text("ant\n" * 9)
    monkeypatch.setattr("onnxqat.data.classes.MAX_BYTES", 8)
    with pytest.raises(DataError, match="has more than 8 bytes"):
        read_classes(tmp_path / "a.txt")


def test_a_list_gives_the_index_of_each_folder(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", "cat", "ant")
    (tmp_path / "a.txt").write_text("ant\nbee\ncat\n")
    assert labels(data, classes=ANIMALS, class_count=10) == [2, 0]
    assert labels(data, classes=tmp_path / "a.txt") == [2, 0]
    with open_data(data, [SPEC], classes=ANIMALS) as opened:
        assert opened.classes == ANIMALS


def test_folders_that_a_list_lacks_and_classes_that_the_model_lacks(tmp_path: Path) -> None:
    data = folders(tmp_path, "bee", "cta")
    with pytest.raises(DataError, match=r"cta: is not in the list of 3 .* nearest name is 'cat'"):
        labels(data, classes=ANIMALS)
    with pytest.raises(DataError, match=r"class 'cat' has the index 2, but the model has 2 cl"):
        labels(data, classes=ANIMALS, class_count=2)


def test_order_counts_only_where_there_are_as_many_folders_as_classes(tmp_path: Path) -> None:
    data = folders(tmp_path, "cat", "ant", "bee")
    assert labels(data, class_count=3) == [2, 0, 1]
    for count in (2, 4, 1000):
        with pytest.raises(DataError, match=rf"3 folders .* has {count} classes.* --classes FILE"):
            labels(data, class_count=count)
    with pytest.raises(DataError, match=r"number of the model's classes is not known"):
        labels(data)


def test_without_labels_folders_may_have_any_name(tmp_path: Path) -> None:
    data = folders(tmp_path, "cat", "ant")
    assert labels(data, labels=False) is None
    assert labels(data, labels=False, label="label") is None
    assert labels(data, label="none") is None
    with open_data(data, [SPEC], labels=False, class_count=2) as opened:
        assert opened.classes == {"ant": 0, "cat": 1}  # for those who want labels later
        assert not opened.has_labels


def test_numbers_are_indices_unless_the_list_has_numbers(tmp_path: Path) -> None:
    data = folders(tmp_path, "20", "003")
    assert labels(data, class_count=21) == [20, 3]
    assert labels(data, classes=ANIMALS) == [20, 3]
    assert labels(data, classes={"003": 0, "20": 1}) == [1, 0]
    with pytest.raises(DataError, match=r"003: is not in the list of 1 classes"):
        labels(data, classes={"20": 1})
    with pytest.raises(DataError, match=r"20: class 20 does not exist; the model has 20 classes"):
        labels(data, class_count=20)
    folders(tmp_path, "9" * 30)
    with pytest.raises(DataError, match=r"class 9{30} does not exist\."):
        labels(data)


@pytest.mark.parametrize("name", ["train", "Val", "TEST", "images", "valid", "train2017"])
@pytest.mark.parametrize("options", [{"class_count": 2}, {"labels": False}, {"label": "none"}])
def test_parts_of_the_data_are_no_classes(tmp_path: Path, name: str, options: Any) -> None:
    data = folders(tmp_path, "ant", name)
    with pytest.raises(DataError, match=rf"'{name}' is a split of the data.* Give '.*/{name}'"):
        labels(data, **options)
    assert labels(data, classes={"ant": 0, name: 1}) == [0, 1]  # unless a list says so


def test_what_to_give_instead_of_parts(tmp_path: Path) -> None:
    folders(tmp_path, "images/train", "images/val", "labels")
    with pytest.raises(DataError, match=r"Give '[^']*/images'\.$"):
        labels(tmp_path)
    with pytest.raises(DataError, match=r"Give '[^']*/train' or '[^']*/val'\.$"):
        labels(tmp_path / "images")
    assert labels(tmp_path / "images" / "val") is None
