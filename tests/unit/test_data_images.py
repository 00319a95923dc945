"""Folders of images against pillow used by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxqat.data import InputSpec, Preprocessing, open_data
from onnxqat.data.images import _pixels as pixels_of
from onnxqat.errors import DataError

RNG = np.random.default_rng(2)
RGB = InputSpec(name="input", shape=("n", 3, 8, 6), dtype="float32")
GRAY = InputSpec(name="input", shape=("n", 1, 8, 6), dtype="float32")


def save(path: Path, height: int = 8, width: int = 6) -> NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read(
    folder: Path, spec: InputSpec = RGB, **options: Any
) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    with open_data(str(folder), [spec], preprocessing=Preprocessing(**options)) as data:
        (batch,) = data.batches(100)
    assert batch.inputs["input"].flags.c_contiguous
    return batch.inputs["input"], batch.labels


def test_class_folders(tmp_path: Path) -> None:
    images = [save(tmp_path / name) for name in ("ant/2.jpg", "bee/1.png", "cat/0.JPG")]
    (tmp_path / "bee" / "notes.txt").write_text("x")
    (tmp_path / "bee" / ".hidden.jpg").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dog").mkdir()
    with open_data(tmp_path, [RGB], class_count=4) as data:
        (batch,) = data.batches(100)
        assert data.classes == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    expected = np.stack(images).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(batch.inputs["input"], expected)
    np.testing.assert_array_equal(batch.labels, [0, 1, 2])


def test_numeric_folders_are_the_class_index(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/a.png", "003/a.png"):
        save(tmp_path / name)
    with open_data(tmp_path, [RGB]) as data:
        (batch,) = data.batches(3)
        assert data.classes is None
    np.testing.assert_array_equal(batch.labels, [3, 10, 9])


def test_one_class_twice(tmp_path: Path) -> None:
    save(tmp_path / "1/a.png")
    save(tmp_path / "01/a.png")
    with pytest.raises(DataError, match="'01' and '1' are both class 1"):
        open_data(tmp_path, [RGB])


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png")
    found, labels = read(tmp_path)
    assert labels is None
    np.testing.assert_array_equal(found[0], image.transpose(2, 0, 1))
    with pytest.raises(DataError, match=r"no array 'label' for the labels\. It has 'image'"):
        open_data(tmp_path, [RGB], label="label")


def test_images_take_the_size_of_the_model(tmp_path: Path) -> None:
    images = [save(tmp_path / "a.png", 30, 20), save(tmp_path / "b.jpg", 9, 40)]
    found, _ = read(tmp_path)
    for image, result in zip(images, found, strict=True):
        resized = Image.fromarray(image).resize((6, 8), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(result, np.asarray(resized).transpose(2, 0, 1))


def test_resize_crop_bgr_mean_scale(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", 30, 20)
    mean, scale = (1.5, 20.0, 30.25), (0.1, 0.2, 0.3)
    options: dict[str, Any] = {
        "resize_dims": (12, 11), "crop": (8, 6), "mean": mean, "scale": scale, "pixel_format": "bgr"
    }  # fmt: skip
    found, _ = read(tmp_path, **options)
    resized = np.asarray(Image.fromarray(image).resize((11, 12), Image.Resampling.BILINEAR))
    bgr = resized[2:10, 2:8, ::-1].astype(np.float32)
    expected = (bgr - np.array(mean, np.float32)) * np.array(scale, np.float32)
    np.testing.assert_array_equal(found[0], expected.transpose(2, 0, 1))
    last, _ = read(
        tmp_path, InputSpec(name="input", shape=(None, 8, 6, 3), dtype="float32"), **options
    )
    np.testing.assert_array_equal(last[0], expected)


def test_an_npz_of_the_pixels_gives_the_same(tmp_path: Path) -> None:
    images = [save(tmp_path / "images" / f"{n}.png", 30, 20) for n in range(3)]
    np.savez(tmp_path / "a.npz", input=np.stack(images))
    given = Preprocessing(resize_dims=(10, 10), crop=(8, 6), mean=(7.0,), scale=(0.3,))
    found, _ = read(
        tmp_path / "images", resize_dims=(10, 10), crop=(8, 6), mean=(7.0,), scale=(0.3,)
    )
    with open_data(tmp_path / "a.npz", [RGB], preprocessing=given) as data:
        (batch,) = data.batches(3)
    np.testing.assert_array_equal(batch.inputs["input"], found)


@pytest.mark.parametrize("pixel_format", ["rgb", "gray"])
def test_a_model_with_one_channel_gets_gray_images(tmp_path: Path, pixel_format: str) -> None:
    save(tmp_path / "a.png")
    found, _ = read(tmp_path, GRAY, pixel_format=pixel_format)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(found[0, 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize(("spec", "pixel_format", "channels"), [(RGB, "gray", 3), (GRAY, "bgr", 1)])
def test_a_pixel_format_the_model_cannot_take(
    tmp_path: Path, spec: InputSpec, pixel_format: str, channels: int
) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=f"has {channels} channels, but '{pixel_format}' images"):
        read(tmp_path, spec, pixel_format=pixel_format)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = RNG.integers(0, 256, (8, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path)[0][0], pixels.transpose(2, 0, 1))


def test_palettes_and_alpha_become_rgb(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (8, 6, 4)).astype(np.uint8)
    rgba = Image.fromarray(pixels)
    rgba.save(tmp_path / "a.png")
    palette = rgba.convert("RGB").quantize(16)
    palette.save(tmp_path / "b.png", transparency=bytes(range(16)))
    found, _ = read(tmp_path)
    np.testing.assert_array_equal(found[0], pixels[:, :, :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(found[1], np.asarray(palette.convert("RGB")).transpose(2, 0, 1))


def test_an_undecodable_image_is_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(tmp_path / name, 64, 64)
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    with (
        open_data(tmp_path, [RGB]) as data,
        pytest.raises(DataError, match=r"b\.jpg: cannot be decoded \(.*\)\. Repair or remove"),
    ):
        list(data.batches(2))
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        open_data(tmp_path, [RGB])


def test_deep_and_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.full((8, 6), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: .*its pixels have more than 8 bits"):
        open_data(tmp_path, [RGB])
    monkeypatch.setattr("onnxqat.data.images.MAX_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png: .*6 x 8 pixels are too many"):
        open_data(tmp_path, [RGB])


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    spec = InputSpec(name="input", shape=("n", 3, "h", "w"), dtype="float32")
    save(tmp_path / "a.png", 8, 6)
    save(tmp_path / "b.png", 8, 7)
    with (
        open_data(tmp_path, [spec]) as data,
        pytest.raises(DataError, match=r"b\.png: has 8 x 7 pixels.* Give --resize-dims"),
    ):
        list(data.batches(2))


def test_a_crop_larger_than_the_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 8, 5)
    with pytest.raises(DataError, match=r"a\.png: has 8 x 5 pixels, less than --crop \(8, 6\)"):
        read(tmp_path, crop=(8, 6))


def test_a_size_that_is_not_the_models(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 20, 20)
    with pytest.raises(
        DataError, match=r"\(9, 9, 3\) do not fit .* Change --resize-dims or --crop"
    ):
        read(tmp_path, resize_dims=(9, 9))


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images and no \.npz or \.npy files"):
        open_data(tmp_path, [RGB])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="its folders 'empty' hold no images"):
        open_data(tmp_path, [RGB])
    save(tmp_path / "empty" / "deep" / "a.png")
    with pytest.raises(DataError, match="deep: is a folder inside of a class folder"):
        open_data(tmp_path, [RGB])
    save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"holds samples \('.*a\.png'\) beside folders \('empty'\)"):
        open_data(tmp_path, [RGB])
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"holds arrays \('a\.npz'\) and images \('a\.png'\)"):
        open_data(tmp_path, [RGB])


def test_models_that_take_no_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    vector = InputSpec(name="v", shape=("n", 4), dtype="float32")
    with pytest.raises(DataError, match=r"model input 'v' .* is not an image"):
        open_data(tmp_path, [vector])
    with pytest.raises(DataError, match="images feed one input, but the model has 'input', 'v'"):
        open_data(tmp_path, [RGB, vector])


def broken_folder(parent: Path, count: int = 7) -> tuple[Path, NDArray[np.uint8]]:
    """Two folders of images; of each the second is damaged, a FIFO, or leads nowhere."""
    images = [save(parent / f"{n % 2}" / f"{n}.png") for n in range(count)]
    (parent / "0" / "2.png").write_bytes(b"no image")
    (parent / "1" / "3.png").unlink()
    os.mkfifo(parent / "1" / "3.png")
    (parent / "0" / "0.png").unlink()
    (parent / "0" / "0.png").symlink_to("nowhere.png")
    return parent, np.stack(images)


def test_broken_images_are_named_and_skipped_where_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, images = broken_folder(tmp_path)
    with pytest.raises(DataError, match=r"0\.png: no such file"):
        open_data(folder, [RGB])
    order = [4, 6, 1, 5]  # what is left: of folder 0, then of folder 1
    with open_data(folder, [RGB], skip_broken=True) as data:
        assert len(data) == 7
        for size in (1, 2, 3, 7):
            found = list(data.batches(size))
            pixels = np.concatenate([batch.inputs["input"] for batch in found])
            np.testing.assert_array_equal(pixels, images[order].transpose(0, 3, 1, 2))
            labels = np.concatenate([batch.labels for batch in found if batch.labels is not None])
            np.testing.assert_array_equal(labels, [0, 0, 1, 1])
            positions = np.concatenate([batch.indices for batch in found])
            np.testing.assert_array_equal(positions, [2, 3, 4, 6])
            assert all(len(batch.inputs["input"]) == batch.size > 0 for batch in found)
        assert data.broken(np.arange(7)) == 3
    for name, times in (("0/0.png", 1), ("0/2.png", 1), ("1/3.png", 1), ("4.png", 0)):
        assert caplog.text.count(f"{name}: ") == times  # once, however often it is read


def test_a_training_gets_full_batches_of_images_that_can_be_read(tmp_path: Path) -> None:
    folder, images = broken_folder(tmp_path)
    with open_data(folder, [RGB], skip_broken=True) as data:
        (batch,) = data.batches(7, full=True)
        pixels = batch.inputs["input"].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(pixels, images[[4, 6, 1, 5, 4, 6, 1]])
        np.testing.assert_array_equal(batch.labels, [0, 0, 1, 1, 0, 0, 1])
        with pytest.raises(DataError, match="no sample of a batch can be read"):
            list(data.batches(2, full=True))  # the first two are broken


def test_a_fixed_batch_is_filled_beside_broken_images(tmp_path: Path) -> None:
    folder, images = broken_folder(tmp_path)
    spec = InputSpec(name="input", shape=(7, 3, 8, 6), dtype="float32")
    with open_data(folder, [spec], skip_broken=True) as data:
        (batch,) = data.batches()
    assert (batch.size, batch.indices.tolist()) == (7, [2, 3, 4, 6])
    np.testing.assert_array_equal(
        batch.inputs["input"][:4], images[[4, 6, 1, 5]].transpose(0, 3, 1, 2)
    )


def test_an_image_that_vanishes_ends_no_run_that_may_skip_it(tmp_path: Path) -> None:
    for n in range(4):
        save(tmp_path / f"{n}.png")
    with open_data(tmp_path, [RGB], skip_broken=True) as data:
        assert sum(len(batch.indices) for batch in data.batches(2)) == 4
        (tmp_path / "1.png").unlink()
        assert sum(len(batch.indices) for batch in data.batches(2)) == 3
    with open_data(tmp_path, [RGB]) as data:
        (tmp_path / "2.png").unlink()
        with pytest.raises(DataError, match=r"2\.png: no such file"):
            list(data.batches(2))


def test_without_any_readable_image_nothing_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxqat.data.columns.MAX_NAMED", 3)
    for n in range(9):
        (tmp_path / f"{n}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its 9 images can be read"):
        open_data(tmp_path, [RGB], skip_broken=True)
    assert caplog.text.count(".png: cannot be decoded") == 3
    assert caplog.text.count("More files") == 1


def test_only_regular_files_are_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"a\.npz: is not a regular file"):
        open_data(tmp_path / "a.npz", [RGB])
    with pytest.raises(DataError, match=r"a\.npz: is not a regular file"):
        open_data(tmp_path, [RGB])  # among the arrays of a folder
    with pytest.raises(DataError, match="/dev/zero: is not a regular file"):
        open_data("/dev/zero", [RGB])


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [save(tmp_path / f"{n}.png") for n in range(6)]
    monkeypatch.setattr("onnxqat.data.images.LARGE", 47)
    running, most = 0, 0

    def convert(image: Image.Image, mode: str) -> NDArray[np.uint8]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        running -= 1
        return pixels_of(image, mode)

    monkeypatch.setattr("onnxqat.data.images._pixels", convert)
    found, _ = read(tmp_path)
    np.testing.assert_array_equal(found, np.stack(images).transpose(0, 3, 1, 2))
    assert most == 1
