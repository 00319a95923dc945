"""Preprocessing against numpy and pillow written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxqat.data import InputSpec, Preprocessing, open_data
from onnxqat.errors import DataError

RNG = np.random.default_rng(1)
NCHW = InputSpec(name="x", shape=("n", 3, 8, 6), dtype="float32")
NHWC = InputSpec(name="x", shape=("n", 8, 6, 3), dtype="float32")
PIXELS = RNG.integers(0, 256, (5, 8, 6, 3)).astype(np.uint8)
MEAN, SCALE = (123.675, 116.28, 103.53), (0.0171, 0.0175, 0.0174)


def read(tmp_path: Path, x: NDArray[Any], spec: InputSpec = NCHW, **options: Any) -> NDArray[Any]:
    np.savez(tmp_path / "a.npz", x=x)
    with open_data(tmp_path / "a.npz", [spec], preprocessing=Preprocessing(**options)) as data:
        (batch,) = data.batches(100)
    result = batch.inputs["x"]
    assert result.flags.c_contiguous
    assert result.dtype == np.dtype(spec.dtype)
    return result


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_the_default_leaves_values_alone(tmp_path: Path, dtype: str) -> None:
    np.testing.assert_array_equal(
        read(tmp_path, PIXELS.astype(dtype)), PIXELS.transpose(0, 3, 1, 2).astype(np.float32)
    )


def test_negative_zero_and_tiny_values_survive_the_default(tmp_path: Path) -> None:
    x = np.full((1, 3, 8, 6), -0.0, np.float32)
    x[0, 0, 0, 0] = 1e-45
    assert read(tmp_path, x).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float16"])
def test_mean_and_scale_are_float32_arithmetic(tmp_path: Path, dtype: str) -> None:
    found = read(tmp_path, PIXELS.astype(dtype), mean=MEAN, scale=SCALE)
    for n, c, h, w in np.ndindex(found.shape):
        expected = (np.float32(PIXELS[n, h, w, c]) - np.float32(MEAN[c])) * np.float32(SCALE[c])
        assert found[n, c, h, w] == expected


def test_one_value_serves_all_channels(tmp_path: Path) -> None:
    found = read(tmp_path, PIXELS, mean=(127.5,), scale=(1 / 128,))
    expected = (PIXELS.astype(np.float32) - np.float32(127.5)) * np.float32(1 / 128)
    np.testing.assert_array_equal(found, expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("model", [NCHW, NHWC])
@pytest.mark.parametrize("explicit", [True, False])
def test_both_layouts_of_data_give_the_same(
    tmp_path: Path, model: InputSpec, explicit: bool
) -> None:
    options: dict[str, Any] = {"mean": MEAN, "scale": SCALE}
    last = read(tmp_path, PIXELS, model, **options, layout="nhwc" if explicit else None)
    first = read(
        tmp_path,
        PIXELS.transpose(0, 3, 1, 2),
        model,
        **options,
        layout="nchw" if explicit else None,
    )
    expected = (PIXELS.astype(np.float32) - np.array(MEAN, np.float32)) * np.array(
        SCALE, np.float32
    )
    np.testing.assert_array_equal(
        last, expected.transpose(0, 3, 1, 2) if model is NCHW else expected
    )
    np.testing.assert_array_equal(first, last)


def test_an_ambiguous_layout_is_asked_for(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 3, 3, 3)).astype(np.float32)
    spec = InputSpec(name="x", shape=("n", 3, "h", "w"), dtype="float32")
    with pytest.raises(DataError, match=r"channels-first and channels-last\. Give --layout"):
        read(tmp_path, x, spec)
    np.testing.assert_array_equal(read(tmp_path, x, spec, layout="nchw"), x)
    np.testing.assert_array_equal(read(tmp_path, x, spec, layout="nhwc"), x.transpose(0, 3, 1, 2))


def test_a_layout_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(8, 6, 3\) with --layout nchw do not fit"):
        read(tmp_path, PIXELS, layout="nchw")


def test_feature_maps_are_taken_as_they_are(tmp_path: Path) -> None:
    x = RNG.standard_normal((2, 64, 7, 5)).astype(np.float32)
    spec = InputSpec(name="x", shape=(None, 64, 7, 5), dtype="float32")
    np.testing.assert_array_equal(read(tmp_path, x, spec), x)


def test_uint8_inputs_get_pixels_unchanged(tmp_path: Path) -> None:
    spec = InputSpec(name="x", shape=("n", 3, 8, 6), dtype="uint8")
    np.testing.assert_array_equal(read(tmp_path, PIXELS, spec), PIXELS.transpose(0, 3, 1, 2))
    with pytest.raises(DataError, match="--mean and --scale need a float image input"):
        read(tmp_path, PIXELS, spec, mean=(1.0,))


def test_mean_and_scale_reach_float16_by_way_of_float32(tmp_path: Path) -> None:
    spec = InputSpec(name="x", shape=("n", 3, 8, 6), dtype="float16")
    found = read(tmp_path, PIXELS, spec, mean=MEAN, scale=SCALE)
    exact = (PIXELS.astype(np.float32) - np.array(MEAN, np.float32)) * np.array(SCALE, np.float32)
    np.testing.assert_array_equal(found, exact.astype(np.float16).transpose(0, 3, 1, 2))


def test_preprocessing_without_an_image_input_is_refused(tmp_path: Path) -> None:
    spec = InputSpec(name="x", shape=("n", 4), dtype="float32")
    with pytest.raises(DataError, match="--mean and --scale need a float image input"):
        read(tmp_path, np.zeros((2, 4), np.float32), spec, scale=(2.0,))
    with pytest.raises(DataError, match="--resize-dims and --crop need an image input"):
        read(tmp_path, np.zeros((2, 4), np.float32), spec, crop=(2, 2))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_uint8_arrays_are_resized_as_pillow_does(tmp_path: Path, layout: str) -> None:
    big = RNG.integers(0, 256, (3, 20, 17, 3)).astype(np.uint8)
    stored = big if layout == "nhwc" else big.transpose(0, 3, 1, 2)
    found = read(tmp_path, stored, resize_dims=(12, 9), crop=(8, 6), mean=(2.0,))
    for image, result in zip(big, found, strict=True):
        resized = Image.fromarray(image).resize((9, 12), Image.Resampling.BILINEAR)
        cropped = np.asarray(resized)[2:10, 1:7]
        np.testing.assert_array_equal(result, cropped.transpose(2, 0, 1).astype(np.float32) - 2)


def test_float_arrays_are_resized_without_rounding(tmp_path: Path) -> None:
    big = RNG.standard_normal((2, 3, 16, 13)).astype(np.float32)
    found = read(tmp_path, big, resize_dims=(8, 6))
    for n, c in np.ndindex(2, 3):
        plane = Image.fromarray(big[n, c]).resize((6, 8), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found[n, c], np.asarray(plane))


@pytest.mark.parametrize(
    ("height", "width", "inner", "top", "left"),
    [(16, 6, (8, 3), 0, 1), (6, 16, (2, 6), 3, 0), (16, 12, (8, 6), 0, 0), (1, 90, (1, 6), 3, 0)],
)
@pytest.mark.parametrize("pad", [114.0, 0.5])
def test_letterbox(
    tmp_path: Path, height: int, width: int, inner: tuple[int, int], top: int, left: int, pad: float
) -> None:
    big = RNG.integers(0, 256, (1, height, width, 3)).astype(np.uint8)
    found = read(tmp_path, big, resize_dims=(8, 6), keep_aspect_ratio=True, pad_value=pad)
    resized = Image.fromarray(big[0]).resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
    expected = np.full((8, 6, 3), pad, np.float32)
    expected[top : top + inner[0], left : left + inner[1]] = np.asarray(resized)
    np.testing.assert_array_equal(found[0], expected.transpose(2, 0, 1))


def test_a_crop_larger_than_the_arrays(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"with --crop \(9, 6\) do not fit model input 'x'"):
        read(tmp_path, PIXELS, crop=(9, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": ()}, r"--mean: \(\) are not finite numbers"),
        ({"mean": (float("nan"),)}, r"--mean: .* are not finite numbers"),
        ({"scale": (1.0, 0.0, 1.0)}, r"--scale: .* makes a channel constant"),
        ({"mean": (1.0, 2.0, 3.0), "pixel_format": "gray"}, r"3 values for gray images"),
        ({"resize_dims": (0, 4)}, r"--resize-dims: \(0, 4\) is not a valid size"),
        ({"crop": (4, -1)}, r"--crop: \(4, -1\) is not a valid size"),
        ({"resize_dims": (8, 8), "crop": (8, 9)}, r"--crop: \(8, 9\) does not fit"),
        ({"pad_value": 1.0}, r"--pad-value: 1\.0 has no effect"),
        ({"pad_value": float("inf"), "keep_aspect_ratio": True}, r"--pad-value: inf is not"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Preprocessing(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (1.0, 2.0)}, r"has 3 channels, but --mean has 2 values"),
        ({"scale": (1.0, 2.0, 3.0, 4.0)}, r"has 3 channels, but --scale has 4 values"),
        ({"pixel_format": "gray"}, r"has 3 channels, but --pixel-format is 'gray'"),
    ],
)
def test_channels_must_agree(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, PIXELS, **options)


def test_preprocessing_survives_json() -> None:
    given = Preprocessing(
        mean=MEAN,
        scale=SCALE,
        resize_dims=(256, 200),
        crop=(224, 192),
        keep_aspect_ratio=True,
        pad_value=114.0,
        pixel_format="bgr",
        layout="nhwc",
    )
    assert msgspec.json.decode(msgspec.json.encode(given), type=Preprocessing) == given
    with pytest.raises(DataError, match="--crop"):
        msgspec.json.decode('{"crop": [0, 1]}', type=Preprocessing)
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode('{"means": [0]}', type=Preprocessing)
