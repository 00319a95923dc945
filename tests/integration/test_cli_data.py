"""What commands say of data that a model was not made for, and of files that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from onnxqat.quantized import load_model
from onnxqat.settings import stored_settings
from tests.digits import write_digits
from tests.integration.test_cli import LENET, NORM, RULE, TUNE, document, invoke, process, run
from tests.normalized import IMAGES, MEAN, SCALE, network

SAID = "times the standard deviation that the network saw in training"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", 120)


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


@pytest.fixture(scope="module")
def everywhere(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as an image folder with splits, as lists, and as arrays in files of their own."""
    root = tmp_path_factory.mktemp("everywhere")
    folder = image_folder(root / "splits/images/val", digits, [str(n) for n in range(10)])
    (root / "splits/images/train").symlink_to(folder)
    files = sorted(folder.rglob("*.png"))
    lines = [f"{file.relative_to(root)} {file.parent.name}" for file in files]
    (root / "list.txt").write_text("\n".join(lines))
    names = [f"splits/images/val/{f.parent.name}/{f.name},digit {f.parent.name}" for f in files]
    (root / "list.csv").write_text("\n".join(["path,class", *names]))
    (root / "classes.txt").write_text("\n".join(f"digit {n}" for n in range(10)))
    (root / "arrays").mkdir()
    with np.load(digits) as arrays:
        np.save(root / "arrays/input.npy", arrays["images"])
        np.save(root / "arrays/y.npy", arrays["label"])
    return root


def test_data_give_the_same_figures_however_they_are_stored(
    digits: Path, everywhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = document("evaluate", LENET, digits, *NORM)
    for name, *words in (
        ("splits",),
        ("splits/images/val",),
        ("splits", "--split", "train"),
        ("list.txt",),
        ("list.csv", "--classes", everywhere / "classes.txt"),
        ("arrays",),
    ):
        found = document("evaluate", LENET, everywhere / name, *NORM, *words)
        assert found["metrics"] == expected["metrics"], name
        assert found["samples"] == 120


def test_as_many_samples_are_read_as_asked_for(
    digits: Path, everywhere: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "q.onnx", tmp_path / "out.onnx"
    assert document("evaluate", LENET, digits, *NORM, "--samples", 50)["samples"] == 50
    assert document("evaluate", LENET, digits, *NORM, "--samples", 500)["samples"] == 120
    run("equalize", LENET, "--data", digits, *NORM, "--samples", 2, "-o", tmp_path / "e.onnx")
    run("insert", LENET, *RULE, *NORM, "--data", digits, "-o", model)
    words = ("--train-samples", 60, "--val-data", digits, *TUNE)
    assert document("finetune", model, digits, *words, "-o", out)["samples"] == 120
    words = ("--train-samples", 60, *TUNE)
    tuned = document("finetune", model, everywhere / "splits", *words, "--force", "-o", out)
    assert tuned["samples"] == 6  # a tenth of them
    assert 0 <= tuned["waiting_for_data"] < 1
    run("report", out, digits, "--samples", 10, "-o", tmp_path / "r.html")
    assert "10 samples" in (tmp_path / "r.html").read_text()


def test_the_split_that_is_read_is_named(everywhere: Path) -> None:
    assert (
        "reading the split 'val'" in invoke("evaluate", LENET, everywhere / "splits", *NORM).stderr
    )


def test_answers_in_text_give_the_figures_of_their_tokens(tmp_path: Path) -> None:
    """The words of the text are the numbers of the tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {str(number): number for number in range(40)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    spans = LENET.parent / "spans-test.npz"
    lines = []
    with np.load(spans) as arrays:
        rows = zip(arrays["tokens"], arrays["starts"], arrays["ends"], strict=True)
        for tokens, first, last in rows:
            words = [str(token) for token in tokens]
            start = len(" ".join([*words[:first], ""]))
            answer = " ".join(words[first : last + 1])
            answers = {"text": [answer], "answer_start": [start]}
            lines.append(json.dumps({"context": " ".join(words), "answers": answers}))
    (tmp_path / "spans.jsonl").write_text("\n".join(lines))
    model = LENET.parent / "spans.onnx"
    truth = ("--truth", "start=starts", "--truth", "end=ends")
    expected = document("evaluate", model, spans, "--metric", "f1", *truth)
    text = ("--tokenizer", tmp_path / "tokenizer.json", "--text", "context")
    truth = ("--truth", "start=start_positions", "--truth", "end=end_positions")
    found = document("evaluate", model, tmp_path / "spans.jsonl", *text, "--metric", "f1", *truth)

    assert found["metrics"] == expected["metrics"]
    assert found["samples"] == expected["samples"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images whose red channel is their mask, with a box each; and two models."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for name in ("images/train", "masks/train", "labels/train"):
        (root / name).mkdir(parents=True)
    for number in range(24):
        mask = rng.integers(0, 3, (4, 4)).repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
        Image.fromarray(np.stack([80 * mask] * 3, -1)).save(root / f"images/train/{number}.png")
        Image.fromarray(mask).save(root / f"masks/train/{number}.png")
        (root / f"labels/train/{number}.txt").write_text("0 0.5 0.5 0.5 0.5")
    # scores of three classes: the brightness nearest to 0, 80 and 160
    wanted = np.array([0, 80, 160], np.float32) / 255
    weights = np.broadcast_to(2 / 3 * wanted[:, None, None, None], (3, 3, 1, 1)).copy()
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight", "bias"], ["scores"])],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [
            numpy_helper.from_array(weights, "weight"),
            numpy_helper.from_array(-(wanted**2), "bias"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), root / "net.onnx")
    nodes = [
        helper.make_node("ReduceMean", ["scores"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["targets"], ["most"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["targets_count", "most"], ["wanted"]),
        helper.make_node("Sub", ["mean", "wanted"], ["difference"]),
        helper.make_node("Mul", ["difference", "difference"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["loss"], keepdims=0),
    ]
    shapes = {"scores": ["N", 3, 16, 16], "targets": ["N", "most", 5], "targets_count": ["N"]}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    outputs = [helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])]
    graph = helper.make_graph(nodes, "loss", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), root / "loss.onnx")
    return root


def test_masks_and_boxes_beside_images_are_learned_from_and_measured(
    scenes: Path, tmp_path: Path
) -> None:
    model, out, folder = tmp_path / "q.onnx", tmp_path / "o.onnx", scenes / "images/train"
    scale = ("--scale", 1 / 255)
    words = (*scale, "--metric", "mean-iou", "--split", "train")
    found = document("evaluate", scenes / "net.onnx", scenes, *words)
    assert found["metrics"]["mean_iou"] == 1
    run("insert", scenes / "net.onnx", *RULE, *scale, "--data", scenes, "-o", model)
    common = ("--epochs", 2, "--batch-size", 4, "--lr", 0.1, "--select", "loss", "-o", out)
    common = (*common, "--val-data", folder)
    loss = ("--loss", "cross-entropy=mask", "--ignore-index", 255)
    tuned = document("finetune", model, scenes, *common, *loss, "--augment", "flip,resized-crop")
    assert tuned["loss"]["after"] < tuned["loss"]["before"]
    loss = ("--loss", scenes / "loss.onnx", "--augment", "flip,crop,resized-crop,jitter")
    tuned = document("finetune", model, folder, *common, *loss, "--force")
    assert tuned["loss"]["after"] < tuned["loss"]["before"]
