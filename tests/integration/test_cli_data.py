"""What commands say of data that a model was not made for, and of files that cannot be read."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxqat.quantized import load_model
from onnxqat.settings import stored_settings
from tests.integration.test_cli import LENET, NORM, RULE, TUNE, document, process, run
from tests.normalized import IMAGES, MEAN, SCALE, network

SAID = "times the standard deviation that the network saw in training"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    with np.load(LENET.parent / "digits-train.npz") as arrays:
        np.savez(path, images=arrays["images"][:120], label=arrays["label"][:120])
    return path


def image_folder(parent: Path, digits: Path, names: list[str]) -> Path:
    with np.load(digits) as arrays:
        for number, (image, label) in enumerate(
            zip(arrays["images"], arrays["label"], strict=True)
        ):
            (parent / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(parent / names[label] / f"{number}.png")
    return parent


@pytest.mark.parametrize(
    ("right", "times"), [(("--mean", "--scale"), 0), (("--mean",), 1), ((), 1)]
)
def test_every_command_tells_once_of_wrong_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, right: Any, times: int
) -> None:
    def said(*words: Any) -> int:
        caplog.clear()
        run(*words)
        return caplog.text.count(SAID)

    data, floats = tmp_path / "images.npz", tmp_path / "net.onnx"
    np.savez(data, images=IMAGES.astype(np.float32))
    network().save(floats)
    values = {"--mean": MEAN, "--scale": SCALE}
    settings = [w for name in right for w in (name, ",".join(map(str, values[name])))]
    out = [tmp_path / f"{n}.onnx" for n in range(5)]
    assert said("insert", floats, *settings, "-o", out[0]) == 0
    assert said("insert", floats, *settings, "--data", data, "-o", out[1]) == times
    assert said("calibrate", out[0], data, "-o", out[2]) == times
    assert said("finetune", out[0], data, *TUNE, "-o", out[3]) == times
    assert said("finetune", out[1], data, *TUNE, "-o", out[4]) == times
    assert said("evaluate", floats, data, *settings) == times
    assert said("evaluate", out[1], data) == times


def test_wrong_labels_are_doubted(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(digits) as arrays:
        moved = (arrays["label"] + 1) % 10
        np.savez(tmp_path / "wrong.npz", images=arrays["images"], label=moved)
    run("evaluate", LENET, digits, *NORM)
    assert "labels" not in caplog.text
    found = document("evaluate", LENET, tmp_path / "wrong.npz", *NORM)
    assert f"is right on {found['metrics']['top1']:.2%} of 120 labels" in caplog.text


def test_a_list_of_classes_is_stored_and_used_by_later_commands(
    digits: Path, tmp_path: Path
) -> None:
    names = [f"n{9 - n}" for n in range(10)]  # their order is not that of the classes
    folder = image_folder(tmp_path / "data", digits, names)
    (tmp_path / "names.txt").write_text("\n".join(names))
    model = tmp_path / "out.onnx"
    given = ("--data", folder, "--classes", tmp_path / "names.txt")
    run("insert", LENET, *RULE, *NORM, *given, "-o", model)

    assert stored_settings(load_model(model)).classes == {n: i for i, n in enumerate(names)}
    assert document("evaluate", model, folder)["metrics"]["top1"] > 0.9


def test_broken_images_are_skipped_in_every_command(digits: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", digits, [str(n) for n in range(10)])
    broken = sorted(folder.rglob("*.png"))[::7]
    for path in broken:
        path.write_bytes(b"no image")
    model, skip = tmp_path / "q.onnx", "--skip-broken"
    run("insert", LENET, *RULE, *NORM, "--data", folder, skip, "-o", model)
    run("finetune", model, folder, *TUNE, skip, "-o", tmp_path / "out.onnx")

    assert document("evaluate", model, folder, skip)["samples"] == 120 - len(broken)


@pytest.mark.parametrize(
    "words",
    [
        ("check", LENET, "--rules", "fifo.toml"),
        ("check", LENET, "--overrides", "fifo.toml"),
        ("import-table", "fifo.toml", LENET, *RULE),
        ("evaluate", LENET, "fifo.npz"),
        ("evaluate", LENET, "digits.npz", "--classes", "fifo.toml"),
    ],
)
def test_pipes_are_no_input(digits: Path, tmp_path: Path, words: Any) -> None:
    (tmp_path / "digits.npz").symlink_to(digits)
    for name in ("fifo.toml", "fifo.npz"):
        os.mkfifo(tmp_path / name)
    result = subprocess.run(
        process(*words), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert result.returncode == 1
    assert result.stderr.startswith("Error: fifo.")
    assert "is not a regular file" in result.stderr
    assert result.stderr.count("\n") == 1
