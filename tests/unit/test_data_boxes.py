"""Boxes of objects: every way in which people have them gives the same arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, Preprocessing, open_data
from onnxqat.data.boxes import labels_beside, read_boxes
from onnxqat.data.preprocess import boxes_in_image, resize_and_crop
from onnxqat.errors import DataError

SIZES = {"a": (20, 40), "b": (30, 30), "c": (50, 25)}  # height and width
ROWS = [  # image, class, cx, cy, w, h
    (0, 2, 0.5, 0.25, 0.5, 0.5),
    (0, 0, 0.25, 0.75, 0.125, 0.25),
    (2, 1, 0.5, 0.5, 1.0, 0.5),
]
SPEC = InputSpec(name="x", shape=("n", 3, 16, 16), dtype="float32")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "val"
    folder.mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        Image.new("RGB", (width, height)).save(folder / f"{name}.png")
    return folder


def as_npy(folder):
    path = folder.parents[1] / "boxes.npy"
    np.save(path, np.array(ROWS, np.float32))
    return path


def as_yolo(folder):
    labels = folder.parents[1] / "labels" / "val"
    labels.mkdir(parents=True)
    for image, name in enumerate(SIZES):
        lines = [" ".join(map(str, row[1:])) for row in ROWS if row[0] == image]
        if lines:
            (labels / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    return labels


def as_coco(folder):
    path = folder.parents[1] / "instances.json"
    images = [
        {"id": 10 + i, "file_name": f"val/{n}.png", "width": w, "height": h, "license": 1}
        for i, (n, (h, w)) in enumerate(SIZES.items())
    ]
    annotations = []
    for image, label, cx, cy, w, h in ROWS:
        height, width = list(SIZES.values())[image]
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        annotations.append({"image_id": 10 + image, "category_id": [1, 3, 90][label], "bbox": box,
                            "iscrowd": int(label == 1), "area": 1.0})  # fmt: skip
    categories = [{"id": one, "name": str(one)} for one in (90, 1, 3)]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


@pytest.mark.parametrize("written", [as_npy, as_yolo, as_coco])
def test_all_files_give_the_same_boxes(images, written):
    with open_data(images, [SPEC], boxes=written(images)) as data:
        assert data.array_names == ("image", "boxes", "size", "targets", "targets_count")
        wanted = {name: (name, str(data.array(name).dtype)) for name in ("boxes", "size")}
        batch = next(data.subset([2, 0, 1]).with_arrays(wanted).batches(3))
    boxes = batch.arrays["boxes"]
    crowd = [float(written is as_coco), 0.0, 0.0]

    assert boxes.shape == (3, 2, 6)
    np.testing.assert_allclose(boxes[0, 0, :5], ROWS[2][1:], rtol=1e-6)
    np.testing.assert_allclose(boxes[1, :, :5], [row[1:] for row in ROWS[:2]], rtol=1e-6)
    assert boxes[:, 0, 5].tolist() == crowd
    assert boxes[:, :, 0].tolist() == [[1, -1], [2, 0], [-1, -1]]
    assert batch.arrays["size"].tolist() == [[50, 25], [20, 40], [30, 30]]


def test_labels_beside_images_are_found(images):
    with open_data(images, [SPEC]) as data:
        assert data.array_names == ("image",)
    assert labels_beside(images) is None
    labels = as_yolo(images)
    with open_data(images, [SPEC]) as data:
        assert data.array_names == ("image", "boxes", "size", "targets", "targets_count")
    assert labels_beside(images) == labels


def as_text(text, name="b.json"):
    def written(folder):
        path = folder.parents[1] / name
        path.write_text(text)
        return path

    return written


def as_line(line):
    def written(folder):
        labels = as_yolo(folder)
        (labels / "b.txt").write_text(line)
        return labels

    return written


def as_rows(*rows):
    def written(folder):
        path = folder.parents[1] / "b.npy"
        np.save(path, np.array(rows))
        return path

    return written


def of_other_images(folder):
    path = as_coco(folder)
    path.write_text(path.read_text().replace("val/b.png", "other.png"))
    return path


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (as_text("{"), "cannot be read as boxes"),
        (as_text('{"images": [], "annotations": []}'), "missing required field `categories`"),
        (as_text("x", "b.npy"), "cannot be read as boxes"),
        (as_rows((0.0, 1, 2)), "it holds float64 of shape"),
        (as_rows((3.0, 0, 0.5, 0.5, 0.1, 0.1)), "a row for image 3, but there are 3 images"),
        (as_rows((0.0, -1, 0.5, 0.5, 0.1, 0.1)), r"the box \(-1, 0.5"),
        (as_rows((0.0, 1, 0.5, 0.5, -0.1, 0.1)), "is invalid. Store class"),
        (as_rows((0.0, 1, 20.0, 20.0, 8, 8)), "relative to the image"),
        (as_line("1 0.5 0.5 0.1"), "line 1 has 4 numbers"),
        (as_line("one 0.5 0.5 0.1 0.1"), "could not convert"),
        (as_line("1 nan 0.5 0.1 0.1"), "is invalid"),
        (of_other_images, "does not list the image 'b.png'"),
    ],
)
def test_what_is_wrong_with_boxes_is_one_line(images, written, said):
    with pytest.raises(DataError, match=said) as caught:
        read_boxes(written(images), sorted(images.iterdir()))
    assert "\n" not in str(caught.value)


def test_boxes_of_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(DataError, match="--boxes: belong to a folder of images"):
        open_data(path, [SPEC], boxes=tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_aspect_ratio": True, "resize_dims": (64, 64)},
        {"resize_dims": (64, 64)},
        {"resize_dims": (80, 96), "crop": (64, 64)},
        {"keep_aspect_ratio": True, "resize_dims": (80, 96), "crop": (64, 64)},
        {"crop": (64, 64)},
    ],
)
@pytest.mark.parametrize("size", [(100, 160), (150, 90), (128, 128)])
def test_a_box_is_found_again_where_it_was_drawn(options, size):
    """A bright rectangle in the middle of an image, followed through the preprocessing."""
    height, width = size
    top, left, bottom, right = height // 2 - 12, width // 2 - 9, height // 2 + 16, width // 2 + 20
    image = np.zeros((height, width, 3), np.float32)
    image[top:bottom, left:right] = 255
    preprocessing = Preprocessing(**options)
    seen = resize_and_crop(image, preprocessing)[:, :, 0] > 127
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    corners = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], np.float64)
    found = boxes_in_image(corners, size, seen.shape, preprocessing)[0]

    # a pixel of the input is up to this many of the image
    assert found == pytest.approx([left, top, right, bottom], abs=1.01 * max(*size, 64) / 64)


def test_boxes_end_where_the_image_ends():
    corners = np.array([[-5.0, 0, 70, 64]])
    letterbox = Preprocessing(keep_aspect_ratio=True, resize_dims=(64, 64))

    assert boxes_in_image(corners, (32, 64), (64, 64), letterbox).tolist() == [[0, 0, 64, 32]]
