"""Boxes and masks stay on what they mark; colours against pillow's own changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image, ImageEnhance

from onnxqat.data import Augmentation, InputSpec, Preprocessing, open_data
from onnxqat.data.augmentation import _windows
from onnxqat.errors import DataError, TrainingError
from onnxqat.model import from_proto
from onnxqat.parallel import Workers
from onnxqat.train import Config
from onnxqat.train.batches import TrainingBatches
from onnxqat.train.given import with_arrays
from onnxqat.train.losses import array_input

MODELS = Path(__file__).parents[2] / "models"
SIZE = (48, 64)  # height and width
GEOMETRIC = ("flip", "crop", "resized-crop")


def scene(top, left, bottom, right):
    """A bright rectangle, its box, and its mask."""
    mask = np.zeros((1, *SIZE), np.int64)
    mask[0, top:bottom, left:right] = 1
    image = np.repeat(mask[:, None].astype(np.float32), 3, axis=1)
    box = [7, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    target = np.array([[box, [-1] * 5]], np.float32)
    target[0, 0, 1:] /= [SIZE[1], SIZE[0]] * 2
    return image, target, mask


@pytest.mark.parametrize("kinds", [*[(kind,) for kind in GEOMETRIC], GEOMETRIC])
@pytest.mark.parametrize("last", [False, True])
def test_a_box_and_a_mask_stay_on_their_object(kinds, last):
    image, target, mask = scene(14, 20, 34, 48)
    given = image.transpose(0, 2, 3, 1) if last else image
    moved = 0
    for seed in range(25):
        changes = Augmentation({"x": given}, kinds, np.random.default_rng(seed))
        seen = changes.images({"x": None})["x"]
        found, box = changes.masks(mask)[0], changes.targets(target)[0]
        bright = (seen[0, :, :, 0] if last else seen[0, 0]) > 0.5
        assert seen.shape == given.shape
        # nearest and bilinear differ at most where an edge lies
        assert (bright != found).mean() < 0.04
        (label, *place), other = box
        assert (other == -1).all()
        if label < 0:  # hardly anything is left
            assert bright.mean() < 0.02
            continue
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        x, y, width, height = np.array(place) * (SIZE[::-1] * 2)
        expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert label == 7
        assert expected == pytest.approx(corners, abs=1.01)
        moved += not np.allclose(box, target[0], atol=1e-6)
    assert moved > 5


def test_of_a_box_a_tenth_has_to_be_left():
    """Windows move over a box at the left edge, until it is gone."""
    image, target, _ = scene(0, 0, 48, 16)
    shares = {True: [], False: []}
    for seed in range(200):
        changes = Augmentation({"x": image}, ("resized-crop",), np.random.default_rng(seed))
        _, left, height, width = changes._draw.window[0]
        rest = max(min(0.25, left + width) - left, 0) * height
        box = changes.targets(target)[0, 0]
        shares[bool(box[0] >= 0)].append(rest / 0.25)
    assert min(shares[True]) >= 0.1
    assert max(shares[False]) < 0.1
    assert len(shares[False]) > 5


def test_windows_are_within_their_limits():
    found = _windows(2000, SIZE, np.random.default_rng(0))
    height, width = found[:, 2], found[:, 3]
    aspect = width * SIZE[1] / (height * SIZE[0])
    fits = (height < 1) | (width < 1)  # the others are the whole image

    assert fits.mean() > 0.95
    assert (height * width >= 0.25 - 1e-9).all()
    assert ((aspect >= 3 / 4 - 1e-9) & (aspect <= 4 / 3 + 1e-9))[fits].all()
    assert (found >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= 1 + 1e-9).all()
    assert found[:, 2].std() > 0.05


@pytest.mark.parametrize("pixel_format", ["rgb", "bgr"])
def test_jitter_is_what_pillow_does(pixel_format):
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3)).astype(np.uint8)
    mean, scale = (120.0, 110.0, 100.0), (0.02, 0.018, 0.017)
    given = Preprocessing(mean=mean, scale=scale, pixel_format=pixel_format)
    ordered = pixels if pixel_format == "rgb" else pixels[..., ::-1]
    images = ((ordered - np.array(mean)) * np.array(scale)).astype(np.float32)
    changes = Augmentation(
        {"x": images.transpose(0, 3, 1, 2)}, ("jitter",), np.random.default_rng(1)
    )
    found = changes.images({"x": given})["x"].transpose(0, 2, 3, 1) / np.array(scale) + mean
    factors = changes._draw.factors

    assert ((factors >= 0.6) & (factors <= 1.4)).all()
    for image, result, (brightness, contrast, saturation) in zip(
        pixels, found, factors, strict=True
    ):
        expected = ImageEnhance.Brightness(Image.fromarray(image)).enhance(brightness)
        expected = ImageEnhance.Contrast(expected).enhance(contrast)
        expected = np.asarray(ImageEnhance.Color(expected).enhance(saturation))
        result = result if pixel_format == "rgb" else result[..., ::-1]
        # pillow cuts off what is behind the point after each change
        assert np.abs(result - expected).max() < 4
        assert np.abs(result - image).mean() > 1


def test_jitter_of_bytes_and_of_grey_images():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    changes = Augmentation({"x": pixels}, ("jitter",), np.random.default_rng(0))
    found = changes.images({"x": Preprocessing()})["x"]

    assert found.dtype == np.uint8
    assert (found != pixels).any()


def test_what_cannot_be_changed():
    rng = np.random.default_rng(0)
    images = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(DataError, match="'x' does not get pixels from 0 to 255"):
        Augmentation({"x": images}, ("jitter",), rng).images({"x": None})
    with pytest.raises(DataError, match=r"have the sizes \[\(2, 4\), \(4, 4\)\]"):
        Augmentation({"x": images, "y": images[:, :, :2]}, ("flip",), rng)


def test_all_images_of_a_sample_are_changed_alike():
    images = np.random.default_rng(0).normal(size=(8, 3, *SIZE)).astype(np.float32)
    changes = Augmentation({"x": images, "y": 2 * images}, GEOMETRIC, np.random.default_rng(0))
    found = changes.images({"x": None, "y": None})

    np.testing.assert_allclose(found["y"], 2 * found["x"], rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with two boxes each, and masks that are the red channel."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for name in ("images/train", "labels/train", "masks/train"):
        (root / name).mkdir(parents=True)
    for number in range(12):
        pixels = rng.integers(0, 3, (8, 8)).repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
        Image.fromarray(np.stack([pixels] * 3, -1)).save(root / f"images/train/{number:02}.png")
        Image.fromarray(pixels).save(root / f"masks/train/{number:02}.png")
        lines = [f"1 {x} 0.5 0.2 0.4" for x in (0.12, 0.7)]
        (root / f"labels/train/{number:02}.txt").write_text("\n".join(lines))
    return root / "images/train"


NAMES = {"targets": "float32", "targets_count": "int64", "mask": "int64"}
INPUTS = {array_input(key, dtype) for key, dtype in NAMES.items()}


def steps(folder, inputs=INPUTS, **settings):
    config = Config(batch_size=4, **settings)
    spec = InputSpec(name="x", shape=("n", 3, 32, 32), dtype="float32")
    model = from_proto(onnx.load(MODELS / "lenet5.onnx"))  # asked for its classes alone
    with open_data(folder, [spec]) as data:
        batches = TrainingBatches(
            model, with_arrays(data, set(inputs), config), None, config, Workers()
        )
        yield from (list(step) for step in batches.epoch(2))


def test_a_training_gets_what_is_moved_along(folder):
    kinds = (*GEOMETRIC, "jitter")
    names = {key: array_input(key, dtype) for key, dtype in NAMES.items()}
    (plain, *_), (moved, *_) = zip(*steps(folder)), zip(*steps(folder, augment=kinds))  # noqa: B905
    counts = set()
    for before, after in zip(plain, moved, strict=True):
        targets = after[names["targets"]]
        there = targets[:, :, 0] >= 0
        np.testing.assert_array_equal(after[names["targets_count"]], there.sum(axis=1))
        counts |= set(there.sum(axis=1).tolist())
        assert (targets[there][:, 1:] <= 1).all()
        assert not np.array_equal(before[names["targets"]], targets)
        assert not np.array_equal(before[names["mask"]], after[names["mask"]])
    assert counts == {1, 2}
    (only,) = zip(*steps(folder, {names["targets_count"]}, augment=kinds))  # noqa: B905
    for ours, theirs in zip(only, moved, strict=True):  # with nothing else to count
        np.testing.assert_array_equal(ours[names["targets_count"]], theirs[names["targets_count"]])


def test_what_does_not_move_along_is_refused(folder):
    with pytest.raises(TrainingError, match="but not the array 'boxes' that the loss reads"):
        list(steps(folder, {array_input("boxes", "float32")}, augment=("flip",)))
