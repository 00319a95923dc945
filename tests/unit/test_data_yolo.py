"""YOLO's data.yaml: its forms, and the images, boxes and names that it tells."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, open_data
from onnxqat.data.sources import read_besides
from onnxqat.data.splits import usual_split
from onnxqat.data.yaml_entries import read_entries
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 3, 8, 8), dtype="float32")
SHADES = {"train": 10, "val": 20, "more": 30}


def entries(tmp_path, text, *wanted):
    path = tmp_path / "read.yaml"
    path.write_text(text, encoding="utf-8")
    return read_entries(path, wanted or ("names",))


LISTED = ["traffic light", "it's", "a, b: c", "no#1", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "names: [traffic light, it's, 'a, b: c', no#1, '1']",
        "names: [ 'traffic light', 'it''s',   # two of them\n  \"a, b: c\",\n\n no#1, 1, ]\nnc: 5",
        (
            "\ufeff# names: [x]\n---\nnames:\n- traffic light\n- it's # a comment\n- 'a, b: c'\n"
            "- no#1 #2\n- 1\n"
        ),
        (
            'nc: 5\r\nnames:   # of 5\r\n  - traffic light\r\n  - it\'s\r\n  - "a, b: c"\r\n'
            "  - no#1\r\n  - 1"
        ),
        "names:\n  ['traffic light', it's, \"a, b: c\",\n   no#1,\n 1\n]",
        (
            "download: |\n  names: [x]\n  print('''')\n"
            "names: [traffic light, it's, 'a, b: c', \"no#1\", 1]"
        ),
    ],
)
def test_a_list_of_names(tmp_path, text):
    assert entries(tmp_path, text) == {"names": LISTED}


@pytest.mark.parametrize(
    "text",
    [
        "names:\n  0: person\n  10: 'hot: dog'\n",
        "names: {0: person, 10: 'hot: dog'}",
        'names: {0: person,   # the first\n  10: "hot: dog"}',
    ],
)
def test_a_mapping_of_names(tmp_path, text):
    assert entries(tmp_path, text) == {"names": {"0": "person", "10": "hot: dog"}}


def test_texts_and_empty_entries(tmp_path):
    text = (
        "path: ../datasets/coco8 # root\ntrain: images/a#1,[b]\nval:   # none yet\ntest: ~\n"
        "nc: 80\nroboflow:\n  path: elsewhere\nurl: https://host/a:b\n"
    )
    assert entries(tmp_path, text, "path", "train", "val", "test", "nc", "url", "names") == {
        "path": "../datasets/coco8", "train": "images/a#1,[b]", "val": None, "test": None,
        "nc": "80", "url": "https://host/a:b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[x, [y]]", "line 1: 'names' holds a list or a mapping"),
        ("[x, {0: y}]", "line 1: 'names' holds a list or a mapping"),
        ("\n  - - a", "line 2: 'names' holds a list or a mapping"),
        ("{[a]: x}", "line 1: 'names' holds a list or a mapping"),
        ("{0: x, 0: y}", "'names' has a name twice"),
        ("*a", r"line 1: has the alias '\*a'"),
        ("[&a x, *a]", r"line 1: has the alias '\*a'"),
        ("[x", "is not YAML"),
        ("@a", "is not YAML"),
        ("\n  - a\n   - b\n  c", "is not YAML"),
        ('"\\ud800"', "'names' has .*, which cannot be printed"),
        ('["\\u0000"]', "'names' has .*, which cannot be printed"),
        ("[" * 100_000, "line 1: nests too deep"),
    ],
)
def test_other_yaml_is_refused(tmp_path, value, message):
    with pytest.raises(DataError, match=rf"read\.yaml(:|,) {message}"):
        entries(tmp_path, f"names: {value}")


def test_a_tag_runs_nothing(tmp_path):
    text = "names: !!python/object/apply:os.abort []"
    assert entries(tmp_path, text) == {"names": []}


def test_a_file_that_is_no_description(tmp_path):
    with pytest.raises(DataError, match=r"read\.yaml: has no entries"):
        entries(tmp_path, "[1, 2]")
    with pytest.raises(DataError, match=r"read\.yaml: has the entry 'names' twice"):
        entries(tmp_path, "names: [x]\nnames: [y]")
    with pytest.raises(DataError, match=r"read\.yaml: is larger than"):
        entries(tmp_path, "names: [" + "a," * 2**20)


def save(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 8), (shade,) * 3).save(path)


@pytest.fixture
def root(tmp_path):
    for split, shade in SHADES.items():
        for folder in (split, f"{split}/deep"):
            save(tmp_path / "set/images" / folder / f"{shade}.png", shade)
            labels = tmp_path / "set/labels" / folder
            labels.mkdir(parents=True)
            (labels / f"{shade}.txt").write_text(f"{shade // 10} 0.5 0.5 0.25 0.5\n")
    save(tmp_path / "set/images/train/.cache/x.png", 99)
    return tmp_path / "set"


def written(root, text, name="data.yaml"):
    path = root / name
    path.write_text(text)
    return path


def read(path, split):
    with open_data(path, [SPEC], split=split) as data:
        (batch,) = data.with_arrays({"b": ("boxes", "float64")}).batches(9)
    shades = batch.inputs["x"][:, 0, 0, 0].astype(int).tolist()
    assert batch.labels is None
    assert [int(box) * 10 for box in batch.arrays["b"][:, 0, 0]] == shades
    np.testing.assert_array_equal(
        batch.arrays["b"][:, 0, 1:5], [[0.5, 0.5, 0.25, 0.5]] * len(shades)
    )
    return shades


def test_splits_are_read_with_their_boxes(root):
    (root / "list.txt").write_text("images/val/20.png\nimages/more/deep/30.png\n")
    path = written(
        root,
        "train: images/train\nval: [images/val, images/more]\ntest: list.txt\n"
        "names: [a, b, c, d]\nnc: 4\n",
    )
    assert read(path, "train") == [10, 10]
    assert read(path, "val") == [20, 20, 30, 30]
    assert read(path, "test") == [20, 30]
    assert usual_split(path, ("train",)) == "train"
    with open_data(path, [SPEC], split="val") as data:
        assert data.classes == {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("set", "train: ../images/train\nval: ../images/val\n"),  # as Roboflow writes it
        ("set", "path: .\ntrain: images/train/\nvalidation: images/../images/val\n"),
        (".", "path: set\ntrain: images/train\nval: images/val\n"),
        ("set/images", "path: ..  # root\ntrain:\n  - images/train\nval:\n- images/val\n"),
        ("set/images", "path: ROOT\ntrain: images/train\nval: images/val\n"),
    ],
)
def test_where_the_folders_are(root, where, text, monkeypatch):
    path = written(root.parent / where, text.replace("ROOT", str(root)))
    assert (read(path, "train"), read(path, "val")) == ([10, 10], [20, 20])
    monkeypatch.chdir(path.parent)
    assert read("data.yaml", "train") == [10, 10]


def test_a_path_that_leads_out_is_told(root, caplog):
    caplog.set_level("INFO", "onnxqat")
    read(written(root / "images", "path: ../\ntrain: images/train\n"), "train")
    assert [r.message for r in caplog.records if "as its 'path' says" in r.message]
    caplog.clear()
    read(written(root, "path: ./images/..\ntrain: images/train\n"), "train")
    assert not caplog.records


@pytest.mark.parametrize(
    "place", ["/etc", "../../set/images/train", "images/../../set/images/train", "../..", ".."]
)
def test_a_split_must_not_leave_the_data(root, place):
    path = written(root, f"train: {place}\n")
    with pytest.raises(DataError, match=r"data\.yaml: 'train: .*' leaves the folder of the data"):
        open_data(path, [SPEC], split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/none", r"'train' is in '.*none', which is neither a folder nor a list"),
        ("train: labels/train", r"'train' is in '.*train', which has no images"),
        ("path: [a]\ntrain: x", r"'path' must be one folder, not \['a'\]"),
        ("train: {0: x}", r"'train' is a mapping"),
        ("names: [a]", r"names no images"),
        ("val: images/val", r"--split train: '.*data\.yaml' has no such split; it has 'val'"),
        ("train: images/train\nnc: 3\nnames: [a, b]", r"'nc' is 3, but 'names' has 2 names"),
        ("train: images/train\nnames: [a, b, a]", r"'names' has 'a' twice"),
        ("train: images/train\nnames: {0: a, 2: b}", r"'names' has the indices '0', '2'"),
        ("train: images/train\nnames: a", r"'names' is 'a'\. Write a list"),
    ],
)
def test_what_a_file_lacks_is_said(root, text, message):
    with pytest.raises(DataError, match=message):
        open_data(written(root, text), [SPEC], split="train")


def test_a_split_has_to_be_chosen(root):
    path = written(root, "train: images/train\nval: images/val\n")
    with pytest.raises(DataError, match=r"has the splits 'train', 'val'\. Choose one with --split"):
        open_data(path, [SPEC])
    assert usual_split(written(root, "train: *a", "wrong.yaml"), ("train",)) is None
    assert usual_split(root / "none.yaml", ("train",)) is None


def test_a_box_of_a_class_without_a_name(root):
    path = written(root, "train: images/train\nval: images/val\nnames: [a, b]\n")
    assert read(path, "train") == [10, 10]
    with pytest.raises(DataError, match=r"a box of '.*20\.png' has the class 2, but there are 2 c"):
        read(path, "val")


def test_files_that_are_read_with_it(root):
    path = written(root, "train: images/train\nval: images/val\n")
    relative = {str(file.relative_to(root)) for file in read_besides(path)}
    assert relative == {
        "images/train/10.png", "images/train/deep/10.png", "images/val/20.png",
        "images/val/deep/20.png", "labels/train/10.txt", "labels/train/deep/10.txt",
        "labels/val/20.txt", "labels/val/deep/20.txt",
    }  # fmt: skip
