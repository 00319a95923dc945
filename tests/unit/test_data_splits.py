"""Folders with splits in the layouts that people have, and COCO's files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, open_data
from onnxqat.data.splits import usual_split
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 3, 8, 8), dtype="float32")
SHADES = {"train": 10, "val": 20}


def save(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 8), (shade,) * 3).save(path)


def yolo(root):
    for split, shade in SHADES.items():
        save(root / "images" / split / "a.png", shade)
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text(f"{shade} 0.5 0.5 0.25 0.5\n")


def yolo_by_split(root):
    for split, shade in SHADES.items():
        save(root / split / "images" / "a.png", shade)
        (root / split / "labels").mkdir(parents=True)
        (root / split / "labels" / "a.txt").write_text(f"{shade} 0.5 0.5 0.25 0.5\n")


def by_class(root):
    for split, shade in SHADES.items():
        for name in ("0", "1"):
            save(root / split / name / "a.png", shade)


def by_year(root):
    for split, shade in SHADES.items():
        save(root / f"{split}2017" / "a.png", shade)
    (root / "annotations").mkdir()


@pytest.mark.parametrize("made", [yolo, yolo_by_split, by_class, by_year])
def test_a_split_is_chosen_by_its_name(tmp_path, made):
    made(tmp_path)
    for split, shade in SHADES.items():
        with open_data(tmp_path, [SPEC], split=split) as data:
            boxes = {"b": ("boxes", "float64")} if "boxes" in data.array_names else {}
            (batch,) = data.with_arrays(boxes).batches(4) if boxes else data.batches(4)
        assert set(batch.inputs["x"].flat) == {shade}
        if boxes:
            assert batch.arrays["b"][0, 0].tolist() == [shade, 0.5, 0.5, 0.25, 0.5, 0]
        assert (batch.labels is not None) == (made is by_class)
    assert bool(boxes) == (made in (yolo, yolo_by_split))
    assert usual_split(tmp_path, ("test", "val")) == "val"
    assert usual_split(tmp_path, ("test",)) is None
    with pytest.raises(
        DataError, match=r"--split test: .* has no such split; it has 'train', 'val'"
    ):
        open_data(tmp_path, [SPEC], split="test")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    for name in ("car", "train"):
        save(tmp_path / name / "a.png", 1)
    assert usual_split(tmp_path, ("train",)) is None


def test_only_folders_have_splits(tmp_path):
    save(tmp_path / "train" / "a.png", 1)
    save(tmp_path / "b.png", 1)
    assert usual_split(tmp_path, ("train",)) is None  # images of its own
    assert usual_split(tmp_path / "b.png", ("train",)) is None
    assert usual_split("module:function", ("train",)) is None
    assert usual_split({"x": np.zeros(1)}, ("train",)) is None
    with pytest.raises(DataError, match=r"--split: '.*b\.png' is not a folder with splits"):
        open_data(tmp_path / "b.png", [SPEC], split="train")


def coco(root, folder):
    save(root / folder / "b.png", 5)
    save(root / folder / "a.png", 6)
    images = [{"id": i, "file_name": f"{n}.png", "width": 16, "height": 8}
              for i, n in enumerate("ba")]  # fmt: skip
    annotations = [
        {"image_id": 1, "category_id": 7, "bbox": [4, 2, 8, 4], "iscrowd": 0},
        {"image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 4], "iscrowd": 1},
    ]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 7}]}
    path = root / "annotations" / "instances_val2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("folder", ["val2017", "images/val2017", "annotations", "images", "."])
def test_a_coco_file_brings_its_images(tmp_path, folder):
    wanted = {n: (n, "float64") for n in ("boxes", "targets", "targets_count")}
    with open_data(coco(tmp_path, folder), [SPEC]) as data:
        (batch,) = data.with_arrays(wanted).batches(4)

    assert batch.inputs["x"][:, 0, 0, 0].tolist() == [5, 6]
    assert batch.labels is None
    assert batch.arrays["boxes"][:, :, 0].tolist() == [[-1, -1], [0, 0]]
    assert batch.arrays["targets"].tolist() == [
        [[-1] * 5, [-1] * 5],
        [[0, 0.5, 0.5, 0.5, 0.5], [-1] * 5],  # not the crowd
    ]
    assert batch.arrays["targets_count"].tolist() == [0, 1]


def test_what_is_wrong_with_a_coco_file_is_said(tmp_path):
    path = coco(tmp_path, "elsewhere")
    with pytest.raises(DataError, match=r"its image 'b\.png' is in none of '.*val2017'"):
        open_data(path, [SPEC])
    path.write_text("[]")
    with pytest.raises(DataError, match="cannot be read as COCO's instances"):
        open_data(path, [SPEC])
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="lists no images"):
        open_data(path, [SPEC])
    with pytest.raises(DataError, match="has boxes of its own"):
        open_data(path, [SPEC], boxes=path)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"resize_dims": (8, 8)}, [0.5, 0.5, 0.5, 0.5]),
        # 16 x 8 becomes 8 x 4, in the middle of 8 x 8
        ({"resize_dims": (8, 8), "keep_aspect_ratio": True}, [0.5, 0.5, 0.5, 0.25]),
        # the middle 8 of 16 columns, which the box fills
        ({"crop": (8, 8)}, [0.5, 0.5, 1.0, 0.5]),
    ],
)
def test_targets_are_relative_to_what_the_model_sees(tmp_path, options, wanted):
    from onnxqat.data import Preprocessing

    path = coco(tmp_path, "val2017")
    with open_data(path, [SPEC], preprocessing=Preprocessing(**options)) as data:
        (batch,) = data.with_arrays({"t": ("targets", "float32")}).batches(4)

    np.testing.assert_allclose(batch.arrays["t"][1, 0], [0, *wanted])
