"""Masks of segmentation lie on their images, whatever becomes of these."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, Preprocessing, open_data
from onnxqat.errors import DataError

SPEC = InputSpec(name="x", shape=("n", 3, 12, 8), dtype="float32")
SIZE = (24, 32)  # height and width of the files


@pytest.fixture
def images(tmp_path):
    """Images whose red channel is the class of each pixel, and the masks of the same classes."""
    folder = tmp_path / "images" / "val"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "ab":
        blocks = rng.integers(0, 5, (3, 4)).repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
        pixels = np.stack([blocks] * 3, axis=-1)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        save(tmp_path / "masks" / "val" / f"{name}.png", blocks)
    return folder


def save(path, blocks, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(blocks)
    if mode == "P":
        mask.putpalette(list(range(255, -1, -1)) * 3)
        assert mask.mode == "P"
    mask.save(path)


def read(source, **options):
    beside = {name: options.pop(name) for name in ("masks",) if name in options}
    given = Preprocessing(**options)
    with open_data(source, [SPEC], preprocessing=given, **beside) as data:
        (batch,) = data.with_arrays({"mask": ("mask", "int64")}).batches(4)
    return batch.inputs["x"][:, 0], batch.arrays["mask"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop": (12, 8)},
        {"resize_dims": (24, 32), "crop": (12, 8)},
        {"resize_dims": (12, 8), "keep_aspect_ratio": True, "pad_value": 77},
    ],
)
def test_each_pixel_has_the_class_of_what_is_seen_there(images, options):
    seen, mask = read(images, **options)

    assert mask.shape == seen.shape == (2, 12, 8)
    if "keep_aspect_ratio" in options:  # 6 rows of image, between 3 of padding
        assert (mask[:, :3] == 255).all()
        assert (mask[:, 9:] == 255).all()
        assert (seen[:, :3] == 77).all()
        seen, mask = seen[:, 3:9], mask[:, 3:9]
    # between blocks the image is a mixture
    sure = np.abs(seen - np.round(seen)) < 1e-6
    assert sure.mean() > 0.4
    if "crop" in options:
        np.testing.assert_array_equal(mask, seen)
    else:
        assert (mask[sure] == seen[sure]).mean() > 0.75


@pytest.mark.parametrize("kind", ["palette", "npy", "annotations", "named"])
def test_every_way_to_store_masks(images, kind):
    root = images.parents[1]
    _, expected = read(images)
    for path in sorted((root / "masks" / "val").iterdir()):
        blocks = np.asarray(Image.open(path))
        path.unlink()
        if kind == "palette":
            save(path, blocks, "P")
        elif kind == "npy":
            np.save(path.with_suffix(".npy"), blocks.astype(np.int32))
        else:
            folder = "annotations/val" if kind == "annotations" else "elsewhere"
            save(root / folder / path.name, blocks)
    found = read(images, **({"masks": root / "elsewhere"} if kind == "named" else {}))[1]

    np.testing.assert_array_equal(found, expected)


def test_a_column_of_masks(images):
    lines = [f"images/val/{n}.png,masks/val/{n}.png" for n in "ba"]
    path = images.parents[1] / "list.csv"
    path.write_text("\n".join(["path,mask", *lines]))
    seen, mask = read(path, crop=(12, 8))

    np.testing.assert_array_equal(mask, seen)


def test_a_mask_of_another_size_is_refused(images):
    save(images.parents[1] / "masks" / "val" / "b.png", np.zeros((24, 31), np.uint8))
    with pytest.raises(
        DataError, match=r"b\.png: has 24 x 31 pixels, but its image '.*b\.png' has 24"
    ):
        read(images)


def test_colours_are_no_classes(images):
    path = images.parents[1] / "masks" / "val" / "a.png"
    Image.new("RGB", SIZE[::-1]).save(path)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as a mask .*'RGB', colours"):
        read(images)
    np.save(path.with_suffix(".npy"), np.zeros((24, 32)))
    with pytest.raises(DataError, match=r"'a\.npy' is a mask of the same image"):
        read(images)
    path.unlink()
    with pytest.raises(DataError, match=r"holds float64 of shape .* Store integers"):
        read(images)
    path.with_suffix(".npy").unlink()
    with pytest.raises(DataError, match=r"has no mask of '.*a\.png'. Store 'a\.png' there"):
        read(images)


def test_masks_of_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3, 12, 8), np.float32))
    with pytest.raises(DataError, match="--masks: belong to a folder of images or a list of them"):
        open_data(tmp_path / "x.npz", [SPEC], masks=tmp_path)
