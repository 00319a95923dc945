"""Resizing against the packages whose definitions it follows."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxqat.data import InputSpec, Preprocessing, open_data
from onnxqat.data.resize import nearest, resize_by_opencv

SIZES = [  # from height and width to height and width
    ((48, 64), (24, 32)),  # exactly half: OpenCV takes the mean of four
    ((48, 64), (24, 64)),
    ((48, 64), (48, 32)),
    ((37, 53), (224, 97)),
    ((125, 500), (92, 224)),
    ((90, 300), (90, 299)),
    ((1, 1), (5, 7)),
    ((2, 9), (1, 1)),
    ((3, 1), (64, 64)),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bytes_are_those_of_opencv(before, after, channels):
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (*before, channels)).astype(np.uint8)
    expected = cv2.resize(image, after[::-1], interpolation=cv2.INTER_LINEAR)

    found = resize_by_opencv(image, *after)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected.reshape(*after, channels))


def test_random_sizes_give_the_bytes_of_opencv():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(1)
    for height, width, *after in rng.integers(1, 60, (200, 4)).tolist():
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        expected = cv2.resize(image, after[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(resize_by_opencv(image, *after), expected)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_floats_follow_the_same_formula(before, after):
    """Against float64, without OpenCV: its own sums of float32 differ from machine to machine."""
    image = np.random.default_rng(2).normal(size=(*before, 2)).astype(np.float32)
    found = resize_by_opencv(image, *after)

    def taps(there, length):
        place = np.clip((np.arange(length) + 0.5) * there / length - 0.5, 0, there - 1)
        first = np.minimum(place.astype(int), max(there - 2, 0))
        matrix = np.zeros((length, there))
        matrix[np.arange(length), first] = 1 - (place - first)
        matrix[np.arange(length), np.minimum(first + 1, there - 1)] += place - first
        return matrix

    rows, columns = (taps(b, a) for b, a in zip(before, after, strict=True))
    expected = np.stack([rows @ plane @ columns.T for plane in image.transpose(2, 0, 1)], -1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_nearest_pixel_is_taken():
    image = np.arange(20).reshape(4, 5, 1)

    assert nearest(image, 2, 5)[:, 0, 0].tolist() == [5, 15]
    assert nearest(image, 4, 3)[0, :, 0].tolist() == [0, 2, 4]
    assert nearest(image, 8, 5)[:, 0, 0].tolist() == [0, 0, 5, 5, 10, 10, 15, 15]


@pytest.mark.parametrize("letterbox", [False, True])
def test_files_and_arrays_are_resized_as_asked(tmp_path, letterbox):
    pixels = np.random.default_rng(3).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    np.savez(tmp_path / "a.npz", x=pixels[None])
    spec = InputSpec(name="x", shape=("n", 12, 16, 3), dtype="float32")
    given = Preprocessing(resize_dims=(12, 16), resize_by="opencv", keep_aspect_ratio=letterbox)
    expected = np.zeros((12, 16, 3), np.float32)
    if letterbox:
        expected[:, 4:12] = resize_by_opencv(pixels, 12, 8)
    else:
        expected[:] = resize_by_opencv(pixels, 12, 16)
    for source in ("images", "a.npz"):
        with open_data(tmp_path / source, [spec], preprocessing=given) as data:
            (batch,) = data.batches(1)
        np.testing.assert_array_equal(batch.inputs["x"][0], expected)
